"""What the device tier asks of an accelerator: memory, two streams, events between them.

Owns the protocol. Streams are queues that the device works off in order; nothing queued has happened until
an event behind it has. Must not know experts, slots or kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Memory(NamedTuple):
    """Bytes of device memory."""

    free: int
    total: int


class Event(Protocol):
    """A point in a stream."""

    def done(self) -> bool:
        """Whether the device has passed it. Does not wait."""
        ...

    def wait(self) -> None:
        """Block the host until the device has passed it."""
        ...

    def seconds_since(self, earlier: Event) -> float:
        """Time between two points of one stream, both timed and passed."""
        ...


class Stream(Protocol):
    """A queue of work. Calls return at once."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy between device memory and page-locked host memory. Both must stay as they are until it happened."""
        ...

    def launch(self, work: Callable[[], None], *, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()) -> None:
        """Queue the kernels that `work` launches. Whatever it touches must stay allocated; `reads` and `writes`
        name what other streams may touch too."""
        ...

    def record(self, timed: bool = False) -> Event:
        """The point behind everything queued so far; `timed` if its time will be asked for."""
        ...

    def wait(self, event: Event) -> None:
        """What is queued from now on happens after `event`, a point of any stream of the device."""
        ...


class Device(Protocol):
    """One accelerator. Its calls raise DeviceError when it fails or is lost."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def driver_nbytes(self) -> int:
        """Device memory that driver and libraries take besides what is allocated."""
        ...

    @property
    def blas_nbytes(self) -> int:
        """Device memory that cuBLAS allocates beside the tensors, and keeps, where anything multiplies with it."""
        ...

    def rounding_nbytes(self, nbytes: int) -> int:
        """What its allocator may lose, of `nbytes` in many tensors, to rounding and to blocks that were split."""
        ...

    @property
    def compute(self) -> Stream:
        """The stream on which plain torch calls for this device happen, in order with what is launched."""
        ...

    @property
    def copies(self) -> Stream:
        """The stream of copies that run beside computation."""
        ...

    def memory(self) -> Memory:
        """As its driver reports it: what driver and libraries have taken for this process is not free any more."""
        ...

    def limit(self, nbytes: int) -> None:
        """From now on, all memory of this process on the device together stays below `nbytes`."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Device memory that is kept. Raises BudgetError if there is not enough."""
        ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Page-locked host memory, zeroed."""
        ...

    def page_lock(self, memory: Tensor, granule: int) -> str | None:
        """Lock the pages of host memory that exists, in pieces of whole multiples of `granule` bytes, for its
        lifetime; if that is refused, the reason, and copies from it are slower and not asynchronous."""
        ...

    def call(self, work: Callable[[], T]) -> T:
        """`work`, whose torch calls follow everything launched on `compute`, and its result."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Work of torch calls on `compute` over tensors that stay where they are, cheap to repeat: queued by each call.

        `work` runs a few times now. Where capturing it fails, it is repeated call by call, which is announced.
        """
        ...

    def sender(self, target: Tensor) -> Callable[[Tensor], None]:
        """What fills `target`, on the device, from pageable host memory of its shape, as work on `compute`.

        The host waits neither for the device nor for the copy; its memory is free to change at once.
        """
        ...

    def synchronize(self) -> None:
        """Block until nothing queued is left."""
        ...

    def guard(self) -> AbstractContextManager[None]:
        """Within it torch's calls go to this device and its faults become DeviceError."""
        ...

    def peak_nbytes(self) -> int:
        """Most device memory this process held at once."""
        ...

    def close(self) -> None:
        """Unlock pages. Harmless when repeated."""
        ...
