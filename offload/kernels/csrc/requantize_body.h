// The encoder, in vectors whose lanes are different groups of one row: every sum over a group is then an ordinary sum
// of vectors, taken in the order of the torch reference (offload/quant/grouped.py: the upper half is added to the lower
// half until one value is left). Each arithmetic step is one fp32 operation, so all instruction sets and the reference
// give the same bytes. Included once per instruction set, with EP_LANES defined.
#include <cfloat>
#include <cstdlib>
#include <cstring>

#include "requantize.h"

namespace ep {
namespace {

constexpr int kLanes = EP_LANES;
typedef float vf __attribute__((vector_size(4 * EP_LANES), aligned(4 * EP_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * EP_LANES), aligned(4 * EP_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * EP_LANES), aligned(4 * EP_LANES)));
typedef float vf_any __attribute__((vector_size(4 * EP_LANES), aligned(4)));
typedef uint8_t vb __attribute__((vector_size(EP_LANES), aligned(1)));
typedef uint16_t vh __attribute__((vector_size(2 * EP_LANES), aligned(2)));

#define EP_INLINE inline __attribute__((always_inline))
#define EP_INLINE_LAMBDA __attribute__((always_inline))

EP_INLINE vf splat(float x) { return x - vf{}; }
EP_INLINE vf bits_to_float(vu x) { return (vf)x; }
EP_INLINE vu float_to_bits(vf x) { return (vu)x; }
EP_INLINE vf abs(vf x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }
// The second operand where one is NaN, as x86's instructions have it; GCC does not find them by itself.
#ifdef EP_MAX
EP_INLINE vf max(vf a, vf b) { return (vf)EP_MAX(a, b); }
EP_INLINE vf min(vf a, vf b) { return (vf)EP_MIN(a, b); }
#else
EP_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
EP_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
#endif

// To the nearest bf16, ties to even, kept as fp32. For finite numbers.
EP_INLINE vf round_bf16(vf x) {
  const vu u = float_to_bits(x);
  return bits_to_float((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
}

// 1 / scale; 0 for a zero scale and for one whose reciprocal overflows.
EP_INLINE vf inverse(vf scale) {
  const vf one = splat(1.0f), zero = splat(0.0f);
  const vf r = one / (scale > zero ? scale : one);
  const vf finite = r <= splat(FLT_MAX) ? r : zero;
  return scale > zero ? finite : zero;
}

// The integer code of x as a float: nearest, ties to even, clamped. Clamping to integers first changes nothing and
// makes the rounding below exact: adding 1.5 * 2^23 leaves no fraction bits.
template <int kBits>
EP_INLINE vf code_of(vf x, vf inv) {
  const vf magic = splat(12582912.0f);
  const vf y = min(max(x * inv, splat(-float(1 << (kBits - 1)))), splat(float((1 << (kBits - 1)) - 1)));
  return (y + magic) - magic;
}

// Sum of term(first), term(first + step), ... below kCount, halves first.
template <int kFirst, int kStep, int kCount, class Term>
EP_INLINE vf fold(const Term& term) {
  if constexpr (kStep >= kCount) {
    return term(kFirst);
  } else {
    return fold<kFirst, 2 * kStep, kCount>(term) + fold<kFirst + kStep, 2 * kStep, kCount>(term);
  }
}

// The two sums of a least-squares fit, taken in the same order as fold: both terms of a weight come from one code, and
// nothing but the partial sums of the tree is kept, in registers.
struct Fit {
  vf num, den;
};

template <int kFirst, int kStep, int kCount, class Term>
EP_INLINE Fit fold_fit(const Term& term) {
  if constexpr (kStep >= kCount) {
    return term(kFirst);
  } else {
    const Fit a = fold_fit<kFirst, 2 * kStep, kCount>(term);
    const Fit b = fold_fit<kFirst + kStep, 2 * kStep, kCount>(term);
    return {a.num + b.num, a.den + b.den};
  }
}

// Least-squares search: several starting scales, each refined for its own codes; the best one wins.
template <int kBits, int kGroup, bool kWeighted>
EP_INLINE vf search(const vf* x, const vf* h, vf start) {
  const float shrink[] = {1.0f, 0.93f, 0.86f, 0.79f, 0.72f};
  vf best_scale = start, best_error = splat(__builtin_inff());
  for (float factor : shrink) {
    const vf trial = inverse(start * splat(factor));
    const Fit fit = fold_fit<0, 1, kGroup>([&](int k) EP_INLINE_LAMBDA {
      const vf code = code_of<kBits>(x[k], trial);
      const vf weighted = kWeighted ? code * h[k] : code;
      return Fit{weighted * x[k], weighted * code};
    });
    const vf scale = round_bf16(fit.num / max(fit.den, splat(1e-30f)));
    const vf inv = inverse(scale);
    const vf error = fold<0, 1, kGroup>([&](int k) EP_INLINE_LAMBDA {
      const vf d = x[k] - code_of<kBits>(x[k], inv) * scale;
      return kWeighted ? d * d * h[k] : d * d;
    });
    best_scale = error < best_error ? scale : best_scale;
    best_error = error < best_error ? error : best_error;
  }
  return best_scale;
}

// One row in fp32, from any source type. Returns false when a value is NaN or infinite.
EP_INLINE bool decode_row(const RequantizeCall& call, int64_t row, float* out) {
  const int64_t cols = call.cols;
  vi bad = {};
  int64_t j = 0;
  bool ok = true;
  if (call.source == RequantizeSource::kFp8) {
    const uint8_t* w = static_cast<const uint8_t*>(call.weight) + row * cols;
    const int64_t blocks = (cols + call.block_cols - 1) / call.block_cols;
    const float* scale = call.scale + row / call.block_rows * blocks;
    const vf lift = splat(0x1p120f);  // from the exponent bias of fp32 to that of e4m3
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t end = (block + 1) * call.block_cols < cols ? (block + 1) * call.block_cols : cols;
      const vf s = splat(scale[block]);
      for (; j + kLanes <= end; j += kLanes) {
        const vu u = __builtin_convertvector(*reinterpret_cast<const vb*>(w + j), vu);
        const vf q = bits_to_float(((u & 0x80u) << 24) | ((u & 0x7fu) << 20)) * lift;
        const vf x = q * s;
        bad |= (vi)((u & 0x7fu) == 0x7fu) | ~(vi)(abs(x) <= splat(FLT_MAX));
        *reinterpret_cast<vf_any*>(out + j) = x;
      }
      for (; j < end; ++j) {
        const uint32_t u = w[j];
        const uint32_t bits = ((u & 0x80u) << 24) | ((u & 0x7fu) << 20);
        float q;
        std::memcpy(&q, &bits, 4);
        out[j] = q * 0x1p120f * scale[block];
        ok &= (u & 0x7fu) != 0x7fu && __builtin_fabsf(out[j]) <= FLT_MAX;
      }
    }
  } else if (call.source == RequantizeSource::kBf16) {
    const uint16_t* w = static_cast<const uint16_t*>(call.weight) + row * cols;
    for (; j + kLanes <= cols; j += kLanes) {
      const vf x = bits_to_float(__builtin_convertvector(*reinterpret_cast<const vh*>(w + j), vu) << 16);
      bad |= ~(vi)(abs(x) <= splat(FLT_MAX));
      *reinterpret_cast<vf_any*>(out + j) = x;
    }
    for (; j < cols; ++j) {
      const uint32_t bits = static_cast<uint32_t>(w[j]) << 16;
      std::memcpy(out + j, &bits, 4);
      ok &= __builtin_fabsf(out[j]) <= FLT_MAX;
    }
  } else {
    std::memcpy(out, static_cast<const float*>(call.weight) + row * cols, cols * 4);
    for (; j < cols; ++j) ok &= __builtin_fabsf(out[j]) <= FLT_MAX;
  }
  for (int lane = 0; lane < kLanes; ++lane) ok &= bad[lane] == 0;
  return ok;
}

// x[k][lane] = in[lane * stride + k] for k < count.
EP_INLINE void transpose(const float* in, int64_t stride, int count, vf* x) {
  EP_TRANSPOSE(in, stride, count, x)
}

template <int kBits, int kGroup>
bool encode(const RequantizeCall& call) {
  constexpr int kWords = kGroup * kBits / 32, kOffset = 1 << (kBits - 1);
  constexpr int kSums = kGroup / 32;
  const int64_t groups = (call.cols + kGroup - 1) / kGroup;
  const int64_t batches = (groups + kLanes - 1) / kLanes;
  const int64_t words = (call.cols * kBits + 31) / 32, sums = (call.cols + 31) / 32;
  const int64_t padded = batches * kLanes * kGroup;
  float* row_values = static_cast<float*>(std::calloc(padded * (call.importance ? 2 : 1), sizeof(float)));
  if (!row_values) return false;
  float* weights = call.importance ? row_values + padded : nullptr;
  if (weights) std::memcpy(weights, call.importance, call.cols * sizeof(float));
  bool ok = true;
  vf x[kGroup], h[kGroup];
  for (int64_t row = 0; row < call.rows && ok; ++row) {
    ok = decode_row(call, row, row_values);
    for (int64_t batch = 0; batch < batches; ++batch) {
      const int64_t first = batch * kLanes;
      transpose(row_values + first * kGroup, kGroup, kGroup, x);
      if (weights) transpose(weights + first * kGroup, kGroup, kGroup, h);
      vf amax = abs(x[0]);
      for (int k = 1; k < kGroup; ++k) amax = max(amax, abs(x[k]));
      vf scale = amax / splat(float(kOffset) - 0.5f);
      if (call.search) scale = weights ? search<kBits, kGroup, true>(x, h, scale) : search<kBits, kGroup, false>(x, h, scale);
      scale = round_bf16(scale);
      const vf inv = inverse(scale);

      vu word[kWords];
      vf error[kGroup];
      const auto take = [&](int k) EP_INLINE_LAMBDA {
        const vf code = code_of<kBits>(x[k], inv);
        const vf d = code * scale - x[k];
        error[k] = d * d;
        return (vu)(__builtin_convertvector(code, vi) + kOffset);
      };
      if constexpr (32 % kBits == 0) {
        constexpr int kPerWord = 32 / kBits;
        for (int w = 0; w < kWords; ++w) {
          word[w] = vu{};
          for (int i = 0; i < kPerWord; ++i) word[w] |= take(w * kPerWord + i) << (kBits * i);
        }
      } else {  // codes may lie across two words
        for (int w = 0; w < kWords; ++w) word[w] = vu{};
        for (int k = 0; k < kGroup; ++k) {
          const vu code = take(k);
          const int w = k * kBits / 32, shift = k * kBits % 32;
          word[w] |= code << shift;
          if (shift + kBits > 32) word[w + 1] |= code >> (32 - shift);
        }
      }
      vf lost[kSums], power[kSums];
      if (call.error) {
        for (int s = 0; s < kSums; ++s) {
          const vf *e = error + 32 * s, *v = x + 32 * s;
          lost[s] = fold<0, 1, 32>([&](int k) EP_INLINE_LAMBDA { return e[k]; });
          power[s] = fold<0, 1, 32>([&](int k) EP_INLINE_LAMBDA { return v[k] * v[k]; });
        }
      }
      const int lanes = groups - first < kLanes ? static_cast<int>(groups - first) : kLanes;
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t group = first + lane;
        uint32_t* out = call.packed + row * words + group * kWords;
        const int64_t left = call.cols - group * kGroup;  // columns from here to the end of the row
        if (left >= kGroup) {
          for (int w = 0; w < kWords; ++w) out[w] = word[w][lane];
        } else {
          for (int64_t w = 0; w * 32 < left * kBits; ++w) {
            const int64_t bits = left * kBits - w * 32;  // beyond the last column the bits are zero
            out[w] = word[w][lane] & (bits >= 32 ? 0xffffffffu : (1u << bits) - 1u);
          }
        }
        const vu bits = float_to_bits(scale);
        call.out_scale[row * groups + group] = static_cast<uint16_t>(bits[lane] >> 16);
        if (call.error) {
          for (int s = 0; s < kSums && group * kSums + s < sums; ++s) {
            call.error[row * sums + group * kSums + s] = lost[s][lane];
            call.power[row * sums + group * kSums + s] = power[s][lane];
          }
        }
      }
    }
  }
  std::free(row_values);
  return ok;
}

EP_INLINE bool dispatch(const RequantizeCall& call, int bits, int group) {
  if (bits == 4 && group == 32) return encode<4, 32>(call);
  if (bits == 4 && group == 64) return encode<4, 64>(call);
  if (bits == 4 && group == 128) return encode<4, 128>(call);
  if (bits == 8 && group == 32) return encode<8, 32>(call);
  if (bits == 3 && group == 32) return encode<3, 32>(call);
  if (bits == 3 && group == 64) return encode<3, 64>(call);
  if (bits == 3 && group == 128) return encode<3, 128>(call);
  if (bits == 2 && group == 32) return encode<2, 32>(call);
  if (bits == 2 && group == 64) return encode<2, 64>(call);
  if (bits == 2 && group == 128) return encode<2, 128>(call);
  if (bits == 8 && group == 64) return encode<8, 64>(call);
  return encode<8, 128>(call);
}

}  // namespace
}  // namespace ep
