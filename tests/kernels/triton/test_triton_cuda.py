"""What needs a GPU: the same checks on the device. `pytest -m cuda`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from test_interpreted import CHECKS, ENGINE, run_checks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("file", [*CHECKS, ENGINE])
def test_on_the_device(file: str) -> None:
    run_checks(file, {"TRITON_INTERPRET": "0"}, "cuda or not cuda")
