"""How fast conversion and verification are, what memory and disk they take, beside llama.cpp's two-step route.

    python benchmarks/convert.py encoder
    python benchmarks/convert.py whole --folder SCRATCH [--experts 256] [--scales ls] [--workers 2]
    python benchmarks/convert.py verify --folder SCRATCH [--experts 256]
    python benchmarks/convert.py llama --folder SCRATCH --llama-cpp TREE [--layers 8]
    python benchmarks/convert.py kills --folder SCRATCH [--kills 200]

`whole` and `verify` use a random checkpoint with DeepSeek-V3's true tensor shapes: one dense layer and one MoE layer
with as many experts as asked for (256: 12.7 GB). `llama` uses the 10B checkpoint of bench_model.py, or one with fewer
layers: with SCRATCH in RAM that compares what the programs do, without the drive. TREE is a source tree of llama.cpp
(for instance vendor/llama.cpp in the source distribution of llama-cpp-python) in which `llama-quantize` was built
under build/. `kills` ends conversions of a small checkpoint, alone and three at a time, with
SIGKILL at random instants and compares SHA-256 of every file with an undisturbed run. Every run appends a row to
benchmarks/results/convert.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Run as a script, this file would be found in place of the package it measures.
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_model  # noqa: E402
import torch  # noqa: E402
from convert_gguf import quantize, to_dense  # noqa: E402
from record import append  # noqa: E402

from convert import convert  # noqa: E402
from convert.encoder import Encoder, NativeEncoder, ReferenceEncoder  # noqa: E402
from convert.synthetic import V3_CONFIG, write_checkpoint  # noqa: E402
from offload.quant import get_codec  # noqa: E402

GIB = 1 << 30
SMALL = {"num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4}

CONVERT = """
import json, resource, sys, time
from convert import convert
begun, cpu = time.monotonic(), time.process_time()
report = convert(sys.argv[1], sys.argv[2], scales=sys.argv[3], workers=int(sys.argv[4]))
wall, cpu = time.monotonic() - begun, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(report.to_dict() | {"wall_s": wall, "cpu_s": cpu, "peak_rss": peak}))
"""

VERIFY = """
import json, sys
from convert.verify import verify
print(json.dumps(verify(sys.argv[1]).to_dict()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("encoder", "whole", "verify", "llama", "kills"))
    parser.add_argument("--folder", type=Path, help="scratch space: a few times the checkpoint")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scales", default="ls")
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--kills", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.what == "encoder":
        numbers = measure_encoder()
    elif arguments.what == "whole":
        source = checkpoint(arguments.folder, arguments.experts)
        numbers = {"experts": arguments.experts} | measure_whole(source, arguments.scales, arguments.workers)
    elif arguments.what == "verify":
        numbers = measure_verify(checkpoint(arguments.folder, arguments.experts))
    elif arguments.what == "kills":
        numbers = measure_kills(arguments.folder, arguments.kills)
    else:
        source = shortened(arguments.folder, arguments.layers) if arguments.layers else None
        source = source or bench_model.checkpoint(arguments.folder)
        numbers = {"layers": arguments.layers} | measure_llama(source, arguments.workers, arguments.llama_cpp)
    options = [option if not option.startswith("/") else "PATH" for option in sys.argv[1:]]
    print(json.dumps(numbers, indent=1))
    append("convert", " ".join(["python", "benchmarks/convert.py", *options]), numbers)


def measure_encoder() -> dict[str, Any]:
    """MB/s of FP8 source on one core, for an expert's projection [2048, 7168]; in time of the processor."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    weight = (torch.randn(2048, 7168, generator=rng) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(16, 56, generator=rng) * 1e-4
    numbers: dict[str, Any] = {}
    encoders: tuple[tuple[Encoder, int], ...] = ((NativeEncoder(), 10), (ReferenceEncoder(), 1))
    for encoder, rounds in encoders:
        for codec in ("int4-g32", "int8-g128"):
            for method in ("rtn", "ls"):
                act = partial(encoder.encode, weight, scale, (128, 128), get_codec(codec), method)
                seconds = min(timed(act) for _ in range(rounds))
                numbers[f"{encoder.name} {codec} {method} MB/s"] = round(weight.nbytes / seconds / 1e6, 1)
    return numbers


def timed(act: Callable[[], Any]) -> float:
    """Processor time of one call on this thread: other programs do not count."""
    begun = time.thread_time()
    act()
    return time.thread_time() - begun


def measure_whole(source: Path, scales: str, workers: int) -> dict[str, Any]:
    """One conversion in a process of its own, source not in the page cache, against the drive's own speed."""
    nbytes = tree_nbytes(source)
    drive = measure_drive(source.parent)
    out = source.parent / "store-of-benchmark"
    shutil.rmtree(out, ignore_errors=True)
    drop_from_cache(source)
    begun = time.monotonic()
    with PeakDisk(out) as disk:
        report = json.loads(run([sys.executable, "-c", CONVERT, str(source), str(out), scales, str(workers)]))
    os.sync()
    wall = time.monotonic() - begun  # with starting Python, as a user waits for it
    limit = nbytes / drive["read"] + report["store_bytes"] / drive["write"]
    numbers = {
        "scales": scales,
        "workers": workers,
        "source_bytes": nbytes,
        "store_bytes": report["store_bytes"],
        "wall_s": round(wall, 2),
        "cpu_s": round(report["cpu_s"], 2),
        "source_MB_per_s": round(nbytes / wall / 1e6, 1),
        "source_MB_per_core_s": round(nbytes / report["cpu_s"] / 1e6, 1),
        "drive_read_MB_per_s": round(drive["read"] / 1e6, 1),
        "drive_write_MB_per_s": round(drive["write"] / 1e6, 1),
        "share_of_read_plus_write_limit": round(limit / wall, 3),
        "peak_rss_bytes": report["peak_rss"],
        "memory_bound_bytes": GIB + workers * 4 * largest_expert(source),
        "extra_disk_bytes": max(0, disk.peak - tree_nbytes(out)),
    }
    shutil.rmtree(out)
    return numbers


def measure_verify(source: Path) -> dict[str, Any]:
    """Verification of a store that is not in the page cache, against the same reads without checksums."""
    out = source.parent / "store-of-benchmark"
    if not (out / "expertpager.json").exists():
        convert(source, out)
    os.sync()
    # On both sides: a drive that remembers what was read, as a virtual machine's does, must not favour one of them.
    before = direct_read_speed(out)
    report = json.loads(run([sys.executable, "-c", VERIFY, str(out)]))
    assert report["ok"], report
    ceiling = max(before, direct_read_speed(out))
    shutil.rmtree(out)
    speed = report["bytes"] / report["seconds"]
    return {
        "store_bytes": report["bytes"],
        "seconds": round(report["seconds"], 2),
        "MB_per_s": round(speed / 1e6, 1),
        "drive_MB_per_s": round(ceiling / 1e6, 1),
        "share_of_drive": round(speed / ceiling, 3),
    }


def measure_llama(source: Path, workers: int, tree: Path | None) -> dict[str, Any]:
    """Ours and llama.cpp's two steps (to a BF16 GGUF, then to Q4_0) on the same checkpoint, each from a cold cache."""
    if tree is None:
        raise SystemExit("--llama-cpp is needed")
    ours, rounded = (measure_whole(source, scales, workers) for scales in ("ls", "rtn"))
    dense, quantized = source.parent / "benchmark.bf16.gguf", source.parent / "benchmark.q4_0.gguf"
    drop_from_cache(source)
    begun = time.monotonic()
    to_dense(tree, source, dense)
    os.sync()
    first = time.monotonic() - begun
    quantize(tree, dense, quantized, workers)
    os.sync()
    both = time.monotonic() - begun
    numbers = {
        "ours": ours,
        "ours_rtn": rounded,
        "llama_to_gguf_s": round(first, 2),
        "llama_quantize_s": round(both - first, 2),
        "llama_source_MB_per_s": round(ours["source_bytes"] / both / 1e6, 1),
        "llama_peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "llama_extra_disk_bytes": dense.stat().st_size,
        "times_faster": round(both / ours["wall_s"], 2),
        "times_faster_rtn": round(both / rounded["wall_s"], 2),
    }
    dense.unlink()
    quantized.unlink()
    return numbers


def measure_kills(folder: Path, kills: int) -> dict[str, Any]:
    """SIGKILL at random instants, one process and three sharing a store: are the files those of an undisturbed run?"""
    folder.mkdir(parents=True, exist_ok=True)
    script = str(ROOT / "tests" / "convert" / "killing.py")
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = write_checkpoint(Path(scratch) / "c", seed=1, shards=3, scatter=True, mtp=True, **SMALL)
        for processes in (1, 3):
            into = Path(scratch) / str(processes)
            line = run([sys.executable, script, str(source), str(into), str(kills), "0", str(processes)])
            numbers[f"{processes} at a time"] = json.loads(line)
    return numbers


def checkpoint(folder: Path, experts: int) -> Path:
    """The source: true shapes, a small vocabulary, so that experts are most of it."""
    path = folder / f"v3-shapes-{experts}"
    if not (path / "config.json").exists():
        sizes = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": experts, "vocab_size": 16384}
        write_checkpoint(path, V3_CONFIG, shards=4, tokenizer=True, **sizes)
        os.sync()
    return path


def shortened(folder: Path, layers: int) -> Path:
    """The 10B model of bench_model.py cut to so many layers."""
    path = folder / f"10b-{layers}-layers"
    if not (path / "config.json").exists():
        write_checkpoint(path, bench_model.CONFIG_10B, shards=4, tokenizer=True, num_hidden_layers=layers)
    return path


def largest_expert(source: Path) -> int:
    """Bytes of one routed expert's FP8 weights."""
    config = json.loads((source / "config.json").read_text())
    return 3 * int(config["hidden_size"]) * int(config["moe_intermediate_size"])


def measure_drive(folder: Path, nbytes: int = 2 * GIB) -> dict[str, float]:
    """Bytes/s of one sequential stream: written with fsync, then read after leaving the page cache."""
    path = folder / "drive.bin"
    block = os.urandom(16 << 20)
    begun = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(nbytes // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    write = nbytes / (time.monotonic() - begun)
    drop_from_cache(folder)
    begun = time.monotonic()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(len(block))
        while file.readinto(buffer):
            pass
    read = nbytes / (time.monotonic() - begun)
    path.unlink()
    return {"read": read, "write": write}


def direct_read_speed(folder: Path, threads: int = 4, block: int = 8 << 20) -> float:
    """Bytes/s of direct reads of the largest file, `threads` at a time, with nothing done to the bytes."""
    import mmap

    path = max(folder.iterdir(), key=lambda file: file.stat().st_size)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    local = threading.local()

    def read(offset: int) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, block)
        return os.preadv(fd, [local.buffer], offset)

    begun = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, range(0, path.stat().st_size, block)))
    seconds = time.monotonic() - begun
    os.close(fd)
    return total / seconds


class PeakDisk:
    """The largest size of a folder while a block runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.peak = folder, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakDisk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, tree_nbytes(self.folder))


def tree_nbytes(folder: Path) -> int:
    """Bytes of all files; files that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget the files of `folder`: the drive is part of what is measured."""
    os.sync()
    for path in folder.iterdir():
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def run(command: list[str]) -> str:
    """The last line of the standard output of `command`, which must succeed."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "convert")])}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{command[:2]}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return (done.stdout.splitlines() or [""])[-1]


if __name__ == "__main__":
    main()
