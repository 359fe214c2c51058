"""Slabs of random experts for the tests of device kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from offload.kernels import ExpertSlab
from offload.quant import get_codec
from offload.store.layout import ExpertLayout
from offload.types import PROJECTIONS, align_up


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def random_slab(codec: str, hidden: int, width: int, slots: int, seed: int = 0, extra: int = 0) -> ExpertSlab:
    """`slots` different experts; `extra` bytes more than needed from one to the next."""
    layout = ExpertLayout(get_codec(codec), hidden, width)
    data = torch.randint(0, 256, (slots, align_up(layout.stride, 16) + extra), dtype=torch.uint8)
    for slot in range(slots):
        parts = {}
        for index, projection in enumerate(PROJECTIONS):
            rows, cols = layout.shape(projection)
            weight = draw(rows, cols, seed=seed + 3 * slot + index) / cols**0.5
            parts[projection] = layout.codec.encode(weight)
        for item in layout.fields:
            raw = parts[item.projection][item.suffix].contiguous().view(torch.uint8).flatten()
            data[slot, item.offset : item.offset + item.nbytes] = raw
    return ExpertSlab(layout, data)
