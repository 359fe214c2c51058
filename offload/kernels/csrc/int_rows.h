// Integer formats: rows of one weight against the records of up to four tokens. Part of kernels.h, which says in what
// order the terms are added.
#pragma once
#include "int_record.h"

namespace {

using ep::RowsCall;

template <class Format>
constexpr int kStepScaleBytes = Format::kGroups * Format::kScaleBytes;

// Scales are addressed in bytes: those of some formats lie at odd addresses.
struct WeightRow {
  const uint8_t *codes, *scales;
};

// Geometry of one weight: which steps read whole, and a zero padded copy of the last partial step.
template <class Format>
struct Geometry {
  explicit Geometry(const ep_weight& w)
      : payload(reinterpret_cast<const uint8_t*>(w.payload)),
        scale(reinterpret_cast<const uint8_t*>(w.scale)),
        row_bytes(packed_row_bytes(w.cols, Format::kBits)),
        groups(ceil_div(w.cols, Format::kGroup)),
        scale_bytes(groups * Format::kScaleBytes),
        whole(min_of(groups / Format::kGroups, row_bytes / Format::kWeightBytes)),
        steps(ceil_div(groups, Format::kGroups)) {}

  WeightRow row(int64_t n) const { return {payload + n * row_bytes, scale + n * scale_bytes}; }
  void copy_tail(int64_t n, uint8_t* codes, uint8_t* scales) const {
    const WeightRow w = row(n);
    std::memset(codes, 0, Format::kWeightBytes);
    std::memset(scales, 0, kStepScaleBytes<Format>);
    std::memcpy(codes, w.codes + whole * Format::kWeightBytes, static_cast<size_t>(row_bytes - whole * Format::kWeightBytes));
    const int64_t scales_before = whole * kStepScaleBytes<Format>;
    std::memcpy(scales, w.scales + scales_before, static_cast<size_t>(scale_bytes - scales_before));
  }

  const uint8_t* payload;
  const uint8_t* scale;
  int64_t row_bytes, groups, scale_bytes, whole, steps;
};

// One token costs its weights' way from memory. A core keeps enough cache lines under way when it reads four long
// streams, which the prefetchers of the hardware follow; asking for lines as well slows it down. Rows that lie side by
// side are short streams, lost at every end.
constexpr int kStreams = 4;
constexpr int64_t kFirstLevel = 32 << 10;  // bytes of the first-level cache
constexpr int64_t kAhead = 1024;  // bytes, where asking ahead does pay

// The last, partial step of NR rows. Whole groups are read where they lie; a group cut short, from a padded copy.
template <class Format, int MT, int NR>
inline void int_rows_tail(typename Format::Accumulator (*acc)[MT], const Geometry<Format>& geometry, int64_t n, int64_t apart,
                          const uint8_t* codes, const uint8_t* const* rec) {
  alignas(64) uint8_t last_scales[kStepScaleBytes<Format>] = {};
  const int64_t left = geometry.groups - geometry.whole * Format::kGroups;
  if constexpr (Format::kParts) {
    if (geometry.row_bytes == geometry.groups * Format::kGroup * Format::kBits / 8 && left % Format::kPartGroups == 0) {
      for (int r = 0; r < NR; ++r) {
        const uint8_t* scales = geometry.row(n + r * apart).scales + geometry.whole * kStepScaleBytes<Format>;
        if constexpr (!Format::kPartScales) {
          std::memcpy(last_scales, scales, static_cast<size_t>(left) * Format::kScaleBytes);
          scales = last_scales;
        }
        Format::template part<MT>(acc[r], codes + r * apart * geometry.row_bytes, scales, rec, static_cast<int>(left));
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

// NR rows, `apart` rows between them, against up to four tokens; every row is read once, front to back. As a call of its
// own it costs the streams of eight-bit rows a sixth of their speed.
template <class Format, int MT, int NR>
inline __attribute__((always_inline)) void int_rows_block(const RowsCall& call, const Geometry<Format>& geometry, int64_t n, int64_t apart) {
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
  const int64_t code_stride = apart * geometry.row_bytes, scale_stride = apart * geometry.scale_bytes;
  const uint8_t* codes = geometry.payload + n * geometry.row_bytes;
  const uint8_t* scales = geometry.scale + n * geometry.scale_bytes;
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
      scales += kStepScaleBytes<Format>;
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) rec[m] += Format::kRecordBytes;
      ++s;
    }
  }
  if (s < geometry.steps) {  // one call each: a computed index would keep the sums out of the registers
    if (kPhases == 1 || s % kPhases == 0) {
      int_rows_tail<Format, MT, NR>(acc[0], geometry, n, apart, codes, rec);
    } else {
      int_rows_tail<Format, MT, NR>(acc[kPhases - 1], geometry, n, apart, codes, rec);
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

template <class Format, int MT, int NR>
void int_rows_streams(const RowsCall& call, const Geometry<Format>& geometry) {
  const int64_t apart = (call.last - call.first) / NR;
  for (int64_t n = call.first; n < call.first + apart; ++n) int_rows_block<Format, MT, NR>(call, geometry, n, apart);
  for (int64_t n = call.first + NR * apart; n < call.last; ++n) int_rows_block<Format, MT, 1>(call, geometry, n, 1);
}

template <class Format, int MT>
void int_rows_few(const RowsCall& call) {
  const Geometry<Format> geometry(*call.weight);
  if constexpr (MT == 1 && Format::kBits == 8) {
    // The activations are read again with every row of the streams, and should still be in the first-level cache.
    const int64_t between = kStreams * geometry.row_bytes + geometry.steps * Format::kRecordBytes;
    if (between > kFirstLevel) return int_rows_streams<Format, MT, kStreams - 1>(call, geometry);
  }
  // More tokens need the registers, and more time per byte.
  int_rows_streams<Format, MT, MT == 1 ? kStreams : MT == 2 ? 2 : 1>(call, geometry);
}

// Up to four tokens at a time: the piece of the weight stays in the core's cache meanwhile.
template <class Format>
void int_rows_by_four(const RowsCall& call) {
  RowsCall part = call;
  for (int64_t t = 0; t < call.tokens; t += 4) {
    part.act = call.act + t;
    part.out = call.out + t;
    part.tokens = min_of(4, call.tokens - t);
    switch (part.tokens) {
      case 1: int_rows_few<Format, 1>(part); break;
      case 2: int_rows_few<Format, 2>(part); break;
      case 3: int_rows_few<Format, 3>(part); break;
      default: int_rows_few<Format, 4>(part);
    }
  }
}

}  // namespace
