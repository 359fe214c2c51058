"""The command line as a user meets it: exit codes, one clear line for every fault, JSON last."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cli
from offload.cache.trace import Trace

ROOT = Path(__file__).parent.parent


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=300)


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Calls the entry point in this process; returns the last line on stderr of the fault it must end in."""

    def call(*arguments: object, code: int = 1) -> str:
        monkeypatch.setattr(sys, "argv", ["expertpager", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capfd.readouterr()
        assert end.value.code == code, printed
        assert "Traceback" not in printed.err and "internal fault" not in printed.err, printed.err
        return printed.err.strip().splitlines()[-1]

    yield call
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_help_and_version_answer_without_torch() -> None:
    code = "import sys, cli\ntry: cli.cli.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("convert", "verify", "inspect", "generate", "chat", "demo"):
        assert f"  {command} " in done.stdout


def test_convert_verify_inspect_generate(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = run("convert", checkpoint, "-o", store, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["experts"] == 48
    assert "left out" in done.stderr  # the multi-token-prediction layer
    assert run("verify", store).returncode == 0
    for path in (checkpoint, store):
        facts = json.loads(run("inspect", path, "--json").stdout.splitlines()[-1])
        assert facts["experts"]["count"] == 48 if "experts" in facts else facts

    base = ("generate", store, "--context", 128, "--temperature", 0, "-n", 8)
    streamed = run(*base, "-p", "Hello")
    assert streamed.returncode == 0 and "hit" in streamed.stderr
    result = json.loads(run(*base, "-p", "Hello", "--json").stdout.splitlines()[-1])
    assert result["text"] == streamed.stdout.removesuffix("\n")
    assert result["completion_tokens"] == len(result["token_ids"]) <= 8
    assert run(*base, stdin="Hello").stdout == streamed.stdout
    keys = {
        "finish_reason",
        "ttft_s",
        "prefill_tok_s",
        "decode_tok_s",
        "hits",
        "misses",
        "bytes_read",
        "peak_ram_bytes",
        "peak_vram_bytes",
    }
    assert keys <= result.keys()
    by_ids = json.loads(run(*base, "--prompt-ids", "0,5,7", "--json").stdout.splitlines()[-1])
    assert by_ids["prompt_tokens"] == 3


def test_stores_that_cannot_be_used_are_refused_in_one_line(
    store: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    assert "no such directory" in fails("generate", tmp_path / "absent", "-p", "x")
    assert "not a finished store" in fails("generate", tmp_path, "-p", "x")
    broken = tmp_path / "broken"
    shutil.copytree(store, broken)
    manifest = json.loads((broken / "expertpager.json").read_text())
    (broken / "expertpager.json").write_text(json.dumps(manifest | {"format_version": 99}))
    assert "version 99 was written by a newer version" in fails("generate", broken, "-p", "x")
    shutil.copy(store / "expertpager.json", broken / "expertpager.json")
    layer = next(broken.glob("*-experts.safetensors"))
    layer.write_bytes(layer.read_bytes()[:-10])
    assert layer.name in fails("generate", broken, "-p", "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ram", "100MiB", "-p", "x"], "give --ram"),
        (["--policy", "nope", "-p", "x"], "unknown policy"),
        (["--prompt-ids", "0,5000"], "prompt id 5000"),
        (["-p", "x", "--top-p", "3"], "top_p is 3.0"),
        (["-p", "x", "-n", "0"], "max_tokens is 0"),
        (["-p", "x", "--prompt-file", "y"], "give one of"),
        (["--prompt-file", "absent.txt"], "cannot read the prompt"),
        (["-p", "x", "--context", "99999999"], "positions allow"),
        (["-p", "x", "--profile", "absent.toml"], "absent.toml"),
        (["-p", "x", "--device", "cuda"], "CUDA"),
        (["-p", "x", "--stop", "\udcff"], "stop holds '\\udcff'"),
        (["-p", "\udcff"], "invalid character at position 0"),
        (["-p", "x", "--usage", ""], "usage is ''"),
        (["-p", "x", "--trace", ""], "trace is ''"),
        (["-p", "x", "--trace", "absent/t.npz"], "there is no folder absent"),
        (["-p", "x", "--threads", "100000"], "1 to 1024 threads, not 100000"),
    ],
)
def test_bad_options_give_one_clear_line(
    store: Path, arguments: list[str], message: str, fails: Callable[..., str]
) -> None:
    code = 2 if message == "give one of" else 1
    assert message in fails("generate", store, *arguments, code=code)


def test_what_cannot_be_sampled_is_told_before_a_model_is_loaded(tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "max_tokens is 0" in fails("generate", tmp_path / "absent", "-p", "x", "-n", 0)
    assert "temperature is nan" in fails("chat", tmp_path / "absent", "--temperature", "nan")
    assert "no token ids" in fails("generate", tmp_path / "absent", "--prompt-ids", " , ", code=2)


def test_a_closed_pipe_ends_quietly(store: Path) -> None:
    command = [sys.executable, "-m", "cli", "generate", str(store), "-p", "x", "-n", "100", "--ignore-eos"]
    with subprocess.Popen(
        [*command, "--context", "128"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout and running.stderr
        running.stdout.close()
        told = running.stderr.read()
        assert running.wait(60) == 141
    assert "rror" not in told and "Traceback" not in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_output_on_a_full_disk_is_told_as_such() -> None:
    for arguments in (["--help"], ["simulate", "--help"], ["inspect", "--help"]):
        with open("/dev/full", "wb") as full:
            command = [sys.executable, "-m", "cli", *arguments]
            ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert ended.returncode == 1
        assert ended.stderr == "error: the output cannot be written: [Errno 28] No space left on device\n"


def test_closed_standard_streams(store: Path) -> None:
    command = f"{sys.executable} -m cli generate {store} -n 2 --context 64 --json"
    done = subprocess.run(f"exec {command} <&- 2>&-", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1])["completion_tokens"] == 2


def test_a_fault_after_an_interrupt_is_the_interrupt(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    def half_imported(**_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:  # as some libraries do while they are imported
            pass
        raise AttributeError("module 'numpy' has no attribute 'subtract'")

    monkeypatch.setattr(cli.cli, "main", half_imported)
    assert fails("generate", "store", code=130) == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_ended_keeps_its_trace(number: signal.Signals, store: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.npz"
    command = [sys.executable, "-m", "cli", "generate", str(store), "-p", "x", "--ignore-eos", "-n", "16000"]
    command += ["--context", "16384", "--trace", str(trace)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        begun = process.stdout.read(20)
        process.send_signal(number)
        told = process.stderr.read().decode()
        assert process.wait(60) == 128 + number, told
    assert begun and told.splitlines()[-1] == f"ended by {number.name}" and "Traceback" not in told
    assert Trace.load(trace).experts.shape[0] > 1


def test_bad_sources_give_one_clear_line(checkpoint: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "unknown codec 'int5'" in fails("convert", checkpoint, "-o", tmp_path / "a", "--experts", "int5")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.unlink()
    assert shard.name in fails("convert", broken, "-o", tmp_path / "b")
    assert not (tmp_path / "b" / "expertpager.json").exists()
