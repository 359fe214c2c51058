"""Which resident expert is worth least: the replacement policies.

Owns the value that a policy gives to every expert of a model. Must not know slots, pins, files or
time: `residency` evicts the resident expert of lowest value among those it may evict.

A policy sees the routing of every MoE layer, in the order of execution, hits and misses alike, so
what it learns does not depend on the size of the cache. Values of different layers are compared
with each other; frequencies are therefore rates per token, each layer on its own clock, and a layer
that has already run in this step has no advantage over one that has not.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from offload.errors import UsageError

LEARNING = "ema+tokens"
"""The policy that learns from tokens and their routing, the runtime's default; what the others count takes no time."""

HALF_LIVES = {"ema": 32.0, LEARNING: 60.0}
"""Tokens after which a use counts half: of the policies that have such a number, what it is unless another is given.
Of the three of `ema+tokens` it is the middle one."""

Routing = Sequence[Sequence[int]]
"""Expert ids of one layer, [T, K]: what the router chose for each token of the step."""


@dataclass(frozen=True)
class CacheShape:
    """The sizes of a model that a cache depends on. Layers are MoE layers, counted from 0."""

    layers: int
    experts: int
    top_k: int

    @property
    def keys(self) -> int:
        """Number of experts in all; the key of an expert is `layer * experts + expert`."""
        return self.layers * self.experts


class CachePolicy(ABC):
    """Keeps `values` [layers, experts], floats and all finite: the higher, the longer an expert stays."""

    name: ClassVar[str]
    floor_share: ClassVar[float] = 1.0
    """Share of the slots that the floors of layers may take up. Values that compare uses of different layers
    need a small one only: where slots are scarce, a floor keeps what another layer needs sooner."""
    values: NDArray[Any]
    half_life: float | None = None
    """Tokens after which a use counts half; None for a policy without such a number."""
    revision: int = 0
    """Counts how often, within steps, values of other layers than the one observed have changed."""

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self.values = np.zeros((shape.layers, shape.experts))

    def begin_step(self, tokens: Sequence[int], upcoming: Sequence[int] = ()) -> bool:
        """A forward pass over `tokens` begins; their ids are known before any layer runs.

        `upcoming`: ids of the tokens after them, as far as they are known (the rest of a prompt, a
        draft). Returns whether any value changed.
        """
        return False

    @abstractmethod
    def observe(self, layer: int, ids: Routing) -> None:
        """The router of `layer` chose `ids`; called before victims are chosen for that layer.

        If values of other layers change as well, `revision` is raised.
        """

    def learn(self, tokens: Sequence[int], routing: Sequence[Routing]) -> None:
        """A pass over `tokens` has used `routing` in its first layers, and nothing had to be decided.

        Leaves behind the `state` that `begin_step` and `observe` would, but `values` may be out of date until the next
        `begin_step`.
        """
        self.begin_step(tokens)
        for layer, ids in enumerate(routing):
            self.observe(layer, ids)

    def evicted(self, layer: int, expert: int) -> None:  # noqa: B027 - most policies do not care
        """An expert has lost its slot. If its value changes, `revision` is raised: another tier may hold it."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays worth keeping for the next start; nothing by default."""
        return {}

    def restore(self, state: dict[str, NDArray[Any]]) -> None:  # noqa: B027 - nothing to restore
        """Take over what `state` of the same model and policy returned."""


def flat_ids(ids: Routing) -> NDArray[np.intp]:
    """All expert ids of a step, repeated as often as they were chosen."""
    return np.asarray(ids, dtype=np.intp).reshape(-1)


class LeastRecentlyUsed(CachePolicy):
    """Value = time of the last use, in layer executions.

    What a step of many tokens loads enters at the cold end: a sweep over all experts replaces
    itself and leaves the decode set alone. Experts it finds resident count as used.
    """

    name = "lru"

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        self._clock = 0

    def observe(self, layer: int, ids: Routing) -> None:
        self._clock += 1
        row = self.values[layer]
        if len(ids) == 1:
            for expert in ids[0]:
                row[expert] = self._clock
            return
        used = np.unique(flat_ids(ids))
        row[used] = np.where(row[used] > 0, self._clock, 0)

    def evicted(self, layer: int, expert: int) -> None:
        self.values[layer, expert] = 0.0
        self.revision += 1


class LeastFrequentlyUsed(CachePolicy):
    """Value = uses per token since the start, never forgotten."""

    name = "lfu"

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        self._counts = np.zeros((shape.layers, shape.experts))
        self._tokens = [0] * shape.layers

    def observe(self, layer: int, ids: Routing) -> None:
        counts = self._counts[layer]
        self._tokens[layer] += len(ids)
        if len(ids) == 1:
            for expert in ids[0]:
                counts[expert] += 1.0
        else:
            counts += np.bincount(flat_ids(ids), minlength=self.shape.experts)
        np.multiply(counts, 1.0 / self._tokens[layer], out=self.values[layer])


class DecayedFrequency(CachePolicy):
    """Value = uses per token, exponentially forgotten with a half-life in tokens."""

    name = "ema"

    def __init__(self, shape: CacheShape, half_life: float = HALF_LIVES["ema"]) -> None:
        super().__init__(shape)
        self.half_life = half_life
        self._keep = 0.5 ** (1.0 / half_life)
        self._gain = 1.0 - self._keep

    def observe(self, layer: int, ids: Routing) -> None:
        row = self.values[layer]
        if len(ids) == 1:
            row *= self._keep
            for expert in ids[0]:
                row[expert] += self._gain
            return
        row *= self._keep ** len(ids)
        row += self._gain * _decayed_counts(ids, self._keep, self.shape.experts)

    def state(self) -> dict[str, NDArray[Any]]:
        return {"rate": self.values.astype(np.float32)}

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        self.values[...] = state["rate"]


def _decayed_counts(ids: Routing, keep: float, experts: int) -> NDArray[np.float64]:
    """Uses per expert over the step, a token `n` places before the last weighted by keep**n."""
    tokens = len(ids)
    weight = keep ** np.arange(tokens - 1, -1, -1, dtype=np.float64)
    used = np.asarray(ids, dtype=np.intp)
    counts: NDArray[np.float64] = np.zeros(experts)
    np.add.at(counts, used.reshape(-1), np.repeat(weight, used.shape[1]))
    return counts


NEVER = -1e15
"""Value of an expert that will not be used again."""


class Belady(CachePolicy):
    """The optimum for replay: value = minus the time of the next use, which must be known.

    L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
    """

    name = "belady"

    def __init__(self, shape: CacheShape, future: Sequence[Sequence[Routing]] = ()) -> None:
        """`future`: for every step to come, the routing of every layer."""
        super().__init__(shape)
        if not future:
            raise UsageError("the policy 'belady' needs the future; it can only replay a trace")
        self._uses: list[list[int]] = [[] for _ in range(shape.keys)]
        for step in range(len(future) - 1, -1, -1):
            for layer, ids in enumerate(future[step]):
                when = step * shape.layers + layer
                for expert in {expert for row in ids for expert in row}:
                    self._uses[layer * shape.experts + expert].append(when)
        self._steps = [0] * shape.layers
        self.values.fill(NEVER)
        flat = self.values.reshape(-1)
        for key, uses in enumerate(self._uses):
            if uses:
                flat[key] = -uses[-1]

    def observe(self, layer: int, ids: Routing) -> None:
        now = self._steps[layer] * self.shape.layers + layer
        self._steps[layer] += 1
        row = self.values[layer]
        for expert in {expert for token in ids for expert in token}:
            uses = self._uses[layer * self.shape.experts + expert]
            if not uses or uses.pop() != now:
                raise UsageError("the replay left the trace that the policy 'belady' was built on")
            row[expert] = -uses[-1] if uses else NEVER


def _expected_use(shape: CacheShape, **options: Any) -> CachePolicy:
    from offload.cache.expected_use import ExpectedUse

    return ExpectedUse(shape, **options)


POLICIES: dict[str, Callable[..., CachePolicy]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "ema": DecayedFrequency,
    LEARNING: _expected_use,
    "belady": Belady,
}


def check_half_life(half_life: object, policy: str) -> None:
    """Raises UsageError unless `half_life` is a number of tokens above 0 and the policy called `policy` has one."""
    if type(half_life) not in (int, float) or not 0 < half_life <= sys.float_info.max:  # type: ignore[operator]
        raise UsageError(f"half_life is {half_life!r}: it must be a number of tokens larger than 0, as 64")
    if policy not in HALF_LIVES:
        raise UsageError(
            f"half_life is {half_life!r}, and the policy {policy} has none; those that have: {', '.join(HALF_LIVES)}"
        )


def create_policy(name: str, shape: CacheShape, half_life: float | None = None, **options: Any) -> CachePolicy:
    """The policy called `name`. Raises UsageError with the known names, and for a `half_life` it cannot use."""
    if name not in POLICIES:
        raise UsageError(f"unknown cache policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    if half_life is not None:
        check_half_life(half_life, name)
        options["half_life"] = half_life
    return POLICIES[name](shape, **options)
