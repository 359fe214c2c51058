"""Lists and tables on their way to a device: every position once, in room that was counted, never overwritten early."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offload.kernels.device import FEW_TOKENS, LEAST_TILE
from offload.tiers.simulated import SimulatedDevice
from offload.tiers.staging import BUFFERS, GroupTables, SlotLists, staging_nbytes


@pytest.fixture
def device():
    simulated = SimulatedDevice()
    with simulated.guard():
        yield simulated


def draw(tokens: int, k: int, experts: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    chances = np.arange(1, experts + 1) ** -1.2
    return np.concatenate([rng.choice(experts, k, replace=False, p=chances / chances.sum()) for _ in range(tokens)])


@pytest.mark.parametrize(("tokens", "k", "experts", "tile"), [(50, 3, 7, 16), (5, 2, 300, 16), (300, 4, 9, 64)])
def test_tables_hold_the_positions_of_their_experts_once_and_in_order(device, tokens, k, experts, tile) -> None:
    tables = GroupTables(device, tokens * k, experts)
    for layer in range(3):
        flat = draw(tokens, k, experts, layer)
        tables.begin(flat, tile)
        chosen = np.unique(flat)
        for part in (chosen[::2], chosen[1::2], chosen[:1], chosen):
            if not len(part):
                continue
            groups = tables.send([(int(expert), 1000 + int(expert)) for expert in part])
            tables.free(device.compute.record())
            device.compute.drain()
            assert groups.tiles == groups.slot.numel() == groups.first.numel() == groups.end.numel()
            assert all(t.data_ptr() % 16 == 0 for t in (groups.order, groups.slot, groups.first, groups.end))
            seen: dict[int, list[int]] = {}
            for slot, first, end in zip(groups.slot.tolist(), groups.first.tolist(), groups.end.tolist(), strict=True):
                positions = groups.order[first : min(end, first + tile)].tolist()
                assert positions, "a tile without work"
                seen.setdefault(slot - 1000, []).extend(positions)
            assert seen == {int(expert): np.flatnonzero(flat == expert).tolist() for expert in part}


def test_lists_name_the_slot_of_every_position(device) -> None:
    lists = SlotLists(device, 6, 9)
    flat = np.array([4, 1, 7, 7, 1, 3])
    sent = lists.send([[(1, 30), (3, 31)], [(7, 5)], [(8, 6)]], flat)
    device.compute.drain()
    assert [row.tolist() for row in sent] == [[-1, 30, -1, -1, 30, 31], [-1, -1, 5, 5, -1, -1], [-1] * 6]
    assert all(row.data_ptr() % 16 == 0 for row in sent)
    (alone,) = lists.send([[(4, 2)]], flat[:1])
    device.compute.drain()
    assert alone.tolist() == [2]


def test_what_is_under_way_is_not_overwritten(device) -> None:
    """Nothing happens on this device before it is waited for: what is sent later must wait for what it replaces."""
    lists, tables = SlotLists(device, 4, 64), GroupTables(device, 40, 64)
    read: list[tuple[int, int]] = []
    for number in range(3 * BUFFERS):
        (sent,) = lists.send([[(number, number)]], np.array([number]))
        device.compute.launch(lambda sent=sent, number=number: read.append((int(sent[0]), number)))
        lists.free(device.compute.record())
        flat = np.full(40, number)
        flat[number % 40] = 63
        tables.begin(flat, LEAST_TILE)
        groups = tables.send([(63, number)])

        def check(groups=groups, number=number) -> None:
            read.append((int(groups.slot[0]), number))
            read.append((int(groups.order[int(groups.first[0])]), number % 40))

        device.compute.launch(check)
        tables.free(device.compute.record())
    device.compute.drain()
    assert len(read) == 9 * BUFFERS
    assert all(found == right for found, right in read)


@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 8, 256), (3, 6, 64), (100, 3, 12), (4096, 8, 256)])
def test_the_budget_counts_what_is_taken(device, tokens, k, experts) -> None:
    SlotLists(device, min(tokens, FEW_TOKENS) * k, experts)
    GroupTables(device, tokens * k, experts)
    assert device.peak_nbytes() == staging_nbytes(tokens, FEW_TOKENS, k, experts)


def test_any_tile_that_is_allowed_fits(device) -> None:
    """The worst case: one position in a tile of nearly every expert."""
    for tokens, k, experts in ((2, 3, 6), (40, 4, 160), (64, 8, 8)):
        tables = GroupTables(device, tokens * k, experts)
        flat = np.arange(tokens * k) % experts
        tables.begin(flat, LEAST_TILE)
        groups = tables.send([(expert, expert) for expert in range(experts)])
        device.compute.drain()
        assert sorted(set(groups.slot.tolist())) == list(range(min(experts, tokens * k)))
        assert torch.equal(groups.order.sort().values, torch.arange(tokens * k, dtype=torch.int32))
