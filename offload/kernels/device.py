"""What a backend for an accelerator offers beyond `Kernels`: experts in a slab of slots, no host in between.

Owns the slab (how experts lie in device memory) and the signatures that read it. A step whose experts are
all resident needs no host round trip: which slot holds an expert, and at which position the step stands,
are read on the device. Every backend promises:
- all tensors of a call are on one device, work is queued on its current stream, nothing waits for it;
- a row's bits depend on that row and on the number of tokens of the call only: not on which other rows
  the call computes, not on which slot an expert lies in, not on what else the slab holds.
Must not know which experts are where or why: the slot table is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from offload.errors import KernelError
from offload.kernels.api import Expert, Kernels
from offload.quant import Codec
from offload.types import ceil_div

FEW_TOKENS = 4
"""A step of so many tokens is decoding (one token, or a short draft to verify): backends may treat it otherwise."""


GPU_LATENT_DTYPE = torch.bfloat16
"""What the kernels of GPUs read cached latents as (`latent_dtype`), for those who plan where none can be loaded."""


LATENT_SPLIT = 256
"""Past tokens per program of a GPU's latent attention while decoding."""


def latent_scratch_nbytes(tokens: int, heads: int, rank: int, limit: int) -> int:
    """Bytes of its partial sums over a context of `limit` tokens: `scratch_nbytes` of GPUs, for those who plan too."""
    splits = ceil_div(limit, LATENT_SPLIT)
    return 4 * tokens * heads * splits * (rank + 2) if tokens <= FEW_TOKENS and splits > 1 else 0


class SlabLayout(Protocol):
    """The bytes of one routed expert; `offload.store.layout.ExpertLayout` is one."""

    def __hash__(self) -> int: ...
    @property
    def codec(self) -> Codec: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def stride(self) -> int:
        """Bytes of an expert."""
        ...

    @property
    def fields(self) -> Sequence[Any]:
        """Raw tensors with `projection`, `suffix`, `dtype`, `shape` and `offset` in bytes."""
        ...

    def views(self, buffer: Tensor) -> Expert:
        """The expert whose first byte is the first byte of `buffer`."""
        ...


@dataclass(frozen=True)
class ExpertSlab:
    """Experts in device memory: slot i begins at `data[i]` and holds one expert as the store lays it out.

    data uint8 [slots, pitch], pitch >= layout.stride and a multiple of 16, the first byte 16-byte aligned.
    Raises KernelError for anything else, and for sizes at which a scale would be misaligned.
    """

    layout: SlabLayout
    data: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        slots, pitch = self.data.shape
        if pitch < self.layout.stride or pitch % 16 or not self.data.is_contiguous() or self.data.data_ptr() % 16:
            raise KernelError(
                f"a slab of experts needs contiguous slots of at least {self.layout.stride} bytes, a multiple of 16; "
                f"these {slots} have {pitch}"
            )
        check_alignment(self.layout)

    @property
    def slots(self) -> int:
        return int(self.data.shape[0])

    def expert(self, slot: int) -> Expert:
        """The expert in `slot` as views."""
        return self.layout.views(self.data[slot])


def check_alignment(layout: SlabLayout) -> None:
    """Raise KernelError if a tensor of an expert begins where its elements are misaligned."""
    for item in layout.fields:
        if item.offset % item.dtype.itemsize:
            raise KernelError(
                f"{layout.codec.name} experts of {layout.hidden_size} x {layout.moe_intermediate_size} have "
                f"{item.suffix} at byte {item.offset}, where device kernels cannot read {item.dtype}; use --device "
                "cpu or convert them to int4-g32"
            )


LEAST_TILE = 16
"""Rows of the smallest tile that a backend may ask for."""


@dataclass(frozen=True)
class Groups:
    """Some experts of a slab with the positions of a pass that each computes, cut into tiles of up to `tile_rows`.

    Those of tile i are order[first[i]] up to order[min(first[i] + tile_rows, end[i])], all for the expert in slot[i];
    the tiles of an expert follow one another.
    """

    order: Tensor  # int32 [P], the positions of the whole pass, those of an expert side by side and ascending
    slot: Tensor  # int32 [tiles], -1: no work
    first: Tensor  # int32 [tiles]
    end: Tensor  # int32 [tiles], one past the last position of the expert
    tiles: int


class DeviceKernels(Kernels, Protocol):
    """A backend for tensors on an accelerator."""

    latent_dtype: torch.dtype
    """What attention reads cached latents as: keeping more of them would take memory and change nothing."""

    uses_blas: bool
    """Whether it multiplies with cuBLAS, which takes workspaces from the memory of the tensors and keeps them."""

    pass_lengths: tuple[int, ...]
    """Numbers of tokens, one for every choice of kernels that the length of a pass makes, ascending."""

    def check_experts(self, layout: SlabLayout) -> None:
        """Raise KernelError, saying what to do, if experts of this layout cannot be read in a slab."""
        ...

    def slot_experts(self, slab: ExpertSlab, x: Tensor, slots: Tensor, partial: Tensor) -> None:
        """partial[p] = expert in slot slots[p] (x[p // K]) for every position p = token * K + j.

        x [T, H]; slots int32 [T * K], -1 where the expert is not in this slab: that row of `partial`
        [T * K, H] is left as it is. Many tokens or one, the call is the same.
        """
        ...

    def tile_rows(self, layout: SlabLayout, tokens: int) -> int:
        """Rows of a tile of `Groups` in a pass over `tokens`, more than FEW_TOKENS; at least LEAST_TILE."""
        ...

    def group_input(self, layout: SlabLayout, x: Tensor) -> Tensor:
        """x [T, H] as `group_experts` reads it: made once, however many launches a layer takes. [T, ..]."""
        ...

    def group_experts(self, slab: ExpertSlab, inputs: Tensor, groups: Groups, partial: Tensor) -> None:
        """`slot_experts` for more than FEW_TOKENS tokens whose positions are grouped already, with the same bits.

        inputs [T, ..] are `group_input`; partial [T * K, H]. Rows of positions in no tile are left as they are.
        """
        ...

    def scratch_nbytes(self, tokens: int, heads: int, rank: int, limit: int) -> int:
        """Device memory in bytes that `mla_at` and `mla_absorbed` take besides their result."""
        ...

    def mla_at(
        self, q_latent: Tensor, q_rope: Tensor, cache: Tensor, start: Tensor, limit: int, scale: float
    ) -> Tensor:
        """`mla_absorbed` at a position that only the device knows: start int32 [1].

        cache [C, R + D], C >= limit >= start + T. `limit` sizes the launch, never the result: a captured
        graph serves every step up to it.
        """
        ...
