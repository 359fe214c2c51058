// Sixteen float lanes as two AVX2 registers, and integer dot products with or without AVX-VNNI.
//
// Gives the bits of simd_portable.h. Without VNNI, unsigned nibbles times signed bytes add up in 16
// bits without saturation (15 * 127 * 8 < 2^15), and full bytes are multiplied as 16-bit pairs.
// Compile with EP_VNNI256 for processors that have vpdpbusd on 256 bits but no AVX-512.
#pragma once
#include <immintrin.h>

#include "formats.h"
#include "narrow_x86.h"
#include "nf4_x86.h"
#include "transpose_x86.h"

namespace {

#ifdef EP_VNNI256
constexpr int kInt8ActBytes = 1;
constexpr bool kInt8Deinterleave = false;
#else
constexpr int kInt8ActBytes = 2;  // of 32 columns, as 16-bit integers: 16 even ones e, then 16 odd ones less 256 e
constexpr bool kInt8Deinterleave = true;
#endif

constexpr int kDotRows = 2, kDotTokens = 3;  // of a tile of dot products: two registers a sum
constexpr int kValueVectors = 1;             // of every weighted sum of values that are kept in registers
constexpr int kAddColumns = 64;                  // of a sum of rows that is kept in registers

struct F {
  __m256 a, b;
};

inline F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F f_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F f_add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F f_sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F f_mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F f_div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F f_max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F f_min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F f_abs(F x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
inline F f_rint(F x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
}
inline __m256 pow2_lanes(__m256 n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), bias), 23));
}
inline F f_pow2(F n) { return {pow2_lanes(n.a), pow2_lanes(n.b)}; }
inline F f_from_bf16(const uint16_t* p) { return {bf16_lanes(load128(p)), bf16_lanes(load128(p + 8))}; }
// By way of fp16, whose exponents have a bias that is 8 larger: its subnormals are converted at full speed.
inline F f_from_e4m3(const uint8_t* p) {
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(load128(p)), 7), _mm256_set1_epi16(static_cast<short>(0xBF80)));
  const __m256 lift = _mm256_set1_ps(256.0f);
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), lift),
          _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), lift)};
}
inline F f_from_u8(const uint8_t* p) {
  const __m128i x = load128(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
}
template <int BITS>
inline __m256 bit_lanes(uint32_t stream) {
  const __m256i shifts = _mm256_setr_epi32(0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS);
  const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(stream)), shifts);
  return _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32((1 << BITS) - 1)));
}
template <int BITS>
inline F f_from_bits(const uint8_t* p) {
  if constexpr (BITS == 4) return {bit_lanes<4>(element<uint32_t>(p, 0)), bit_lanes<4>(element<uint32_t>(p, 1))};
  uint64_t stream = 0;
  std::memcpy(&stream, p, 2 * BITS);
  return {bit_lanes<BITS>(static_cast<uint32_t>(stream)), bit_lanes<BITS>(static_cast<uint32_t>(stream >> (8 * BITS)))};
}
// The same without the offset that the codes are stored with.
template <int BITS>
inline F f_centered(const uint8_t* p) {
  return f_sub(f_from_bits<BITS>(p), f_set1(1 << (BITS - 1)));
}
// Codes of four bits in the order in which they come cheapest: here that of the columns.
inline F f_centered_in_turn(const uint8_t* p) { return f_centered<4>(p); }
inline F f_to_turn(F x) { return x; }
inline F f_from_turn(F x) { return x; }
inline __m256 nf4_lanes(__m128i codes) {
  const __m256i index = _mm256_cvtepu8_epi32(codes);  // the permutation looks at the low three bits
  const __m256 negative = _mm256_permutevar8x32_ps(_mm256_load_ps(kNf4), index);
  const __m256 positive = _mm256_permutevar8x32_ps(_mm256_load_ps(kNf4 + 8), index);
  return _mm256_blendv_ps(negative, positive, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline F f_from_nf4(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
  const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), low), _mm_and_si128(bytes, low));
  return {nf4_lanes(codes), nf4_lanes(_mm_srli_si128(codes, 8))};
}
inline F f_from_i32(const int32_t* p) {
  return {_mm256_cvtepi32_ps(load256(p)), _mm256_cvtepi32_ps(load256(p + 8))};
}
inline void f_store_i8(int8_t* p, F x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline float f_most(F x) {  // no lane is NaN
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float f_sum(F x) { return sum8(_mm256_add_ps(x.a, x.b)); }
inline __m256 halves(F x) { return _mm256_add_ps(x.a, x.b); }
inline void f_sum4(F x, F y, F z, F w, float* out) { _mm_storeu_ps(out, sums8(halves(x), halves(y), halves(z), halves(w))); }
// Lanes are not negative.
inline __m256 most_halves(F x) { return _mm256_max_ps(x.a, x.b); }
inline void f_amax4(F x, F y, F z, F w, float* out) {
  _mm_storeu_ps(out, most8(most_halves(x), most_halves(y), most_halves(z), most_halves(w)));
}

using Acc = __m256;

#ifdef EP_VNNI256
inline __m256i dpbusd(__m256i acc, __m256i u, __m256i s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
#endif

inline __m256i nibbles_low(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline __m256i nibbles_high(__m256i x) {
  return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15));
}
// Two neighbouring codes as one number: the even code u (with its offset) plus 256 times the odd weight w (without).
// Multiplied by the even activation e it leaves 256 w e too much, which w times (odd activation - 256 e) takes off.
inline __m256i byte_pairs(__m256i codes) { return _mm256_xor_si256(codes, _mm256_set1_epi16(INT16_MIN)); }
// The sums of pair32 and pair64 in 16-bit lanes, two of which move together or four.
inline __m256i pair32x16(__m256i x, __m256i y) {
  return _mm256_add_epi16(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
}
inline __m256i pair64x16(__m256i x, __m256i y) {
  return _mm256_add_epi16(_mm256_unpacklo_epi64(x, y), _mm256_unpackhi_epi64(x, y));
}
template <int BITS, int G>
struct IntFormat : GroupedTraits<BITS, G> {
  using Codes = NarrowCodes<BITS>;
  static constexpr bool kPaired = BITS <= 4 && G == 32;
  static constexpr int kGroups = 8;
  static constexpr int kPhases = kPaired ? 2 : 1;
  static constexpr int kWeightBytes = kGroups * G * BITS / 8;
  static constexpr int kCodeBytes = kGroups * G * (BITS == 8 ? kInt8ActBytes : 1);
  static constexpr int kRecordBytes = kCodeBytes + kGroups * 8;
  using Accumulator = Acc;

  static Acc zero() { return _mm256_setzero_ps(); }
  // With 16 bytes per group, a register holds groups 2i and 2i + 1 in its halves.
  static constexpr int lane_of_group(int g) { return kPaired ? (g & 1) * 4 + g / 2 : g; }

  template <int MT>
  static inline void step(Acc* acc, const uint8_t* w, const uint8_t* ws, const uint8_t* const* rec) {
    if constexpr (kPaired) {
      step_paired<MT>(acc, w, ws, rec);
    } else {
      part<MT>(acc, w, ws, rec, kGroups);
    }
  }

  // One step of NR rows against one token, the rows `stride` bytes and their scales `scale_stride` bytes apart. Rows that take
  // turns every 32 bytes load each piece of the token once, and keep as many streams of reads under way. With four bits
  // the arithmetic decides, and it gains nothing.
  static constexpr bool kTurns = BITS == 8;
  template <int NR>
  static inline void turns(Acc (*acc)[1], const uint8_t* w, int64_t stride, const uint8_t* ws, int64_t scale_stride,
                           const uint8_t* rec) {
    __m256i v[NR][kGroups];
#pragma GCC unroll 1  // unrolled, the compiler runs out of registers
    for (int g = 0; g < kGroups; ++g) {
      __m256i sum[NR];
#pragma GCC unroll 4
      for (int r = 0; r < NR; ++r) sum[r] = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int b = g * G; b < (g + 1) * G; b += 32) {
        const __m256i even = load256(rec + kInt8ActBytes * b), odd = load256(rec + kInt8ActBytes * b + 32);
#pragma GCC unroll 4
        for (int r = 0; r < NR; ++r) sum[r] = byte_sums(sum[r], load256(w + r * stride + b), even, odd);
      }
#pragma GCC unroll 4
      for (int r = 0; r < NR; ++r) v[r][g] = sum[r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) {
      acc[r][0] = accumulate(acc[r][0], totals(v[r]), bf16_lanes(load128(ws + r * scale_stride)), rec + kCodeBytes);
    }
  }

  // The first `groups` groups of a step; the scales of the others must be zero.
  static constexpr bool kParts = !kPaired;
  static constexpr int kPartGroups = 1;
  static constexpr bool kPartScales = false;
  template <int MT>
  static inline __attribute__((always_inline)) void part(Acc* acc, const uint8_t* w, const uint8_t* ws,
                                                         const uint8_t* const* rec, int groups) {
    __m256i v[MT][kGroups];
    if constexpr (BITS == 4) {
#pragma GCC unroll 8
      for (int g = 0; g < groups; ++g) group_sums<MT>(v, w, rec, g);
    } else {
#pragma GCC unroll 1  // unrolled, the compiler runs out of registers
      for (int g = 0; g < groups; ++g) group_sums<MT>(v, w, rec, g);
    }
    for (int g = groups; g < kGroups; ++g) {
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) v[m][g] = _mm256_setzero_si256();
    }
    const __m256 scale = bf16_lanes(load128(ws));
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) acc[m] = accumulate(acc[m], totals(v[m]), scale, rec[m] + kCodeBytes);
  }

  static float finish(const Acc* acc) {
    if constexpr (kPaired) {
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      return sum8(_mm256_permutevar8x32_ps(_mm256_add_ps(acc[0], acc[1]), order));
    }
    return sum8(acc[0]);
  }

 private:
  // Sums of 64 codes times `even` and `odd` activations, in lanes that hold a part of one group each: of 32 bits
  // with VNNI, else of 16, which four such sums and one more pair fill to 15 * 127 * 16 = 30480 at most.
  static inline __m256i nibble_sums(CodePair codes, __m256i even, __m256i odd) {
#ifdef EP_VNNI256
    return dpbusd(dpbusd(_mm256_setzero_si256(), codes.even, even), codes.odd, odd);
#else
    return _mm256_add_epi16(_mm256_maddubs_epi16(codes.even, even), _mm256_maddubs_epi16(codes.odd, odd));
#endif
  }
  static inline __m256i add_sums(__m256i x, __m256i y) {
#ifdef EP_VNNI256
    return _mm256_add_epi32(x, y);
#else
    return _mm256_add_epi16(x, y);
#endif
  }
  // Such sums as 32-bit lanes.
  static inline __m256i widened(__m256i sums) {
#ifdef EP_VNNI256
    return sums;
#else
    return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
#endif
  }
  // `odd` is not used with VNNI, where codes lie in their order.
  static inline __m256i byte_sums(__m256i sums, __m256i raw, __m256i even, [[maybe_unused]] __m256i odd) {
#ifdef EP_VNNI256
    return dpbusd(sums, raw, even);
#else
    const __m256i pairs = byte_pairs(raw);
    const __m256i d = _mm256_add_epi32(_mm256_madd_epi16(pairs, even), _mm256_madd_epi16(_mm256_srai_epi16(pairs, 8), odd));
    return _mm256_add_epi32(sums, d);
#endif
  }

  static inline void accumulate_paired(Acc& acc, const __m256i* v, const uint8_t* ws, const uint8_t* rec) {
    // Each scale to the upper half of a float, groups 0 2 4 6 1 3 5 7.
    const __m256i order = _mm256_setr_epi8(
        -1, -1, 0, 1, -1, -1, 4, 5, -1, -1, 8, 9, -1, -1, 12, 13,
        -1, -1, 2, 3, -1, -1, 6, 7, -1, -1, 10, 11, -1, -1, 14, 15);
    const __m256 scale = _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(ws)), order));
#ifdef EP_VNNI256
    const __m256i sums = pair64(pair32(v[0], v[1]), pair32(v[2], v[3]));
#else
    const __m256i sums = widened(pair64x16(pair32x16(v[0], v[1]), pair32x16(v[2], v[3])));
#endif
    acc = accumulate(acc, sums, scale, rec + kCodeBytes);
  }

  template <int MT>
  static inline void step_paired(Acc* acc, const uint8_t* w, const uint8_t* ws, const uint8_t* const* rec) {
    __m256i v[MT][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const CodePair codes = code_pair<BITS>(w, i);
      const int at = (i / 2) * 128 + (i % 2) * 32;
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) v[m][i] = nibble_sums(codes, load256(rec[m] + at), load256(rec[m] + at + 64));
    }
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) accumulate_paired(acc[m], v[m], ws, rec[m]);
  }

  template <int MT>
  static inline void group_sums(__m256i (*v)[kGroups], const uint8_t* w, const uint8_t* const* rec, int g) {
    constexpr int kBytes = G * BITS / 8;
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) v[m][g] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int b = g * kBytes; b < (g + 1) * kBytes; b += 32) {
      const __m256i raw = load256(w + b);
      const int at = BITS == 4 ? (b / 64) * 128 + b % 64 : kInt8ActBytes * b;
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) {
        const __m256i even = load256(rec[m] + at), odd = load256(rec[m] + at + (BITS == 4 ? 64 : 32));
        if constexpr (BITS == 8) {
          v[m][g] = byte_sums(v[m][g], raw, even, odd);
        } else {
          v[m][g] = add_sums(v[m][g], nibble_sums({nibbles_low(raw), nibbles_high(raw)}, even, odd));
        }
      }
    }
    if constexpr (BITS == 4) {
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) v[m][g] = widened(v[m][g]);
    }
  }
};

// Panels (see kernels.h): one 32-bit word of eight rows per register.
#define EP_PANELS 1
constexpr int kPanelRows = 8;
using PanelInt = __m256i;
using PanelFloat = __m256;

inline __m256 panel_zero() { return _mm256_setzero_ps(); }
inline __m256 panel_add(__m256 x, __m256 y) { return _mm256_add_ps(x, y); }
inline __m256 panel_load(const float* p) { return _mm256_load_ps(p); }
inline void panel_store(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
inline __m256i word_of(const uint8_t* p) { return _mm256_set1_epi32(element<int32_t>(p, 0)); }
// acc + (sums + correction) * (ws * as), the last two from the activation record.
inline __m256 panel_accumulate(__m256 acc, __m256i sums, __m256 ws, const uint8_t* as, const uint8_t* correction) {
  const __m256 d = _mm256_cvtepi32_ps(_mm256_add_epi32(sums, word_of(correction)));
  return _mm256_fmadd_ps(d, _mm256_mul_ps(ws, _mm256_set1_ps(element<float>(as, 0))), acc);
}

// Sums of one group of eight rows against T tokens; `act[t]` points at the codes of the record.
template <int BITS, int G, int T>
inline void panel_sums(const uint8_t* words, const uint8_t* const* act, int group, __m256i* sums) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
  constexpr int kWords = G * BITS / 32;
  if constexpr (BITS == 4) {
    const int first = group * (G / 2), at = first / 64 * 128 + first % 64;
    for (int w = 0; w < kWords; w += 4) {
      [[maybe_unused]] __m256i part[T];
#pragma GCC unroll 4
      for (int i = w; i < w + 4; ++i) {
        const __m256i raw = load256(words + 32 * i), lo = nibbles_low(raw), hi = nibbles_high(raw);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const __m256i even = word_of(act[t] + at + 4 * i), odd = word_of(act[t] + at + 64 + 4 * i);
#ifdef EP_VNNI256
          sums[t] = dpbusd(dpbusd(sums[t], lo, even), hi, odd);
#else
          const __m256i d = _mm256_add_epi16(_mm256_maddubs_epi16(lo, even), _mm256_maddubs_epi16(hi, odd));
          part[t] = i == w ? d : _mm256_add_epi16(part[t], d);
#endif
        }
      }
#ifndef EP_VNNI256
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(part[t], _mm256_set1_epi16(1)));
      }
#endif
    }
  } else if constexpr (BITS == 16) {
#pragma GCC unroll 4
    for (int i = 0; i < kWords; ++i) {
      const __m256i raw = load256(words + 32 * i);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(raw, word_of(act[t] + 2 * group * G + 4 * i)));
      }
    }
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < kWords; ++i) {
      const __m256i raw = load256(words + 32 * i);
#ifdef EP_VNNI256
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[t] = dpbusd(sums[t], raw, word_of(act[t] + group * G + 4 * i));
#else
      const __m256i pairs = byte_pairs(raw), odd = _mm256_srai_epi16(pairs, 8);
      const int column = group * G + 4 * i, at = column / 32 * 64 + column % 32;
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m256i d = _mm256_add_epi32(_mm256_madd_epi16(pairs, word_of(act[t] + at)),
                                           _mm256_madd_epi16(odd, word_of(act[t] + at + 32)));
        sums[t] = _mm256_add_epi32(sums[t], d);
      }
#endif
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
