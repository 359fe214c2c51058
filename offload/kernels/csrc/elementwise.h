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

constexpr int kAddRows = 16, kAddGroups = 16, kAddStep = 32;  // columns of a step: no group is smaller

// y += sum over rows of factor[r][group] * row r, for COLUMNS columns of codes of four or eight bits.
template <int BITS, int COLUMNS>
inline void add_block(const uint8_t* codes, int64_t row_bytes, int64_t rows, const float (*factor)[kAddGroups],
                      const int* group, float* y) {
  constexpr int kVectors = COLUMNS / 16;
  F sum[kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) sum[i] = BITS == 4 ? f_to_turn(f_load(y + 16 * i)) : f_load(y + 16 * i);
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = codes + r * row_bytes;
    for (int b = 0; b < COLUMNS * BITS / 8; b += 64) __builtin_prefetch(row + rows * row_bytes + b);
#pragma GCC unroll 8
    for (int g = 0; g < COLUMNS / kAddStep; ++g) {
      const F by = f_set1(factor[r][group[g]]);
#pragma GCC unroll 2
      for (int i = 2 * g; i < 2 * g + 2; ++i) {
        const uint8_t* p = row + i * 2 * BITS;
        sum[i] = f_fma(by, BITS == 4 ? f_centered_in_turn(p) : f_sub(f_from_u8(p), f_set1(128.0f)), sum[i]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) f_store(y + 16 * i, BITS == 4 ? f_from_turn(sum[i]) : sum[i]);
}

// y += sum over up to kAddRows rows of a[r] * row r, for whole steps of a grouped integer format; returns how many
// columns these are. The scale of a group goes into the factor of its row.
template <int BITS>
inline int64_t add_grouped_rows(const ep_weight& w, int64_t first, int64_t rows, const float* a, float* y) {
  const int64_t row_bytes = packed_row_bytes(w.cols, BITS), groups = ceil_div(w.cols, w.group);
  const uint8_t* payload = reinterpret_cast<const uint8_t*>(w.payload) + first * row_bytes;
  const uint8_t* scale = reinterpret_cast<const uint8_t*>(w.scale) + first * groups * 2;
  const int64_t whole = w.cols / kAddStep * kAddStep, span = kAddGroups * w.group;
  for (int64_t begin = 0; begin < whole; begin += span) {
    const int64_t end = min_of(whole, begin + span), group = begin / w.group, count = ceil_div(end, w.group) - group;
    float factor[kAddRows][kAddGroups];
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* scales = scale + (r * groups + group) * 2;
      for (int64_t g = 0; g < count; ++g) factor[r][g] = a[r] * bf16_to_float(element<uint16_t>(scales, g));
    }
    int of[kAddColumns / kAddStep];  // the group of each step
    for (int64_t c = begin; c < end;) {
      const bool wide = c + kAddColumns <= end;
      for (int64_t g = 0; g < (wide ? kAddColumns / kAddStep : 1); ++g) of[g] = static_cast<int>((c + g * kAddStep) / w.group - group);
      const uint8_t* codes = payload + c * BITS / 8;
      if (wide) {
        add_block<BITS, kAddColumns>(codes, row_bytes, rows, factor, of, y + c);
      } else {
        add_block<BITS, kAddStep>(codes, row_bytes, rows, factor, of, y + c);
      }
      c += wide ? kAddColumns : kAddStep;
    }
  }
  return whole;
}

template <int BITS>
inline int64_t add_all_grouped_rows(const ep_weight& w, int64_t first, int64_t rows, const float* a, float* y) {
  int64_t columns = 0;
  for (int64_t r = 0; r < rows; r += kAddRows) {
    columns = add_grouped_rows<BITS>(w, first + r, min_of(kAddRows, rows - r), a + r, y);
  }
  return columns;
}

// y [cols] += sum over rows of a[r] * row (first + r) of w.
void add_rows(const ep_weight& w, int64_t first, int64_t rows, const float* a, float* y) {
  int64_t c = 0;
  if (w.kind == EP_INT4 && w.group % 32 == 0) c = add_all_grouped_rows<4>(w, first, rows, a, y);
  if (w.kind == EP_INT8 && w.group % 32 == 0) c = add_all_grouped_rows<8>(w, first, rows, a, y);
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
