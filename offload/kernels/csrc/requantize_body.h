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
typedef uint16_t vh __attribute__((vector_size(2 * EP_LANES), aligned(2)));

#define EP_INLINE inline __attribute__((always_inline))
#define EP_INLINE_LAMBDA __attribute__((always_inline))

EP_INLINE vf splat(float x) { return x - vf{}; }
EP_INLINE vf bits_to_float(vu x) { return (vf)x; }
EP_INLINE vu float_to_bits(vf x) { return (vu)x; }
EP_INLINE vf abs(vf x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }
// The second operand where one is NaN, as x86's instructions have it; GCC does not find them by itself, nor those that
// widen bytes.
#ifdef EP_MAX
EP_INLINE vf max(vf a, vf b) { return (vf)EP_MAX(a, b); }
EP_INLINE vi max(vi a, vi b) { return (vi)EP_MAX_INT(a, b); }
EP_INLINE vi min(vi a, vi b) { return (vi)EP_MIN_INT(a, b); }
EP_INLINE vi widen(const uint16_t* x) { return (vi)EP_WIDEN_16(x); }
// By way of fp16, whose exponents have a bias that is 8 larger: its subnormals are converted at full speed.
EP_INLINE vf from_e4m3(const uint8_t* x) {
  const vh half = ((vh)EP_WIDEN_8(x) << 7) & static_cast<uint16_t>(0xbf80);
  return (vf)EP_FROM_HALF(half) * 256.0f;
}
#else
EP_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
EP_INLINE vi max(vi a, vi b) { return a > b ? a : b; }
EP_INLINE vi min(vi a, vi b) { return a < b ? a : b; }
EP_INLINE vi widen(const uint16_t* x) { return __builtin_convertvector(*reinterpret_cast<const vh*>(x), vi); }
EP_INLINE vf from_e4m3(const uint8_t* x) {
  vf values;
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = e4m3_to_float(x[lane]);
  return values;
}
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

// Adding 1.5 * 2^23 leaves no fraction bits: the sum's last bits are the nearest integer, ties to even.
constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4b400000;

// The integer code of x, nearest and clamped, as kMagicBits + code. Floats of one sign are in the order of their bits,
// and a negative sum has the sign bit: whatever the product, even an infinite one, the integer clamp does what a clamp
// before the rounding would.
template <int kBits>
EP_INLINE vi code_of(vf x, vf inv) {
  constexpr int32_t kHalf = 1 << (kBits - 1);
  return min(max((vi)(x * inv + splat(kMagic)), vi{} + (kMagicBits - kHalf)), vi{} + (kMagicBits + kHalf - 1));
}

EP_INLINE vf code_value(vi code) { return (vf)code - splat(kMagic); }

// Sum of term(first), term(first + step), ... below kCount, halves first.
template <int kFirst, int kStep, int kCount, class Term>
EP_INLINE vf fold(const Term& term) {
  if constexpr (kStep >= kCount) {
    return term(kFirst);
  } else {
    return fold<kFirst, 2 * kStep, kCount>(term) + fold<kFirst + kStep, 2 * kStep, kCount>(term);
  }
}

// Least-squares search: several starting scales, each refined for its own codes; the best one wins. All fits are made
// before all errors: only so are there always independent instructions while a sum's last additions and the divisions
// that follow are waited for.
template <int kBits, int kGroup>
EP_INLINE vf search(const vf* x, vf start) {
  constexpr int kTrials = 5;
  const float shrink[kTrials] = {1.0f, 0.93f, 0.86f, 0.79f, 0.72f};
  vf scale[kTrials], error[kTrials];
  for (int trial = 0; trial < kTrials; ++trial) scale[trial] = inverse(start * splat(shrink[trial]));
  for (int trial = 0; trial < kTrials; ++trial) {
    const vf inv = scale[trial];
    vf squares[4] = {};  // integers below 2^24: exact in any order
    const vf num = fold<0, 1, kGroup>([&](int k) EP_INLINE_LAMBDA {
      const vf code = code_value(code_of<kBits>(x[k], inv));
      squares[k & 3] += code * code;
      return code * x[k];
    });
    const vf den = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    scale[trial] = round_bf16(num / max(den, splat(1e-30f)));
  }
  for (int trial = 0; trial < kTrials; ++trial) {
    const vf inv = inverse(scale[trial]), s = scale[trial];
    error[trial] = fold<0, 1, kGroup>([&](int k) EP_INLINE_LAMBDA {
      const vf d = x[k] - code_value(code_of<kBits>(x[k], inv)) * s;
      return d * d;
    });
  }
  vf best_scale = start, best_error = splat(__builtin_inff());
  for (int trial = 0; trial < kTrials; ++trial) {
    best_scale = error[trial] < best_error ? scale[trial] : best_scale;
    best_error = error[trial] < best_error ? error[trial] : best_error;
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
    const float* scales = call.scale + row / call.block_rows * blocks;
    uint8_t top = 0;
    for (int64_t k = 0; k < cols; ++k) {
      const uint8_t magnitude = w[k] & 0x7f;
      top = magnitude > top ? magnitude : top;
    }
    ok = top < 0x7f;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t end = (block + 1) * call.block_cols < cols ? (block + 1) * call.block_cols : cols, begin = j;
      const float scale = scales[block];
      for (; j + kLanes <= end; j += kLanes) *reinterpret_cast<vf_any*>(out + j) = from_e4m3(w + j) * scale;
      for (; j < end; ++j) out[j] = e4m3_to_float(w[j]) * scale;
      if (!(__builtin_fabsf(scale) < 0x1p119f)) {  // no product of a smaller one with a code overflows
        for (int64_t k = begin; k < end; ++k) ok &= __builtin_fabsf(out[k]) <= FLT_MAX;
      }
    }
  } else if (call.source == RequantizeSource::kBf16) {
    const uint16_t* w = static_cast<const uint16_t*>(call.weight) + row * cols;
    for (; j + kLanes <= cols; j += kLanes) {
      const vf x = (vf)((vu)widen(w + j) << 16);
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

// What is too much in a word when codes as `code_of` gives them are added up in their places; none where codes may lie
// across two words.
template <int kBits>
constexpr uint32_t base_of() {
  uint32_t base = 0;
  for (int shift = 0; 32 % kBits == 0 && shift < 32; shift += kBits) base += uint32_t(kMagicBits - (1 << (kBits - 1))) << shift;
  return base;
}
template <int kBits>
constexpr uint32_t kBase = base_of<kBits>();

template <int kBits, int kGroup>
bool encode(const RequantizeCall& call) {
  constexpr int kWords = kGroup * kBits / 32, kOffset = 1 << (kBits - 1);
  constexpr int kSums = kGroup / 32;
  const int64_t groups = (call.cols + kGroup - 1) / kGroup;
  const int64_t batches = (groups + kLanes - 1) / kLanes;
  const int64_t words = (call.cols * kBits + 31) / 32, sums = (call.cols + 31) / 32;
  float* row_values = static_cast<float*>(std::calloc(batches * kLanes * kGroup, sizeof(float)));
  if (!row_values) return false;
  bool ok = true;
  vf x[kGroup];
  for (int64_t row = 0; row < call.rows && ok; ++row) {
    ok = decode_row(call, row, row_values);
    for (int64_t batch = 0; batch < batches; ++batch) {
      const int64_t first = batch * kLanes;
      transpose(row_values + first * kGroup, kGroup, kGroup, x);
      vf amax = abs(x[0]);
      for (int k = 1; k < kGroup; ++k) amax = max(amax, abs(x[k]));
      vf scale = amax / splat(float(kOffset) - 0.5f);
      if (call.search) scale = search<kBits, kGroup>(x, scale);
      scale = round_bf16(scale);
      const vf inv = inverse(scale);

      vu word[kWords];
      vf lost[kSums], power[kSums];
      for (int w = 0; w < kWords; ++w) word[w] = vu{} - kBase<kBits>;
      for (int s = 0; s < kSums; ++s) {
        vu* into = word + s * kBits;
        lost[s] = fold<0, 1, 32>([&](int k) EP_INLINE_LAMBDA {
          const vi code = code_of<kBits>(x[32 * s + k], inv);
          const int w = k * kBits / 32, shift = k * kBits % 32;
          if constexpr (32 % kBits == 0) {
            into[w] += (vu)code << shift;
          } else {  // codes may lie across two words
            const vu positive = (vu)(code - (kMagicBits - kOffset));
            into[w] |= positive << shift;
            if (shift + kBits > 32) into[w + 1] |= positive >> (32 - shift);
          }
          const vf d = code_value(code) * scale - x[32 * s + k];
          return d * d;
        });
        power[s] = fold<0, 1, 32>([&](int k) EP_INLINE_LAMBDA { return x[32 * s + k] * x[32 * s + k]; });
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
        for (int s = 0; s < kSums && group * kSums + s < sums; ++s) {
          call.error[row * sums + group * kSums + s] = lost[s][lane];
          call.power[row * sums + group * kSums + s] = power[s][lane];
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
