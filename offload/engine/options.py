"""How a model is run: the only defaults, overlaid by a TOML profile, then by what the caller gives.

Owns names, defaults and checks of runtime options. Must not act on them.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from offload.cache.lookahead import EARLY_ROUTERS
from offload.cache.policy import LEARNING, POLICIES, check_half_life
from offload.errors import UsageError
from offload.kernels import BACKENDS
from offload.tiers.disk import READERS
from offload.toml_file import line_of, parse_toml, read_text
from offload.types import parse_size

DEVICES = ("auto", "cpu", "cuda")
SPLITS = ("gpu", "hybrid")
SAVED_PROFILE = "profile.toml"
"""Where `tune` keeps what it found, in the store's folder."""

NO_PROFILE = "none"

LIVE_POLICIES = tuple(name for name in POLICIES if name != "belady")
"""Belady's needs the future: it exists for replays only."""


MOST_READERS = 256
DEEPEST = 8
"""Most layers ahead: each of them takes one more router per layer of every token."""


@dataclass(frozen=True)
class RuntimeOptions:
    """The options of `offload.load`. Raises UsageError for a value that cannot be used.

    ram         all the RAM the process may use, bytes or "24GiB"; None: what is free, up to the whole model
    vram        all the VRAM the process may use; None: no VRAM tier
    device      auto, cpu or cuda
    kernels     auto, native or reference
    threads     threads of the native kernels; None: one per core
    readers     reads from the drive that are under way at once, each of a part of an expert
    context     longest prompt plus answer in tokens; None: 4096, or what the model allows
    prefill_chunk  most tokens of a prompt computed at once, from 512 on in whole blocks of 512; a bound below that, or
                any on a GPU, may change tokens by rounding; None: chosen from context and memory
    policy      cache policy of the expert slots
    half_life   tokens after which a use counts half for the policy ema, or by the middle one of the three half-lives of
                ema+tokens; None: the policy's own
    allow_slow  go below one token's working set of slots
    mirror      a second copy of the store on another drive; both are read
    prefetch    read experts that will probably be needed while the drive idles
    prefetch_depth  layers ahead, 0 to 8, for which routers are applied early to know what to read; 0: reads ahead by
                the token table of the policy ema+tokens alone
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
    readers: int = READERS
    context: int | None = None
    prefill_chunk: int | None = None
    policy: str = LEARNING
    half_life: float | None = None
    allow_slow: bool = False
    mirror: str | Path | None = None
    prefetch: bool = True
    prefetch_depth: int = EARLY_ROUTERS
    usage: str | Path = "auto"
    split: str = "gpu"
    trace: str | Path | None = None
    warm: str | Path | None = None
    prefer_resident: float | None = None

    @property
    def early_routers(self) -> int | None:
        """Layers ahead for which routers are applied early; None: nothing is read ahead."""
        return self.prefetch_depth if self.prefetch else None

    def __post_init__(self) -> None:
        for name in ("ram", "vram"):
            value = getattr(self, name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, (int, str)):
                    raise UsageError(f"{name} is {value!r}: it must be a size, as 24GiB")
                object.__setattr__(self, name, parse_size(value))
        _one_of("device", self.device, DEVICES)
        _one_of("kernels", self.kernels, BACKENDS)
        _one_of("split", self.split, SPLITS)
        _one_of("policy", self.policy, LIVE_POLICIES)
        if self.half_life is not None:
            check_half_life(self.half_life, self.policy)
        for name in ("threads", "context", "readers", "prefill_chunk"):
            value = getattr(self, name)
            if (value is None and name == "readers") or (value is not None and (type(value) is not int or value < 1)):
                raise UsageError(f"{name} is {value!r}: it must be a whole number, 1 or more")
        if self.readers > MOST_READERS:
            raise UsageError(f"readers is {self.readers}: at most {MOST_READERS} reads are under way")
        depth = self.prefetch_depth
        if type(depth) is not int or not 0 <= depth <= DEEPEST:
            raise UsageError(f"prefetch_depth is {depth!r}: it must be a whole number of layers, 0 to {DEEPEST}")
        margin = self.prefer_resident
        if margin is not None and (type(margin) not in (int, float) or not 0 <= margin < math.inf):
            raise UsageError(f"prefer_resident is {margin!r}: it must be a margin of biased scores, 0 or more, as 0.05")
        for name in ("allow_slow", "prefetch"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is {getattr(self, name)!r}: it must be true or false")
        for name in ("trace", "warm", "mirror", "usage"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, Path)):
                raise UsageError(f"{name} is {value!r}: it must be the name of a file")
            if value is not None and name != "mirror" and not Path(value).name:
                raise UsageError(f"{name} is {str(value)!r}: it must be the name of a file")


def find_profile(store: str | Path, profile: str | Path | None) -> Path | None:
    """The file behind --profile: the one given, none at all for "none", else what `tune` saved with the store."""
    if profile is not None:
        return None if str(profile) == NO_PROFILE else Path(profile)
    saved = Path(store) / SAVED_PROFILE
    return saved if saved.exists() else None


def resolve_options(given: Mapping[str, Any], profile: str | Path | None = None) -> RuntimeOptions:
    """Defaults, then the file `profile`, then every value of `given` that is not None.

    A profile is a TOML file with options, in which `warm` is relative to the file; or a domain's routing, which
    means the same as a TOML file that only names it.

    A half-life is that of the policy it stands with: another policy in `given` leaves the profile's aside.

    Raises UsageError for an unknown name or a value that cannot be used, in the profile with file, line and key.
    """
    options = RuntimeOptions()
    if profile is not None:
        options = _read_profile(Path(profile))
    if given.get("policy") not in (None, options.policy):
        options = replace(options, half_life=None)
    return _overlay(options, {name: value for name, value in given.items() if value is not None})


def _overlay(options: RuntimeOptions, values: Mapping[str, Any]) -> RuntimeOptions:
    known = [field.name for field in fields(RuntimeOptions)]
    for name in values:
        if name not in known:
            raise UsageError(f"unknown runtime option {name!r}; known: {', '.join(known)}")
    return replace(options, **values)


def _read_profile(path: Path) -> RuntimeOptions:
    if zipfile.is_zipfile(path):  # as .npz files are
        return RuntimeOptions(warm=path)
    text = read_text(path)
    values = parse_toml(text, str(path))
    if isinstance(values.get("warm"), str):
        values["warm"] = path.parent / values["warm"]
    options = RuntimeOptions()
    for name, value in values.items():
        try:
            options = _overlay(options, {name: value})
        except UsageError as fault:
            raise UsageError(f"{path}, line {line_of(text, '', name)}: key {name}: {fault}") from None
    return options


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"unknown {name} {value!r}; known: {', '.join(known)}")
