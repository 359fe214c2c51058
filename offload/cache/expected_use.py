"""The default policy: keep what is expected to be used soonest.

Owns how frequency and prediction are combined into one value per expert. Must not know slots.

The value of an expert estimates its discounted uses in the near future, as a weighted sum of its decayed
frequencies and of four predictions: what followed passages like the present one (see `recall`), what usually
follows the experts just used, what usually follows the token under way, and what a token calls for whose id
is known (see `predictor`). The weights are those of a least-squares fit of discounted uses to routing of
DeepSeek-V2-Lite.

A use that is further away weighs less, within a token too: a layer that has just run is a whole token away
from its next use, the layer after it none. `Weights.per_token` is the factor for a token; a layer that lies
later in the pass gets its part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from offload.cache.policy import HALF_LIVES, CachePolicy, CacheShape, Routing
from offload.cache.predictor import Successors, TokenTable, is_large
from offload.cache.recall import Likeness, Recall


@dataclass(frozen=True)
class Weights:
    """Half-lives in tokens with their weights, and the weights of the predictions."""

    half_lives: tuple[float, float, float] = (12.0, HALF_LIVES["ema+tokens"], 4000.0)
    frequency: tuple[float, float, float] = (0.36, 0.14, 0.78)
    successors: float = 0.63
    known_token: float = 0.45
    """What the token after it calls for, if its id is known."""
    present: float = 0.41
    future: float = 0.26
    """Uses at the places most like the present one, and after them."""
    per_token: float = 0.7
    """What a use is worth that is a token further away."""


REFINE = 0.32
"""Part of the layers after which the search for alike passages is refined with the experts used so far."""


class ExpectedUse(CachePolicy):
    """Value = expected use in the near future, from frequencies, token ids and memory."""

    name = "ema+tokens"
    floor_share: ClassVar[float] = 0.5

    def __init__(
        self,
        shape: CacheShape,
        weights: Weights = Weights(),
        tokens: int = 8192,
        memory: int | None = None,
        half_life: float | None = None,
    ) -> None:
        """`tokens`: ids the token table has room for; `memory`: tokens whose routing is remembered,
        16384 unless given, half as many for a large model. `half_life`: takes the place of the middle one of
        `weights.half_lives`."""
        super().__init__(shape)
        if half_life is not None:
            shortest, _, longest = weights.half_lives
            weights = replace(weights, half_lives=(shortest, half_life, longest))
        self.half_life = weights.half_lives[1]
        self.values = self.values.astype(np.float32)  # half the memory of every step's passes over all experts
        self.weights = weights
        self.table = TokenTable(shape, tokens)
        large = is_large(shape)
        likeness = replace(Likeness(), neighbours=8) if large else Likeness()
        self.recall = Recall(shape, memory or (8192 if large else 16384), likeness)
        # Weight of a use in the step under way, by layer; in the next step it is `per_token` times as much. Written
        # out for every expert: a number per layer cuts each pass over them into short pieces.
        near = (weights.per_token ** (np.arange(shape.layers) / shape.layers)[:, None]).astype(np.float32)
        self._near = np.repeat(near, shape.experts, axis=1)
        self._far = np.float32(weights.per_token) * self._near
        self._per_far = 1.0 / self._far
        self.successors = Successors(shape, np.float32(weights.successors) * self._far[:, 0])
        # Decayed frequencies, one after another: [H, L, E].
        self._keep = np.array([0.5 ** (1.0 / h) for h in weights.half_lives], np.float32)
        self._frequency = np.array(weights.frequency, np.float32)
        self._rates = np.full((len(self._keep), *self.values.shape), shape.top_k / shape.experts, np.float32)
        bump = float(np.dot(self._frequency, 1.0 - self._keep))
        self._gains = list(zip(self._flat_rates, 1.0 - self._keep, strict=True))
        self._bump: list[float] = (bump * self._far[:, 0]).tolist()
        # Per layer, all but what the experts used in this step say: of its value once it has run, ...
        self._after = np.zeros_like(self.values)
        # ... of that what memory says, and its value before it has run without what memory says.
        self._rest = np.zeros_like(self.values)
        self._base = np.zeros_like(self.values)
        # ... with its value, and single items of that without numpy's overhead.
        self._rows: list[tuple[Any, Any, Any]] = [
            (after, row, row.data) for after, row in zip(self._after, self.values, strict=True)
        ]
        self._offset = (np.arange(shape.layers) * shape.experts)[:, None]
        self._refine_at = -1 if large else int(REFINE * shape.layers)
        self._tokens: list[int] = []
        self._routing: list[Routing | NDArray[np.intp]] = []  # of the layers of this step that have run

    @property
    def long_run(self) -> NDArray[np.float32]:
        """Uses per token over the last of the half-lives [L, E], the longest as they are fitted."""
        return self._rates[-1]

    def begin_step(self, tokens: Sequence[int], upcoming: Sequence[int] = ()) -> bool:
        complete = self._learn()
        self._tokens = list(tokens)
        self._routing = []
        if not tokens:
            return False
        weights, base, after, values = self.weights, self._base, self._after, self.values
        # Every layer's next use is in this step, and its tokens are known.
        if complete:
            np.multiply(values, self._per_far, out=base)
            base -= self._rest
        else:
            base[:] = self._frequencies(self._frequency)
        # Once a layer has run, its next use is in the step after this one.
        expected = self._frequencies(self._frequency * self._keep)
        if upcoming:
            self.table.add_lift(expected, upcoming[0], self.long_run, weights.known_token)
        np.multiply(expected, self._far, out=after)
        if len(tokens) == 1 and len(self.recall):
            self.recall.begin(tokens[0], upcoming)
            self._look_back(0)
        else:
            self._rest[:] = 0.0
            np.multiply(base, self._near, out=values)
        return True

    def observe(self, layer: int, ids: Routing) -> None:
        lift = self.successors.lift(layer, ids[-1])
        after, row, row_at = self._rows[layer]
        if len(ids) > 1:
            rates, used = self._rates[:, layer], np.asarray(ids, np.intp)
            self._routing.append(used)
            self._observe_many(rates, used)
            np.multiply(np.dot(self._frequency, rates), self._far[layer], out=after)
            np.add(lift, after, row)
            return
        self._routing.append(ids)
        np.add(lift, after, row)
        bump = self._bump[layer]
        for expert in ids[0]:
            row_at[expert] += bump
        if layer == self._refine_at and len(self.recall):
            self.recall.refine(self.successors.used[: layer + 1])
            self._look_back(layer + 1)
            self.revision += 1

    def learn(self, tokens: Sequence[int], routing: Sequence[Routing]) -> None:
        self._learn()
        self._tokens = list(tokens)
        if len(routing) == self.shape.layers and len(routing[0]) == 1:
            self.successors.lift_all([ids[0] for ids in routing])
        else:
            for layer, ids in enumerate(routing):
                if len(ids) > 1:
                    self._observe_many(self._rates[:, layer], np.asarray(ids, np.intp))
        self._routing = list(routing)
        self._learn()

    def _look_back(self, done: int) -> None:
        """Take in what followed the places most like the present one, of whose layers `done` have run."""
        weights, recall, after, values = self.weights, self.recall, self._after, self.values
        places, share = recall.neighbours()
        future = recall.future(places, share * weights.future)
        expected = recall.present(places, share * weights.present, done)
        expected += future[done:]
        expected += self._base[done:]
        np.multiply(expected, self._near[done:], out=values[done:])
        if done:  # replace what was expected before
            change = (future - self._rest) * self._far
            after += change
            values[:done] += change[:done]
        else:
            after += future * self._far
        self._rest = future

    def _frequencies(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weighted sum of the decayed frequencies [L, E]."""
        return np.dot(weights, self._flat_rates).reshape(self.values.shape)

    @property
    def _flat_rates(self) -> NDArray[np.float32]:
        return self._rates.reshape(len(self._rates), -1)

    def state(self) -> dict[str, NDArray[Any]]:
        self._learn()
        table = {f"table_{name}": array for name, array in self.table.state().items()}
        recall = {f"recall_{name}": array for name, array in self.recall.state().items()}
        successors = {f"successor_{name}": array for name, array in self.successors.state().items()}
        return {"rates": self._rates.copy()} | table | recall | successors

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        for part, prefix in ((self.recall, "recall_"), (self.table, "table_"), (self.successors, "successor_")):
            part.restore({k.removeprefix(prefix): array for k, array in state.items() if k.startswith(prefix)})
        self._rates[...] = state["rates"]
        self.values[...] = self._frequencies(self._frequency)

    def _observe_many(self, rates: NDArray[np.float32], used: NDArray[np.intp]) -> None:
        age = np.arange(len(used) - 1, -1, -1)
        for index, keep in enumerate(self._keep.tolist()):
            weight = np.repeat((1.0 - keep) * keep**age, used.shape[1])
            rates[index] *= keep ** len(used)
            np.add.at(rates[index], used.reshape(-1), weight.astype(np.float32))

    def _learn(self) -> bool:
        """Take the step that has ended into rates, tables and memory; False unless all of its layers were seen."""
        routing, self._routing = self._routing, []
        if len(routing) != self.shape.layers:
            return False
        many = len(routing[0]) > 1
        steps = np.array(routing, np.intp).transpose(1, 0, 2) if many else self.successors.used[None]  # [T, L, K]
        if len(steps) != len(self._tokens):
            return False
        if len(steps) == 1:
            self._rates *= self._keep[:, None, None]
            keys = (steps[0] + self._offset).reshape(-1)
            for rates, gain in self._gains:  # much faster than all at once
                rates[keys] += gain
        if many:
            self.successors.learn_all(steps, self.long_run)
            self.table.learn_all(self._tokens, steps)
            self.recall.add_all(self._tokens, steps)
        else:
            self.successors.learn(steps[0], self.long_run)
            self.table.learn(self._tokens[0], steps[0])
            self.recall.add(self._tokens[0], steps[0])
        return True
