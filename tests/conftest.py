"""What many tests share: small checkpoints and stores, built once per process, and Ctrl-C at a chosen line.

Tests mean the processor unless they are marked `cuda`, so a GPU is hidden from all others and from the processes
that they start: without that, `--device auto` would make them tests of the GPU.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import settings

from convert import convert
from convert.synthetic import write_checkpoint

# The same examples everywhere, so that a failure tells of a change. `make test-all` draws new ones each time.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU, which torch has not looked for yet, unless `-m` asks for the tests that need it."""
    if "cuda" not in config.getoption("markexpr").replace("not cuda", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FP8 checkpoint in the official layout, with tokenizer and multi-token-prediction layer."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=7, mtp=True, tokenizer=True, scatter=True)


@pytest.fixture(scope="session")
def bf16_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in BF16, for transformers."""
    return write_checkpoint(tmp_path_factory.mktemp("bf16"), seed=7, quantized=False)


@pytest.fixture(scope="session")
def fp8_store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint passed through without loss."""
    out = tmp_path_factory.mktemp("stores") / "fp8"
    convert(checkpoint, out, experts="fp8")
    return out


@pytest.fixture(scope="session")
def store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in the default recipe."""
    out = tmp_path_factory.mktemp("stores") / "int4"
    convert(checkpoint, out)
    return out


@pytest.fixture
def interrupted() -> Callable[..., bool]:
    """Calls a function with a KeyboardInterrupt before the n-th line of certain modules; False if it ended before.

    The modules are those whose path holds one of the given texts.
    """

    def call(run: Callable[[], object], at: int, *modules: str) -> bool:
        left = at

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if not any(module in frame.f_code.co_filename for module in modules):
                return None
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            # Signals are not looked for there, while the event of such a line may come before a lock is given back.
            if event == "line" and not line.startswith(("with ", "try:")):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            run()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    return call
