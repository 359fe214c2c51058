"""Which experts which kind of text uses: statistics over routing traces, one trace per domain.

Owns the numbers and their definitions. Every one of them follows from the expert ids in the traces alone.
Must not know prompts, models or pages.

Let c[d, l, e] be how often tokens of domain d chose expert e of layer l. Domains count equally, however
long their texts: the load of an expert is p(e) = mean over d of p(e|d), p(e|d) = c[d,l,e] / sum over e.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offload.cache.policy import CacheShape
from offload.cache.trace import Trace
from offload.errors import UsageError

Floats = NDArray[np.float64]

COVERAGE = (0.05, 0.1, 0.25, 0.5, 0.75)
"""Shares of the experts of which the share of choices they take is told."""

HOT_SHARE = 0.25
"""Part of a layer's experts that counts as hot, for the overlap of domains."""


class Specialist(NamedTuple):
    """An expert (layer from 0) and the part of its use that one domain makes."""

    layer: int
    expert: int
    share: float


@dataclass(frozen=True)
class Atlas:
    """The expert use of several domains. L counts MoE layers from 0; `first_layer` is the decoder's index."""

    shape: CacheShape
    domains: tuple[str, ...]
    tokens: tuple[int, ...]
    counts: NDArray[np.int64]  # [D, L, E]
    reuse: Floats  # [D, L]
    first_layer: int = 0

    # -- distributions -----------------------------------------------------------------------

    @property
    def use(self) -> Floats:
        """p(e|d), [D, L, E]."""
        return self.counts / self.counts.sum(2, keepdims=True)

    @property
    def load(self) -> Floats:
        """p(e) with every domain counting the same, [L, E]."""
        return np.asarray(self.use.mean(0))

    # -- load --------------------------------------------------------------------------------

    @property
    def variation(self) -> Floats:
        """Coefficient of variation of the load, [L]: standard deviation over mean."""
        return np.asarray(self.load.std(1) / self.load.mean(1))

    @property
    def max_violation(self) -> Floats:
        """MaxVio, [L]: the highest load over the mean load, less 1 (arXiv 2408.15664)."""
        return np.asarray(self.load.max(1) / self.load.mean(1) - 1)

    @property
    def gini(self) -> Floats:
        """Gini coefficient of the load, [L]: 0 all alike, 1 - 1/E one expert takes all."""
        ascending = np.sort(self.load, axis=1)
        rank = np.arange(1, self.shape.experts + 1)
        total = ascending.sum(1)
        return np.asarray((2 * rank - self.shape.experts - 1) @ ascending.T / (self.shape.experts * total))

    @property
    def entropy(self) -> Floats:
        """Entropy of the load in bits, [L]; at most log2 E."""
        return entropy(self.load)

    # -- specialization ----------------------------------------------------------------------

    @property
    def information(self) -> Floats:
        """Mutual information between expert and domain in bits, [L]: H(e) - mean over d of H(e|d).

        0 if all domains use the experts alike, log2 D if every expert serves one domain. Few tokens let it
        come out too high; `information_floor` tells by how much.
        """
        return np.asarray(self.entropy - entropy(self.use).mean(0))

    @property
    def information_floor(self) -> Floats:
        """What chance alone gives in expectation, bits, [L]: the first-order bias of the entropies (Miller 1955).

        (mean over d of (E_d - 1) / n_d, less (E - 1) / n) / (2 ln 2), with E_d and E the experts used at all and
        n_d and n the choices, as if the experts of a token were drawn one by one.
        """
        choices = self.counts.sum(2)  # [D, L]
        used = (self.counts > 0).sum(2)
        # The mixture of equally weighted domains varies like a sample of the harmonic size.
        mixed = len(self.domains) ** 2 / (1 / choices).sum(0)
        within = ((used - 1) / choices).mean(0)
        between = ((self.counts.sum(0) > 0).sum(1) - 1) / mixed
        return np.asarray((within - between) / (2 * np.log(2)))

    @property
    def part(self) -> Floats:
        """p(d|e): the part of an expert's use that a domain makes, domains counting alike, [D, L, E]; 0 if unused."""
        total = self.use.sum(0)
        return np.asarray(np.divide(self.use, total, out=np.zeros_like(self.use), where=total > 0))

    def specialists(self, domain: int, count: int) -> list[Specialist]:
        """Up to `count` experts with the largest part of their use in `domain`, the largest first.

        Only experts that carry at least an even load there, so that a single stray token makes no specialist; ties go
        to the lower layer and expert.
        """
        usual = self.use[domain] >= 1 / self.shape.experts  # [L, E]
        parts = np.where(usual, self.part[domain], -1.0).ravel()
        best = np.argsort(-parts, kind="stable")[: min(count, int(usual.sum()))].tolist()
        places = ((*divmod(key, self.shape.experts), float(parts[key])) for key in best)
        return [Specialist(layer, expert, share) for layer, expert, share in places]

    @property
    def overlap(self) -> Floats:
        """Jaccard index of the hot experts of two domains, mean over layers, [D, D]."""
        hot = [self._hot(domain) for domain in range(len(self.domains))]
        both = [[(a & b).sum(1) / (a | b).sum(1) for b in hot] for a in hot]
        return np.asarray(both, np.float64).mean(2)

    def _hot(self, domain: int) -> NDArray[np.bool_]:
        size = max(1, round(HOT_SHARE * self.shape.experts))
        best = np.argsort(-self.counts[domain], axis=1, kind="stable")[:, :size]
        mask = np.zeros(self.counts.shape[1:], np.bool_)
        np.put_along_axis(mask, best, True, axis=1)
        return mask

    # -- coverage and reuse ------------------------------------------------------------------

    @property
    def coverage(self) -> Floats:
        """Share of the choices that the n most used experts of each layer take, mean over layers, [E]; n = 1..E."""
        descending = -np.sort(-self.load, axis=1)
        return np.asarray(descending.cumsum(1).mean(0))

    @property
    def domain_coverage(self) -> Floats:
        """The same within each domain, with its own most used experts, [D, E]."""
        descending = -np.sort(-self.use, axis=2)
        return np.asarray(descending.cumsum(2).mean(1))

    @property
    def chance_reuse(self) -> float:
        """Share of a token's experts that the token before also used, if all were drawn at random."""
        return self.shape.top_k / self.shape.experts

    # -- reports -----------------------------------------------------------------------------

    def lines(self) -> Iterator[str]:
        """The summary for a terminal."""
        shape = self.shape
        counted = ", ".join(f"{name} {count}" for name, count in zip(self.domains, self.tokens, strict=True))
        yield f"{shape.layers} MoE layers x {shape.experts} experts, top-{shape.top_k}; tokens: {counted}"
        yield "layer  MaxVio     CV   Gini  entropy  expert-domain information  reuse (mean)"
        for layer in range(shape.layers):
            yield (
                f"{self.first_layer + layer:>5}  {self.max_violation[layer]:6.2f} {self.variation[layer]:6.2f} "
                f"{self.gini[layer]:6.2f}  {self.entropy[layer]:7.2f}  {self.information[layer]:13.3f} bits "
                f"(chance {self.information_floor[layer]:.3f})  {self.reuse[:, layer].mean():6.1%}"
            )
        yield f"reuse by chance: {self.chance_reuse:.1%}; entropy of an even load: {np.log2(shape.experts):.2f} bits"
        yield "share of the choices taken by the most used experts of each layer:"
        yield f"{'experts':>14} " + "".join(f"{share:>8.0%}" for share in COVERAGE)
        rows = [("all domains", self.coverage), *zip(self.domains, self.domain_coverage, strict=True)]
        for name, curve in rows:
            yield f"{name:>14} " + "".join(f"{curve[self._top(share) - 1]:>8.0%}" for share in COVERAGE)
        yield f"overlap (Jaccard) of the most used {HOT_SHARE:.0%} of experts:"
        yield f"{'':>14} " + "".join(f"{name[:9]:>10}" for name in self.domains)
        for name, row in zip(self.domains, self.overlap, strict=True):
            yield f"{name:>14} " + "".join(f"{value:>10.2f}" for value in row)

    def to_dict(self) -> dict[str, Any]:
        """Every number, for machines."""
        return {
            "layers": self.shape.layers,
            "first_layer": self.first_layer,
            "experts": self.shape.experts,
            "top_k": self.shape.top_k,
            "domains": list(self.domains),
            "tokens": list(self.tokens),
            "counts": self.counts.tolist(),
            "variation": self.variation.tolist(),
            "max_violation": self.max_violation.tolist(),
            "gini": self.gini.tolist(),
            "entropy_bits": self.entropy.tolist(),
            "information_bits": self.information.tolist(),
            "information_floor_bits": self.information_floor.tolist(),
            "coverage": self.coverage.tolist(),
            "domain_coverage": self.domain_coverage.tolist(),
            "reuse": self.reuse.tolist(),
            "chance_reuse": self.chance_reuse,
            "overlap": self.overlap.tolist(),
            "specialists": {
                name: [[self.first_layer + one.layer, one.expert, one.share] for one in self.specialists(index, 8)]
                for index, name in enumerate(self.domains)
            },
        }

    def _top(self, share: float) -> int:
        return max(1, round(share * self.shape.experts))


def make_atlas(traces: Mapping[str, Trace], first_layer: int = 0) -> Atlas:
    """The atlas of one trace per domain. Raises UsageError for traces that are empty or of different models."""
    if not traces:
        raise UsageError("an atlas needs at least one domain")
    shape = next(iter(traces.values())).shape
    for name, trace in traces.items():
        if trace.shape != shape:
            raise UsageError(f"domain {name} was recorded with another model: {trace.shape}, not {shape}")
        if not len(trace.tokens):
            raise UsageError(f"domain {name} holds no tokens")
    return Atlas(
        shape,
        tuple(traces),
        tuple(len(trace.tokens) for trace in traces.values()),
        np.stack([count_choices(trace) for trace in traces.values()]),
        np.stack([measure_reuse(trace) for trace in traces.values()]),
        first_layer,
    )


def count_choices(trace: Trace) -> NDArray[np.int64]:
    """How often each expert was chosen, [L, E]."""
    shape = trace.shape
    keys = np.arange(shape.layers)[None, :, None] * shape.experts + trace.experts.astype(np.int64)
    return np.bincount(keys.ravel(), minlength=shape.keys).reshape(shape.layers, shape.experts)


def measure_reuse(trace: Trace) -> Floats:
    """Share of a token's experts that the token before it in the same session also chose, mean over tokens, [L].

    0 where no session has two tokens.
    """
    starts = np.concatenate([[0], np.cumsum(trace.steps)])[trace.sessions]  # token at which each session begins
    follows = np.ones(len(trace.tokens), np.bool_)
    follows[0] = False
    follows[starts[starts < len(follows)]] = False
    later, earlier = trace.experts[1:][follows[1:]], trace.experts[:-1][follows[1:]]
    if not len(later):
        return np.zeros(trace.shape.layers)
    same = (later[..., :, None] == earlier[..., None, :]).any(3)  # [T, L, K]
    return np.asarray(same.mean((0, 2)))


def entropy(p: Floats) -> Floats:
    """Entropy in bits along the last axis."""
    logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
    return np.asarray(-(p * logs).sum(-1))
