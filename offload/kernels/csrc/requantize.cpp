// Entry points of the grouped-integer encoder: choosing the instruction set, adding up the errors.
#include "requantize.h"

#include <cstring>

#if defined(_WIN32)
#define EP_EXPORT extern "C" __declspec(dllexport)
#else
#define EP_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

ep::RequantizeFn find(const char* isa) {
#if EP_REQUANTIZE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (std::strcmp(isa, "auto") == 0 || std::strcmp(isa, "avx512") == 0)) return ep::requantize_avx512;
  if (avx2 && (std::strcmp(isa, "auto") == 0 || std::strcmp(isa, "avx2") == 0)) return ep::requantize_avx2;
#endif
  if (std::strcmp(isa, "auto") == 0 || std::strcmp(isa, "portable") == 0) return ep::requantize_portable;
  return nullptr;
}

// Adds the upper half to the lower half until one value is left, as if zeros followed up to a power of two.
double fold(double* x, int64_t count) {
  int64_t half = 1;
  while (2 * half < count) half *= 2;
  for (; count > 1; count = half, half /= 2) {
    for (int64_t i = half; i < count; ++i) x[i - half] += x[i];
  }
  return count > 0 ? x[0] : 0.0;
}

}  // namespace

// Encodes a weight; `sums` gets the sums of squared differences and of squared weights. `work` holds
// 2 * rows * ceil(cols / 32) doubles. Returns 0, 1 for a weight that is NaN or infinite, -1 for arguments it does not
// know.
EP_EXPORT int32_t ep_requantize_groups(const char* isa, const void* weight, int32_t source, int64_t rows, int64_t cols,
                                       const float* scale, int64_t block_rows, int64_t block_cols, int32_t bits,
                                       int32_t group, int32_t search, uint32_t* packed, uint16_t* out_scale,
                                       double* work, double* sums) {
  const ep::RequantizeFn encode = find(isa);
  const bool known = ((bits >= 2 && bits <= 4) || bits == 8) && (group == 32 || group == 64 || group == 128) && source >= 0 && source <= 2;
  if (!encode || !known) return -1;
  const int64_t count = rows * ((cols + 31) / 32);
  const ep::RequantizeCall call = {weight,     static_cast<ep::RequantizeSource>(source),
                                   rows,       cols,
                                   scale,      block_rows,
                                   block_cols, search != 0,
                                   packed,     out_scale,
                                   work,       work + count};
  if (!encode(call, bits, group)) return 1;
  sums[0] = fold(work, count);
  sums[1] = fold(work + count, count);
  return 0;
}

EP_EXPORT int32_t ep_requantize_supports(const char* isa) { return find(isa) != nullptr; }
