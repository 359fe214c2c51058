// Softmax attention of a tile of queries over one range of keys. Part of kernels.h.
#pragma once
#include "elementwise.h"

namespace {

using ep::AttentionCall;
using ep::kAttentionQueries;
using ep::kAttentionRows;

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

// sums[h] = sums[h] * fade[h] + sum over rows of weight[h][row] * value row, for VECTORS vectors of columns from c on
template <int QUERIES, int VECTORS>
inline void add_columns(const float* values, int64_t stride, int64_t rows, const float (*weight)[kAttentionRows],
                        const float* fade, float* sums, int64_t wide, int64_t c) {
  F a[QUERIES][VECTORS];
#pragma GCC unroll 4
  for (int h = 0; h < QUERIES; ++h) {
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) a[h][i] = f_mul(f_load(sums + h * wide + c + 16 * i), f_set1(fade[h]));
  }
  for (int64_t s = 0; s < rows; ++s) {
    F v[VECTORS];
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) v[i] = f_load(values + s * stride + c + 16 * i);
#pragma GCC unroll 4
    for (int h = 0; h < QUERIES; ++h) {
      const F factor = f_set1(weight[h][s]);
#pragma GCC unroll 2
      for (int i = 0; i < VECTORS; ++i) a[h][i] = f_fma(factor, v[i], a[h][i]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < QUERIES; ++h) {
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) f_store(sums + h * wide + c + 16 * i, a[h][i]);
  }
}

template <int QUERIES>
inline void add_values(const float* values, int64_t stride, int64_t rows, const float (*weight)[kAttentionRows],
                       const float* fade, float* sums, int64_t wide) {
  int64_t c = 0;
  for (; c + 16 * kValueVectors <= wide; c += 16 * kValueVectors) {
    add_columns<QUERIES, kValueVectors>(values, stride, rows, weight, fade, sums, wide, c);
  }
  for (; c < wide; c += 16) add_columns<QUERIES, 1>(values, stride, rows, weight, fade, sums, wide, c);
}

inline bool whole_lanes(int64_t n) { return n % 16 == 0; }

// Turns scores [kAttentionRows] into exponentials; returns the factor for what was summed before.
inline float soften(float* scores, int64_t visible, float& top, float& total) {
  for (int64_t s = visible; s < kAttentionRows; ++s) scores[s] = -INFINITY;
  F most_lanes = f_set1(top);
  for (int64_t s = 0; s < kAttentionRows; s += 16) most_lanes = f_max(f_load(scores + s), most_lanes);  // NaN is no maximum
  const float most = f_most(most_lanes);
  F sum = f_zero();
  for (int64_t s = 0; s < kAttentionRows; s += 16) f_store(scores + s, f_exp(f_sub(f_load(scores + s), f_set1(most))));
  for (int64_t s = visible; s < kAttentionRows; ++s) scores[s] = 0.0f;
  for (int64_t s = 0; s < kAttentionRows; s += 16) sum = f_add(sum, f_load(scores + s));
  float fade = 1.0f;
  if (most != top) fade = f_sum(f_exp(f_set1(top - most))) / 16.0f;  // sixteen equal lanes: exact
  total = std::fma(total, fade, f_sum(sum));
  top = most;
  return fade;
}

// The keys [first, last): rows are too short for the processor to foresee those of the next block. `steps`: in how
// many they are asked for.
inline Ahead keys_ahead(const AttentionCall& call, int64_t first, int64_t last, int64_t steps) {
  if (first >= last || call.values != nullptr) return {};
  const int64_t bytes = call.key_stride * (call.keys_are_bf16 ? 2 : 4);
  const uint8_t* keys = static_cast<const uint8_t*>(call.keys);
  const int64_t lines = ceil_div((last - first) * bytes, 64);
  return {keys + first * bytes, keys + last * bytes, static_cast<int>(ceil_div(lines, steps))};
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
  std::memset(sums, 0, static_cast<size_t>(call.queries * wide) * 4);
  float weight[kAttentionQueries][kAttentionRows], fade[kAttentionQueries];
  F acc[4 * kAttentionQueries];
  // Keys of whole lanes are read where they lie.
  const bool in_place = !call.keys_are_bf16 && whole_lanes(call.first_dim) && whole_lanes(call.second_dim);
  for (int64_t first = 0; first < keys; first += kAttentionRows) {
    const int64_t rows_here = min_of(kAttentionRows, keys - first);
    const float* rows = block;
    int64_t row_stride = width;
    if (in_place) {
      rows = static_cast<const float*>(call.keys) + first * call.key_stride;
      row_stride = call.key_stride;
    } else if (call.keys_are_bf16) {
      load_keys<uint16_t>(call, first, rows_here, width, block);
    } else {
      load_keys<float>(call, first, rows_here, width, block);
    }
    for (int64_t s = 0; s < rows_here; s += 4) {
      const int64_t part = min_of(4, rows_here - s), next = first + kAttentionRows + s;
      const Ahead ahead = keys_ahead(call, next, min_of(keys, next + 4), ceil_div(call.queries, kDotTokens) * width / 16);
      for (int64_t r = 0; r < 4; ++r) {
        for (int64_t h = 0; h < call.queries; ++h) acc[r * kAttentionQueries + h] = f_zero();
      }
      dot_block(rows + s * row_stride, row_stride, part, q, call.queries, 0, width, acc, kAttentionQueries, ahead);
      for (int64_t h = 0; h < call.queries; ++h) {
        float scores[4];
        const F* a = acc + h;
        f_sum4(a[0], a[kAttentionQueries], a[2 * kAttentionQueries], a[3 * kAttentionQueries], scores);
        for (int64_t r = 0; r < part; ++r) weight[h][s + r] = scores[r] * call.scale;
      }
    }
    for (int64_t h = 0; h < call.queries; ++h) {
      const int64_t seen = call.visible[h] - first;
      const int64_t visible = seen < 0 ? 0 : min_of(seen, rows_here);
      fade[h] = visible == 0 ? 1.0f : soften(weight[h], visible, call.running[2 * h], call.running[2 * h + 1]);
      if (visible == 0) std::memset(weight[h], 0, sizeof(weight[h]));
    }
    const float* values = rows;
    int64_t stride = row_stride;
    if (call.values != nullptr && whole_lanes(call.value_dim)) {
      values = call.values + first * call.value_stride;
      stride = call.value_stride;
    } else if (call.values != nullptr) {
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

}  // namespace
