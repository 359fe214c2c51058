// The grouped-integer encoder for AVX-512: sixteen groups at a time. FMA stays off: every product is rounded.
#include "requantize.h"

#if EP_REQUANTIZE_X86
#include <immintrin.h>
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl")

#define EP_LANES 16
#define EP_MAX(a, b) _mm512_max_ps((__m512)(a), (__m512)(b))
#define EP_MAX_INT(a, b) _mm512_max_epi32((__m512i)(a), (__m512i)(b))
#define EP_MIN_INT(a, b) _mm512_min_epi32((__m512i)(a), (__m512i)(b))
#define EP_FROM_HALF(x) _mm512_cvtph_ps((__m256i)(x))
#define EP_WIDEN_8(x) _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))
#define EP_WIDEN_16(x) _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))
#define EP_TRANSPOSE(in, stride, count, x) \
  for (int k = 0; k < (count); k += 8) columns_8x16((in) + k, (stride), reinterpret_cast<__m512i*>((x) + k));

#include "transpose_x86.h"

namespace {

// out[k] = column k of sixteen rows.
inline __attribute__((always_inline)) void columns_8x16(const float* in, int64_t stride, __m512i* out) {
  __m256i low[8], high[8];
  columns_8x8(in, stride, low);
  columns_8x8(in + 8 * stride, stride, high);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) out[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low[i]), high[i], 1);
}

}  // namespace

#include "requantize_body.h"

namespace ep {
bool requantize_avx512(const RequantizeCall& call, int bits, int group) { return dispatch(call, bits, group); }
}  // namespace ep
#endif
