"""What layers and misses cost besides matrix products: measured with a model whose matrices are too small to matter.

Owns the measurements. They run the decoder, the residency and the executor exactly as a real model does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from offload.cache.policy import LEARNING
from offload.config import ModelConfig
from offload.kernels import Kernels
from offload.kernels.api import Wave
from offload.model.kv_cache import KVCache
from offload.model.transformer import DeepseekV3
from offload.model.weights import load_weights
from offload.tiers.executor import Executor
from offload.tune.small_model import CONTEXT, V3_ROUTING, VOCABULARY, EmptyStore, RandomWeights, small_config

LAYERS = 9

MORE_LAYERS = 24
"""By which a second model is deeper: the difference is what layers take, the rest is the token's."""

_PROMPT = [token % VOCABULARY for token in range(CONTEXT // 2)]

Stream = Callable[[], object]


class TimedStream:
    """A stream that passes through the caches between two steps, and whose time is none of theirs."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.seconds = 0.0
        """All that it has taken."""

    def __call__(self, _: int = 0) -> None:
        begun = time.perf_counter()
        self._stream()
        self.seconds += time.perf_counter() - begun


class StreamingKernels:
    """Kernels after whose experts a stream passes through the caches, as the weights of real ones would have."""

    def __init__(self, kernels: Kernels, stream: TimedStream) -> None:
        self._kernels, self._stream = kernels, stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def experts(self, x: Tensor, wave: Wave, k: int, partial: Tensor) -> None:
        self._kernels.experts(x, wave, k, partial)
        self._stream()


RESIDENT_SHARE = 0.4
"""Share of the experts that have a slot where the cost of a miss is measured."""

SETTINGS = ((1.0, False), (RESIDENT_SHARE, False), (RESIDENT_SHARE, True))
"""(share of the experts with a slot, whether routers are applied early) of the models that decode step by step."""

ROUNDS = 6
"""Tokens at least that each of the settings decodes."""

PROMPT_TURNS = 3
"""Prompts of either length."""


@dataclass(frozen=True)
class PromptOverhead:
    """What prompts take besides matrix products and waiting."""

    layer_s: float
    """Seconds per layer."""
    token_s: float
    """Seconds that each token adds to that."""
    miss_s: float
    """Seconds for an expert that is read: one of many that are asked for at once."""
    learn_s: float
    """Seconds that learning from a token takes, when the one after the prompt begins."""


@dataclass(frozen=True)
class Overhead:
    """What decoding takes besides matrix products and waiting."""

    layer_s: float
    """Seconds per layer whose experts are resident."""
    token_s: float
    """Seconds per token outside of the layers, without sampling."""
    miss_s: float
    """Seconds that the processor spends on every expert that is not."""
    foresee_s: float
    """Seconds for a router that is applied early, and for choosing what to read ahead."""
    prompt: PromptOverhead

    @property
    def times(self) -> dict[str, float]:
        """By their names in MachineSpec."""
        names = ("layer_s", "token_s", "miss_s", "foresee_s")
        prompt = {f"prompt_{name}": getattr(self.prompt, name) for name in ("layer_s", "token_s", "miss_s")}
        return {name: getattr(self, name) for name in names} | prompt | {"learn_s": self.prompt.learn_s}


class OverheadModels:
    """Models under one policy. `routing`: sizes by their names in config.json.

    A context manager. Two of them, of which one is deeper, decode whole tokens with all experts resident; they are made
    once for all passes of a probe. Three decode step by step: with all experts resident, with too few slots for them,
    and with as few and reads ahead. A policy that has seen more of their tokens reads less, and with fewer reads in a
    layer each costs more; so these are made anew in every pass.
    """

    def __init__(self, kernels: Kernels, policy: str = LEARNING, routing: Mapping[str, int] = V3_ROUTING) -> None:
        self._kernels, self._policy = kernels, policy
        self._few, many = (small_config(layers, **routing) for layers in (LAYERS, LAYERS + MORE_LAYERS))
        with ExitStack() as stack:
            self._whole = [stack.enter_context(_whole_tokens(kernels, policy, each)) for each in (self._few, many)]
            self._made = stack.pop_all()

    def __enter__(self) -> OverheadModels:
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()

    def measure(self, seconds: float, stream: Stream) -> Overhead:
        """All of it, in about three times `seconds` and those of some prompts.

        The models take turns, since their differences are small beside what other work does to each. What layers and
        tokens cost is taken from whole tokens, in as few calls as the backend has for them, with code and data in the
        caches: the rates of kernels hold the rest. Deciding and reading come on top of them; for these `stream` reads
        between layers what a layer's weights are, and leaves the caches as they do, which nearly doubles their time.
        """
        tokens: list[list[float]] = []
        rounds: list[list[_Step]] = []
        with ExitStack() as stack:
            decoding = partial(_decoding, self._kernels, self._policy, self._few)
            runs = [stack.enter_context(decoding(*setting)) for setting in SETTINGS]
            begun = time.perf_counter()
            while len(rounds) < ROUNDS or time.perf_counter() - begun < 3 * seconds:
                tokens.append([token().busy_s for token in self._whole])
                rounds.append([run(stream) for run in runs])
        reads = [median(step.reads for step in steps) for steps in zip(*rounds, strict=True)]
        missing = median(paged.busy_s - resident.busy_s for resident, paged, _ in rounds)
        miss_s = max(0.0, missing / reads[1]) if reads[1] else 0.0
        foreseeing = median(ahead.busy_s - paged.busy_s for _, paged, ahead in rounds) - (reads[2] - reads[1]) * miss_s
        few_s, many_s = (median(times) for times in zip(*tokens, strict=True))
        layer_s = min(max(1e-9, (many_s - few_s) / MORE_LAYERS), few_s / LAYERS)
        return Overhead(
            layer_s,
            few_s - LAYERS * layer_s,
            miss_s,
            max(0.0, foreseeing / len(self._few.moe_layers)),
            measure_prompts(self._kernels, stream, self._policy, self._few),
        )


def measure_prompts(kernels: Kernels, stream: Stream, policy: str, config: ModelConfig) -> PromptOverhead:
    """A prompt with slots for everything, of which nothing is there, then long and short ones in turns.

    For the misses `stream` reads what the experts of a call are. Learning is apart: it is done when the token after the
    prompt begins.
    """
    short, layers = _PROMPT[: len(_PROMPT) // 8], config.num_hidden_layers
    timed = TimedStream(stream)
    learning: list[float] = []
    with _model(kernels, policy, config, 1.0, False, StreamingKernels(kernels, timed)) as (model, cache, executor):

        def step(tokens: list[int]) -> _Step:
            cache.truncate(0)
            before = timed.seconds
            found = _timed(executor, partial(model.forward, tokens, cache))
            begun = time.perf_counter()
            executor.ram.end_step()
            learning.append((time.perf_counter() - begun) / len(tokens))
            return replace(found, busy_s=found.busy_s - (timed.seconds - before))

        step(_PROMPT[:1])  # makes what is made once
        absent, present = step(_PROMPT), step(_PROMPT)
        miss_s = max(1e-9, (absent.busy_s - present.busy_s) / absent.reads)
        del learning[:]
        turns = [(step(_PROMPT).busy_s, step(short).busy_s) for _ in range(PROMPT_TURNS)]
    long_s, short_s = (median(times) for times in zip(*turns, strict=True))
    token_s = max(0.0, long_s - short_s) / (len(_PROMPT) - len(short))
    layer_s = max(1e-9, short_s - len(short) * token_s)
    return PromptOverhead(layer_s / layers, token_s / layers, miss_s, median(learning))


@dataclass(frozen=True)
class _Step:
    """One decoded token: seconds that nothing was waited for, and the experts that were read."""

    busy_s: float
    reads: int


def _timed(executor: Executor, act: Callable[[], object]) -> _Step:
    before, begun = replace(executor.counters().ram), time.perf_counter()
    act()
    took = time.perf_counter() - begun
    spent = replace(executor.counters().ram).minus(before)
    return _Step(took - spent.stall_s, spent.reads)


@contextmanager
def _whole_tokens(kernels: Kernels, policy: str, config: ModelConfig) -> Iterator[Callable[[], _Step]]:
    """Decodes one more token at every call as generation does, all experts resident."""
    with _model(kernels, policy, config, 1.0, False) as (model, cache, executor):
        tokens = _tokens(model, cache)
        yield lambda: _timed(executor, partial(model.next_logits, next(tokens), cache))


@contextmanager
def _decoding(
    kernels: Kernels, policy: str, config: ModelConfig, share: float, prefetch: bool
) -> Iterator[Callable[[Stream], _Step]]:
    """Decodes one more token at every call, with slots for `share` of the experts, and calls what it is given after
    every layer."""
    with _model(kernels, policy, config, share, prefetch) as (model, cache, executor):
        tokens = _tokens(model, cache)

        def step(stream: Stream) -> _Step:
            timed = TimedStream(stream)
            found = _timed(executor, partial(model.forward, [next(tokens)], cache, timed))
            return replace(found, busy_s=found.busy_s - timed.seconds)

        yield step


def _tokens(model: DeepseekV3, cache: KVCache) -> Iterator[int]:
    """Token after token behind a prompt that brings in what they use; the cache has room for each."""
    model.forward(_PROMPT, cache)
    filled = cache.length
    for number in count():
        if cache.length == CONTEXT:
            cache.truncate(filled)
        yield number % VOCABULARY


@contextmanager
def _model(
    kernels: Kernels, policy: str, config: ModelConfig, share: float, prefetch: bool, routed: Kernels | None = None
) -> Iterator[tuple[DeepseekV3, KVCache, Executor]]:
    """The model with slots for `share` of its experts, which `routed` computes, `kernels` unless given."""
    slots = round(share * len(config.moe_layers) * config.n_routed_experts)
    with tempfile.TemporaryDirectory(prefix="expertpager-probe-") as folder:
        store = EmptyStore(Path(folder) / "experts", config)
        sizes = {"slots": slots, "max_tokens": len(_PROMPT)}
        executor = Executor(store, routed or kernels, **sizes, policy=policy, prefetch=prefetch)
        try:
            model = DeepseekV3(config, load_weights(RandomWeights(config), config), kernels, executor, CONTEXT)
            yield model, KVCache(config, CONTEXT), executor
        finally:
            executor.close()
