// NF4 on 256-bit registers: codes as 16-bit values, multiplied by 16-bit copies of the activations. Include after a
// target pragma that has AVX2.
#pragma once
#include "formats.h"
#include "x86.h"

namespace {

// The 64 codes of a block as four vectors: for the columns 2j of bytes j = 0..7 and 16..23, those of the other bytes, and
// the columns 2j + 1 of both, which is how unpacking leaves them.
inline __attribute__((always_inline)) void nf4_values(const uint8_t* block, __m256i* values) {
  const __m256i low = _mm256_broadcastsi128_si256(load128(kNf4Units.low)), mask = _mm256_set1_epi8(15);
  const __m256i high = _mm256_broadcastsi128_si256(load128(kNf4Units.high));
  const __m256i raw = load256(block);
  const __m256i codes[2] = {_mm256_and_si256(_mm256_srli_epi16(raw, 4), mask), _mm256_and_si256(raw, mask)};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i l = _mm256_shuffle_epi8(low, codes[i]), h = _mm256_shuffle_epi8(high, codes[i]);
    values[2 * i] = _mm256_unpacklo_epi8(l, h);
    values[2 * i + 1] = _mm256_unpackhi_epi8(l, h);
  }
}

// Blocks in panels (see expand_words).
struct Nf4Codes {
  static constexpr int kColumns = 64;
  static constexpr int kBytes = 32;
  static constexpr int kVectors = 4;
  static inline __attribute__((always_inline)) void expand(const uint8_t* block, __m256i* values) { nf4_values(block, values); }
};

struct Nf4Format : Nf4Traits {
  static constexpr int kGroups = 8;
  static constexpr int kPhases = 1;
  static constexpr int kWeightBytes = kGroups * kGroup / 2;
  static constexpr int kCodeBytes = kGroups * kGroup * 2;
  static constexpr int kRecordBytes = kCodeBytes + kGroups * 8;
  static constexpr bool kTurns = false;
  static constexpr bool kParts = true;
  static constexpr int kPartGroups = 1;
  static constexpr bool kPartScales = false;
  static constexpr int kPanelBits = 16;
  using Accumulator = __m256;
  using Codes = Nf4Codes;

  static __m256 zero() { return _mm256_setzero_ps(); }
  static constexpr int lane_of_group(int g) { return g; }
  static float finish(const __m256* acc) { return sum8(acc[0]); }

  // Activations in the order of nf4_values, as 16-bit integers.
  static void place(const int8_t* codes, uint8_t* out) {
    for (int b = 0; b < kGroups * kGroup; b += kGroup) {
      for (int i = 0; i < 32; i += 16) {
        const __m256i pairs = _mm256_set_m128i(load128(codes + b + i + 32), load128(codes + b + i));
        __m256i* words = reinterpret_cast<__m256i*>(out + 2 * (b + i));
        _mm256_storeu_si256(words, _mm256_srai_epi16(_mm256_slli_epi16(pairs, 8), 8));
        _mm256_storeu_si256(words + 2, _mm256_srai_epi16(pairs, 8));
      }
    }
  }

  template <int MT>
  static inline void step(__m256* acc, const uint8_t* w, const uint8_t* ws, const uint8_t* const* rec) {
    part<MT>(acc, w, ws, rec, kGroups);
  }
  // The first `groups` groups of a step; the scales of the others must be zero.
  template <int MT>
  static inline __attribute__((always_inline)) void part(__m256* acc, const uint8_t* w, const uint8_t* ws,
                                                         const uint8_t* const* rec, int groups) {
    __m256i v[MT][kGroups];
#pragma GCC unroll 1
    for (int g = 0; g < groups; ++g) {
      __m256i values[4];
      nf4_values(w + 32 * g, values);
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) {
        const uint8_t* at = rec[m] + 128 * g;
        const __m256i first = _mm256_add_epi32(_mm256_madd_epi16(values[0], load256(at)), _mm256_madd_epi16(values[1], load256(at + 32)));
        const __m256i second = _mm256_add_epi32(_mm256_madd_epi16(values[2], load256(at + 64)), _mm256_madd_epi16(values[3], load256(at + 96)));
        v[m][g] = _mm256_add_epi32(first, second);
      }
    }
    for (int g = groups; g < kGroups; ++g) {
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) v[m][g] = _mm256_setzero_si256();
    }
    const __m256 scale = _mm256_loadu_ps(reinterpret_cast<const float*>(ws));
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) acc[m] = accumulate(acc[m], totals(v[m]), scale, rec[m] + kCodeBytes);
  }
};

}  // namespace
