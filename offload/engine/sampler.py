"""From a row of logits to a token.

Owns greedy choice, temperature, top-k, top-p, min-p and the random draw. The choice depends on the
options, the seed, the step number and the row of logits, on nothing else: not on earlier draws, the
machine or the device. Must not know tokenizers, prompts or models.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offload.engine.request import SamplingParams
from offload.errors import OffloadError

_BLOCK = 8192

_BINS, _BINS_PER_UNIT = 4096, 64
"""Of the histogram in which top-p finds its last candidate, by (highest logit - logit) / temperature: the bins that
matter hold few of a vocabulary each, and what falls into the last one weighs less than 1e-27 of the best."""


class Sampler:
    """Draws one token per step. `seed` is the one in use, drawn here if the options leave it open."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed

    def sample(self, logits: ArrayLike, step: int) -> int:
        """The token id chosen at `step` (0 is the first generated token) from `logits` [vocab].

        Raises OffloadError if a logit is not finite.
        """
        row = finite_row(logits, step)
        if self.params.temperature == 0.0:
            return int(row.argmax())
        ids, weights = candidates(row, self.params)
        return int(ids[_drawn(weights, uniform(self.seed, step))])


def finite_row(logits: ArrayLike, step: int) -> NDArray[np.float32]:
    """`logits` as a float32 row [vocab]; raises OffloadError if it holds NaN or infinite values."""
    row = np.asarray(logits, dtype=np.float32)
    assert row.ndim == 1, f"logits must be one row, not {row.shape}"
    bad = row.size - int(np.isfinite(row).sum())
    if bad:
        nan = int(np.isnan(row).sum())
        raise OffloadError(
            f"the model gave {nan} NaN and {bad - nan} infinite logits among {row.size} at generated"
            f" token {step}: weights are damaged or a computation overflowed; check the store with"
            " `expertpager verify`"
        )
    return row


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that belongs to (seed, step): 53 bits of Philox keyed and counted by them."""
    bits: Any = np.random.Philox(key=seed, counter=step).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def _drawn(weights: NDArray[np.float32], share: float) -> int:
    """The place in `weights` [C] where their running sum, in order, passes `share` (0..1) of the whole."""
    sums: list[NDArray[np.float64]] = []
    for part in _blocks(weights.size):
        terms = weights[part].astype(np.float64)
        if sums:
            terms[0] += sums[-1][-1]
        sums.append(np.cumsum(terms))
    ends = np.array([block[-1] for block in sums])
    total = ends[-1]  # whatever the rounding

    def first(mass: float, side: Literal["left", "right"]) -> int:
        block = min(int(np.searchsorted(ends, mass, side=side)), len(sums) - 1)
        return block * _BLOCK + int(np.searchsorted(sums[block], mass, side=side))

    return min(first(share * total, "right"), first(total, "left"))  # what comes after that has no weight at all


def candidates(row: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids [C] that may be drawn, ascending, and their weights [C], proportional to probability.

    Temperature first, then top-k, top-p within what top-k kept, then min-p. Equal logits are ranked by id. At least the
    most probable token stays. Where most of a vocabulary is so improbable that all of it together weighs less than the
    rounding of the best's weight to fp32, that part is left out: it would take most of the time.
    """
    with np.errstate(over="ignore"):
        likely = row >= row.max() - np.float32(params.temperature * math.log(row.size * 2.0**24))
    if 2 * np.count_nonzero(likely) > row.size:
        return _filtered(row, params)
    some = np.flatnonzero(likely)
    ids, weights = _filtered(row[some], params)
    return some[ids], weights


def _filtered(row: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    best, top_p = row.max(), params.top_p
    if params.top_k and params.top_k < row.size:
        ids = _ranked(row, params.top_k)
        weights = _weights(row[ids], best, params.temperature)
        if top_p < 1.0:
            edges = np.cumsum(weights, dtype=np.float64)
            ids = ids[: _reach(edges, top_p * edges[-1])]
        order = np.argsort(ids)
        ids, weights = ids[order], weights[order]
    else:
        weights = _weights(row, best, params.temperature)
        ids = _nucleus(row, weights, params) if top_p < 1.0 else np.arange(row.size)
        weights = weights[ids]
    if params.min_p > 0.0:
        keep = weights >= np.float32(params.min_p)  # the largest weight is 1
        ids, weights = ids[keep], weights[keep]
    return ids, weights


def _nucleus(row: NDArray[np.float32], weights: NDArray[np.float32], params: SamplingParams) -> NDArray[np.int64]:
    """The fewest ids of `row` [vocab] that hold `top_p` of all `weights` [vocab], ascending.

    A histogram says in which bin the last of them is, and only that bin has to be ranked.
    """
    best, width = row.max(), np.float32(params.temperature / _BINS_PER_UNIT)
    bins, masses = np.empty(row.size, np.uint16), np.zeros(_BINS)
    for part in _blocks(row.size):
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            below = (best - row[part]) / width
        below[below != below] = 0.0  # 0 / 0: the best of a temperature that is 0 in fp32
        bins[part] = np.minimum(below, _BINS - 1)
        masses += np.bincount(bins[part], weights[part], _BINS)
    edges = np.cumsum(masses)
    mass = params.top_p * edges[-1]
    last = int(np.searchsorted(edges, mass, side="left"))
    kept = bins < last
    members = np.flatnonzero(bins == last)
    ranked = members[_ranked(row[members], members.size)]
    before = edges[last - 1] if last else 0.0
    kept[ranked[: _reach(before + np.cumsum(weights[ranked], dtype=np.float64), mass)]] = True
    return np.flatnonzero(kept)


def _reach(edges: NDArray[np.float64], mass: float) -> int:
    """How many terms it takes for the running sums `edges` to reach `mass`; at least one."""
    return int(np.searchsorted(edges, mass, side="left")) + 1


def _ranked(row: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The `count` best ids: highest logit first, lowest id first among equals."""
    if count < row.size:
        threshold = np.partition(row, row.size - count)[row.size - count]
        ids = np.flatnonzero(row >= threshold)
    else:
        ids = np.arange(row.size)
    # Rank and id in one number each: those sort several times as fast as a stable argsort of the logits.
    bits = (row[ids] + np.float32(0.0)).view(np.uint32)  # no negative zero: it equals the positive one
    descending = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))
    packed = np.sort(descending.astype(np.uint64) << np.uint64(32) | ids.astype(np.uint64))
    return (packed[:count] & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _weights(logits: NDArray[np.float32], highest: np.float32, temperature: float) -> NDArray[np.float32]:
    """exp((logit - highest) / temperature), computed in float64.

    Rounded to float32, which hides the last-bit differences between maths libraries: that keeps draws
    equal across platforms.
    """
    weights = np.empty(logits.size, np.float32)
    for part in _blocks(logits.size):
        with np.errstate(over="ignore"):
            exponents = (logits[part].astype(np.float64) - np.float64(highest)) / temperature
        weights[part] = np.exp(exponents)
    return weights


def _blocks(size: int) -> Iterator[slice]:
    """0 .. size in parts so small that memory for what is made of them is at hand: the pages that whole vocabularies
    would need anew for every token cost more than the arithmetic."""
    return (slice(at, at + _BLOCK) for at in range(0, size, _BLOCK))


def log_probabilities(row: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logs [vocab] of the probabilities that the unmodified logits `row` [vocab] stand for."""
    shifted = row.astype(np.float64) - np.float64(row.max())
    total = np.cumsum(np.exp(shifted))[-1]
    return np.asarray(shifted - np.log(total))


def most_probable(log_probs: NDArray[np.float64], count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most probable (token id, log probability), best first, lowest id among equals."""
    ids = np.argsort(-log_probs, kind="stable")[:count]
    return tuple((int(i), float(log_probs[i])) for i in ids)
