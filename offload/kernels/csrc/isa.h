// What one instruction set offers to the entry points. Each isa_*.cpp fills one table.
#pragma once
#include <cstdint>

#include "expertpager_kernels.h"

// The vector units are compiled by switching the target inside one file, the way GCC does it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EP_X86 1
#else
#define EP_X86 0
#endif

namespace ep {

// Rows of one weight against a few tokens. `act[m]` is a prepared activation row (see prepare);
// result n of token m goes to out[m][n - base].
struct RowsCall {
  const ep_weight* weight;
  int64_t first, last;  // rows [first, last)
  const uint8_t* const* act;
  float* const* out;
  int64_t base;
  int64_t tokens;
};

// Softmax attention of a tile of queries over one range of keys, fp32 or bf16.
// A key row is `first` then `second` columns (latent and rope part, or all and none); the values are
// the first columns of the keys, or rows of their own.
struct AttentionCall {
  const float* const* first;   // [queries] -> [first_dim]
  const float* const* second;  // [queries] -> [second_dim]
  const int64_t* visible;      // [queries]: how many of the keys each query sees
  int64_t queries, first_dim, second_dim;
  const void* keys;
  int64_t key_stride;  // elements between rows
  bool keys_are_bf16;
  const float* values;  // nullptr: the first columns of the keys
  int64_t value_stride, value_dim;
  float scale;
  float* const* out;  // [queries] -> [value_dim], not divided by the sum of exponentials
  float* running;     // [queries, 2]: maximum and sum of exponentials
  float* scratch;     // attention_scratch floats, 64-byte aligned
};

constexpr int64_t kAttentionQueries = 32;  // most queries of one call
constexpr int64_t kAttentionRows = 32;     // keys of one softmax block

inline int64_t lanes_up(int64_t n) { return (n + 15) / 16 * 16; }
inline int64_t attention_scratch(int64_t first_dim, int64_t second_dim, int64_t value_dim) {
  const int64_t width = lanes_up(first_dim) + lanes_up(second_dim);
  return (kAttentionQueries + kAttentionRows) * (width + lanes_up(value_dim));
}

struct Isa {
  const char* name;
  // Bytes of one prepared activation row for a weight of this format; a multiple of 64.
  int64_t (*act_bytes)(const ep_weight& weight);
  // Fills such a row from `x` [cols]. False when x holds NaN or infinity (every result is then NaN).
  bool (*prepare)(const ep_weight& weight, const float* x, uint8_t* row);
  void (*rows)(const RowsCall& call);
  void (*decode)(const ep_weight& weight, int64_t row, int64_t first, int64_t last, float* out);
  void (*silu_mul)(const float* gate, const float* up, float* out, int64_t n);
  void (*sigmoid)(const float* x, float* out, int64_t n);
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  void (*axpy)(float a, const float* x, float* y, int64_t n);  // y += a * x
  // y [cols] += sum over rows of a[r] * row (first + r) of a weight
  void (*add_rows)(const ep_weight& weight, int64_t first, int64_t rows, const float* a, float* y);
  void (*attention)(const AttentionCall& call);
  uint64_t (*read)(const uint8_t* p, int64_t n);  // touches every byte; for bandwidth measurements
};

extern const Isa kPortable;
#if EP_X86
extern const Isa kAvx2;
extern const Isa kAvxVnni;
extern const Isa kAvx512;
#endif

}  // namespace ep
