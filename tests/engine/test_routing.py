"""Explanations and atlases against what the runtime executed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import offload
from offload.cache.trace import Trace, TraceRecorder
from offload.engine.atlas import read_domains, record_atlas, write_atlas
from offload.engine.engine import Engine
from offload.engine.routing import explain
from offload.errors import KernelError, UsageError
from offload.kernels.reference import ReferenceKernels

IDS = [0, 17, 301, 5, 99, 402, 33, 8, 250, 11, 77, 41, 500, 3, 128, 64, 9, 256, 19, 44]


def load(store: Path, **options: object) -> Engine:
    return offload.load(store, context=128, **options)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_explanation_names_the_experts_of_the_trace(store: Path, tmp_path: Path, kernels: str) -> None:
    with load(store, kernels=kernels, trace=tmp_path / "run.npz") as engine:
        explanation = explain(engine, IDS)
    trace = Trace.load(tmp_path / "run.npz")
    assert trace.tokens.tolist() == IDS == explanation.token_ids
    assert len(explanation.routing) == len(IDS) * trace.shape.layers
    for one in explanation.routing:
        executed = trace.experts[one.position, one.layer - 1].tolist()
        assert [choice.expert for choice in one.chosen] == executed


def test_numbers_follow_from_the_hidden_state_and_the_router(store: Path) -> None:
    seen = {}
    with load(store, kernels="reference") as engine:
        engine.observe(IDS, lambda layer, x, ids, weights: seen.setdefault(layer, (x.clone(), weights.clone())))
        explanation = explain(engine, IDS, runners_up=3)
        routers = {layer: engine.router(layer) for layer in engine.config.moe_layers}
        config = engine.config
    assert any(value < 0 for value in explanation.biases[1])
    size = config.n_routed_experts // config.n_group
    left_out = 0
    for one in explanation.routing:
        x, weights = seen[one.layer]
        router, bias = routers[one.layer]
        s = torch.sigmoid(router.double() @ x[one.position].double())
        assert one.affinities == pytest.approx(s.tolist(), abs=1e-6)
        assert explanation.biases[one.layer] == bias.tolist()
        total = s + bias.double()
        groups = [sum(sorted(total[g * size : (g + 1) * size].tolist())[-2:]) for g in range(config.n_group)]
        assert one.group_scores == pytest.approx(groups, abs=1e-6)
        kept = sorted(sorted(range(config.n_group), key=lambda g: -groups[g])[: config.topk_group])
        assert one.kept_groups == kept
        usable = sorted((e for e in range(config.n_routed_experts) if e // size in kept), key=lambda e: -total[e])
        chosen = usable[: config.num_experts_per_tok]
        assert [choice.expert for choice in one.chosen] == chosen
        # The very weights that ran, and the formula they follow.
        assert [choice.weight for choice in one.chosen] == weights[one.position].tolist()
        expected = s[chosen] / s[chosen].sum() * config.routed_scaling_factor
        assert [choice.weight for choice in one.chosen] == pytest.approx(expected.tolist(), rel=1e-5)
        rest = sorted(set(range(config.n_routed_experts)) - set(chosen), key=lambda e: -total[e])[:3]
        assert [choice.expert for choice in one.runners_up] == rest
        for choice in (*one.chosen, *one.runners_up):
            assert choice.group == choice.expert // size and choice.group_kept == (choice.group in kept)
            assert choice.biased == pytest.approx(choice.affinity + choice.bias, abs=1e-6)
        left_out += any(not choice.group_kept for choice in one.runners_up)
    assert left_out  # some runners-up lost with their group


def test_an_explanation_that_disagrees_with_the_run_is_a_fault(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(store, kernels="reference") as engine:
        honest = ReferenceKernels.router

        def wrong_bias(self, x, weight, bias, shape):  # type: ignore[no-untyped-def]
            return honest(self, x, weight, bias if shape.n_group == 1 else bias.roll(1), shape)

        monkeypatch.setattr(ReferenceKernels, "router", wrong_bias)
        with pytest.raises(KernelError, match="please report this"):
            explain(engine, IDS)


def test_explaining_changes_no_token(store: Path) -> None:
    with load(store) as engine:
        before = engine.logits(IDS)
        one_layer = explain(engine, IDS[:5], layer=2)
        assert {one.layer for one in one_layer.routing} == {2} and list(one_layer.biases) == [2]
        assert torch.equal(engine.logits(IDS), before)
        with pytest.raises(UsageError, match="--layer 0: the layers with routed experts are 1 to 3"):
            explain(engine, IDS, layer=0)
        with pytest.raises(UsageError, match="context"):
            explain(engine, IDS * 20)


def test_lines_and_json(store: Path) -> None:
    with load(store) as engine:
        explanation = explain(engine, engine.encode("the model"), layer=3)
    lines = list(explanation.lines())
    values = json.loads(json.dumps(explanation.to_dict()))
    best = values["routing"][0]["chosen"][0]
    assert any(f"expert {best['expert']:>3} " in line and f"weight {best['weight']:.4f}" in line for line in lines)
    assert len(values["routing"]) == len(values["token_ids"]) and len(values["biases"]["3"]) == 16


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    for domain, texts in {"code": ["x = 1\ny = x", "for a in b:"], "prose": ["the people would like to know"]}.items():
        (tmp_path / "texts" / domain).mkdir(parents=True)
        for number, text in enumerate(texts):
            (tmp_path / "texts" / domain / f"{number}.txt").write_text(text)
    return tmp_path / "texts"


def test_atlas_counts_what_the_runtime_executed(store: Path, prompts: Path, tmp_path: Path) -> None:
    with load(store, trace=tmp_path / "run.npz") as engine:
        atlas, traces = record_atlas(engine, prompts, max_tokens=9)
    executed = Trace.load(tmp_path / "run.npz")
    assert list(traces) == ["code", "prose"]
    assert executed.steps.tolist() == [step for trace in traces.values() for step in trace.steps.tolist()]
    assert executed.steps.max() == 9
    assert np.array_equal(np.concatenate([trace.experts for trace in traces.values()]), executed.experts)
    assert np.array_equal(np.concatenate([trace.tokens for trace in traces.values()]), executed.tokens)
    assert atlas.first_layer == 1 and len(traces["code"].sessions) == 2
    for layer in range(3):
        for expert in range(16):
            wanted = (traces["code"].experts[:, layer] == expert).sum()
            assert atlas.counts[0, layer, expert] == wanted
    write_atlas(atlas, traces, "m", html=tmp_path / "a.html", traces_to=tmp_path / "traces")
    assert "Routing atlas of m" in (tmp_path / "a.html").read_text()
    assert np.array_equal(Trace.load(tmp_path / "traces" / "prose.npz").experts, traces["prose"].experts)


def test_chunks_of_a_long_text_are_one_session(store: Path) -> None:
    from offload.cache.policy import CacheShape
    from offload.engine.atlas import record

    with load(store) as engine:
        engine.plan = replace(engine.plan, chunk=8)
        recorder = TraceRecorder(CacheShape(3, 16, 4))
        record(engine, IDS, recorder)
    trace = recorder.trace()
    assert trace.steps.tolist() == [8, 8, 4] and trace.sessions.tolist() == [0] and trace.tokens.tolist() == IDS


def test_folders_without_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_domains(tmp_path / "absent")
    with pytest.raises(UsageError, match="no texts"):
        read_domains(tmp_path)
    (tmp_path / "law.txt").write_text("x")
    assert list(read_domains(tmp_path)) == ["law"]
