// The kernels for AVX2 on 256 bits.
#include "common.h"
#include "isa.h"
#if EP_X86
#pragma GCC target("avx2,fma,f16c")
#include "simd_avx2.h"
// kernels.h works on the lanes defined above.
#include "kernels.h"

namespace ep {
const Isa kAvx2 = EP_ISA_TABLE("avx2");
}
#endif
