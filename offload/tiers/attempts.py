"""Reading one part until it is there or cannot be had: short reads, faults that pass, another copy.

Owns patience: what is tried again, how often, and what is said in the end. Must not know queues or threads.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote

from offload.errors import DiskError
from offload.tiers.copies import Copies, Copy, FileSystem
from offload.tiers.reads import Part
from offload.types import PAGE

ATTEMPTS = 4
"""Reads of one part before it is given up."""

_TRANSIENT = frozenset({errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ENOMEM, errno.EBUSY})


class Attempts:
    """Reads parts, one per call; every method may be called from any thread. `tried_again` is told of every retry."""

    def __init__(
        self, copies: Copies, system: FileSystem, backoff_s: float, tried_again: Callable[[], None]
    ) -> None:
        self._copies = copies
        self._system = system
        self._backoff_s = backoff_s
        self._tried_again = tried_again

    def read(self, part: Part) -> DiskError | None:
        """Read one part, from another copy or again if it fails; the error if it cannot be had."""
        fault = "no attempt was made"
        copy: Copy | None = None
        for attempt in range(ATTEMPTS):
            copy = self._copies.choose(avoid=copy)
            path = copy.path(part.read.extent.path)
            try:
                self._read_part(copy, path, part)
                return None
            except OSError as error:
                fault = f"{error.strerror or error} ({path})"
                self._copies.forget(copy, path)
                if error.errno not in _TRANSIENT and len(self._copies) == 1:
                    break
            except EOFError as error:
                fault = f"{error} ({path})"
            finally:
                self._copies.done(copy)
            if attempt + 1 < ATTEMPTS:
                self._tried_again()
                time.sleep(self._backoff_s * 2**attempt)
        extent = part.read.extent
        store = quote(str(extent.path.parent))
        return DiskError(
            f"{extent.path}: {part.read.what} ({extent.nbytes} bytes at offset {extent.offset}) cannot be read at "
            f"offset {part.offset}: {fault}; check the drive, then run `expertpager verify {store}`"
        )

    def _read_part(self, copy: Copy, path: Path, part: Part) -> None:
        fd = self._copies.descriptor(copy, path).fd
        done = 0
        while done < part.needed:
            at = part.start + done
            try:
                count = self._system.read(fd, part.read.buffer[at : part.start + part.nbytes], part.offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or path in copy.buffered:
                    raise
                fd = self._copies.fall_back(copy, path).fd
                continue
            if done + count >= part.needed:
                return
            # A short read: go on at the last whole page, which direct I/O can address.
            progress = count // PAGE * PAGE
            if progress == 0:
                raise EOFError(f"only {done + count} of {part.needed} bytes arrived")
            done += progress
            self._tried_again()
