"""The table of measured figures in README.md, out of the newest recorded rows: `python benchmarks/measured.py`.

Owns the choice of figures and their wording. A test compares the table with the rows, so README cannot say what was not
recorded. Every line ends with the load of the machine while it was recorded: on two shared cores that matters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"

Row = dict[str, Any]


def rows(name: str) -> list[Row]:
    """All rows of one results file, oldest first; none of one that does not exist."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def newest(name: str, fits: Callable[[Row], bool] = lambda row: True) -> Row:
    """The last row of the file that fits. Raises IndexError without one."""
    return [row for row in rows(name) if fits(row)][-1]


def table() -> str:
    """The table in Markdown."""
    head = "| what | measured | load |\n|---|---|---|\n"
    return head + "".join(f"| {what} | {figure} | {load} |\n" for what, figure, load in _lines())


def _lines() -> Iterator[tuple[str, str, str]]:
    """(what, figure, load average or a dash where no time was measured)."""
    yield from _decode()
    yield from _kernels()
    yield from _paging()
    yield from _convert()
    yield from _policies()
    yield from _tuning()
    yield from _gpu()
    yield from _routing()


def _decode() -> Iterator[tuple[str, str, str]]:
    row = newest("decode")
    n = row["numbers"]
    yield (
        "10B model in RAM, decode, beside llama.cpp Q4_0",
        f"{n['decode tok/s']} : {n['llama.cpp decode tok/s']} tok/s = {n['decode ratio']}",
        _load(row),
    )
    yield (
        "the same, prefill of 512 tokens",
        f"{n['prefill tok/s']} : {n['llama.cpp prefill tok/s']} tok/s = {n['prefill ratio']}",
        _load(row),
    )


def _kernels() -> Iterator[tuple[str, str, str]]:
    """Shares of the read bandwidth with one row, of turns that nothing disturbed where there were such."""
    row = newest("kernels", lambda row: "--patience" in row["command"])
    for threads in sorted({item["threads"] for item in row["results"]}):
        shares: dict[str, list[str]] = {}
        for item in row["results"]:
            if item["threads"] == threads and item["kernel"] in ("native int4-g32", "native int8-g128"):
                share = item.get("alone", item)["share_of_read"]
                shares.setdefault(item["kernel"].removeprefix("native "), []).append(f"{share:.2f}")
        sizes = "2048x7168, 7168x2048, 1024x2048"
        figure = "; ".join(f"{codec} {', '.join(found)}" for codec, found in shares.items())
        what = f"products of one row beside plain reads, {threads} thread{'s' * (threads > 1)} ({sizes})"
        yield what, figure, f"{row['machine']['load']:.1f}"


def _paging() -> Iterator[tuple[str, str, str]]:
    for share in (0.57, 0.3):

        def beside_llama(row: Row, share: float = share) -> bool:
            return row["numbers"]["share"] == share and "times llama.cpp" in row["numbers"]

        row = newest("paging", beside_llama)
        n = row["numbers"]
        yield (
            f"memory limit of {share:.0%} of the store, decode, beside llama.cpp's mmap",
            f"{n['decode tok/s']:.2f} : {n['llama.cpp mmap tok/s']:.3f} tok/s = {n['times llama.cpp']:.1f} times; "
            f"peak RAM {n['peak RAM / --ram']:.0%} of `--ram`",
            _load(row),
        )
        yield (
            "the same, drive while it reads, beside the same bytes read by a process that does nothing else",
            _drive(n),
            _load(row),
        )
    row = newest("paging", lambda row: "--slots" in row["command"] and "--shape" not in row["command"])
    n = row["numbers"]
    yield f"the drive with {n['runs'][0]['slots']} expert slots, below one token's working set", _drive(n), _load(row)
    for row in [row for row in rows("paging") if "--shape v3" in row["command"]][-1:]:
        n = row["numbers"]
        slots = f"{n['runs'][0]['slots']} of 192"
        yield f"the drive while it reads experts of DeepSeek-V3's size, slots for {slots}", _drive(n), _load(row)


def _drive(n: Row) -> str:
    read, alone = n["read MB/s while reading"] / 1e3, n["drive MB/s alone"] / 1e3
    return f"{read:.2f} : {alone:.2f} GB/s = {n['share of the drive while reading']:.2f}"


def _convert() -> Iterator[tuple[str, str, str]]:
    for scales in ("rtn", "ls"):
        found = [r for r in rows("convert") if r["numbers"].get("scales") == scales and "cpu_s" in r["numbers"]]
        for row in found[-1:]:
            n = row["numbers"]
            yield (
                f"conversion of {n['experts']} experts of DeepSeek-V3's shapes, `{scales}`",
                f"{n['source_MB_per_core_s']:.0f} MB of FP8 per second of a core; "
                f"peak {n['peak_rss_bytes'] / 1e9:.2f} GB",
                _load(row),
            )
    beside = [row for row in rows("convert") if "times_faster" in row["numbers"]]
    whole = [row for row in beside if row["numbers"]["layers"] is None]
    for row in [row for row in beside if row not in whole][-1:] + whole[-1:]:
        n = row["numbers"]
        part = f"'s first {n['layers']} layers in RAM" if n["layers"] else " from and to the drive"
        share = f" ({n['ours_rtn']['share_of_read_plus_write_limit']:.0%} of what the drive allows)"
        yield (
            f"conversion of the 10B model{part}, beside llama.cpp's two steps",
            f"{n['times_faster']:.1f} times as fast with `ls`, {n['times_faster_rtn']:.1f} times with `rtn`"
            + ("" if n["layers"] else share),
            _load(row),
        )
    for row in [row for row in rows("convert") if "1 at a time" in row["numbers"]][-1:]:
        alone, shared = row["numbers"]["1 at a time"], row["numbers"]["3 at a time"]
        same = "the files of an undisturbed run" if alone["identical"] and shared["identical"] else "other files"
        yield (
            "conversions ended by SIGKILL at random instants and begun again",
            f"{alone['kills']} kills alone, {shared['kills']} with three processes at one store: {same}",
            "-",
        )


def _policies() -> Iterator[tuple[str, str, str]]:
    found = [row for row in rows("policies") if row["benchmark"] == "policies"]
    command = found[-1]["command"]
    learned = [row for row in found if row["command"] == command and row["policy"] == "ema+tokens, learned"]
    shares = sorted({row["share"] for row in learned})
    means = [_mean([row["gap_closed"] for row in learned if row["share"] == share]) for share in shares]
    yield (
        "gap from per-layer LRU to Belady closed by `ema+tokens`, routing of DeepSeek-V2-Lite",
        ", ".join(f"{mean:.0%} at {share:.0%} of slots" for share, mean in zip(shares, means, strict=True)),
        "-",
    )
    cost = newest("policies", lambda row: row["benchmark"] == "decision cost" and row["policy"] == "ema+tokens")
    least, *_, most = cost["us_per_layer_by_run"]
    yield (
        f"what `ema+tokens` decides per layer and token, {cost['experts']} experts, top-{cost['top_k']}",
        f"{cost['us_per_layer_median']} µs (runs: {least} to {most})",
        "-",
    )


def _tuning() -> Iterator[tuple[str, str, str]]:
    for row in [row for row in rows("plan_grid") if "cells" in row["numbers"]][-1:]:
        n = row["numbers"]
        figures = (
            f"{what} {_spread(n, what)}; within 15%: {n[f'{what} within 15%']})" for what in ("decode", "prefill")
        )
        yield "speed foretold over speed measured, 10B stores, RAM budgets and policies", ", ".join(figures), _load(row)
    for row in rows("tune")[-1:]:
        n = row["numbers"]
        yield (
            "tuned from a wrong profile, beside the best of an exhaustive sweep",
            f"{n['before tok/s']} before, {n['tuned again tok/s']} : {n['best of sweep tok/s']} tok/s = "
            f"{n['tuned / best']}",
            _load(row),
        )
    for row in rows("probe_reference")[-1:]:
        n = row["numbers"]
        ratios = {link: [item["ratio"] for item in n[link].values()] for link in ("drive by fio", "drive", "RAM")}
        text = ", ".join(f"{link} {min(found)} to {max(found)}" for link, found in ratios.items())
        for what, found in [(key, values["1"]["ratio"]) for key, values in n.items() if "one buffer" in key]:
            text += f" ({what}, 1 thread: {found})"
        yield "figures of `probe` over those of fio and of read loops in C", text, _load(row)


def _spread(n: Row, what: str) -> str:
    """Median and range of the ratios of a grid, the bracket left open."""
    least, largest = n[f"{what} range"]
    return f"{n[f'{what} median']} ({least} to {largest}"


def _gpu() -> Iterator[tuple[str, str, str]]:
    speeds = [row for row in rows("gpu_speed") if "8 experts fp8, 1 token" in _speeds(row)]  # others have some formats
    for row in speeds[-1:]:
        n, kernels = row["numbers"], _speeds(row)
        memory = f"{n['device']}, {n['read'] / 1e12:.1f} TB/s"
        eight = {codec: kernels[f"8 experts {codec}, 1 token"] for codec in ("int4-g32", "int8-g128", "fp8")}
        shares = (f"{codec} {item['us']:.0f} µs = {item['share_of_read']:.2f}" for codec, item in eight.items())
        yield f"eight experts of DeepSeek-V3's shapes for a token, beside the memory ({memory})", ", ".join(shares), "-"
        names = {"head": "head bf16", "`o_proj`": "o int8-g128", "`q_b_proj`": "q_b int8-g128"}
        shares = (f"{name} {kernels[f'{key}, 1 token']['share_of_read']:.2f}" for name, key in names.items())
        yield "the same, resident weights", ", ".join(shares), "-"
    yield from _gpu_runs()
    steps = [row for row in rows("gpu") if "decode" in row["numbers"]]
    for row in [row for row in steps if row["numbers"]["plan"]["slots"] < row["numbers"]["plan"]["experts"]][-1:]:
        n = row["numbers"]
        yield (
            f"copies of experts while decoding, beside copies alone ({n['device']})",
            f"{n['copies']['bytes_per_s'] / 1e9:.1f} : {n['link'] / 1e9:.1f} GB/s = {n['copies']['share_of_link']:.2f}",
            "-",
        )
    deepest = max(row["numbers"]["plan"]["layers"] for row in steps)
    for row in [row for row in steps if row["numbers"]["plan"]["layers"] == deepest]:
        n = row["numbers"]
        name = f"{n['device'].split(' (')[0]}, {row['command'].split('gpu.py ')[1]}"
        share = n["plan"]["slots"] / n["plan"]["experts"]
        ratios = ", ".join(
            f"{item['step_over_bound']:.2f} at {item['planted_hits']:.0%} hits ({1e3 * item['step_s']:.1f} ms)"
            for item in n["decode"]
        )
        yield f"a step over max(link, device) ({name})", ratios, "-"
        if n["prefill"]["sweep_bound_s"]:
            figure = f"{1e3 * n['prefill']['seconds']:.0f} : {1e3 * n['prefill']['sweep_bound_s']:.0f} ms"
            what = f"a prompt of {n['prefill']['tokens']} tokens, slots for {share:.0%} of the experts, over its copies"
            yield f"{what} ({name})", f"{figure} = {n['prefill']['over_bound']:.2f}", "-"
    for row in [row for row in rows("gpu") if "step_s" in row["numbers"]][-1:]:
        n, settings = row["numbers"], row["command"].split(" --baselines")[0]
        beside = [step for step in steps if (step["command"], step["commit"]) == (settings, row["commit"])]
        ours = [step["numbers"] for step in beside]
        nothing = ours[-1]["decode"][0]
        figure = f"{n['step_s']:.2f} : {nothing['step_s']:.4f} s = {n['step_s'] / nothing['step_s']:.0f}"
        name = f"{ours[-1]['device'].split(' (')[0]}, {settings.split('gpu.py ')[1]}"
        yield f"a step of {n['baseline']}, over ours in int4 with nothing in VRAM ({name})", figure, "-"
    for row in [row for row in rows("gpu") if "kt_over_ours" in row["numbers"]][-1:]:
        n, ours = row["numbers"], row["numbers"]["ours"]
        yield (
            f"eight experts on the {row['machine']['cores']} cores beside that GPU, {ours['isa'].upper()}: kt-kernel "
            f"{n['version']} ({n['method']}) beside ours ({ours['format']})",
            f"{1e3 * n['layer_s']:.2f} : {1e3 * ours['layer_s']:.2f} ms = {n['kt_over_ours']:.2f}",
            "-",
        )


def _gpu_runs() -> Iterator[tuple[str, str, str]]:
    for row in [row for row in rows("gpu_bench") if "runs" in row["numbers"]][-1:]:
        n = row["numbers"]
        figures = (f"{what} {_spread(n, what)})" for what in ("decode", "prefill"))
        yield "speed foretold over speed measured on a GPU (NVIDIA H200, three MoE layers)", ", ".join(figures), "-"
    for row in rows("gpu_bench"):
        before = _first_prompts(row, "before kernels were run at load")
        after = _first_prompts(row, "none compiled before")
        if before and after:
            text = f"{before['512'][0]:.0f} ms before kernels were run at load, {after['512'][0]:.0f} now, later ones"
            yield "first prompt of 512 tokens on a new installation (NVIDIA H200)", f"{text} {after['512'][1]:.0f}", "-"


def _first_prompts(row: Row, key: str) -> dict[str, list[float]]:
    """Milliseconds of the first and the second prompt by length; empty where the row has none."""
    return next((values for name, values in row["numbers"].items() if key in name), {})


def _speeds(row: Row) -> Row:
    return {item["kernel"]: item for item in row["numbers"]["kernels"]}


def _routing() -> Iterator[tuple[str, str, str]]:
    def runs(balance: str) -> list[Row]:
        return [row["numbers"] for row in rows("balancing") if row["numbers"]["balance"] == balance]

    def mean(balance: str, key: str) -> float:
        return _mean([numbers[key] for numbers in runs(balance)])

    yield (
        "balancing by bias, MaxVio on held-out text",
        f"{mean('bias', 'max_vio_held_out'):.2f}, {mean('none', 'max_vio_held_out'):.2f} without; loss "
        f"{mean('bias', 'held_out_loss'):.3f}, {mean('aux', 'held_out_loss'):.3f} with an auxiliary loss",
        "-",
    )
    means = {row["numbers"]["experts"]: row["numbers"]["mean"]["perplexity"] for row in rows("embedded_perplexity")}
    yield (
        "perplexity of the embedded model by experts' codec",
        ", ".join(f"{codec} {value:.2f}" for codec, value in means.items()),
        "-",
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _load(row: Row) -> str:
    return f"{row['numbers']['load_average']:.1f}"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}{table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
