"""Progress where stderr is no terminal: a line now and then, or JSON; with rate and remaining time."""

from __future__ import annotations

import json
import time

import pytest

from convert.display import ProgressDisplay, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def steps(progress: ProgressDisplay, clock: list[float]) -> None:
    """100 MB per second for 80 seconds, half of the work; then 200 MB per second."""
    done = 0
    for _ in range(80):
        clock[0] += 1
        done += 100_000_000
        progress("converting", done, 16_000_000_000)
    for _ in range(40):
        clock[0] += 1
        done += 200_000_000
        progress("converting", done, 16_000_000_000)


def test_lines_in_a_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay() as progress:
        progress.note("resuming")
        steps(progress, clock)
    printed = capsys.readouterr()
    assert printed.out == ""
    first, *lines = printed.err.splitlines()
    assert first == "resuming"
    assert len(lines) == 4
    assert lines[0] == "converting: 2.8 GiB of 14.9 GiB (18.8%), 100 MB/s, 2 min left"
    assert "200 MB/s" in lines[3], "the rate of now, not of the whole run"


def test_json(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(as_json=True) as progress:
        progress.note("resuming")
        steps(progress, clock)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == {"note": "resuming"}
    assert len(lines) == 121
    assert lines[40]["bytes"] == 4_000_000_000
    assert lines[40]["bytes_per_s"] == pytest.approx(1e8)
    assert lines[40]["seconds_left"] == pytest.approx(120)
    assert lines[-1]["bytes"] == lines[-1]["total_bytes"]


def test_durations_in_words() -> None:
    assert [duration(s) for s in (40, 99, 720, 11100)] == ["40 s", "99 s", "12 min", "3 h 05 min"]
