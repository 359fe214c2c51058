// Sixteen float lanes and the integer dot products, in plain C++: runs on any processor.
//
// This file also defines the arithmetic every other instruction set must reproduce bit for bit:
// which lane a term goes to, one rounding per fma, the order of the final sums. Include it (or one
// of its siblings) inside a translation unit and then kernels.h; everything is in an anonymous
// namespace, so each unit gets its own copy.
#pragma once
#include "formats.h"

namespace {

constexpr int kInt8ActBytes = 1;  // bytes of one activation code of the int8 formats
constexpr bool kInt8Deinterleave = false;
constexpr int kDotRows = 2, kDotTokens = 3;  // of a tile of dot products
constexpr int kValueVectors = 1;             // of every weighted sum of values that are kept in registers
constexpr int kAddColumns = 64;                  // of a sum of rows that is kept in registers
#define EP_PANELS 0  // see kernels.h

struct F {
  float v[16];
};

#define EP_LANES(expr)                    \
  F r;                                    \
  for (int i = 0; i < 16; ++i) r.v[i] = (expr); \
  return r
inline F f_zero() { EP_LANES(0.0f); }
inline F f_set1(float x) { EP_LANES(x); }
inline F f_load(const float* p) { EP_LANES(p[i]); }
inline void f_store(float* p, F x) { std::memcpy(p, x.v, sizeof(x.v)); }
inline F f_add(F a, F b) { EP_LANES(a.v[i] + b.v[i]); }
inline F f_sub(F a, F b) { EP_LANES(a.v[i] - b.v[i]); }
inline F f_mul(F a, F b) { EP_LANES(a.v[i] * b.v[i]); }
inline F f_div(F a, F b) { EP_LANES(a.v[i] / b.v[i]); }
inline F f_fma(F a, F b, F c) { EP_LANES(std::fma(a.v[i], b.v[i], c.v[i])); }
// The second operand wins when either is NaN, as in x86's maxps and minps.
inline F f_max(F a, F b) { EP_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F f_min(F a, F b) { EP_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F f_abs(F a) { EP_LANES(std::fabs(a.v[i])); }
inline F f_rint(F a) { EP_LANES(std::nearbyint(a.v[i])); }
// 2^n for integral lanes in [-126, 127].
inline F f_pow2(F n) { EP_LANES(bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23)); }
inline F f_from_bf16(const uint16_t* p) { EP_LANES(bf16_to_float(p[i])); }
inline F f_from_e4m3(const uint8_t* p) { EP_LANES(e4m3_to_float(p[i])); }
inline F f_from_u8(const uint8_t* p) { EP_LANES(static_cast<float>(p[i])); }
// Sixteen codes of BITS bits (2 to 4) from 2 * BITS bytes, lowest bits first.
template <int BITS>
inline F f_from_bits(const uint8_t* p) { EP_LANES(static_cast<float>(bits_at(p, i * BITS, BITS))); }
// The same without the offset that the codes are stored with.
template <int BITS>
inline F f_centered(const uint8_t* p) { EP_LANES(static_cast<float>(bits_at(p, i * BITS, BITS) - (1 << (BITS - 1)))); }
// Codes of four bits in the order in which they come cheapest: here that of the columns.
inline F f_centered_in_turn(const uint8_t* p) { return f_centered<4>(p); }
inline F f_to_turn(F x) { return x; }
inline F f_from_turn(F x) { return x; }
// Sixteen NF4 values from 8 bytes, high nibble first.
inline F f_from_nf4(const uint8_t* p) { EP_LANES(kNf4[i % 2 == 0 ? p[i / 2] >> 4 : p[i / 2] & 15]); }
inline F f_from_i32(const int32_t* p) { EP_LANES(static_cast<float>(p[i])); }
// Integral lanes in [-127, 127] to bytes.
inline void f_store_i8(int8_t* p, F x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x.v[i]);
}
#undef EP_LANES
inline float f_most(F x) {  // no lane is NaN
  float most = x.v[0];
  for (int i = 1; i < 16; ++i) most = x.v[i] > most ? x.v[i] : most;
  return most;
}
inline float f_sum(F a) {
  float t[8];
  for (int i = 0; i < 8; ++i) t[i] = a.v[i] + a.v[i + 8];
  for (int i = 0; i < 4; ++i) t[i] = t[i] + t[i + 4];
  return (t[0] + t[2]) + (t[1] + t[3]);
}
// The sums of four at once.
inline void f_sum4(F x, F y, F z, F w, float* out) {
  out[0] = f_sum(x);
  out[1] = f_sum(y);
  out[2] = f_sum(z);
  out[3] = f_sum(w);
}
// The largest lanes of four at once, none of which is negative.
inline void f_amax4(F x, F y, F z, F w, float* out) {
  const F* const each[] = {&x, &y, &z, &w};
  for (int k = 0; k < 4; ++k) {
    out[k] = 0.0f;
    for (const float lane : each[k]->v) out[k] = lane > out[k] ? lane : out[k];
  }
}

// Eight lanes: the accumulator of the integer formats, lane = group index modulo 8.
struct Acc {
  float v[8];
};
inline float acc_sum(Acc a) {
  float t[4];
  for (int i = 0; i < 4; ++i) t[i] = a.v[i] + a.v[i + 4];
  return (t[0] + t[2]) + (t[1] + t[3]);
}

// One step of an integer format: kGroups groups of one weight row against MT activation records.
template <int BITS, int G>
struct IntFormat : GroupedTraits<BITS, G> {
  using Traits = GroupedTraits<BITS, G>;
  static constexpr int kGroups = 8;
  static constexpr int kPhases = (BITS <= 4 && G == 32) ? 2 : 1;
  static constexpr int kWeightBytes = kGroups * G * BITS / 8;
  static constexpr int kCodeBytes = kGroups * G;
  static constexpr int kRecordBytes = kCodeBytes + kGroups * 8;
  using Accumulator = Acc;

  static Acc zero() { return Acc{{0, 0, 0, 0, 0, 0, 0, 0}}; }
  static constexpr int lane_of_group(int g) { return g; }

  template <int MT>
  static inline void step(Acc* acc, const uint8_t* w, const uint8_t* ws, const uint8_t* const* rec) {
    part<MT>(acc, w, ws, rec, kGroups);
  }

  static constexpr bool kTurns = false;
  // The first `groups` groups of a step.
  static constexpr bool kParts = true;
  static constexpr int kPartGroups = 1;
  static constexpr bool kPartScales = false;
  template <int MT>
  static inline void part(Acc* acc, const uint8_t* w, const uint8_t* ws, const uint8_t* const* rec, int groups) {
    for (int m = 0; m < MT; ++m) {
      const int8_t* q = reinterpret_cast<const int8_t*>(rec[m]);
      const float* as = reinterpret_cast<const float*>(rec[m] + kCodeBytes);
      const int32_t* corr = reinterpret_cast<const int32_t*>(rec[m] + kCodeBytes + kGroups * 4);
      for (int g = 0; g < groups; ++g) {
        const int32_t d = dot(w, q, g) + corr[g];
        acc[m].v[g] = std::fma(static_cast<float>(d), Traits::scale(ws + g * Traits::kScaleBytes) * as[g], acc[m].v[g]);
      }
    }
  }

  static float finish(const Acc* acc) {
    if constexpr (kPhases == 2) {
      Acc t;
      for (int i = 0; i < 8; ++i) t.v[i] = acc[0].v[i] + acc[1].v[i];
      return acc_sum(t);
    }
    return acc_sum(acc[0]);
  }

 private:
  static inline int32_t dot(const uint8_t* w, const int8_t* q, int g) {
    int32_t d = 0;
    if constexpr (BITS < 4) {
      const int8_t* even = q + g / 4 * 128 + g % 4 * 16;  // as those of four bits, below
      for (int i = 0; i < 4; ++i) {
        int64_t octet = 0;
        for (int b = 0; b < BITS; ++b) octet |= static_cast<int64_t>(w[(4 * g + i) * BITS + b]) << (8 * b);
        for (int k = 0; k < 4; ++k, octet >>= 2 * BITS) {
          d += static_cast<int32_t>(octet & ((1 << BITS) - 1)) * even[4 * i + k];
          d += static_cast<int32_t>(octet >> BITS & ((1 << BITS) - 1)) * even[4 * i + k + 64];
        }
      }
    } else if constexpr (BITS == 4) {
      // Codes of 128 columns lie as 64 even columns, then 64 odd ones.
      const int first = g * (G / 2);
      for (int b = first; b < first + G / 2; b += 16) {
        const int8_t* even = q + (b / 64) * 128 + b % 64;
        for (int i = 0; i < 16; ++i) d += (w[b + i] & 15) * even[i] + (w[b + i] >> 4) * even[i + 64];
      }
    } else {
      for (int i = g * G; i < (g + 1) * G; ++i) d += w[i] * q[i];
    }
    return d;
  }
};

struct Nf4Format : Nf4Traits {
  static constexpr int kGroups = 8;
  static constexpr int kPhases = 1;
  static constexpr int kWeightBytes = kGroups * kGroup / 2;
  static constexpr int kCodeBytes = kGroups * kGroup;
  static constexpr int kRecordBytes = kCodeBytes + kGroups * 8;
  static constexpr bool kTurns = false;
  static constexpr bool kParts = true;
  static constexpr int kPartGroups = 1;
  static constexpr bool kPartScales = false;
  using Accumulator = Acc;

  static Acc zero() { return Acc{}; }
  static constexpr int lane_of_group(int g) { return g; }
  static float finish(const Acc* acc) { return acc_sum(acc[0]); }
  static void place(const int8_t* codes, uint8_t* out) { std::memcpy(out, codes, kCodeBytes); }

  template <int MT>
  static inline void step(Acc* acc, const uint8_t* w, const uint8_t* ws, const uint8_t* const* rec) {
    part<MT>(acc, w, ws, rec, kGroups);
  }
  template <int MT>
  static inline void part(Acc* acc, const uint8_t* w, const uint8_t* ws, const uint8_t* const* rec, int groups) {
    for (int m = 0; m < MT; ++m) {
      const int8_t* q = reinterpret_cast<const int8_t*>(rec[m]);
      const float* as = reinterpret_cast<const float*>(rec[m] + kCodeBytes);
      for (int g = 0; g < groups; ++g) {
        int16_t values[kGroup];
        for (int i = 0; i < kGroup / 2; ++i) {
          const uint8_t pair = w[g * kGroup / 2 + i];
          values[2 * i] = kNf4Units.value[pair >> 4];
          values[2 * i + 1] = kNf4Units.value[pair & 15];
        }
        int32_t d = 0;
        for (int i = 0; i < kGroup; ++i) d += values[i] * q[g * kGroup + i];
        acc[m].v[g] = std::fma(static_cast<float>(d), scale(ws + g * kScaleBytes) * as[g], acc[m].v[g]);
      }
    }
  }
};

inline bool has_e4m3_nan(const uint8_t* p, int64_t n) {
  bool found = false;
  for (int64_t i = 0; i < n; ++i) found |= (p[i] & 0x7F) == 0x7F;
  return found;
}

}  // namespace
