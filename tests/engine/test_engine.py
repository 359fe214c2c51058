"""The whole runtime over a converted store: exactness, placement, budgets, refusals."""

from __future__ import annotations

import gc
import itertools
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
from offload.cache.report import simulate
from offload.cache.trace import Trace
from offload.engine.engine import ram_for_share
from offload.engine.options import LIVE_POLICIES
from offload.errors import BudgetError, UsageError

PROMPT = [0, 17, 301, 5, 99, 402, 33, 8]


def tokens(store: Path, n: int = 16, share: float | None = None, **options: object) -> list[int]:
    if share is not None:  # measured anew: the process grows from test to test
        options["ram"] = ram_for_share(store, share, context=128)
    with offload.load(store, context=128, **options) as engine:
        steps = engine.generate(PROMPT, max_tokens=n, temperature=0.0, ignore_eos=True)
        return [step.token_id for step in steps]


def test_logits_of_an_fp8_store_match_transformers(fp8_store: Path, bf16_checkpoint: Path) -> None:
    ids = torch.randint(0, 512, (320,), generator=torch.Generator().manual_seed(1)).tolist()
    model = AutoModelForCausalLM.from_pretrained(bf16_checkpoint, dtype=torch.bfloat16).float().eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    with offload.load(fp8_store, kernels="reference", context=512) as engine:
        logits = engine.logits(ids)
    assert logits.dtype == torch.float32 and logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-4
    assert torch.equal(logits.argmax(1), expected.argmax(1))


def test_greedy_tokens_match_transformers(fp8_store: Path, bf16_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bf16_checkpoint, dtype=torch.bfloat16).float().eval()
    prompt = torch.tensor([PROMPT])
    everything = torch.ones_like(prompt)  # else transformers takes token 0 for padding
    expected = model.generate(
        prompt, attention_mask=everything, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None
    )[0, len(PROMPT) :].tolist()
    assert tokens(fp8_store, kernels="reference") == expected


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_placement_never_changes_the_tokens(store: Path, kernels: str) -> None:
    everything = tokens(store, kernels=kernels)
    for share, policy, threads in itertools.product((0.3, 0.6), LIVE_POLICIES, (1, 2)):
        found = tokens(store, kernels=kernels, share=share, policy=policy, threads=threads)
        assert found == everything, (share, policy, threads)
    assert tokens(store, kernels=kernels, share=0.1, allow_slow=True) == everything


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_how_a_prompt_is_cut_changes_no_bit(store: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.model.blocks.BLOCK", 32)
    ids = torch.randint(0, 512, (150,), generator=torch.Generator().manual_seed(2)).tolist()
    found = []
    with offload.load(store, kernels=kernels, context=200) as engine:
        for chunk in (32, 64, 96, 200):
            engine.plan = replace(engine.plan, chunk=chunk)
            found.append(engine.logits(ids))
    assert all(torch.equal(logits, found[0]) for logits in found)


@pytest.mark.parametrize(("asked", "chunk"), [(32, 32), (63, 32), (96, 96), (199, 192), (500, 200), (9, 9)])
def test_a_prompt_is_computed_in_chunks_of_at_most_what_was_asked_for(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int, chunk: int
) -> None:
    """Whole blocks from one on, and then with the bits of an unbounded prompt."""
    monkeypatch.setattr("offload.model.blocks.BLOCK", 32)
    monkeypatch.setattr("offload.tune.budget.BLOCK", 32)
    ids = torch.randint(0, 512, (150,), generator=torch.Generator().manual_seed(3)).tolist()
    enough = ram_for_share(store, 1.0, context=200) + (64 << 20)
    with offload.load(store, context=200, ram=enough) as engine:
        assert engine.plan.chunk == 200
        whole = engine.logits(ids)
    trace = tmp_path / "t.npz"
    with offload.load(store, context=200, ram=enough, prefill_chunk=asked, trace=trace) as engine:
        assert engine.plan.chunk == chunk and f"in chunks of {chunk}," in engine.plan.describe()
        logits = engine.logits(ids)
    assert Trace.load(trace).steps.tolist() == [len(ids[first : first + chunk]) for first in range(0, 150, chunk)]
    assert asked < 32 or torch.equal(logits, whole)


def test_an_expert_is_read_at_most_once_for_all_tokens_of_a_chunk(store: Path) -> None:
    ids = [token % 512 for token in range(500)]
    with offload.load(store, context=512, ram=ram_for_share(store, 0.1, context=512), allow_slow=True) as engine:
        slots, experts = engine.plan.slots, engine.plan.experts
        list(engine.generate(ids, max_tokens=1))
        whole = engine.counters()["ram"]["misses"]
        engine.plan = replace(engine.plan, chunk=125)
        list(engine.generate(ids, max_tokens=1))
        quarters = engine.counters()["ram"]["misses"] - whole
    assert 0.9 * experts <= whole <= experts
    assert 4 * (0.9 * experts - slots) <= quarters <= 4 * experts


@pytest.mark.parametrize("depth", [0, 1, 8])
def test_routers_are_applied_for_as_many_layers_as_asked_for(
    store: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    everything = tokens(store)
    with offload.load(store, context=128, ram=ram_for_share(store, 0.5, context=128), prefetch_depth=depth) as engine:
        layers = engine.config.moe_layers
        expect, expected = engine._executor.expect, []
        monkeypatch.setattr(engine._executor, "expect", lambda layer, ids: expected.append(layer) or expect(layer, ids))
        steps = [step.token_id for step in engine.generate(PROMPT, max_tokens=16, temperature=0.0, ignore_eos=True)]
    # After each decoder layer, dense ones included, those of the next ones that are MoE layers.
    each = [later for at in range(layers.stop) for later in range(at + 1, at + 1 + depth) if later in layers]
    assert steps == everything and expected == each * 15


def test_a_second_generation_does_not_see_the_first(store: Path) -> None:
    with offload.load(store, context=128) as engine:
        first = [s.token_id for s in engine.generate(PROMPT, max_tokens=8, temperature=0.0)]
        list(engine.generate([0, 3, 3, 3], max_tokens=5, seed=1))
        assert [s.token_id for s in engine.generate(PROMPT, max_tokens=8, temperature=0.0)] == first


def test_seeds_decide_sampled_tokens(store: Path) -> None:
    with offload.load(store, context=128) as engine:
        runs = [
            [s.token_id for s in engine.generate(PROMPT, max_tokens=12, temperature=1.0, seed=seed)]
            for seed in (1, 1, 2)
        ]
    assert runs[0] == runs[1] != runs[2]


def test_the_summary_counts_what_was_read(store: Path) -> None:
    with offload.load(store, context=128, ram=ram_for_share(store, 0.5, context=128), prefetch=False) as engine:
        list(engine.generate(PROMPT, max_tokens=6, temperature=0.0, ignore_eos=True))
        summary = engine.summary().to_dict()
        stride = engine.store.layout.stride
    assert summary["completion_tokens"] == 6 and summary["prompt_tokens"] == len(PROMPT)
    assert summary["hits"]["ram"] > 0 and summary["misses"]["ram"] > 0
    # Tiny experts are not page aligned: each read brings the rest of its first and last page.
    assert (
        summary["misses"]["ram"] * stride <= summary["bytes_read"]["disk"] <= summary["misses"]["ram"] * (stride + 8192)
    )
    assert summary["peak_ram_bytes"] > 10**8


def test_budgets_that_are_too_small_are_refused_with_numbers(store: Path) -> None:
    with pytest.raises(BudgetError, match=r"--ram 100.0 MiB is not enough.*give --ram \d+MiB"):
        offload.load(store, ram="100MiB")
    below = ram_for_share(store, 0.1, context=128)
    with pytest.raises(BudgetError, match="below the floor of 12 expert slots"):
        offload.load(store, ram=below, context=128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "belady"}, "unknown policy"),
        ({"kernels": "cuda"}, "unknown kernels"),
        ({"device": "tpu"}, "unknown device"),
        ({"context": 0}, "context"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0: it must be a whole number, 1 or more"),
        ({"prefetch_depth": 9}, "prefetch_depth is 9: it must be a whole number of layers, 0 to 8"),
        ({"prefetch_depth": -1}, "prefetch_depth is -1"),
        ({"prefetch_depth": False}, "prefetch_depth is False"),
        ({"half_life": 0}, "half_life is 0: it must be a number of tokens larger than 0"),
        ({"half_life": "long"}, "half_life is 'long'"),
        ({"half_life": 64, "policy": "lru"}, "half_life is 64, and the policy lru has none"),
        ({"prefill_chunk": True}, "prefill_chunk is True"),
        ({"prefill_chunk": 512.0}, "prefill_chunk is 512.0"),
        ({"context": 10**9}, "positions allow"),
        ({"ram": "much"}, "cannot read 'much' as a size"),
        ({"colour": 1}, "unknown runtime option 'colour'"),
    ],
)
def test_bad_options_are_refused(store: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        offload.load(store, **options)


def test_a_profile_is_overlaid_by_what_is_given(store: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.toml"
    profile.write_text('policy = "lru"\ncontext = 64\n')
    with offload.load(store, profile=profile, context=96) as engine:
        assert engine.context == 96 and "policy lru" in engine.describe()[0]
    for text, message in (
        ("polcy = 3\n", "profile.toml, line 1: key polcy: unknown runtime option 'polcy'"),
        ("context = 64\n\nreaders = 0\n", "profile.toml, line 3: key readers: readers is 0"),
        ("context = 64\nprefill_chunk = '1k'\n", "profile.toml, line 2: key prefill_chunk: prefill_chunk is '1k'"),
        ("\nprefetch_depth = 1.0\n", "profile.toml, line 2: key prefetch_depth: prefetch_depth is 1.0"),
        ("half_life = 16\npolicy = 'lfu'\n", "profile.toml, line 2: key policy: half_life is 16, and the policy lfu"),
        ("policy = 'ema'\nhalf_life = -1\n", "profile.toml, line 2: key half_life: half_life is -1"),
        ("[policy]\nname = 3\n", "profile.toml, line 1: key policy: "),
        ("warm = 3\n", "line 1: key warm: .* must be the name of a file"),
        ("threads = 2\nprefer_resident = 'much'\n", "line 2: key prefer_resident"),
        ("threads = 2\nram = 1.5\n", "line 2: key ram"),
        ("threads = = 2\n", "is not TOML: .*line 1"),
    ):
        profile.write_text(text)
        with pytest.raises(UsageError, match=message):
            offload.load(store, profile=profile)


def test_a_half_life_goes_with_the_policy_of_its_profile(store: Path, tmp_path: Path) -> None:
    profile, trace = tmp_path / "profile.toml", tmp_path / "t.npz"
    profile.write_text('policy = "ema"\nhalf_life = 2\ncontext = 64\n')
    with offload.load(store, profile=profile, policy="lru") as engine:
        assert "policy lru" in engine.describe()[0] and "half-life" not in engine.describe()[0]
    ram = ram_for_share(store, 0.5, context=64)
    with offload.load(store, profile=profile, policy="ema", ram=ram, trace=trace) as engine:
        assert "policy ema with a half-life of 2 tokens" in engine.describe()[0]
        list(engine.generate(PROMPT, max_tokens=30, temperature=0.0, ignore_eos=True))
        slots, live = engine.plan.slots, engine.counters()["ram"]
    assert Trace.load(trace).header["half_life"] == 2
    (again,) = simulate(trace, policies=["ema"], sizes=[slots]).results
    events = vars(again.events)
    assert events == {name: live[name] for name in events} and events["evictions"] > 0


def test_a_saved_profile_is_taken_and_announced(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    (copy / "profile.toml").write_text('policy = "lru"\ncontext = 64\n')
    with offload.load(copy) as engine:
        assert engine.context == 64 and "policy lru" in engine.describe()[0]
        assert any("saved by tune; --profile none" in line for line in engine.describe())
    with offload.load(copy, profile="none", context=96) as engine:
        assert engine.context == 96 and "policy lru" not in engine.describe()[0]
        assert not any("saved by tune" in line for line in engine.describe())


def test_small_files_that_were_changed_are_told(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    with offload.load(copy, context=64, usage="off"):
        assert not caplog.records
    config = (copy / "config.json").read_text()
    assert '"routed_scaling_factor": 2.5' in config  # one bit makes it 0.5, 3.5, ...: valid, and other mathematics
    (copy / "config.json").write_text(config.replace('"routed_scaling_factor": 2.5', '"routed_scaling_factor": 3.5'))
    (copy / "tokenizer_config.json").unlink()
    with offload.load(copy, context=64, usage="off"):
        told = [record.getMessage() for record in caplog.records]
    assert [line.split(" is not as it was converted")[0] for line in told] == [
        str(copy / "config.json"),
        str(copy / "tokenizer_config.json"),
    ]


def test_a_run_is_compared_with_the_plan_where_there_is_a_machine_file(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    (copy / "machine.toml").write_text(
        'name="t"\nram={total="16GiB", read="10GB"}\ndrive={read="1GB"}\ncpu={threads=2, gflops=50}\n'
    )
    with offload.load(copy, context=64, kernels="reference") as engine:
        list(engine.generate(range(3, 36), max_tokens=18, temperature=0.0, ignore_eos=True))
        compared = engine.summary().to_dict()["compared"]
        lines = list(engine.summary().lines())
    assert list(compared) == ["prompt of 33 tokens", "decode, per token"]
    for item in compared.values():
        causes = item["hits_s"] + item["drive_s"] + item["processor_s"]
        assert causes == pytest.approx(item["measured_s"] - item["predicted_s"])
    assert len(lines) == 3 and "predicted" in lines[2]
    (copy / "machine.toml").write_text("name = 3\n")
    with offload.load(copy, context=64, kernels="reference") as engine:
        list(engine.generate([3, 4], max_tokens=2))
        assert list(engine.summary().lines()) == [engine.summary().line()]


def test_a_closed_engine_gives_its_memory_back_and_keeps_its_numbers(store: Path) -> None:
    with offload.load(store, context=128) as engine:
        list(engine.generate(PROMPT, max_tokens=3, temperature=0.0, ignore_eos=True))
        weights = engine._model.weights
        parts = engine._backend, engine._executor.ram.pool, engine._model, engine._cache, weights.head, weights.norm
        parts += weights.layers[0].attention.o, weights.layers[-1].moe.router
        held = [weakref.ref(part) for part in parts]
        del parts, weights
        described, counted = engine.describe(), engine.counters()
    gc.collect()
    assert [part() for part in held] == [None] * 8
    assert engine.describe() == described and engine.counters() == counted
    assert engine.summary().response.completion_tokens == 3
    with pytest.raises(UsageError, match="has been closed; load the store again"):
        list(engine.generate(PROMPT, max_tokens=1))
    engine.close()
