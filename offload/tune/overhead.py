"""What layers and misses cost besides matrix products: measured with a model whose matrices are too small to matter.

Owns that model: random weights in memory, a file of zeros as its experts. It runs the decoder, the residency and the
executor exactly as a real model does.
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

import torch
from torch import Tensor

from offload.config import ModelConfig
from offload.kernels import Kernels
from offload.kernels.api import Wave
from offload.model.kv_cache import KVCache
from offload.model.transformer import DeepseekV3
from offload.model.weights import load_weights
from offload.quant import QuantizedTensor, get_codec
from offload.store.layout import ExpertLayout
from offload.tiers.executor import Executor
from offload.types import PAGE, ExpertId, Extent, align_up

CONTEXT = 512
"""Tokens."""


def small_config(layers: int, **sizes: int) -> ModelConfig:
    """DeepSeek-V3's routing over 256 experts, matrices too small to matter; `sizes` by their names in config.json."""
    return ModelConfig.from_hf(
        {
            "model_type": "deepseek_v3",
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": layers,
            "first_k_dense_replace": 1,
            "num_attention_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": CONTEXT,
            "norm_topk_prob": True,
        }
        | sizes
    )


_CONFIG = small_config(9)

WHOLE_LAYERS = 33
"""Layers of the model whose tokens are measured whole: what a token takes once is spread over as many as is usual."""

_PROMPT = [token % _CONFIG.vocab_size for token in range(CONTEXT // 2)]


class RandomWeights:
    """Random resident weights of a model by HF name."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._shapes = _shapes(config)
        self._rng = torch.Generator().manual_seed(0)

    def resident(self, module: str) -> QuantizedTensor:
        last = module.rsplit(".", 1)[-1]
        rows, cols = self._shapes[f"shared {last}" if "shared_experts" in module else last]
        weight = torch.randn(rows, cols, generator=self._rng).mul(cols**-0.5).to(torch.bfloat16)
        return QuantizedTensor(get_codec("bf16"), rows, cols, {"weight": weight})

    def tensor(self, name: str) -> Tensor:
        c = self._config
        if name.endswith("norm.weight"):
            size = {"q_a_layernorm": c.q_lora_rank, "kv_a_layernorm": c.kv_lora_rank}.get(name.split(".")[-2])
            return torch.ones(size or c.hidden_size)
        if name.endswith("bias"):
            return torch.zeros(c.n_routed_experts)
        return torch.randn(c.n_routed_experts, c.hidden_size, generator=self._rng).to(torch.bfloat16)


class EmptyStore:
    """Experts of zeros in one file."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.config = config
        self.layout = ExpertLayout(get_codec("int4-g32"), config.hidden_size, config.moe_intermediate_size)
        self.path = path
        self._step = align_up(self.layout.stride)
        with path.open("wb") as file:
            file.truncate(len(config.moe_layers) * config.n_routed_experts * self._step + PAGE)

    def locate(self, expert: ExpertId) -> Extent:
        index = (expert.layer - self.config.moe_layers[0]) * self.config.n_routed_experts + expert.expert
        return Extent(self.path, index * self._step, self.layout.stride)


Stream = Callable[[], object]


class StreamingKernels:
    """Kernels after whose experts a stream passes through the caches, as the weights of real ones would have."""

    def __init__(self, kernels: Kernels, stream: Stream) -> None:
        self._kernels, self._stream = kernels, stream
        self.streaming_s = 0.0
        """Seconds that the stream took."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def experts(self, x: Tensor, wave: Wave, k: int, partial: Tensor) -> None:
        self._kernels.experts(x, wave, k, partial)
        begun = time.perf_counter()
        self._stream()
        self.streaming_s += time.perf_counter() - begun

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
    kernels are measured call by call and hold the rest. Deciding and
    reading come on top of them; for these `stream` reads between layers what a layer's weights are, and leaves the
    caches as they do, which nearly doubles their time.
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
    streaming = StreamingKernels(kernels, stream)
    with _model(kernels, 1.0, False, routed=streaming) as (model, cache, executor):

        def step(tokens: list[int]) -> _Step:
            cache.truncate(0)
            before = streaming.streaming_s
            found = _timed(executor, partial(model.forward, tokens, cache))
            executor.ram.end_step()
            return replace(found, busy_s=found.busy_s - (streaming.streaming_s - before))

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
        model.forward(_PROMPT, cache)  # brings in what these tokens use
        filled, number = cache.length, count()

        def step() -> _Step:
            if cache.length == CONTEXT:
                cache.truncate(filled)
            return _timed(executor, partial(model.next_logits, next(number) % _CONFIG.vocab_size, cache))

        yield step


@contextmanager
def _decoding(kernels: Kernels, share: float, prefetch: bool) -> Iterator[Callable[[Stream], _Step]]:
    """Decodes one more token at every call, with slots for `share` of the experts, and calls what it is given after
    every layer."""
    with _model(kernels, share, prefetch) as (model, cache, executor):
        model.forward(_PROMPT, cache)  # brings in what these tokens use
        filled, number = cache.length, count()

        def step(stream: Stream) -> _Step:
            streaming = 0.0

            def after_layer(_: int) -> None:
                nonlocal streaming
                begun = time.perf_counter()
                stream()
                streaming += time.perf_counter() - begun

            if cache.length == CONTEXT:
                cache.truncate(filled)
            token = [next(number) % _CONFIG.vocab_size]
            found = _timed(executor, partial(model.forward, token, cache, after_layer))
            return replace(found, busy_s=found.busy_s - streaming)

        yield step


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


def _shapes(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out, in] by the last part of a module's name."""
    heads, hidden, rank = c.num_attention_heads, c.hidden_size, c.q_lora_rank or 0
    shared = c.moe_intermediate_size * c.n_shared_experts
    return {
        "q_a_proj": (rank, hidden),
        "q_b_proj": (heads * c.qk_head_dim, rank),
        "kv_a_proj_with_mqa": (c.latent_dim, hidden),
        "kv_b_proj": (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        "o_proj": (hidden, heads * c.v_head_dim),
        "gate_proj": (c.intermediate_size, hidden),
        "up_proj": (c.intermediate_size, hidden),
        "down_proj": (hidden, c.intermediate_size),
        "shared gate_proj": (shared, hidden),
        "shared up_proj": (shared, hidden),
        "shared down_proj": (hidden, shared),
        "embed_tokens": (c.vocab_size, hidden),
        "lm_head": (c.vocab_size, hidden),
    }
