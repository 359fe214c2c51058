"""Signals that end a run in order, and moments in which they wait.

Owns which signals these are and when an interrupt may be raised. Must not know what is interrupted.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Ctrl-C and what others send in its place; not every system has all."""


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
        for number in ENDING:
            if callable(handler := signal.getsignal(number)):
                former[number] = handler
                signal.signal(number, lambda which, frame: came.append(which))
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if came:
            former[signal.Signals(came[0])](came[0], None)
