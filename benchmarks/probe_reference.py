"""Figures of `expertpager probe` beside fio and a STREAM-like read loop in C on the same machine.

    python benchmarks/probe_reference.py --store STORE [--seconds 3]

Needs `fio` (a package of every distribution) and a C compiler. fio reads one of the store's expert files by direct I/O
at random in 2 MiB blocks with as many threads as `probe` has reads under way; the C program sums a buffer much larger
than the caches with each number of threads. Probe and reference take turns, `--rounds` times; the row holds the medians
and their ratios, which should lie within 10% of 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

from record import append  # noqa: E402

from offload.kernels.native import usable_cpus  # noqa: E402
from offload.store import Store  # noqa: E402
from offload.tune.probe import Effort, measure_drive, measure_ram  # noqa: E402
from offload.types import ExpertId  # noqa: E402

FIO_DEPTHS = (1, 2, 4, 8, 16)

READ_LOOP = r"""
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t *data;
static size_t words, threads;
static volatile uint64_t sink;

static void *sum(void *number) {
    size_t part = words / threads, at = (size_t)number * part;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = at; i + 4 <= at + part; i += 4) {
        a += data[i];
        b += data[i + 1];
        c += data[i + 2];
        d += data[i + 3];
    }
    sink = a + b + c + d;
    return NULL;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main(int argc, char **argv) {
    size_t nbytes = strtoull(argv[1], NULL, 10);
    threads = strtoull(argv[2], NULL, 10);
    double seconds = strtod(argv[3], NULL), best = 0, begun = now();
    words = nbytes / 8;
    data = aligned_alloc(1 << 21, nbytes);
    memset(data, 1, nbytes);
    pthread_t id[256];
    do {
        double from = now();
        for (size_t t = 0; t < threads; t++) pthread_create(&id[t], NULL, sum, (void *)t);
        for (size_t t = 0; t < threads; t++) pthread_join(id[t], NULL);
        double rate = words * 8 / (now() - from);
        if (rate > best) best = rate;
    } while (now() - begun < seconds);
    printf("%.0f\n", best);
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3.0, help="Per figure.")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if not shutil.which("fio"):
        raise SystemExit("fio is not installed")
    store, effort = Store.open(arguments.store), Effort(seconds=arguments.seconds)
    layers = store.config.moe_layers
    extents = [store.locate(ExpertId(layers[0], expert)) for expert in range(store.config.n_routed_experts)]
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="expertpager-reference-") as folder:
        program = compiled(Path(folder))
        for _ in range(arguments.rounds):
            ours, _, _ = measure_drive(extents, arguments.seconds / 2)
            fio = {str(depth): drive_by_fio(extents[0].path, depth, arguments.seconds) for depth in FIO_DEPTHS}
            ram = measure_ram(usable_cpus(), effort)
            loop = {count: ram_by_loop(program, effort.buffer_nbytes, count, arguments.seconds) for count in ram}
            rounds.append({"drive": ours, "fio": fio, "ram": ram, "loop": loop})
            print(json.dumps(rounds[-1]), file=sys.stderr)
    numbers = {"drive": beside(rounds, "drive", "fio"), "RAM": beside(rounds, "ram", "loop")}
    command = f"python benchmarks/probe_reference.py --store STORE --seconds {arguments.seconds:g}"
    append("probe_reference", f"{command} --rounds {arguments.rounds}", numbers)
    print(json.dumps(numbers, indent=1))


def drive_by_fio(path: Path, threads: int, seconds: float) -> float:
    """Bytes per second of direct random reads of 2 MiB, by as many threads."""
    options = {
        "name": "read",
        "filename": path,
        "rw": "randread",
        "bs": "2M",
        "direct": 1,
        "ioengine": "psync",
        "numjobs": threads,
        "runtime": seconds,
        "output-format": "json",
    }
    flags = ["--thread", "--group_reporting", "--time_based", "--readonly"]
    done = output(["fio", *flags, *(f"--{name}={value}" for name, value in options.items())])
    return float(json.loads(done[done.index("{") :])["jobs"][0]["read"]["bw_bytes"])


def compiled(folder: Path) -> Path:
    """The read loop as a program."""
    source, program = folder / "read.c", folder / "read"
    source.write_text(READ_LOOP, encoding="utf-8")
    output(["cc", "-O3", "-march=native", "-pthread", "-o", str(program), str(source)])
    return program


def ram_by_loop(program: Path, nbytes: int, threads: str, seconds: float) -> float:
    """Bytes per second of summing `nbytes` with `threads` threads, the best of all passes."""
    return float(output([str(program), str(nbytes), threads, str(seconds / 2)]))


def beside(rounds: list[dict[str, dict[str, float]]], ours: str, reference: str) -> dict[str, Any]:
    """Per depth or number of threads: GB/s of both, and the ratio of the medians."""
    found = {}
    for key in rounds[0][reference]:
        mine, other = (statistics.median(one[side][key] for one in rounds) for side in (ours, reference))
        found[key] = {"probe GB/s": round(mine / 1e9, 3), "reference GB/s": round(other / 1e9, 3)}
        found[key]["ratio"] = round(mine / other, 3)
    return found


def output(command: list[str]) -> str:
    """Standard output of a program that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
