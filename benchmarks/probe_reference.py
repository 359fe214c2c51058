"""Figures of `expertpager probe` beside fio and read loops in C on the same machine.

    python benchmarks/probe_reference.py --store STORE [--turns 12] [--seconds 0.5]

Needs `fio` (a package of every distribution) and a C compiler. fio reads the store's expert files by direct I/O at
random in blocks of an expert's size with as many threads as `probe` has reads under way. Every thread of fio reads into
one buffer, and few buffers stay in the processor's caches, where a virtual drive copies to faster than into the memory
of a run. So where one or two reads are under way, many threads wait for each other at the lock of as many files; what
fio gains with a thread for each is beside that. A C program reads the same blocks into one slot after another of as
much memory as `probe` uses. Another sums a buffer of huge pages, much larger than the caches, in four streams a thread
that are asked for ahead of time, with each number of threads; they take pieces of it until none is left. Probe and
reference take turns of half a second: on a machine that others use, too, longer ones meet different moments. The row
holds the means of both and the median of their ratios, which should lie within 10% of 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

from record import append  # noqa: E402

from offload.kernels.native import usable_cpus  # noqa: E402
from offload.store import Store  # noqa: E402
from offload.tiers.host import SlotPool  # noqa: E402
from offload.tune.probe import Effort, ram_rate  # noqa: E402
from offload.tune.probe_drive import drive_rate, slots_for  # noqa: E402
from offload.types import ExpertId, Extent, align_up  # noqa: E402

DEPTHS = (1, 2, 4, 8, 16)
FEW = (1, 2)
FEW_BUFFERS = "fio into one buffer a thread, over fio into many"
BUFFERS = 32
"""Of fio, together: more than the caches hold."""

THINK_US = 5000
"""So long does a thread of fio leave the lock to others after each read."""

HUGE_PAGE = 2 << 20
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
LEAST_HUGE_PAGES = 200

LOOP_HEAD = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}
"""

DRIVE_LOOP = r"""
static char *slots;
static size_t block, count, blocks, next_slot, done;
static double until;
static int fd;

static void *reads(void *number) {
    unsigned seed = 1 + (unsigned)(size_t)number;
    while (now() < until) {
        char *slot = slots + __atomic_fetch_add(&next_slot, 1, __ATOMIC_RELAXED) % count * block;
        if (pread(fd, slot, block, (off_t)(rand_r(&seed) % blocks * block)) != (ssize_t)block) exit(1);
        __atomic_fetch_add(&done, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

int main(int argc, char **argv) {
    size_t size = strtoull(argv[2], NULL, 10), memory = strtoull(argv[4], NULL, 10);
    size_t threads = strtoull(argv[5], NULL, 10);
    block = strtoull(argv[3], NULL, 10), count = memory / block, blocks = size / block;
    fd = open(argv[1], O_RDONLY | O_DIRECT);
    slots = aligned_alloc(1 << 21, memory);
    madvise(slots, memory, MADV_HUGEPAGE);
    memset(slots, 1, memory);
    pthread_t id[256];
    double begun = now();
    until = begun + strtod(argv[6], NULL);
    for (size_t t = 0; t < threads; t++) pthread_create(&id[t], NULL, reads, (void *)t);
    for (size_t t = 0; t < threads; t++) pthread_join(id[t], NULL);
    printf("%.0f\n", done * block / (now() - begun));
}
"""

READ_LOOP = r"""
static uint64_t *data;
static size_t pieces, next_piece;
static volatile uint64_t sink;

enum { STREAMS = 4, AHEAD = 128, PIECE = 1 << 18, PART = PIECE / STREAMS };  /* words */

static void *sum(void *unused) {
    uint64_t sums[STREAMS][8] = {{0}};
    size_t piece;
    while ((piece = __atomic_fetch_add(&next_piece, 1, __ATOMIC_RELAXED)) < pieces) {
        const uint64_t *from = data + piece * PIECE;
        for (size_t i = 0; i < PART; i += 8)
            for (int s = 0; s < STREAMS; s++) {
                const uint64_t *line = from + s * PART + i;
                __builtin_prefetch(line + AHEAD);
                for (int j = 0; j < 8; j++) sums[s][j] += line[j];
            }
    }
    for (int s = 0; s < STREAMS; s++)
        for (int j = 0; j < 8; j++) sink += sums[s][j];
    return unused;
}

int main(int argc, char **argv) {
    size_t nbytes = strtoull(argv[1], NULL, 10), threads = strtoull(argv[2], NULL, 10), passes = 0;
    double seconds = strtod(argv[3], NULL);
    pieces = nbytes / 8 / PIECE;
    data = aligned_alloc(1 << 21, nbytes);
    madvise(data, nbytes, MADV_HUGEPAGE);
    memset(data, 1, nbytes);
    pthread_t id[256];
    double begun = now();
    do {
        next_piece = 0;
        for (size_t t = 1; t < threads; t++) pthread_create(&id[t], NULL, sum, NULL);
        sum(NULL);
        for (size_t t = 1; t < threads; t++) pthread_join(id[t], NULL);
        passes++;
    } while (now() - begun < seconds);
    printf("%.0f\n", passes * pieces * PIECE * 8 / (now() - begun));
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=12, help="Of probe and reference, per figure.")
    parser.add_argument("--seconds", type=float, default=0.5, help="Per turn.")
    arguments = parser.parse_args()
    if not shutil.which("fio"):
        raise SystemExit("fio is not installed")
    if int(HUGE_PAGES.read_text()) < LEAST_HUGE_PAGES:
        raise SystemExit(f"fio needs huge pages to read into: echo {LEAST_HUGE_PAGES} > {HUGE_PAGES}")
    store, seconds = Store.open(arguments.store), arguments.seconds
    layers = store.config.moe_layers
    extents = [store.locate(ExpertId(layers[0], expert)) for expert in range(store.config.n_routed_experts)]
    files = [store.locate(ExpertId(layer, 0)).path for layer in layers]
    memory = align_up(Effort().buffer_nbytes, HUGE_PAGE)
    numbers: dict[str, dict[str, Any]] = {"drive by fio": {}, "drive": {}, FEW_BUFFERS: {}, "RAM": {}}
    with tempfile.TemporaryDirectory(prefix="expertpager-reference-") as folder:
        program, reader = compiled(Path(folder), "read", READ_LOOP), compiled(Path(folder), "drive", DRIVE_LOOP)
        data, pool = SlotPool(1, memory).bytes, slots_for(extents)
        for depth in DEPTHS:
            mine = partial(drive_by_reader, extents, pool, depth, seconds)
            fio = partial(drive_by_fio, files, align_up(extents[0].nbytes), depth, seconds)
            by_fio = partial(fio, BUFFERS if depth in FEW else depth)
            by_loop = partial(drive_by_loop, reader, extents[0], memory, depth, seconds)
            numbers["drive by fio"][str(depth)] = beside(mine, by_fio, arguments.turns)
            numbers["drive"][str(depth)] = beside(mine, by_loop, arguments.turns)
            if depth in FEW:
                numbers[FEW_BUFFERS][str(depth)] = beside(partial(fio, depth), by_fio, arguments.turns)
        for count in range(1, usable_cpus() + 1):
            mine = partial(ram_rate, data, count, seconds)
            reference = partial(ram_by_loop, program, memory, count, seconds)
            numbers["RAM"][str(count)] = beside(mine, reference, arguments.turns)
    command = f"python benchmarks/probe_reference.py --store STORE --turns {arguments.turns}"
    append("probe_reference", f"{command} --seconds {seconds:g}", numbers)
    print(json.dumps(numbers, indent=1))


def beside(mine: Callable[[], float], reference: Callable[[], float], turns: int) -> dict[str, float]:
    """GB/s of probe and reference, which take turns, and the median of the probe's over the mean of both neighbours."""
    rates, others = [], [reference()]
    for _ in range(turns):
        rates.append(mine())
        others.append(reference())
    ratios = [2 * rate / (before + after) for rate, before, after in zip(rates, others[:-1], others[1:], strict=True)]
    found = {
        "probe GB/s": statistics.harmonic_mean(rates) / 1e9,
        "reference GB/s": statistics.harmonic_mean(others) / 1e9,
        "ratio": statistics.median(ratios),
    }
    print(json.dumps(found), file=sys.stderr)
    return {name: round(value, 3) for name, value in found.items()}


def drive_by_reader(extents: list[Extent], pool: SlotPool, reads: int, seconds: float) -> float:
    """Bytes per second as `probe` measures them."""
    return drive_rate(extents, pool, reads, seconds)[0]


def drive_by_fio(files: Sequence[Path], block: int, reads: int, seconds: float, buffers: int) -> float:
    """Bytes per second of direct random reads of `block` bytes, so many under way, each thread into one of `buffers`.

    They are huge pages, as slots are: the system must have some set aside (/proc/sys/vm/nr_hugepages).
    """
    options = {
        "rw": "randread",
        "bs": block,
        "direct": 1,
        "ioengine": "psync",
        "iomem": "shmhuge",
        "runtime": seconds,
        "output-format": "json",
    }
    each = buffers // reads
    options |= {"numjobs": each} | ({"lockfile": "exclusive", "thinktime": THINK_US} if each > 1 else {})
    flags = ["--thread", "--group_reporting", "--time_based", "--readonly"]
    flags += [f"--{name}={value}" for name, value in options.items()]
    # With a lock, only one thread reads a file at a time.
    places = files[:reads] if each > 1 else [files[0]] * reads
    for number, path in enumerate(places):
        flags += [f"--name=read-{number}", f"--filename={path}"]
    done = output(["fio", *flags])
    return float(json.loads(done[done.index("{") :])["jobs"][0]["read"]["bw_bytes"])


def drive_by_loop(program: Path, extent: Extent, memory: int, threads: int, seconds: float) -> float:
    """The same reads into one slot after another of `memory` bytes."""
    sizes = extent.path.stat().st_size, align_up(extent.nbytes), memory, threads, seconds
    return float(output([str(program), str(extent.path), *map(str, sizes)]))


def compiled(folder: Path, name: str, text: str) -> Path:
    """A read loop as a program."""
    source, program = folder / f"{name}.c", folder / name
    source.write_text(LOOP_HEAD + text, encoding="utf-8")
    output(["cc", "-O3", "-march=native", "-pthread", "-o", str(program), str(source)])
    return program


def ram_by_loop(program: Path, nbytes: int, threads: int, seconds: float) -> float:
    """Bytes per second of summing `nbytes` with `threads` threads."""
    return float(output([str(program), str(nbytes), str(threads), str(seconds)]))


def output(command: list[str]) -> str:
    """Standard output of a program that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
