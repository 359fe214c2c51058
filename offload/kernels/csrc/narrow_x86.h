// Codes of two and three bits as the nibbles of int4, in 256-bit registers. Include after a target pragma that has AVX2.
#pragma once
#include "x86.h"

namespace {

// Two groups of 32 codes, one per half of a register: the codes of even columns in order, and those of odd ones.
struct CodePair {
  __m256i even, odd;
};

// Groups 2i and 2i + 1 of eight that follow each other from `step` on; nothing outside of these is read.
template <int BITS>
inline __attribute__((always_inline)) CodePair code_pair(const uint8_t* step, int i) {
  if constexpr (BITS == 4) {
    const __m256i raw = load256(step + 32 * i), low = _mm256_set1_epi8(15);
    return {_mm256_and_si256(raw, low), _mm256_and_si256(_mm256_srli_epi16(raw, 4), low)};
  } else if constexpr (BITS == 3) {
    // Twelve bytes per group. They lie in the first twelve of their half or, where the load begins earlier, in the last
    // ones: the first load may not begin earlier, the last one not end later.
    const __m256i raw = i == 0   ? _mm256_inserti128_si256(_mm256_castsi128_si256(load128(step)), load128(step + 12), 1)
                        : i == 3 ? _mm256_inserti128_si256(_mm256_castsi128_si256(load128(step + 68)), load128(step + 80), 1)
                                 : load256(step + 24 * i - 4);
    // Four codes are twelve bits. To the top of 16 bits: from an odd byte they are there, from an even one times 16.
    const __m128i first = _mm_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11);
    const __m128i last = _mm_add_epi8(first, _mm_set1_epi8(4));
    const __m256i order = _mm256_set_m128i(i == 3 ? last : first, i == 0 ? first : last);
    const __m256i top = _mm256_mullo_epi16(_mm256_shuffle_epi8(raw, order), _mm256_set1_epi32(0x00010010));
    // Two codes at the bottom of each byte.
    const __m256i high = _mm256_set1_epi16(static_cast<int16_t>(0xFF00)), mask = _mm256_set1_epi8(7);
    const __m256i twos = _mm256_blendv_epi8(_mm256_srli_epi16(top, 4), _mm256_srli_epi16(top, 2), high);
    return {_mm256_and_si256(twos, mask), _mm256_and_si256(_mm256_srli_epi16(twos, 3), mask)};
  } else {
    static_assert(BITS == 2);
    const __m256i bytes = _mm256_cvtepu8_epi16(load128(step + 16 * i)), mask = _mm256_set1_epi8(3);
    const __m256i twos = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
    return {_mm256_and_si256(twos, mask), _mm256_and_si256(_mm256_srli_epi16(twos, 2), mask)};
  }
}

// Codes of BITS bits in panels (see expand_words): 64 columns per vector, as int4 stores them.
template <int BITS>
struct NarrowCodes {
  static constexpr int kColumns = 256;
  static constexpr int kBytes = kColumns * BITS / 8;
  static constexpr int kVectors = 4;
  static inline __attribute__((always_inline)) void expand(const uint8_t* codes, __m256i* nibbles) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const CodePair pair = code_pair<BITS>(codes, i);
      nibbles[i] = _mm256_or_si256(pair.even, _mm256_slli_epi16(pair.odd, 4));
    }
  }
};

}  // namespace
