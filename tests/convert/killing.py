"""Kill conversions with SIGKILL at random instants, resume them, compare every file with an undisturbed run.

    python tests/convert/killing.py CHECKPOINT FOLDER KILLS SEED [PROCESSES]

With several PROCESSES they convert one store together. Prints one JSON line: kills delivered, stores finished. Exits
with 1 when a store differs. A process of its own, because it forks: each attempt starts from the same imported state
within milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from conftest import digests

from convert import committer, pipeline


def start(source: Path, out: Path, rng: random.Random, only_layers: str | None) -> int:
    """A process that converts; returns its id."""
    # One item per commit in half of the runs: then the journal grows while kills arrive.
    items_per_commit = rng.choice([1, 64])
    workers = rng.choice([1, 3])
    child = os.fork()
    if child == 0:
        try:
            committer.COMMIT_ITEMS = items_per_commit
            os.fsync = os.fdatasync = lambda fd: None  # a kill is no power cut: written is written
            pipeline.convert(source, out, workers=workers, only_layers=only_layers)
        except BaseException as fault:
            print(f"{type(fault).__name__}: {fault}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def end(child: int, delay: float | None) -> bool:
    """Wait for a process, after killing it in `delay` seconds; whether it was killed."""
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(1)
    return os.WIFSIGNALED(status)


def attempt(source: Path, out: Path, rng: random.Random, limit: float, processes: int) -> int:
    """Processes that start together and are killed at instants of their own; returns how many were."""
    if processes == 1:
        return end(start(source, out, rng, None), rng.uniform(0, limit))
    children = [start(source, out, rng, rng.choice(["all", "all", "0-1", "2"])) for _ in range(processes)]
    rng.shuffle(children)
    return sum(end(child, rng.uniform(0, limit / processes)) for child in children)


def main(source: Path, folder: Path, kills: int, seed: int, processes: int = 1) -> int:
    rng = random.Random(seed)
    begun = time.monotonic()
    end(start(source, folder / "whole", rng, None), None)
    whole = time.monotonic() - begun
    expected = digests(folder / "whole")
    delivered = finished = 0
    while delivered < kills:
        out = folder / "killed"
        for _ in range(rng.randrange(1, 5)):
            delivered += attempt(source, out, rng, whole * 1.1, processes)
        if processes > 1:
            # Whoever comes last finds everything done and finishes the store.
            for child in [start(source, out, rng, "all") for _ in range(processes)]:
                end(child, None)
        else:
            end(start(source, out, rng, None), None)
        finished += 1
        if digests(out) != expected:
            print(json.dumps({"kills": delivered, "stores": finished, "identical": False}))
            return 1
        shutil.rmtree(out)
    print(json.dumps({"kills": delivered, "stores": finished, "identical": True}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])))
