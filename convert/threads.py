"""Threads that encode: how many there can be, one core for each of them, and how Ctrl-C leaves them alone.

Owns the number of cores this process may use, torch's own threads while ours are at work, and when an interrupt may be
raised.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_core_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """`workers` threads, in which torch uses one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A moment in which Ctrl-C and its like wait: they are raised at the end.

    Raised inside a pool or one of its futures they can leave a lock taken, on which the pool's threads then wait for
    ever. Interrupts are raised in the main thread alone; elsewhere nothing is to be done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    former = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # not every system has all
            if number is not None and callable(handler := signal.getsignal(number)):
                former[number] = handler
                signal.signal(number, lambda which, frame: came.append(which))
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if came:
            former[signal.Signals(came[0])](came[0], None)
