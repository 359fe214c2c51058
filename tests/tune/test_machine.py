"""Machine files: what they mean, and that nothing malformed passes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from offload.errors import UsageError
from offload.tune.machine import GPU_DECIDE_S, GPU_TOKEN_S, KERNEL_SHARE, FormatRate, MachineSpec, mean
from offload.tune.machine_file import FOLDER, SYSTEM_NBYTES, load_machine, parse_machine

GOOD = """name = "a"
[ram]
total = "64GiB"
read = "50GB"
[ram.threads]
1 = "20GB"
[drive]
read = "7GB"
latency_us = 80
[drive.depths]
8 = "6GB"
[cpu]
threads = 8
gflops = 500.5
[cpu.formats.int4-g32]
read = "40GB"
gflops = 400
[gpu]
name = "card"
vram = "24GiB"
read = "1000GB"
h2d = "25GB"
layer_us = 90
attention_gflops = 40000
[gpu.experts.int4-g32]
read = "600GB"
gflops = 30000
[gpu.resident.int8-g128]
read = "500GB"
gflops = 60000
[network]
download = "100MB"
[engine]
layer_us = 250
"""


def test_values() -> None:
    machine = parse_machine(GOOD, "f")
    assert (machine.ram_total, machine.ram_available) == (64 << 30, (64 << 30) - SYSTEM_NBYTES)
    assert (machine.ram_read, machine.drive_read, machine.drive_latency_s) == (50e9, 7e9, pytest.approx(8e-5))
    assert machine.ram_threads == {"1": 20e9} and machine.depths == {"8": 6e9}
    assert machine.format_rate("int4-g32").read == 40e9 and machine.format_rate("int4-g32").gflops == 400
    assert machine.format_rate("fp8").read == KERNEL_SHARE * 50e9 and machine.format_rate("fp8").gflops == 500.5
    gpu = machine.gpu
    assert gpu is not None and gpu.vram == 24 << 30 and gpu.layer_s == pytest.approx(9e-5)
    assert (gpu.token_s, gpu.decide_s, gpu.attention_gflops) == (None, GPU_DECIDE_S, 40000)
    assert gpu.token_time(0) == GPU_TOKEN_S < gpu.token_time(129280)
    assert replace(gpu, token_s=5e-3).token_time(129280) == 5e-3
    assert gpu.experts == {"int4-g32": FormatRate(600e9, 30000)} == {"int4-g32": gpu.expert_rate("int4-g32")}
    assert gpu.resident == {"int8-g128": FormatRate(500e9, 60000)}
    assert machine.download == 100_000_000 and machine.layer_s == pytest.approx(2.5e-4)


def test_drive_rate_by_reads_under_way() -> None:
    machine = replace(parse_machine(GOOD, "f"), depths={"1": 2e9, "4": 5e9, "8": 6.5e9, "32": 9e9})
    assert [machine.drive_rate(n) for n in (0.5, 1, 2.5, 4, 6)] == pytest.approx([2e9, 2e9, 3.5e9, 5e9, 6e9])
    assert machine.drive_rate(8) == machine.drive_rate(100) == 7e9
    assert replace(machine, depths={}).drive_rate(1) == 7e9


@pytest.mark.parametrize(
    ("old", "new", "line", "key"),
    [
        ('read = "50GB"', 'read = "fast"', 4, "ram.read"),
        ('read = "50GB"', "read = -1", 4, "ram.read"),
        ('read = "50GB"', "read = 1.5", 4, "ram.read"),
        ('read = "50GB"', "raed = 5", 4, "ram.raed"),
        ('1 = "20GB"', 'one = "20GB"', 6, "ram.threads.one"),
        ('1 = "20GB"', "1 = true", 6, "ram.threads.1"),
        ("threads = 8", "threads = 8.5", 13, "cpu.threads"),
        ("threads = 8", "threads = true", 13, "cpu.threads"),
        ("gflops = 500.5", "gflops = 0", 14, "cpu.gflops"),
        ("gflops = 500.5", "gflops = nan", 14, "cpu.gflops"),
        ("gflops = 400", 'gflops = "many"', 17, "cpu.formats.int4-g32.gflops"),
        ("gflops = 400", "", 15, "cpu.formats.int4-g32"),
        ("gflops = 400", 'gflops = 400\nattention = "slow"', 18, "cpu.formats.int4-g32.attention"),
        ("gflops = 400", "gflops = 400\ngflops_many = 0", 18, "cpu.formats.int4-g32.gflops_many"),
        ("gflops = 400", "gflops = 400\nother = 1", 15, "cpu.formats.int4-g32"),
        ("[gpu]", "[gppu]", 18, "gppu"),
        ('h2d = "25GB"', "", 18, "gpu"),
        ("layer_us = 90", "layer_us = 0", 23, "gpu.layer_us"),
        ("layer_us = 90", 'decide_token_us = "long"', 23, "gpu.decide_token_us"),
        ("layer_us = 90", "layer_s = 90", 23, "gpu.layer_s"),
        ("attention_gflops = 40000", "attention_gflops = true", 24, "gpu.attention_gflops"),
        ("gpu.experts.int4-g32", "gpu.experts.int4-g23", 25, "gpu.experts.int4-g23"),
        ("gflops = 30000", "", 25, "gpu.experts.int4-g32"),
        ("gflops = 30000", "gflops = 30000\nattention = 1", 25, "gpu.experts.int4-g32"),
        ('read = "500GB"', 'read = "quick"', 29, "gpu.resident.int8-g128.read"),
        ("gflops = 60000", "gflops = -1", 30, "gpu.resident.int8-g128.gflops"),
        ('[gpu.resident.int8-g128]\nread = "500GB"\ngflops = 60000', "[gpu.resident]\nfp8 = 3", 29, "gpu.resident.fp8"),
        ('[gpu.resident.int8-g128]\nread = "500GB"\ngflops = 60000', "[gpu.other]", 28, "gpu.other"),
        ('name = "a"', "name = 3", 1, "name"),
        ('name = "a"', 'name = "a"\nwarnings = [1]', 2, "warnings"),
        ("latency_us = 80", "latency_us = inf", 9, "drive.latency_us"),
        ("latency_us = 80", "beside_kernels = 1.5", 9, "drive.beside_kernels"),
        ("threads = 8", "threads = 8\nbeside_drive = 0", 14, "cpu.beside_drive"),
        ('total = "64GiB"', 'total = "64GiB"\navailable = "65GiB"', 4, "ram.available"),
        ("[engine]\nlayer_us = 250", "engine.layer_us = 'x'", 33, "network.engine"),
        ("layer_us = 250", "layer_us = 250\nprompt_token_us = -1", 35, "engine.prompt_token_us"),
        ("layer_us = 250", "layer_us = 250\nplain = 3", 35, "engine.plain"),
        ("layer_us = 250", "layer_us = 250\n[engine.plain]\nlayer_s = 1", 36, "engine.plain.layer_s"),
        ("layer_us = 250", "layer_us = 250\n[engine.plain]\nmiss_us = 0", 36, "engine.plain.miss_us"),
        ('read = "50GB"', f'read = "{"9" * 400}GB"', 4, "ram.read"),
        ('read = "50GB"', f"read = 1{'0' * 400}", 4, "ram.read"),
        ('read = "50GB"', 'read = "9EB"', 4, "ram.read"),
        ('read = "50GB"', 'read = "9000000TiB"', 4, "ram.read"),
        ("gflops = 500.5", "gflops = 1e-308", 14, "cpu.gflops"),
        ('1 = "20GB"', '1 = "20GB"\n01 = "20GB"', 7, "ram.threads.01"),
        ('1 = "20GB"', f'{"9" * 5000} = "20GB"', 6, "ram.threads." + "9" * 5000),
        ("int4-g32]", "int4-g23]", 15, "cpu.formats.int4-g23"),
        ("[drive]", "[[drive]]", 7, "drive"),
        ("[network]", "[[network]]", 31, "network"),
        # Lines are not looked for in comments and texts; an inline table stands for its keys.
        ('name = "a"', 'name = """\n[ram]\nread = "1GB"\n"""\nnaem = 1', 5, "naem"),
        ('total = "64GiB"\nread = "50GB"', "# read = 5\nread = -1 # total = 3", 4, "ram.read"),
        ('[network]\ndownload = "100MB"', "[other]\n[network]\ndownload = 0", 31, "other"),
    ],
)
def test_malformed_is_refused_by_line_and_key(old: str, new: str, line: int, key: str) -> None:
    assert GOOD.count(old) >= 1
    with pytest.raises(UsageError, match=rf"^f, line {line}: key {re.escape(key)} "):
        parse_machine(GOOD.replace(old, new, 1), "f")


def test_keys_of_inline_tables_are_found() -> None:
    with pytest.raises(UsageError, match=r"^f, line 2: key ram.read is -1"):
        parse_machine('name = "a"\nram = { total = "64GiB", read = -1 }\n', "f")


def test_not_toml_for_other_reasons() -> None:
    with pytest.raises(UsageError, match="f is not TOML: .*recursion"):
        parse_machine(f"warnings = {'[' * 5000}{']' * 5000}", "f")
    with pytest.raises(UsageError, match="f is not TOML: .*5000 digits"):
        parse_machine(f"name = {'9' * 5000}", "f")


@pytest.mark.parametrize("key", ["name", "ram.total", "ram.read", "drive.read", "cpu.threads", "cpu.gflops"])
def test_missing_keys_are_named(key: str) -> None:
    section, _, name = key.rpartition(".")
    lines, table = [], ""
    for text in GOOD.splitlines():
        table = text.strip("[]") if text.startswith("[") else table
        if not (table == section and text.startswith(f"{name} =")):
            lines.append(text)
    with pytest.raises(UsageError, match=f"key {key} is missing"):
        parse_machine("\n".join(lines), "f")


def test_not_toml_names_the_line() -> None:
    with pytest.raises(UsageError, match=r"f is not TOML: .*line 3"):
        parse_machine("name = 'a'\n[ram]\ntotal 5\n", "f")


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    for encoding in ("utf-8", "utf-8-sig"):  # some editors begin a file with a byte order mark
        file.write_text(GOOD, encoding=encoding, newline="\r\n")
        assert load_machine(file) == parse_machine(GOOD, "x")
    file.write_text(GOOD, encoding="utf-16")
    with pytest.raises(UsageError, match=r"m\.toml cannot be read: it is no text in UTF-8, from byte 0"):
        load_machine(file)
    with pytest.raises(UsageError, match=r"no machine file nowhere; shipped ones: .*rtx4090-128gb"):
        load_machine("nowhere")
    with pytest.raises(UsageError, match="cannot be read"):
        load_machine(tmp_path)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_files(path: Path) -> None:
    machine = load_machine(path.stem)
    assert machine.gpu is not None and f"{path.stem.split('-')[1][:-2]}" == str(machine.ram_total >> 30)
    assert machine.gpu.name.lower().replace(" ", "").startswith(path.stem.split("-")[0])
    # Every figure says where it comes from.
    for line in path.read_text().splitlines():
        if line.startswith(("read", "h2d", "gflops", "latency", "download", "threads")):
            assert "#" in line, line


def test_the_range_of_machines() -> None:
    machines = [load_machine(path) for path in FOLDER.glob("*.toml")]
    assert {machine.ram_total >> 30 for machine in machines} >= {32, 64, 128, 256}
    assert {machine.gpu.vram >> 30 for machine in machines if machine.gpu} >= {12, 16, 24, 32}


def test_a_mean_of_machines_takes_the_mean_of_their_times() -> None:
    one = MachineSpec(
        "one", 8, 4, ram_read=10.0, drive_read=2.0, threads=2, gflops=60.0, attention_gflops=8.0, layer_s=1e-4
    )
    one = replace(one, depths={"1": 1.0}, ram_threads={"1": 4.0}, formats={"bf16": FormatRate(6.0, 10.0)})
    other = replace(one, name="other", ram_read=30.0, layer_s=3e-4, depths={"1": 3.0}, ram_total=16)
    other = replace(other, formats={"bf16": FormatRate(3.0, 40.0)})
    both = mean([one, other])
    assert (both.name, both.ram_total, both.threads) == ("one", 8, 2)
    assert both.ram_read == pytest.approx(15.0) and both.depths == {"1": pytest.approx(1.5)}
    assert both.layer_s == pytest.approx(2e-4) and both.ram_threads == {"1": pytest.approx(4.0)}
    assert both.formats["bf16"].read == pytest.approx(4.0) and both.formats["bf16"].gflops == pytest.approx(16.0)
    assert both.formats["bf16"].attention is None and both.attention_gflops == pytest.approx(8.0)


def test_a_mean_of_many_leaves_out_what_was_disturbed() -> None:
    one = MachineSpec("one", 8, 4, ram_read=10.0, drive_read=2.0, threads=2, gflops=60.0, miss_s=1e-4)
    one = replace(one, formats={"bf16": FormatRate(6.0, 10.0, gflops_many=20.0)}, prompt_layer_s=1e-3)
    stuck = replace(one, ram_read=0.1, miss_s=5.0, formats={"bf16": FormatRate(0.01, 10.0, gflops_many=0.5)})
    assert mean([one, stuck]).miss_s > 1
    found = mean([one, stuck, one, one, one])
    slow = replace(one, miss_s=1.9e-4)
    assert mean([one, slow, one, one, stuck]).miss_s == pytest.approx((3 * 1e-4 + 1.9e-4) / 4)
    assert (found.ram_read, found.miss_s) == (pytest.approx(10.0), pytest.approx(1e-4))
    assert found.formats["bf16"] == FormatRate(pytest.approx(6.0), pytest.approx(10.0), None, pytest.approx(20.0))
    assert found.prompt_layer_s == pytest.approx(1e-3)
    assert mean([one, replace(one, prompt_layer_s=None)]).prompt_layer_s is None
