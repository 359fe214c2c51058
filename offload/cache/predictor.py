"""What tends to be used next, learned online from the routing itself.

Owns which experts a token id calls for, and which experts of a layer follow which. Must not know slots, nor
what the predictions are used for.

Probabilities are always given as lift: how far they lie above (or below) the long-run rate of an
expert. What was never observed has a lift of zero.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload.cache.policy import CacheShape

Floats = NDArray[np.float32]

PRIOR = 4.0
"""Sightings of a token id after which its table counts as much as the long-run rate."""


SEEN = 250
"""Sightings of a token id after which all of its counts are halved: they have a byte each."""

AT_ONCE = 32
"""Token ids that are learned from together: what is compared for them stays in a processor's cache."""

LARGE = 16 << 20
"""Bytes that weights of four sources would take, above which the work per layer is bounded."""


def is_large(shape: CacheShape) -> bool:
    """Whether the work per layer must be bounded: fewer sources and neighbours, and turns of layers."""
    return 16 * shape.keys * shape.experts > LARGE


class TokenTable:
    """token id -> its most frequent experts in every layer.

    Keeps `width` experts per layer for the `capacity` token ids seen last, all allocated
    at once. An expert that does not fit replaces one that was seen only once, if there is one.
    """

    def __init__(self, shape: CacheShape, capacity: int = 8192, width: int | None = None) -> None:
        self.shape = shape
        self.width = min(shape.experts, width or max(12, 2 * shape.top_k))
        self._row_of: OrderedDict[int, int] = OrderedDict()
        self._capacity = capacity
        # Layers come last, so that what is done to each of them runs along memory.
        size = (capacity, self.width, shape.layers)
        self._ids = np.zeros(size, np.uint16 if shape.experts > 256 else np.uint8)
        self._counts = np.zeros(size, np.uint8)
        self._seen = np.zeros(capacity, np.int32)
        self._column = np.arange(shape.layers)[:, None]

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self._ids.nbytes + self._counts.nbytes + self._seen.nbytes

    def learn(self, token: int, ids: NDArray[np.intp]) -> None:
        """`token` used experts `ids` [L, K]."""
        row = self._row(token)
        table, counts = self._ids[row], self._counts[row]
        _count(table, counts, ids.T.astype(table.dtype, "C"))
        self._seen[row] += 1
        if self._seen[row] >= SEEN:
            counts //= 2
            self._seen[row] //= 2

    def learn_all(self, tokens: Sequence[int], steps: NDArray[np.intp]) -> None:
        """`learn` of `tokens` [T] one after another, which used `steps` [T, L, K]; those that differ at once."""
        if len(set(tokens)) > self._capacity:  # some lose their row to others on the way
            for token, ids in zip(tokens, steps, strict=True):
                self.learn(token, ids)
            return
        rows = np.array([self._row(token) for token in tokens])
        used = steps.transpose(0, 2, 1).astype(self._ids.dtype, "C")
        for turn in _turns(tokens):
            for first in range(0, len(turn), AT_ONCE):
                at = turn[first : first + AT_ONCE]
                row = rows[at]
                table, counts, seen = self._ids[row], self._counts[row], self._seen[row] + 1
                _count(table, counts, used[at])
                old = seen >= SEEN
                counts[old] //= 2
                seen[old] //= 2
                self._ids[row], self._counts[row], self._seen[row] = table, counts, seen

    def add_lift(self, out: Floats, token: int, rate: Floats, scale: float) -> bool:
        """Add `scale` times the lift of every expert [L, E]; False if `token` was never seen."""
        row = self._row_of.get(token)
        if row is None:
            return False
        seen = int(self._seen[row])
        if seen == 0:
            return False
        share = scale / (seen + PRIOR)
        out -= (share * seen) * rate
        out[self._column, self._ids[row].T] += share * self._counts[row].T
        return True

    def likely(self, token: int, least: float = 0.0) -> list[list[tuple[int, float]]]:
        """Per layer (expert, probability of use, above 0 and at least `least`) for `token`, most frequent first.

        Empty if the token was never seen.
        """
        row = self._row_of.get(token)
        if row is None or not self._seen[row]:
            return []
        found: list[list[tuple[int, float]]] = [[] for _ in range(self.shape.layers)]
        share = self._counts[row].T / (float(self._seen[row]) + 1.0)
        layers, places = np.nonzero((share >= least) & (share > 0.0))
        order = np.lexsort((places, -share[layers, places], layers))
        chosen = self._ids[row, places, layers], share[layers, places]
        for at in order.tolist():
            found[layers[at]].append((int(chosen[0][at]), float(chosen[1][at])))
        return found

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that `restore` takes."""
        tokens = np.fromiter(self._row_of, np.int64, len(self._row_of))
        rows = np.fromiter(self._row_of.values(), np.intp, len(self._row_of))
        ids, counts = (array[rows].transpose(0, 2, 1) for array in (self._ids, self._counts))
        return {"tokens": tokens, "ids": ids, "counts": counts, "seen": self._seen[rows]}

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Begin with what an earlier run learned; the ids seen last are kept if not all fit."""
        count = min(len(state["tokens"]), self._capacity)
        first = len(state["tokens"]) - count
        self._row_of = OrderedDict((int(token), row) for row, token in enumerate(state["tokens"][first:]))
        for own, name in ((self._ids, "ids"), (self._counts, "counts")):
            own[:count] = state[name][first:].transpose(0, 2, 1)
        self._seen[:count] = state["seen"][first:]

    def _row(self, token: int) -> int:
        row = self._row_of.get(token)
        if row is not None:
            self._row_of.move_to_end(token)
            return row
        if len(self._row_of) < self._capacity:
            row = len(self._row_of)
        else:
            _, row = self._row_of.popitem(last=False)
        self._row_of[token] = row
        self._ids[row] = np.arange(self.width)[:, None]  # the experts of a layer's places always differ
        self._counts[row] = 0
        self._seen[row] = 0
        return row


def _count(table: NDArray[Any], counts: NDArray[np.uint8], used: NDArray[Any]) -> None:
    """Experts `used` [.., K, L] count in their places in `table` [.., W, L]; new ones take cheap places."""
    same = used[..., :, None, :] == table[..., None, :, :]  # [.., K, W, L]
    counts += np.logical_or.reduce(same, -3)
    new = ~np.logical_or.reduce(same, -2)
    # As many new experts of a layer as it has places of the least count, if that is at most 1, take those.
    cheap = counts == np.minimum(np.minimum.reduce(counts, -2, keepdims=True), 1)
    rank, place = np.add.accumulate(new, -2, np.int16), np.add.accumulate(cheap, -2, np.int16)
    new &= rank <= place[..., -1:, :]
    cheap &= place <= rank[..., -1:, :]
    table.swapaxes(-1, -2)[cheap.swapaxes(-1, -2)] = used.swapaxes(-1, -2)[new.swapaxes(-1, -2)]
    counts[cheap] = 1


def _turns(tokens: Sequence[int]) -> list[list[int]]:
    """Places of `tokens`: the first of every id, the second of those that come again, and so on."""
    turns: list[list[int]] = []
    times: Counter[int] = Counter()
    for at, token in enumerate(tokens):
        if times[token] == len(turns):
            turns.append([])
        turns[times[token]].append(at)
        times[token] += 1
    return turns


class Successors:
    """Which experts a layer uses at the next token, from those that it and the layers below it use at this one.

    A linear model per layer: the lift of expert j is the sum of `weights[l, s * E + i, j]` over the experts i
    that layer l - s uses, those that the router ranks higher counting more. Learned online by the delta rule
    (B. Widrow, M. Hoff, "Adaptive switching circuits", 1960): every prediction is corrected by a small part
    of its error, so that sources which say the same thing share it instead of saying it twice.
    """

    STEP = 0.003
    """Part of the error by which each weight is corrected in the long run."""
    FIRST_STEP = 0.02
    WARM_UP = 1000.0
    """Tokens after which the step has gone halfway from the first to the last."""

    def __init__(self, shape: CacheShape, scale: Floats | None = None) -> None:
        """`scale` [L]: what the lifts of a layer are multiplied by, 1 unless given."""
        self.shape = shape
        layers, experts, top_k = shape.layers, shape.experts, shape.top_k
        large = is_large(shape)
        self.sources = 2 if large else 4
        # Weights of a large model lie far apart in memory: its layers take turns, so that learning stays cheap.
        self._turns = 8 if large else 1
        self._scale = np.ones(layers, np.float32) if scale is None else scale
        self._nowhere = self.sources * experts  # row of sources that do not exist, always 0
        self.weights = np.zeros((layers, self._nowhere + 1, experts), np.float32)
        self._lifts = np.zeros((layers, experts), np.float32)
        rank = 1.0 - 0.5 * np.arange(top_k, dtype=np.float32) / top_k
        self._rank = np.tile(rank, self.sources)
        self._unscale = (-1.0 / self._scale)[:, None]
        self._experts = np.array(experts)  # numpy adds an array faster than a number
        # A row beyond the last one stands for the last one, which belongs to sources that do not exist.
        self._rows = np.full((layers, self.sources * top_k), self._nowhere, np.intp)
        self._write = partial(struct.Struct(f"{top_k}n").pack_into, self._rows.data.cast("B"))  # faster than one by one
        # Per layer: what the layer below hands up and where that goes, all its rows, where its lift goes, and what
        # `lift` calls, since looking methods up costs a tenth of it.
        scaled = self._rank * self._scale[:, None]
        self._scaled = scaled[:, None]
        self._views = [
            (self._rows[at - 1, :-top_k], rows[top_k:], rows, lift, table.take, rank.dot)
            for at, (rows, lift, table, rank) in enumerate(
                zip(self._rows, self._lifts, self.weights, scaled, strict=True)
            )
        ]
        self._buffer = np.empty((self.sources * top_k, experts), np.float32)
        turn = -(-layers // self._turns)
        self._learned = np.empty((2, turn, self.sources * top_k, experts), np.float32)
        self._offset = (np.arange(layers) * (self._nowhere + 1))[:, None]
        self._first = (np.arange(turn) * experts)[:, None]
        self._parts = [slice(first, first + turn) for first in range(0, layers, turn)]
        self._seen = 0  # tokens learned from
        # What was predicted of the token under way: of which layers, by which rows of the weights, and minus lifts.
        self._before: tuple[slice, NDArray[np.intp], Floats] | None = None

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self.weights.nbytes

    @property
    def used(self) -> NDArray[np.intp]:
        """What the token under way uses [L, K], in layers for which `lift` was asked."""
        return self._rows[:, : self.shape.top_k]

    def lift(self, layer: int, ids: Sequence[int]) -> Floats:
        """Lift [E] of `layer` at the next token; the one under way uses `ids`, best first. Layers come in order."""
        below, passed_on, rows, lift, gather, combine = self._views[layer]
        self._write(layer * rows.nbytes, *ids)
        if layer:
            np.add(below, self._experts, passed_on)
        gather(rows, 0, self._buffer, "clip")
        return combine(self._buffer, lift)

    def lift_all(self, ids: Sequence[Sequence[int]]) -> None:
        """`lift` of every layer, for ids [L, K]."""
        self._place(ids)
        for part in self._parts:  # as many layers as there is a buffer for
            self._foretell(part)

    def learn_all(self, steps: NDArray[np.intp], rate: Floats) -> None:
        """`lift` and `learn` of tokens one after another that used `steps` [T, L, K]; lifts that nothing will be
        learned from are left out."""
        for ids in steps:
            self._place(ids)
            self._foretell(self._turn(self._seen + (self._before is not None)))
            self.learn(ids, rate)

    def _place(self, ids: Sequence[Sequence[int]] | NDArray[np.intp]) -> None:
        """Ids [L, K] and what each layer's sources make of them."""
        rows, k, experts = self._rows, self.shape.top_k, self.shape.experts
        rows[:, :k] = ids
        for source in range(1, self.sources):
            np.add(rows[:-source, :k], source * experts, rows[source:, source * k : (source + 1) * k])

    def _turn(self, token: int) -> slice:
        """Layers whose turn it is to learn what a token teaches."""
        return slice(token % self._turns, None, self._turns)

    def _flat(self, part: slice) -> NDArray[np.intp]:
        """Rows of all weights that the layers `part` have as sources, [l, S * K]."""
        flat: NDArray[np.intp] = np.minimum(self._rows[part], self._nowhere)
        flat += self._offset[part]
        return flat

    def _foretell(self, part: slice) -> None:
        """Lifts of the layers `part`."""
        flat = self._flat(part)
        gathered = self._learned[0, : len(flat)]
        self.weights.reshape(-1, self.shape.experts).take(flat, 0, gathered, "clip")
        np.matmul(self._scaled[part], gathered, self._lifts[part, None])

    def learn(self, ids: NDArray[np.intp], rate: Floats) -> None:
        """A token has used `ids` [L, K] and `lift` has seen it: correct what was predicted of it before.

        `rate` [L, E]: uses per token in the long run, of which a lift is the difference.
        """
        if self._before is not None:
            part, flat, error = self._before
            error -= rate[part]
            error.reshape(-1)[ids[part] + self._first[: len(error)]] += 1.0
            step = self.STEP + (self.FIRST_STEP - self.STEP) / (1.0 + self._seen / self.WARM_UP)
            error *= step
            # Through buffers that stay: so much memory taken anew costs as much as the arithmetic.
            count, table = len(flat), self.weights.reshape(-1, self.shape.experts)
            learned, change = self._learned[0, :count], self._learned[1, :count]
            table.take(flat, 0, learned, "clip")
            np.multiply(self._rank[:, None], error[:, None, :], change)
            learned += change
            table[flat] = learned
            self.weights[part, self._nowhere] = 0.0
            self._seen += 1
        part = self._turn(self._seen)
        self._before = part, self._flat(part), self._lifts[part] * self._unscale[part]

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that `restore` takes."""
        return {"weights": self.weights.astype(np.float16), "seen": np.array([self._seen])}

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Begin with what an earlier run learned."""
        self.weights[...] = state["weights"]
        self._seen = int(state["seen"][0])
