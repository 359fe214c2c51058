// What the integer formats are, whatever computes with them. Must not use intrinsics.
#pragma once
#include "common.h"
#include "expertpager_kernels.h"

namespace {

// Bits per code of the grouped integers.
inline int code_bits(int32_t kind) { return kind == EP_INT8 ? 8 : kind == EP_INT4 ? 4 : kind == EP_INT3 ? 3 : 2; }
// Bytes of a row of codes, which ends with a whole word of 32 bits.
inline int64_t packed_row_bytes(int64_t cols, int bits) { return ceil_div(cols * bits, 32) * 4; }

// Codes of BITS bits, each stored with an offset that makes it positive; G columns share a bf16 scale.
template <int BITS, int G>
struct GroupedTraits {
  static constexpr int kBits = BITS;
  static constexpr int kGroup = G;
  static constexpr int32_t kOffset = 1 << (BITS - 1);
  static constexpr int kScaleBytes = 2;
  static constexpr float kUnit = 1.0f;  // a scale of the activations stands for this much of a product of codes
  // Codes of less than four bits are taken apart into nibbles: from there on they are int4.
  static constexpr bool kExpands = BITS < 4;
  static constexpr int kSharedBits = kExpands ? 4 : BITS;
  static float scale(const uint8_t* p) { return bf16_to_float(element<uint16_t>(p, 0)); }
};

}  // namespace
