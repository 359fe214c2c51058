// Scalar conversions and the shapes shared by every instruction set. Must not use intrinsics.
//
// Standard headers are included here, before any unit switches its target, so that their inline
// functions are never compiled for a processor the library may not be running on.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

inline float bits_to_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
// Element i of an array that may lie at any address.
template <class T>
inline T element(const void* p, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(p) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}
inline uint32_t float_to_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}
inline float bf16_to_float(uint16_t b) { return bits_to_float(static_cast<uint32_t>(b) << 16); }
inline bool is_finite(float f) { return (float_to_bits(f) & 0x7F800000u) != 0x7F800000u; }
// The values of e4m3 codes; NaN codes give 480. No way to them leads over subnormal floats, which take some processors
// hundreds of cycles.
struct E4m3 {
  float value[256];
  constexpr E4m3() : value() {
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15, fraction = code & 7;
      float magnitude = static_cast<float>(exponent == 0 ? fraction : 8 + fraction) / 512.0f;
      for (int i = 1; i < exponent; ++i) magnitude *= 2.0f;
      value[code] = code < 128 ? magnitude : -magnitude;
    }
  }
};
alignas(64) constexpr E4m3 kE4m3;
inline float e4m3_to_float(uint8_t code) { return kE4m3.value[code]; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// The `bits` bits from bit `at` on of a stream whose lowest bit comes first; no byte behind them is read.
inline int bits_at(const uint8_t* p, int64_t at, int bits) {
  const int shift = static_cast<int>(at % 8);
  int value = p[at / 8] >> shift;
  if (shift + bits > 8) value |= p[at / 8 + 1] << (8 - shift);
  return value & ((1 << bits) - 1);
}

// The values of NF4 codes, as fractions of their block's largest magnitude.
alignas(64) constexpr float kNf4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

constexpr float kQuietNan = __builtin_nanf("");

}  // namespace
