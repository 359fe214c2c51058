"""Moments that Ctrl-C does not break: it is raised behind them, once, and whoever listened before listens again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from offload.interrupts import uninterrupted

NUMBERS = [signal.SIGINT, signal.SIGTERM]


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


@pytest.fixture(params=NUMBERS, ids=lambda number: number.name)
def number(request: pytest.FixtureRequest):
    former = {each: signal.signal(each, interrupt) for each in NUMBERS}
    yield request.param
    for each, handler in former.items():
        signal.signal(each, handler)


def test_an_interrupt_waits_for_the_end(number: signal.Signals) -> None:
    done = []

    def moment() -> None:
        with uninterrupted():
            os.kill(os.getpid(), number)
            done.append("all of it")
        done.append("nothing behind it")

    with pytest.raises(KeyboardInterrupt) as raised:
        moment()
    assert done == ["all of it"] and raised.value.args == (number,)
    assert [signal.getsignal(each) for each in NUMBERS] == [interrupt, interrupt]


def test_without_one_nothing_changes_and_faults_pass(number: signal.Signals) -> None:
    with pytest.raises(ZeroDivisionError), uninterrupted():
        _ = 1 / 0
    assert [signal.getsignal(each) for each in NUMBERS] == [interrupt, interrupt]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_other_threads_may_ask_for_such_moments(number: signal.Signals) -> None:
    def moment() -> str:
        with uninterrupted():
            return threading.current_thread().name

    with ThreadPoolExecutor(1, "other") as pool:
        assert pool.submit(moment).result().startswith("other")


def test_a_pool_survives_interrupts_at_any_moment(number: signal.Signals) -> None:
    """Signals of another process, among thousands of submissions; a lock left behind would end in waiting for ever."""
    caught = 0
    code = f"import os, time\nfor _ in range(200):\n    time.sleep(0.001)\n    os.kill({os.getpid()}, {int(number)})"
    with ThreadPoolExecutor(2) as pool:
        with uninterrupted():
            other = subprocess.Popen([sys.executable, "-c", code])
        ended = False
        while not ended:
            try:
                while not ended:
                    with uninterrupted():
                        assert pool.submit(int, "7").result(timeout=20) == 7
                        ended = other.poll() is not None
            except KeyboardInterrupt:
                caught += 1
        assert caught > 0
        with uninterrupted():
            assert pool.submit(int, "8").result(timeout=20) == 8
