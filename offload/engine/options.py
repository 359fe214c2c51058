"""How a model is run: the only defaults, overlaid by a TOML profile, then by what the caller gives.

Owns names, defaults and checks of runtime options. Must not act on them.
"""

from __future__ import annotations

import math
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from offload.cache.policy import POLICIES
from offload.errors import UsageError
from offload.kernels import BACKENDS
from offload.types import parse_size

DEVICES = ("auto", "cpu", "cuda")
SPLITS = ("gpu", "hybrid")
LIVE_POLICIES = tuple(name for name in POLICIES if name != "belady")
"""Belady's needs the future: it exists for replays only."""


@dataclass(frozen=True)
class RuntimeOptions:
    """The options of `offload.load`. Raises UsageError for a value that cannot be used.

    ram         all the RAM the process may use, bytes or "24GiB"; None: what is free, up to the whole model
    vram        all the VRAM the process may use; None: no VRAM tier
    device      auto, cpu or cuda
    kernels     auto, native or reference
    threads     threads of the native kernels; None: one per core
    context     longest prompt plus answer in tokens; None: 4096, or what the model allows
    policy      cache policy of the expert slots
    allow_slow  go below one token's working set of slots
    mirror      a second copy of the store on another drive; both are read
    prefetch    read experts that will probably be needed while the drive idles
    usage       file in which what is learned about expert use is kept; "auto": beside the store, else in the
                user's cache folder; "off": nothing is kept
    trace       file that gets the recorded routing when the engine is closed
    split       gpu: a device computes every expert; hybrid: the processor computes a part of those VRAM lacks
    warm        a domain's routing (`routing atlas --traces`): its experts fill the slots at load
    prefer_resident  margin within which a resident expert is chosen before a missing one; None: exact routing
    """

    ram: int | str | None = None
    vram: int | str | None = None
    device: str = "auto"
    kernels: str = "auto"
    threads: int | None = None
    context: int | None = None
    policy: str = "ema+tokens"
    allow_slow: bool = False
    mirror: str | Path | None = None
    prefetch: bool = True
    usage: str | Path = "auto"
    split: str = "gpu"
    trace: str | Path | None = None
    warm: str | Path | None = None
    prefer_resident: float | None = None

    def __post_init__(self) -> None:
        for name in ("ram", "vram"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, parse_size(value))
        _one_of("device", self.device, DEVICES)
        _one_of("kernels", self.kernels, BACKENDS)
        _one_of("split", self.split, SPLITS)
        _one_of("policy", self.policy, LIVE_POLICIES)
        for name in ("threads", "context"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} is {value!r}: it must be a whole number, 1 or more")
        margin = self.prefer_resident
        if margin is not None and (isinstance(margin, bool) or not 0 <= margin < math.inf):
            raise UsageError(f"prefer_resident is {margin!r}: it must be a margin of biased scores, 0 or more, as 0.05")
        for name in ("allow_slow", "prefetch"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise UsageError(f"{name} is {value!r}: it must be true or false")


def resolve_options(given: Mapping[str, Any], profile: str | Path | None = None) -> RuntimeOptions:
    """Defaults, then the file `profile`, then every value of `given` that is not None.

    A profile is a TOML file with options, in which `warm` is relative to the file; or a domain's routing, which
    means the same as a TOML file that only names it.

    Raises UsageError for an unknown name, in the profile with the file's name.
    """
    options = RuntimeOptions()
    if profile is not None:
        try:
            options = _overlay(options, _read_profile(Path(profile)))
        except UsageError as fault:
            raise UsageError(f"{profile}: {fault}") from None
    return _overlay(options, {name: value for name, value in given.items() if value is not None})


def _overlay(options: RuntimeOptions, values: Mapping[str, Any]) -> RuntimeOptions:
    known = [field.name for field in fields(RuntimeOptions)]
    for name in values:
        if name not in known:
            raise UsageError(f"unknown runtime option {name!r}; known: {', '.join(known)}")
    return replace(options, **values)


def _read_profile(path: Path) -> dict[str, Any]:
    if zipfile.is_zipfile(path):  # as .npz files are
        return {"warm": path}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise UsageError(f"cannot be read: {fault.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise UsageError(f"is not TOML: {fault}") from None
    if isinstance(values.get("warm"), str):
        values["warm"] = path.parent / values["warm"]
    return values


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"unknown {name} {value!r}; known: {', '.join(known)}")
