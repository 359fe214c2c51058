"""The reference of the device kernels: plain torch, on whatever device the tensors are.

Owns the meaning of `DeviceKernels`. It looks at slots and positions on the host, so it waits for the
device; other backends must not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.kernels.device import FEW_TOKENS, LEAST_TILE, ExpertSlab, Groups, SlabLayout, check_alignment
from offload.kernels.reference import ReferenceKernels


class ReferenceDeviceKernels(ReferenceKernels):
    """`DeviceKernels` in torch. On the CPU, too: that is how tiers are tested without an accelerator."""

    latent_dtype = torch.float32
    uses_blas = True
    pass_lengths: tuple[int, ...] = (FEW_TOKENS, 16)

    def check_experts(self, layout: SlabLayout) -> None:
        check_alignment(layout)

    def slot_experts(self, slab: ExpertSlab, x: Tensor, slots: Tensor, partial: Tensor) -> None:
        k = slots.numel() // x.shape[0]
        used = [slot for slot in slots.unique().tolist() if slot >= 0]
        self.experts(x, [(slab.expert(slot), (slots == slot).nonzero().flatten()) for slot in used], k, partial)

    def tile_rows(self, layout: SlabLayout, tokens: int) -> int:
        return LEAST_TILE

    def group_input(self, layout: SlabLayout, x: Tensor) -> Tensor:
        return x

    def group_experts(self, slab: ExpertSlab, inputs: Tensor, groups: Groups, partial: Tensor) -> None:
        k = groups.order.numel() // inputs.shape[0]
        bounds: dict[int, tuple[int, int]] = {}
        for slot, first, end in zip(groups.slot.tolist(), groups.first.tolist(), groups.end.tolist(), strict=True):
            if slot >= 0:
                bounds.setdefault(slot, (first, end))
        wave = [(slab.expert(slot), groups.order[first:end].long()) for slot, (first, end) in bounds.items()]
        self.experts(inputs, wave, k, partial)

    def scratch_nbytes(self, tokens: int, heads: int, rank: int, limit: int) -> int:
        return 3 * 4 * tokens * heads * limit  # scores, masked, and their softmax

    def mla_at(
        self, q_latent: Tensor, q_rope: Tensor, cache: Tensor, start: Tensor, limit: int, scale: float
    ) -> Tensor:
        return self.mla_absorbed(q_latent, q_rope, cache[:limit], int(start), scale)
