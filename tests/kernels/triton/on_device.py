"""Where the checks of this folder run: under Triton's interpreter on the CPU, else on the GPU."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from offload.kernels import ExpertSlab
from offload.kernels.reference_device import ReferenceDeviceKernels
from offload.kernels.triton.backend import TritonKernels
from offload.quant import QuantizedTensor, get_codec
from offload.store.layout import ExpertLayout
from offload.types import PROJECTIONS, align_up

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
KERNELS = TritonKernels()
REFERENCE = ReferenceDeviceKernels()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def weight(rows: int, cols: int, codec: str, seed: int = 0) -> QuantizedTensor:
    c = get_codec(codec)
    parts = c.encode(draw(rows, cols, seed=seed).cpu() / cols**0.5)
    return QuantizedTensor(c, rows, cols, {suffix: part.to(DEVICE) for suffix, part in parts.items()})


def random_slab(codec: str, hidden: int, width: int, slots: int, extra: int = 0) -> ExpertSlab:
    """`slots` different experts, `extra` random bytes between them."""
    layout = ExpertLayout(get_codec(codec), hidden, width)
    generator = torch.Generator().manual_seed(slots)
    data = torch.randint(0, 256, (slots, align_up(layout.stride, 16) + extra), dtype=torch.uint8, generator=generator)
    for slot in range(slots):
        parts = {p: weight(*layout.shape(p), codec, 3 * slot + i).parts for i, p in enumerate(PROJECTIONS)}
        for item in layout.fields:
            raw = parts[item.projection][item.suffix].contiguous().view(torch.uint8).flatten()
            data[slot, item.offset : item.offset + item.nbytes] = raw.cpu()
    return ExpertSlab(layout, data.to(DEVICE))


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).abs().max() / wanted.abs().max()
    assert error <= tolerance, f"relative to the largest value: {error:.2e}"


def same(got: Tensor, wanted: Tensor) -> None:
    """The same bits on a GPU. The interpreter's products are numpy's, whose last bits depend on a row's place."""
    if DEVICE == "cuda":
        assert torch.equal(got, wanted)
    else:
        close(got, wanted, 1e-6)
