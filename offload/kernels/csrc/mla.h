// Multi-head latent attention: its parts, as the entry points and the fused block put them together.
#pragma once
#include "context.h"

namespace ep {

// Rotates the interleaved pairs (2i, 2i + 1) of one row of 2 * half values.
void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* out);

// 1 + the first of `rows` rows that is not finite, or 0.
int64_t first_bad_row(const float* x, int64_t rows, int64_t cols);

// kv_b [heads * (nope + value), latent] holds per head nope key rows, then value rows.
struct LatentShape {
  int64_t heads, nope, rope, value, latent;
};

// q_nope(t) times the key rows of head `h`, for all tokens: row t of the query is q_nope + t * q_stride,
// its result out + t * out_stride.
void absorb_head(const Library& lib, const ep_weight& kv_b, const LatentShape& shape, int64_t h, const float* q_nope,
                 int64_t q_stride, int64_t tokens, float* out, int64_t out_stride);

// Softmax attention of queries in latent space over the rows of a cache [.., latent + rope]. The keys are
// taken in parts of fixed length whose sums are merged in ascending order, so that threads share the work
// of a long context without changing a bit.
class LatentAttention {
 public:
  LatentAttention(const Library& lib, const LatentShape& shape, int64_t tokens, int64_t start, float scale);

  void reserve(Scratch& scratch);
  // q_latent [T, heads, latent], q_rope [T, heads, rope]; query t sees rows 0 .. start + t; out like q_latent.
  void run(Library& lib, const float* q_latent, const float* q_rope, const void* cache, bool cache_is_bf16, float* out);

  // A decoding step over a short context can take heads in tiles, each from beginning to end.
  bool one_part() const { return tokens_ == 1 && parts_ == 1; }
  int64_t tile() const { return tile_; }
  // Heads [head, head + count) of the only token; for threads of the pool.
  void run_heads(const Library& lib, const float* q_latent, const float* q_rope, const void* cache, bool cache_is_bf16,
                 int64_t head, int64_t count, float* out);

 private:
  void part(const Library& lib, const float* q_latent, const float* q_rope, const void* cache, bool cache_is_bf16,
            int64_t row, int64_t count, int64_t part, int64_t visible, int64_t slot);
  void merge(const Library& lib, int64_t slot, int64_t used, float* out) const;

  LatentShape shape_;
  int64_t tokens_, start_, parts_, tile_, batch_, threads_, item_floats_;
  float scale_;
  float *sums_ = nullptr, *running_ = nullptr, *work_ = nullptr;
};

// A whole attention block in the absorbed form, as ep_attention.
int64_t attention_block(Library& lib, const ep_attention_layer& layer, const float* hidden, const float* cos, const float* sin,
                        int64_t tokens, int64_t start, float* cache, float* out);

}  // namespace ep
