"""Small values every floor speaks: expert names, byte extents, sizes in text.

Owns parsing and printing of byte sizes, and printing of times. Must not know files, tensors or models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from offload.errors import UsageError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The three matrices of an expert, in the order in which a store holds them."""

PAGE = 4096
"""Alignment, in bytes, that direct I/O needs for offset, length and memory address."""

_SIZE = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_TOO_LARGE = 1 << 63
"""Nothing that is counted in bytes, or in bytes per second, comes near it."""


class ExpertId(NamedTuple):
    """One routed expert: the decoder layer's index in the model and the expert's index in it."""

    layer: int
    expert: int


@dataclass(frozen=True)
class Extent:
    """`nbytes` bytes of the file `path`, beginning at `offset`."""

    path: Path
    offset: int
    nbytes: int


def align_up(value: int, alignment: int = PAGE) -> int:
    """The smallest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def parse_size(text: str | int) -> int:
    """Bytes meant by `text`: 24GiB, 24GB, 1500MiB, 4096. A plain number is bytes.

    Raises UsageError for anything else, also for zero and negative sizes, and those of 8 EiB and more.
    """
    if isinstance(text, int):
        value = text
    else:
        match = _SIZE.fullmatch(text)
        if not match:
            raise UsageError(f"cannot read {text!r} as a size; write it like 24GiB, 24GB or 1500MiB")
        number, prefix, binary = match.groups()
        value = int(Fraction(number) * (1024 if binary else 1000) ** _POWER[prefix.lower()])
    if value <= 0:
        raise UsageError(f"a size must be larger than zero, not {text!r}")
    if value >= _TOO_LARGE:
        raise UsageError(f"a size must be below 8 EiB, not {text!r}")
    return value


def format_size(nbytes: int | float) -> str:
    """`nbytes` in binary units with three digits: 342.6 GiB, 23.6 MiB, 512 B."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def format_time(seconds: float) -> str:
    """A time for people: 1.5 ms, 12.0 s, 5 min, 3 h 05 min."""
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
