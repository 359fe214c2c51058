"""A loaded model: one budget, one executor, one tokenizer, ready to generate.

Owns the order of loading (plan first, then allocate exactly what was planned) and the life of its parts.
The numbers come from `budget`, the maths from `model`, the paging from `tiers`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from offload.cache.trace import Trace
from offload.engine.generation import Generation, check_prompt, generate
from offload.engine.options import RuntimeOptions
from offload.engine.request import GenerationStep, resolve_sampling
from offload.engine.summary import RunSummary, Snapshot
from offload.engine.tokenizer import end_of_sequence_ids, load_tokenizer, need_tokenizer, read_generation_config
from offload.engine.usage_file import usage_file
from offload.errors import BudgetError, UsageError
from offload.kernels import select
from offload.model.kv_cache import KVCache
from offload.model.transformer import DeepseekV3
from offload.model.watch import WatchedExperts, Watcher
from offload.model.weights import load_weights, widened_nbytes
from offload.store import Store
from offload.store.mirror import check_mirror
from offload.tiers.executor import Executor
from offload.tune.budget import DEFAULT_CONTEXT, FREE_SHARE, RamPlan, plan_ram, ram_for_slots
from offload.tune.memory import memory
from offload.types import format_size, parse_size

log = logging.getLogger("expertpager")


Progress = Callable[[float], None]
"""Is told the share of a prompt that has been computed, 0..1."""


class Engine:
    """Generates with the model of one store. Made by `offload.load`; one generation at a time."""

    def __init__(self, store: str | Path, options: RuntimeOptions | None = None) -> None:
        """See `offload.load`."""
        self.options = options = options or RuntimeOptions()
        _require_cpu(options)
        self._trace_path = Path(options.trace) if options.trace else None
        if self._trace_path and not self._trace_path.parent.is_dir():
            raise UsageError(f"--trace {self._trace_path}: there is no folder {self._trace_path.parent}")
        self.store = Store.open(store)
        self.config = self.store.config
        self.kernels = select(options.kernels, options.threads)
        self.context = _context(options.context, self.config.max_position_embeddings)
        self.tokenizer = load_tokenizer(self.store.path)
        mirror = check_mirror(self.store, options.mirror) if options.mirror is not None else None
        self.plan = _make_plan(self.store, self.context, options, _process_nbytes())
        self.generation_config = read_generation_config(self.store.path)
        self.eos_ids = end_of_sequence_ids(self.store.path, self.tokenizer)
        self._executor = Executor(
            self.store,
            self.kernels,
            slots=self.plan.slots,
            policy=options.policy,
            allow_slow=options.allow_slow,
            max_tokens=self.plan.chunk,
            record=self._trace_path is not None,
            prefer_resident=options.prefer_resident,
            mirror=mirror,
            prefetch=options.prefetch,
            usage=usage_file(self.store.path, options.usage),
        )
        self._warmed = self._executor.ram.warm(Trace.load(options.warm)) if options.warm else 0
        self._cache = KVCache(self.config, self.context)
        self._model = DeepseekV3(
            self.config, load_weights(self.store, self.config), self.kernels, self._executor, self.context
        )
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
        return torch.cat([self._model.logits(hidden) for hidden in self._chunks(ids, chunk)])

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
    def name(self) -> str:
        """What the model is called: where it came from, else the store's folder."""
        return str(self.store.manifest.source.get("name") or self.store.path.name)

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to vocab_size - 1."""
        return self.config.vocab_size

    def counters(self) -> dict[str, object]:
        """What the tiers did since the model was loaded, as plain values."""
        return self._executor.counters().as_dict()

    def summary(self) -> RunSummary:
        """What the last generation did. Raises UsageError before the first."""
        if self._summary is None:
            raise UsageError("nothing has been generated yet")
        return self._summary

    def describe(self) -> list[str]:
        """What was loaded, for people: one line per fact."""
        recipe, margin = self.store.manifest.recipe, self.options.prefer_resident
        lines = [
            f"{self.name}: experts {recipe['experts']}, resident {recipe['resident']}, {self.kernels.name} kernels, "
            f"policy {self._executor.ram.residency.policy.name}",
            self.plan.describe(),
        ]
        if self._warmed:
            lines.append(f"{self._warmed} experts that {self.options.warm} uses most were read at the start")
        if margin is not None:
            lines.append(
                f"prefer-resident {margin:g}: a resident expert is chosen before a missing one whose biased score is "
                "less than that above it; the text depends on what is resident, and is not that of exact routing"
            )
        return lines

    def close(self) -> None:
        """Stop readers, write the trace. Harmless when repeated."""
        if self._trace_path is not None:
            self._executor.trace().save(self._trace_path)
            self._trace_path = None
        self._executor.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------

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

            yield self._model.forward(part, self._cache, layer_done if progress else None)

    def _step(self, token_ids: Sequence[int], progress: Progress | None) -> Any:
        *_, hidden = self._chunks(token_ids, progress=progress if len(token_ids) > 1 else None)
        return self._model.logits(hidden[-1:])[0].numpy()

    def _steps(self, run: Generation) -> Generator[GenerationStep, None, None]:
        self._begin()
        before = Snapshot.take(self._executor.counters())
        with closing(run):
            try:
                yield from run
            finally:
                self._summary = RunSummary.of(run.response, before, self._executor.counters(), self.plan)


def ram_for_share(store: str | Path, share: float, context: int | None = None) -> int:
    """The RAM budget with which `share` (0..1) of the routed experts of `store` have a slot."""
    opened = Store.open(store)
    config = opened.config
    slots = round(share * config.n_routed_experts * len(config.moe_layers))
    # An engine measures the process when kernels and tokenizer are loaded; what they take is there from now on.
    loaded = select("auto", None), load_tokenizer(opened.path)
    demand = _demand(opened, _context(context, config.max_position_embeddings), _process_nbytes())
    del loaded
    return ram_for_slots(config, slots, **demand)


def _process_nbytes() -> int:
    return psutil.Process().memory_info().rss


def _demand(store: Store, context: int, process: int) -> dict[str, int]:
    """What a plan needs to know of the machine and the store, in bytes and tokens."""
    return {
        "process": process,
        "resident": store.resident_nbytes + widened_nbytes(store.config),
        "slot_nbytes": store.layout.slot_nbytes,
        "context": context,
    }


def _make_plan(store: Store, context: int, options: RuntimeOptions, process: int) -> RamPlan:
    demand, here = _demand(store, context, process), memory()
    free = process + int(here.available * FREE_SHARE)
    if options.ram is not None:
        limit = parse_size(options.ram)
    else:
        everything = store.config.n_routed_experts * len(store.config.moe_layers)
        limit = min(free, ram_for_slots(store.config, everything, **demand))
    plan = plan_ram(store.config, limit=limit, allow_slow=options.allow_slow, **demand)
    if plan.total > here.total:
        owner = "its control group allows" if here.limited_by_group else "this machine has"
        raise BudgetError(
            f"--ram {format_size(limit)}: {format_size(plan.total)} would be used, and {owner} "
            f"{format_size(here.total)}; give --ram {min(here.total, free) // 2**20}MiB or less"
        )
    if plan.total - process > here.available:
        log.warning(
            "--ram: %s more will be used, and only %s are free; expect swapping",
            format_size(plan.total - process),
            format_size(here.available),
        )
    return plan


def _require_cpu(options: RuntimeOptions) -> None:
    if options.device == "cuda" or options.vram is not None:
        raise UsageError("the CUDA tier is not part of this version; use --device cpu without --vram")
    if options.device == "auto" and torch.cuda.is_available():
        log.warning("a CUDA device is present, but this version computes on the CPU")


def _context(wanted: int | None, longest: int) -> int:
    if wanted is None:
        return min(DEFAULT_CONTEXT, longest)
    if not 1 <= wanted <= longest:
        raise UsageError(f"--context {wanted}: the model's positions allow 1 to {longest}")
    return wanted
