// The parts of multi-head latent attention, and the entry points that compute one of them.
#include "mla.h"

#include <cmath>

namespace ep {
namespace {

constexpr int64_t kPart = 1024;  // keys per partial softmax; fixed, or bits would change
constexpr int64_t kAbsorbRows = 16;  // a stretch that stays in the first cache for all tokens

bool all_finite(const float* x, int64_t n) {
  constexpr uint32_t kExponent = 0x7F800000u;  // all of it: NaN or infinity. Integers: compilers keep the order of sums
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bad |= static_cast<uint32_t>((bits & kExponent) == kExponent);
  }
  return bad == 0;
}

}  // namespace

void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    out[2 * i] = a * cos[i] - b * sin[i];
    out[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}

int64_t first_bad_row(const float* x, int64_t rows, int64_t cols) {
  if (all_finite(x, rows * cols)) return 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (!all_finite(x + r * cols, cols)) return r + 1;
  }
  return 0;
}

void absorb_head(const Library& lib, const ep_weight& kv_b, const LatentShape& shape, int64_t h, const float* q_nope,
                 int64_t q_stride, int64_t tokens, float* out, int64_t out_stride) {
  for (int64_t t = 0; t < tokens; ++t) std::memset(out + t * out_stride, 0, static_cast<size_t>(shape.latent) * 4);
  for (int64_t p = 0; p < shape.nope; p += kAbsorbRows) {
    const int64_t first = h * (shape.nope + shape.value) + p, rows = std::min(kAbsorbRows, shape.nope - p);
    for (int64_t t = 0; t < tokens; ++t) {
      lib.isa->add_rows(kv_b, first, rows, q_nope + t * q_stride + p, out + t * out_stride);
    }
  }
}

LatentAttention::LatentAttention(const Library& lib, const LatentShape& shape, int64_t tokens, int64_t start, float scale)
    : shape_(shape), tokens_(tokens), start_(start), parts_(ceil_div(start + tokens, kPart)), threads_(lib.pool.threads()),
      scale_(scale) {
  // Few items: smaller tiles, so that every thread has work. A head's result does not depend on it.
  const int64_t wanted = ceil_div(tokens * parts_ * shape.heads, 4 * threads_);
  tile_ = std::min(kAttentionQueries, std::max<int64_t>(4, wanted / 4 * 4));
  batch_ = std::min(tokens, std::max<int64_t>(1, (int64_t{1} << 22) / (parts_ * shape.heads * shape.latent)));
  item_floats_ = ceil_div(attention_scratch(shape.latent, shape.rope, shape.latent), 16) * 16;
}

void LatentAttention::reserve(Scratch& scratch) {
  scratch.add(&sums_, batch_ * parts_ * shape_.heads * shape_.latent);
  scratch.add(&running_, batch_ * parts_ * shape_.heads * 2);
  scratch.add(&work_, threads_ * item_floats_);
}

void LatentAttention::part(const Library& lib, const float* q_latent, const float* q_rope, const void* cache,
                           bool cache_is_bf16, int64_t row, int64_t count, int64_t part, int64_t visible, int64_t slot) {
  const float *first[kAttentionQueries], *second[kAttentionQueries];
  float* rows[kAttentionQueries];
  int64_t seen[kAttentionQueries];
  for (int64_t h = 0; h < count; ++h) {
    first[h] = q_latent + (row + h) * shape_.latent;
    second[h] = q_rope + (row + h) * shape_.rope;
    rows[h] = sums_ + (slot + h) * shape_.latent;
    seen[h] = visible;
  }
  const int64_t width = shape_.latent + shape_.rope;
  const void* keys = static_cast<const uint8_t*>(cache) + part * kPart * width * (cache_is_bf16 ? 2 : 4);
  lib.isa->attention({first, second, seen, count, shape_.latent, shape_.rope, keys, width, cache_is_bf16, nullptr, 0,
                      shape_.latent, scale_, rows, running_ + slot * 2, work_ + Pool::worker() * item_floats_});
}

// Partial softmaxes of one query, merged in ascending order of keys and divided by their total.
void LatentAttention::merge(const Library& lib, int64_t slot, int64_t used, float* out) const {
  const float* sums = sums_ + slot * shape_.latent;
  const float* running = running_ + slot * 2;
  const int64_t step = shape_.heads;
  float top = -INFINITY;
  for (int64_t p = 0; p < used; ++p) top = std::max(top, running[p * step * 2]);
  std::memset(out, 0, static_cast<size_t>(shape_.latent) * 4);
  float total = 0.0f;
  for (int64_t p = 0; p < used; ++p) {
    const float factor = std::exp(running[p * step * 2] - top);
    total += running[p * step * 2 + 1] * factor;
    lib.isa->axpy(factor, sums + p * step * shape_.latent, out, shape_.latent);
  }
  for (int64_t i = 0; i < shape_.latent; ++i) out[i] /= total;
}

void LatentAttention::run(Library& lib, const float* q_latent, const float* q_rope, const void* cache, bool cache_is_bf16,
                          float* out) {
  const int64_t heads = shape_.heads, tiles = ceil_div(heads, tile_);
  for (int64_t from = 0; from < tokens_; from += batch_) {
    const int64_t now = std::min(batch_, tokens_ - from);
    // Head tiles of one stretch of keys follow each other, so that it is read from memory once.
    lib.pool.each(now * parts_ * tiles, [&](int64_t item) {
      const int64_t t = item / (parts_ * tiles), p = item / tiles % parts_, head = item % tiles * tile_;
      const int64_t visible = std::min(start_ + from + t + 1 - p * kPart, kPart);
      if (visible <= 0) return;
      part(lib, q_latent, q_rope, cache, cache_is_bf16, (from + t) * heads + head, std::min(tile_, heads - head), p, visible,
           (t * parts_ + p) * heads + head);
    });
    lib.pool.each(now * heads, [&](int64_t item) {
      const int64_t t = item / heads, h = item % heads;
      merge(lib, t * parts_ * heads + h, ceil_div(start_ + from + t + 1, kPart), out + ((from + t) * heads + h) * shape_.latent);
    });
  }
}

void LatentAttention::run_heads(const Library& lib, const float* q_latent, const float* q_rope, const void* cache,
                                bool cache_is_bf16, int64_t head, int64_t count, float* out) {
  part(lib, q_latent, q_rope, cache, cache_is_bf16, head, count, 0, start_ + 1, head);
  for (int64_t h = head; h < head + count; ++h) merge(lib, h, 1, out + h * shape_.latent);
}

}  // namespace ep

namespace {

using ep::ceil_div;
using ep::FirstBad;
using ep::LatentAttention;
using ep::LatentShape;
using ep::Library;
using ep::Scratch;

}  // namespace

EP_API int64_t ep_mla_absorbed(ep_context* context, const float* q_latent, const float* q_rope, const void* cache, int32_t cache_is_bf16,
                               int64_t tokens, int64_t heads, int64_t latent, int64_t rope, int64_t start,
                               float scale, float* out) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  int64_t bad = ep::first_bad_row(q_latent, tokens, heads * latent);
  if (bad == 0) bad = ep::first_bad_row(q_rope, tokens, heads * rope);
  if (bad != 0) return bad;
  LatentAttention attention(lib, {heads, 0, rope, 0, latent}, tokens, start, scale);
  Scratch scratch;
  attention.reserve(scratch);
  scratch.place(lib);
  attention.run(lib, q_latent, q_rope, cache, cache_is_bf16 != 0, out);
  return 0;
}

EP_API int64_t ep_absorb_query(ep_context* context, const ep_weight* kv_b, const float* q_nope, int64_t tokens, int64_t heads, int64_t nope,
                               int64_t value, float* out) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  const int64_t bad = ep::first_bad_row(q_nope, tokens, heads * nope);
  if (bad != 0) return bad;
  const LatentShape shape{heads, nope, 0, value, kv_b->cols};
  lib.pool.each(heads, [&](int64_t h) {
    ep::absorb_head(lib, *kv_b, shape, h, q_nope + h * nope, heads * nope, tokens, out + h * shape.latent, heads * shape.latent);
  });
  return 0;
}

EP_API int64_t ep_expand_value(ep_context* context, const ep_weight* kv_b, const float* u, int64_t tokens, int64_t heads, int64_t value,
                               float* out) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  const ep_weight& w = *kv_b;
  const int64_t per_head = w.rows / heads, stride = lib.isa->act_bytes(w), count = tokens * heads;
  uint8_t* act;
  const uint8_t** act_rows;
  float** out_rows;
  Scratch scratch;
  scratch.add(&act, count * stride);
  scratch.add(&act_rows, count);
  scratch.add(&out_rows, count);
  scratch.place(lib);
  for (int64_t i = 0; i < count; ++i) {  // tokens of one head side by side
    act_rows[i % heads * tokens + i / heads] = act + i * stride;
    out_rows[i % heads * tokens + i / heads] = out + i * value;
  }
  FirstBad bad;
  ep::prepare_rows(lib, w, u, nullptr, count, act, stride, bad);
  lib.pool.each(heads, [&](int64_t h) {
    const int64_t first = (h + 1) * per_head - value;
    lib.isa->rows({&w, first, first + value, act_rows + h * tokens, out_rows + h * tokens, first, tokens});
  });
  return bad.value() == 0 ? 0 : (bad.value() - 1) / heads + 1;
}
