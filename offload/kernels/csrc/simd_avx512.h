// Sixteen float lanes as one AVX-512 register, and integer dot products with VNNI on 512 bits.
//
// Gives the bits of simd_portable.h. Needs F, BW, DQ, VL and VNNI.
#pragma once
#include <immintrin.h>

#include "formats.h"
#include "narrow_x86.h"
#include "nf4_x86.h"
#include "transpose_x86.h"

namespace {

constexpr int kInt8ActBytes = 1;
constexpr bool kInt8Deinterleave = false;
constexpr int kDotRows = 4, kDotTokens = 4;  // of a tile of dot products: its sums fill half of the registers
constexpr int kValueVectors = 2;             // of every weighted sum of values that are kept in registers
constexpr int kAddColumns = 256;                 // of a sum of rows that is kept in registers

using F = __m512;

inline F f_zero() { return _mm512_setzero_ps(); }
inline F f_set1(float x) { return _mm512_set1_ps(x); }
inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline void f_store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F f_add(F x, F y) { return _mm512_add_ps(x, y); }
inline F f_sub(F x, F y) { return _mm512_sub_ps(x, y); }
inline F f_mul(F x, F y) { return _mm512_mul_ps(x, y); }
inline F f_div(F x, F y) { return _mm512_div_ps(x, y); }
inline F f_fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
inline F f_max(F x, F y) { return _mm512_max_ps(x, y); }
inline F f_min(F x, F y) { return _mm512_min_ps(x, y); }
inline F f_abs(F x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
}
inline F f_rint(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F f_pow2(F n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
inline F f_from_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
}
// By way of fp16, whose exponents have a bias that is 8 larger: its subnormals are converted at full speed.
inline F f_from_e4m3(const uint8_t* p) {
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(load128(p)), 7), _mm256_set1_epi16(static_cast<short>(0xBF80)));
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}
inline F f_from_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load128(p))); }
template <int BITS>
inline F f_from_bits(const uint8_t* p) {
  uint64_t stream = 0;
  std::memcpy(&stream, p, 2 * BITS);
  const __m256i low = _mm256_set1_epi32(static_cast<int>(stream)), high = _mm256_set1_epi32(static_cast<int>(stream >> (8 * BITS)));
  const __m512i lanes = _mm512_mullo_epi32(_mm512_set1_epi32(BITS), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7));
  const __m512i codes = _mm512_srlv_epi32(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), lanes);
  return _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32((1 << BITS) - 1)));
}
// The same without the offset that the codes are stored with.
template <int BITS>
inline F f_centered(const uint8_t* p) {
  if constexpr (BITS == 4) {
    const __m512i word = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i shift = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i words = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    // Of an index the permutation looks at the low four bits.
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_permutexvar_epi32(word, words), shift), values);
  } else {
    return f_sub(f_from_bits<BITS>(p), f_set1(1 << (BITS - 1)));
  }
}
// Codes of two words in turn, which saves a permutation: lane 2j is column j, lane 2j + 1 column 8 + j.
inline F f_centered_in_turn(const uint8_t* p) {
  const __m512i shift = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(element<int64_t>(p, 0)), shift), values);
}
inline F f_to_turn(F x) {
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), x);
}
inline F f_from_turn(F x) {
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), x);
}
inline F f_from_nf4(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
  const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), low), _mm_and_si128(bytes, low));
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), _mm512_load_ps(kNf4));
}
inline F f_from_i32(const int32_t* p) { return _mm512_cvtepi32_ps(load512(p)); }
inline void f_store_i8(int8_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline __m256 low_half(__m512 x) { return _mm512_castps512_ps256(x); }
inline __m256 high_half(__m512 x) { return _mm512_extractf32x8_ps(x, 1); }
inline float f_most(F x) { return _mm512_reduce_max_ps(x); }  // no lane is NaN
inline float f_sum(F x) { return sum8(_mm256_add_ps(low_half(x), high_half(x))); }
inline __m256 halves(F x) { return _mm256_add_ps(low_half(x), high_half(x)); }
inline void f_sum4(F x, F y, F z, F w, float* out) { _mm_storeu_ps(out, sums8(halves(x), halves(y), halves(z), halves(w))); }
// Lanes are not negative.
inline __m256 most_halves(F x) { return _mm256_max_ps(low_half(x), high_half(x)); }
inline void f_amax4(F x, F y, F z, F w, float* out) {
  _mm_storeu_ps(out, most8(most_halves(x), most_halves(y), most_halves(z), most_halves(w)));
}

inline __m512i pair32(__m512i x, __m512i y) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
}
inline __m512i pair64(__m512i x, __m512i y) {
  return _mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
}
// Totals of eight vectors of sixteen 32-bit lanes, in order.
inline __m256i totals(const __m512i* v) {
  const __m512i x = pair64(pair32(v[0], v[1]), pair32(v[2], v[3]));
  const __m512i y = pair64(pair32(v[4], v[5]), pair32(v[6], v[7]));
  const __m512i z = _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xDD));
  // z holds x, x, y, y by quarters: add the halves of each pair.
  const __m512i w = _mm512_shuffle_i32x4(z, z, 0xD8);
  return _mm256_add_epi32(_mm512_castsi512_si256(w), _mm512_extracti64x4_epi64(w, 1));
}

// Up to four bits in groups of 32: two registers of 64 bytes hold the codes of four groups, one per quarter, so
// sixteen groups meet in one vector of sums after two rounds of pairwise adds.
template <int BITS>
struct NibbleFormat : GroupedTraits<BITS, 32> {
  using Codes = NarrowCodes<BITS>;
  static constexpr int kGroups = 16;
  static constexpr int kPhases = 1;
  static constexpr int kWeightBytes = 64 * BITS;
  static constexpr int kCodeBytes = 512;
  static constexpr int kRecordBytes = kCodeBytes + kGroups * 8;
  static constexpr bool kTurns = false;
  static constexpr bool kParts = true;
  static constexpr int kPartGroups = BITS == 4 ? 4 : 8;  // what can be read without the bytes behind it
  static constexpr bool kPartScales = true;              // no scale behind them is read
  using Accumulator = __m512;

  static __m512 zero() { return _mm512_setzero_ps(); }
  static constexpr int lane_of_group(int g) { return (g & 3) * 4 + g / 4; }

  template <int MT>
  static inline void step(__m512* acc, const uint8_t* w, const uint8_t* ws, const uint8_t* const* rec) {
    part<MT>(acc, w, ws, rec, kGroups);
  }

  // The first `groups` groups of a step.
  template <int MT>
  static inline __attribute__((always_inline)) void part(__m512* acc, const uint8_t* w, const uint8_t* ws,
                                                         const uint8_t* const* rec, int groups) {
    __m512i v[MT][4];
    // Loops of fixed length: with an index that is computed, the sums would lie in memory.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (4 * i >= groups) {
#pragma GCC unroll 4
        for (int m = 0; m < MT; ++m) v[m][i] = _mm512_setzero_si512();
        continue;
      }
      __m512i even_codes, odd_codes;
      quarters(w, i, even_codes, odd_codes);
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) {
        const __m512i even = load512(rec[m] + 128 * i), odd = load512(rec[m] + 128 * i + 64);
        v[m][i] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), even_codes, even), odd_codes, odd);
      }
    }
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i scales = groups == kGroups ? load256(ws) : _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << groups) - 1), ws);
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(scales), 16);
    const __m512 scale = _mm512_castsi512_ps(_mm512_permutexvar_epi32(order, wide));
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) {
      const uint8_t* tail = rec[m] + kCodeBytes;
      const __m512i sums = pair64(pair32(v[m][0], v[m][1]), pair32(v[m][2], v[m][3]));
      const __m512 d = _mm512_cvtepi32_ps(_mm512_add_epi32(sums, load512(tail + 64)));
      const __m512 as = _mm512_loadu_ps(reinterpret_cast<const float*>(tail));
      acc[m] = _mm512_fmadd_ps(d, _mm512_mul_ps(scale, as), acc[m]);
    }
  }

  static float finish(const __m512* acc) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return f_sum(_mm512_permutexvar_ps(order, acc[0]));
  }

 private:
  // Groups 4i to 4i + 3: the codes of their even columns and those of the odd ones.
  static inline __attribute__((always_inline)) void quarters(const uint8_t* w, int i, __m512i& even, __m512i& odd) {
    if constexpr (BITS == 4) {
      const __m512i raw = load512(w + 64 * i), mask = _mm512_set1_epi8(15);
      even = _mm512_and_si512(raw, mask);
      odd = _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask);
    } else {
      const uint8_t* eight = w + i / 2 * 32 * BITS;
      const CodePair low = code_pair<BITS>(eight, i % 2 * 2), high = code_pair<BITS>(eight, i % 2 * 2 + 1);
      even = _mm512_inserti64x4(_mm512_castsi256_si512(low.even), high.even, 1);
      odd = _mm512_inserti64x4(_mm512_castsi256_si512(low.odd), high.odd, 1);
    }
  }
};

// The other formats: eight groups per step, at least 32 bytes of codes each.
template <int BITS, int G>
struct WideFormat : GroupedTraits<BITS, G> {
  static constexpr int kGroups = 8;
  static constexpr int kPhases = 1;
  static constexpr int kWeightBytes = kGroups * G * BITS / 8;
  static constexpr int kCodeBytes = kGroups * G;
  static constexpr int kRecordBytes = kCodeBytes + kGroups * 8;
  using Accumulator = __m256;

  static __m256 zero() { return _mm256_setzero_ps(); }
  static constexpr int lane_of_group(int g) { return g; }

  template <int MT>
  static inline void step(__m256* acc, const uint8_t* w, const uint8_t* ws, const uint8_t* const* rec) {
    part<MT>(acc, w, ws, rec, kGroups);
  }

  static constexpr bool kTurns = false;
  // The first `groups` groups of a step.
  static constexpr bool kParts = true;
  static constexpr int kPartGroups = 1;
  static constexpr bool kPartScales = true;
  template <int MT>
  static inline __attribute__((always_inline)) void part(__m256* acc, const uint8_t* w, const uint8_t* ws,
                                                         const uint8_t* const* rec, int groups) {
    __m512i v[MT][kGroups];
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) v[m][g] = _mm512_setzero_si512();
      if (g >= groups) continue;
      constexpr int kBytes = G * BITS / 8;
#pragma GCC unroll 4
      for (int b = g * kBytes; b < (g + 1) * kBytes; b += 64) {
        const __m512i raw = kBytes >= 64 ? load512(w + b) : _mm512_zextsi256_si512(load256(w + b));
        if constexpr (BITS == 4) {
          const __m512i mask = _mm512_set1_epi8(15);
          const __m512i lo = _mm512_and_si512(raw, mask);
          const __m512i hi = _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask);
          const int at = (b / 64) * 128 + b % 64;
#pragma GCC unroll 4
          for (int m = 0; m < MT; ++m) {
            v[m][g] = _mm512_dpbusd_epi32(v[m][g], lo, codes(rec[m] + at));
            v[m][g] = _mm512_dpbusd_epi32(v[m][g], hi, codes(rec[m] + at + 64));
          }
        } else {
#pragma GCC unroll 4
          for (int m = 0; m < MT; ++m) v[m][g] = _mm512_dpbusd_epi32(v[m][g], raw, codes(rec[m] + b));
        }
      }
    }
    const __m256 scale = bf16_lanes(groups == kGroups ? load128(ws) : _mm_maskz_loadu_epi16(static_cast<__mmask8>((1u << groups) - 1), ws));
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) acc[m] = accumulate(acc[m], totals(v[m]), scale, rec[m] + kCodeBytes);
  }

  static float finish(const __m256* acc) { return sum8(acc[0]); }

 private:
  static inline __m512i codes(const uint8_t* p) {
    return G * BITS / 8 >= 64 ? load512(p) : _mm512_zextsi256_si512(load256(p));
  }
};

template <int BITS, int G>
struct FormatOf {
  using Type = WideFormat<BITS, G>;
};
template <int BITS>
struct FormatOf<BITS, 32> {
  using Type = NibbleFormat<BITS>;
};
template <>
struct FormatOf<8, 32> {
  using Type = WideFormat<8, 32>;
};
template <int BITS, int G>
using IntFormat = typename FormatOf<BITS, G>::Type;

// Panels (see kernels.h): one 32-bit word of sixteen rows per register.
#define EP_PANELS 1
constexpr int kPanelRows = 16;
using PanelInt = __m512i;
using PanelFloat = __m512;

inline __m512 panel_zero() { return _mm512_setzero_ps(); }
inline __m512 panel_add(__m512 x, __m512 y) { return _mm512_add_ps(x, y); }
inline __m512 panel_load(const float* p) { return _mm512_load_ps(p); }
inline void panel_store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
inline __m512i word_of(const uint8_t* p) { return _mm512_set1_epi32(element<int32_t>(p, 0)); }
// acc + (sums + correction) * (ws * as), the last two from the activation record.
inline __m512 panel_accumulate(__m512 acc, __m512i sums, __m512 ws, const uint8_t* as, const uint8_t* correction) {
  const __m512 d = _mm512_cvtepi32_ps(_mm512_add_epi32(sums, word_of(correction)));
  return _mm512_fmadd_ps(d, _mm512_mul_ps(ws, _mm512_set1_ps(element<float>(as, 0))), acc);
}

// Sums of one group of sixteen rows against T tokens; `act[t]` points at the codes of the record.
template <int BITS, int G, int T>
inline void panel_sums(const uint8_t* words, const uint8_t* const* act, int group, __m512i* sums) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_si512();
  constexpr int kWords = G * BITS / 32;
  const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int i = 0; i < kWords; ++i) {
    const __m512i raw = load512(words + 64 * i);
    if constexpr (BITS == 4) {
      const int first = group * (G / 2), at = first / 64 * 128 + first % 64 + 4 * i;
      const __m512i lo = _mm512_and_si512(raw, mask), hi = _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        sums[t] = _mm512_dpbusd_epi32(sums[t], lo, word_of(act[t] + at));
        sums[t] = _mm512_dpbusd_epi32(sums[t], hi, word_of(act[t] + at + 64));
      }
    } else if constexpr (BITS == 16) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[t] = _mm512_dpwssd_epi32(sums[t], raw, word_of(act[t] + 2 * group * G + 4 * i));
    } else {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[t] = _mm512_dpbusd_epi32(sums[t], raw, word_of(act[t] + group * G + 4 * i));
    }
  }
}

inline bool has_e4m3_nan(const uint8_t* p, int64_t n) {
  const __m256i low = _mm256_set1_epi8(0x7F);
  __m256i most = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) most = _mm256_max_epu8(most, _mm256_and_si256(load256(p + i), low));
  bool found = _mm256_movemask_epi8(_mm256_cmpeq_epi8(most, low)) != 0;
  for (; i < n; ++i) found |= (p[i] & 0x7F) == 0x7F;
  return found;
}

}  // namespace
