// C interface of the native CPU kernels. Raw pointers only; all float activations are contiguous.
//
// A row's result never depends on the other rows of a call, on the number of threads, or on the
// instruction set. Functions that return int64_t give 0, or 1 + the index of the first activation
// row that holds NaN or infinity (the outputs of such rows are NaN or not written), or -1 for a
// position outside the tokens.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define EP_API extern "C" __declspec(dllexport)
#else
#define EP_API extern "C" __attribute__((visibility("default")))
#endif

enum ep_kind { EP_F32 = 0, EP_BF16 = 1, EP_FP8 = 2, EP_INT4 = 3, EP_INT8 = 4, EP_NF4 = 5, EP_INT3 = 6, EP_INT2 = 7 };

// A weight [rows, cols] in the bytes of its format, aligned to its element (fp8 and nf4 scales: to nothing). `payload` and `scale` are addresses, or offsets
// from a base address where a function takes one.
struct ep_weight {
  int32_t kind;
  int32_t group;       // columns per scale (integers, nf4); 0 otherwise
  int32_t block_rows;  // fp8
  int32_t block_cols;
  int64_t rows, cols;
  uint64_t payload, scale;
};

struct ep_router {
  int32_t experts, groups, top_groups, top_k, normalize;
  float scaling;
};

// One layer of multi-head latent attention. Norm weights are addresses of floats. Without a low-rank query
// (q_a.rows == 0), q_b takes the normed input.
struct ep_attention_layer {
  ep_weight q_a, q_b, kv_a, kv_b, o;
  uint64_t input_norm, q_a_norm, kv_a_norm;
  float eps, latent_eps, scale;
  int32_t heads, nope, rope, value;
};

// One MoE layer without its routed experts. `norm` and `bias` are addresses of floats, shared is gate, up, down, of which
// gate and up have one format. A dense layer's router has no rows, and its MLP takes the place of the shared expert.
struct ep_moe_layer {
  ep_weight router;
  ep_weight shared[3];
  uint64_t norm, bias;
  ep_router config;
  float eps;
  int32_t has_shared;
};

// A layer of a model, and the latents that its attention has cached: [.., latent + rope].
struct ep_layer {
  const ep_attention_layer* attention;
  const ep_moe_layer* block;
  float* cache;
};

// Where routed experts are: slots[(i - first) * experts + e] of layer i, -1 where the bytes are not there. The expert in
// slot s begins at addresses[s]; `layout` holds gate, up, down relative to that.
struct ep_residents {
  const ep_weight* layout;
  const int32_t* slots;
  const uint64_t* addresses;
  int64_t first;
};

// A token at position `start` on its way through the layers of a model, in memory that stays: cos and sin [rope / 2],
// ids [layers, top_k], weights [top_k], the others [H]. `mark` is the shared expert under way.
struct ep_token {
  const ep_layer* layers;
  const float *cos, *sin;
  float *hidden, *attended, *x, *weights;
  int64_t* ids;
  int64_t start;
  uint64_t mark;
};

struct ep_context;

EP_API int32_t ep_abi(void);
// 1 when this processor runs that instruction set: "avx512", "avxvnni", "avx2", "portable" or "auto".
EP_API int32_t ep_supports(const char* isa);
// A context has an instruction set, `threads` - 1 worker threads and scratch memory. Calls on one
// context from several threads take turns. NULL when the processor lacks the instruction set or the system refuses so
// many threads.
EP_API ep_context* ep_create(const char* isa, int32_t threads);
EP_API void ep_destroy(ep_context* context);
EP_API const char* ep_isa(const ep_context* context);
// Grows the scratch buffer to at least `bytes`; returns its present size in bytes.
EP_API int64_t ep_reserve(ep_context* context, int64_t bytes);

EP_API int64_t ep_linear(ep_context* context, const ep_weight* weight, const float* x, int64_t tokens, float* out);
// Every expert's down(silu(gate x) * up x) for its positions: p stands for token p / k, and row p of
// `out` [.., hidden] receives the result. `layout` holds gate, up, down relative to bases[e].
EP_API int64_t ep_experts(ep_context* context, const ep_weight* layout, const uint64_t* bases, const int64_t* const* positions,
                          const int64_t* counts, int64_t experts, const float* x, int64_t tokens, int64_t k,
                          float* out);
EP_API void ep_silu_mul(ep_context* context, const float* gate, const float* up, int64_t n, float* out);
// sum_j weights[t, j] * partial[t * k + j] in ascending order of ids[t, j].
EP_API void ep_combine(ep_context* context, const float* partial, const int64_t* ids, const float* weights, int64_t tokens, int64_t k,
                       int64_t hidden, float* out);
EP_API void ep_rms_norm(ep_context* context, const float* x, const float* weight, float eps, int64_t tokens, int64_t hidden, float* out);
// Rotates interleaved pairs (2i, 2i + 1) of x [tokens, heads, dim] by cos and sin [tokens, dim / 2].
EP_API void ep_rope(ep_context* context, const float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t dim,
                    float* out);
EP_API int64_t ep_router_topk(ep_context* context, const ep_router* config, const float* x, int64_t tokens, const ep_weight* weight,
                              const float* bias, int64_t* ids, float* weights);
// q_latent [T, heads, latent] and q_rope [T, heads, rope] over cache rows [0, start + t]; cache is
// [.., latent + rope] in fp32 or bf16; out [T, heads, latent].
EP_API int64_t ep_mla_absorbed(ep_context* context, const float* q_latent, const float* q_rope, const void* cache, int32_t cache_is_bf16,
                               int64_t tokens, int64_t heads, int64_t latent, int64_t rope, int64_t start,
                               float scale, float* out);
// Causal attention: q [T, heads, key_dim] over k [start + T, heads, key_dim] and v [.., value_dim].
EP_API int64_t ep_attend(ep_context* context, const float* q, const float* k, const float* v, int64_t tokens, int64_t heads, int64_t key_dim,
                         int64_t value_dim, int64_t start, float scale, float* out);
// kv_b [heads * (nope + value), latent] holds per head nope key rows, then value rows.
// q_nope [T, heads, nope] times the key rows -> [T, heads, latent].
EP_API int64_t ep_absorb_query(ep_context* context, const ep_weight* kv_b, const float* q_nope, int64_t tokens, int64_t heads, int64_t nope,
                               int64_t value, float* out);
// The value rows times u [T, heads, latent] -> [T, heads, value].
EP_API int64_t ep_expand_value(ep_context* context, const ep_weight* kv_b, const float* u, int64_t tokens, int64_t heads, int64_t value,
                               float* out);
// hidden [T, H] plus the attention of its norm, absorbed: writes rows start .. start + T of the layer's `cache`
// [.., latent + rope] and reads all rows before; cos and sin [T, rope / 2].
EP_API int64_t ep_attention(ep_context* context, const ep_attention_layer* layer, const float* hidden, const float* cos,
                            const float* sin, int64_t tokens, int64_t start, float* cache, float* out);
// The first half of an MoE block: x [T, H] is the norm of hidden, ids and weights [T, top_k] the router's choice.
// The workers go on with the shared expert; `generation` says which one that is.
EP_API int64_t ep_moe_begin(ep_context* context, const ep_moe_layer* layer, const float* hidden, int64_t tokens, float* x,
                            int64_t* ids, float* weights, uint64_t* generation);
// The second half: out = hidden + (routed + shared expert of x), everything [T, H].
EP_API int64_t ep_moe_end(ep_context* context, const ep_moe_layer* layer, const float* hidden, const float* x,
                          const float* routed, int64_t tokens, uint64_t generation, float* out);
// The layers first .. last of one token, hidden to hidden, as far as `residents` (or NULL: none) have every expert that the
// routers choose; ids holds what they chose. *stopped is `last`, or the MoE layer whose experts are to be computed by
// the caller and added by ep_moe_end, from attended, x, ids, weights and mark. `routed`: the way goes on from there,
// behind the router of `first`, with the ids and weights that the token holds.
EP_API int64_t ep_layers(ep_context* context, ep_token* token, const ep_residents* residents, int64_t first, int64_t last,
                         int32_t routed, int64_t* stopped);
// A row of an embedding, each element rounded to bf16 as it is on its way to a device.
EP_API void ep_embed(ep_context* context, const ep_weight* weight, int64_t row, float* out);
// The end of a token: x [H] is the norm of hidden, and the workers begin with its product with `weight`, the head.
EP_API int64_t ep_head_begin(ep_context* context, const ep_weight* weight, const float* norm, float eps, const float* hidden,
                             float* x);
// Waits for the product that was begun last: logits [weight.rows].
EP_API void ep_head_end(ep_context* context, float* logits);
// Reads `bytes` from `p` on all threads: the memory bandwidth that the kernels are measured against.
EP_API uint64_t ep_read(ep_context* context, const void* p, int64_t bytes);
