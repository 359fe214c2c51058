// Experts: the routed ones, the sum of their results, the two halves of an MoE block, and their entry points.
#include "experts.h"

#include "router.h"

namespace ep {
namespace {

constexpr int64_t kSwigluTokens = 32;
constexpr int64_t kSwigluFloats = 4096;  // of gate and of up: 16 KiB each, half of a core's first cache

// Rows [first, last) of gate and up for all tokens of an expert, and their SwiGLU product. The fewer tokens, the more
// rows go through gate before up has its turn: each change of the matrix breaks the stream of reads.
void gate_up(const Library& lib, const Expert& e, int64_t first, int64_t last) {
  float gate[kSwigluFloats], up[kSwigluFloats];
  float* gate_rows[kSwigluTokens];
  float* up_rows[kSwigluTokens];
  const int64_t tile = std::min(kSwigluTokens, e.count), block = kSwigluFloats / tile / 16 * 16;
  for (int64_t m = 0; m < tile; ++m) {
    gate_rows[m] = gate + m * block;
    up_rows[m] = up + m * block;
  }
  for (int64_t n = first; n < last; n += block) {
    const int64_t end = std::min(last, n + block);
    for (int64_t t = 0; t < e.count; t += tile) {
      const int64_t tokens = std::min(tile, e.count - t);
      lib.isa->rows({&e.gate, n, end, e.x + t, gate_rows, n, tokens});
      lib.isa->rows({&e.up, n, end, e.x + t, up_rows, n, tokens});
      for (int64_t m = 0; m < tokens; ++m) {
        lib.isa->silu_mul(gate_rows[m], up_rows[m], e.h_float[t + m] + n, end - n);
      }
    }
  }
}

}  // namespace

void SharedExpert::begin(Library& lib, const ep_weight* mlp, const float* x, int64_t tokens) {
  lib.pool.finish();  // the memory may be in use
  ++generation_;
  lib_ = &lib;
  tokens_ = tokens;
  block_ = {mlp[0], mlp[1], mlp[2], nullptr, tokens, nullptr, nullptr, nullptr, nullptr};
  const int64_t hidden = block_.down.rows, inner = block_.down.cols;
  const int64_t x_stride = lib.isa->act_bytes(block_.gate), h_stride = lib.isa->act_bytes(block_.down);
  uint8_t *x_act, *h_act;
  float* h_rows;
  Scratch scratch;
  scratch.add(&x_act, tokens * x_stride);
  scratch.add(&h_act, tokens * h_stride);
  scratch.add(&h_rows, tokens * inner);
  scratch.add(&out_, tokens * hidden);
  scratch.add(&block_.x, tokens);
  scratch.add(&block_.h, tokens);
  scratch.add(&block_.h_float, tokens);
  scratch.add(&block_.out, tokens);
  scratch.place(memory_);
  for (int64_t t = 0; t < tokens; ++t) {
    block_.x[t] = x_act + t * x_stride;
    block_.h[t] = h_act + t * h_stride;
    block_.h_float[t] = h_rows + t * inner;
    block_.out[t] = out_ + t * hidden;
  }
  FirstBad bad;
  prepare_rows(lib, block_.gate, x, nullptr, tokens, x_act, x_stride, bad);
  bad_ = bad.value();
  cut_ = Cut(lib.pool.threads(), tokens);
  cut_.add(inner, row_bytes(block_.gate) + row_bytes(block_.up));
  cut_.finish();
  stage_ = Stage::kUp;
  lib.pool.start(
      cut_.pieces(),
      [](void* self, int64_t piece) {
        const auto* shared = static_cast<const SharedExpert*>(self);
        shared->cut_.each(piece, [&](size_t, int64_t first, int64_t last) { gate_up(*shared->lib_, shared->block_, first, last); });
      },
      this);
}

bool SharedExpert::needs_down(Library& lib) {
  if (stage_ != Stage::kUp) return false;
  lib.pool.finish();
  for (int64_t t = 0; t < tokens_; ++t) {
    if (!lib.isa->prepare(block_.down, block_.h_float[t], block_.h[t]) && bad_ == 0) bad_ = t + 1;
  }
  stage_ = Stage::kDown;
  return true;
}

const float* SharedExpert::finish(Library& lib) {
  if (needs_down(lib)) {
    const Product down{&block_.down, block_.h, block_.out};
    multiply(lib, &down, 1, tokens_);
  }
  return out_;
}

namespace {

int64_t run_experts(Library& lib, std::vector<Expert>& experts, const float* x, int64_t tokens, int64_t k, float* out) {
  if (experts.empty()) return 0;
  const ep_weight& gate = experts[0].gate;
  const ep_weight& down = experts[0].down;
  const int64_t hidden = down.rows, inner = down.cols;
  std::vector<int64_t> slot_of(static_cast<size_t>(tokens), -1), used;
  int64_t total = 0;
  for (const Expert& e : experts) {
    for (int64_t i = 0; i < e.count; ++i) {
      if (e.positions[i] < 0 || e.positions[i] >= tokens * k) return -1;
      int64_t& slot = slot_of[static_cast<size_t>(e.positions[i] / k)];
      if (slot < 0) {
        slot = static_cast<int64_t>(used.size());
        used.push_back(e.positions[i] / k);
      }
    }
    total += e.count;
  }
  const int64_t x_stride = lib.isa->act_bytes(gate), h_stride = lib.isa->act_bytes(down);
  uint8_t *x_act, *h_act;
  float* h_rows;
  const uint8_t** x_pointers;
  uint8_t** h_pointers;
  float **h_float_pointers, **out_pointers;
  Scratch scratch;
  scratch.add(&x_act, static_cast<int64_t>(used.size()) * x_stride);
  scratch.add(&h_act, total * h_stride);
  scratch.add(&h_rows, total * inner);
  scratch.add(&x_pointers, total);
  scratch.add(&h_pointers, total);
  scratch.add(&h_float_pointers, total);
  scratch.add(&out_pointers, total);
  scratch.place(lib);

  std::vector<int64_t> owner;  // token of each intermediate row, for error reports
  int64_t at = 0;
  for (Expert& e : experts) {
    e.x = x_pointers + at;
    e.h = h_pointers + at;
    e.h_float = h_float_pointers + at;
    e.out = out_pointers + at;
    for (int64_t i = 0; i < e.count; ++i, ++at) {
      const int64_t token = e.positions[i] / k;
      x_pointers[at] = x_act + slot_of[static_cast<size_t>(token)] * x_stride;
      h_pointers[at] = h_act + at * h_stride;
      h_float_pointers[at] = h_rows + at * inner;
      out_pointers[at] = out + e.positions[i] * hidden;
      owner.push_back(token);
    }
  }

  FirstBad bad;
  prepare_rows(lib, gate, x, used.data(), static_cast<int64_t>(used.size()), x_act, x_stride, bad);
  int64_t most_tokens = 0;
  for (const Expert& e : experts) most_tokens = std::max(most_tokens, e.count);
  Cut up_cut(lib.pool.threads(), most_tokens), down_cut(lib.pool.threads(), most_tokens);
  for (size_t i = 0; i < experts.size(); ++i) {
    up_cut.add(inner, 2 * row_bytes(gate));
    down_cut.add(hidden, row_bytes(down));
  }
  up_cut.finish();
  lib.pool.each(up_cut.pieces(), [&](int64_t piece) {
    up_cut.each(piece, [&](size_t i, int64_t first, int64_t last) { gate_up(lib, experts[i], first, last); });
  });
  const int64_t prepare_chunk = std::max<int64_t>(1, 8192 / inner);
  lib.pool.each(ceil_div(total, prepare_chunk), [&](int64_t chunk) {
    for (int64_t i = chunk * prepare_chunk; i < std::min(total, (chunk + 1) * prepare_chunk); ++i) {
      if (!lib.isa->prepare(down, h_float_pointers[i], h_pointers[i])) bad.note(owner[static_cast<size_t>(i)]);
    }
  });
  if (lib.shared->needs_down(lib)) {
    const ep_weight& w = lib.shared->block().down;
    down_cut.add(w.rows, row_bytes(w));
  }
  down_cut.finish();
  lib.pool.each(down_cut.pieces(), [&](int64_t piece) {
    down_cut.each(piece, [&](size_t i, int64_t first, int64_t last) {
      const Expert& e = i < experts.size() ? experts[i] : lib.shared->block();
      lib.isa->rows({&e.down, first, last, e.h, e.out, 0, e.count});
    });
  });
  return bad.value();
}

// One expert of a layer as `layout` describes it, at `base`.
Expert place_expert(const ep_weight* layout, uint64_t base, const int64_t* positions, int64_t count) {
  Expert e{layout[0], layout[1], layout[2], positions, count, nullptr, nullptr, nullptr, nullptr};
  for (ep_weight* w : {&e.gate, &e.up, &e.down}) {
    w->payload += base;
    w->scale += base;
  }
  return e;
}

// The weighted sum of a token's k rows of `partial`, in ascending order of expert ids.
void combine(const Library& lib, const float* partial, const int64_t* ids, const float* weights, int64_t k, int64_t hidden, float* sum) {
  std::vector<int64_t> order(static_cast<size_t>(k));
  for (int64_t j = 0; j < k; ++j) order[static_cast<size_t>(j)] = j;
  std::sort(order.begin(), order.end(), [ids](int64_t a, int64_t b) { return ids[a] != ids[b] ? ids[a] < ids[b] : a < b; });
  std::memset(sum, 0, static_cast<size_t>(hidden) * 4);
  for (const int64_t j : order) lib.isa->axpy(weights[j], partial + j * hidden, sum, hidden);
}

// out = hidden + (routed + shared expert of x).
int64_t add_shared(Library& lib, const ep_moe_layer& l, const float* hidden, const float* x, const float* routed, int64_t tokens,
                   uint64_t generation, float* out) {
  const int64_t count = tokens * l.router.cols;
  if (l.has_shared == 0) {
    for (int64_t i = 0; i < count; ++i) out[i] = hidden[i] + routed[i];
    return 0;
  }
  // Another caller's block came between: begin anew.
  if (generation != lib.shared->generation()) lib.shared->begin(lib, l.shared, x, tokens);
  const float* shared = lib.shared->finish(lib);
  for (int64_t i = 0; i < count; ++i) out[i] = hidden[i] + (routed[i] + shared[i]);
  return lib.shared->bad();
}

}  // namespace

int64_t begin_moe(Library& lib, const ep_moe_layer& l, const float* hidden, int64_t tokens, float* x, int64_t* ids, float* weights) {
  const int64_t width = l.router.cols, experts = l.router.rows, k = l.config.top_k;
  for (int64_t t = 0; t < tokens; ++t) {
    lib.isa->rms_norm(hidden + t * width, reinterpret_cast<const float*>(l.norm), l.eps, width, x + t * width);
  }
  std::vector<float> scores(static_cast<size_t>(tokens * experts));
  const int64_t bad = router_scores(lib, l.router, x, tokens, scores.data());
  if (bad != 0) return bad;
  if (l.has_shared != 0) lib.shared->begin(lib, l.shared, x, tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    route(l.config, scores.data() + t * experts, reinterpret_cast<const float*>(l.bias), ids + t * k, weights + t * k);
  }
  return 0;
}

int64_t finish_moe(Library& lib, const ep_moe_layer& l, const ep_weight* layout, const uint64_t* bases, const int64_t* ids,
                   const float* weights, const float* hidden, const float* x, uint64_t generation, float* out) {
  const int64_t width = l.router.cols, k = l.config.top_k;
  std::vector<int64_t> positions(static_cast<size_t>(k));
  lib.partial.resize(static_cast<size_t>((k + 1) * width));
  float *partial = lib.partial.data(), *routed = partial + k * width;
  std::vector<Expert> list;
  list.reserve(static_cast<size_t>(k));
  for (int64_t j = 0; j < k; ++j) {
    positions[static_cast<size_t>(j)] = j;
    list.push_back(place_expert(layout, bases[j], &positions[static_cast<size_t>(j)], 1));
  }
  const int64_t bad = run_experts(lib, list, x, 1, k, partial);
  if (bad != 0) return bad;
  combine(lib, partial, ids, weights, k, width, routed);
  return add_shared(lib, l, hidden, x, routed, 1, generation, out);
}

int64_t dense_block(Library& lib, const ep_moe_layer& l, const float* hidden, float* x, float* out) {
  const int64_t width = l.router.cols;
  lib.isa->rms_norm(hidden, reinterpret_cast<const float*>(l.norm), l.eps, width, x);
  lib.shared->begin(lib, l.shared, x, 1);
  const float* mlp = lib.shared->finish(lib);
  for (int64_t i = 0; i < width; ++i) out[i] = hidden[i] + mlp[i];
  return lib.shared->bad();
}

}  // namespace ep

using ep::Expert;
using ep::Library;

EP_API int64_t ep_experts(ep_context* context, const ep_weight* layout, const uint64_t* bases, const int64_t* const* positions,
                          const int64_t* counts, int64_t experts, const float* x, int64_t tokens, int64_t k,
                          float* out) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  std::vector<Expert> list;
  list.reserve(static_cast<size_t>(experts));
  for (int64_t i = 0; i < experts; ++i) {
    if (counts[i] != 0) list.push_back(ep::place_expert(layout, bases[i], positions[i], counts[i]));
  }
  return ep::run_experts(lib, list, x, tokens, k, out);
}

EP_API void ep_combine(ep_context* context, const float* partial, const int64_t* ids, const float* weights, int64_t tokens, int64_t k,
                       int64_t hidden, float* out) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  lib.pool.each(tokens, [&](int64_t t) {
    ep::combine(lib, partial + t * k * hidden, ids + t * k, weights + t * k, k, hidden, out + t * hidden);
  });
}

EP_API int64_t ep_moe_begin(ep_context* context, const ep_moe_layer* layer, const float* hidden, int64_t tokens, float* x,
                            int64_t* ids, float* weights, uint64_t* generation) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  const int64_t bad = ep::begin_moe(lib, *layer, hidden, tokens, x, ids, weights);
  *generation = lib.shared->generation();
  return bad;
}

EP_API int64_t ep_moe_end(ep_context* context, const ep_moe_layer* layer, const float* hidden, const float* x,
                          const float* routed, int64_t tokens, uint64_t generation, float* out) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  return ep::add_shared(lib, *layer, hidden, x, routed, tokens, generation, out);
}
