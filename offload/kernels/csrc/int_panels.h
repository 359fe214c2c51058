// Integer formats: rows of one weight against many tokens. Part of kernels.h, which says in what order the terms are
// added.
#pragma once
#include "int_rows.h"

namespace {

#if EP_PANELS
// A panel holds kPanelRows rows side by side, one 32-bit word of codes each per register, so that the sums of a group
// need no horizontal additions: lane = row, and the lanes of the fixed arithmetic become separate accumulators. A panel
// is transposed once per block of columns and used by all tokens of a tile.
constexpr int kPanelTokens = 32;
constexpr int kPanelStep = 4;
// Whole records of every format; with 16 bits per code, half as many take the same room.
template <class Panel>
constexpr int kPanelColumns = Panel::kPanelBits == 16 ? 1024 : 2048;

template <class Panel>
struct PanelBlock {
  static constexpr int kGroups = kPanelColumns<Panel> / Panel::kGroup;
  alignas(64) uint8_t words[kPanelColumns<Panel> * Panel::kPanelBits / 8 * kPanelRows];
  alignas(64) float scales[kGroups * kPanelRows];
};

constexpr int kPanelStride = kPanelRows * 4;

// The codes of eight rows from `begin` bytes on, as they are; words behind the rows are zero.
inline void copy_words(const uint8_t** from, int64_t want, int64_t have, uint8_t* words) {
  int64_t at = 0;
  for (; at + 32 <= min_of(want, have); at += 32) transpose_8x8(from, at, words + at / 4 * kPanelStride, kPanelStride);
  if (at < want) {
    uint8_t padded[8][32] = {};
    for (int r = 0; r < 8; ++r) {
      if (at < have) std::memcpy(padded[r], from[r] + at, static_cast<size_t>(have - at));
      from[r] = padded[r];
    }
    transpose_8x8(from, 0, words + at / 4 * kPanelStride, kPanelStride);
  }
}

// The same for codes that panels hold in another form: kBytes of a row are kColumns columns, which Codes::expand turns
// into kVectors registers.
template <class Codes>
inline void expand_words(const uint8_t** from, int64_t columns, int64_t have, uint8_t* words) {
  uint8_t padded[8][Codes::kBytes];
  for (int64_t c = 0; c < columns; c += Codes::kColumns, have -= Codes::kBytes) {
    if (have < Codes::kBytes) {
      std::memset(padded, 0, sizeof(padded));
      for (int r = 0; r < 8; ++r) {
        std::memcpy(padded[r], from[r], static_cast<size_t>(have));
        from[r] = padded[r];
      }
    }
    __m256i vectors[Codes::kVectors][8];
    for (int r = 0; r < 8; ++r) {
      __m256i of_row[Codes::kVectors];
      Codes::expand(from[r], of_row);
#pragma GCC unroll 4
      for (int i = 0; i < Codes::kVectors; ++i) vectors[i][r] = of_row[i];
      from[r] += Codes::kBytes;
    }
    for (int i = 0; i < Codes::kVectors; ++i, words += 8 * kPanelStride) {
      __m256i a[8];
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) a[r] = vectors[i][r];
      transpose_8x8(a);
#pragma GCC unroll 8
      for (int w = 0; w < 8; ++w) _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + w * kPanelStride), a[w]);
    }
  }
}

// Columns [first, first + columns) of the panel's rows into `block`.
template <class Format>
void fill_panel(const Geometry<Format>& geometry, const int64_t* rows, int64_t first, int64_t columns,
                PanelBlock<Shared<Format>>& block) {
  const int64_t groups = ceil_div(columns, Format::kGroup), begin = first * Format::kBits / 8, have = geometry.row_bytes - begin;
  for (int half = 0; half < kPanelRows; half += 8) {
    const uint8_t* from[8];
    for (int r = 0; r < 8; ++r) from[r] = geometry.payload + rows[half + r] * geometry.row_bytes + begin;
    if constexpr (Format::kExpands) {
      expand_words<typename Format::Codes>(from, columns, have, block.words + half * 4);
    } else {
      copy_words(from, round_up(groups * Format::kGroup * Format::kBits / 8, 32), have, block.words + half * 4);
    }
  }
  for (int r = 0; r < kPanelRows; ++r) {
    const uint8_t* scales = geometry.row(rows[r]).scales + first / Format::kGroup * Format::kScaleBytes;
    for (int64_t g = 0; g < groups; ++g) block.scales[g * kPanelRows + r] = Format::scale(scales + g * Format::kScaleBytes);
  }
}

// kPanelStep tokens against one block; acc is [kLanes][kPanelStep] registers in memory.
template <class Panel>
void panel_step(const PanelBlock<Panel>& block, int64_t groups, const uint8_t* const* act, PanelFloat* acc) {
  constexpr int kWordBytes = Panel::kGroup * Panel::kPanelBits / 8 * kPanelRows;
  const uint8_t* rec[kPanelStep];
  for (int t = 0; t < kPanelStep; ++t) rec[t] = act[t];
  for (int64_t g = 0; g < groups;) {
    for (int i = 0; i < Panel::kGroups && g < groups; ++i, ++g) {
      PanelInt sums[kPanelStep];
      panel_sums<Panel::kPanelBits, Panel::kGroup, kPanelStep>(block.words + g * kWordBytes, rec, i, sums);
      const PanelFloat ws = panel_load(block.scales + g * kPanelRows);
      PanelFloat* lane = acc + g % kLanes<Panel> * kPanelStep;
      const int at = Panel::kCodeBytes + Panel::lane_of_group(i) * 4;
#pragma GCC unroll 8
      for (int t = 0; t < kPanelStep; ++t) {
        lane[t] = panel_accumulate(lane[t], sums[t], ws, rec[t] + at, rec[t] + at + Panel::kGroups * 4);
      }
    }
    for (auto& r : rec) r += Panel::kRecordBytes;
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

template <class Format>
void int_rows_many(const RowsCall& call) {
  using Panel = Shared<Format>;
  constexpr int kColumns = kPanelColumns<Panel>, kRecordsPerBlock = kColumns / (Panel::kGroups * Panel::kGroup);
  const Geometry<Format> geometry(*call.weight);
  PanelBlock<Panel> block;
  PanelFloat acc[kPanelTokens / kPanelStep][kLanes<Panel> * kPanelStep];
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
      for (int64_t c = 0; c < call.weight->cols; c += kColumns) {
        const int64_t columns = min_of(kColumns, call.weight->cols - c);
        fill_panel<Format>(geometry, rows, c, columns, block);
        for (int64_t m = 0; m < tokens; m += kPanelStep) {
          panel_step<Panel>(block, ceil_div(columns, Panel::kGroup), at + m, acc[m / kPanelStep]);
        }
        for (int64_t m = 0; m < round_up(tokens, kPanelStep); ++m) at[m] += kRecordsPerBlock * Panel::kRecordBytes;
      }
      for (int64_t m = 0; m < tokens; ++m) {
        float results[kPanelRows];
        panel_store(results, panel_total<kLanes<Panel>>(acc[m / kPanelStep] + m % kPanelStep));
        std::memcpy(call.out[t + m] + (n - call.base), results, static_cast<size_t>(min_of(kPanelRows, call.last - n)) * 4);
      }
    }
  }
}

// From how many tokens on a panel repays being filled. Without instructions for dot products of bytes four tokens at a
// time are faster at any number of them, but where codes take long to be taken apart, which a panel does once. With such
// instructions the sums across lanes weigh more; that was not measured.
constexpr int64_t kNever = INT64_MAX;
template <class Format>
constexpr int64_t kPanelsPay = !kInt8Deinterleave || Format::kBits == 8 ? 16 : Format::kBits == 3 || Format::kOffset == 0 ? 18 : kNever;
// Activations of eight-bit codes take two bytes there: those of four wide rows do not stay in the first-level cache.
template <class Format>
constexpr int64_t kPanelsPayColumns = kInt8Deinterleave && Format::kBits == 8 ? 4096 : 0;
#endif

template <class Format>
void int_rows(const RowsCall& call) {
#if EP_PANELS
  if constexpr (kPanelsPay<Format> != kNever) {
    if (call.tokens >= kPanelsPay<Format> && call.weight->cols > kPanelsPayColumns<Format>) return int_rows_many<Format>(call);
  }
#endif
  int_rows_by_four<Format>(call);
}

}  // namespace
