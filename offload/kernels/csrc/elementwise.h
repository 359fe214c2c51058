// Elementwise functions, norms and weighted sums of rows. Part of kernels.h.
#pragma once
#include "float_rows.h"

namespace {

// Cephes' expf: within 2 ulp on [-87, 88], clamped outside, NaN stays NaN.
inline F f_exp(F x) {
  x = f_min(f_set1(88.0f), f_max(f_set1(-87.0f), x));
  const F n = f_rint(f_mul(x, f_set1(1.44269504088896341f)));
  F r = f_fma(n, f_set1(-0.693359375f), x);
  r = f_fma(n, f_set1(2.12194440e-4f), r);
  F p = f_set1(1.9875691500e-4f);
  p = f_fma(p, r, f_set1(1.3981999507e-3f));
  p = f_fma(p, r, f_set1(8.3334519073e-3f));
  p = f_fma(p, r, f_set1(4.1665795894e-2f));
  p = f_fma(p, r, f_set1(1.6666665459e-1f));
  p = f_fma(p, r, f_set1(5.0000001201e-1f));
  p = f_fma(f_mul(r, r), p, f_add(r, f_set1(1.0f)));
  return f_mul(p, f_pow2(n));
}

// Calls body(first lanes pointer...) on blocks of sixteen, the last one through padded copies.
template <class Body>
inline void by_lanes(const float* x, const float* y, float* out, int64_t n, Body body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f_store(out + i, body(f_load(x + i), f_load(y + i)));
  if (i < n) {
    float px[16] = {}, py[16] = {}, result[16];
    const size_t bytes = static_cast<size_t>(n - i) * 4;
    std::memcpy(px, x + i, bytes);
    std::memcpy(py, y + i, bytes);
    f_store(result, body(f_load(px), f_load(py)));
    std::memcpy(out + i, result, bytes);
  }
}

// Named functors, not lambdas: compilers do not give a lambda the target of its function reliably.
struct SiluMul {
  F operator()(F g, F u) const { return f_mul(f_div(g, f_add(f_set1(1.0f), f_exp(f_sub(f_zero(), g)))), u); }
};
struct Sigmoid {
  F operator()(F x, F) const { return f_div(f_set1(1.0f), f_add(f_set1(1.0f), f_exp(f_sub(f_zero(), x)))); }
};
struct MulAdd {
  F factor;
  F operator()(F x, F y) const { return f_fma(factor, x, y); }
};
struct ScaleMul {
  F factor;
  F operator()(F x, F w) const { return f_mul(f_mul(x, factor), w); }
};

void silu_mul(const float* gate, const float* up, float* out, int64_t n) { by_lanes(gate, up, out, n, SiluMul{}); }
void sigmoid(const float* x, float* out, int64_t n) { by_lanes(x, x, out, n, Sigmoid{}); }
void axpy(float a, const float* x, float* y, int64_t n) { by_lanes(x, y, y, n, MulAdd{f_set1(a)}); }

// Lanes of the codes of a grouped integer format, without their offset.
template <int BITS>
inline F f_codes(const uint8_t* p) {
  constexpr float kOffset = static_cast<float>(1 << (BITS - 1));
  if constexpr (BITS == 8) {
    return f_sub(f_from_u8(p), f_set1(kOffset));
  } else {
    return f_sub(f_from_bits<BITS>(p), f_set1(kOffset));
  }
}

constexpr int kAddColumns = 64;

// y += sum over rows of a[r] * row r, for whole blocks of columns of a grouped integer format; returns how many
// columns these are. The scale of a group goes into the factor of its row.
template <int BITS>
inline int64_t add_grouped_rows(const ep_weight& w, int64_t first, int64_t rows, const float* a, float* y) {
  const int64_t row_bytes = packed_row_bytes(w.cols, BITS), groups = ceil_div(w.cols, w.group);
  const uint8_t* payload = reinterpret_cast<const uint8_t*>(w.payload) + first * row_bytes;
  const uint16_t* scale = reinterpret_cast<const uint16_t*>(w.scale) + first * groups;
  for (int64_t i = 0; i < rows * row_bytes; i += 64) __builtin_prefetch(payload + rows * row_bytes + i);
  int64_t c = 0;
  for (; c + kAddColumns <= w.cols; c += kAddColumns) {
    const int64_t low = c / w.group, high = (c + kAddColumns / 2) / w.group;
    F sum[4] = {f_load(y + c), f_load(y + c + 16), f_load(y + c + 32), f_load(y + c + 48)};
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* codes = payload + r * row_bytes + c * BITS / 8;
      const F first_half = f_set1(a[r] * bf16_to_float(scale[r * groups + low]));
      const F second_half = f_set1(a[r] * bf16_to_float(scale[r * groups + high]));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] = f_fma(i < 2 ? first_half : second_half, f_codes<BITS>(codes + i * 2 * BITS), sum[i]);
    }
    for (int i = 0; i < 4; ++i) f_store(y + c + 16 * i, sum[i]);
  }
  return c;
}

// y [cols] += sum over rows of a[r] * row (first + r) of w.
void add_rows(const ep_weight& w, int64_t first, int64_t rows, const float* a, float* y) {
  int64_t c = 0;
  if (w.kind == EP_INT4 && w.group % 32 == 0) c = add_grouped_rows<4>(w, first, rows, a, y);
  if (w.kind == EP_INT8 && w.group % 32 == 0) c = add_grouped_rows<8>(w, first, rows, a, y);
  alignas(64) float block[kFloatColumns];
  for (; c < w.cols; c += kFloatColumns) {
    const int64_t last = min_of(c + kFloatColumns, w.cols);
    for (int64_t r = 0; r < rows; ++r) {
      decode(w, first + r, c, last, block);
      axpy(a[r], block, y + c, last - c);
    }
  }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  F squares = f_zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) squares = f_fma(f_load(x + i), f_load(x + i), squares);
  if (i < n) {
    float padded[16] = {};
    std::memcpy(padded, x + i, static_cast<size_t>(n - i) * 4);
    squares = f_fma(f_load(padded), f_load(padded), squares);
  }
  const float scale = 1.0f / std::sqrt(f_sum(squares) / static_cast<float>(n) + eps);
  by_lanes(x, weight, out, n, ScaleMul{f_set1(scale)});
}

}  // namespace
