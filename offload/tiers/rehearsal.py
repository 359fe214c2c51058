"""Routed experts of a rehearsal: their kernels run over whatever lies in the slots, and what comes out means nothing.

Nothing is read, decided, counted or learned. Must not know the layers around the experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from offload.kernels.device import DeviceKernels
from offload.tiers.vram import VramTier


class RehearsedExperts:
    """`RoutedExperts` with the kernels of a pass. `tiers` and `kernels` by MoE layer, the first of which is `first`."""

    def __init__(self, tiers: Sequence[VramTier], kernels: Sequence[DeviceKernels], first: int) -> None:
        self._tiers = tiers
        self._kernels = kernels
        self._first = first

    def begin_step(self, tokens: Sequence[int]) -> None:
        pass

    def preference(self, layer: int, ids: Tensor) -> Tensor | None:
        return None

    def hint(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        pass

    def lookahead(self) -> int:
        return 0

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        pass

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tier, kernels = self._tiers[layer - self._first], self._kernels[layer - self._first]
        with tier.device.guard():
            partial = tier.rehearse(layer - self._first, x, ids)
            return tier.device.call(lambda: kernels.combine(partial, ids, weights))
