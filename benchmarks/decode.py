"""Decode and prefill speed with the whole model in RAM, beside llama.cpp on the same checkpoint.

    python benchmarks/decode.py --folder SCRATCH --llama-cpp TREE [--rounds 3] [--threads 2]

SCRATCH takes the 10B checkpoint of bench_model.py, its int4-g32 store and a Q4_0 GGUF (27 GB while they are
made). TREE is a source tree of llama.cpp (for instance vendor/llama.cpp in the source distribution of
llama-cpp-python) in which `llama-bench` and `llama-quantize` were built under build/. Runs alternate, ours
first; the row holds every run, the medians and their ratios. Absolute speeds say little on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_model  # noqa: E402
from convert_gguf import to_gguf  # noqa: E402
from record import append  # noqa: E402

OURS = """
import json, random, sys, time
import offload
store, threads, prompt, decode = sys.argv[1], *map(int, sys.argv[2:])
rng = random.Random(0)
def ids(n): return [rng.randrange(32768) for _ in range(n)]
with offload.load(store, threads=threads, kernels="native", context=prompt + decode) as engine:
    for _ in range(2):  # brings every expert into RAM
        list(engine.generate(ids(prompt), max_tokens=1, temperature=0.0))
    list(engine.generate(ids(prompt), max_tokens=1, temperature=0.0))
    prefill = engine.summary().to_dict()
    list(engine.generate(ids(8), max_tokens=decode, temperature=0.0, ignore_eos=True))
    run = engine.summary().to_dict()
print(json.dumps({"prefill": prefill["prefill_tok_s"], "decode": run["decode_tok_s"], "misses": run["misses"]["ram"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    arguments = parser.parse_args()
    # 4.5 bits per weight in every matrix, as in Q4_0; llama.cpp keeps the head at 6.6 bits.
    store = bench_model.store(arguments.folder, resident="int4-g32", head="int4-g32")
    gguf = to_gguf(arguments.llama_cpp, bench_model.checkpoint(arguments.folder), arguments.folder / "10b-q4_0.gguf")
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        ours.append(run_ours(store, arguments))
        theirs.append(run_llama(gguf, arguments))
        print(ours[-1], theirs[-1], file=sys.stderr)
    write_row(arguments, ours, theirs)


def run_ours(store: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Prefill and decode tok/s of this project, in a process of its own."""
    numbers = [str(n) for n in (arguments.threads, arguments.prompt, arguments.decode)]
    return json.loads(_output([sys.executable, "-c", OURS, str(store), *numbers]).splitlines()[-1])


def run_llama(gguf: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Prefill and decode tok/s of llama-bench, which warms up by itself."""
    sizes = ["-t", str(arguments.threads), "-p", str(arguments.prompt), "-n", str(arguments.decode), "-r", "1"]
    program = arguments.llama_cpp / "build" / "bin" / "llama-bench"
    tests = json.loads(_output([str(program), "-m", str(gguf), *sizes, "-o", "json"]))
    return {"prefill" if test["n_prompt"] else "decode": test["avg_ts"] for test in tests}


def write_row(arguments: argparse.Namespace, ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    """Append medians, ratios and every run to the results."""
    numbers: dict[str, Any] = {"ours": ours, "llama.cpp Q4_0": theirs}
    for what in ("prefill", "decode"):
        a, b = (statistics.median(run[what] for run in runs) for runs in (ours, theirs))
        numbers |= {f"{what} tok/s": round(a, 2), f"llama.cpp {what} tok/s": round(b, 2)}
        ratios = [mine[what] / other[what] for mine, other in zip(ours, theirs, strict=True)]
        numbers[f"{what} ratio"] = round(statistics.median(ratios), 3)
    sizes = f"--threads {arguments.threads} --prompt {arguments.prompt} --decode {arguments.decode}"
    append("decode", f"python benchmarks/decode.py {sizes} --rounds {arguments.rounds}", numbers)
    print(json.dumps(numbers, indent=1))


def _output(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
