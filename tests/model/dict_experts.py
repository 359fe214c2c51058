"""`RoutedExperts` over a dict: every expert in memory, nothing paged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload.kernels import Kernels
from offload.quant import QuantizedTensor


@dataclass(frozen=True)
class Expert:
    gate_proj: QuantizedTensor
    up_proj: QuantizedTensor
    down_proj: QuantizedTensor
    buffer: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))


class DictExperts:
    """Computes experts one by one; notes every call for the tests."""

    def __init__(self, kernels: Kernels, experts: dict[tuple[int, int], Expert]) -> None:
        self.kernels = kernels
        self.experts = experts
        self.steps: list[list[int]] = []
        self.calls: list[tuple[int, Tensor]] = []
        self.hints: list[tuple[int, Tensor]] = []
        self.preferred: dict[int, Tensor] = {}
        self.ahead = 0
        self.expected: list[tuple[int, list[int]]] = []

    def begin_step(self, tokens: Sequence[int]) -> None:
        self.steps.append(list(tokens))

    def preference(self, layer: int, ids: Tensor) -> Tensor | None:
        return self.preferred.get(layer)

    def hint(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        self.hints.append((layer, ids))

    def lookahead(self) -> int:
        return self.ahead

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        self.expected.append((layer, list(experts)))

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.calls.append((layer, ids))
        k = ids.shape[1]
        partial = torch.full((ids.numel(), x.shape[1]), torch.nan)  # a forgotten position would show
        for expert in ids.unique().tolist():
            positions = (ids.flatten() == expert).nonzero().flatten()
            self.kernels.experts(x, [(self.experts[layer, expert], positions)], k, partial)
        return self.kernels.combine(partial, ids, weights)
