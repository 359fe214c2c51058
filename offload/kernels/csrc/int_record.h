// Activations of the integer formats: eight bits per column, a scale and a correction per group, in records of the
// size of one step. Part of kernels.h.
#pragma once
#include "isa.h"

namespace {

// The format whose records of activations and whose panels serve Format.
template <class Format>
struct SharedBy {
  using Type = IntFormat<Format::kSharedBits, Format::kGroup>;
};
template <>
struct SharedBy<Nf4Format> {
  using Type = Nf4Format;
};
template <class Format>
using Shared = typename SharedBy<Format>::Type;

// Lanes of the sum of a row, see kernels.h.
template <class Format>
constexpr int kLanes = Format::kGroups * Format::kPhases;

// Groups whose largest magnitude is below this are zero: 127 / amax would overflow.
constexpr float kSmallestAmax = 1e-30f;

template <class Format>
inline void place_codes(const int8_t* codes, int64_t n, uint8_t* out) {
  if constexpr (std::is_same<Format, Nf4Format>::value) {
    Format::place(codes, out);
  } else if constexpr (Format::kBits == 4) {
    for (int64_t b = 0; b < n; b += 128) {
      for (int i = 0; i < 64; ++i) {
        out[b + i] = static_cast<uint8_t>(codes[b + 2 * i]);
        out[b + 64 + i] = static_cast<uint8_t>(codes[b + 2 * i + 1]);
      }
    }
  } else if constexpr (kInt8Deinterleave) {
    int16_t* words = reinterpret_cast<int16_t*>(out);
    for (int64_t b = 0; b < n; b += 32) {
      for (int i = 0; i < 16; ++i) {
        words[b + i] = codes[b + 2 * i];
        words[b + 16 + i] = static_cast<int16_t>(codes[b + 2 * i + 1] - 256 * codes[b + 2 * i]);
      }
    }
  } else {
    std::memcpy(out, codes, static_cast<size_t>(n));
  }
}

// One record: codes, then scales, then corrections (minus the weight offset times the sum of the codes that
// meet weights with their offset: all of them, or the even ones).
template <class Format>
inline void quantize_record(const float* x, int32_t offset, uint8_t* rec, F& poison) {
  constexpr int G = Format::kGroup, kColumns = Format::kGroups * G;
  static_assert(Format::kGroups % 4 == 0, "sums are taken four groups at a time");
  int8_t codes[kColumns];
  float* scales = reinterpret_cast<float*>(rec + Format::kCodeBytes);
  int32_t* corrections = reinterpret_cast<int32_t*>(rec + Format::kCodeBytes + Format::kGroups * 4);
  for (int first = 0; first < Format::kGroups; first += 4) {
    F most[4], total[4];
    float amax[4], inverse[4], scale[4], sums[4];
    for (int g = 0; g < 4; ++g) {
      most[g] = f_zero();
      for (int i = 0; i < G; i += 16) {
        const F v = f_load(x + (first + g) * G + i);
        poison = f_fma(v, f_zero(), poison);
        most[g] = f_max(f_abs(v), most[g]);
      }
    }
    f_amax4(most[0], most[1], most[2], most[3], amax);
    for (int g = 0; g < 4; ++g) inverse[g] = 127.0f / amax[g];
    for (int g = 0; g < 4; ++g) scale[g] = amax[g] / 127.0f * Format::kUnit;
    for (int g = 0; g < 4; ++g) {
      if (!(amax[g] >= kSmallestAmax) || !is_finite(amax[g])) inverse[g] = scale[g] = 0.0f;
      const F factor = f_set1(inverse[g]);
      total[g] = f_zero();
      for (int i = 0; i < G; i += 16) {
        const int at = (first + g) * G + i;
        const F q = f_min(f_rint(f_mul(f_load(x + at), factor)), f_set1(127.0f));  // NaN: 127
        total[g] = f_add(total[g], q);  // exact: integers below 2^14
        f_store_i8(codes + at, q);
      }
      scales[Format::lane_of_group(first + g)] = scale[g];
    }
    f_sum4(total[0], total[1], total[2], total[3], sums);
    for (int g = 0; g < 4; ++g) {
      int32_t sum = static_cast<int32_t>(sums[g]);
      if constexpr (Format::kBits == 8 && kInt8Deinterleave) {
        for (int i = 1; i < G; i += 2) sum -= codes[(first + g) * G + i];
      }
      corrections[Format::lane_of_group(first + g)] = -offset * sum;
    }
  }
  place_codes<Format>(codes, kColumns, rec);
}

// `offset` is what the codes of the weight are stored with: formats that differ in nothing else share this.
template <class Format>
bool quantize_row(const float* x, int64_t cols, int32_t offset, uint8_t* row) {
  constexpr int kColumns = Format::kGroups * Format::kGroup;
  F poison = f_zero();
  uint8_t* rec = row;
  int64_t c = 0;
  for (; c + kColumns <= cols; c += kColumns, rec += Format::kRecordBytes) quantize_record<Format>(x + c, offset, rec, poison);
  if (c < cols) {
    float padded[kColumns] = {};
    std::memcpy(padded, x + c, static_cast<size_t>(cols - c) * 4);
    quantize_record<Format>(padded, offset, rec, poison);
  }
  const bool finite = f_sum(poison) == 0.0f;
  if (!finite) *reinterpret_cast<float*>(row + Format::kCodeBytes) = kQuietNan;  // reaches every result
  return finite;
}

template <class Format>
int64_t record_bytes(int64_t cols) {
  // An odd number of extra lines keeps the rows of a token tile out of each other's cache sets.
  return round_up(ceil_div(ceil_div(cols, Format::kGroup), Format::kGroups) * Format::kRecordBytes, 128) + 64;
}

}  // namespace
