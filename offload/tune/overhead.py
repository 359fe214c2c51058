"""What layers and misses cost besides matrix products: measured with a model whose matrices are too small to matter.

Owns the measurements. They run the decoder, the residency and the executor exactly as a real model does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from offload.config import ModelConfig
from offload.kernels import Kernels
from offload.kernels.api import Wave
from offload.model.kv_cache import KVCache
from offload.model.transformer import DeepseekV3
from offload.model.weights import load_weights
from offload.tiers.executor import Executor
from offload.tune.small_model import CONTEXT, EmptyStore, RandomWeights, small_config

_CONFIG = small_config(9)

WHOLE_LAYERS = 33
"""Layers of the model whose tokens are measured whole: what a token takes once is spread over as many as is usual."""

_PROMPT = [token % _CONFIG.vocab_size for token in range(CONTEXT // 2)]

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

ROUNDS = 8
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


@dataclass(frozen=True)
class Overhead:
    """What decoding takes besides matrix products and waiting."""

    layer_s: float
    """Seconds per layer whose experts are resident."""
    miss_s: float
    """Seconds that the processor spends on every expert that is not."""
    foresee_s: float
    """Seconds for a router that is applied early, and for choosing what to read ahead."""
    prompt: PromptOverhead


def measure_overhead(kernels: Kernels, seconds: float, stream: Stream) -> Overhead:
    """All of it in about three times `seconds`: decoding with all experts resident, with too few slots for them, and
    with as few and reads ahead.

    They take turns, since their differences are small beside what other work does to each. What a layer costs is taken
    from whole tokens, in as few calls as the backend has for them, with code and data in the caches: the rates of
    kernels are measured call by call and hold the rest. Deciding and reading come on top of them; for these `stream`
    reads between layers what a layer's weights are, and leaves the caches as they do, which nearly doubles their time.
    """
    with ExitStack() as stack:
        whole = stack.enter_context(_whole_tokens(kernels))
        settings = ((1.0, False), (RESIDENT_SHARE, False), (RESIDENT_SHARE, True))
        runs = [stack.enter_context(_decoding(kernels, share, prefetch)) for share, prefetch in settings]
        begun = time.perf_counter()
        warm: list[_Step] = []
        rounds: list[list[_Step]] = []
        while len(rounds) < ROUNDS or time.perf_counter() - begun < 3 * seconds:
            warm.append(whole())
            rounds.append([run(stream) for run in runs])
    routers = len(_CONFIG.moe_layers)
    reads = [median(step.reads for step in steps) for steps in zip(*rounds, strict=True)]
    missing = median(paged.busy_s - resident.busy_s for resident, paged, _ in rounds)
    miss_s = max(0.0, missing / reads[1]) if reads[1] else 0.0
    foreseeing = median(ahead.busy_s - paged.busy_s for _, paged, ahead in rounds) - (reads[2] - reads[1]) * miss_s
    layer_s = median(step.busy_s for step in warm) / WHOLE_LAYERS
    return Overhead(layer_s, miss_s, max(0.0, foreseeing / routers), measure_prompts(kernels, stream))


def measure_prompts(kernels: Kernels, stream: Stream) -> PromptOverhead:
    """A prompt with slots for everything, of which nothing is there, then long and short ones in turns.

    For the misses `stream` reads what the experts of a call are. Learning from a prompt is left out: that is done when
    the token after it begins.
    """
    short, layers = _PROMPT[: len(_PROMPT) // 8], _CONFIG.num_hidden_layers
    timed = TimedStream(stream)
    with _model(kernels, 1.0, False, routed=StreamingKernels(kernels, timed)) as (model, cache, executor):

        def step(tokens: list[int]) -> _Step:
            cache.truncate(0)
            before = timed.seconds
            found = _timed(executor, partial(model.forward, tokens, cache))
            executor.ram.end_step()
            return replace(found, busy_s=found.busy_s - (timed.seconds - before))

        step(_PROMPT[:1])  # makes what is made once
        absent, present = step(_PROMPT), step(_PROMPT)
        miss_s = max(1e-9, (absent.busy_s - present.busy_s) / absent.reads)
        turns = [(step(_PROMPT).busy_s, step(short).busy_s) for _ in range(PROMPT_TURNS)]
    long_s, short_s = (median(times) for times in zip(*turns, strict=True))
    token_s = max(0.0, long_s - short_s) / (len(_PROMPT) - len(short))
    layer_s = max(1e-9, short_s - len(short) * token_s)
    return PromptOverhead(layer_s / layers, token_s / layers, miss_s)


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
def _whole_tokens(kernels: Kernels) -> Iterator[Callable[[], _Step]]:
    """Decodes one more token at every call as generation does, all experts resident."""
    with _model(kernels, 1.0, False, small_config(WHOLE_LAYERS)) as (model, cache, executor):
        tokens = _tokens(model, cache)
        yield lambda: _timed(executor, partial(model.next_logits, next(tokens), cache))


@contextmanager
def _decoding(kernels: Kernels, share: float, prefetch: bool) -> Iterator[Callable[[Stream], _Step]]:
    """Decodes one more token at every call, with slots for `share` of the experts, and calls what it is given after
    every layer."""
    with _model(kernels, share, prefetch) as (model, cache, executor):
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
        yield number % _CONFIG.vocab_size


@contextmanager
def _model(
    kernels: Kernels, share: float, prefetch: bool, config: ModelConfig = _CONFIG, routed: Kernels | None = None
) -> Iterator[tuple[DeepseekV3, KVCache, Executor]]:
    """The model with slots for `share` of its experts, which `routed` computes, `kernels` unless given."""
    slots = round(share * len(config.moe_layers) * config.n_routed_experts)
    with tempfile.TemporaryDirectory(prefix="expertpager-probe-") as folder:
        store = EmptyStore(Path(folder) / "experts", config)
        settings = {"policy": "ema+tokens", "prefetch": prefetch}
        executor = Executor(store, routed or kernels, slots=slots, max_tokens=len(_PROMPT), **settings)
        try:
            model = DeepseekV3(config, load_weights(RandomWeights(config), config), kernels, executor, CONTEXT)
            yield model, KVCache(config, CONTEXT), executor
        finally:
            executor.close()
