"""Every launch of a DeepSeek-V3 layer compiles for the architectures and fits them. Run by test_compiled.py."""

from __future__ import annotations

import pytest

from benchmarks.gpu_kernels import layer
from offload.kernels.triton import absorb, attend, experts, groups, linear, mla, route, rows, slots, small, tiles
from offload.kernels.triton.compiled import ARCHITECTURES, SHARED_LIMIT

REGISTERS = 65536
"""Of a multiprocessor, on every architecture here."""


def check(architecture: int, tokens: int, experts: str, resident: str) -> None:
    launches = layer(architecture, tokens, experts, resident)
    assert {"rows_kernel" if tokens <= 4 else "tiles_kernel", "mla_split_kernel", "choose_kernel"} <= {
        use.kernel for use in launches
    }
    for use in launches:
        assert use.shared_bytes <= SHARED_LIMIT[architecture], use
        # The compiler may give up a register or two for another program per multiprocessor; not while decoding.
        assert use.local_bytes <= (0 if tokens <= 4 else 16), f"spills: {use}"
        assert use.registers * use.warps * 32 <= REGISTERS, use
        assert all(1 <= n <= 65535 for n in use.grid[1:]), use
        if use.kernel in ("gate_up_kernel", "down_kernel"):  # what decoding waits for
            assert REGISTERS // (use.registers * use.warps * 32) >= 4, f"fewer than four programs at a time: {use}"


@pytest.mark.parametrize("architecture", [86, 90])
def test_decoding(architecture: int) -> None:
    check(architecture, 1, "int4-g32", "int8-g128")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [1, 16, 512, 4096])
@pytest.mark.parametrize(("experts", "resident"), [("int4-g32", "int8-g128"), ("fp8", "fp8"), ("int8-g128", "bf16")])
def test_all(architecture: int, tokens: int, experts: str, resident: str) -> None:
    check(architecture, tokens, experts, resident)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize(
    ("experts", "resident"), [("nf4-b64", "nf4-b64"), ("int3-g32", "int3-g32"), ("int2-g32", "int8-g128")]
)
def test_small_formats(architecture: int, tokens: int, experts: str, resident: str) -> None:
    check(architecture, tokens, experts, resident)


def test_a_prompt_of_another_length_compiles_nothing() -> None:
    def compiled() -> dict[str, int]:
        modules = (absorb, attend, experts, groups, linear, mla, route, rows, small, slots, tiles)
        kernels = {name: each for module in modules for name, each in vars(module).items() if name.endswith("_kernel")}
        return {name: sum(len(kept[0]) for kept in kernel.device_caches.values()) for name, kernel in kernels.items()}

    layer(90, 512, "int4-g32", "int8-g128")
    before = compiled()
    assert before["tiles_kernel"] and before["attend_kernel"] and before["grouped_down_kernel"]
    layer(90, 499, "int4-g32", "int8-g128")
    assert compiled() == before
