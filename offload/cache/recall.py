"""Passages of the past like the present one, and what followed them.

Owns a memory of the routing of the last tokens, and the search in it. Must not know slots, nor what the
predictions are used for. Text repeats itself, within a conversation above all: where the routing of the
last tokens resembles that of an earlier passage, the next experts resemble those that came next there.
Unlike counts, one occurrence is enough.

Two places are compared by their marks: the router's first choice in up to 26 layers, and the token id. The
likeness of what precedes two places is that of the tokens just before them plus a part of the likeness of
what precedes those, so it is carried from token to token and no two places are compared twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload.cache.policy import CacheShape

Floats = NDArray[np.float32]

MARKED_LAYERS = 26
"""Layers that take part in a comparison, spread evenly."""


@dataclass(frozen=True)
class Likeness:
    """What makes two places alike, in units of all marks of a token being equal, and what follows from it."""

    fade: float = 0.4
    """Weight of a token relative to the one after it."""
    same_token: float = 3 / 26
    """An equal id of a token that has passed."""
    this_token: float = 7 / 26
    """An equal id of the token under way."""
    next_token: float = 9 / 26
    """An equal id of the token after it, where that is known."""
    this_marks: float = 1.5
    """Equal marks of the token under way, as far as its layers have run."""
    sharpness: float = 9.0
    """A place alike by one unit more weighs exp(sharpness) times as much."""
    neighbours: int = 32
    """Places that speak."""
    discounts: tuple[float, ...] = (1.0, 0.7, 0.49)
    """Weight of the uses by each of the tokens that followed."""


class Recall:
    """Memory of the last `capacity` tokens: ids, the experts used, and how alike their past is to the present."""

    def __init__(self, shape: CacheShape, capacity: int, likeness: Likeness = Likeness()) -> None:
        self.shape = shape
        self.capacity = capacity
        self.likeness = likeness
        count = min(shape.layers, MARKED_LAYERS)
        self._marked = np.linspace(0, shape.layers - 1, count).round().astype(np.intp)
        self._marks = np.zeros((count, capacity), np.uint8 if shape.experts <= 256 else np.uint16)
        self._keys = np.zeros((capacity, shape.layers, shape.top_k), np.uint16 if shape.keys <= 65536 else np.uint32)
        self._tokens = np.full(capacity, -1, np.int32)
        self._offset = (np.arange(shape.layers) * shape.experts)[:, None]
        self._count = 0
        self._head = 0  # place of the next token
        self._past = np.zeros(capacity, np.float32)  # likeness of what precedes each place to what precedes the head
        self._score = np.zeros(capacity, np.float32)
        self._equal = np.zeros((count, capacity), bool)
        self._matches = np.zeros(capacity, np.uint8)
        self._compared = 0  # marked layers of the token under way that `_score` includes
        # Tokens after which what precedes them is forgotten in single precision.
        self._lasting = math.ceil(math.log(np.finfo(np.float32).eps) / math.log(likeness.fade))
        self._steps = np.arange(1, 1 + len(likeness.discounts))
        self._discounts = np.array(likeness.discounts)

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        arrays = (self._marks, self._keys, self._tokens, self._past, self._score, self._equal, self._matches)
        return sum(array.nbytes for array in arrays)

    def __len__(self) -> int:
        return self._count

    def add(self, token: int, ids: NDArray[np.intp]) -> None:
        """A token has used `ids` [L, K], best first."""
        n, head, like = self._count, self._head, self.likeness
        marks = ids[:, 0].take(self._marked).astype(self._marks.dtype)
        score = self._score
        np.multiply(self._past, np.float32(like.fade), out=score)
        if n:
            score[:n] += self._equal_marks(marks, 0, len(marks)) * np.float32(1.0 / len(marks))
            score[:n] += np.float32(like.same_token) * (self._tokens[:n] == token)
        score[head] = 0.0  # the place after it is now the oldest, or empty
        self._past[1:] = score[:-1]
        self._past[0] = score[-1]
        self._marks[:, head] = marks
        self._keys[head] = ids + self._offset
        self._tokens[head] = token
        self._head = (head + 1) % self.capacity
        self._count = min(n + 1, self.capacity)

    def add_all(self, tokens: Sequence[int], steps: NDArray[np.intp]) -> None:
        """`add` of `tokens` [T] one after another, which used `steps` [T, L, K].

        What precedes a place fades: only the last of them are compared with what is remembered, the others are stored.
        """
        compared = max(0, len(tokens) - self._lasting)
        stored = slice(max(0, compared - self.capacity), compared)
        places = np.arange(self._head + stored.start, self._head + stored.stop) % self.capacity
        ids = steps[stored]
        self._marks[:, places] = ids[:, self._marked, 0].T
        self._keys[places] = ids + self._offset
        self._tokens[places] = tokens[stored]
        self._head = (self._head + stored.stop) % self.capacity
        self._count = min(self._count + len(places), self.capacity)
        for token, ids in zip(tokens[compared:], steps[compared:], strict=True):
            self.add(token, ids)

    def begin(self, token: int, upcoming: Sequence[int] = ()) -> None:
        """The token after those in memory is `token`; its layers have yet to run. `upcoming` follow it."""
        n = self._count
        np.multiply(self._tokens[:n] == token, np.float32(self.likeness.this_token), out=self._score[:n])
        self._score[:n] += self._past[:n]
        if n == self.capacity:
            self._score[self._head] = -1e9  # about to be forgotten
        if upcoming:
            same = self._tokens[1:n] == upcoming[0]
            self._score[: n - 1] += np.float32(self.likeness.next_token) * same
        self._compared = 0

    def refine(self, ids: NDArray[np.intp]) -> None:
        """The token under way has used `ids` [l, K] in its first l layers."""
        first, last = self._compared, int(np.searchsorted(self._marked, len(ids)))
        if first < last and self._count:
            marks = ids[self._marked[first:last], 0].astype(self._marks.dtype)
            weight = np.float32(self.likeness.this_marks / len(self._marked))
            self._score[: self._count] += self._equal_marks(marks, first, last) * weight
            self._compared = last

    def neighbours(self) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Places most like the one under way, and their weights, which add up to 1."""
        n, count = self._count, self.likeness.neighbours
        score = self._score[:n]
        places = np.argpartition(score, n - count)[n - count :] if n > count else np.arange(n)
        likeness = score[places].astype(np.float64)
        weights = np.exp((likeness - likeness.max(initial=0.0)) * self.likeness.sharpness)
        return places, weights / max(float(weights.sum()), 1e-30)

    def present(self, places: NDArray[np.intp], weights: NDArray[np.float64], first: int = 0) -> Floats:
        """Probability of use [L - first, E] by the token under way, in layers from `first` on."""
        return self._uses(places, weights, first)

    def future(self, places: NDArray[np.intp], weights: NDArray[np.float64]) -> Floats:
        """Discounted uses [L, E] by the tokens after the one under way."""
        age = (self._head - 1 - places) % self.capacity  # tokens that have followed
        share = weights[:, None] * self._discounts * (age[:, None] >= self._steps)
        after = (places[:, None] + self._steps) % self.capacity
        return self._uses(after.reshape(-1), share.reshape(-1), 0)

    def _uses(self, places: NDArray[np.intp], weights: NDArray[np.float64], first: int) -> Floats:
        shape = self.shape
        keys = self._keys.take(places, 0)[:, first:].reshape(-1)
        repeated = weights.repeat((shape.layers - first) * shape.top_k)
        sums: Floats = np.bincount(keys, repeated, shape.keys).astype(np.float32)
        return sums.reshape(shape.layers, shape.experts)[first:]

    def _equal_marks(self, marks: NDArray[Any], first: int, last: int) -> NDArray[np.uint8]:
        """How many of the marked layers first..last agree, for every place."""
        n = self._count
        equal = self._equal[first:last, :n]
        np.equal(self._marks[first:last, :n], marks[:, None], out=equal)
        matches = self._matches[:n]
        np.add.reduce(equal.view(np.uint8), axis=0, dtype=np.uint8, out=matches)
        return matches

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that `restore` takes: tokens and the experts they used, oldest first."""
        order = (self._head - self._count + np.arange(self._count)) % self.capacity
        ids = self._keys[order] - self._offset
        return {"tokens": self._tokens[order], "ids": ids.astype(self._marks.dtype)}

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Begin with what an earlier run saw last. Raises ValueError, with nothing changed, if it cannot be."""
        if len(state["tokens"]) != len(state["ids"]) or state["ids"].max(initial=0) >= self.shape.experts:
            raise ValueError("its remembered tokens and experts do not fit each other")
        tokens, ids = state["tokens"][-self.capacity :], state["ids"][-self.capacity :]
        count = self._count = len(tokens)
        self._head = count % self.capacity
        self._tokens[:count] = tokens
        self._keys[:count] = ids + self._offset
        self._marks[:, :count] = ids[:, self._marked, 0].T
        self._past[:] = 0.0
