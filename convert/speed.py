"""How fast this machine reads the source, encodes, and writes the store: short measurements before a long job.

Owns measuring. Of a hub repository nothing but its headers is read, which were read anyway; of a folder a few dozen
megabytes, past the page cache. What is written has no name and is gone afterwards. Must not know what follows from it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from convert.plan import ConversionPlan
from convert.source import LocalSource
from convert.threads import one_core_each
from offload.quant import Codec
from offload.store.direct import open_direct, page_buffer

_BLOCK = 4 << 20
_BLOCKS = 16
_SECONDS = 1.0  # per measurement


@dataclass(frozen=True)
class Speeds:
    """Bytes per second; None is not measured. `encode` is in bytes of the source, with all workers."""

    read: float | None
    write: float | None
    encode: float
    same_drive: bool
    """Whether source and store share a drive, so that reading and writing take turns."""

    def seconds(self, fetch_nbytes: int, store_nbytes: int) -> float:
        """How long a conversion takes at least: its slowest link is busy all the time."""
        read = fetch_nbytes / self.read if self.read else 0.0
        write = store_nbytes / self.write if self.write else 0.0
        return max(read + write if self.same_drive else max(read, write), fetch_nbytes / self.encode)


def measure_speeds(plan: ConversionPlan, out: Path, workers: int) -> Speeds:
    """The speeds of a conversion by `plan` into `out`; takes a few seconds at most."""
    source = plan.checkpoint.source
    folder = existing_parent(out)
    local = isinstance(source, LocalSource)
    return Speeds(
        read=_read_speed(source) if isinstance(source, LocalSource) else plan.checkpoint.header_speed,
        write=_write_speed(folder),
        encode=_encode_speed(plan, workers),
        same_drive=local and os.stat(source.name).st_dev == os.stat(folder).st_dev,
    )


def existing_parent(directory: Path) -> Path:
    """`directory`, or the closest folder above it that exists."""
    while not directory.is_dir():
        directory = directory.absolute().parent
    return directory


def _read_speed(source: LocalSource) -> float | None:
    """Of sequential reads from the largest shard, which are not in the page cache."""
    shard = max(source.files, key=source.files.__getitem__)
    buffer = page_buffer(_BLOCK)
    fd = _open(source.folder / shard, os.O_RDONLY)
    if fd is None:
        return None
    done, begun = 0, time.perf_counter()
    try:
        for _ in range(_BLOCKS):
            count = os.preadv(fd, [buffer], done)
            done += count
            if count < _BLOCK or time.perf_counter() - begun > _SECONDS:
                break
    finally:
        os.close(fd)
    return done / (time.perf_counter() - begun) if done else None


def _write_speed(folder: Path) -> float | None:
    """Of durable sequential writes to a file without a name."""
    flags = getattr(os, "O_TMPFILE", 0) | os.O_RDWR
    fd = _open(folder, flags) if flags != os.O_RDWR else None
    if fd is None:
        return None
    buffer = page_buffer(_BLOCK)
    buffer[:] = os.urandom(_BLOCK)
    done, begun = 0, time.perf_counter()
    try:
        for _ in range(_BLOCKS):
            done += os.pwrite(fd, buffer, done)
            if time.perf_counter() - begun > _SECONDS:
                break
        os.fdatasync(fd)
    except OSError:
        return None  # too full to measure: the report says that it does not fit
    finally:
        os.close(fd)
    return done / (time.perf_counter() - begun)


def _open(path: Path, flags: int) -> int | None:
    """A descriptor for direct I/O, or for ordinary I/O, or None."""
    try:
        direct = open_direct(path, flags)
        return os.open(path, flags | os.O_CLOEXEC, 0o600) if direct is None else direct
    except OSError:
        return None


def _encode_speed(plan: ConversionPlan, workers: int) -> float:
    """Of FP8 blocks [512, 4096] into the experts' codec, on every worker at once."""
    weight = torch.randint(0, 0x7E, (512, 4096), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.full((4, 32), 1e-3)

    def encode(codec: Codec) -> int:
        plan.encoder.encode(weight, scale, (128, 128), codec, plan.recipe.scales)
        return weight.nbytes

    encode(plan.layout.codec)  # loads the library
    with one_core_each(workers) as pool:
        begun = time.perf_counter()
        done = sum(pool.map(encode, [plan.layout.codec] * (2 * workers)))
        return done / (time.perf_counter() - begun)
