"""The benchmarks behind the recorded figures of routing, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.embedded.ablation import summary
from benchmarks.embedded.prefer_resident import point, run
from benchmarks.embedded.statements import choices, explanations, sizes
from convert.synthetic import V3_CONFIG
from offload.config import ModelConfig


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    for domain, text in {"code": "for a in b: x = a\n", "prose": "the people would like to know. "}.items():
        (root / domain).mkdir()
        (root / domain / "a.txt").write_text(text * 12)
    return root


def test_sizes_of_deepseek_v3() -> None:
    found = sizes(ModelConfig.from_hf(V3_CONFIG))
    assert (found["shared_experts"], found["routed_experts"], found["active_experts"]) == (1, 256, 8)
    assert round(found["parameters"] / 1e9) == 671 and round(found["active_parameters"] / 1e9) == 37


def test_explanations_are_compared_with_the_trace(store: Path, texts: Path) -> None:
    found, trace, biases = explanations(store, texts, 24)
    numbers = choices(found, trace, biases)
    assert numbers["explained"] == numbers["explained_as_executed"] == 2 * 24 * 3
    assert 0 < numbers["choices_moved_by_bias"] < 1
    trace.experts[3, 1] = trace.experts[3, 1][::-1].copy()
    assert choices(found, trace, biases)["explained_as_executed"] == 2 * 24 * 3 - 1


def test_preference_costs_nothing_at_no_margin_and_saves_bytes_at_a_large_one(store: Path, texts: Path) -> None:
    exact = run(store, texts, None, 0.4, 16, 1)
    same, wide = point(None, exact, exact), point(5.0, run(store, texts, 5.0, 0.4, 16, 1), exact)
    assert same["kl_nats_per_token"] == same["bytes_saved"] == same["changed_choices"] == 0
    assert wide["bytes_saved"] > 0 and wide["changed_choices"] > 0 and wide["kl_nats_per_token"] > 0
    assert exact.tokens == 32


def test_ablation_summary_averages_the_last_steps() -> None:
    rows: list[dict[str, object]] = [{"bigram_steps": 4, "loss": 5.0}]
    rows += [{"step": s, "loss": 9 - s / 100, "max_vio_batch": float(s)} for s in (10, 410, 490, 500)]
    rows[-1] |= {"held_out_loss": 4.0, "bits_per_byte": {}, "max_vio_global": 0.5, "max_vio_global_layers": [0.5]}
    found = summary(rows, {"balance": "bias", "seed": 3, "steps": 500, "start": "", "minutes": 9.0})
    assert found["max_vio_batch"] == round((410 + 490 + 500) / 3, 3) and found["curve"]["step"] == [10, 410, 490, 500]
    assert found["recipe"] == {"steps": 500} and found["held_out_loss"] == 4.0
