// Loads and sums of 256-bit registers that every x86 unit uses. Include after a target pragma that has AVX2.
#pragma once
#include <immintrin.h>

#include "common.h"

namespace {

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256 bf16_lanes(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline float sum8(__m256 x) {
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
// The sums of four, each in the order of sum8.
inline __m128 sums8(__m256 x, __m256 y, __m256 z, __m256 w) {
  const __m128 a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1));
  const __m128 d = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
  const __m128 ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
  const __m128 cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
  return _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xDD));
}
// The largest lanes of four.
inline __m128 most8(__m256 x, __m256 y, __m256 z, __m256 w) {
  const __m128 a = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  const __m128 c = _mm_max_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1));
  const __m128 d = _mm_max_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
  const __m128 ab = _mm_max_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
  const __m128 cd = _mm_max_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
  return _mm_max_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xDD));
}
inline __m256i pair32(__m256i x, __m256i y) {
  return _mm256_add_epi32(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
}
inline __m256i pair64(__m256i x, __m256i y) {
  return _mm256_add_epi32(_mm256_unpacklo_epi64(x, y), _mm256_unpackhi_epi64(x, y));
}
// Totals of eight vectors of eight 32-bit lanes, in order.
inline __m256i totals(const __m256i* v) {
  const __m256i x = pair64(pair32(v[0], v[1]), pair32(v[2], v[3]));
  const __m256i y = pair64(pair32(v[4], v[5]), pair32(v[6], v[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(x, y, 0x20), _mm256_permute2x128_si256(x, y, 0x31));
}
// d * (ws * as) added to acc, for eight groups whose sums are `sums`; `scales`: as and the corrections of d.
inline __m256 accumulate(__m256 acc, __m256i sums, __m256 ws, const uint8_t* scales) {
  const __m256 as = _mm256_loadu_ps(reinterpret_cast<const float*>(scales));
  const __m256 d = _mm256_cvtepi32_ps(_mm256_add_epi32(sums, load256(scales + 32)));
  return _mm256_fmadd_ps(d, _mm256_mul_ps(ws, as), acc);
}

}  // namespace
