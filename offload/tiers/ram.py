"""The RAM tier: routed experts in slots of host memory, read from the drive as they are demanded.

Owns slots and what is told to whom: residency decides, `slot_reads` carry out, whoever computes is handed each
expert as soon as its bytes are there, and an idle drive is left to `reads_ahead`. Must not compute, nor know who does:
a processor that works in place and a device tier that copies from here use it alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from offload.cache.atlas import count_choices
from offload.cache.decisions import Decision, Service
from offload.cache.lookahead import EARLY_ROUTERS, LookAhead
from offload.cache.policy import CacheShape, Routing, create_policy
from offload.cache.preference import Preference
from offload.cache.residency import Residency, chosen
from offload.cache.trace import Trace, TraceRecorder
from offload.cache.usage import load_usage, save_usage
from offload.errors import BudgetError, UsageError
from offload.kernels import Residents
from offload.store.layout import ExpertWeights
from offload.telemetry import Telemetry
from offload.tiers.disk import READERS, DiskReader
from offload.tiers.host import SlotPool, SlotWeights
from offload.tiers.reads import Read
from offload.tiers.reads_ahead import ReadsAhead
from offload.tiers.slot_reads import ExpertStore, SlotReads, slot_nbytes
from offload.types import format_size

Use = Callable[[Sequence[tuple[int, int]]], None]
"""Is given (expert, slot) pairs whose bytes are there; the slots are its own until it returns."""


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
        followed: bool = True,
    ) -> None:
        """`half_life`: that of the policy, in tokens; None: its own. `usage`: file in which what the policy learns is
        kept between runs. `prefetch_depth`: see LookAhead. `prefer_resident`: margin of `preference`, without which
        routing is exact. `followed`: whether others read what the policy thinks, for a tier above this one."""
        config = store.config
        self.layers = config.moe_layers
        self.shape = CacheShape(len(self.layers), config.n_routed_experts, config.num_experts_per_tok)
        slots = min(slots, self.shape.keys)
        nbytes = slot_nbytes(store)
        _check_budget(self.shape, slots, nbytes, allow_slow)
        self._store = store
        self.residency = Residency(create_policy(policy, self.shape, half_life), slots, floor=self.shape.top_k)
        self.pool = SlotPool(slots, nbytes)
        self._weights = SlotWeights(store.layout, self.pool)
        self.reader = reader or DiskReader(threads=readers, mirror=mirror)
        self._reads = SlotReads(store, self.reader, self.pool, self._weights)
        self.telemetry = Telemetry(layer_stall_s=[0.0] * self.shape.layers)
        self._recorder = TraceRecorder(self.shape) if record else None
        self.preference = None if prefer_resident is None else Preference(self.residency, prefer_resident)
        # A recording starts from nothing, so that it can be replayed, and what it learned is less than what is kept.
        self._usage = None if record else usage
        if self._usage is not None:
            load_usage(self.residency.policy, self._usage, _model_name(store))
        self._ahead: ReadsAhead | None = None
        if prefetch:
            lookahead = LookAhead(self.residency.policy, prefetch_depth=prefetch_depth)
            self._ahead = ReadsAhead(self._reads, self.residency, lookahead, self._recorder, self.telemetry)
        # Where every expert has a slot, nothing is ever displaced: what the policy learns can wait until the step has
        # ended, when nothing comes between two layers that pushes code and data out of the processor's caches.
        self._learns_later = not followed and slots == self.shape.keys
        self._tokens: list[int] = []
        self._routing: list[Routing] = []  # of the layers of this step that have run, if it learns later
        self._next_layer = 0
        self._broken = False
        self._holders: list[Callable[[], bool]] = []

    def warm(self, trace: Trace) -> int:
        """Learn from `trace` and read its most used experts into the free slots; returns how many were read.

        Raises UsageError for the trace of another model, DiskError if an expert cannot be read.
        """
        if trace.shape != self.shape:
            found, own = (f"{s.layers} layers x {s.experts} experts, top-{s.top_k}" for s in (trace.shape, self.shape))
            raise UsageError(f"the profile's routing is of another model: {found}; this one has {own}")
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
        loads = self.residency.warm(keys.tolist())
        try:
            for layer, load in loads:
                self._reads.demand(layer, [load])
            while self._reads:
                self._collect(wait=True)
        except BaseException:
            self.abandon()
            raise
        return len(loads)

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
        if self._learns_later:
            self._learn()
            self._tokens, changed = list(tokens), False
        else:
            changed = self.residency.begin_step(tokens, upcoming)
        if self._recorder:
            self._recorder.begin_step(tokens)
        if self._ahead:
            self._ahead.begin_step(tokens)
        return changed

    def begin_layer(self, layer: int, routing: Routing) -> list[int]:
        """The router of `layer` chose `routing` [T, K]; returns the experts in it, ascending."""
        assert layer == self._next_layer, "MoE layers run in order, after begin_step"
        self._next_layer = layer + 1
        if self.preference:
            self.preference.executed(routing)
        if self._ahead and self._ahead.pending:
            self._settle(self._ahead)
        if self._recorder:
            self._recorder.route(layer, routing)
            if self._ahead:
                self._ahead.lookahead.routed(layer, routing[0])
        if self._learns_later:
            self._routing.append(routing)
            return chosen(routing)
        return self.residency.observe(layer, routing)

    def ran(self, layer: int, routing: Routing) -> None:
        """`layer` has run with `routing`, all of whose experts were resident: in place of everything a layer takes."""
        self.residency.used(layer, self.begin_layer(layer, routing))

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
        if self._ahead:
            self._ahead.begin(self._next_layer)

    def end_step(self) -> None:
        """The last layer has run; may be left out. What the policy learns later is learned now."""
        self._learn()

    @property
    def next_layer(self) -> int:
        """The layer that `begin_layer` is to be called with."""
        return self._next_layer

    def lookahead(self) -> int:
        """For how many layers ahead `expect` is of use now: not where nothing is missing, nor in a prefill."""
        if self._ahead is None or self.residency.slots >= self.shape.keys:
            return 0
        return self._ahead.lookahead.early_routers

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """A router applied early chose `experts` (best first) for `layer`: read them if the drive idles."""
        if self._ahead:
            self._ahead.lookahead.expect(layer, experts)
            self._ahead.begin(self._next_layer)

    def residents(self) -> Residents:
        """Where experts are, always up to date. They stay there until the tier is called again."""
        return Residents(self._store.layout, self.layers[0], self.residency.there, self._weights.addresses)

    def on_stuck(self, let_go: Callable[[], bool]) -> None:
        """`let_go` is asked to give one held slot back when all are taken; False if it holds none."""
        self._holders.append(let_go)

    def weights(self, slot: int) -> ExpertWeights:
        """The expert in `slot`, as views."""
        return self._weights[slot]

    def abandon(self) -> None:
        """A step broke off: drop its reads and wait for those under way, so that their slots can be used again."""
        self._broken = True  # until the end: an interrupt may come here, too
        self._reads.abandon()
        if self._ahead:
            self._ahead.abandon()
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
            foretold_right=self._ahead.lookahead.right if self._ahead else None,
        )

    def close(self) -> None:
        """Stop the readers and keep what was learned. Harmless when repeated."""
        self.reader.close()
        self._learn()
        if self._usage is not None:
            save_usage(self.residency.policy, self._usage, _model_name(self._store))
            self._usage = None

    def _learn(self) -> None:
        """Let the policy know of the step that has ended, or broken off, if it waits for that."""
        tokens, routing = self._tokens, self._routing
        if tokens or routing:
            self._tokens, self._routing = [], []
            self.residency.learn(tokens, routing)

    # -- reads -------------------------------------------------------------------------------

    def _begin_reads(self, decision: Decision) -> None:
        if decision.loads:
            self._reads.demand(decision.layer, decision.loads)
        for _, slot in decision.joins:
            ended = self._ahead.demanded(slot) if self._ahead else None
            if ended is not None:
                self._take(ended)

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
        read = self._reads.ended(wait)
        if read is not None and not (self._ahead and self._ahead.take(read)):
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
        assert self._ahead and self._ahead.pending, "every slot is taken and nothing is under way"
        if not self._ahead.arrived:
            self._collect(wait=True)
        self._settle(self._ahead)

    def _settle(self, ahead: ReadsAhead) -> None:
        """Let reads ahead that have ended count, and withdraw those for layers long past."""
        while self._collect(wait=False):
            pass
        ahead.settle(self._next_layer - 1)


def _model_name(store: ExpertStore) -> str:
    """Identifies the routing that was learned: sizes and the name of the store, not its codec."""
    config = store.config
    return f"{store.path.name} {config.hidden_size}x{config.moe_intermediate_size}"


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
