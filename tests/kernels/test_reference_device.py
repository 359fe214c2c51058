"""The reference of the device kernels, on the CPU: what slots and device positions mean."""

from __future__ import annotations

import pytest
import torch
from slabs import draw, random_slab

from offload.errors import KernelError, UsageError
from offload.kernels import ExpertSlab, select_device

KERNELS = select_device("reference")


@pytest.mark.parametrize("codec", ["int4-g32", "int8-g128", "fp8", "bf16"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_positions_get_the_expert_of_their_slot(codec: str, tokens: int) -> None:
    slab, k = random_slab(codec, 64, 32, slots=5, extra=48), 3
    x, partial = draw(tokens, 64), torch.full((tokens * k, 64), torch.nan)
    slots = torch.randint(-1, 5, (tokens * k,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    slots[0], slots[1] = -1, 4
    KERNELS.slot_experts(slab, x, slots, partial)
    for p, slot in enumerate(slots.tolist()):
        if slot < 0:
            assert partial[p].isnan().all()
            continue
        expert, row = slab.expert(slot), x[p // k].double()
        gate, up, down = (w.dequantize().double() for w in (expert.gate_proj, expert.up_proj, expert.down_proj))
        wanted = down @ (torch.nn.functional.silu(gate @ row) * (up @ row))
        torch.testing.assert_close(partial[p].double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_position_on_the_device_is_the_position_of_the_host() -> None:
    q, q_rope, cache = draw(2, 3, 20), draw(2, 3, 6, seed=1), draw(40, 26, seed=2)
    wanted = KERNELS.mla_absorbed(q, q_rope, cache, 7, 0.3)
    for limit in (9, 16, 40):
        assert torch.equal(KERNELS.mla_at(q, q_rope, cache, torch.tensor([7], dtype=torch.int32), limit, 0.3), wanted)


def test_slabs_that_kernels_cannot_read_are_refused() -> None:
    slab = random_slab("int4-g32", 64, 32, slots=2)
    with pytest.raises(KernelError, match="multiple of 16"):
        ExpertSlab(slab.layout, torch.zeros(2, slab.layout.stride + 8, dtype=torch.uint8))
    with pytest.raises(KernelError, match=f"at least {slab.layout.stride} bytes"):
        ExpertSlab(slab.layout, torch.zeros(2, slab.layout.stride - 16, dtype=torch.uint8))
    with pytest.raises(KernelError, match="weight_scale at byte 105"):
        random_slab("fp8", 7, 5, slots=1)


def test_unknown_backend() -> None:
    with pytest.raises(UsageError, match=r"'native'.*auto, triton, reference"):
        select_device("native")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_compiled_kernels_are_not_replaced_silently() -> None:
    with pytest.raises(KernelError, match="no CUDA device; use --device cpu, or --kernels reference"):
        select_device("auto")
