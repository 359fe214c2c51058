// The kernels, written once over the sixteen-lane type F and the integer format steps of the
// simd_*.h that the unit included before. Everything an Isa table offers is defined here.
//
// Fixed arithmetic: a dot product of an integer format (EP_INT_FORMATS) is an exact int32 sum per group,
// converted to float and multiplied into lane (group mod 16) by one fma, for up to four bits in groups of 32,
// else into lane (group mod 8); of any other format, one fma per element into lane (column mod 16). Tiles differ
// with the number of tokens, this order does not.
#pragma once
#include "elementwise.h"
#include "float_rows.h"
#include "int_panels.h"
#include "softmax.h"

namespace {

// Returns CALL(format) where there is an integer format of that kind and group.
#define EP_INT_FORMATS(CALL)                                                   \
  if (w.kind == EP_INT4 && w.group == 32) return CALL(IntFormat<4, 32>);       \
  if (w.kind == EP_INT4 && w.group == 64) return CALL(IntFormat<4, 64>);       \
  if (w.kind == EP_INT4 && w.group == 128) return CALL(IntFormat<4, 128>);     \
  if (w.kind == EP_INT8 && w.group == 32) return CALL(IntFormat<8, 32>);       \
  if (w.kind == EP_INT8 && w.group == 64) return CALL(IntFormat<8, 64>);       \
  if (w.kind == EP_INT8 && w.group == 128) return CALL(IntFormat<8, 128>);     \
  if (w.kind == EP_INT3 && w.group == 32) return CALL(IntFormat<3, 32>);       \
  if (w.kind == EP_INT2 && w.group == 32) return CALL(IntFormat<2, 32>);       \
  if (w.kind == EP_NF4 && w.group == 64 && w.cols % 64 == 0) return CALL(Nf4Format)

int64_t act_bytes(const ep_weight& w) {
#define EP_CALL(...) (record_bytes<Shared<__VA_ARGS__>>(w.cols))
  EP_INT_FORMATS(EP_CALL);
#undef EP_CALL
  return round_up(w.cols, 16) * 4 + (round_up(w.cols, 16) % 32 == 0 ? 64 : 0);
}

bool prepare(const ep_weight& w, const float* x, uint8_t* row) {
#define EP_CALL(...) (quantize_row<Shared<__VA_ARGS__>>(x, w.cols, __VA_ARGS__::kOffset, row))
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
#define EP_CALL(...) (int_rows<__VA_ARGS__>(call))
  EP_INT_FORMATS(EP_CALL);
#undef EP_CALL
  float_rows(call);
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
