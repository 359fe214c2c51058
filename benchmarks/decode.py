"""Decode and prefill speed with the whole model in RAM, beside llama.cpp on the same checkpoint.

    python benchmarks/decode.py --folder SCRATCH --llama-cpp TREE [--rounds 12] [--threads 2]

SCRATCH takes the 10B checkpoint of bench_model.py, its int4-g32 store and a Q4_0 GGUF (27 GB while they are
made). TREE is a source tree of llama.cpp (for instance vendor/llama.cpp in the source distribution of
llama-cpp-python) in which `llama-bench` and `llama-quantize` were built under build/. Turns of a few seconds
alternate, ours first: one engine stays loaded and sleeps while the other runs, and begins when the memory that the
other left behind has gone (settle.py). Prompts take turns in every fourth round. The row holds every turn, what the
host took away meanwhile, medians, and the median of the ratios of neighbouring turns: absolute speeds say little on a
shared machine, and any other process that runs costs threads that wait for each other most of their speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_model  # noqa: E402
from convert_gguf import to_gguf  # noqa: E402
from record import append  # noqa: E402
from settle import settle, with_stolen  # noqa: E402

OURS = """
import json, random, sys
import offload
store, threads, prompt, decode = sys.argv[1], *map(int, sys.argv[2:])
rng = random.Random(0)
def ids(n): return [rng.randrange(32768) for _ in range(n)]
def run(tokens, more):
    list(engine.generate(ids(tokens), max_tokens=more, temperature=0.0, ignore_eos=True))
    return engine.summary().to_dict()
with offload.load(store, threads=threads, kernels="native", context=prompt + decode, usage="off") as engine:
    for _ in range(64):  # brings every expert into RAM, rarely chosen ones too
        if run(prompt, 1)["misses"]["ram"] == 0:
            break
    print("ready", flush=True)
    for line in sys.stdin:
        what = line.strip()
        found = run(prompt, 1) if what == "prefill" else run(8, decode)
        print(json.dumps({"tok_s": found[f"{what}_tok_s"], "misses": found["misses"]["ram"]}), flush=True)
"""
PREFILL_EVERY = 4
"""Rounds from one turn of prompts to the next: they take ten times as long."""

Pairs = dict[str, list[tuple[float, float]]]
"""Figures of our turns and of those of llama.cpp, by what was run."""


class Ours:
    """This project in a process of its own, loaded once."""

    def __init__(self, store: Path, arguments: argparse.Namespace) -> None:
        numbers = [str(n) for n in (arguments.threads, arguments.prompt, arguments.decode)]
        command = [sys.executable, "-c", OURS, str(store), *numbers]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._answer()

    def turn(self, what: str) -> float:
        """Tok/s of `prefill` or `decode`; says so if an expert had to be read."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        found = json.loads(self._answer())
        if found["misses"] > 0:
            print(f"{found['misses']} experts were read during {what}: the turn is not one in RAM", file=sys.stderr)
        return float(found["tok_s"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine ended with {self._process.wait()}")
        return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    arguments = parser.parse_args()
    # 4.5 bits per weight in every matrix, as in Q4_0; llama.cpp keeps the head at 6.6 bits.
    store = bench_model.store(arguments.folder, resident="int4-g32", head="int4-g32")
    gguf = to_gguf(arguments.llama_cpp, bench_model.checkpoint(arguments.folder), arguments.folder / "10b-q4_0.gguf")
    turns: Pairs = {"prefill": [], "decode": []}
    stolen: Pairs = {"prefill": [], "decode": []}
    engine = Ours(store, arguments)
    try:
        llama_turn("decode", gguf, arguments)  # the file is in the page cache from now on
        for number in range(arguments.rounds):
            for what in ("decode", "prefill") if number % PREFILL_EVERY == 0 else ("decode",):
                settle()
                ours, lost = with_stolen(partial(engine.turn, what))
                theirs, also_lost = with_stolen(partial(llama_turn, what, gguf, arguments))
                turns[what].append((ours, theirs))
                stolen[what].append((round(lost, 3), round(also_lost, 3)))
                print(what, f"{ours:.2f} {theirs:.2f}, stolen {lost:.1%} {also_lost:.1%}", file=sys.stderr, flush=True)
    finally:
        engine.close()
    write_row(arguments, turns, stolen)


def llama_turn(what: str, gguf: Path, arguments: argparse.Namespace) -> float:
    """Tok/s of llama-bench, which warms up by itself."""
    tokens = ["-p", str(arguments.prompt), "-n", "0"] if what == "prefill" else ["-p", "0", "-n", str(arguments.decode)]
    program = arguments.llama_cpp / "build" / "bin" / "llama-bench"
    command = [str(program), "-m", str(gguf), "-t", str(arguments.threads), *tokens, "-r", "1", "-o", "json"]
    return float(json.loads(_output(command))[0]["avg_ts"])


def write_row(arguments: argparse.Namespace, turns: Pairs, stolen: Pairs) -> None:
    """Append medians, ratios and every turn to the results."""
    numbers: dict[str, Any] = {"turns of ours and llama.cpp Q4_0, tok/s": turns}
    numbers["share of the processor that the host took away"] = stolen
    for what, pairs in turns.items():
        ours, theirs = (statistics.median(speeds) for speeds in zip(*pairs, strict=True))
        numbers |= {f"{what} tok/s": round(ours, 2), f"llama.cpp {what} tok/s": round(theirs, 2)}
        numbers[f"{what} ratio"] = round(statistics.median(mine / other for mine, other in pairs), 3)
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
