"""What the GPU kernels will use: every launch of a DeepSeek-V3 layer, compiled for every architecture.

`python -m benchmarks.gpu_kernels` needs no GPU. It compiles what `TritonKernels` would start on true shapes, prints
grid, registers, local memory (spills) and shared memory of each launch and appends a row with all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from benchmarks import record
from offload.kernels import ExpertSlab, RouterShape
from offload.kernels.triton.backend import TritonKernels
from offload.kernels.triton.compiled import ARCHITECTURES, Compiler, Usage
from offload.quant import QuantizedTensor, get_codec
from offload.store.layout import ExpertLayout

HIDDEN, WIDTH, HEADS, RANK, ROPE, NOPE, VALUE, Q_RANK, EXPERTS, TOP_K = 7168, 2048, 128, 512, 64, 128, 128, 1536, 256, 8
CONTEXT = 32768
SLOTS = 400
RESIDENT = {
    "q_a_proj": (Q_RANK, HIDDEN),
    "q_b_proj": (HEADS * (NOPE + ROPE), Q_RANK),
    "kv_a_proj_with_mqa": (RANK + ROPE, HIDDEN),
    "o_proj": (HIDDEN, HEADS * VALUE),
}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(codec: str, rows: int, cols: int) -> QuantizedTensor:
    c = get_codec(codec)
    return QuantizedTensor(c, rows, cols, {p.suffix: empty(*p.shape, dtype=p.dtype) for p in c.parts(rows, cols)})


def layer(architecture: int, tokens: int, experts: str, resident: str) -> list[Usage]:
    """Every launch of one MoE layer for a step of `tokens` tokens, in order."""
    compiler = Compiler(architecture)
    kernels = TritonKernels(compiler)
    x = empty(tokens, HIDDEN)
    kernels.rms_norm(x, empty(HIDDEN), 1e-6)
    for rows, cols in RESIDENT.values():
        kernels.linear(empty(tokens, cols), weight(resident, rows, cols))
    kernels.rope(empty(tokens, HEADS, ROPE), empty(tokens, ROPE // 2), empty(tokens, ROPE // 2))
    kv_b = weight(resident, HEADS * (NOPE + VALUE), RANK)
    kernels.absorb_query(empty(tokens, HEADS, NOPE), kv_b)
    latent = empty(tokens, HEADS, RANK)
    cache = empty(CONTEXT + tokens, RANK + ROPE, dtype=torch.bfloat16)
    kernels.mla_absorbed(latent, empty(tokens, HEADS, ROPE), cache, CONTEXT, 0.1)
    kernels.expand_value(latent, kv_b, VALUE)
    if tokens > 4:
        q = empty(tokens, HEADS, NOPE + ROPE)
        kernels.attend(q, q, empty(tokens, HEADS, VALUE), 0, 0.1)
    kernels.router(x, empty(EXPERTS, HIDDEN), empty(EXPERTS), RouterShape(TOP_K, 8, 4, True, 2.5))
    up, down = weight(resident, WIDTH, HIDDEN), weight(resident, HIDDEN, WIDTH)
    kernels.swiglu_mlp(x, up, weight(resident, WIDTH, HIDDEN), down)
    layout = ExpertLayout(get_codec(experts), HIDDEN, WIDTH)
    slab = ExpertSlab(layout, empty(SLOTS, layout.slot_nbytes, dtype=torch.uint8))
    partial = empty(tokens * TOP_K, HIDDEN)
    kernels.slot_experts(slab, x, empty(tokens * TOP_K, dtype=torch.int32), partial)
    kernels.combine(partial, empty(tokens, TOP_K, dtype=torch.int64), empty(tokens, TOP_K))
    return compiler.launches


def main(architectures: Sequence[int] = ARCHITECTURES) -> None:
    rows = []
    for architecture in architectures:
        for tokens, experts, resident in (
            (1, "int4-g32", "int8-g128"),
            (1, "fp8", "fp8"),
            (1, "int8-g128", "int4-g32"),
            (1, "nf4-b64", "int8-g128"),
            (1, "int3-g32", "int8-g128"),
            (1, "int2-g32", "int8-g128"),
            (16, "int4-g32", "int8-g128"),
            (512, "int4-g32", "int8-g128"),
            (4096, "int4-g32", "fp8"),
        ):
            for use in layer(architecture, tokens, experts, resident):
                row = {"tokens": tokens, "experts": experts, "resident": resident} | vars(use)
                rows.append(row)
                print(
                    f"sm_{architecture} {tokens:5} {experts:10} {resident:10} {use.kernel:24} {use.grid!s:16} "
                    f"warps {use.warps} registers {use.registers:3} local {use.local_bytes} shared {use.shared_bytes}",
                    flush=True,
                )
    numbers = {"triton": triton.__version__, "context": CONTEXT, "launches": rows}
    record.append("gpu_kernels", "python -m benchmarks.gpu_kernels", numbers)


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or ARCHITECTURES)
