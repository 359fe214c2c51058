"""The Triton kernels are compiled to cubin for real architectures without a GPU, in a process of their own."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from test_interpreted import run_checks


def test_decoding_compiles_and_fits() -> None:
    run_checks("compiled_checks.py", {"TRITON_INTERPRET": "0"}, "not slow")


@pytest.mark.slow
def test_everything_compiles_and_fits() -> None:
    run_checks("compiled_checks.py", {"TRITON_INTERPRET": "0"}, "slow")


def test_launches_are_remembered() -> None:
    run_checks("launch_checks.py", {"TRITON_INTERPRET": "0"}, "not slow")
