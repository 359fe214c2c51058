"""Routing traces: what the router chose, token by token, in a file.

Owns the trace format. Must not know policies, slots or how a trace was made.

A trace is an .npz file: `header` (JSON as bytes), `tokens` int32 [tokens], `steps` int32 [steps]
(tokens per forward pass: a prefill chunk, or 1), `experts` uint16 [tokens, layers, top_k] in the
router's order, `sessions` int32 [sessions] (steps at which a conversation begins), and `prefetches`
int32 [n, 5], the speculative loads that the recording run made (see `Prefetch`), without which its
hits could not be reproduced. The header names format, version, model shape and, for a recorded run,
the cache settings and the events it counted. One of the settings, the policy's half-life in tokens, is missing from
older traces, which were recorded with the policy's own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offload.cache.arrays import load_arrays, save_arrays
from offload.cache.policy import CacheShape, Routing
from offload.errors import DiskError, UsageError

FORMAT = "expertpager-trace"
VERSION = 1

MOST_EXPERTS = 1 << 16
"""Expert ids are stored as uint16; layers and top_k are far fewer."""


class Prefetch(NamedTuple):
    """A speculative load of the recording run, or its end, before layer `before` of `step`.

    `before` = number of layers: after the last layer, and before the next step begins.
    """

    step: int
    before: int
    kind: int
    """0 issued, 1 arrived, 2 cancelled, 3 failed."""
    layer: int
    expert: int


@dataclass
class Trace:
    """Routing of consecutive forward passes."""

    shape: CacheShape
    tokens: NDArray[np.int32]  # [T]
    steps: NDArray[np.int32]  # [S], sums to T
    experts: NDArray[np.uint16]  # [T, L, K]
    sessions: NDArray[np.int32] = field(default_factory=lambda: np.zeros(1, np.int32))
    prefetches: list[Prefetch] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)
    """Further facts: model, cache settings and events of the recorded run."""

    def passes(self) -> Iterator[tuple[list[int], list[Routing]]]:
        """Token ids and the routing of every layer, for each forward pass."""
        at = 0
        for count in self.steps.tolist():
            tokens = self.tokens[at : at + count].tolist()
            yield tokens, self.experts[at : at + count].transpose(1, 0, 2).tolist()
            at += count

    def save(self, path: Path | str) -> None:
        """Write the trace; a file of that name is replaced, at once or not at all. Raises DiskError."""
        shape = self.shape
        header = {
            "format": FORMAT,
            "version": VERSION,
            "layers": shape.layers,
            "experts": shape.experts,
            "top_k": shape.top_k,
        } | self.header
        arrays: dict[str, NDArray[Any]] = {
            "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
            "tokens": self.tokens,
            "steps": self.steps,
            "experts": self.experts,
            "sessions": self.sessions,
            "prefetches": np.asarray(self.prefetches, np.int32).reshape(-1, 5),
        }
        try:
            save_arrays(Path(path), arrays)
        except OSError as fault:
            raise DiskError(f"the trace {path} cannot be written: {fault.strerror}") from None

    @classmethod
    def load(cls, path: Path | str) -> Trace:
        """Read a trace. Raises UsageError naming the file and what is wrong with it."""
        try:
            arrays = load_arrays(path)
        except FileNotFoundError:
            raise UsageError(f"there is no trace {path}") from None
        except ValueError as error:
            raise UsageError(f"{path} is not a routing trace: {error}") from None
        try:
            return _checked(arrays)
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{path} is not a usable routing trace: {error}") from None


def _checked(arrays: dict[str, NDArray[Any]]) -> Trace:
    missing = {"header", "tokens", "steps", "experts", "sessions", "prefetches"} - arrays.keys()
    if missing:
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    header = json.loads(arrays["header"].tobytes())
    if not isinstance(header, dict) or header.pop("format", None) != FORMAT:
        raise ValueError(f"its header does not say {FORMAT!r}")
    version = header.pop("version", None)
    if version != VERSION:
        raise ValueError(f"it has version {version}, this program reads version {VERSION}")
    sizes = [header.pop(name, None) for name in ("layers", "experts", "top_k")]
    if not all(type(size) is int and 0 < size <= MOST_EXPERTS for size in sizes):
        raise ValueError(f"layers, experts and top_k are {sizes}: they must be whole numbers, 1 to {MOST_EXPERTS}")
    shape = CacheShape(*sizes)
    _check_facts(header)
    for name in ("tokens", "steps", "experts", "sessions", "prefetches"):
        if arrays[name].dtype.kind not in "iu":
            raise ValueError(f"{name} has type {arrays[name].dtype}, not integers")
    tokens, steps, experts = arrays["tokens"], arrays["steps"], arrays["experts"]
    if tokens.ndim != 1:
        raise ValueError(f"tokens has shape {tokens.shape}, expected (n,)")
    wanted = (len(tokens), shape.layers, shape.top_k)
    if experts.shape != wanted:
        raise ValueError(f"experts has shape {experts.shape}, expected {wanted}")
    _in_range("experts", experts, shape.experts)
    _in_range("tokens", tokens, 2**31)
    if steps.ndim != 1 or (steps < 1).any():
        raise ValueError(f"steps must be a row of numbers of tokens, 1 or more; it has shape {steps.shape}")
    covered = sum(steps.tolist())  # as whole numbers, which do not wrap around
    if covered != len(tokens):
        raise ValueError(f"its steps cover {covered} of {len(tokens)} tokens")
    sorted_experts = np.sort(experts, axis=-1)
    if (sorted_experts[..., 1:] == sorted_experts[..., :-1]).any():
        raise ValueError("experts holds the same expert twice for one token and layer")
    prefetches, sessions = arrays["prefetches"], arrays["sessions"]
    if prefetches.ndim != 2 or prefetches.shape[1] != 5:
        raise ValueError(f"prefetches has shape {prefetches.shape}, expected (n, 5)")
    bounds = Prefetch(len(steps) + 1, shape.layers + 1, 4, shape.layers, shape.experts)
    for name, column, limit in zip(Prefetch._fields, prefetches.T, bounds, strict=True):
        _in_range(f"{name} of prefetches", column, limit)
    if sessions.ndim != 1:
        raise ValueError(f"sessions has shape {sessions.shape}, expected (n,)")
    _in_range("sessions", sessions, len(steps) + 1)
    if (np.diff(sessions.astype(np.int64)) < 0).any():
        raise ValueError("sessions does not rise: each begins at a later step than the one before")
    return Trace(
        shape,
        tokens.astype(np.int32),
        steps.astype(np.int32),
        experts.astype(np.uint16),
        sessions.astype(np.int32),
        [Prefetch(*row) for row in prefetches.tolist()],
        header,
    )


def _check_facts(header: dict[str, Any]) -> None:
    """The facts of the header that a replay reads; each of them may be missing."""
    for name, kinds, what in (
        ("expert_bytes", (int,), "a number of bytes, 1 or more"),
        ("slots", (int,), "a number of slots, 1 or more"),
        ("half_life", (int, float), "a number of tokens above 0"),
    ):
        value = header.get(name)
        if value is not None and (type(value) not in kinds or not 0 < value <= sys.float_info.max):
            raise ValueError(f"{name} of its header is {value!r}, not {what}")
    if not isinstance(header.get("policy", ""), str):
        raise ValueError(f"policy of its header is {header['policy']!r}, not a name")


def _in_range(name: str, values: NDArray[Any], limit: int) -> None:
    if values.size and (int(values.min()) < 0 or int(values.max()) >= limit):
        wrong = int(values.min()) if int(values.min()) < 0 else int(values.max())
        raise ValueError(f"{name} holds {wrong}, which is not from 0 to {limit - 1}")


class TraceRecorder:
    """Collects a trace while a model runs: one `begin_step`, then `route` for each MoE layer."""

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self._tokens: list[int] = []
        self._steps: list[int] = []
        self._experts: list[NDArray[np.uint16]] = []
        self._sessions: list[int] = []
        self._prefetches: list[Prefetch] = []
        self._current: NDArray[np.uint16] | None = None
        self._seen = 0

    def begin_session(self) -> None:
        """The next step begins a new conversation."""
        self._finish_step()
        self._sessions.append(len(self._steps))

    def begin_step(self, tokens: Sequence[int]) -> None:
        """A forward pass over `tokens` begins."""
        self._finish_step()
        shape = self.shape
        self._current = np.empty((len(tokens), shape.layers, shape.top_k), np.uint16)
        self._pending = list(tokens)

    def route(self, layer: int, ids: Routing) -> None:
        """Layer `layer` chose `ids`."""
        assert self._current is not None, "a step begins before its layers"
        assert layer == self._seen, "layers out of order"
        self._current[:, layer, :] = ids
        self._seen += 1

    def prefetch(self, kind: int, layer: int, expert: int) -> None:
        """A speculative load was issued or ended; `kind` as in `Prefetch`."""
        self._prefetches.append(Prefetch(len(self._steps), self._seen, kind, layer, expert))

    def trace(self, **header: Any) -> Trace:
        """Everything recorded so far; an unfinished step is left out."""
        self._finish_step()
        shape = self.shape
        empty = np.empty((0, shape.layers, shape.top_k), np.uint16)
        return Trace(
            shape,
            np.asarray(self._tokens, np.int32),
            np.asarray(self._steps, np.int32),
            np.concatenate([empty, *self._experts]),
            np.asarray(self._sessions or [0], np.int32),
            list(self._prefetches),
            header,
        )

    def _finish_step(self) -> None:
        if self._current is not None and self._seen == self.shape.layers:
            self._tokens += self._pending
            self._steps.append(len(self._pending))
            self._experts.append(self._current)
        self._current = None
        self._seen = 0
