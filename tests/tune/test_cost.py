"""The arithmetic of DeepSeek-V3 against published counts and figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from listing import NBYTES, TENSORS, tensors

from convert.footprint import Footprint
from convert.mapping import map_checkpoint
from convert.source import Checkpoint
from convert.synthetic import V3_CONFIG
from offload.config import ModelConfig
from offload.quant import get_codec
from offload.store.safetensors import DTYPE_NAMES
from offload.tiers.disk import PART_NBYTES
from offload.tune.cost import (
    ModelCost,
    ceiling_tok_s,
    chunk_cost,
    decode_cost,
    distinct_experts,
    prefill_cost,
    rows_seconds,
)
from offload.tune.layer_clock import Demand, arrival_times, beside, last_arrivals, layer_seconds
from offload.tune.machine import FormatRate, MachineSpec

MACHINE = MachineSpec(
    "test", 128 << 30, 124 << 30, ram_read=72e9, drive_read=7e9, threads=16, gflops=1000.0, drive_latency_s=0.0
)


def test_the_listing_is_the_published_checkpoint(v3_checkpoint: Checkpoint) -> None:
    assert len(v3_checkpoint.tensors) == TENSORS
    assert v3_checkpoint.nbytes == NBYTES
    listed = {name: (DTYPE_NAMES[info.dtype], info.shape) for name, info in v3_checkpoint.tensors.items()}
    assert listed == {name: (dtype, shape) for name, dtype, shape in tensors(V3_CONFIG)}


def test_components_of_the_checkpoint(v3_checkpoint: Checkpoint) -> None:
    mapped = map_checkpoint(v3_checkpoint, ModelConfig.from_hf(v3_checkpoint.config))
    routed = sum(linear.nbytes for expert in mapped.experts.values() for linear in expert.values())
    assert routed == 654_068_416_512
    assert sum(info.nbytes for info in mapped.left_out) == 15_424_227_552
    assert len(mapped.experts) == 14_848


@pytest.mark.parametrize(
    ("recipe", "expert", "total", "token"),
    [
        ("int4", 24_772_608, 367_823_683_584, 11_494_490_112),
        ("int4-small", 22_708_224, 337_171_709_952, 10_536_615_936),
        ("int8", 44_728_320, 664_126_095_360, 20_753_940_480),
        ("fp8", 44_050_944, 654_068_416_512, 20_439_638_016),
    ],
)
def test_bytes_per_recipe(v3: dict[str, Footprint], recipe: str, expert: int, total: int, token: int) -> None:
    model = ModelCost.of(v3[recipe])
    assert (model.expert_nbytes, model.experts_nbytes, model.token_nbytes) == (expert, total, token)
    assert (model.expert_count, model.experts_per_token) == (14_848, 464)
    assert v3[recipe].download_nbytes == 673_150_611_808  # without the multi-token-prediction layer
    assert v3[recipe].store_nbytes > total + v3[recipe].resident_nbytes


def test_lossless_recipe_keeps_the_resident_bytes(v3: dict[str, Footprint]) -> None:
    assert v3["fp8"].resident_nbytes == 673_150_611_808 - 654_068_416_512
    model = ModelCost.of(v3["fp8"])
    assert model.head_nbytes * 2 == 3_706_716_160
    assert model.resident_read_nbytes == 673_150_611_808 - 654_068_416_512 - 3_706_716_160


def test_parameters_are_the_published_ones(v3: dict[str, Footprint]) -> None:
    model = ModelCost.of(v3["int4"])
    experts = model.expert_count * model.config.expert_parameters
    both_ends = 2 * model.config.vocab_size * model.config.hidden_size
    norms = 61 * (2 * 7168 + 1536 + 512) + 7168
    biases = 58 * 256
    assert model.resident_parameters + experts + both_ends + norms + biases == 671_026_419_200
    active = model.resident_parameters + 464 * model.config.expert_parameters + both_ends // 2
    assert active == pytest.approx(36.62e9, rel=1e-3)


@pytest.mark.parametrize(
    ("rate", "ceilings"),
    [(7e9, (0.64, 1.3, 3.2)), (13e9, (1.2, 2.4, 6.0)), (25e9, (2.3, 4.6, 11.5)), (52e9, (4.8, 9.6, 24.0))],
)
def test_ceilings_at_4_25_bits(rate: float, ceilings: tuple[float, float, float]) -> None:
    token = 464 * 44_040_192 * 4.25 / 8
    for hit, wanted in zip((0.0, 0.5, 0.8), ceilings, strict=True):
        assert ceiling_tok_s(token, rate, hit) == pytest.approx(wanted, rel=0.03)
    assert ceiling_tok_s(token, rate, 1.0) == float("inf")


def test_decode_without_a_cache_is_the_drive(v3: dict[str, Footprint]) -> None:
    """With an infinitely fast processor a token takes exactly its bytes at the drive's rate."""
    instant = replace(MACHINE, ram_read=1e18, gflops=1e12)
    cost = decode_cost(ModelCost.of(v3["int4"]), instant, Demand(0.0))
    assert cost.read_nbytes == 11_494_490_112
    assert cost.total_s == pytest.approx(11_494_490_112 / 7e9, rel=1e-6)
    assert cost.binding == "drive"


def test_decode_with_everything_resident_is_the_memory(v3: dict[str, Footprint]) -> None:
    model = ModelCost.of(v3["int4"])
    cost = decode_cost(model, MACHINE, Demand(1.0))
    nbytes = model.token_nbytes + model.resident_read_nbytes + model.head_nbytes
    assert cost.total_s == pytest.approx(nbytes / (0.85 * 72e9), rel=1e-9)
    assert (cost.stall_s, cost.read_nbytes, cost.binding) == (0.0, 0.0, "memory")


def test_parts_add_up_and_more_of_anything_never_hurts(v3: dict[str, Footprint]) -> None:
    model = ModelCost.of(v3["int4"])
    costs = [decode_cost(model, replace(MACHINE, layer_s=2e-4), Demand(hit / 10), 100) for hit in range(11)]
    for cost in costs:
        assert cost.total_s == pytest.approx(cost.experts_s + cost.resident_s + cost.stall_s + cost.overhead_s)
        assert cost.overhead_s == pytest.approx(61 * 2e-4)
    speeds = [cost.tok_s for cost in costs]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]
    handled = decode_cost(model, replace(MACHINE, layer_s=2e-4, miss_s=1e-4), Demand(0.25), 100)
    assert handled.overhead_s == pytest.approx(61 * 2e-4 + 0.75 * 464 * 1e-4)
    faster = replace(MACHINE, drive_read=8e9)
    assert decode_cost(model, faster, Demand(0.5)).tok_s > decode_cost(model, MACHINE, Demand(0.5)).tok_s
    measured = replace(MACHINE, formats={"int4-g32": FormatRate(1e10, 100.0)})
    assert decode_cost(model, measured, Demand(1.0)).experts_s == pytest.approx(model.token_nbytes / 1e10)


def test_attention_has_a_rate_of_its_own_and_grows_with_the_context(v3: dict[str, Footprint]) -> None:
    model = ModelCost.of(v3["int4"])
    rate = FormatRate(2e10, 100.0)
    one = decode_cost(model, replace(MACHINE, formats={model.resident: rate}), Demand(1.0))
    slow = decode_cost(model, replace(MACHINE, formats={model.resident: replace(rate, attention=5e9)}), Demand(1.0))
    # 187.1 million weights a layer: q_a, q_b, kv_a, kv_b and o of DeepSeek-V3.
    assert model.attention_nbytes == 61 * get_codec(model.resident).nbytes(1, 187_105_280)
    assert slow.resident_s - one.resident_s == pytest.approx(model.attention_nbytes * (1 / 5e9 - 1 / 2e10))
    machine = replace(MACHINE, attention_gflops=50.0)
    long, short = (decode_cost(model, machine, Demand(1.0), context) for context in (4096, 0))
    assert long.resident_s - short.resident_s == pytest.approx(61 * 2 * 128 * (576 + 512) * 4096 / 50e9)


def test_drive_and_kernels_slow_each_other() -> None:
    machine = replace(MACHINE, drive_beside=0.8, kernels_beside=0.5)
    # 1 s of work takes 2 s beside the reads, of which 1.6 s are done by then: 1.4 s are left to wait for.
    assert beside(machine, 1.0, 3.0) == pytest.approx((2.0, 1.4))
    # 0.8 s of reads take 1 s, in which half a second of 3 s of work is done.
    assert beside(machine, 3.0, 0.8) == pytest.approx((3.5, 0.0))
    assert beside(machine, 3.0, 0.0) == (3.0, 0.0)
    assert beside(MACHINE, 1.0, 3.0) == (1.0, 2.0) and beside(MACHINE, 3.0, 1.0) == (3.0, 0.0)


def test_layer_clock_by_hand() -> None:
    # Two hits take 2 s; reads arrive at 3.5 and 6.5 s; each is computed for 1 s as it comes.
    assert layer_seconds(2, 2, compute=1.0, arrivals=[3.5, 6.5]) == pytest.approx((7.5, 3.5))
    # A shared expert of one second before them hides one second of waiting, and is not the routed experts' time.
    assert layer_seconds(2, 2, compute=1.0, arrivals=[3.5, 6.5], ahead=1.0) == pytest.approx((6.5, 2.5))
    # A drive faster than the processor only delays the first expert, and not even that behind a hit.
    assert layer_seconds(3, 1, compute=1.0, arrivals=[0.75, 1.25, 1.75]) == pytest.approx((4.0, 0.0))
    assert layer_seconds(0, 8, compute=1.0, arrivals=[]) == (8.0, 0.0)


def test_parts_under_way_together_end_together() -> None:
    """Two experts of two parts each are four parts that share 2 GB/s; of ten parts the last two are slower."""
    machine = replace(MACHINE, drive_read=2e9, depths={"1": 1e9, "2": 1.5e9, "4": 2e9}, drive_latency_s=0.1)
    part = PART_NBYTES
    assert arrival_times(machine, 2, 2 * part) == pytest.approx([2 * part / 1e9] * 2)
    eight = 8 * part / 2e9
    assert arrival_times(machine, 5, 2 * part) == pytest.approx([eight] * 4 + [eight + 2 * part / 1.5e9])
    # Of experts of three parts the third ends in the second turn.
    assert arrival_times(machine, 3, 3 * part) == pytest.approx([eight, eight, eight + part / 1e9])
    assert arrival_times(machine, 1, part // 2) == pytest.approx([part / 2e9])
    # Measured rates hold what a single read takes; that of a data sheet does not.
    assert arrival_times(replace(machine, depths={}), 1, part // 2) == pytest.approx([0.1 + part / 4e9])
    assert arrival_times(machine, 0, part) == []


def test_a_chunk_waits_for_its_first_reads(v3: dict[str, Footprint]) -> None:
    """Experts that take longer to compute than to read do not hide the reads that each layer begins with."""
    model = ModelCost.of(v3["int4"])
    machine = replace(MACHINE, drive_read=3.5e9, formats={model.experts: FormatRate(1e9, 10.0)})
    shared = rows_seconds(machine.format_rate(model.resident), model.shared_nbytes, model.shared_parameters, 32)
    first = arrival_times(machine, 16, model.expert_nbytes)[0]
    assert first > 2 * shared
    cold = chunk_cost(model, machine, 32, 0, 0.0)
    assert cold.stall_s == pytest.approx(58 * (first - shared)) and cold.experts_s > 10 * cold.stall_s
    assert chunk_cost(model, machine, 32, 0, 0.5).stall_s == 0  # residents are computed meanwhile


def test_rows_between_streaming_and_products() -> None:
    """1 GB at 10 GB/s is 100 ms for one row; sixteen rows of 1e9 weights at 100 GFLOP/s are 320 ms."""
    rate = FormatRate(10e9, 100.0)
    times = [rows_seconds(rate, 1e9, 1e9, rows) for rows in (0.5, 1, 8.5, 16, 32)]
    assert times == pytest.approx([0.1, 0.1, 0.21, 0.32, 0.64])
    assert rows_seconds(rate, 1e10, 1e9, 16) == pytest.approx(1.0)
    # 64 rows at 200 GFLOP/s are 640 ms; between 16 and 64 rows each adds a 48th of the difference.
    quick = FormatRate(10e9, 100.0, gflops_many=200.0)
    times = [rows_seconds(quick, 1e9, 1e9, rows) for rows in (1, 8.5, 16, 40, 64, 128)]
    assert times == pytest.approx([0.1, 0.21, 0.32, 0.48, 0.64, 1.28])


def test_a_prompt_ends_each_layer_with_what_came_last(v3: dict[str, Footprint]) -> None:
    """Eight parts are under way: of experts of one part up to eight end together, of larger ones fewer."""
    part = PART_NBYTES
    found = [last_arrivals(256, nbytes) for nbytes in (part // 2, part, part + 1, 3 * part, 8 * part, 9 * part)]
    assert found == [4.5, 4.5, 2.5, 1.5, 1.0, 1.0]
    assert last_arrivals(3, part) == 3 and last_arrivals(0.5, part) == 0.5


def test_a_prompt_has_overheads_of_its_own(v3: dict[str, Footprint]) -> None:
    model = ModelCost.of(v3["int4"])
    # 61 layers; vectors of 30 hidden states and of 4 x 128 heads with two keys and a value, in fp32, at 72 GB/s.
    moved = 4 * (30 * 7168 + 4 * 128 * (2 * 192 + 128)) / 72e9
    plain = replace(MACHINE, layer_s=1e-4)
    own = replace(plain, prompt_layer_s=2e-3, prompt_token_s=1e-5)
    spent = [chunk_cost(model, machine, 512, 0, 1.0).overhead_s for machine in (plain, own)]
    assert spent == pytest.approx([61 * (1e-4 + 512 * moved), 61 * (2e-3 + 512 * (1e-5 + moved))])
    assert decode_cost(model, own, Demand(1.0)) == decode_cost(model, plain, Demand(1.0))


def test_what_a_token_takes_and_what_it_learns(v3: dict[str, Footprint]) -> None:
    model = ModelCost.of(v3["int4"])
    learns = replace(MACHINE, layer_s=3e-4, token_s=2e-3, learn_s=1e-4, plain={"layer_s": 1e-4, "token_s": 1e-3})
    plain = learns.under("lru")
    assert (plain.layer_s, plain.token_s, plain.learn_s) == (1e-4, 1e-3, 0.0)
    assert learns.under("ema+tokens") is learns and MACHINE.under("lru") is MACHINE, "nothing is known of others"
    busy = Demand(0.9)
    assert decode_cost(model, learns, busy).overhead_s == pytest.approx(61 * 3e-4 + 2e-3)
    assert decode_cost(model, plain, busy).overhead_s == pytest.approx(61 * 1e-4 + 1e-3)
    more = decode_cost(model, learns, busy, learned=4.0).overhead_s - decode_cost(model, learns, busy).overhead_s
    assert more == pytest.approx(4e-4), "a prompt of four times as many tokens as are decoded"
    # With a slot for every expert, learning goes on beside the head: all of it if the head takes long enough.
    resident = decode_cost(model, learns, Demand(1.0))
    head = model.head_nbytes / MACHINE.format_rate(model.head).read
    assert head > 0 and resident.overhead_s == pytest.approx(61 * 3e-4 + 2e-3 - min(head, 61 * 2e-4))
    assert prefill_cost(model, learns, 64, 64, 1.0).overhead_s == pytest.approx(
        prefill_cost(model, replace(learns, token_s=0.0), 64, 64, 1.0).overhead_s + 2e-3
    )


def test_uneven_misses_wait_longer_than_the_average(v3: dict[str, Footprint]) -> None:
    model = ModelCost.of(v3["int4"])
    compute = model.expert_nbytes / (0.85 * 72e9)
    ahead = model.shared_nbytes / (0.85 * 72e9)
    average = 58 * layer_seconds(1, 7, compute=compute, arrivals=[model.expert_nbytes / 7e9], ahead=ahead)[1]
    assert decode_cost(model, MACHINE, Demand(7 / 8)).stall_s > 1.05 * average


def test_a_chunk_sweeps_the_store_once(v3: dict[str, Footprint]) -> None:
    """347 GB at 7 GB/s is 50 s whatever the chunk; 512 tokens make 10 tok/s of that, 2048 make 41."""
    model = ModelCost.of(v3["int4"])
    instant = replace(MACHINE, ram_read=1e18, gflops=1e12)
    assert distinct_experts(model.config, 1) == pytest.approx(8)
    assert distinct_experts(model.config, 512) == pytest.approx(256, rel=1e-6)
    for chunk in (512, 2048):
        cost = prefill_cost(model, instant, chunk, chunk, share=0.0)
        assert cost.tok_s == pytest.approx(chunk / (367_823_683_584 / 7e9), rel=1e-3)
    two = prefill_cost(model, instant, 1024, 512, share=0.0)
    assert two.total_s == pytest.approx(2 * prefill_cost(model, instant, 512, 512, share=0.0).total_s, rel=1e-3)
    half = prefill_cost(model, instant, 512, 512, share=0.5)
    assert half.read_nbytes == pytest.approx(367_823_683_584 / 2, rel=1e-3)


def test_reads_slow_the_shared_expert_of_a_chunk(v3: dict[str, Footprint]) -> None:
    """With a drive that never rests, everything from the first read on runs at half its speed."""
    model = ModelCost.of(v3["int4"])
    slow = replace(MACHINE, drive_read=7e8)
    alone, halved = (chunk_cost(model, replace(slow, kernels_beside=share), 512, 0, 0.0) for share in (1.0, 0.5))
    shared = 58 * 2 * 512 * model.shared_parameters / 1e12
    assert halved.resident_s - alone.resident_s == pytest.approx(shared)
    assert halved.experts_s == pytest.approx(2 * alone.experts_s)
    # The reads take as long, so what the processor takes longer it waits less.
    assert halved.total_s == pytest.approx(alone.total_s, rel=1e-9)
    # What goes on beside them is all that is slowed: a short wave ends before the shared expert does.
    fast = replace(MACHINE, drive_read=7e12, kernels_beside=0.5)
    wave = 58 * 16 * model.expert_nbytes / 7e12
    brief, free = (chunk_cost(model, replace(fast, kernels_beside=share), 512, 0, 0.0) for share in (0.5, 1.0))
    assert brief.resident_s - free.resident_s == pytest.approx(wave * 0.5)
    assert chunk_cost(model, fast, 512, 0, 1.0).resident_s == free.resident_s


def test_a_prompt_pays_for_its_own_misses(v3: dict[str, Footprint]) -> None:
    model = ModelCost.of(v3["int4"])
    unknown, known = replace(MACHINE, miss_s=2e-4), replace(MACHINE, miss_s=2e-4, prompt_miss_s=5e-5)
    spent = [chunk_cost(model, machine, 512, 0, 0.0).overhead_s for machine in (MACHINE, unknown, known)]
    experts = 58 * distinct_experts(model.config, 512)
    assert spent[1] - spent[0] == pytest.approx(experts * 2e-4)
    assert spent[2] - spent[0] == pytest.approx(experts * 5e-5)
    assert decode_cost(model, known, Demand(0.25)) == decode_cost(model, unknown, Demand(0.25))


def test_prefill_computes_what_the_tokens_need(v3: dict[str, Footprint]) -> None:
    model = ModelCost.of(v3["int4"])
    cost = prefill_cost(model, MACHINE, 512, 512, share=1.0)
    assert cost.experts_s == pytest.approx(2 * 512 * 464 * 44_040_192 / 1e12, rel=1e-6)
    assert cost.stall_s == 0 and cost.binding == "compute"
