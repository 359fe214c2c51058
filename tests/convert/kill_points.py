"""Kill a conversion right before, in the middle of and right after every step that makes something durable.

    python tests/convert/kill_points.py CHECKPOINT FOLDER STRIDE

At every STRIDE-th of these instants the process gets SIGKILL; the next one must finish with the bytes of an undisturbed
run. Prints one JSON line: at how many instants it was killed. A process of its own, because it forks.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import digests

from convert import committer, pipeline

Call = Callable[..., Any]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fragile(name: str, target: int) -> None:
    """Instant `target` of the calls of `os.name` kills the process: before a call, halfway through it, or after it."""
    original: Call = getattr(os, name)
    calls = itertools.count()
    point, moment = divmod(target, 3) if name == "pwrite" else (target // 2, target % 2 * 2)

    def call(*arguments: Any, **options: Any) -> Any:
        mine = next(calls) == point
        if mine and moment == 0:
            die()
        if mine and moment == 1:
            fd, data, offset = arguments
            original(fd, bytes(data)[: len(data) // 2], offset)
            die()
        result = original(*arguments, **options)
        if mine and moment == 2:
            die()
        return result

    setattr(os, name, call)


def attempt(source: Path, out: Path, name: str | None, target: int) -> bool:
    """One run; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            committer.COMMIT_ITEMS = 1
            os.fsync = os.fdatasync = lambda fd: None  # a kill is no power cut: written is written
            if name is not None:
                fragile(name, target)
            pipeline.convert(source, out, workers=1)
        except BaseException as fault:
            print(f"{type(fault).__name__}: {fault}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(1)
    return os.WIFSIGNALED(status)


def main(source: Path, folder: Path, stride: int) -> int:
    attempt(source, folder / "whole", None, 0)
    expected = digests(folder / "whole")
    killed: dict[str, int] = {}
    out = folder / "s"
    for name in ("pwrite", "replace", "unlink", "rmdir", "ftruncate", "mkdir"):
        for target in itertools.count(0, stride):
            if not attempt(source, out, name, target):
                break  # there are no more such calls
            attempt(source, out, None, 0)
            if digests(out) != expected:
                print(json.dumps({"differs after": [name, target]}))
                return 1
            shutil.rmtree(out)
            killed[name] = killed.get(name, 0) + 1
        shutil.rmtree(out)
    print(json.dumps(killed))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
