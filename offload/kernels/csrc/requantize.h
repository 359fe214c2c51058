// Re-encoding a weight matrix as grouped integers: what one instruction set offers, and the arguments of a call.
#pragma once
#include "common.h"

namespace ep {

// How the source stores a weight.
enum class RequantizeSource : int32_t { kFp8 = 0, kBf16 = 1, kF32 = 2 };

struct RequantizeCall {
  const void* weight;  // [rows, cols] of the source's type
  RequantizeSource source;
  int64_t rows, cols;
  const float* scale;  // fp8: [ceil(rows / block_rows), ceil(cols / block_cols)], else nullptr
  int64_t block_rows, block_cols;
  bool search;              // least-squares search for scales instead of rounding to the largest magnitude
  uint32_t* packed;         // [rows, ceil(cols * bits / 32)]
  uint16_t* out_scale;      // bf16 [rows, ceil(cols / group)]
  double* error;            // [rows, ceil(cols / 32)] sums of squared differences
  double* power;            // [rows, ceil(cols / 32)] sums of squared weights
};

// False when a weight is NaN or infinite; the outputs are then unspecified.
using RequantizeFn = bool (*)(const RequantizeCall& call, int bits, int group);

bool requantize_portable(const RequantizeCall& call, int bits, int group);
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EP_REQUANTIZE_X86 1
bool requantize_avx2(const RequantizeCall& call, int bits, int group);
bool requantize_avx512(const RequantizeCall& call, int bits, int group);
#else
#define EP_REQUANTIZE_X86 0
#endif

}  // namespace ep
