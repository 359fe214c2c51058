"""Direct I/O and file systems that refuse it, when a file is opened or only when it is used: the same bytes."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert.checksums import RangeReader
from convert.source import LocalSource
from offload.quant import get_codec
from offload.store.direct import HugePages, PageArrays, page_buffer
from offload.store.layout import ExpertLayout, LayerFile
from offload.store.manifest import checksum
from offload.store.writer import LayerFileWriter
from offload.types import PAGE

REFUSALS = ["never", "open", "use"]


@pytest.fixture(params=REFUSALS)
def refusal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """When direct I/O is refused."""
    direct: set[int] = set()
    original = {name: getattr(os, name) for name in ("open", "preadv", "pwrite", "close")}

    def opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECT and request.param == "open":
            raise OSError(errno.EINVAL, "no direct I/O")
        fd: int = original["open"](path, flags, *rest, **options)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def used(name: str) -> Any:
        def call(fd: int, *rest: Any) -> Any:
            if fd in direct and request.param == "use":
                raise OSError(errno.EINVAL, "no direct I/O")
            return original[name](fd, *rest)

        return call

    def closed(fd: int) -> None:
        direct.discard(fd)
        original["close"](fd)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", used("preadv"))
    monkeypatch.setattr(os, "pwrite", used("pwrite"))
    monkeypatch.setattr(os, "close", closed)
    return str(request.param)


def test_sources(refusal: str, tmp_path: Path) -> None:
    data = os.urandom((5 << 20) + 123)
    (tmp_path / "x.safetensors").write_bytes(data)
    source = LocalSource(tmp_path)
    for offset, nbytes in ((0, len(data)), (1, 2 << 20), (4096, 1 << 20), (len(data) - (1 << 20), 1 << 20), (5, 100)):
        assert source.read_array("x.safetensors", offset, nbytes).tobytes() == data[offset : offset + nbytes]
    with pytest.raises(Exception, match=f"ends at byte {len(data)}.*truncated"):
        source.read_array("x.safetensors", 4096, len(data))
    source.close()


def test_checksums(refusal: str, tmp_path: Path) -> None:
    data = os.urandom((9 << 20) + 5)
    path = tmp_path / "x"
    path.write_bytes(data)
    with RangeReader() as reader:
        for offset, nbytes in ((0, len(data)), (0, 0), (7, 1), (4095, 2), (4096, 8 << 20), (len(data) - 3, 3)):
            assert reader.checksum(path, offset, nbytes) == checksum(data[offset : offset + nbytes])
        assert reader.checksum(path, len(data) - 3, 100) == checksum(data[-3:]), "of fewer when the file ends early"


@pytest.mark.parametrize("sizes", [(1024, 512), (96, 32)])  # whole pages, and not
def test_experts(refusal: str, tmp_path: Path, sizes: tuple[int, int]) -> None:
    layout = ExpertLayout(get_codec("int4-g32"), *sizes)
    assert (layout.stride % PAGE == 0) == (sizes[0] == 1024)
    file = LayerFile(3, 4, layout)
    writer = LayerFileWriter(tmp_path, file)
    raw = torch.from_numpy(np.frombuffer(os.urandom(layout.stride), dtype=np.uint8).copy())
    parts = {name: tensor.parts for name, tensor in layout.views(raw).projections.items()}
    digests = [writer.write_expert(expert, parts) for expert in (2, 0)]
    writer.finish()
    written = (tmp_path / file.name).read_bytes()
    assert len(written) == file.nbytes
    for expert in (0, 2):
        begin = file.offset(expert)
        assert written[begin : begin + layout.stride] == raw.numpy().tobytes()
    assert digests == [checksum(raw.numpy().data)] * 2
    assert written.startswith(file.header) and written.endswith(file.tail)


def test_buffers_are_whole_pages() -> None:
    for nbytes in (0, 1, 4096, 4097, 3 << 20):
        buffer = page_buffer(nbytes)
        assert len(buffer) % PAGE == 0 and len(buffer) >= max(nbytes, 1)
        assert np.frombuffer(buffer, dtype=np.uint8).ctypes.data % PAGE == 0


def test_memory_is_used_again_only_when_nothing_looks_into_it() -> None:
    arrays = PageArrays(keep=2)
    first = arrays.take(3 * PAGE + 1)
    assert first.nbytes == 4 * PAGE and first.ctypes.data % PAGE == 0
    address, part = first.ctypes.data, torch.from_numpy(first[100:200])
    part.fill_(7)
    del first
    others = [arrays.take(4 * PAGE) for _ in range(3)]
    assert address not in {other.ctypes.data for other in others}  # a view of a view still lives
    for other in others:
        other[:] = 1
    assert part.unique().tolist() == [7]
    del part
    assert arrays.take(4 * PAGE).ctypes.data == address


def test_memory_of_another_size_is_not_taken() -> None:
    arrays = PageArrays()
    address = arrays.take(8 * PAGE).ctypes.data
    small, large = arrays.take(PAGE), arrays.take(9 * PAGE)
    assert address not in (small.ctypes.data, large.ctypes.data)
    assert arrays.take(5 * PAGE).ctypes.data == address and arrays.take(5 * PAGE).nbytes == 5 * PAGE


def test_tensors_side_by_side_in_large_allocations():
    memory = HugePages()
    sizes = [1, 300_001, 300_000, 0, 3 << 20, 17 << 20, 30 << 20, 7, 40 << 20, 1 << 20]
    buffers = [np.frombuffer(memory.take(size), dtype=np.uint8) for size in sizes]
    assert [len(buffer) for buffer in buffers] == [max(size, 1) for size in sizes]
    for number, buffer in enumerate(buffers):
        assert not buffer.any()
        buffer[:] = number
    for number, buffer in enumerate(buffers):
        assert (buffer == number).all()
    # Tensors that are neither small nor would fill most of it share one allocation.
    shared = [buffer.ctypes.data for buffer, size in zip(buffers, sizes, strict=True) if 300_000 <= size < 16 << 20]
    assert len(shared) == 4 and all(address % 64 == 0 for address in shared)
    assert shared == sorted(shared) and shared[-1] - shared[0] < 32 << 20


def test_an_allocation_goes_with_its_last_tensor():
    memory = HugePages()
    first, second = (np.frombuffer(memory.take(1 << 20), dtype=np.uint8) for _ in range(2))
    gone = weakref.ref(memory._memory())
    del first
    assert gone() is not None and not second.any()
    del second
    assert gone() is None
    assert not np.frombuffer(memory.take(1 << 20), dtype=np.uint8).any()
