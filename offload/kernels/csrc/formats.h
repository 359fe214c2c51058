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
  static constexpr int kPanelBits = kSharedBits;
  static float scale(const uint8_t* p) { return bf16_to_float(element<uint16_t>(p, 0)); }
};

// NF4 in blocks of 64 that do not run over the ends of rows. The values of the codes are whole multiples of 2^-14: both
// ends exactly, the others within 2^-15 of the block's scale, a hundredth of what eight bits leave of the activations.
struct Nf4Traits {
  static constexpr int kBits = 4;
  static constexpr int kGroup = 64;
  static constexpr int32_t kOffset = 0;
  static constexpr int kScaleBytes = 4;
  static constexpr float kUnit = 1.0f / 16384;
  static constexpr bool kExpands = true;
  static float scale(const uint8_t* p) { return element<float>(p, 0); }
};

struct Nf4Units {
  constexpr Nf4Units() {
    for (int i = 0; i < 16; ++i) {
      const float units = kNf4[i] / Nf4Traits::kUnit;
      value[i] = static_cast<int16_t>(units < 0 ? units - 0.5f : units + 0.5f);
      low[i] = static_cast<uint8_t>(value[i] & 255);
      high[i] = static_cast<uint8_t>(value[i] >> 8 & 255);
    }
  }
  int16_t value[16] = {};
  alignas(16) uint8_t low[16] = {}, high[16] = {};  // the bytes of the values
};
constexpr Nf4Units kNf4Units;

}  // namespace
