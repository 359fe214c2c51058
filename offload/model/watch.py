"""Seeing what a model asks of its routed experts.

Owns a `RoutedExperts` that shows every call to a watcher before it is carried out, and changes nothing. What is
watched is routed exactly, also where residents are preferred. Must not know what the watcher wants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from offload.model.moe import RoutedExperts

Watcher = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with the decoder layer's index, x [T, H], which is also what the router saw, ids [T, K] and weights [T, K]."""


class WatchedExperts:
    """`inner`, with `watcher` looking on."""

    def __init__(self, inner: RoutedExperts, watcher: Watcher) -> None:
        self._inner = inner
        self._watcher = watcher

    def begin_step(self, tokens: Sequence[int]) -> None:
        self._inner.begin_step(tokens)

    def preference(self, layer: int, ids: Tensor) -> Tensor | None:
        return None

    def hint(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        self._inner.hint(layer, ids, weights)

    def lookahead(self) -> int:
        return 0

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        self._inner.expect(layer, experts)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self._watcher(layer, x, ids, weights)
        return self._inner(layer, x, ids, weights)
