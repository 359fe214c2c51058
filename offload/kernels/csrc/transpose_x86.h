// Eight words of eight rows, transposed with 256-bit registers. Include after a target pragma that has AVX2.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

// Row r of 32-bit words in a[r] becomes word r of every row. Unrolled, or the arrays stay in memory.
inline __attribute__((always_inline)) void transpose_8x8(__m256i* a) {
  __m256i b[8];
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
  }
  __m256i c[8];
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4) {
    c[r] = _mm256_unpacklo_epi64(b[r], b[r + 2]);
    c[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
    c[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
    c[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    a[w] = _mm256_permute2x128_si256(c[w], c[w + 4], 0x20);
    a[w + 4] = _mm256_permute2x128_si256(c[w], c[w + 4], 0x31);
  }
}

// to[w * stride + r] = word w of row r, for 32-bit words.
inline void transpose_8x8(const uint8_t* const* rows, int64_t at, uint8_t* to, int64_t stride) {
  __m256i a[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + at));
  transpose_8x8(a);
#pragma GCC unroll 8
  for (int w = 0; w < 8; ++w) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + w * stride), a[w]);
}

// out[k] = column k of eight rows of floats, `stride` apart.
inline __attribute__((always_inline)) void columns_8x8(const float* in, int64_t stride, __m256i* out) {
  __m256i a[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + r * stride));
  transpose_8x8(a);
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) out[k] = a[k];
}

}  // namespace
