"""Decoding a model larger than RAM, beside llama.cpp's mmap under the same hard memory limit.

    python benchmarks/paging.py --folder SCRATCH --llama-cpp TREE [--shares 0.57 0.30] [--rounds 2] [--slots N]
    python benchmarks/paging.py --folder SCRATCH --shape v3 --shares 0.5

Uses the 10B store and the Q4_0 GGUF of decode.py. Both programs run inside a memory cgroup (v1, so it must be run as
root) that holds the given share of the store's size; runs alternate, ours first. Ours gets 96% of the limit as --ram.

The drive's ceiling is measured between the tokens: after every few tokens the very extents that they read are read
again by a process outside the group that has nothing else to do, in one go, with another number of readers and
another size of reads each time. So both read the same bytes, as recently used, from a drive in the same mood, and the
best setting counts. `--slots` gives the expert slots directly, below one token's working set if need be: the fewer,
the more a token is bound by the drive.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_model  # noqa: E402
from convert_gguf import to_gguf  # noqa: E402
from record import append  # noqa: E402

from offload.engine.engine import ram_for_share  # noqa: E402
from offload.store import Store  # noqa: E402
from offload.tiers.disk import DiskReader  # noqa: E402
from offload.tiers.host import SlotPool  # noqa: E402
from offload.tiers.reads import Read  # noqa: E402
from offload.types import Extent  # noqa: E402

CGROUP = Path("/sys/fs/cgroup/memory/expertpager-bench")
CONTEXT = 512
WARM = 32
SETTINGS = ((4, 4 << 20), (8, 2 << 20), (8, 4 << 20), (16, 1 << 20), (16, 4 << 20))
"""Readers and bytes per read with which the ceiling is sought."""

OURS = """
import json, random, sys, time
import offload
store, ram, warm, decode, segment = sys.argv[1], *map(int, sys.argv[2:])
rng = random.Random(0)
prompt = lambda: [rng.randrange(32768) for _ in range(8)]
with offload.load(store, ram=ram, context=512, usage="off", allow_slow=True) as engine:
    list(engine.generate(prompt(), max_tokens=warm, temperature=0.0, ignore_eos=True))
    reader, extents = engine._executor.ram.reader, []
    submit, prefetch = reader.submit, reader.prefetch
    def logged_submit(reads):
        extents.extend(read.extent for read in reads)
        submit(reads)
    def logged_prefetch(read):
        taken = prefetch(read)
        if taken:
            extents.append(read.extent)
        return taken
    reader.submit, reader.prefetch = logged_submit, logged_prefetch
    steps = engine.generate(prompt(), max_tokens=decode + 1, temperature=0.0, ignore_eos=True)
    next(steps)
    for _ in range(decode // segment):
        extents.clear()
        before, begun = engine.counters()["ram"], time.perf_counter()
        for _ in range(segment):
            next(steps)
        seconds, after = time.perf_counter() - begun, engine.counters()["ram"]
        row = {name: after[name] - before[name] for name in before}
        row |= {"seconds": seconds, "extents": [[str(e.path), e.offset, e.nbytes] for e in extents]}
        print(json.dumps(row), flush=True)
        sys.stdin.readline()
    steps.close()
    print(json.dumps(engine.summary().to_dict()), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's tree with its build/; without it ours alone runs")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.57, 0.30])
    parser.add_argument("--slots", type=int, help="expert slots; --shares is then only the hard limit")
    parser.add_argument("--shape", choices=bench_model.SHAPES, default="10b", help="v3: experts of DeepSeek-V3's size")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--decode", type=int, default=60)
    parser.add_argument("--segment", type=int, default=2, help="tokens between two readings of the ceiling")
    arguments = parser.parse_args()
    if arguments.shape != "10b" and arguments.llama_cpp:
        parser.error("llama.cpp runs the 10B model only")
    store = Store.open(bench_model.store(arguments.folder, shape=arguments.shape))
    size = sum(file.stat().st_size for file in store.path.glob("*.safetensors"))
    for share in arguments.shares:
        limit = int(share * size)
        runs = [one_round(store, limit, arguments) for _ in range(arguments.rounds)]
        numbers = summarise(runs) | {"share": share, "limit_bytes": limit, "store_bytes": size}
        slots = f" --slots {arguments.slots}" if arguments.slots else ""
        shape = f" --shape {arguments.shape}" if arguments.shape != "10b" else ""
        command = f"python benchmarks/paging.py{shape} --shares {share} --rounds {arguments.rounds}{slots}"
        if arguments.decode != parser.get_default("decode"):
            command += f" --decode {arguments.decode}"
        append("paging", command, numbers)
        print(json.dumps(numbers, indent=1))


def one_round(store: Store, limit: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours with the drive alone in between, then llama.cpp."""
    ram = int(0.96 * limit)
    if arguments.slots:
        experts = store.config.n_routed_experts * len(store.config.moe_layers)
        ram = ram_for_share(store.path, arguments.slots / experts, context=CONTEXT) + (8 << 20)
    row = ours(store, ram, limit, arguments.decode, arguments.segment)
    if arguments.llama_cpp:
        row["llama.cpp mmap tok/s"] = theirs(arguments, limit)
    print(row, file=sys.stderr)
    return row


def ours(store: Store, ram: int, limit: int, decode: int, segment: int) -> dict[str, Any]:
    """Decode speed, and what the drive did beside what it can do."""
    command = [sys.executable, "-c", OURS, str(store.path), str(ram), str(WARM), str(decode), str(segment)]
    ceilings = {setting: [0, 0.0] for setting in SETTINGS}
    segments = []
    with limited(command, limit) as process:
        assert process.stdin is not None and process.stdout is not None
        for number in range(decode // segment):
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the run under the limit ended early")
            row = json.loads(line)
            setting = SETTINGS[number % len(SETTINGS)]
            extents = [Extent(Path(path), offset, nbytes) for path, offset, nbytes in row.pop("extents")]
            segments.append(row)
            if extents:
                ceilings[setting][0] += sum(extent.nbytes for extent in extents)
                ceilings[setting][1] += drive_alone(extents, store.layout.slot_nbytes, *setting)
            process.stdin.write("\n")
            process.stdin.flush()
        summary = json.loads(process.stdout.readline())
    total = {name: sum(row[name] for row in segments) for name in segments[0]}
    rates = {setting: nbytes / seconds for setting, (nbytes, seconds) in ceilings.items() if seconds}
    best = max(rates, key=lambda setting: rates[setting])
    return {
        "decode tok/s": len(segments) * segment / total["seconds"],
        "hit rate": total["hits"] / (total["hits"] + total["misses"]),
        "read MB/s while reading": total["bytes_read"] / total["read_s"] / 1e6,
        "read MB/s over the whole run": total["bytes_read"] / total["seconds"] / 1e6,
        "drive MB/s alone": rates[best] / 1e6,
        "drive busy": total["read_s"] / total["seconds"],
        "stall share of the run": total["stall_s"] / total["seconds"],
        "reads hidden by computing": 1 - total["stall_s"] / total["read_s"],
        "prefetches": total["prefetch_issued"],
        "wasted prefetch bytes": total["prefetch_wasted"] / total["reads"],
        "peak RAM / --ram": summary["peak_ram_bytes"] / ram,
        "slots": summary["plan"]["slots"],
        "best setting": f"{best[0]} readers of {best[1] >> 20} MiB",
        "alone by setting": {f"{n} x {part >> 20} MiB": round(rate / 1e6) for (n, part), rate in rates.items()},
    }


def drive_alone(extents: list[Extent], slot_nbytes: int, threads: int, part_nbytes: int) -> float:
    """Seconds in which all of `extents` are read, as many at a time as the readers take."""
    pool, reader = SlotPool(2 * threads, slot_nbytes), DiskReader(threads=threads, part_nbytes=part_nbytes)
    waiting, free, under_way = list(reversed(extents)), list(range(pool.slots)), 0
    begun = time.perf_counter()
    while waiting or under_way:
        reads = []
        while waiting and free:
            slot = free.pop()
            reads.append(Read(waiting.pop(), pool.buffer(slot), "an expert", tag=slot))
        reader.submit(reads)
        under_way += len(reads)
        read = reader.completed(wait=True)
        assert read is not None and read.error is None
        free.append(read.tag)
        under_way -= 1
    elapsed = time.perf_counter() - begun
    reader.close()
    return elapsed


def theirs(arguments: argparse.Namespace, limit: int) -> float:
    """Decode speed of llama.cpp with the weights mapped from the file."""
    gguf = to_gguf(arguments.llama_cpp, bench_model.checkpoint(arguments.folder), arguments.folder / "10b-q4_0.gguf")
    # Without its repacked copy of the weights, which would not be mapped from the file but allocated.
    sizes = ["-p", "0", "-n", "12", "-r", "1", "--no-warmup", "-t", str(os.cpu_count()), "-o", "json"]
    sizes += ["--load-mode", "mmap", "--repack", "0"]
    bench = str(arguments.llama_cpp / "build" / "bin" / "llama-bench")
    with limited([bench, "-m", str(gguf), *sizes], limit) as process:
        output, _ = process.communicate()
    return float(json.loads(output)[0]["avg_ts"])


@contextmanager
def limited(command: list[str], limit: int) -> Iterator[subprocess.Popen[str]]:
    """`command` running with cold page cache inside a memory cgroup of `limit` bytes."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    CGROUP.mkdir(exist_ok=True)
    (CGROUP / "memory.limit_in_bytes").write_text(str(limit))
    shell = f'echo $$ > {CGROUP}/cgroup.procs && exec "$@"'
    process = subprocess.Popen(
        ["sh", "-c", shell, "sh", *command], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
        if process.wait():
            raise SystemExit(f"{command[0]} failed ({process.returncode})")
    finally:
        process.kill()
        process.wait()


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of every figure, and the ratios that count."""
    numbers: dict[str, Any] = {
        key: statistics.median(run[key] for run in runs)
        for key, value in runs[0].items()
        if not isinstance(value, (str, dict))
    }
    for name, key in (
        ("while reading", "read MB/s while reading"),
        ("over the whole run", "read MB/s over the whole run"),
    ):
        numbers[f"share of the drive {name}"] = statistics.median(run[key] / run["drive MB/s alone"] for run in runs)
    if "llama.cpp mmap tok/s" in runs[0]:
        numbers["times llama.cpp"] = statistics.median(
            run["decode tok/s"] / run["llama.cpp mmap tok/s"] for run in runs
        )
    return {key: round(value, 4) for key, value in numbers.items()} | {"runs": runs}


if __name__ == "__main__":
    main()
