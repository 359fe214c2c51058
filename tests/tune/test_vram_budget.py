"""How a VRAM budget is split: everything named, slots get the rest, prompts borrow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from convert.synthetic import V3_CONFIG
from offload.config import ModelConfig
from offload.errors import BudgetError
from offload.quant import get_codec
from offload.store.layout import ExpertLayout
from offload.tiers.vram_memory import lent_slots, slot_nbytes
from offload.tune.vram_budget import DEVICE_CHUNK, LEAST_WITH_LENDING, MIN_SLOTS, DeviceDemand, plan_vram

CONFIG = ModelConfig.from_hf(V3_CONFIG)
LAYOUT = ExpertLayout(get_codec("int4-g32"), 7168, 2048)
SLOT = slot_nbytes(LAYOUT)
LENDABLE = lent_slots(LAYOUT, DEVICE_CHUNK, 8)
DEMAND = DeviceDemand(range(61), resident=11 << 30, context=4096, chunk=DEVICE_CHUNK)


def plan(gib, demand=DEMAND, lendable=LENDABLE, share=1.0):
    limit = int(gib * 2**30)
    return limit, plan_vram(
        CONFIG, demand, name="card", limit=limit, slot_nbytes=SLOT, lendable=lendable, driver=640 << 20, share=share
    )


@pytest.mark.parametrize("gib", [16, 24, 32, 80, 500])
def test_the_parts_add_up_to_no_more_than_the_budget(gib):
    limit, found = plan(gib)
    assert found.total <= limit
    assert found.slots == found.experts or limit - found.total < SLOT
    assert f"{found.slots} expert slots" in found.describe()


def test_a_prompt_borrows_what_decoding_uses_as_slots():
    _, found = plan(24)
    _, without = plan(24, lendable=10**6)
    assert found.lent == LENDABLE == 19
    assert without.lent == 0
    assert found.slots - without.slots == pytest.approx(LENDABLE, abs=1)
    assert "19 of which long prompts borrow" in found.describe()


def test_nothing_is_borrowed_where_all_experts_fit_or_too_few_slots_would_stay():
    assert plan(500)[1].lent == 0
    least = plan(24)[1].fixed / 2**30 + (LENDABLE + LEAST_WITH_LENDING - 1) * SLOT / 2**30
    assert plan(least)[1].lent == 0
    assert plan(least + 2 * SLOT / 2**30)[1].lent == LENDABLE


def test_a_share_of_the_experts_gets_slots_and_the_rest_of_the_budget_is_left():
    limit, found = plan(500, share=0.25)
    assert found.slots == found.experts // 4 and found.total < limit / 2
    assert plan(500, share=0.0)[1].slots == MIN_SLOTS
    assert plan(24, share=0.9)[1].slots == plan(24)[1].slots < plan(24)[1].experts


def test_too_little_is_refused_with_what_would_do():
    with pytest.raises(BudgetError, match=r"resident weights 11\.0 GiB, KV cache of 4096 tokens") as caught:
        plan(8)
    need = int(str(caught.value).split("give --vram ")[1].split("MiB")[0])
    assert plan(need / 1024)[1].slots >= MIN_SLOTS
    with pytest.raises(BudgetError):
        plan((need - 2) / 1024)


def test_a_longer_context_takes_slots():
    assert plan(24, replace(DEMAND, context=16384))[1].slots < plan(24)[1].slots


def test_a_long_context_sets_aside_what_its_attention_takes():
    short, long = DEMAND, replace(DEMAND, few=4 << 30, recorded=1 << 30)
    _, without = plan(80, short)
    _, found = plan(80, long)
    assert found.working >= 5 << 30
    assert without.working < 2 << 30
    assert found.total <= 80 << 30


def test_what_the_allocator_loses_is_counted():
    rest = {"name": "card", "limit": 32 << 30, "slot_nbytes": SLOT, "lendable": LENDABLE, "driver": 640 << 20}
    exact, found = plan(32)[1], plan_vram(CONFIG, DEMAND, **rest, rounding=lambda nbytes: nbytes // 64)
    lost = (DEMAND.resident + exact.kv_cache + exact.working) // 64
    assert found.working == exact.working + lost
    assert found.slots <= exact.slots - lost // SLOT
