// The kernels for AVX2 with VNNI on 256 bits.
#include "common.h"
#include "isa.h"
#if EP_X86
#pragma GCC target("avx2,fma,f16c,avxvnni")
#define EP_VNNI256
#include "simd_avx2.h"
// kernels.h works on the lanes defined above.
#include "kernels.h"

namespace ep {
const Isa kAvxVnni = EP_ISA_TABLE("avxvnni");
}
#endif
