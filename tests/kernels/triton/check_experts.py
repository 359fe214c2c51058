"""Experts in slots: the right expert for each position, nothing else touched, the same bits wherever it lies."""

from __future__ import annotations

import pytest
import torch
from on_device import DEVICE, KERNELS, REFERENCE, close, draw, random_slab, same
from torch import Tensor

from offload.errors import KernelError
from offload.kernels import ExpertSlab
from offload.kernels.device import FEW_TOKENS, LEAST_TILE, Groups
from offload.kernels.triton.groups import group_positions
from offload.quant import get_codec
from offload.store.layout import ExpertLayout


def table(*slots: int) -> Tensor:
    return torch.tensor(slots, dtype=torch.int32, device=DEVICE)


def routing(tokens: int, k: int, slots: int, skew: float, seed: int = 0) -> Tensor:
    """int32 [T * K]: distinct slots per token, low ones far more often, about a fifth of them elsewhere (-1)."""
    generator = torch.Generator().manual_seed(seed + tokens)
    popularity = torch.arange(1, slots + 1).float() ** -skew
    chosen = torch.multinomial(popularity.expand(tokens, -1), k, generator=generator)
    chosen[torch.rand(tokens, k, generator=generator) < 0.2] = -1
    return chosen.flatten().to(torch.int32).to(DEVICE)


def run(slab: ExpertSlab, x: Tensor, slots: Tensor) -> Tensor:
    partial = torch.full((slots.numel(), x.shape[1]), torch.nan, device=DEVICE)
    KERNELS.slot_experts(slab, x, slots, partial)
    return partial


def check(codec: str, hidden: int, width: int, tokens: int, slots: int, skew: float) -> None:
    k = 3
    slab = random_slab(codec, hidden, width, slots, 48)
    x, chosen = draw(tokens, hidden), routing(tokens, k, slots, skew)
    got, wanted = run(slab, x, chosen), torch.full((tokens * k, hidden), torch.nan, device=DEVICE)
    REFERENCE.slot_experts(slab, x, chosen, wanted)
    assert torch.equal(got.isnan().any(1), chosen < 0)
    here = chosen >= 0
    if here.any():
        close(got[here], wanted[here], 1e-2)


@pytest.mark.parametrize("codec", ["int4-g32", "int8-g128", "fp8", "bf16", "nf4-b64", "int3-g32", "int2-g32"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_experts(codec: str, tokens: int) -> None:
    check(codec, 64, 64 if codec == "nf4-b64" else 32, tokens, slots=6, skew=1.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "codec", ["int4-g32", "int4-g128", "int8-g128", "fp8", "fp8-b32x32", "bf16", "int3-g32", "int3-g128", "int2-g32"]
)
@pytest.mark.parametrize(("hidden", "width"), [(96, 64), (200, 72), (260, 132), (512, 256)])
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 17, 33, 65])
@pytest.mark.parametrize(("slots", "skew"), [(4, 0.0), (40, 3.0)])
def test_experts_in_all_sizes(codec: str, hidden: int, width: int, tokens: int, slots: int, skew: float) -> None:
    check(codec, hidden, width, tokens, slots, skew)


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "width"), [(128, 64), (320, 192)])
@pytest.mark.parametrize("tokens", [1, 4, 5, 33, 65])
def test_nf4_experts_in_all_sizes(hidden: int, width: int, tokens: int) -> None:
    check("nf4-b64", hidden, width, tokens, slots=7, skew=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [513, 2049])
def test_the_tiles_of_long_chunks(tokens: int) -> None:
    check("int4-g32", 64, 64, tokens, slots=5, skew=1.0)


@pytest.mark.parametrize(("codec", "tokens"), [("int4-g32", 2), ("fp8", 9)])
def test_bits_do_not_depend_on_placement(codec: str, tokens: int) -> None:
    """Other slots, another pitch, or only some of the experts at a time: the same bits."""
    slab, x, chosen = random_slab(codec, 64, 32, 6), draw(tokens, 64), routing(tokens, 3, 6, 1.0)
    whole = run(slab, x, chosen)
    moved = torch.randperm(6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    wider = torch.zeros(9, slab.data.shape[1] + 64, dtype=torch.uint8, device=DEVICE)
    wider[2 + moved, : slab.data.shape[1]] = slab.data
    there = torch.where(chosen >= 0, 2 + moved[chosen.clamp(min=0).long()], -1).to(torch.int32)
    in_parts = torch.full_like(whole, torch.nan)
    for part in (0, 1, 2):
        some = torch.where(chosen % 3 == part, there, -1).to(torch.int32)
        KERNELS.slot_experts(ExpertSlab(slab.layout, wider), x, some, in_parts)
    (same if tokens > FEW_TOKENS else _equal)(in_parts.nan_to_num(7.0), whole.nan_to_num(7.0))


def _equal(got: Tensor, wanted: Tensor) -> None:
    assert torch.equal(got, wanted)


def test_nothing_here_costs_nothing() -> None:
    slab = random_slab("int4-g32", 64, 32, 2)
    for tokens in (1, FEW_TOKENS + 1):
        assert run(slab, draw(tokens, 64), table(*[-1] * (2 * tokens))).isnan().all()


def test_groups_hold_every_position_once() -> None:
    for tokens, slots, size in ((30, 7, 4), (5, 64, 16), (64, 2, 16)):
        chosen = routing(tokens, 2, slots, 1.0)
        table = group_positions(chosen, slots, size)
        seen: list[int] = []
        for tile in range(table.tiles):
            slot, first, end = (int(column[tile]) for column in (table.slot, table.first, table.end))
            if slot < 0:
                continue
            positions = table.order[first : min(end, first + size)].tolist()
            assert positions, "a tile without work"
            assert {int(chosen[p]) for p in positions} == {slot}
            seen += positions
        assert sorted(seen) == (chosen >= 0).nonzero().flatten().tolist()


@pytest.mark.parametrize(("codec", "tokens"), [("int4-g32", 20), ("fp8", 9)])
def test_positions_grouped_by_the_host_get_the_same_bits(codec: str, tokens: int) -> None:
    """Launches for some of the experts at a time, with tiles in any order, and what is in none left as it is."""
    k, slots = 3, 6
    slab, x, chosen = random_slab(codec, 64, 32, slots), draw(tokens, 64), routing(tokens, k, slots, 1.0)
    order = chosen.sort(stable=True).indices.to(torch.int32)
    size, counts = KERNELS.tile_rows(slab.layout, tokens), [int((chosen == slot).sum()) for slot in range(slots)]
    assert size >= LEAST_TILE
    inputs = KERNELS.group_input(slab.layout, x)
    got = torch.full((tokens * k, 64), torch.nan, device=DEVICE)
    for part in ([4, 1, 0], [2], [5, 3]):
        tiles = []
        for slot in part:
            begin = int((chosen < slot).sum())
            end = begin + counts[slot]
            tiles += [(slot, first, end) for first in range(begin, end, size)]
        if tiles:
            columns = [table(*column) for column in zip(*tiles, strict=True)]
            KERNELS.group_experts(slab, inputs, Groups(order, *columns, len(tiles)), got)
    same(got.nan_to_num(7.0), run(slab, x, chosen).nan_to_num(7.0))
    with pytest.raises(KernelError, match="do not go with"):
        KERNELS.group_experts(slab, inputs, Groups(order, *columns, len(tiles)), got[1:])


def test_layouts_that_kernels_do_not_read_are_refused() -> None:
    slab = random_slab("bf16", 33, 32, 1)
    with pytest.raises(KernelError, match="33 x 32, .*; use --device cpu or convert them to int4-g32"):
        run(slab, draw(1, 33), table(0))
    for codec, width in (("nf4-b64", 32), ("fp8", 33)):
        with pytest.raises(KernelError, match=f"{codec} experts of 64 x {width}"):
            KERNELS.check_experts(ExpertLayout(get_codec(codec), 64, width))
    KERNELS.check_experts(ExpertLayout(get_codec("nf4-b64"), 64, 64))
    with pytest.raises(KernelError, match="slots are int32"):
        run(slab, draw(1, 33), table(0).long())
