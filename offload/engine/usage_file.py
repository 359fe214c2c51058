"""Where what was learned about a store's expert use is kept.

Owns the choice of the file. Must not know what is in it.
"""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

NAME = "expert-usage.npz"


def usage_file(store: Path, choice: str | Path) -> Path | None:
    """The file meant by `choice`: None for "off", a path as it is, and for "auto" the place that can be written.

    That is beside the store's files; for a store that is mounted read-only or belongs to somebody else it is the
    user's cache folder, in which each store has a name of its own.
    """
    if choice == "off":
        return None
    if choice != "auto":
        return Path(choice)
    if os.access(store, os.W_OK):
        return store / NAME
    where = xxhash.xxh3_64_hexdigest(str(store.resolve()).encode())
    return Path.home() / ".cache" / "expertpager" / f"{store.name}-{where}.npz"
