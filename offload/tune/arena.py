"""The memory in which a probe measures.

Owns memory that is taken once. What a program gives back, the host of a virtual machine may take from it, and what is
measured meanwhile is slower: figures of kernels were 1.1 to 1.7 times as slow behind large tensors that were freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from offload.tiers.host import SlotPool
from offload.types import align_up

ALIGNMENT = 64
"""Bytes: a line of the caches."""

SWEPT = 256 << 20
"""Bytes: far more than the caches hold."""


class Arena:
    """Tensors side by side in one allocation, in memory like that of experts. `clear` begins anew."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = SlotPool(1, nbytes).bytes
        self._used = 0

    def clear(self) -> None:
        """All that was made here is over: its memory will be that of others."""
        self._used = 0

    def count(self, nbytes: int, most: int) -> int:
        """How many tensors of `nbytes` no cache holds, `most` at most; two at least if there is room."""
        return min(most, self.bytes.nbytes // nbytes, max(2, SWEPT // nbytes))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialized memory for a tensor."""
        nbytes = prod(shape) * dtype.itemsize
        begin, self._used = self._used, align_up(self._used + nbytes, ALIGNMENT)
        assert self._used <= self.bytes.nbytes, "whoever makes the arena knows what will be in it"
        return self.bytes[begin : begin + nbytes].view(dtype).view(*shape)


def repeat(part: Tensor, into: Tensor) -> None:
    """Fill `into` with `part`, over and over along the first dimension, without further memory."""
    for piece in into.split(part.shape[0]):
        piece.copy_(part[: piece.shape[0]])
