"""Arrays in an .npz file: written whole, read with distrust.

Owns telling a missing file from one that is no archive of arrays, or a damaged one. Must not know what the arrays mean.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def load_arrays(path: str | Path) -> dict[str, NDArray[Any]]:
    """All arrays of the .npz file `path` by name; nothing that is pickled is loaded.

    Raises FileNotFoundError, and ValueError, saying what is wrong, for everything else.
    """
    try:
        with Path(path).open("rb") as file:
            if file.read(4) not in (b"PK\x03\x04", b"PK\x05\x06"):
                raise ValueError("it is no .npz file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
    except FileNotFoundError:
        raise
    except OSError as fault:
        raise ValueError(fault.strerror or str(fault)) from None
    # One flipped bit makes zipfile, zlib and numpy raise any of a dozen kinds: zlib.error, NotImplementedError, ...
    except Exception as fault:
        raise ValueError(str(fault).partition("\n")[0] or type(fault).__name__) from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # other members come as bytes
            raise ValueError(f"its part {name} is no array")
    return arrays


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write `arrays` by name to the .npz file `path`, which is replaced at once or not at all. Raises OSError."""
    if path.exists() and not path.is_file():  # such as /dev/null, which must stay what it is
        with path.open("wb") as file:
            np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
        return
    target = Path(os.path.realpath(path))  # the file behind a link, not the link
    scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")  # another process may be ending, too
    try:
        with scratch.open("wb") as file:
            np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
        os.replace(scratch, target)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
