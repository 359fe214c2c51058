"""Replays a routing trace through the residency code, without bytes.

Owns the clocks of a simulated drive and memory. Must not know files or tensors. The decisions are
those of `residency`: this module answers only how long they would have taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from offload.cache.decisions import Decision
from offload.cache.policy import HALF_LIVES, CachePolicy, Routing, create_policy
from offload.cache.residency import Residency
from offload.cache.speculation import Foresight
from offload.cache.trace import Prefetch, Trace
from offload.telemetry import CacheEvents


@dataclass(frozen=True)
class Machine:
    """Rates that turn decisions into time."""

    expert_bytes: int
    drive_bytes_per_s: float
    drive_latency_s: float = 1e-4
    memory_bytes_per_s: float = 40e9
    """Rate at which resident experts are streamed through the processor while computing."""
    layer_s: float = 0.0
    """Time per layer and token for everything that is not a routed expert."""


@dataclass
class Result:
    """What one policy did with one number of slots."""

    policy: str
    slots: int
    tokens: int
    events: CacheEvents
    bytes_read: int = 0
    time_s: float = 0.0
    stall_s: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    decode_hits: int = 0
    decode_misses: int = 0
    """Demands of passes of one token."""
    decode_ahead: int = 0
    """Those among their hits whose expert was read ahead of its layer."""
    decode_reads: int = 0
    """All that decoding read, ahead or not, for use or for nothing."""

    @property
    def decode_hit_rate(self) -> float | None:
        """Share of the demands of decoding that were served without a read; None if nothing was decoded."""
        demands = self.decode_hits + self.decode_misses
        return self.decode_hits / demands if demands else None

    @property
    def hit_rate(self) -> float:
        """Share of demands served without a read."""
        demands = self.events.hits + self.events.misses
        return self.events.hits / demands if demands else 0.0

    def as_dict(self) -> dict[str, Any]:
        """A flat record for JSON."""
        record: dict[str, Any] = {"policy": self.policy, "slots": self.slots, "tokens": self.tokens}
        record |= asdict(self.events) | {"hit_rate": round(self.hit_rate, 6)}
        record |= {"bytes_read": self.bytes_read, "time_s": self.time_s, "stall_s": self.stall_s}
        return record | self.settings


class Replay:
    """Performs decisions against two clocks: the drive's and the computation's."""

    def __init__(self, residency: Residency, machine: Machine | None = None) -> None:
        self.residency = residency
        self.machine = machine
        self.now = 0.0
        self.stall_s = 0.0
        self.bytes_read = 0
        self._drive_free = 0.0
        self._arrival: dict[int, float] = {}
        self._tokens_of: dict[int, int] = {}

    def layer(self, layer: int, ids: Routing) -> None:
        """One MoE layer of one step."""
        if self.machine:
            self.now += self.machine.layer_s * len(ids)
        self.residency.serve(layer, ids, self._start, self._finish)

    def _start(self, decision: Decision) -> None:
        machine = self.machine
        if machine is None:
            return
        at = max(self.now, self._drive_free)
        for load in decision.loads:
            if at <= self.now:
                at = self.now + machine.drive_latency_s
            at += machine.expert_bytes / machine.drive_bytes_per_s
            self._arrival[load.slot] = at
            self.bytes_read += machine.expert_bytes
        if decision.loads:
            self._drive_free = at

    def _finish(self, decision: Decision) -> None:
        for _, slot in decision.joins:
            self.residency.loaded(slot)
        for load in decision.loads:
            self.residency.loaded(load.slot)
        machine = self.machine
        if machine is None:
            return
        compute = machine.expert_bytes / machine.memory_bytes_per_s
        self.now += compute * len(decision.hits)
        arriving = [slot for _, slot in decision.joins] + [load.slot for load in decision.loads]
        for arrival in sorted(self._arrival.pop(slot, self.now) for slot in arriving):
            if arrival > self.now:
                self.stall_s += arrival - self.now
                self.now = arrival
            self.now += compute


def replay(
    trace: Trace,
    policy: str | CachePolicy,
    slots: int,
    *,
    floor: int | None = None,
    width: int = 16,
    machine: Machine | None = None,
    prefetch_depth: int | None = None,
    **options: Any,
) -> Result:
    """Run a whole trace; `floor` is top_k unless given. `belady` is told the future.

    With `prefetch_depth` experts are read ahead as a run with that option would (see `Foresight`). Without it, and
    with the policy, its half-life and the slots of the recording, its speculative loads are repeated where they
    happened; other settings are replayed without speculation. The policy of the recording has the half-life of the
    recording unless `options` say otherwise; a trace that does not name one was recorded with the policy's own.
    """
    header = trace.header
    if isinstance(policy, str):
        if policy == "belady":
            options = options | {"future": [routing for _, routing in trace.passes()]}
        if policy == header.get("policy"):
            options = {"half_life": header.get("half_life")} | options
        policy = create_policy(policy, trace.shape, **options)
    residency = Residency(policy, slots, floor=trace.shape.top_k if floor is None else floor, width=width)
    clock = Replay(residency, machine)
    half_life = header.get("half_life") or HALF_LIVES.get(policy.name)
    recorded = (header.get("policy"), half_life, header.get("slots")) == (policy.name, policy.half_life, slots)
    speculation = (
        _Recorded(trace.prefetches if recorded else [], residency)
        if prefetch_depth is None
        else Foresight(trace, residency, prefetch_depth)
    )
    decode = CacheEvents()
    for tokens, routing in trace.passes():
        before = replace(residency.events)
        residency.begin_step(tokens)
        speculation.begin_step(tokens)
        for layer, ids in enumerate(routing):
            speculation.before(layer)
            clock.layer(layer, ids)
        speculation.before(trace.shape.layers)
        if len(tokens) == 1:
            decode += residency.events.minus(before)
    settings = {"floor": residency.floor, "width": residency.width, "half_life": policy.half_life}
    return Result(
        policy.name,
        slots,
        len(trace.tokens),
        residency.events,
        clock.bytes_read,
        clock.now,
        clock.stall_s,
        settings,
        decode.hits,
        decode.misses,
        decode.prefetch_useful + decode.prefetch_late,
        decode.misses + decode.prefetch_issued,
    )


class _Recorded:
    """Repeats the prefetches of a recorded run at their place in the trace."""

    def __init__(self, events: Sequence[Prefetch], residency: Residency) -> None:
        self._events = events
        self._at = 0
        self._step = -1
        self._residency = residency

    def begin_step(self, tokens: Sequence[int]) -> None:
        """The next step of the trace begins."""
        self._step += 1

    def before(self, layer: int) -> None:
        """Everything that happened before `layer` of the step."""
        residency, step = self._residency, self._step
        while self._at < len(self._events):
            event = self._events[self._at]
            if (event.step, event.before) > (step, layer):
                break
            self._at += 1
            slot = residency.slot(event.layer, event.expert)
            if event.kind == 0:
                residency.prefetch(event.layer, event.expert)
            elif slot >= 0 and residency.is_loading(slot):
                end = (residency.loaded, residency.cancelled, residency.failed)[event.kind - 1]
                end(slot)


def sweep(
    trace: Trace,
    policies: Sequence[str],
    sizes: Sequence[int],
    *,
    machine: Machine | None = None,
    **options: Any,
) -> list[Result]:
    """Every policy with every number of slots, in that order."""
    return [replay(trace, policy, slots, machine=machine, **options) for policy in policies for slots in sizes]
