"""What layers and tokens cost on a GPU besides weights and copies: measured with a model too small to matter.

Owns that model, in two depths, whose difference is what a layer takes. It runs the decoder, its recordings, the
residency and the executor exactly as a real model does, with every expert in VRAM and with slots for most of them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median

import torch

from offload.config import ModelConfig
from offload.kernels.device import DeviceKernels, ExpertSlab
from offload.model.kv_cache import KVCache
from offload.model.place import Place
from offload.model.single_token import SingleToken
from offload.model.transformer import DeepseekV3
from offload.model.weights import PlacedWeights, load_weights
from offload.quant import get_codec
from offload.store.layout import ExpertLayout
from offload.tiers.device import Device
from offload.tiers.device_executor import DeviceExecutor, DeviceShare
from offload.tiers.vram_memory import slot_nbytes
from offload.tune.attention_shapes import AttentionShapes
from offload.tune.probe_attention import random_layer
from offload.tune.probe_gpu_kernels import TOP_K, expert_read, resident_read
from offload.tune.small_model import CONTEXT, EmptyStore, RandomWeights, small_config

DEPTHS = (5, 9)
"""Layers, one of them dense."""

PAGED_SHARE = 0.9
"""Share of the experts that have a slot where the host's decisions are measured: few are copied."""

ROUNDS = 8
"""Tokens at least that each of the models decodes."""

_PROMPT_TOKENS = 64
_LEAST_S = 1e-6


def _config(layers: int) -> ModelConfig:
    """Sizes that all kernels of a device take."""
    return small_config(
        layers,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=320,
        moe_intermediate_size=160,
        q_lora_rank=96,
        kv_lora_rank=128,
        qk_nope_head_dim=48,
        qk_rope_head_dim=32,
        v_head_dim=64,
    )


@dataclass(frozen=True)
class GpuOverhead:
    """Seconds that are neither weights nor copies; see the fields of `Gpu`."""

    layer_s: float
    """Without the products: their least times are in the rates of kernels."""
    prompt_layer_s: float
    token_s: float
    """Without sampling."""
    decide_s: float
    decide_token_s: float


@dataclass
class _Run:
    """A model on the device."""

    token: Callable[[], float]
    """Decodes one more; the seconds it took."""
    prompt: Callable[[], float]


def measure_gpu_overhead(device: Device, kernels: DeviceKernels, seconds: float) -> GpuOverhead:
    """All of it in a few times `seconds`. The models take turns, since their differences are small beside what other
    work does to each."""
    with ExitStack() as stack:
        settings = [(share, depth) for share in (1.0, PAGED_SHARE) for depth in DEPTHS]
        runs = [stack.enter_context(_model(device, kernels, depth, share)) for share, depth in settings]
        prompts = [[run.prompt() for run in runs[:2]] for _ in range(3)][1:]  # the first makes what is made once
        for run in runs[2:]:
            run.prompt()  # brings in experts
        tokens: list[list[float]] = []
        begun = time.perf_counter()
        while len(tokens) < ROUNDS or time.perf_counter() - begun < 3 * seconds:
            tokens.append([run.token() for run in runs])
        with device.guard():
            device.synchronize()  # closing the first of them unlocks the pages of all
        products = _products(device, kernels, seconds / 4)
    apart = DEPTHS[1] - DEPTHS[0]
    few, many, few_paged, many_paged = (median(times) for times in zip(*tokens, strict=True))
    layer, decide = (many - few) / apart, (many_paged - few_paged) / apart
    token = few - DEPTHS[0] * layer
    found = {
        "layer_s": layer - products,
        "prompt_layer_s": median((b - a) / apart for a, b in prompts),
        "token_s": token,
        "decide_s": decide,
        "decide_token_s": few_paged - DEPTHS[0] * decide - token,
    }
    return GpuOverhead(**{name: max(_LEAST_S, spent) for name, spent in found.items()})


def _products(device: Device, kernels: DeviceKernels, seconds: float) -> float:
    """Seconds of a layer's products, attention's and experts': small as they are, each takes its kernel's least time,
    which the rates of large ones hold, too."""
    config = _config(DEPTHS[0])
    shapes = AttentionShapes.of(config)
    nbytes, layer = random_layer("bf16", shapes)
    layout = ExpertLayout(get_codec("int4-g32"), config.hidden_size, config.moe_intermediate_size)
    with device.guard():
        slab = ExpertSlab(layout, device.empty((2 * TOP_K, slot_nbytes(layout)), torch.uint8).zero_())
        attention = nbytes / resident_read(device, kernels, layer, shapes, seconds)
        return attention + TOP_K * layout.stride / expert_read(device, kernels, slab, seconds)


@contextmanager
def _model(device: Device, kernels: DeviceKernels, layers: int, share: float) -> Iterator[_Run]:
    """The model with slots for `share` of its experts in VRAM, and for all of them in RAM."""
    config = _config(layers)
    experts = len(config.moe_layers) * config.n_routed_experts
    place = Place(device.torch_device, device.guard, device.record, device.call, device.sender)
    places = [place] * layers
    with tempfile.TemporaryDirectory(prefix="expertpager-probe-") as folder:
        executor = DeviceExecutor(
            EmptyStore(Path(folder) / "experts", config),
            [DeviceShare(device, kernels, config.moe_layers, round(share * experts))],
            slots=experts,
            max_tokens=_PROMPT_TOKENS,
            policy="ema+tokens",
        )
        try:
            executor.preload()
            model = DeepseekV3(
                config,
                load_weights(PlacedWeights(RandomWeights(config), places), config),
                kernels,
                executor,
                CONTEXT,
                places,
            )
            cache = KVCache(config, CONTEXT, [device.torch_device] * layers, kernels.latent_dtype)
            model.single = SingleToken(model, executor, kernels, cache)
            yield _running(model, executor, cache)
        finally:
            executor.close()


def _running(model: DeepseekV3, executor: DeviceExecutor, cache: KVCache) -> _Run:
    number, vocabulary = count(), model.config.vocab_size

    def token() -> float:
        if cache.length == CONTEXT:
            cache.truncate(_PROMPT_TOKENS)
        begun = time.perf_counter()
        model.next_logits(next(number) % vocabulary, cache).cpu()  # as the engine waits for them
        return time.perf_counter() - begun

    def prompt() -> float:
        cache.truncate(0)
        executor.begin_session()
        begun = time.perf_counter()
        hidden = model.forward([next(number) % vocabulary for _ in range(_PROMPT_TOKENS)], cache)
        model.logits(hidden[-1:]).cpu()
        return time.perf_counter() - begun

    return _Run(token, prompt)
