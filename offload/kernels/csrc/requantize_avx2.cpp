// The grouped-integer encoder for AVX2. FMA stays off: every product is rounded.
#include "requantize.h"

#if EP_REQUANTIZE_X86
#include <immintrin.h>
#pragma GCC target("avx2")

#define EP_LANES 8
#define EP_MAX(a, b) _mm256_max_ps((__m256)(a), (__m256)(b))
#define EP_MAX_INT(a, b) _mm256_max_epi32((__m256i)(a), (__m256i)(b))
#define EP_MIN_INT(a, b) _mm256_min_epi32((__m256i)(a), (__m256i)(b))
#define EP_WIDEN_8(x) _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)))
#define EP_WIDEN_16(x) _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))
#define EP_TRANSPOSE(in, stride, count, x) \
  for (int k = 0; k < (count); k += 8) transpose8((in) + k, (stride), reinterpret_cast<__m256*>((x) + k));

namespace {

inline __attribute__((always_inline)) void transpose8(const float* in, int64_t stride, __m256* out) {
  __m256 r[8], s[8];
  // Unrolled, or the arrays stay in memory.
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
}

}  // namespace

#include "requantize_body.h"

namespace ep {
bool requantize_avx2(const RequantizeCall& call, int bits, int group) { return dispatch(call, bits, group); }
}  // namespace ep
#endif
