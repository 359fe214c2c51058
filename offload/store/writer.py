"""Writing the files of a store so that a crash at any instant leaves nothing half-true.

Owns partial files, durable renames and the order fsync -> rename -> fsync(directory). Must not decide
what is converted nor remember what is done: that is the converter's journal.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import torch
import xxhash
from torch import Tensor

from offload.errors import BudgetError, DiskError, OffloadError
from offload.store.direct import open_direct, page_buffer
from offload.store.layout import LayerFile, TensorSlot
from offload.store.manifest import checksum
from offload.store.safetensors import build_header
from offload.types import PAGE, format_size

PARTIAL = ".partial"
"""Ending of a file that is not finished."""


class LayerFileWriter:
    """Writes the experts of one MoE layer into `<name>.partial`, in any order, from any thread.

    The file has its final size from the beginning, so a full disk shows before work is done for it.
    Opening an existing partial file of the right size keeps its bytes. Experts of whole pages are written by
    direct I/O, where the file system has it: a copy through the page cache would cost a tenth of the conversion.
    """

    def __init__(self, directory: Path, file: LayerFile) -> None:
        self.file = file
        self.path = directory / file.name
        self.partial = directory / (file.name + PARTIAL)
        with disk_faults(self.partial, file.nbytes):
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if os.fstat(self._fd).st_size != file.nbytes:
                os.ftruncate(self._fd, 0)
                os.posix_fallocate(self._fd, 0, file.nbytes)
            pwrite_all(self._fd, file.header, 0)
            pwrite_all(self._fd, file.tail, file.tail_start)
            pages = file.layout.stride % PAGE == 0 and file.data_start % PAGE == 0
            self._direct = open_direct(self.partial, os.O_WRONLY) if pages else None
        self._local = threading.local()

    def write_expert(self, expert: int, parts: Mapping[str, Mapping[str, Tensor]]) -> str:
        """Write the raw tensors of `expert`, by projection and suffix; returns the extent's checksum."""
        data = self._buffer()
        at = 0
        for chunk in expert_chunks(self.file, parts):
            data[at : at + len(chunk)] = chunk
            at += len(chunk)
        with disk_faults(self.partial, len(data)):
            self._write_extent(data, self.file.offset(expert))
        return checksum(data)

    def _write_extent(self, data: memoryview, offset: int) -> None:
        if self._direct is not None:
            try:
                return pwrite_all(self._direct, data, offset)
            except OSError as fault:
                if fault.errno != errno.EINVAL:
                    raise
        # No direct I/O here; some file systems refuse it only when something is written.
        return pwrite_all(self._fd, data, offset)

    def _buffer(self) -> memoryview:
        """This thread's memory for one extent."""
        if not hasattr(self._local, "extent"):
            self._local.extent = page_buffer(self.file.layout.stride)[: self.file.layout.stride]
        extent: memoryview = self._local.extent
        return extent

    def sync(self) -> None:
        """Make everything written so far durable."""
        with disk_faults(self.partial, 0):
            os.fdatasync(self._fd)

    def finish(self) -> None:
        """Make the file durable under its final name."""
        self.sync()
        self.close()
        with disk_faults(self.path, 0):
            os.replace(self.partial, self.path)
            sync_directory(self.path.parent)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


def expert_chunks(file: LayerFile, parts: Mapping[str, Mapping[str, Tensor]]) -> list[memoryview]:
    """The extent of one expert, as consecutive pieces, from its raw tensors by projection and suffix."""
    chunks = []
    for item in file.layout.fields:
        tensor = parts[item.projection][item.suffix]
        assert tensor.dtype == item.dtype, (item, tensor.dtype)
        assert tuple(tensor.shape) == item.shape, (item, tensor.shape)
        chunks.append(raw_bytes(tensor))
    return chunks


class TensorFileWriter:
    """Writes named tensors into `<path>.partial`, one at a time and in any order.

    Tensors are laid out by falling element size, so that each is aligned for its dtype. Nothing has to be in
    memory at once: embedding and head alone are 3.7 GB.
    """

    def __init__(self, path: Path, tensors: Iterable[TensorSlot]) -> None:
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        self.slots = tensor_order(tensors)
        header = build_header(self.slots)
        self.checksums = {"": checksum(header)}
        self._offsets: dict[str, tuple[int, int]] = {}
        end = len(header)
        for name, dtype, shape in self.slots:
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            self._offsets[name] = (begin, end)
        self.nbytes = end
        with disk_faults(self.partial, self.nbytes):
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            os.posix_fallocate(self._fd, 0, self.nbytes)
            pwrite_all(self._fd, header, 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the whole tensor `name`."""
        self.write_chunks(name, (tensor,))

    def write_chunks(self, name: str, chunks: Iterable[Tensor]) -> None:
        """Write the tensor `name` from consecutive parts of its data."""
        begin, end = self._offsets[name]
        digest = xxhash.xxh3_128()
        with disk_faults(self.partial, end - begin):
            for chunk in chunks:
                data = raw_bytes(chunk)
                digest.update(data)
                pwrite_all(self._fd, data, begin)
                begin += len(data)
        assert begin == end, (name, begin, end)
        self.checksums[name] = digest.hexdigest()

    def finish(self) -> dict[str, str]:
        """Make the file durable under its final name; returns checksums by name, the header's under ""."""
        assert len(self.checksums) == len(self.slots) + 1, "every tensor must be written"
        with disk_faults(self.path, 0):
            os.fdatasync(self._fd)
            self.close()
            os.replace(self.partial, self.path)
            sync_directory(self.path.parent)
        return self.checksums

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def tensor_order(tensors: Iterable[TensorSlot]) -> list[TensorSlot]:
    """`tensors` in the order in which a file of resident tensors holds them."""
    return sorted(tensors, key=lambda slot: (-slot[1].itemsize, slot[0]))


def write_tensor_file(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Write `tensors` to `path` durably; returns checksums by name, the header's under ""."""
    named = dict(tensors)
    writer = TensorFileWriter(path, [(name, t.dtype, tuple(t.shape)) for name, t in named.items()])
    for name, tensor in named.items():
        writer.write(name, tensor)
    return writer.finish()


def write_file(path: Path, data: bytes) -> str:
    """Write a small file durably and atomically; returns its checksum."""
    partial = path.with_name(path.name + PARTIAL)
    with disk_faults(path, len(data)), partial.open("wb") as out:
        out.write(data)
        _publish(out, partial, path)
    return checksum(data)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` as safetensors stores them, without a copy where it is contiguous."""
    raw: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return raw


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class disk_faults:
    """Turns an OSError while writing `nbytes` to `path` into one clear line."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, fault: BaseException | None, trace: object) -> None:
        if not isinstance(fault, OSError) or isinstance(fault, OffloadError):
            return
        if fault.errno in (errno.ENOSPC, errno.EDQUOT):
            stat = os.statvfs(self.path.parent)
            size = f"{format_size(self.nbytes)}; " if self.nbytes else ""
            raise BudgetError(
                f"{self.path.parent}: disk full while writing {self.path.name} "
                f"({size}{format_size(stat.f_bavail * stat.f_frsize)} free); make room and run the same command again, "
                "finished work is kept"
            ) from None
        raise DiskError(f"{self.path}: cannot be written: {fault.strerror}") from None


def _publish(out: IO[bytes], partial: Path, path: Path) -> None:
    out.flush()
    os.fsync(out.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of the open file `fd`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
