"""The RAM tier: routed experts in slots of host memory, read from the drive as they are demanded.

Owns slots, reads and what is told to whom: residency decides, the reader carries out, whoever computes is
handed each expert as soon as its bytes are there. Must not compute, nor know who does: a processor that
works in place and a device tier that copies from here use it alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from offload.cache.atlas import count_choices
from offload.cache.decisions import Decision, Service
from offload.cache.lookahead import EARLY_ROUTERS, LookAhead
from offload.cache.policy import CacheShape, Routing, create_policy
from offload.cache.preference import Preference
from offload.cache.residency import Residency
from offload.cache.speculation import granted
from offload.cache.trace import Trace, TraceRecorder
from offload.cache.usage import load_usage, save_usage
from offload.config import ModelConfig
from offload.errors import BudgetError, UsageError
from offload.store.layout import ExpertLayout, ExpertWeights
from offload.telemetry import Telemetry
from offload.tiers.disk import READERS, DiskReader
from offload.tiers.host import SlotPool
from offload.tiers.reads import Read
from offload.types import PAGE, ExpertId, Extent, align_up, format_size

Use = Callable[[Sequence[tuple[int, int]]], None]
"""Is given (expert, slot) pairs whose bytes are there; the slots are its own until it returns."""


class ExpertStore(Protocol):
    """What the tier needs of a store."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def layout(self) -> ExpertLayout: ...

    def locate(self, expert: ExpertId) -> Extent: ...


class RamTier:
    """Pages the routed experts of a store through `slots` slots of RAM. Layers are MoE layers, counted from 0.

    A forward pass is `begin_step`, then for every layer in order `begin_layer`, any number of demands and
    `end_layer`. A demand is opened (decided, its reads begun) and completed (every expert handed over); a
    second one may be opened before the first is completed. All memory is taken here, at load.

    Raises BudgetError if `slots` is below one token's working set, unless `allow_slow`.
    """

    def __init__(
        self,
        store: ExpertStore,
        *,
        slots: int,
        policy: str = "ema",
        half_life: float | None = None,
        allow_slow: bool = False,
        mirror: Path | None = None,
        record: bool = False,
        readers: int = READERS,
        prefetch: bool = True,
        prefetch_depth: int = EARLY_ROUTERS,
        usage: Path | None = None,
        reader: DiskReader | None = None,
        prefer_resident: float | None = None,
    ) -> None:
        """`half_life`: that of the policy, in tokens; None: its own. `usage`: file in which what the policy learns is
        kept between runs. `prefetch_depth`: see LookAhead. `prefer_resident`: margin of `preference`, without which
        routing is exact."""
        config = store.config
        self.layers = config.moe_layers
        self.shape = CacheShape(len(self.layers), config.n_routed_experts, config.num_experts_per_tok)
        slots = min(slots, self.shape.keys)
        slot_nbytes = _slot_nbytes(store, self.layers[0])
        _check_budget(self.shape, slots, slot_nbytes, allow_slow)
        self._store = store
        self.residency = Residency(create_policy(policy, self.shape, half_life), slots, floor=self.shape.top_k)
        self.pool = SlotPool(slots, slot_nbytes)
        self._weights = _SlotWeights(store.layout, self.pool)
        self.reader = reader or DiskReader(threads=readers, mirror=mirror)
        self.telemetry = Telemetry(layer_stall_s=[0.0] * self.shape.layers)
        self._recorder = TraceRecorder(self.shape) if record else None
        self.preference = None if prefer_resident is None else Preference(self.residency, prefer_resident)
        # A recording starts from nothing, so that it can be replayed, and what it learned is less than what is kept.
        self._usage = None if record else usage
        if self._usage is not None:
            load_usage(self.residency.policy, self._usage, _model_name(store))
        self._lookahead = LookAhead(self.residency.policy, prefetch_depth=prefetch_depth) if prefetch else None
        self._speculative: dict[int, tuple[int, int]] = {}  # slot -> (layer, expert) of reads nobody demanded yet
        self._settled: list[Read] = []
        self._reads: dict[int, Read] = {}
        self._next_layer = 0
        self._broken = False
        self._holders: list[Callable[[], bool]] = []

    def warm(self, trace: Trace) -> int:
        """Learn from `trace` and read its most used experts into the free slots; returns how many were read.

        Raises UsageError for the trace of another model, DiskError if an expert cannot be read.
        """
        if trace.shape != self.shape:
            raise UsageError(f"the profile's routing is of another model: {trace.shape}, not {self.shape}")
        if self._recorder:  # a replay of the recording begins with empty slots
            self.telemetry.note("not warmed: a run that is recorded begins with empty slots")
            return 0
        counts = count_choices(trace)
        for token, experts in zip(trace.tokens.tolist(), trace.experts.tolist(), strict=True):
            # One by one, as in decoding: what many tokens need at once says little about the next one.
            self.residency.begin_step([token])
            for layer, ids in enumerate(experts):
                self.residency.observe(layer, [ids])
        keys = np.argsort(-counts.reshape(-1), kind="stable")[: np.count_nonzero(counts)]
        reads = [self._read(layer, load.expert, load.slot) for layer, load in self.residency.warm(keys.tolist())]
        self.reader.submit(reads)
        try:
            while self._reads:
                self._collect(wait=True)
        except BaseException:
            self.abandon()
            raise
        return len(reads)

    # -- a forward pass ----------------------------------------------------------------------

    def begin_session(self) -> None:
        """The next step begins a new conversation."""
        if self._recorder:
            self._recorder.begin_session()

    def begin_step(self, tokens: Sequence[int], upcoming: Sequence[int] = ()) -> bool:
        """A forward pass over `tokens` begins; `upcoming` are tokens already known to follow them.

        Returns whether values of the policy changed.
        """
        if self._broken:
            self.abandon()
        self._next_layer = 0
        changed = self.residency.begin_step(tokens, upcoming)
        if self._recorder:
            self._recorder.begin_step(tokens)
        if self._lookahead:
            self._lookahead.begin_step(tokens, self.residency.events.absent)
            self._speculate(0)
        return changed

    def begin_layer(self, layer: int, routing: Routing) -> list[int]:
        """The router of `layer` chose `routing` [T, K]; returns the experts in it, ascending."""
        assert layer == self._next_layer, "MoE layers run in order, after begin_step"
        self._next_layer = layer + 1
        if self.preference:
            self.preference.executed(routing)
        if self._speculative:
            self._settle()
        if self._recorder:
            self._recorder.route(layer, routing)
            if self._lookahead:
                self._lookahead.routed(layer, routing[0])
        return self.residency.observe(layer, routing)

    def at_hand(self, layer: int, experts: Sequence[int]) -> list[int] | None:
        """The slots of `experts`, if the bytes of all of them are there: a demand that is complete at once.

        The slots are the caller's until the next call. None, with nothing changed, if anything must be read.
        """
        return self.residency.take(layer, experts)

    def open(self, layer: int, wanted: list[int]) -> Service:
        """Decide about `wanted` (ascending, each once) and begin the reads of the first wave."""
        try:
            return self.residency.open(layer, wanted, self._begin_reads)
        except BaseException:
            self.abandon()
            raise

    def complete(self, demand: Service, use: Use) -> None:
        """Hand every expert of `demand` to `use` once: hits at once, every other as soon as it is there.

        Raises DiskError if an expert cannot be read, and whatever `use` raises; the tier stays usable.
        """
        try:
            self.residency.complete(demand, self._begin_reads, lambda decision: self._serve(decision, use), self._stuck)
        except BaseException:
            self.abandon()
            raise

    def end_layer(self) -> None:
        """All demands of the layer are complete: the drive is free for speculation."""
        if self._lookahead:
            self._speculate(self._next_layer)

    def lookahead(self) -> int:
        """For how many layers ahead `expect` is of use now: not where nothing is missing, nor in a prefill."""
        if self._lookahead is None or self.residency.slots >= self.shape.keys:
            return 0
        return self._lookahead.early_routers

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """A router applied early chose `experts` (best first) for `layer`: read them if the drive idles."""
        if self._lookahead:
            self._lookahead.expect(layer, experts)
            self._speculate(self._next_layer)

    def on_stuck(self, let_go: Callable[[], bool]) -> None:
        """`let_go` is asked to give one held slot back when all are taken; False if it holds none."""
        self._holders.append(let_go)

    def weights(self, slot: int) -> ExpertWeights:
        """The expert in `slot`, as views."""
        return self._weights[slot]

    def abandon(self) -> None:
        """A step broke off: drop its reads and wait for those under way, so that their slots can be used again."""
        self._broken = True  # until the end: an interrupt may come here, too
        self.reader.abandon()
        self._reads.clear()
        self._settled.clear()
        self._speculative.clear()
        self.residency.abandon()
        self._broken = False

    # -- around a run ------------------------------------------------------------------------

    def counters(self) -> Telemetry:
        """The telemetry, brought up to date."""
        ram, events, disk = self.telemetry.ram, self.residency.events, self.reader.snapshot()
        for name, value in vars(events).items():
            setattr(ram, name, value)
        ram.reads, ram.bytes_read, ram.retries, ram.read_s = disk.reads, disk.bytes_read, disk.retries, disk.busy_s
        ram.stall_s = sum(self.telemetry.layer_stall_s)
        if self.preference:
            self.telemetry.choices, self.telemetry.changed_choices = self.preference.choices, self.preference.changed
        return self.telemetry

    def trace(self) -> Trace:
        """The recorded routing, with the settings and events that a replay must reproduce."""
        assert self._recorder is not None, "the executor was made with record=True"
        return self._recorder.trace(
            policy=self.residency.policy.name,
            half_life=self.residency.policy.half_life,
            slots=self.residency.slots,
            floor=self.residency.floor,
            width=self.residency.width,
            expert_bytes=self._store.layout.stride,
            events=vars(self.residency.events).copy(),
            telemetry=self.counters().as_dict(),
            prefer_resident=self.preference.margin if self.preference else None,
            foretold_right=self._lookahead.right if self._lookahead else None,
        )

    def close(self) -> None:
        """Stop the readers and keep what was learned. Harmless when repeated."""
        self.reader.close()
        if self._usage is not None:
            save_usage(self.residency.policy, self._usage, _model_name(self._store))
            self._usage = None

    # -- reads -------------------------------------------------------------------------------

    def _read(self, layer: int, expert: int, slot: int) -> Read:
        """A read of an expert into `slot`, not yet queued."""
        name = ExpertId(self.layers[layer], expert)
        what = f"expert {expert} of layer {name.layer}"
        read = Read(self._store.locate(name), self.pool.buffer(slot), what, tag=slot)
        self._reads[slot] = read
        self._weights.filling(slot, read.skip)
        return read

    def _begin_reads(self, decision: Decision) -> None:
        if decision.loads:
            self.reader.submit([self._read(decision.layer, load.expert, load.slot) for load in decision.loads])
        for _, slot in decision.joins:
            self._speculative.pop(slot, None)
            if slot in self._reads:
                self.reader.promote(self._reads[slot])
                continue
            for read in [read for read in self._settled if read.tag == slot]:  # it has ended, but nobody was told
                self._settled.remove(read)
                self._take(read)

    def _serve(self, decision: Decision, use: Use) -> None:
        if decision.hits:
            use(decision.hits)
        missing = dict(decision.joins) | {load.expert: load.slot for load in decision.loads}
        while missing:
            while self._collect(wait=False):
                pass
            there = [(e, slot) for e, slot in missing.items() if not self.residency.is_loading(slot)]
            if there:
                use(there)
                for expert, _ in there:
                    del missing[expert]
                continue
            since = time.perf_counter()
            arrived = self._collect(wait=True)
            assert arrived is not None, f"experts {sorted(missing)} are awaited, but nothing is being read"
            self.telemetry.layer_stall_s[decision.layer] += time.perf_counter() - since

    def _collect(self, wait: bool) -> Read | None:
        """Take note of the next read that has ended. Raises its DiskError."""
        read = self.reader.completed(wait)
        if read is None:
            return None
        del self._reads[read.tag]
        if read.tag in self._speculative:
            self._settled.append(read)  # nobody waits for it: it counts from the next layer on
        else:
            self._take(read)
        return read

    def _take(self, read: Read) -> None:
        """A read that somebody waits for has ended. Raises its DiskError."""
        if read.error is not None:
            self.residency.failed(read.tag)
            raise read.error
        self.residency.loaded(read.tag)

    def _stuck(self) -> None:
        if any(let_go() for let_go in self._holders):
            return
        assert self._speculative, "every slot is taken and nothing is under way"
        if not self._settled:
            self._collect(wait=True)
        self._settle()

    # -- speculation: issued and settled between layers only, so that a replay can repeat it ------

    def _speculate(self, first: int) -> None:
        """Use an idle drive to read what the layers from `first` on will probably need."""
        lookahead = self._lookahead
        assert lookahead is not None
        if lookahead.idle or self.residency.resident == self.shape.keys:
            return  # nothing to read, or every expert has a slot
        if len(self._reads) > len(self._speculative):
            return  # somebody waits for a read
        for layer, load in granted(lookahead, self.residency, first, len(self._speculative)):
            if self._recorder:
                self._recorder.prefetch(0, layer, load.expert)
            self._speculative[load.slot] = layer, load.expert
            self.reader.prefetch(self._read(layer, load.expert, load.slot))

    def _settle(self) -> None:
        """Speculative reads that have ended become residents; those for layers long past are withdrawn."""
        while self._collect(wait=False):
            pass
        for read in self._settled:
            layer, expert = self._speculative.pop(read.tag)
            (self.residency.loaded if read.error is None else self.residency.failed)(read.tag)
            if self._recorder:
                self._recorder.prefetch(1 if read.error is None else 3, layer, expert)
        self._settled.clear()
        for slot, (layer, expert) in list(self._speculative.items()):
            if layer < self._next_layer - 1 and self.reader.cancel(self._reads[slot]):
                del self._speculative[slot], self._reads[slot]
                self.residency.cancelled(slot)
                victim = self.residency.holder(slot)
                if victim is not None:  # its bytes are intact, where they lay before
                    extent = self._store.locate(ExpertId(self.layers[victim[0]], victim[1]))
                    self._weights.filling(slot, extent.offset % PAGE)
                if self._recorder:
                    self._recorder.prefetch(2, layer, expert)
        lookahead = self._lookahead
        if lookahead is not None:
            lookahead.learn(self.residency.events)
            if lookahead.off_reason is not None:
                self.telemetry.note(lookahead.off_reason)


class _SlotWeights:
    """The expert in each slot as views; made once per slot where its bytes always lie alike."""

    def __init__(self, layout: ExpertLayout, pool: SlotPool) -> None:
        self._layout = layout
        self._pool = pool
        self._views: list[ExpertWeights | None] = [None] * pool.slots
        self._skips = [0] * pool.slots
        self._alignment = max(field.dtype.itemsize for field in layout.fields)
        self._fields_aligned = all(field.offset % field.dtype.itemsize == 0 for field in layout.fields)

    def filling(self, slot: int, skip: int) -> None:
        """An expert is being read into `slot`, its first byte at `skip`."""
        # A view of misaligned elements would be a copy, which goes stale when the slot is filled.
        if skip != self._skips[slot] or skip % self._alignment or not self._fields_aligned:
            self._views[slot] = None
            self._skips[slot] = skip

    def __getitem__(self, slot: int) -> ExpertWeights:
        weights = self._views[slot]
        if weights is None:
            weights = self._layout.views(self._pool.tensor(slot)[self._skips[slot] :])
            self._views[slot] = weights
        return weights


def _model_name(store: ExpertStore) -> str:
    """Identifies the routing that was learned: sizes and the name of the store, not its codec."""
    config = store.config
    return f"{store.path.name} {config.hidden_size}x{config.moe_intermediate_size}"


def _slot_nbytes(store: ExpertStore, layer: int) -> int:
    """Bytes of a slot: an expert with the pages around it, the same for every expert."""
    stride = store.layout.stride
    first = store.locate(ExpertId(layer, 0)).offset
    if stride % PAGE == 0 and first % PAGE == 0:
        return stride
    return align_up(stride) + PAGE


def _check_budget(shape: CacheShape, slots: int, slot_nbytes: int, allow_slow: bool) -> None:
    need = shape.layers * shape.top_k
    if slots < 1:
        raise BudgetError(f"no expert slot of {format_size(slot_nbytes)} fits; give a larger --ram")
    if slots < need and not allow_slow:
        raise BudgetError(
            f"RAM for {slots} experts ({format_size(slots * slot_nbytes)}) is below one token's working set of "
            f"{need} ({shape.layers} layers x top-{shape.top_k}, {format_size(need * slot_nbytes)}): nearly every "
            "expert would be read for every token; give a larger --ram, or --allow-slow to run all the same"
        )
