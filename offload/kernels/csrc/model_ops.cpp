// Entry points without weights: norm, rotation, ordinary attention.
#include "context.h"
#include "mla.h"

using ep::ceil_div;
using ep::kAttentionQueries;
using ep::Library;
using ep::Scratch;

EP_API void ep_rms_norm(ep_context* context, const float* x, const float* weight, float eps, int64_t tokens, int64_t hidden, float* out) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  const int64_t per_chunk = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, hidden));
  lib.pool.each(ceil_div(tokens, per_chunk), [&](int64_t chunk) {
    for (int64_t t = chunk * per_chunk; t < std::min(tokens, (chunk + 1) * per_chunk); ++t) {
      lib.isa->rms_norm(x + t * hidden, weight, eps, hidden, out + t * hidden);
    }
  });
}

EP_API void ep_rope(ep_context*, const float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t dim,
                    float* out) {
  const int64_t half = dim / 2;
  for (int64_t row = 0; row < tokens * heads; ++row) {
    ep::rotate(x + row * dim, cos + row / heads * half, sin + row / heads * half, half, out + row * dim);
  }
}

EP_API int64_t ep_attend(ep_context* context, const float* q, const float* k, const float* v, int64_t tokens, int64_t heads, int64_t key_dim,
                         int64_t value_dim, int64_t start, float scale, float* out) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  const int64_t bad = ep::first_bad_row(q, tokens, heads * key_dim);
  if (bad != 0) return bad;
  const int64_t tiles = ceil_div(tokens, kAttentionQueries);
  const int64_t item_floats = ceil_div(ep::attention_scratch(key_dim, 0, value_dim), 16) * 16;
  float* work;
  Scratch scratch;
  scratch.add(&work, lib.pool.threads() * item_floats);
  scratch.place(lib);
  lib.pool.each(tiles * heads, [&](int64_t item) {
    // The longest rows first, so that the last chunk claimed is a short one.
    const int64_t from = (tiles - 1 - item / heads) * kAttentionQueries, head = item % heads;
    const int64_t count = std::min(kAttentionQueries, tokens - from);
    const float* first[kAttentionQueries];
    float* rows[kAttentionQueries];
    int64_t seen[kAttentionQueries];
    float running[2 * kAttentionQueries];
    for (int64_t t = 0; t < count; ++t) {
      first[t] = q + ((from + t) * heads + head) * key_dim;
      rows[t] = out + ((from + t) * heads + head) * value_dim;
      seen[t] = start + from + t + 1;
    }
    lib.isa->attention({first, first, seen, count, key_dim, 0, k + head * key_dim, heads * key_dim, false,
                        v + head * value_dim, heads * value_dim, value_dim, scale, rows, running,
                        work + ep::Pool::worker() * item_floats});
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t i = 0; i < value_dim; ++i) rows[t][i] /= running[2 * t + 1];
    }
  });
  return 0;
}

