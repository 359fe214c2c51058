"""huggingface_hub's real client against a server that misbehaves: the right bytes, or a clear line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import digests
from hub_server import COMMIT, FAULTS, REPO, Hub
from huggingface_hub import constants

from convert import hub
from convert.hub import Retry
from convert.inspect import inspect
from convert.pipeline import convert
from convert.verify import verify
from offload.errors import CheckpointError, OffloadError

QUICK = Retry(attempts=12, unreached=12, first_delay=0.001, longest_delay=0.01, timeout=0.3, slowest=10_000)


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub_server = Hub(shutil.copytree(checkpoint, tmp_path / "served"))
    # The library reads HF_ENDPOINT when it is imported; here it is imported already.
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    template = hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hub, "RETRY", QUICK)
    yield hub_server
    hub_server.shutdown()
    hub_server.server_close()


@pytest.fixture(scope="module")
def local(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("local") / "s"
    convert(checkpoint, out)
    return data_digests(out)


def data_digests(store: Path) -> dict[str, str]:
    """All files but the manifests, which name the source."""
    return {name: digest for name, digest in digests(store).items() if not name.startswith("expertpager.json")}


def fails(match: str, out: Path, source: str = REPO, **options: Any) -> None:
    with pytest.raises(OffloadError, match=match) as caught:
        convert(source, out, **options)
    assert "\n" not in str(caught.value)
    assert not (out / "expertpager.json").exists()


def test_the_store_is_that_of_the_local_folder(server: Hub, tmp_path: Path, local: dict[str, str]) -> None:
    report = convert(REPO, tmp_path / "s")
    assert data_digests(tmp_path / "s") == local
    assert report.to_dict()["source"] == {"name": REPO, "revision": COMMIT}
    total = sum(p.stat().st_size for p in server.folder.glob("*.safetensors"))
    assert server.served < 1.2 * total, "only the ranges that are needed"


def test_hundreds_of_faults(server: Hub, tmp_path: Path, local: dict[str, str]) -> None:
    server.fault_rate = 0.5
    convert(REPO, tmp_path / "s")
    assert data_digests(tmp_path / "s") == local
    assert len(server.faults) > 100
    assert set(server.faults) == set(FAULTS)


def test_dry_run_and_inspect_read_headers_only(server: Hub, tmp_path: Path) -> None:
    lines = convert(REPO, tmp_path / "s", dry_run=True).lines()
    assert any(COMMIT in line for line in lines)
    assert inspect(REPO).kind == "checkpoint"
    shards = [name for name in server.requests if name.endswith(".safetensors") and name.startswith("/cdn")]
    assert len(shards) == 2 * 3, "one request per shard and command"
    assert not (tmp_path / "s").exists()


def test_repair_from_the_hub(server: Hub, tmp_path: Path) -> None:
    convert(REPO, tmp_path / "s")
    before = digests(tmp_path / "s")
    path = tmp_path / "s" / "model-layer-00001-experts.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    server.served = 0
    assert not verify(tmp_path / "s").ok
    assert verify(tmp_path / "s", repair=True).ok
    assert digests(tmp_path / "s") == before
    headers = 3 * (128 << 10)
    assert server.served < headers + 200_000, "one expert, not the checkpoint"


def test_a_server_that_stays_broken(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "RETRY", Retry(attempts=3, first_delay=0.001, timeout=0.3))
    server.fault_rate, server.kinds = 1.0, ("503",)
    fails("file list of .* someone/tiny-v3 .*: HTTP status 503.*3 attempts.*again later", tmp_path / "s")
    for kind in ("timeout", "long body", "other range", "whole file", "empty"):
        server.kinds = (kind,)
        fails("3 attempts", tmp_path / "s")
    monkeypatch.setattr(hub, "RETRY", Retry(attempts=3, first_delay=0.001, timeout=0.3, slowest=10_000))
    server.kinds = ("slow drip",)
    fails("less than 10000 bytes per second.*3 attempts", tmp_path / "s")


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a network the first question is asked three times, not eight."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(hub, "RETRY", Retry(first_delay=0.001))
        fails("file list of .*ConnectError.*3 attempts", tmp_path / "s")


def test_a_fault_in_the_middle_keeps_what_is_done(server: Hub, tmp_path: Path, local: dict[str, str]) -> None:
    class Break:
        calls = 0

        def __call__(self, label: str, done: int, total: int) -> None:
            self.calls += 1
            if self.calls == 8:
                server.fault_rate, server.kinds = 1.0, ("500",)

        def note(self, line: str) -> None:
            return

    fails("HTTP status 500", tmp_path / "s", progress=Break(), workers=1)
    server.fault_rate = 0.0
    report = convert(REPO, tmp_path / "s")
    assert report.to_dict()["experts_resumed"] > 0
    assert data_digests(tmp_path / "s") == local


@pytest.mark.parametrize("change", ["etag", "size"])
def test_a_file_that_changes_in_mid_run_is_refused(server: Hub, tmp_path: Path, change: str) -> None:
    class Change:
        calls = 0

        def __call__(self, label: str, done: int, total: int) -> None:
            self.calls += 1
            if self.calls == 8 and change == "etag":
                server.etag_suffix = "new"
            elif self.calls == 8:
                for path in server.folder.glob("*.safetensors"):
                    path.write_bytes(path.read_bytes() + b"\0")

        def note(self, line: str) -> None:
            return

    fails("changed on the server", tmp_path / "s", progress=Change(), workers=1)


def test_what_is_not_there(server: Hub, tmp_path: Path) -> None:
    fails(f"no such repository on {server.url}", tmp_path / "s", "someone/else")
    fails("has no revision 'v9'", tmp_path / "s", revision="v9")
    fails("neither a folder nor", tmp_path / "s", "not/a/repo")
    (next(server.folder.glob("*.safetensors"))).unlink()
    fails("lacks 1 of 3 shards", tmp_path / "s")
    server.token = "hf_secret"
    fails("log in", tmp_path / "s")


def test_another_commit_does_not_continue(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hub_server

    class Stop:
        def __call__(self, label: str, done: int, total: int) -> None:
            raise KeyboardInterrupt

        def note(self, line: str) -> None:
            return

    with pytest.raises(KeyboardInterrupt):
        convert(REPO, tmp_path / "s", progress=Stop())
    monkeypatch.setattr(hub_server, "COMMIT", "f" * 40)
    fails(f"source revision {COMMIT}, now it is {'f' * 40}", tmp_path / "s")


def test_environment_of_the_hub_is_honoured(server: Hub, tmp_path: Path, local: dict[str, str]) -> None:
    """A mirror and a token from the environment, as the command line meets them."""
    server.token = "hf_of_a_test"
    script = f"from convert.pipeline import convert; convert({REPO!r}, {str(tmp_path / 's')!r})"
    env = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": server.token,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert data_digests(tmp_path / "s") == local
    assert not list((tmp_path / "home").rglob("*.safetensors")), "nothing of the source is stored"


def test_a_proxy_of_the_environment_is_used(server: Hub, tmp_path: Path, local: dict[str, str]) -> None:
    script = f"from convert.pipeline import convert; convert({REPO!r}, {str(tmp_path / 's')!r})"
    env = os.environ | {
        "HF_ENDPOINT": "http://mirror.invalid",
        "HTTP_PROXY": server.url,
        "http_proxy": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert server.proxied == len(server.requests)
    assert data_digests(tmp_path / "s") == local


def test_an_interrupted_run_does_not_wait_for_a_broken_server(server: Hub, tmp_path: Path) -> None:
    """A minute until the next attempt would be no answer to Ctrl-C."""
    server.kinds, server.retry_after = ("503",), "60"
    process, err = interrupted(server, tmp_path, signals=1)
    assert process.returncode == 130
    assert re.search(r"interrupted: \d+ of 16 experts are finished and kept; the same command goes on", err)
    assert "Traceback" not in err


def test_a_second_ctrl_c_ends_at_once(server: Hub, tmp_path: Path, local: dict[str, str]) -> None:
    server.kinds = ("hang",)
    process, _ = interrupted(server, tmp_path, signals=2)
    assert process.returncode == -signal.SIGINT
    server.fault_rate = 0.0
    convert(REPO, tmp_path / "s")
    assert data_digests(tmp_path / "s") == local


def interrupted(server: Hub, tmp_path: Path, signals: int) -> tuple[subprocess.Popen[str], str]:
    """A command that met a fault in mid-run and then Ctrl-C so many times; and what it wrote to stderr."""
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "cli", "convert", REPO, "-o", str(tmp_path / "s"), "--workers", "1"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "s").exists():
            time.sleep(0.01)
        server.fault_rate = 1.0
        while not server.faults:
            time.sleep(0.01)
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(1)
        _, err = process.communicate(timeout=20)
    return process, err


def test_what_a_server_asks_for_is_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    assert hub._retry_after("7") == 7.0
    assert hub._retry_after("Sun, 09 Sep 2001 01:46:45 GMT") == 5.0
    assert hub._retry_after("Sun, 09 Sep 2001 01:46:00 GMT") == 0.0
    assert hub._retry_after("soon") is None
    assert hub._retry_after(None) is None


def test_retries_end(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hub.HubSource(REPO, retry=Retry(attempts=4, first_delay=0.0))
    calls = []

    def broken() -> None:
        calls.append(1)
        raise hub._Fault("down")

    with pytest.raises(CheckpointError, match="down"):
        source._patiently("x", broken)
    assert len(calls) == 4
