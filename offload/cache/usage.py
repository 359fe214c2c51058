"""What was learned about a model's routing, kept from one run to the next.

Owns the usage file. It only makes the first tokens of a run faster: a file that is absent, damaged,
foreign or of another version is ignored, with a line that says so.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from offload.cache.arrays import load_arrays, save_arrays
from offload.cache.policy import CachePolicy

log = logging.getLogger("expertpager")

FORMAT = "expertpager-usage"
VERSION = 2


def save_usage(policy: CachePolicy, path: Path, model: str) -> bool:
    """Write what `policy` has learned about the model called `model`; False if there is nothing to write.

    The file is replaced at once or not at all. A place that cannot be written to is reported, not raised.
    """
    state = policy.state()
    if not state:
        return False
    arrays: dict[str, Any] = {"header": np.frombuffer(json.dumps(_header(policy, model)).encode(), np.uint8)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, arrays | state)
    except OSError as error:
        log.warning("%s: what was learned about expert use cannot be kept: %s", path, error.strerror)
        return False
    return True


def load_usage(policy: CachePolicy, path: Path, model: str) -> bool:
    """Let `policy` begin with the contents of `path`; False if there is no such file or it does not fit."""
    try:
        arrays = load_arrays(path)
        header = json.loads(arrays.pop("header").tobytes())
        if header != _header(policy, model):
            raise ValueError("it was written for another model, policy or version")
        fresh = policy.state()
        for name, array in fresh.items():
            if name not in arrays or arrays[name].shape[1:] != array.shape[1:] or arrays[name].dtype != array.dtype:
                raise ValueError(f"its {name} does not fit")
        policy.restore(arrays)
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        log.warning("%s is ignored: %s", path, error)
        return False
    return True


def _header(policy: CachePolicy, model: str) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "policy": policy.name, "model": model} | asdict(policy.shape)
