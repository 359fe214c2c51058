"""A loaded model: one backend, one tokenizer, ready to generate.

Owns the life of its parts and what is asked of them. What computes, and in which memory, is the backend's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.engine.backend import Backend, load_on_cpu, load_on_devices
from offload.engine.backend import ram_for_share as share_ram
from offload.engine.beside_plan import beside_plan, machine_at_hand, model_cost, phases_of
from offload.engine.devices import open_devices
from offload.engine.generation import Generation, check_prompt, generate
from offload.engine.options import RuntimeOptions
from offload.engine.request import GenerationStep, resolve_sampling
from offload.engine.summary import RunSummary, Snapshot
from offload.engine.tokenizer import end_of_sequence_ids, load_tokenizer, need_tokenizer, read_generation_config
from offload.errors import UsageError
from offload.kernels import Kernels, select
from offload.model.blocks import blocks
from offload.model.kv_cache import KVCache
from offload.model.transformer import DeepseekV3
from offload.model.watch import WatchedExperts, Watcher
from offload.store import Store
from offload.telemetry import Telemetry
from offload.tiers.device import Device
from offload.tiers.device_executor import DeviceExecutor
from offload.tiers.executor import Executor
from offload.tune.budget import DEFAULT_CONTEXT
from offload.tune.compare import Comparison
from offload.tune.machine import MachineSpec

log = logging.getLogger("expertpager")

READ_HERE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Small files on which the text depends. Changing them may be meant, so that is told and not refused."""

Progress = Callable[[float], None]
"""Is told the share of a prompt that has been computed, 0..1."""


class Engine:
    """Generates with the model of one store. Made by `offload.load`; one generation at a time."""

    def __init__(
        self,
        store: str | Path,
        options: RuntimeOptions | None = None,
        devices: Sequence[Device] | None = None,
        *,
        saved_profile: Path | None = None,
        share: float = 1.0,
    ) -> None:
        """See `offload.load`. `devices` takes the place of those that `options` would find; `saved_profile` is the
        file that `options` came from without having been asked for. Budgets that `options` leave open are made for
        `share` (0..1) of the routed experts, in RAM and in VRAM."""
        self._saved_profile = saved_profile
        self.options = options = options or RuntimeOptions()
        found = open_devices(options) if devices is None else devices
        self._trace_path = Path(options.trace) if options.trace else None
        if self._trace_path:
            _check_writable(self._trace_path)
        self.store = Store.open(store)
        for name in self.store.altered(READ_HERE):
            log.warning(
                "%s is not as it was converted: edited, damaged or missing, and what is generated may depend on it; "
                "`expertpager verify --repair` restores it",
                self.store.path / name,
            )
        self.config = self.store.config
        self.context = _context(options.context, self.config.max_position_embeddings)
        self.tokenizer = load_tokenizer(self.store.path)  # before the plan: what it takes counts to the process
        self._early_routers = options.early_routers
        record = self._trace_path is not None
        if found:
            backend = load_on_devices(self.store, options, self.context, record, found, share)
        else:
            backend = load_on_cpu(self.store, options, self.context, record, share)
        self._loaded: Backend | None = backend
        self._described = self._describe(backend)
        self._counters = backend.executor.counters()
        self.plan, self.vram_plans = backend.plan, backend.vram
        self.generation_config = read_generation_config(self.store.path)
        self.eos_ids = end_of_sequence_ids(self.store.path, self.tokenizer)
        self._summary: RunSummary | None = None

    # -- generation --------------------------------------------------------------------------

    def generate(
        self, prompt_ids: Sequence[int], *, progress: Progress | None = None, **sampling: Any
    ) -> Generator[GenerationStep, None, None]:
        """Steps with `token_id` and `text` after `prompt_ids`, until a stop or the limit.

        `sampling` are the fields of SamplingParams; what is not given comes from the checkpoint's
        generation_config.json, else from the defaults. Raises UsageError at once for a prompt or an option
        that cannot be used. Closing the iterator ends the generation. `progress` is told the share of the prompt
        that has been computed, after each layer of each chunk.
        """
        params = resolve_sampling(sampling, self.generation_config)
        run = generate(
            lambda token_ids: self._step(token_ids, progress),
            prompt_ids,
            params,
            tokenizer=self.tokenizer,
            eos_ids=self.eos_ids,
            context_limit=self.context,
            vocab_size=self.config.vocab_size,
        )
        return self._steps(run)

    def logits(self, token_ids: Sequence[int], chunk: int | None = None) -> Tensor:
        """Teacher-forced logits, float32 [T, vocab]: row t is the prediction after token t.

        `chunk` tokens make a forward pass: with 1 they go one by one, as in decoding.
        """
        ids = check_prompt(token_ids, vocab_size=self.config.vocab_size)
        self._begin()
        # A block at a time: the vocabulary is far wider than anything else that is set aside for a chunk.
        return torch.cat(
            [
                self._model.logits(hidden[rows]).cpu()
                for hidden in self._chunks(ids, chunk)
                for rows in blocks(hidden.shape[0])
            ]
        )

    def observe(self, token_ids: Sequence[int], watcher: Watcher) -> None:
        """Run `token_ids` as a conversation of its own, showing `watcher` every call of the routed experts."""
        ids = check_prompt(token_ids, vocab_size=self.config.vocab_size)
        self._begin()
        self._cache.require(len(ids))
        routed = self._model.routed
        self._model.routed = WatchedExperts(routed, watcher)
        try:
            for _ in self._chunks(ids):
                pass
        finally:
            self._model.routed = routed

    def router(self, layer: int) -> tuple[Tensor, Tensor]:
        """Router weight float32 [E, H] and correction bias float32 [E] of an MoE layer."""
        moe = self._model.weights.layers[layer].moe
        assert moe is not None, "only MoE layers have a router"
        return moe.router, moe.bias

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, beginning-of-sequence included once. Raises TokenizerError without a tokenizer."""
        return need_tokenizer(self.tokenizer, self.store.path).encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation in the checkpoint's chat template, ready for the answer."""
        return need_tokenizer(self.tokenizer, self.store.path).encode_chat(messages, **options)

    # -- about the engine --------------------------------------------------------------------

    @property
    def kernels(self) -> Kernels:
        """What computes. It knows the weights it has met, so it is the engine's only as long as they are."""
        return self._backend.kernels

    @property
    def name(self) -> str:
        """What the model is called: where it came from, else the store's folder."""
        return str(self.store.manifest.source.get("name") or self.store.path.name)

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to vocab_size - 1."""
        return self.config.vocab_size

    def counters(self) -> dict[str, object]:
        """What the tiers did since the model was loaded, as plain values."""
        return self._telemetry().as_dict()

    def snapshot(self) -> Snapshot:
        """The same at this moment, to be compared with another."""
        return Snapshot.take(self._telemetry())

    def summary(self) -> RunSummary:
        """What the last generation did. Raises UsageError before the first."""
        if self._summary is None:
            raise UsageError("nothing has been generated yet")
        return self._summary

    def beside_plan(self) -> list[str]:
        """The last generation beside the plan: empty without a machine file, or before the first."""
        return [item.line() for item in self._summary.comparisons] if self._summary else []

    def describe(self) -> list[str]:
        """What was loaded, for people: one line per fact."""
        return self._described

    def _describe(self, backend: Backend) -> list[str]:
        recipe, margin = self.store.manifest.recipe, self.options.prefer_resident
        half_life = "" if self.options.half_life is None else f" with a half-life of {self.options.half_life:g} tokens"
        lines = [
            f"{self.name}: experts {recipe['experts']}, resident {recipe['resident']}, {backend.kernels.name} kernels, "
            f"policy {backend.executor.ram.residency.policy.name}{half_life}",
            *backend.describe(),
        ]
        if self._saved_profile is not None:
            lines.append(f"options of {self._saved_profile}, saved by tune; --profile none runs without them")
        if backend.warmed:
            lines.append(f"{backend.warmed} experts that {self.options.warm} uses most were read at the start")
        if margin is not None:
            lines.append(
                f"prefer-resident {margin:g}: a resident expert is chosen before a missing one whose biased score is "
                "less than that above it; the text depends on what is resident, and is not that of exact routing"
            )
        return lines

    def close(self) -> None:
        """Stop readers, write the trace, give the memory back. Harmless when repeated.

        What was counted and summed up can still be asked for; the model must be loaded again.
        """
        if self._loaded is None:
            return
        executor = self._executor
        try:
            if self._trace_path is not None:
                executor.trace().save(self._trace_path)
        finally:
            executor.close()
            self._counters = executor.counters()
            self._loaded = None  # slots and weights go, even if somebody keeps the engine

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------

    @property
    def _backend(self) -> Backend:
        if self._loaded is None:
            raise UsageError("this engine has been closed; load the store again")
        return self._loaded

    @property
    def _executor(self) -> Executor | DeviceExecutor:
        return self._backend.executor

    @property
    def _model(self) -> DeepseekV3:
        return self._backend.model

    @property
    def _cache(self) -> KVCache:
        return self._backend.cache

    def _telemetry(self) -> Telemetry:
        return self._counters if self._loaded is None else self._executor.counters()

    def _begin(self) -> None:
        self._cache.truncate(0)
        self._executor.begin_session()

    def _chunks(
        self, token_ids: Sequence[int], chunk: int | None = None, progress: Progress | None = None
    ) -> Iterator[Tensor]:
        size = min(chunk or self.plan.chunk, self.plan.chunk)
        for first in range(0, len(token_ids), size):
            part = list(token_ids[first : first + size])

            def layer_done(layers: int, before: int = first, tokens: int = len(part)) -> None:
                assert progress is not None
                progress((before + tokens * layers / self.config.num_hidden_layers) / len(token_ids))

            with self._whole():
                hidden = self._model.forward(part, self._cache, layer_done if progress else None)
            yield hidden

    def _step(self, token_ids: Sequence[int], progress: Progress | None) -> Any:
        if len(token_ids) == 1:
            with self._whole():
                return self._model.next_logits(token_ids[0], self._cache)[0].cpu().numpy()
        *_, hidden = self._chunks(token_ids, progress=progress)
        return self._model.logits(hidden[-1:])[0].cpu().numpy()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A forward pass, or none: Ctrl-C may come anywhere in it."""
        try:
            yield
        except BaseException:
            self._executor.abandon()
            raise

    def _steps(self, run: Generation) -> Generator[GenerationStep, None, None]:
        self._begin()
        before = self.snapshot()
        after_prompt: Snapshot | None = None
        with closing(run):
            try:
                for step in run:
                    if after_prompt is None:
                        after_prompt = self.snapshot()
                    yield step
            finally:
                now = self._executor.counters()
                summary = RunSummary.of(run.response, before, now, self._backend)
                if after_prompt is not None and self.machine is not None:
                    summary = replace(summary, comparisons=self._compared(summary, before, after_prompt))
                self._summary = summary

    @cached_property
    def machine(self) -> MachineSpec | None:
        """What `probe` measured, where there is a machine file with the store or in the working folder."""
        return machine_at_hand(self.store.path)

    def _compared(self, summary: RunSummary, before: Snapshot, after_prompt: Snapshot) -> tuple[Comparison, ...]:
        assert self.machine is not None
        cold = before.ram.misses == 0 and not self._backend.warmed
        phases = phases_of(summary.response, before, after_prompt, self.snapshot())
        model, early = model_cost(self.store), self._early_routers
        return beside_plan(
            model,
            self.machine.under(self.options.policy),
            self.plan,
            phases,
            cold=cold,
            early_routers=early,
            vram=self._backend.vram,
            hybrid=self.options.split == "hybrid",
        )


def ram_for_share(store: str | Path, share: float, context: int | None = None) -> int:
    """The RAM budget with which `share` (0..1) of the routed experts of `store` have a slot."""
    opened = Store.open(store)
    # An engine measures the process when kernels and tokenizer are loaded; what they take is there from now on.
    loaded = select("auto", None), load_tokenizer(opened.path)
    nbytes = share_ram(opened, share, _context(context, opened.config.max_position_embeddings))
    del loaded
    return nbytes


def _check_writable(trace: Path) -> None:
    """A recording that cannot be kept is refused before anything is computed."""
    if not trace.parent.is_dir():
        raise UsageError(f"--trace {trace}: there is no folder {trace.parent}")
    if trace.is_dir():
        raise UsageError(f"--trace {trace} is a folder")
    if not os.access(trace if trace.exists() else trace.parent, os.W_OK):
        raise UsageError(f"--trace {trace} cannot be written: Permission denied")


def _context(wanted: int | None, longest: int) -> int:
    if wanted is None:
        return min(DEFAULT_CONTEXT, longest)
    if not 1 <= wanted <= longest:
        raise UsageError(f"--context {wanted}: the model's positions allow 1 to {longest}")
    return wanted
