// A driver for the sanitizers: every entry point of the native library on odd sizes, with every buffer
// allocated at its exact size, on each instruction set this processor has and several threads.
// Prints what differs from the portable code and returns 1, else 0. Built and run by sanitize.py.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <thread>
#include <vector>

#include "../../offload/kernels/csrc/expertpager_kernels.h"

extern "C" int32_t ep_requantize_groups(const char* isa, const void* weight, int32_t source, int64_t rows,
                                        int64_t cols, const float* scale, int64_t block_rows, int64_t block_cols,
                                        int32_t bits, int32_t group, int32_t search, uint32_t* packed,
                                        uint16_t* out_scale, double* work, double* sums);
extern "C" int32_t ep_requantize_supports(const char* isa);

namespace {

uint64_t state = 1;

uint32_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

float random_float() { return static_cast<float>(random_bits() % 2001) / 1000.0f - 1.0f; }

std::vector<float> floats(int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = random_float();
  return x;
}

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A weight with random codes and scales near 1/64 in buffers of the exact size.
struct Weight {
  Weight(int kind, int group, int64_t rows, int64_t cols) {
    const int64_t elements = rows * cols;
    int64_t payload_bytes = elements, scale_bytes = 0;
    int block = 0;
    if (kind == EP_F32) payload_bytes = elements * 4;
    if (kind == EP_BF16) payload_bytes = elements * 2;
    if (kind == EP_FP8) {
      block = group;
      scale_bytes = up(rows, block) * up(cols, block) * 4;
    }
    if (kind == EP_INT4) payload_bytes = rows * up(cols, 8) * 4;
    if (kind == EP_INT8) payload_bytes = rows * up(cols, 4) * 4;
    if (kind == EP_INT3) payload_bytes = rows * up(cols * 3, 32) * 4;
    if (kind == EP_INT2) payload_bytes = rows * up(cols, 16) * 4;
    const bool integers = kind == EP_INT4 || kind == EP_INT8 || kind == EP_INT3 || kind == EP_INT2;
    if (integers) scale_bytes = rows * up(cols, group) * 2;
    if (kind == EP_NF4) {
      payload_bytes = up(elements, 2);
      scale_bytes = up(elements, group) * 4;
    }
    payload.resize(static_cast<size_t>(payload_bytes));
    scale.resize(static_cast<size_t>(scale_bytes));
    for (uint8_t& b : payload) b = static_cast<uint8_t>(random_bits());
    if (kind == EP_F32) fill_floats(payload);
    if (kind == EP_BF16) fill_bf16(payload);
    if (kind == EP_FP8 || kind == EP_NF4) fill_floats(scale);
    if (integers) fill_bf16(scale);
    if (kind == EP_FP8) {
      for (uint8_t& b : payload) b = (b & 0x7F) == 0x7F ? 0 : b;
    }
    weight = {kind, kind == EP_FP8 ? 0 : group, block, block, rows, cols, address(payload), address(scale)};
  }

  static uint64_t address(const std::vector<uint8_t>& v) { return reinterpret_cast<uint64_t>(v.data()); }
  static void fill_floats(std::vector<uint8_t>& v) {
    for (size_t i = 0; i + 4 <= v.size(); i += 4) {
      const float f = 0.02f * random_float();
      std::memcpy(v.data() + i, &f, 4);
    }
  }
  static void fill_bf16(std::vector<uint8_t>& v) {
    for (size_t i = 0; i + 2 <= v.size(); i += 2) {
      const float f = 0.02f * random_float();
      std::memcpy(v.data() + i, reinterpret_cast<const char*>(&f) + 2, 2);
    }
  }

  std::vector<uint8_t> payload, scale;
  ep_weight weight;
};

int failures = 0;

void compare(const char* what, const std::string& isa, const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0) return;
  std::printf("%s: %s differs from portable\n", what, isa.c_str());
  ++failures;
}

using Outputs = std::vector<std::vector<float>>;

// A row of an embedding, and a head that is waited for and one that is not.
void ends(ep_context* c, const ep_weight& w, Outputs& out) {
  std::vector<float> row(static_cast<size_t>(w.cols)), normed(row.size()), logits(static_cast<size_t>(w.rows));
  const std::vector<float> hidden = floats(w.cols), norm = floats(w.cols);
  for (const int64_t at : {int64_t{0}, w.rows - 1}) {
    ep_embed(c, &w, at, row.data());
    out.push_back(row);
    if (ep_head_begin(c, &w, norm.data(), 1e-6f, hidden.data(), normed.data()) != 0) ++failures;
    if (ep_head_begin(c, &w, norm.data(), 1e-6f, hidden.data(), normed.data()) != 0) ++failures;
    ep_head_end(c, logits.data());
    out.push_back(normed);
    out.push_back(logits);
    if (ep_head_begin(c, &w, norm.data(), 1e-6f, hidden.data(), normed.data()) != 0) ++failures;
  }
  std::vector<float> bad = hidden;
  bad[0] = 1.0f / 0.0f;
  if (ep_head_begin(c, &w, norm.data(), 1e-6f, bad.data(), normed.data()) != 1) ++failures;
}

void linears(ep_context* c, Outputs& out) {
  const struct {
    int kind, group;
  } formats[] = {{EP_F32, 0},   {EP_BF16, 0},   {EP_FP8, 128}, {EP_FP8, 5},   {EP_FP8, 32},   {EP_INT4, 32},
                 {EP_INT4, 64}, {EP_INT4, 128}, {EP_INT8, 32}, {EP_INT8, 64}, {EP_INT8, 128}, {EP_NF4, 64},
                 {EP_INT3, 32}, {EP_INT2, 32},  {EP_INT3, 64}, {EP_INT2, 128}};
  for (const auto& format : formats) {
    for (const int64_t cols : {1, 17, 250, 256, 320, 1030, 1088}) {
      const Weight w(format.kind, format.group, 19, cols);
      for (const int64_t tokens : {1, 3, 4, 6, 37}) {
        const std::vector<float> x = floats(tokens * cols);
        std::vector<float> y(static_cast<size_t>(tokens * 19));
        if (ep_linear(c, &w.weight, x.data(), tokens, y.data()) != 0) ++failures;
        out.push_back(y);
      }
      ends(c, w.weight, out);
    }
  }
}

void layer(ep_context* c, Outputs& out) {
  constexpr int64_t kHidden = 90, kInner = 45, kTokens = 11, kTop = 2, kExperts = 4;
  for (const int kind : {EP_INT4, EP_FP8}) {
    const int group = kind == EP_INT4 ? 32 : 128;
    std::vector<Weight> weights;
    for (int i = 0; i < 3; ++i) weights.emplace_back(kind, group, i == 2 ? kHidden : kInner, i == 2 ? kInner : kHidden);
    const ep_weight layout[3] = {weights[0].weight, weights[1].weight, weights[2].weight};
    std::vector<float> x = floats(kTokens * kHidden), partial(kTokens * kTop * kHidden), sum(kTokens * kHidden);
    std::vector<int64_t> positions[kExperts], ids(kTokens * kTop);
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t j = 0; j < kTop; ++j) {
        ids[static_cast<size_t>(t * kTop + j)] = (t + 3 * j) % (kExperts - 1);
        positions[ids[static_cast<size_t>(t * kTop + j)]].push_back(t * kTop + j);
      }
    }
    std::vector<uint64_t> bases(kExperts, 0);
    std::vector<const int64_t*> lists;
    std::vector<int64_t> counts;
    for (const auto& p : positions) {
      lists.push_back(p.data());
      counts.push_back(static_cast<int64_t>(p.size()));
    }
    if (ep_experts(c, layout, bases.data(), lists.data(), counts.data(), kExperts, x.data(), kTokens, kTop, partial.data()) != 0) ++failures;
    const std::vector<float> scores = floats(kTokens * kTop);
    ep_combine(c, partial.data(), ids.data(), scores.data(), kTokens, kTop, kHidden, sum.data());
    out.push_back(partial);
    out.push_back(sum);
    std::vector<float> normed(x.size());
    ep_rms_norm(c, x.data(), floats(kHidden).data(), 1e-6f, kTokens, kHidden, normed.data());
    out.push_back(normed);
    x[5 * kHidden + 3] = 1.0f / 0.0f;
    if (ep_linear(c, &weights[0].weight, x.data(), kTokens, std::vector<float>(kTokens * kInner).data()) != 6) ++failures;
  }
  const ep_router router{12, 4, 2, 3, 1, 2.5f};
  std::vector<int64_t> ids(5 * 3);
  std::vector<float> weights(5 * 3);
  const std::vector<float> x = floats(5 * 33), w = floats(12 * 33), bias = floats(12);
  const ep_weight routes{EP_F32, 0, 0, 0, 12, 33, reinterpret_cast<uint64_t>(w.data()), 0};
  if (ep_router_topk(c, &router, x.data(), 5, &routes, bias.data(), ids.data(), weights.data()) != 0) ++failures;
  out.push_back(weights);
}

void attentions(ep_context* c, Outputs& out) {
  constexpr int64_t kTokens = 3, kHeads = 5, kLatent = 20, kRope = 6, kValue = 9, kNope = 7;
  for (const int64_t start : {0, 45, 1022}) {
    const std::vector<float> latent = floats(kTokens * kHeads * kLatent), rope = floats(kTokens * kHeads * kRope);
    const std::vector<float> cache = floats((start + kTokens) * (kLatent + kRope));
    std::vector<uint16_t> narrow(cache.size());
    for (size_t i = 0; i < cache.size(); ++i) std::memcpy(&narrow[i], reinterpret_cast<const char*>(&cache[i]) + 2, 2);
    for (const int bf16 : {0, 1}) {
      std::vector<float> y(latent.size());
      const void* rows = bf16 != 0 ? static_cast<const void*>(narrow.data()) : cache.data();
      if (ep_mla_absorbed(c, latent.data(), rope.data(), rows, bf16, kTokens, kHeads, kLatent, kRope, start, 0.3f, y.data()) != 0) ++failures;
      out.push_back(y);
    }
    const std::vector<float> k = floats((start + kTokens) * kHeads * kLatent), v = floats((start + kTokens) * kHeads * kValue);
    std::vector<float> y(kTokens * kHeads * kValue);
    if (ep_attend(c, latent.data(), k.data(), v.data(), kTokens, kHeads, kLatent, kValue, start, 0.3f, y.data()) != 0) ++failures;
    out.push_back(y);
  }
  for (const int kind : {EP_INT8, EP_BF16, EP_FP8}) {
    const Weight kv_b(kind, 128, kHeads * (kNope + kValue), kLatent);
    const std::vector<float> q = floats(kTokens * kHeads * kNope), u = floats(kTokens * kHeads * kLatent);
    std::vector<float> a(kTokens * kHeads * kLatent), b(kTokens * kHeads * kValue), turned(a.size());
    if (ep_absorb_query(c, &kv_b.weight, q.data(), kTokens, kHeads, kNope, kValue, a.data()) != 0) ++failures;
    if (ep_expand_value(c, &kv_b.weight, u.data(), kTokens, kHeads, kValue, b.data()) != 0) ++failures;
    const std::vector<float> angle = floats(kTokens * kLatent / 2);
    ep_rope(c, a.data(), angle.data(), angle.data(), kTokens, kHeads, kLatent, turned.data());
    for (const auto& result : {a, b, turned}) out.push_back(result);
  }
}

// Whole blocks: attention over a growing cache, and an MoE block with other calls between its halves.
void blocks(ep_context* c, Outputs& out) {
  constexpr int64_t kHidden = 90, kLow = 37, kLatent = 20, kRope = 6, kValue = 9, kNope = 7, kHeads = 5, kTokens = 3;
  const Weight q_a(EP_INT4, 32, kLow, kHidden), q_b(EP_INT4, 32, kHeads * (kNope + kRope), kLow);
  const Weight kv_a(EP_INT8, 128, kLatent + kRope, kHidden), kv_b(EP_INT4, 32, kHeads * (kNope + kValue), kLatent);
  const Weight o(EP_INT4, 32, kHidden, kHeads * kValue);
  const std::vector<float> input_norm = floats(kHidden), low_norm = floats(kLow), latent_norm = floats(kLatent);
  const auto at = [](const std::vector<float>& v) { return reinterpret_cast<uint64_t>(v.data()); };
  const ep_attention_layer layer{q_a.weight, q_b.weight, kv_a.weight, kv_b.weight, o.weight, at(input_norm), at(low_norm),
                                 at(latent_norm), 1e-6f, 1e-6f, 0.3f, kHeads, kNope, kRope, kValue};
  for (const int64_t start : {0, 45, 1022}) {
    for (const int64_t tokens : {int64_t{1}, kTokens}) {
      const std::vector<float> x = floats(tokens * kHidden), angle = floats(tokens * kRope / 2);
      std::vector<float> cache = floats((start + tokens) * (kLatent + kRope)), y(x.size());
      if (ep_attention(c, &layer, x.data(), angle.data(), angle.data(), tokens, start, cache.data(), y.data()) != 0) ++failures;
      out.push_back(y);
      out.push_back(cache);
    }
  }
  constexpr int64_t kInner = 45, kExperts = 12, kTop = 3;
  const Weight gate(EP_INT4, 32, kInner, kHidden), up_(EP_INT4, 32, kInner, kHidden), down(EP_INT4, 32, kHidden, kInner);
  const Weight router(EP_F32, 0, kExperts, kHidden);
  const std::vector<float> bias = floats(kExperts), hidden = floats(kTokens * kHidden), routed = floats(kTokens * kHidden);
  const ep_moe_layer moe{router.weight, {gate.weight, up_.weight, down.weight}, at(input_norm), at(bias), {kExperts, 4, 2, kTop, 1, 2.5f}, 1e-6f, 1};
  const ep_weight experts[3] = {gate.weight, up_.weight, down.weight};
  for (const bool between : {false, true}) {
    std::vector<float> x(hidden.size()), weights(kTokens * kTop), y(hidden.size()), partial(hidden.size());
    std::vector<int64_t> ids(kTokens * kTop);
    uint64_t generation = 0, other = 0;
    if (ep_moe_begin(c, &moe, hidden.data(), kTokens, x.data(), ids.data(), weights.data(), &generation) != 0) ++failures;
    if (between) {
      std::vector<float> again(x.size());
      if (ep_moe_begin(c, &moe, routed.data(), kTokens, again.data(), ids.data(), weights.data(), &other) != 0) ++failures;
    }
    const int64_t positions[3] = {0, 1, 2};
    const int64_t* lists[1] = {positions};
    const uint64_t base = 0;
    const int64_t count = 3;
    if (ep_experts(c, experts, &base, lists, &count, 1, x.data(), kTokens, 1, partial.data()) != 0) ++failures;
    if (ep_moe_end(c, &moe, hidden.data(), x.data(), routed.data(), kTokens, generation, y.data()) != 0) ++failures;
    for (const auto& result : {x, y, partial}) out.push_back(result);
  }
  // A dense layer and two MoE layers for one token; the second has an expert at a time until all are there.
  ep_moe_layer dense = moe;
  dense.router.rows = 0;
  dense.config.top_k = 0;
  std::vector<float> cache(2 * (kLatent + kRope)), angle = floats(kRope / 2), weights(kTop), last = floats(kHidden);
  std::vector<float> attended(kHidden), x(kHidden);
  const ep_layer layers[3] = {{&layer, &dense, cache.data()}, {&layer, &moe, cache.data()}, {&layer, &moe, cache.data()}};
  std::vector<int32_t> slots(2 * kExperts, 0);
  std::fill(slots.begin() + kExperts, slots.end(), -1);
  const uint64_t addresses[1] = {0};
  const ep_residents residents{experts, slots.data(), addresses, 1};
  std::vector<int64_t> ids(3 * kTop);
  ep_token token{layers, angle.data(), angle.data(), last.data(), attended.data(), x.data(), weights.data(), ids.data(), 1, 0};
  int64_t stopped = -1;
  if (ep_layers(c, &token, nullptr, 0, 3, 0, &stopped) != 0 || stopped != 1) ++failures;
  if (ep_layers(c, &token, &residents, 1, 3, 1, &stopped) != 0 || stopped != 2) ++failures;
  for (int64_t tries = 0; stopped == 2 && tries <= kTop; ++tries) {
    for (int64_t j = 0; j < tries; ++j) slots[static_cast<size_t>(kExperts + ids[static_cast<size_t>(2 * kTop + j)])] = 0;
    if (ep_layers(c, &token, &residents, 2, 3, 1, &stopped) != 0 || (stopped == 3) != (tries == kTop)) ++failures;
  }
  for (const auto& result : {last, attended, weights, cache}) out.push_back(result);
}

Outputs everything(ep_context* c) {
  state = 1;
  Outputs out;
  linears(c, out);
  layer(c, out);
  attentions(c, out);
  blocks(c, out);
  return out;
}

// Several threads on one context, with pauses long enough for the workers to fall asleep.
void contention(const char* isa) {
  ep_context* c = ep_create(isa, 3);
  const Weight w(EP_INT4, 32, 64, 256);
  const std::vector<float> x = floats(256);
  std::vector<float> expected(64);
  ep_linear(c, &w.weight, x.data(), 1, expected.data());
  std::vector<std::thread> threads;
  std::vector<int> wrong(3, 0);
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 100; ++i) {
        std::vector<float> y(64);
        ep_linear(c, &w.weight, x.data(), 1, y.data());
        if (y != expected) wrong[static_cast<size_t>(t)] = 1;
        if (i % 20 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const int w_t : wrong) failures += w_t;
  ep_destroy(c);
}

// Every format of the encoder from every source, rows that end within a group, block scales small and large.
std::vector<std::vector<double>> encoded(const char* isa) {
  std::vector<std::vector<double>> out;
  const int64_t rows = 5;
  for (const int64_t cols : {1, 37, 128, 333}) {
    for (const int source : {EP_FP8, EP_BF16, EP_F32}) {
      state = static_cast<uint64_t>(cols);
      const int kind = source == EP_FP8 ? 0 : source == EP_BF16 ? 1 : 2;
      std::vector<uint8_t> weight(static_cast<size_t>(rows * cols * (kind == 0 ? 1 : 2 * kind)));
      for (uint8_t& b : weight) b = static_cast<uint8_t>(random_bits() % 0x3f);  // finite in every type
      std::vector<float> scale = floats(up(rows, 4) * up(cols, 16));
      scale.back() = 1e30f;
      for (const int bits : {2, 3, 4, 8}) {
        for (const int group : {32, 64, 128}) {
          for (const int search : {0, 1}) {
            std::vector<uint32_t> packed(static_cast<size_t>(rows * up(cols * bits, 32)));
            std::vector<uint16_t> scales(static_cast<size_t>(rows * up(cols, group)));
            std::vector<double> work(static_cast<size_t>(2 * rows * up(cols, 32))), sums(2);
            failures += ep_requantize_groups(isa, weight.data(), kind, rows, cols, scale.data(), 4, 16, bits, group,
                                             search, packed.data(), scales.data(), work.data(), sums.data()) != 0;
            sums.insert(sums.end(), packed.begin(), packed.end());
            sums.insert(sums.end(), scales.begin(), scales.end());
            out.push_back(sums);
          }
        }
      }
    }
  }
  return out;
}

}  // namespace

int main() {
  ep_context* portable = ep_create("portable", 1);
  const Outputs expected = everything(portable);
  ep_destroy(portable);
  for (const char* isa : {"portable", "avx2", "avxvnni", "avx512"}) {
    if (ep_supports(isa) == 0) {
      std::printf("%s: not on this processor\n", isa);
      continue;
    }
    for (const int threads : {1, 3}) {
      ep_context* c = ep_create(isa, threads);
      const Outputs out = everything(c);
      for (size_t i = 0; i < out.size(); ++i) compare(("output " + std::to_string(i)).c_str(), isa, out[i], expected[i]);
      ep_destroy(c);
    }
    contention(isa);
    std::printf("%s: %zu outputs checked\n", isa, expected.size());
  }
  const auto encodings = encoded("portable");
  for (const char* isa : {"avx2", "avx512"}) {
    if (ep_requantize_supports(isa) == 0) continue;
    failures += encoded(isa) != encodings;
    std::printf("encoder, %s: %zu encodings checked\n", isa, encodings.size());
  }
  if (ep_create("mmx", 1) != nullptr || ep_create("portable", 0) != nullptr) ++failures;
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
