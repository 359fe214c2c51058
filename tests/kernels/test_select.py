"""Choosing a backend: explicit, and announced when it is not the best one."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch

from offload.errors import KernelError, UsageError
from offload.kernels import select
from offload.kernels.reference import ReferenceKernels


def _stand_in(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    class NativeKernels(ReferenceKernels):
        name = "native"

        def __init__(self, threads: int | None = None) -> None:
            self.threads = threads

    library = ModuleType("offload.kernels.native_library")
    library.available = lambda: reason  # type: ignore[attr-defined]
    module = ModuleType("offload.kernels.native")
    module.NativeKernels = NativeKernels  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "offload.kernels.native_library", library)
    monkeypatch.setitem(sys.modules, "offload.kernels.native", module)


def test_auto_takes_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch, None)
    chosen = select("auto", 3)
    assert (chosen.name, chosen.threads) == ("native", 3)  # type: ignore[attr-defined]
    assert select("reference").name == "reference"


def test_auto_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    _stand_in(monkeypatch, "no compiler found")
    with caplog.at_level(logging.WARNING, "expertpager"):
        assert select("auto").name == "reference"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "no compiler found" in caplog.text


def test_native_is_never_replaced_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch, "no compiler found")
    with pytest.raises(KernelError, match="no compiler found"):
        select("native")


def test_unknown_backend() -> None:
    with pytest.raises(UsageError, match=r"'cuda'.*auto, native, reference"):
        select("cuda")


def test_torch_gets_one_thread() -> None:
    torch.set_num_threads(2)
    select("reference", 2)
    assert torch.get_num_threads() == 1
