"""An NVIDIA GPU through torch.

Owns streams, events, page-locking and the translation of CUDA faults. Everything here needs a GPU and is
imported only when one is asked for.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from typing import TypeVar, cast

import torch
from torch import Tensor

from offload.errors import BudgetError, DeviceError, OffloadError
from offload.tiers.cuda_memory import DRIVER_NBYTES, rounding_nbytes
from offload.tiers.device import Event, Memory
from offload.types import format_size

log = logging.getLogger("expertpager")

T = TypeVar("T")

_LOCK_NBYTES = 1 << 30
"""Pages are locked in pieces of about this size: one refusal then leaves a clear state, and no call takes long."""

_PORTABLE = 1  # cudaHostRegisterPortable: for every context
_LOCKED: set[int] = set()
"""Addresses of the locked pieces of this process."""

_BLAS_HOPPER = 32 << 20
"""Bytes of a workspace of cuBLAS from Hopper on: torch's choice, after NVIDIA's advice."""
_BLAS_BEFORE = (8 << 20) + (128 << 10)


class CudaEvent:
    """A CUDA event, with a time stamp if it is `timed`."""

    def __init__(self, stream: torch.cuda.Stream, timed: bool) -> None:
        self._event = torch.cuda.Event(enable_timing=timed)
        self._event.record(stream)

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()  # gives up the GIL

    def seconds_since(self, earlier: Event) -> float:
        return 1e-3 * float(cast(CudaEvent, earlier)._event.elapsed_time(self._event))


def _current_stream(index: int) -> tuple[int, int, int]:
    """Number, device and type of the current stream.

    Streams are asked for and selected many times per layer and token. torch's public calls ask each time anew which
    devices there are, and take several times as long as these.
    """
    return torch._C._cuda_getCurrentStream(index)


class CudaStream:
    """A CUDA stream of the device `index`, used within its guard."""

    def __init__(self, index: int, stream: torch.cuda.Stream | None) -> None:
        """`None` stands for the current one, where the model's own calls go."""
        self._index = index
        self._side = stream
        self._name: tuple[int, int, int] | None = None
        self._current: torch.cuda.Stream

    def copy(self, target: Tensor, source: Tensor) -> None:
        # Slots and staging live as long as the tier, so the allocator need not be told with record_stream.
        with self._selected():
            target.copy_(source, non_blocking=True)

    def launch(self, work: Callable[[], None], *, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()) -> None:
        with self._selected():
            work()

    def record(self, timed: bool = False) -> Event:
        return CudaEvent(self._stream(), timed)

    def wait(self, event: Event) -> None:
        self._stream().wait_event(cast(CudaEvent, event)._event)

    def _stream(self) -> torch.cuda.Stream:
        if self._side is not None:
            return self._side
        name = _current_stream(self._index)
        if name != self._name:  # made once: it is nearly always the same
            self._current = torch.cuda.current_stream(self._index)
            self._name = name
        return self._current

    def _selected(self) -> AbstractContextManager[None]:
        return _NOTHING if self._side is None else _Selected(self._index, self._side)


class _Selected(AbstractContextManager[None]):
    """`torch.cuda.stream` for a stream of the current device."""

    __slots__ = ("_before", "_index", "_stream")

    def __init__(self, index: int, stream: torch.cuda.Stream) -> None:
        self._index, self._stream = index, stream

    def __enter__(self) -> None:
        self._before = _current_stream(self._index)
        _select(self._stream.stream_id, self._index, self._stream.device_type)

    def __exit__(self, *_: object) -> None:
        _select(*self._before)


def _select(stream: int, device: int, kind: int) -> None:
    torch._C._cuda_setStream(stream_id=stream, device_index=device, device_type=kind)


_NOTHING: AbstractContextManager[None] = nullcontext()


class CudaDevice:
    """The GPU with this index."""

    driver_nbytes = DRIVER_NBYTES

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        self._locked: list[int] = []
        self._eager = False
        with self.guard():
            torch.cuda.init()
            self._properties = torch.cuda.get_device_properties(index)
            self._graph_memory = torch.cuda.graph_pool_handle()
            self.compute = CudaStream(index, None)
            # A non-blocking stream: it does not wait for the default stream, nor that one for it.
            self.copies = CudaStream(index, torch.cuda.Stream(self.torch_device))

    @property
    def name(self) -> str:
        return f"{self._properties.name} (cuda:{self.torch_device.index})"

    def memory(self) -> Memory:
        with self.guard():
            return Memory(*torch.cuda.mem_get_info(self.torch_device))

    @property
    def blas_nbytes(self) -> int:
        # torch gives cuBLAS a workspace for every pair of thread and stream: the thread that loads records on one
        # stream and may compute on another, and so may a second thread that generates.
        return 3 * (_BLAS_HOPPER if self._properties.major >= 9 else _BLAS_BEFORE)

    def rounding_nbytes(self, nbytes: int) -> int:
        return rounding_nbytes(nbytes)

    def limit(self, nbytes: int) -> None:
        gc.collect()  # what a model that has been closed still holds in cycles
        with self.guard():
            torch.cuda.empty_cache()
            total = self._properties.total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), self.torch_device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        try:
            with self.guard():
                return torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)
        except DeviceError as fault:
            if isinstance(fault.__cause__, torch.cuda.OutOfMemoryError):
                nbytes = dtype.itemsize * torch.Size(shape).numel()
                free = self.memory().free
                raise BudgetError(
                    f"{self.name}: {format_size(nbytes)} cannot be allocated, {format_size(free)} are free; close "
                    "other programs that use the GPU, or give a smaller --vram"
                ) from None
            raise

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self.guard():
            return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def page_lock(self, memory: Tensor, granule: int) -> str | None:
        runtime = torch.cuda.cudart()
        step = max(1, _LOCK_NBYTES // granule) * granule  # no slot lies in two pieces: such a copy would be refused
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.numel()
        with self.guard():
            for address in range(begin, end, step):
                if address in _LOCKED:  # by another device: locked pages are locked for all
                    continue
                code = int(runtime.cudaHostRegister(address, min(step, end - address), _PORTABLE))
                if code != 0:
                    self._clear_error()
                    return f"CUDA refuses to lock {format_size(memory.numel())} of host memory (error {code})"
                _LOCKED.add(address)
                self._locked.append(address)
        return None

    def _clear_error(self) -> None:
        """The runtime remembers a refusal and blames the next kernel for it: let that be a harmless one."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self.torch_device)

    def call(self, work: Callable[[], T]) -> T:
        with self.guard():
            return work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        with self.guard():
            # Kernels are compiled and libraries make their workspaces now: neither may happen within a capture.
            aside = _aside(self.torch_device)
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    work()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            try:
                # Graphs are replayed one after the other in the order of their capture: they can share memory.
                with torch.cuda.graph(graph, pool=self._graph_memory, stream=aside):
                    work()
            except RuntimeError as fault:
                if not self._eager:
                    log.warning("%s: no CUDA graphs, every kernel is launched: %s", self.name, _first_line(fault))
                self._eager = True
                return work
        return graph.replay

    def sender(self, target: Tensor) -> Callable[[Tensor], None]:
        # Two: the host fills one while the copy out of the other may not have begun.
        staging: list[tuple[Tensor, Event | None]] = [
            (self.pinned(target.shape, target.dtype), None),
            (self.pinned(target.shape, target.dtype), None),
        ]

        def send(source: Tensor) -> None:
            locked, used = staging.pop(0)
            if used is not None:
                used.wait()
            locked.copy_(source)
            self.compute.copy(target, locked)
            staging.append((locked, self.compute.record()))

        return send

    def synchronize(self) -> None:
        with self.guard():
            torch.cuda.synchronize(self.torch_device)

    def guard(self) -> AbstractContextManager[None]:
        return _Guard(self.torch_device)

    def peak_nbytes(self) -> int:
        with self.guard():
            return int(torch.cuda.max_memory_reserved(self.torch_device))

    def close(self) -> None:
        runtime = torch.cuda.cudart()
        for address in self._locked:
            runtime.cudaHostUnregister(address)
            _LOCKED.discard(address)
        self._locked.clear()


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream on which work is recorded. One for the whole process: a new one every time would leave a workspace of
    cuBLAS behind every time."""
    return torch.cuda.Stream(device)


class _Guard(AbstractContextManager[None]):
    """`CudaDevice.guard`. A class, since it is entered many times per token and a generator takes longer."""

    __slots__ = ("_device", "_selected")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._selected = torch.cuda.device(device.index)  # by number: looking a device up takes long

    def __enter__(self) -> None:
        self._selected.__enter__()

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: object) -> None:
        self._selected.__exit__(kind, fault, trace)
        if not isinstance(fault, RuntimeError) or isinstance(fault, OffloadError):
            return
        if isinstance(fault, torch.cuda.OutOfMemoryError):
            raise DeviceError(
                f"{self._device}: out of memory although everything was set aside at load: {_first_line(fault)}; "
                "close other programs that use the GPU, or give a smaller --vram or --context"
            ) from fault
        if "CUDA" in str(fault) or "cuda" in str(fault):  # torch.AcceleratorError is a RuntimeError
            raise DeviceError(
                f"{self._device} failed: {_first_line(fault)}; the model must be loaded again. The system log "
                "(dmesg, NVRM: Xid) says more; --device cpu runs without the GPU"
            ) from fault


def _first_line(fault: BaseException) -> str:
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__
