"""What `start` remembers, with a stand-in for the driver: kernels are compiled, but what is launched is only noted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from offload.kernels.triton import launch

launched: list[tuple[object, tuple[int, ...], tuple[object, ...]]] = []


class _Noted:
    def __init__(self, src, metadata) -> None:
        self.name = src

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args) -> None:
        launched.append((self.name, (x, y, z, stream), args))


@triton.jit
def add_kernel(a, b, n, factor, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(a + at, tl.load(a + at) + tl.load(b + at) * factor, mask=at < n)


@pytest.fixture(autouse=True)
def through_triton(monkeypatch) -> list[int]:
    """How often triton itself was asked."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 80, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 7,
            launcher_cls=_Noted,
            utils=SimpleNamespace(
                load_binary=lambda *_: (1, 2, 3, 0, 1024),
                get_device_properties=lambda _: {"max_shared_mem": 1 << 17},
            ),
        )
    )
    launched.clear()
    launch._known.clear()
    asked: list[int] = []
    run = add_kernel.run
    monkeypatch.setattr(add_kernel, "run", lambda *args, **options: (asked.append(1), run(*args, **options))[1])
    return asked


def begin(a: torch.Tensor, b: torch.Tensor, n: int, factor: float, grid=(3,), **meta: int) -> tuple[object, ...]:
    launch._start(0, add_kernel, grid, (a, b, n, factor), {"N": 16, "num_warps": 1} | meta)
    return launched[-1]


def test_a_launch_that_is_known_is_that_of_triton(through_triton) -> None:
    a, b = torch.zeros(16), torch.zeros(16)
    first = begin(a, b, 5, 0.5)
    again = begin(b, a, 5, 0.5)
    assert len(through_triton) == 1
    assert again[:2] == first[:2] == (first[0], (3, 1, 1, 7))
    for (x, y, *rest), tensors in ((first[2], (a, b)), (again[2], (b, a))):
        assert (x, y) == tensors or (x is tensors[0] and y is tensors[1])
        assert rest == [5, 0.5, 16]
    assert begin(a, b, 5, 0.5, grid=(2, 4))[:2] == (first[0], (2, 4, 1, 7))
    assert len(through_triton) == 1


def test_whatever_triton_compiles_differently_is_another_launch(through_triton) -> None:
    a, b = torch.zeros(64), torch.zeros(64)
    begin(a, b, 5, 0.5)
    others = [
        lambda: begin(a[1:], b, 5, 0.5),
        lambda: begin(a, b[1:], 5, 0.5),
        lambda: begin(a.double(), b, 5, 0.5),
        lambda: begin(a, b, 1, 0.5),
        lambda: begin(a, b, 16, 0.5),
        lambda: begin(a, b, 1 << 40, 0.5),
        lambda: begin(a, b, 5, 1),
        lambda: begin(a, b, 5, 1.0),
        lambda: begin(a, b, 5, True),
        lambda: begin(a, b, 5, 0.5, N=32),
        lambda: begin(a, b, 5, 0.5, num_warps=2),
    ]
    for count, other in enumerate(others, 2):
        other()
        assert len(through_triton) == count
    for other in others:
        other()
    assert len(through_triton) == 1 + len(others)


def test_what_is_remembered_is_bounded(through_triton, monkeypatch) -> None:
    monkeypatch.setattr(launch, "KEPT", 4)
    a, b = torch.zeros(16), torch.zeros(16)
    for n in range(2, 13):
        begin(a, b, n, 0.5)
        assert launched[-1][2][2] == n
    assert len(launch._known) <= 4
