"""Which experts to read before they are demanded, and whether that pays.

Owns the candidates for speculative reads and the record of how they turned out. Must not know slots or
reads: residency says which of its wishes can be granted, the executor grants them while the drive idles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offload.cache.policy import CachePolicy
from offload.cache.predictor import TokenTable
from offload.telemetry import CacheEvents

EARLY_ROUTERS = 1
"""Layers ahead for which a router is applied early, unless told otherwise. The second costs as much and is right less
often."""

LEAST_ABSENT = 0.1
"""Demands per layer whose expert is not at hand, below which early routers cost more than they save: a router of
DeepSeek-V3 takes the processor about a tenth of the time that reading an expert takes the drive."""

ABSENT_GAIN = 0.15
"""Weight of the last step in the mean of those demands."""


@dataclass(frozen=True)
class LookAheadLimits:
    """When speculation is worth a read."""

    start: float = 0.8
    """Least probability of use."""
    step: float = 0.05
    """The probability asked for rises by so much when too much was wasted."""
    last: float = 0.95
    """Beyond it speculation ends."""
    useful: float = 0.67
    """Least share of speculative reads that must have been demanded: one that is saves a wait at best, one that is not
    costs as long a read, and what it displaced."""
    waste: float = 0.08
    """Largest share of all reads that may be wasted."""
    sample: int = 48
    """Outcomes looked at together."""


class LookAhead:
    """Candidates per layer from the token table and from routers applied early.

    Switches itself off, with a reason, when too many of its reads turn out to be useless.
    """

    def __init__(
        self, policy: CachePolicy, limits: LookAheadLimits = LookAheadLimits(), prefetch_depth: int = EARLY_ROUTERS
    ) -> None:
        """`prefetch_depth`: layers ahead for which routers are applied early; 0: the token table is all there is."""
        self.prefetch_depth = prefetch_depth
        self._table: TokenTable | None = getattr(policy, "table", None)
        self._layers = policy.shape.layers
        self._limits = limits
        self._asked = limits.start
        self._ranks = policy.shape.top_k
        self._useful = self._wasted = self._reads = 0
        self._likely: list[list[int]] = []
        self._expected: dict[int, list[int]] = {}
        self._single = False
        self._absent = 0
        self._absent_per_layer = 1.0
        self.off_reason: str | None = None
        self._foretold = self._right = 0

    @property
    def right(self) -> float | None:
        """Share of the experts that routers applied early named and that were then chosen, as far as `routed` was
        told; None if nothing was."""
        return self._right / self._foretold if self._foretold else None

    @property
    def early_routers(self) -> int:
        """For how many layers ahead `expect` is of use in this step.

        None in a prefill, where next to nothing has been missing lately, or once switched off.
        """
        worthwhile = self._single and self._absent_per_layer >= LEAST_ABSENT
        return self.prefetch_depth if worthwhile and self.off_reason is None else 0

    def begin_step(self, tokens: Sequence[int], absent: int | None = None) -> None:
        """A forward pass begins. Only passes of one token leave the drive idle.

        `absent`: how many demands, in all until now, were for an expert that had to be fetched, ahead of time or
        not; None where that is unknown.
        """
        if absent is not None:
            if self._single:
                now = (absent - self._absent) / self._layers
                self._absent_per_layer += ABSENT_GAIN * (now - self._absent_per_layer)
            self._absent = absent
        self._expected.clear()
        self._likely = []
        self._single = len(tokens) == 1
        if self._table is not None and self.off_reason is None and self._single:
            likely = self._table.likely(tokens[0], self._asked)
            self._likely = [[expert for expert, _ in row] for row in likely]

    def forget(self, known: Callable[[int, int], bool]) -> None:
        """Of what the token table expects of this step, only that is of interest of which `known` is False."""
        likely = [[expert for expert in row if not known(layer, expert)] for layer, row in enumerate(self._likely)]
        self._likely = likely if any(likely) else []

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """A router applied early chose `experts` for `layer`, best first."""
        self._expected[layer] = list(experts)

    def routed(self, layer: int, experts: Sequence[int]) -> None:
        """The router of `layer` chose `experts`: count how many of them were expected."""
        if (expected := self._expected.get(layer)) is not None:
            self._foretold += len(expected)
            self._right += len(set(expected).intersection(experts))

    @property
    def idle(self) -> bool:
        """Nothing is expected of any layer of this step."""
        return self.off_reason is not None or not (self._likely or self._expected)

    def candidates(self, layer: int) -> list[int]:
        """Experts worth reading for `layer` now, the most probable first."""
        if self.off_reason is not None or layer >= self._layers:
            return []
        found = self._expected.get(layer, [])[: self._ranks]
        if self._likely:
            found = found + [e for e in self._likely[layer] if e not in found]
        return found

    def learn(self, events: CacheEvents) -> None:
        """Take note of how the reads ahead turned out, in all until now."""
        reads = events.misses + events.prefetch_issued - events.prefetch_cancelled
        self.outcome(events.prefetch_useful + events.prefetch_late, events.prefetch_wasted, reads)

    def outcome(self, useful: int, wasted: int, reads: int = 0) -> None:
        """So many speculative reads were demanded, or left their slot undemanded, in all until now.

        `reads` counts all reads, demanded and speculative, where that is known.
        """
        limits = self._limits
        done = useful + wasted - self._useful - self._wasted
        if done < limits.sample or self.off_reason is not None:
            return
        share = (useful - self._useful) / done
        waste = (wasted - self._wasted) / (reads - self._reads) if reads > self._reads else 0.0
        self._useful, self._wasted, self._reads = useful, wasted, reads
        if share >= limits.useful and waste <= limits.waste:
            return
        self._asked += limits.step
        self._ranks //= 2  # what a router applied early ranks first is right most often
        if self._asked > limits.last + 1e-9:
            found = (
                f"only {share:.0%} of the last {done} reads ahead were used"
                if share < limits.useful
                else f"{waste:.0%} of all reads were wasted"
            )
            self.off_reason = f"prefetch switched off: {found}"
