// The kernels, written once over the sixteen-lane type F and the integer format steps of the
// simd_*.h that the unit included before. Everything an Isa table offers is defined here.
//
// Fixed arithmetic: a dot product of an integer format is an exact int32 sum per group, converted to
// float and multiplied into lane (group mod 8 or 16) by one fma; of any other format, one fma per
// element into lane (column mod 16). Tiles differ with the number of tokens, this order does not.
#pragma once
#include "isa.h"

namespace {

using ep::AttentionCall;
using ep::kAttentionQueries;
using ep::kAttentionRows;
using ep::RowsCall;

// ---- activations of integer formats ------------------------------------------------------------

// Groups whose largest magnitude is below this are zero: 127 / amax would overflow.
constexpr float kSmallestAmax = 1e-30f;

template <int BITS>
inline void place_codes(const int8_t* codes, int64_t n, uint8_t* out) {
  if constexpr (BITS == 4) {
    for (int64_t b = 0; b < n; b += 128) {
      for (int i = 0; i < 64; ++i) {
        out[b + i] = static_cast<uint8_t>(codes[b + 2 * i]);
        out[b + 64 + i] = static_cast<uint8_t>(codes[b + 2 * i + 1]);
      }
    }
  } else if constexpr (kInt8Deinterleave) {
    int16_t* words = reinterpret_cast<int16_t*>(out);
    for (int64_t b = 0; b < n; b += 32) {
      for (int i = 0; i < 16; ++i) {
        words[b + i] = codes[b + 2 * i];
        words[b + 16 + i] = static_cast<int16_t>(codes[b + 2 * i + 1] - 256 * codes[b + 2 * i]);
      }
    }
  } else {
    std::memcpy(out, codes, static_cast<size_t>(n));
  }
}

// One record: codes, then scales, then corrections (minus the weight offset times the sum of the codes that
// meet weights with their offset: all of them, or the even ones).
template <int BITS, int G>
inline void quantize_record(const float* x, uint8_t* rec, F& poison) {
  using Format = IntFormat<BITS, G>;
  constexpr int kColumns = Format::kGroups * G;
  int8_t codes[kColumns];
  float* scales = reinterpret_cast<float*>(rec + Format::kCodeBytes);
  int32_t* corrections = reinterpret_cast<int32_t*>(rec + Format::kCodeBytes + Format::kGroups * 4);
  for (int g = 0; g < Format::kGroups; ++g) {
    F most = f_zero();
    for (int i = 0; i < G; i += 16) {
      const F v = f_load(x + g * G + i);
      poison = f_fma(v, f_zero(), poison);
      most = f_max(f_abs(v), most);
    }
    const float amax = f_amax(most);
    const bool zero = !(amax >= kSmallestAmax) || !is_finite(amax);
    const F inverse = f_set1(zero ? 0.0f : 127.0f / amax);
    F total = f_zero();
    for (int i = 0; i < G; i += 16) {
      const F q = f_min(f_rint(f_mul(f_load(x + g * G + i), inverse)), f_set1(127.0f));  // NaN: 127
      total = f_add(total, q);  // exact: integers below 2^14
      f_store_i8(codes + g * G + i, q);
    }
    const int lane = Format::lane_of_group(g);
    scales[lane] = zero ? 0.0f : amax / 127.0f;
    int32_t sum = static_cast<int32_t>(f_sum(total));
    if constexpr (BITS == 8 && kInt8Deinterleave) {
      for (int i = 1; i < G; i += 2) sum -= codes[g * G + i];
    }
    corrections[lane] = -(1 << (BITS - 1)) * sum;
  }
  place_codes<BITS>(codes, kColumns, rec);
}

template <int BITS, int G>
bool quantize_row(const float* x, int64_t cols, uint8_t* row) {
  using Format = IntFormat<BITS, G>;
  constexpr int kColumns = Format::kGroups * G;
  F poison = f_zero();
  uint8_t* rec = row;
  int64_t c = 0;
  for (; c + kColumns <= cols; c += kColumns, rec += Format::kRecordBytes) quantize_record<BITS, G>(x + c, rec, poison);
  if (c < cols) {
    float padded[kColumns] = {};
    std::memcpy(padded, x + c, static_cast<size_t>(cols - c) * 4);
    quantize_record<BITS, G>(padded, rec, poison);
  }
  const bool finite = f_sum(poison) == 0.0f;
  if (!finite) *reinterpret_cast<float*>(row + Format::kCodeBytes) = kQuietNan;  // reaches every result
  return finite;
}

// ---- integer formats: rows against tokens ------------------------------------------------------

template <class Format>
struct WeightRow {
  const uint8_t* codes;
  const uint16_t* scales;
};

// Geometry of one weight: which steps read whole, and a zero padded copy of the last partial step.
template <class Format, int BITS, int G>
struct Geometry {
  explicit Geometry(const ep_weight& w)
      : payload(reinterpret_cast<const uint8_t*>(w.payload)),
        scale(reinterpret_cast<const uint16_t*>(w.scale)),
        row_bytes(ceil_div(w.cols, 32 / BITS) * 4),
        groups(ceil_div(w.cols, G)),
        whole(min_of(groups / Format::kGroups, row_bytes / Format::kWeightBytes)),
        steps(ceil_div(groups, Format::kGroups)) {}

  WeightRow<Format> row(int64_t n) const { return {payload + n * row_bytes, scale + n * groups}; }
  void copy_tail(int64_t n, uint8_t* codes, uint16_t* scales) const {
    const WeightRow<Format> w = row(n);
    std::memset(codes, 0, Format::kWeightBytes);
    std::memset(scales, 0, Format::kGroups * 2);
    std::memcpy(codes, w.codes + whole * Format::kWeightBytes, static_cast<size_t>(row_bytes - whole * Format::kWeightBytes));
    std::memcpy(scales, w.scales + whole * Format::kGroups, static_cast<size_t>(groups - whole * Format::kGroups) * 2);
  }

  const uint8_t* payload;
  const uint16_t* scale;
  int64_t row_bytes, groups, whole, steps;
};

template <int BITS, int G>
void int_rows(const RowsCall& call);

// One token costs its weights' way from memory. A core keeps enough cache lines under way when it reads four long
// streams, which the prefetchers of the hardware follow; asking for lines as well slows it down. Rows that lie side by
// side are short streams, lost at every end.
constexpr int kStreams = 4;
constexpr int64_t kAhead = 1024;  // bytes, where asking ahead does pay

// The last, partial step of NR rows. Whole groups are read where they lie; a group cut short, from a padded copy.
template <int BITS, int G, int MT, int NR>
inline void int_rows_tail(typename IntFormat<BITS, G>::Accumulator (*acc)[MT], const Geometry<IntFormat<BITS, G>, BITS, G>& geometry,
                          int64_t n, int64_t apart, const uint8_t* codes, const uint8_t* const* rec) {
  using Format = IntFormat<BITS, G>;
  alignas(64) uint16_t last_scales[Format::kGroups] = {};
  const int64_t left = geometry.groups - geometry.whole * Format::kGroups;
  if constexpr (Format::kParts) {
    if (geometry.row_bytes == geometry.groups * G * BITS / 8) {
      for (int r = 0; r < NR; ++r) {
        const uint16_t* scales = geometry.row(n + r * apart).scales + geometry.whole * Format::kGroups;
        for (int64_t g = 0; g < left; ++g) last_scales[g] = scales[g];
        Format::template part<MT>(acc[r], codes + r * apart * geometry.row_bytes, last_scales, rec, static_cast<int>(left));
      }
      return;
    }
  }
  alignas(64) uint8_t last_codes[Format::kWeightBytes];
  for (int r = 0; r < NR; ++r) {
    geometry.copy_tail(n + r * apart, last_codes, last_scales);
    Format::template step<MT>(acc[r], last_codes, last_scales, rec);
  }
}

// NR rows, `apart` rows between them, against up to four tokens; every row is read once, front to back.
template <int BITS, int G, int MT, int NR>
inline void int_rows_block(const RowsCall& call, const Geometry<IntFormat<BITS, G>, BITS, G>& geometry, int64_t n, int64_t apart) {
  using Format = IntFormat<BITS, G>;
  constexpr int kPhases = Format::kPhases;
  typename Format::Accumulator acc[kPhases][NR][MT];
#pragma GCC unroll 2
  for (int phase = 0; phase < kPhases; ++phase) {
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) acc[phase][r][m] = Format::zero();
    }
  }
  const int64_t code_stride = apart * geometry.row_bytes, scale_stride = apart * geometry.groups;
  const uint8_t* codes = geometry.payload + n * geometry.row_bytes;
  const uint16_t* scales = geometry.scale + n * geometry.groups;
  const uint8_t* rec[MT];
#pragma GCC unroll 4
  for (int m = 0; m < MT; ++m) rec[m] = call.act[m];
  int64_t s = 0;
  while (s < geometry.whole) {
#pragma GCC unroll 2
    for (int phase = 0; phase < kPhases; ++phase) {
      if (s == geometry.whole) break;
      if constexpr (Format::kTurns && MT == 1) {
        Format::template turns<NR>(acc[phase], codes, code_stride, scales, scale_stride, rec[0]);
      } else {
#pragma GCC unroll 4
        for (int r = 0; r < NR; ++r) {
          Format::template step<MT>(acc[phase][r], codes + r * code_stride, scales + r * scale_stride, rec);
        }
      }
      codes += Format::kWeightBytes;
      scales += Format::kGroups;
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) rec[m] += Format::kRecordBytes;
      ++s;
    }
  }
  if (s < geometry.steps) {  // one call each: a computed index would keep the sums out of the registers
    if (kPhases == 1 || s % kPhases == 0) {
      int_rows_tail<BITS, G, MT, NR>(acc[0], geometry, n, apart, codes, rec);
    } else {
      int_rows_tail<BITS, G, MT, NR>(acc[kPhases - 1], geometry, n, apart, codes, rec);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) {
      typename Format::Accumulator a[kPhases];
#pragma GCC unroll 2
      for (int phase = 0; phase < kPhases; ++phase) a[phase] = acc[phase][r][m];
      call.out[m][n + r * apart - call.base] = Format::finish(a);
    }
  }
}

template <int BITS, int G, int MT>
void int_rows_few(const RowsCall& call) {
  // More tokens need the registers, and more time per byte.
  constexpr int kRows = MT == 1 ? kStreams : MT == 2 ? 2 : 1;
  const Geometry<IntFormat<BITS, G>, BITS, G> geometry(*call.weight);
  const int64_t apart = (call.last - call.first) / kRows;
  for (int64_t n = call.first; n < call.first + apart; ++n) int_rows_block<BITS, G, MT, kRows>(call, geometry, n, apart);
  for (int64_t n = call.first + kRows * apart; n < call.last; ++n) int_rows_block<BITS, G, MT, 1>(call, geometry, n, 1);
}

#if EP_PANELS
// Many tokens: a panel holds kPanelRows rows side by side, one 32-bit word of codes each per register,
// so that the sums of a group need no horizontal additions: lane = row, and the lanes of the fixed
// arithmetic become kLanes separate accumulators. A panel is transposed once per block of columns and
// used by all tokens of a tile.
constexpr int kPanelTokens = 32;
constexpr int kPanelStep = 4;
constexpr int kPanelColumns = 2048;  // whole records of every format

template <int BITS, int G>
struct PanelBlock {
  static constexpr int kGroups = kPanelColumns / G;
  alignas(64) uint8_t words[kPanelColumns * BITS / 8 * kPanelRows];
  alignas(64) float scales[kGroups * kPanelRows];
};

// Columns [first, first + columns) of the panel's rows into `block`; words behind the rows are zero.
template <int BITS, int G, class Geometry>
void fill_panel(const Geometry& geometry, const int64_t* rows, int64_t first, int64_t columns, PanelBlock<BITS, G>& block) {
  constexpr int kStride = kPanelRows * 4;
  const int64_t begin = first * BITS / 8, want = round_up(ceil_div(columns, G) * G * BITS / 8, 32), have = geometry.row_bytes - begin;
  for (int half = 0; half < kPanelRows; half += 8) {
    const uint8_t* from[8];
    for (int r = 0; r < 8; ++r) from[r] = geometry.payload + rows[half + r] * geometry.row_bytes + begin;
    int64_t at = 0;
    for (; at + 32 <= min_of(want, have); at += 32) transpose_8x8(from, at, block.words + at / 4 * kStride + half * 4, kStride);
    if (at < want) {
      uint8_t padded[8][32] = {};
      for (int r = 0; r < 8; ++r) {
        if (at < have) std::memcpy(padded[r], from[r] + at, static_cast<size_t>(have - at));
        from[r] = padded[r];
      }
      transpose_8x8(from, 0, block.words + at / 4 * kStride + half * 4, kStride);
    }
  }
  const int64_t first_group = first / G, groups = ceil_div(columns, G);
  for (int r = 0; r < kPanelRows; ++r) {
    const uint16_t* scales = geometry.scale + rows[r] * geometry.groups + first_group;
    for (int64_t g = 0; g < groups; ++g) block.scales[g * kPanelRows + r] = bf16_to_float(scales[g]);
  }
}

// kPanelStep tokens against one block; acc is [kLanes][kPanelStep] registers in memory.
template <int BITS, int G, int LANES>
void panel_step(const PanelBlock<BITS, G>& block, int64_t groups, const uint8_t* const* act, PanelFloat* acc) {
  using Format = IntFormat<BITS, G>;
  constexpr int kWordBytes = G * BITS / 8 * kPanelRows;
  const uint8_t* rec[kPanelStep];
  for (int t = 0; t < kPanelStep; ++t) rec[t] = act[t];
  for (int64_t g = 0; g < groups;) {
    for (int i = 0; i < Format::kGroups && g < groups; ++i, ++g) {
      PanelInt sums[kPanelStep];
      panel_sums<BITS, G, kPanelStep>(block.words + g * kWordBytes, rec, i, sums);
      const PanelFloat ws = panel_load(block.scales + g * kPanelRows);
      PanelFloat* lane = acc + g % LANES * kPanelStep;
      const int at = Format::kCodeBytes + Format::lane_of_group(i) * 4;
#pragma GCC unroll 8
      for (int t = 0; t < kPanelStep; ++t) {
        lane[t] = panel_accumulate(lane[t], sums[t], ws, rec[t] + at, rec[t] + at + Format::kGroups * 4);
      }
    }
    for (auto& r : rec) r += Format::kRecordBytes;
  }
}

// The sum over lanes in the order of f_sum.
template <int LANES>
inline PanelFloat panel_total(const PanelFloat* acc) {
  PanelFloat t[8];
  for (int i = 0; i < 8; ++i) t[i] = LANES == 16 ? panel_add(acc[i * kPanelStep], acc[(i + LANES / 2) * kPanelStep]) : acc[i * kPanelStep];
  for (int i = 0; i < 4; ++i) t[i] = panel_add(t[i], t[i + 4]);
  return panel_add(panel_add(t[0], t[2]), panel_add(t[1], t[3]));
}

template <int BITS, int G>
void int_rows_many(const RowsCall& call) {
  using Format = IntFormat<BITS, G>;
  constexpr int kLanes = BITS == 4 && G == 32 ? 16 : 8;
  constexpr int kRecordsPerBlock = kPanelColumns / (Format::kGroups * G);
  const Geometry<Format, BITS, G> geometry(*call.weight);
  PanelBlock<BITS, G> block;
  PanelFloat acc[kPanelTokens / kPanelStep][kLanes * kPanelStep];
  for (int64_t t = 0; t < call.tokens; t += kPanelTokens) {
    const int64_t tokens = min_of(kPanelTokens, call.tokens - t);
    const uint8_t* act[kPanelTokens];
    for (int64_t m = 0; m < round_up(tokens, kPanelStep); ++m) act[m] = call.act[t + min_of(m, tokens - 1)];
    for (int64_t n = call.first; n < call.last; n += kPanelRows) {
      int64_t rows[kPanelRows];
      for (int r = 0; r < kPanelRows; ++r) rows[r] = min_of(n + r, call.last - 1);
      for (auto& step : acc) {
        for (auto& a : step) a = panel_zero();
      }
      const uint8_t* at[kPanelTokens];
      std::memcpy(at, act, sizeof(at));
      for (int64_t c = 0; c < call.weight->cols; c += kPanelColumns) {
        const int64_t columns = min_of(kPanelColumns, call.weight->cols - c);
        fill_panel<BITS, G>(geometry, rows, c, columns, block);
        for (int64_t m = 0; m < tokens; m += kPanelStep) {
          panel_step<BITS, G, kLanes>(block, ceil_div(columns, G), at + m, acc[m / kPanelStep]);
        }
        for (int64_t m = 0; m < round_up(tokens, kPanelStep); ++m) at[m] += kRecordsPerBlock * Format::kRecordBytes;
      }
      for (int64_t m = 0; m < tokens; ++m) {
        float results[kPanelRows];
        panel_store(results, panel_total<kLanes>(acc[m / kPanelStep] + m % kPanelStep));
        std::memcpy(call.out[t + m] + (n - call.base), results, static_cast<size_t>(min_of(kPanelRows, call.last - n)) * 4);
      }
    }
  }
}
#else
// Without panels, four tokens at a time.
template <int BITS, int G>
void int_rows_many(const RowsCall& call) {
  RowsCall part = call;
  for (int64_t t = 0; t < call.tokens; t += 4) {
    part.act = call.act + t;
    part.out = call.out + t;
    part.tokens = min_of(4, call.tokens - t);
    int_rows<BITS, G>(part);
  }
}
#endif

template <int BITS, int G>
void int_rows(const RowsCall& call) {
  switch (call.tokens) {
    case 0: return;
    case 1: return int_rows_few<BITS, G, 1>(call);
    case 2: return int_rows_few<BITS, G, 2>(call);
    case 3: return int_rows_few<BITS, G, 3>(call);
    case 4: return int_rows_few<BITS, G, 4>(call);
    default: return int_rows_many<BITS, G>(call);
  }
}

// ---- decoding to float ---------------------------------------------------------------------------

// Bits per code of the grouped integers.
inline int code_bits(int32_t kind) { return kind == EP_INT8 ? 8 : kind == EP_INT4 ? 4 : kind == EP_INT3 ? 3 : 2; }
inline int64_t packed_row_bytes(int64_t cols, int bits) { return ceil_div(cols * bits, 32) * 4; }

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
      return (payload[flat] & 0x7F) == 0x7F ? kQuietNan : e4m3_raw(payload[flat]) * kTwo120 * s;
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
  if constexpr (KIND == EP_FP8) return f_mul(f_mul(f_from_e4m3_raw(row + col), f_set1(kTwo120)), scale);
  if constexpr (KIND == EP_NF4) return f_mul(f_from_nf4(row + col / 2), scale);
  if constexpr (KIND == EP_INT4) return f_mul(f_sub(f_from_bits<4>(row + col / 2), f_set1(8.0f)), scale);
  if constexpr (KIND == EP_INT3) return f_mul(f_sub(f_from_bits<3>(row + col / 8 * 3), f_set1(4.0f)), scale);
  if constexpr (KIND == EP_INT2) return f_mul(f_sub(f_from_bits<2>(row + col / 4), f_set1(2.0f)), scale);
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

// acc[r * stride + m] += row r of `w` times token m, over `n` columns (a multiple of 16).
template <int NR, int MR>
inline void dot_tile(const float* w, int64_t w_stride, const float* const* x, int64_t at, int64_t n, F* acc,
                     int64_t stride) {
  F a[NR][MR];
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) a[r][m] = acc[r * stride + m];
  }
  for (int64_t c = 0; c < n; c += 16) {
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

// A block of up to four rows against all tokens of a tile.
inline void dot_block(const float* w, int64_t w_stride, int64_t rows, const float* const* x, int64_t tokens,
                      int64_t at, int64_t n, F* acc, int64_t stride) {
  if (tokens == 1 && rows == 4) return dot_tile<4, 1>(w, w_stride, x, at, n, acc, stride);
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    int64_t m = 0;
    for (; m + 3 <= tokens; m += 3) dot_tile<2, 3>(w + r * w_stride, w_stride, x + m, at, n, acc + r * stride + m, stride);
    for (; m < tokens; ++m) dot_tile<2, 1>(w + r * w_stride, w_stride, x + m, at, n, acc + r * stride + m, stride);
  }
  for (; r < rows; ++r) {
    for (int64_t m = 0; m < tokens; ++m) {
      dot_tile<1, 1>(w + r * w_stride, w_stride, x + m, at, n, acc + r * stride + m, stride);
    }
  }
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

// ---- dispatch over formats -----------------------------------------------------------------------

template <int BITS, int G>
int64_t record_bytes(int64_t cols) {
  using Format = IntFormat<BITS, G>;
  // An odd number of extra lines keeps the rows of a token tile out of each other's cache sets.
  return round_up(ceil_div(ceil_div(cols, G), Format::kGroups) * Format::kRecordBytes, 128) + 64;
}

#define EP_INT_FORMATS(CALL)                                         \
  if (w.kind == EP_INT4 && w.group == 32) return CALL(4, 32);        \
  if (w.kind == EP_INT4 && w.group == 64) return CALL(4, 64);        \
  if (w.kind == EP_INT4 && w.group == 128) return CALL(4, 128);      \
  if (w.kind == EP_INT8 && w.group == 32) return CALL(8, 32);        \
  if (w.kind == EP_INT8 && w.group == 64) return CALL(8, 64);        \
  if (w.kind == EP_INT8 && w.group == 128) return CALL(8, 128)

int64_t act_bytes(const ep_weight& w) {
#define EP_CALL(B, G) (record_bytes<B, G>(w.cols))
  EP_INT_FORMATS(EP_CALL);
#undef EP_CALL
  return round_up(w.cols, 16) * 4 + (round_up(w.cols, 16) % 32 == 0 ? 64 : 0);
}

bool prepare(const ep_weight& w, const float* x, uint8_t* row) {
#define EP_CALL(B, G) (quantize_row<B, G>(x, w.cols, row))
  EP_INT_FORMATS(EP_CALL);
#undef EP_CALL
  float* out = reinterpret_cast<float*>(row);
  F poison = f_zero();
  int64_t c = 0;
  for (; c + 16 <= w.cols; c += 16) {
    const F v = f_load(x + c);
    poison = f_fma(v, f_zero(), poison);
    f_store(out + c, v);
  }
  if (c < w.cols) {
    float padded[16] = {};
    std::memcpy(padded, x + c, static_cast<size_t>(w.cols - c) * 4);
    const F v = f_load(padded);
    poison = f_fma(v, f_zero(), poison);
    f_store(out + c, v);
  }
  const bool finite = f_sum(poison) == 0.0f;
  if (!finite) out[0] = kQuietNan;
  return finite;
}

void rows(const RowsCall& call) {
  const ep_weight& w = *call.weight;
#define EP_CALL(B, G) (int_rows<B, G>(call))
  EP_INT_FORMATS(EP_CALL);
#undef EP_CALL
  float_rows(call);
}

// ---- elementwise ---------------------------------------------------------------------------------

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

// ---- attention -----------------------------------------------------------------------------------

inline void copy_padded(const float* from, int64_t n, float* to) {
  if (n == 0) return;
  std::memcpy(to, from, static_cast<size_t>(n) * 4);
  std::memset(to + n, 0, static_cast<size_t>(round_up(n, 16) - n) * 4);
}

inline void copy_padded(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f_store(to + i, f_from_bf16(from + i));
  for (; i < n; ++i) to[i] = bf16_to_float(from[i]);
  for (; i % 16 != 0; ++i) to[i] = 0.0f;
}

template <class Element>
inline void load_keys(const AttentionCall& call, int64_t row, int64_t rows, int64_t width, float* block) {
  for (int64_t s = 0; s < rows; ++s) {
    const Element* p = static_cast<const Element*>(call.keys) + (row + s) * call.key_stride;
    copy_padded(p, call.first_dim, block + s * width);
    copy_padded(p + call.first_dim, call.second_dim, block + s * width + round_up(call.first_dim, 16));
  }
}

// sums[h] = sums[h] * fade[h] + sum over rows of weight[h][row] * value row
template <int QUERIES>
inline void add_values(const float* values, int64_t stride, int64_t rows, const float (*weight)[kAttentionRows],
                       const float* fade, float* sums, int64_t wide) {
  for (int64_t c = 0; c < wide; c += 16) {
    F a[QUERIES];
#pragma GCC unroll 4
    for (int h = 0; h < QUERIES; ++h) a[h] = f_mul(f_load(sums + h * wide + c), f_set1(fade[h]));
    for (int64_t s = 0; s < rows; ++s) {
      const F v = f_load(values + s * stride + c);
#pragma GCC unroll 4
      for (int h = 0; h < QUERIES; ++h) a[h] = f_fma(f_set1(weight[h][s]), v, a[h]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < QUERIES; ++h) f_store(sums + h * wide + c, a[h]);
  }
}

// Turns scores [kAttentionRows] into exponentials; returns the factor for what was summed before.
inline float soften(float* scores, int64_t visible, float& top, float& total) {
  float most = top;
  for (int64_t s = 0; s < visible; ++s) most = scores[s] > most ? scores[s] : most;
  F sum = f_zero();
  for (int64_t s = 0; s < kAttentionRows; ++s) scores[s] = s < visible ? scores[s] - most : 0.0f;
  for (int64_t s = 0; s < kAttentionRows; s += 16) f_store(scores + s, f_exp(f_load(scores + s)));
  for (int64_t s = visible; s < kAttentionRows; ++s) scores[s] = 0.0f;
  for (int64_t s = 0; s < kAttentionRows; s += 16) sum = f_add(sum, f_load(scores + s));
  const float fade = f_sum(f_exp(f_set1(top - most))) / 16.0f;  // sixteen equal lanes: exact
  total = std::fma(total, fade, f_sum(sum));
  top = most;
  return fade;
}

// Online softmax over blocks of kAttentionRows keys, counted from the first key of the call.
void attention(const AttentionCall& call) {
  const int64_t width = round_up(call.first_dim, 16) + round_up(call.second_dim, 16);
  const int64_t wide = round_up(call.value_dim, 16);
  float* queries = call.scratch;
  float* block = queries + kAttentionQueries * width;
  float* sums = block + kAttentionRows * width;
  float* value_block = sums + kAttentionQueries * wide;
  const float* q[kAttentionQueries];
  int64_t keys = 0;
  for (int64_t h = 0; h < call.queries; ++h) {
    copy_padded(call.first[h], call.first_dim, queries + h * width);
    copy_padded(call.second[h], call.second_dim, queries + h * width + round_up(call.first_dim, 16));
    q[h] = queries + h * width;
    call.running[2 * h] = -INFINITY;
    call.running[2 * h + 1] = 0.0f;
    keys = call.visible[h] > keys ? call.visible[h] : keys;
  }
  std::memset(sums, 0, static_cast<size_t>(kAttentionQueries * wide) * 4);
  float weight[kAttentionQueries][kAttentionRows], fade[kAttentionQueries];
  F acc[4 * kAttentionQueries];
  for (int64_t first = 0; first < keys; first += kAttentionRows) {
    const int64_t rows_here = min_of(kAttentionRows, keys - first);
    if (call.keys_are_bf16) {
      load_keys<uint16_t>(call, first, rows_here, width, block);
    } else {
      load_keys<float>(call, first, rows_here, width, block);
    }
    for (int64_t s = 0; s < rows_here; s += 4) {
      const int64_t part = min_of(4, rows_here - s);
      for (auto& a : acc) a = f_zero();
      dot_block(block + s * width, width, part, q, call.queries, 0, width, acc, kAttentionQueries);
      for (int64_t r = 0; r < part; ++r) {
        for (int64_t h = 0; h < call.queries; ++h) weight[h][s + r] = f_sum(acc[r * kAttentionQueries + h]) * call.scale;
      }
    }
    for (int64_t h = 0; h < call.queries; ++h) {
      const int64_t seen = call.visible[h] - first;
      const int64_t visible = seen < 0 ? 0 : min_of(seen, rows_here);
      fade[h] = visible == 0 ? 1.0f : soften(weight[h], visible, call.running[2 * h], call.running[2 * h + 1]);
      if (visible == 0) std::memset(weight[h], 0, sizeof(weight[h]));
    }
    const float* values = block;
    int64_t stride = width;
    if (call.values != nullptr) {
      for (int64_t s = 0; s < rows_here; ++s) {
        copy_padded(call.values + (first + s) * call.value_stride, call.value_dim, value_block + s * wide);
      }
      values = value_block;
      stride = wide;
    }
    int64_t h = 0;
    for (; h + 4 <= call.queries; h += 4) {
      add_values<4>(values, stride, rows_here, weight + h, fade + h, sums + h * wide, wide);
    }
    for (; h < call.queries; ++h) {
      add_values<1>(values, stride, rows_here, weight + h, fade + h, sums + h * wide, wide);
    }
  }
  for (int64_t h = 0; h < call.queries; ++h) {
    std::memcpy(call.out[h], sums + h * wide, static_cast<size_t>(call.value_dim) * 4);
  }
}

// The fastest way to read that was found here: as many streams as the kernels keep, asked for ahead of time.
uint64_t read_bytes(const uint8_t* p, int64_t n) {
  constexpr int kWords = 8;
  uint64_t lanes[kStreams][kWords] = {};
  const int64_t part = n / kStreams / 64 * 64;
  for (int64_t i = 0; i < part; i += 64) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* from = p + s * part + i;
      __builtin_prefetch(from + kAhead);  // with nothing to compute, asking ahead is faster
#pragma GCC unroll 8
      for (int j = 0; j < kWords; ++j) lanes[s][j] ^= element<uint64_t>(from, j);
    }
  }
  uint64_t total = 0;
  for (const auto& stream : lanes) {
    for (const uint64_t lane : stream) total ^= lane;
  }
  return total;
}

}  // namespace

#define EP_ISA_TABLE(NAME)                                                                     \
  {NAME,     act_bytes, prepare, rows,      decode,    silu_mul, sigmoid, rms_norm, axpy, add_rows, \
   attention, read_bytes}
