// The other formats: decoding to float, and rows of one weight against float activations. Part of kernels.h.
#pragma once
#include "int_rows.h"

namespace {

// ---- decoding to float ---------------------------------------------------------------------------

// The value of one element: code times scale, rounded once. Slow; for tails and unusual shapes.
inline float decode_one(const ep_weight& w, int64_t row, int64_t col) {
  const uint8_t* payload = reinterpret_cast<const uint8_t*>(w.payload);
  const void* scale = reinterpret_cast<const void*>(w.scale);
  const int64_t flat = row * w.cols + col;
  switch (w.kind) {
    case EP_F32: return element<float>(payload, flat);
    case EP_BF16: return bf16_to_float(element<uint16_t>(payload, flat));
    case EP_FP8: {
      const float s = element<float>(scale, row / w.block_rows * ceil_div(w.cols, w.block_cols) + col / w.block_cols);
      return (payload[flat] & 0x7F) == 0x7F ? kQuietNan : e4m3_to_float(payload[flat]) * s;
    }
    case EP_NF4: {
      const int code = flat % 2 == 0 ? payload[flat / 2] >> 4 : payload[flat / 2] & 15;
      return kNf4[code] * element<float>(scale, flat / w.group);
    }
    default: break;
  }
  const float s = bf16_to_float(element<uint16_t>(scale, row * ceil_div(w.cols, w.group) + col / w.group));
  const int bits = code_bits(w.kind);
  const int code = bits_at(payload + row * packed_row_bytes(w.cols, bits), col * bits, bits);
  return static_cast<float>(code - (1 << (bits - 1))) * s;
}

// Sixteen columns of a row under one scale; for kinds that have vector code.
template <int KIND>
inline F decode_lanes(const uint8_t* row, int64_t col, F scale) {
  if constexpr (KIND == EP_F32) return f_load(reinterpret_cast<const float*>(row) + col);
  if constexpr (KIND == EP_BF16) return f_from_bf16(reinterpret_cast<const uint16_t*>(row) + col);
  if constexpr (KIND == EP_FP8) return f_mul(f_from_e4m3(row + col), scale);
  if constexpr (KIND == EP_NF4) return f_mul(f_from_nf4(row + col / 2), scale);
  if constexpr (KIND == EP_INT4) return f_mul(f_centered<4>(row + col / 2), scale);
  if constexpr (KIND == EP_INT3) return f_mul(f_centered<3>(row + col / 8 * 3), scale);
  if constexpr (KIND == EP_INT2) return f_mul(f_centered<2>(row + col / 4), scale);
  return f_mul(f_sub(f_from_u8(row + col), f_set1(128.0f)), scale);  // EP_INT8
}

// Whole vectors of columns [first, last) in runs of one scale; returns the first column not decoded.
template <int KIND>
inline int64_t decode_runs(const uint8_t* row, const uint8_t* scales, int64_t per_scale, int64_t first, int64_t last,
                           float* out) {
  int64_t c = first;
  while (c + 16 <= last) {
    const int64_t end = per_scale == 0 ? last : min_of(last, (c / per_scale + 1) * per_scale);
    float s = 1.0f;
    if constexpr (KIND == EP_FP8 || KIND == EP_NF4) s = element<float>(scales, c / per_scale);
    if constexpr (KIND == EP_INT8 || KIND == EP_INT4 || KIND == EP_INT3 || KIND == EP_INT2) {
      s = bf16_to_float(element<uint16_t>(scales, c / per_scale));
    }
    const F scale = f_set1(s);
    for (; c + 16 <= end; c += 16) f_store(out + (c - first), decode_lanes<KIND>(row, c, scale));
    if (c < end) break;  // the end of the row
  }
  return c;
}

// Columns [first, last) of a row to `out`, zero padded to a multiple of 16. `first` is one.
void decode(const ep_weight& w, int64_t row, int64_t first, int64_t last, float* out) {
  const uint8_t* payload = reinterpret_cast<const uint8_t*>(w.payload);
  const uint8_t* scale = reinterpret_cast<const uint8_t*>(w.scale);
  int64_t c = first;
  if (w.kind == EP_F32) c = decode_runs<EP_F32>(payload + row * w.cols * 4, nullptr, 0, first, last, out);
  if (w.kind == EP_BF16) c = decode_runs<EP_BF16>(payload + row * w.cols * 2, nullptr, 0, first, last, out);
  if (w.kind == EP_INT8 || w.kind == EP_INT4 || w.kind == EP_INT3 || w.kind == EP_INT2) {
    const uint8_t* codes = payload + row * packed_row_bytes(w.cols, code_bits(w.kind));
    const uint8_t* scales = scale + row * ceil_div(w.cols, w.group) * 2;
    if (w.kind == EP_INT8) c = decode_runs<EP_INT8>(codes, scales, w.group, first, last, out);
    if (w.kind == EP_INT4) c = decode_runs<EP_INT4>(codes, scales, w.group, first, last, out);
    if (w.kind == EP_INT3) c = decode_runs<EP_INT3>(codes, scales, w.group, first, last, out);
    if (w.kind == EP_INT2) c = decode_runs<EP_INT2>(codes, scales, w.group, first, last, out);
  }
  if (w.kind == EP_NF4 && w.cols % w.group == 0) {  // else blocks run over the ends of rows
    const uint8_t* scales = scale + row * (w.cols / w.group) * 4;
    c = decode_runs<EP_NF4>(payload + row * w.cols / 2, scales, w.group, first, last, out);
  }
  if (w.kind == EP_FP8 && w.block_cols % 16 == 0) {
    const uint8_t* codes = payload + row * w.cols;
    const uint8_t* scales = scale + row / w.block_rows * ceil_div(w.cols, w.block_cols) * 4;
    c = decode_runs<EP_FP8>(codes, scales, w.block_cols, first, last, out);
    if (has_e4m3_nan(codes + first, c - first)) {
      for (int64_t i = first; i < c; ++i) {
        if ((codes[i] & 0x7F) == 0x7F) out[i - first] = kQuietNan;
      }
    }
  }
  for (; c < last; ++c) out[c - first] = decode_one(w, row, c);
  for (; (c - first) % 16 != 0; ++c) out[c - first] = 0.0f;
}

// ---- float rows against tokens -------------------------------------------------------------------

// Memory that is needed soon, asked for a few lines at a time: a processor that has too many requests waits with its
// work, too.
struct Ahead {
  const uint8_t* next = nullptr;
  const uint8_t* end = nullptr;
  int lines = 0;

  void ask() {
    for (int i = 0; i < lines && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// acc[r * stride + m] += row r of `w` times token m, over `n` columns (a multiple of 16).
template <int NR, int MR>
inline void dot_tile(const float* w, int64_t w_stride, const float* const* x, int64_t at, int64_t n, F* acc,
                     int64_t stride, Ahead& ahead) {
  F a[NR][MR];
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) a[r][m] = acc[r * stride + m];
  }
  for (int64_t c = 0; c < n; c += 16) {
    ahead.ask();
    F wv[NR];
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) wv[r] = f_load(w + r * w_stride + c);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const F xv = f_load(x[m] + at + c);
#pragma GCC unroll 4
      for (int r = 0; r < NR; ++r) a[r][m] = f_fma(wv[r], xv, a[r][m]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) acc[r * stride + m] = a[r][m];
  }
}

// NR rows against all tokens.
template <int NR>
inline void dot_rows(const float* w, int64_t w_stride, const float* const* x, int64_t tokens, int64_t at, int64_t n,
                     F* acc, int64_t stride, Ahead& ahead) {
  int64_t m = 0;
  for (; m + kDotTokens <= tokens; m += kDotTokens) {
    dot_tile<NR, kDotTokens>(w, w_stride, x + m, at, n, acc + m, stride, ahead);
  }
  for (; m < tokens; ++m) dot_tile<NR, 1>(w, w_stride, x + m, at, n, acc + m, stride, ahead);
}

// A block of up to four rows against all tokens of a tile.
inline void dot_block(const float* w, int64_t w_stride, int64_t rows, const float* const* x, int64_t tokens,
                      int64_t at, int64_t n, F* acc, int64_t stride, Ahead ahead = {}) {
  if (tokens == 1 && rows == 4) return dot_tile<4, 1>(w, w_stride, x, at, n, acc, stride, ahead);
  int64_t r = 0;
  for (; r + kDotRows <= rows; r += kDotRows) {
    dot_rows<kDotRows>(w + r * w_stride, w_stride, x, tokens, at, n, acc + r * stride, stride, ahead);
  }
  for (; r < rows; ++r) dot_rows<1>(w + r * w_stride, w_stride, x, tokens, at, n, acc + r * stride, stride, ahead);
}

// Four bf16 rows against one token, converted on the way: a decoding step reads the weights once and
// writes nothing. The additions are those of dot_tile over decoded rows, so the bits are too.
inline void dot_bf16_rows(const uint16_t* w, int64_t stride, const float* x, int64_t n, F* acc, int64_t acc_stride) {
  F a[4] = {acc[0], acc[acc_stride], acc[2 * acc_stride], acc[3 * acc_stride]};
  for (int64_t c = 0; c < n; c += 16) {
    const F xv = f_load(x + c);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) a[r] = f_fma(f_from_bf16(w + r * stride + c), xv, a[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) acc[r * acc_stride] = a[r];
}

// The same for fp8; none of the codes is NaN, and a block of scales holds whole vectors of columns.
inline void dot_fp8_rows(const ep_weight& w, int64_t row, const float* x, int64_t n, F* acc, int64_t acc_stride) {
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(w.payload) + row * w.cols;
  const void* scales = reinterpret_cast<const void*>(w.scale);
  const int64_t per_row = ceil_div(w.cols, w.block_cols);
  F a[4] = {acc[0], acc[acc_stride], acc[2 * acc_stride], acc[3 * acc_stride]};
  for (int64_t c = 0; c < n;) {
    const int64_t end = min_of(n, (c / w.block_cols + 1) * w.block_cols);
    F scale[4];
    for (int r = 0; r < 4; ++r) {
      scale[r] = f_set1(element<float>(scales, (row + r) / w.block_rows * per_row + c / w.block_cols));
      for (int64_t i = c; i < end; i += 64) __builtin_prefetch(codes + r * w.cols + i + kAhead);
    }
    for (; c < end; c += 16) {
      const F xv = f_load(x + c);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) a[r] = f_fma(decode_lanes<EP_FP8>(codes + r * w.cols, c, scale[r]), xv, a[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) acc[r * acc_stride] = a[r];
}

constexpr int kFloatRows = 4;
constexpr int kFloatTokens = 24;
constexpr int kFloatColumns = 512;

void float_rows(const RowsCall& call) {
  const ep_weight& w = *call.weight;
  alignas(64) float block[kFloatRows * kFloatColumns];
  F acc[kFloatRows * kFloatTokens];
  for (int64_t t = 0; t < call.tokens; t += kFloatTokens) {
    const int64_t tokens = min_of(kFloatTokens, call.tokens - t);
    const float* x[kFloatTokens];
    for (int64_t m = 0; m < tokens; ++m) x[m] = reinterpret_cast<const float*>(call.act[t + m]);
    const auto several = [&](int64_t n, int64_t rows, int64_t apart) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t m = 0; m < tokens; ++m) acc[r * kFloatTokens + m] = f_zero();
      }
      int64_t begin = 0;
      if (w.kind == EP_F32) {  // where they lie
        begin = w.cols / 16 * 16;
        const float* row = reinterpret_cast<const float*>(w.payload) + n * w.cols;
        dot_block(row, apart * w.cols, rows, x, tokens, 0, begin, acc, kFloatTokens);
      }
      if (w.kind == EP_BF16 && tokens == 1 && rows == kFloatRows) {
        begin = w.cols / 16 * 16;
        const uint16_t* row = reinterpret_cast<const uint16_t*>(w.payload) + n * w.cols;
        dot_bf16_rows(row, apart * w.cols, x[0], begin, acc, kFloatTokens);
      }
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(w.payload) + n * w.cols;
      if (w.kind == EP_FP8 && tokens == 1 && rows == kFloatRows && w.block_cols % 16 == 0 &&
          !has_e4m3_nan(codes, rows * w.cols)) {
        begin = w.cols / 16 * 16;
        dot_fp8_rows(w, n, x[0], begin, acc, kFloatTokens);
      }
      for (int64_t c = begin; c < w.cols; c += kFloatColumns) {
        const int64_t last = min_of(c + kFloatColumns, w.cols);
        for (int64_t r = 0; r < rows; ++r) decode(w, n + r * apart, c, last, block + r * kFloatColumns);
        dot_block(block, kFloatColumns, rows, x, tokens, c, round_up(last - c, 16), acc, kFloatTokens);
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t m = 0; m < tokens; ++m) call.out[t + m][n + r * apart - call.base] = f_sum(acc[r * kFloatTokens + m]);
      }
    };
    int64_t n = call.first;
    if (w.kind == EP_BF16 && tokens == 1) {  // long streams, as in int_rows_few
      const int64_t apart = (call.last - call.first) / kFloatRows;
      for (; n < call.first + apart; ++n) several(n, kFloatRows, apart);
      n = call.first + kFloatRows * apart;
    }
    for (; n < call.last; n += kFloatRows) several(n, min_of(kFloatRows, call.last - n), 1);
  }
}

}  // namespace
