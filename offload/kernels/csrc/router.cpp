// The router: scores, and the choice of experts by them.
#include "router.h"

#include <cmath>

namespace ep {
namespace {

// Indices of the `want` largest values in descending order; equal values by ascending index.
void top_indices(const float* values, int64_t n, int64_t want, int64_t* out) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order[static_cast<size_t>(i)] = i;
  std::partial_sort(order.begin(), order.begin() + want, order.end(), [values](int64_t a, int64_t b) {
    return values[a] != values[b] ? values[a] > values[b] : a < b;
  });
  std::copy(order.begin(), order.begin() + want, out);
}

float top_two_sum(const float* values, int64_t n) {
  float first = -INFINITY, second = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] > first) {
      second = first;
      first = values[i];
    } else if (values[i] > second) {
      second = values[i];
    }
  }
  return n > 1 ? first + second : first;
}

}  // namespace

void route(const ep_router& c, const float* scores, const float* bias, int64_t* ids, float* weights) {
  const int64_t per_group = c.experts / c.groups;
  std::vector<float> choice(static_cast<size_t>(c.experts)), group(static_cast<size_t>(c.groups));
  for (int64_t e = 0; e < c.experts; ++e) choice[static_cast<size_t>(e)] = scores[e] + bias[e];
  if (c.top_groups < c.groups) {
    for (int64_t g = 0; g < c.groups; ++g) {
      group[static_cast<size_t>(g)] = top_two_sum(choice.data() + g * per_group, per_group);
    }
    std::vector<int64_t> kept(static_cast<size_t>(c.top_groups));
    top_indices(group.data(), c.groups, c.top_groups, kept.data());
    std::vector<bool> keep(static_cast<size_t>(c.groups), false);
    for (const int64_t g : kept) keep[static_cast<size_t>(g)] = true;
    for (int64_t e = 0; e < c.experts; ++e) {
      if (!keep[static_cast<size_t>(e / per_group)]) choice[static_cast<size_t>(e)] = -INFINITY;
    }
  }
  top_indices(choice.data(), c.experts, c.top_k, ids);
  float total = 0.0f;
  for (int32_t j = 0; j < c.top_k; ++j) {
    weights[j] = scores[ids[j]];
    total += weights[j];
  }
  for (int32_t j = 0; j < c.top_k; ++j) {
    if (c.normalize != 0) weights[j] /= total + 1e-20f;
    weights[j] *= c.scaling;
  }
}

int64_t router_scores(Library& lib, const ep_weight& weight, const float* x, int64_t tokens, float* scores) {
  const int64_t bad = linear(lib, weight, x, tokens, scores);
  if (bad == 0) lib.isa->sigmoid(scores, scores, tokens * weight.rows);
  return bad;
}

}  // namespace ep

EP_API int64_t ep_router_topk(ep_context* context, const ep_router* config, const float* x, int64_t tokens, const ep_weight* weight,
                              const float* bias, int64_t* ids, float* weights) {
  ep::Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  std::vector<float> scores(static_cast<size_t>(tokens * config->experts));
  const int64_t bad = ep::router_scores(lib, *weight, x, tokens, scores.data());
  if (bad != 0) return bad;
  for (int64_t t = 0; t < tokens; ++t) {
    ep::route(*config, scores.data() + t * config->experts, bias, ids + t * config->top_k, weights + t * config->top_k);
  }
  return 0;
}
