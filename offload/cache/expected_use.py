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
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from offload.cache.policy import CachePolicy, CacheShape, Routing
from offload.cache.predictor import Successors, TokenTable
from offload.cache.recall import Recall


@dataclass(frozen=True)
class Weights:
    """Half-lives in tokens with their weights, and the weights of the predictions."""

    half_lives: tuple[float, ...] = (3.0, 12.0, 60.0, 400.0, 4000.0)
    frequency: tuple[float, ...] = (0.05, 0.33, 0.16, 0.0, 0.75)
    successors: float = 0.63
    this_token: float = 0.45
    """What the token under way calls for, in layers that have not run yet."""
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
        self, shape: CacheShape, weights: Weights = Weights(), tokens: int = 8192, memory: int = 16384
    ) -> None:
        """`tokens`: ids the token table has room for; `memory`: tokens whose routing is remembered."""
        super().__init__(shape)
        self.weights = weights
        self.table = TokenTable(shape, tokens)
        self.successors = Successors(shape)
        self.recall = Recall(shape, memory)
        self._keep = np.array([0.5 ** (1.0 / h) for h in weights.half_lives], np.float32)[:, None]
        self._gain = 1.0 - self._keep
        self._frequency = np.array(weights.frequency, np.float32)
        self._decayed_frequency = self._frequency * self._keep[:, 0]
        self._bump = float(np.dot(self._frequency, self._gain[:, 0]))
        count = len(weights.half_lives)
        self._rates = np.full((shape.layers, count, shape.experts), shape.top_k / shape.experts, np.float32)
        self._rate_index = np.arange(shape.layers)[:, None, None], np.arange(count)[:, None]
        # Values without what depends on token ids and memory, as of each layer's last use.
        self._core = np.zeros((shape.layers, shape.experts), np.float32)
        # What a layer's core will be once it has run, as far as that is known before, and the rest of its value.
        self._after = np.zeros((shape.layers, shape.experts), np.float32)
        self._rest = np.zeros((shape.layers, shape.experts), np.float32)
        # Value without memory of the layers that have not run in this step.
        self._base = np.zeros((shape.layers, shape.experts), np.float32)
        # Weight of a use in the step under way, by layer; in the next step it is `per_token` times as much.
        self._near = weights.per_token ** (np.arange(shape.layers, dtype=np.float32) / shape.layers)[:, None]
        self._far = weights.per_token * self._near
        self._far_of: list[float] = self._far[:, 0].tolist()
        self._refine_at = int(REFINE * shape.layers)
        self._successors = np.float32(weights.successors)
        self._core_at: Any = self._core.reshape(-1).data  # item assignment without numpy's overhead
        self._tokens: list[int] = []
        self._routing: list[Routing] = []  # of the layers of this step that have run

    @property
    def long_run(self) -> NDArray[np.float32]:
        """Uses per token over the longest half-life [L, E]."""
        return self._rates[:, -1]

    def begin_step(self, tokens: Sequence[int], upcoming: Sequence[int] = ()) -> bool:
        self._learn()
        self._tokens = list(tokens)
        self._routing = []
        if not tokens:
            return False
        weights, base = self.weights, self._base
        # Every layer's next use is in this step, and its tokens are known.
        base[:] = self._core
        if len(tokens) == 1:
            self.table.add_lift(base, tokens[0], self.long_run, weights.this_token)
        np.multiply(base, self._near, out=self.values)
        # Once a layer has run, its next use is in the step after this one.
        np.matmul(self._decayed_frequency, self._rates, out=self._after)
        if upcoming:
            self.table.add_lift(self._after, upcoming[0], self.long_run, weights.known_token)
        self._rest[:] = 0.0
        if len(tokens) == 1 and len(self.recall):
            self.recall.begin(tokens[0], upcoming)
            self._look_back(0)
        return True

    def observe(self, layer: int, ids: Routing) -> bool:
        core = self._core[layer]
        last = ids[-1]
        np.multiply(self.successors.lift(layer, last), self._successors, out=core)
        if len(ids) == 1:
            core += self._after[layer]
            at, base = self._core_at, layer * self.shape.experts
            for expert in last:
                at[base + expert] += self._bump
        else:
            self._observe_many(self._rates[layer], ids)
            core += np.dot(self._frequency, self._rates[layer])
        self._routing.append(ids)
        row = self.values[layer]
        np.add(core, self._rest[layer], out=row)
        row *= self._far_of[layer]
        if layer == self._refine_at and len(ids) == 1 and len(self.recall):
            self.recall.refine(np.array(self._routing)[:, 0])
            self._look_back(layer + 1)
            return True
        return False

    def _look_back(self, done: int) -> None:
        """Take in what followed the places most like the present one, of whose layers `done` have run."""
        weights, rest, values, recall = self.weights, self._rest, self.values, self.recall
        places, share = recall.neighbours()
        np.multiply(recall.future(places, share), weights.future, out=rest)
        if done:
            np.add(self._core[:done], rest[:done], out=values[:done])
            values[:done] *= self._far[:done]
        expected = recall.present(places, share, done)
        expected *= weights.present
        expected += rest[done:]
        expected += self._base[done:]
        np.multiply(expected, self._near[done:], out=values[done:])

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
        for layer in range(self.shape.layers):
            np.dot(self._frequency, self._rates[layer], out=self._core[layer])
        self.values[...] = self._core

    def _observe_many(self, rates: NDArray[np.float32], ids: Routing) -> None:
        used = np.asarray(ids, np.intp)
        age = np.arange(len(ids) - 1, -1, -1)
        for index, keep in enumerate(self._keep[:, 0].tolist()):
            weight = np.repeat((1.0 - keep) * keep**age, used.shape[1])
            rates[index] *= keep ** len(ids)
            np.add.at(rates[index], used.reshape(-1), weight.astype(np.float32))

    def _learn(self) -> None:
        """Take the step that has ended into rates, tables and memory, if all of its layers were seen."""
        routing, self._routing = self._routing, []
        if len(routing) != self.shape.layers:
            return
        steps = np.array(routing, np.intp).transpose(1, 0, 2)  # [T, L, K]
        if len(steps) != len(self._tokens):
            return
        if len(steps) == 1:
            self._rates *= self._keep
            layers, half_lives = self._rate_index
            self._rates[layers, half_lives, steps[0][:, None, :]] += self._gain
        for token, ids in zip(self._tokens, steps, strict=True):
            if len(steps) > 1:
                for layer, chosen in enumerate(ids.tolist()):
                    self.successors.lift(layer, chosen)
            self.successors.learn(ids, self.long_run)
            self.table.learn(token, ids)
            self.recall.add(token, ids)
