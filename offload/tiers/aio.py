"""Reads that the kernel carries out by itself: Linux native asynchronous I/O.

Owns the system calls and the events they end with. Must not know what is read, nor in which order it is wanted.

A thread that reads must be woken twice for every read, to begin it and to tell of its end, which is a tenth of the
time that a few megabytes take. Here whoever wants the bytes hands the reads to the kernel and may wait for their ends
itself. Containers permit these calls where they forbid io_uring, which does the same.

Source: io_setup(2), io_submit(2), io_getevents(2), eventfd(2) and <linux/aio_abi.h>.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Numbers of io_setup, io_destroy, io_getevents, io_submit."""

_PREAD = 0
_SIGNAL_EVENTFD = 1


class _ControlBlock(ctypes.Structure):
    """`struct iocb`, little-endian."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("nbytes", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("eventfd", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """`struct io_event`."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("block", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("result2", ctypes.c_int64),
    )


class Request(NamedTuple):
    """Read `nbytes` at `offset` of `fd` to `address`; all three are multiples of what direct I/O asks for."""

    tag: int
    """Comes back with the end of the read; below the depth of the queue, and of no other read under way."""
    fd: int
    address: int
    nbytes: int
    offset: int


class KernelReads:
    """Up to `depth` reads under way at once.

    `wait` and `wake` may be called from any thread, all else by one at a time.
    """

    def __init__(self, depth: int) -> None:
        """Raises OSError where the system does not have such reads, or none to spare (/proc/sys/fs/aio-max-nr)."""
        calls = _CALLS.get(platform.machine())
        if sys.platform != "linux" or calls is None or sys.byteorder != "little" or not hasattr(os, "eventfd"):
            raise OSError("no asynchronous reads known for this system")
        self._depth = depth
        setup, destroy, get_events, submit = calls
        self._setup = _system_call(setup, ctypes.c_long, ctypes.c_void_p)
        self._destroy = _system_call(destroy, ctypes.c_ulong)
        self._get_events = _system_call(get_events, ctypes.c_ulong, *[ctypes.c_long] * 2, *[ctypes.c_void_p] * 2)
        self._submit = _system_call(submit, ctypes.c_ulong, ctypes.c_long, ctypes.c_void_p)
        self._context = ctypes.c_ulong(0)
        if self._setup(depth, ctypes.addressof(self._context)) != 0:
            raise OSError(ctypes.get_errno(), "asynchronous reads are refused")
        self._ended = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._blocks = (_ControlBlock * depth)()
        for tag, block in enumerate(self._blocks):
            block.data, block.opcode, block.flags, block.eventfd = tag, _PREAD, _SIGNAL_EVENTFD, self._ended
        # What io_submit is handed: the address of a block's address.
        self._pointers = (ctypes.c_void_p * depth)(*(ctypes.addressof(block) for block in self._blocks))
        first, size = ctypes.addressof(self._pointers), ctypes.sizeof(ctypes.c_void_p)
        self._handles = [first + tag * size for tag in range(depth)]
        self._events = (_Event * depth)()

    def submit(self, request: Request) -> bool:
        """Begin a read; False if the kernel does not take it.

        One at a time: the kernel lets the drive begin when it has seen the last of those that it is handed at once.
        """
        tag, fd, address, nbytes, offset = request
        block = self._blocks[tag]
        block.fd, block.address, block.nbytes, block.offset = fd, address, nbytes, offset
        return bool(self._submit(self._context.value, 1, self._handles[tag]) == 1)

    def wait(self) -> None:
        """Until reads may have ended, or `wake`."""
        poll = select.poll()  # of its own: one cannot be used by two threads at a time
        poll.register(self._ended, select.POLLIN)
        poll.poll()

    def wake(self) -> None:
        """End every `wait`; they end at once until the next `reap`."""
        os.eventfd_write(self._ended, 1)

    def reap(self) -> list[tuple[int, int]]:
        """(tag, bytes read or a negative error number) of the reads that have ended and nobody was told of."""
        try:
            os.eventfd_read(self._ended)  # before the events are asked for: later ones signal again
        except BlockingIOError:
            return []
        events = self._events
        count = self._get_events(self._context.value, 0, len(events), ctypes.addressof(events), None)
        return [(event.data, event.result) for event in events[: max(0, count)]]

    def restart(self) -> None:
        """Wait for reads under way and forget them; every tag is free.

        If the system does not allow a new beginning, nothing will be taken from now on.
        """
        self._destroy(self._context.value)
        self._context = ctypes.c_ulong(0)
        self._setup(self._depth, ctypes.addressof(self._context))

    def close(self) -> None:
        """Give everything back; waits for reads under way."""
        self._destroy(self._context.value)
        os.close(self._ended)


def _system_call(number: int, *arguments: Any) -> Callable[..., int]:
    """The system call of that number, for which the C library has no function."""
    function = ctypes.CDLL(None, use_errno=True).syscall  # a new object, with argument types of its own
    function.restype, function.argtypes = ctypes.c_long, (ctypes.c_long, *arguments)
    return partial(function, number)


def needs_no_caller(fd: int) -> bool:
    """Whether reads of `fd` go on without the one who submits them; elsewhere he would wait there for their end.

    A file system that can promise not to block its caller (RWF_NOWAIT) is such a one.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        try:
            os.preadv(fd, [page], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True  # it would have had to wait, and did not
        except OSError:
            return False
    return True
