// The grouped-integer encoder for AVX2. FMA stays off: every product is rounded.
#include "requantize.h"

#if EP_REQUANTIZE_X86
#include <immintrin.h>
#pragma GCC target("avx2,f16c")

#define EP_LANES 8
#define EP_MAX(a, b) _mm256_max_ps((__m256)(a), (__m256)(b))
#define EP_MAX_INT(a, b) _mm256_max_epi32((__m256i)(a), (__m256i)(b))
#define EP_MIN_INT(a, b) _mm256_min_epi32((__m256i)(a), (__m256i)(b))
#define EP_FROM_HALF(x) _mm256_cvtph_ps((__m128i)(x))
#define EP_WIDEN_8(x) _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)))
#define EP_WIDEN_16(x) _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))
#define EP_TRANSPOSE(in, stride, count, x) \
  for (int k = 0; k < (count); k += 8) columns_8x8((in) + k, (stride), reinterpret_cast<__m256i*>((x) + k));

#include "transpose_x86.h"
#include "requantize_body.h"

namespace ep {
bool requantize_avx2(const RequantizeCall& call, int bits, int group) { return dispatch(call, bits, group); }
}  // namespace ep
#endif
