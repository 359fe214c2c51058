// Integer formats: rows of one weight against activation records, few tokens by rows, many by panels. Part of kernels.h,
// which says in what order the terms are added.
#pragma once
#include "int_record.h"

namespace {

using ep::RowsCall;

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

}  // namespace
