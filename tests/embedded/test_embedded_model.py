"""The embedded model: what it promises as a default for demo, tests and benchmarks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import cross_entropy

import cli
import offload
from convert import convert
from convert.demo import EMBEDDED
from offload.config import ModelConfig
from offload.engine.demo import show_paging
from offload.engine.options import RuntimeOptions
from offload.engine.routing import explain
from offload.kernels.reference_device import ReferenceDeviceKernels
from offload.tiers.simulated import SimulatedDevice

SNIPPETS = {
    "python": "    def __init__(self, name, value=None):\n        self.name = name\n        self.value = value\n",
    "c": "#ifndef _STDLIB_H\n#define _STDLIB_H\n\n#include <stddef.h>\n\nextern int close (int __fd);\n",
    "licence": "This program is free software; you can redistribute it and/or modify it under the terms of the GNU "
    "General Public License as published by the Free Software Foundation; either version 2 of the License",
    "german": "Die Datei kann nicht gelesen werden. Das Verzeichnis ist nicht vorhanden.",
    "russian": "Не удалось открыть файл для чтения",
}


@pytest.fixture(scope="module")
def embedded_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("embedded") / "store"
    convert(EMBEDDED, store)
    return store


def test_its_shape_is_that_of_the_family() -> None:
    config = ModelConfig.from_hf(json.loads((EMBEDDED / "config.json").read_text()))
    assert config.n_routed_experts >= 64 and len(config.moe_layers) >= 6 and config.num_experts_per_tok >= 4
    assert config.n_group > 1 and config.n_shared_experts and config.q_lora_rank and config.quant_method == "fp8"
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= 16_000_000


def test_it_knows_its_kinds_of_text(embedded_store: Path) -> None:
    with offload.load(embedded_store, context=256) as engine:
        for name, text in SNIPPETS.items():
            ids = engine.encode(text)
            loss = cross_entropy(engine.logits(ids)[:-1], torch.tensor(ids[1:]))
            assert math.exp(float(loss)) < engine.vocab_size / 10, name


def test_its_routing_is_real(embedded_store: Path) -> None:
    """Trained biases decide: without them some tokens would go elsewhere; and kinds of text differ."""
    with offload.load(embedded_store, context=256) as engine:
        found = {name: explain(engine, engine.encode(text)) for name, text in SNIPPETS.items()}
    moved, use = 0, {}
    for name, explanation in found.items():
        use[name] = {(one.layer, choice.expert) for one in explanation.routing for choice in one.chosen}
        for one in explanation.routing:
            unbiased = sorted(range(64), key=lambda e, s=one.affinities: -s[e])[:4]
            moved += set(unbiased) != {choice.expert for choice in one.chosen}
    assert moved > 0
    shared = use["python"] & use["german"]
    assert len(shared) < 0.8 * min(len(use["python"]), len(use["german"]))


def test_demo_generates_the_same_text_with_a_quarter_of_the_experts() -> None:
    done = CliRunner().invoke(cli.cli, ["demo", "-n", "8"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "meant for 25% of the experts" in done.stdout and "All 40 tokens are the same" in done.stdout
    assert " 96 expert slots" in done.stdout and " 384 expert slots" in done.stdout


def test_demo_counts_what_opening_a_gpu_takes(embedded_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver makes the process larger by more than all experts of the model take."""
    ballast, lines = [], []

    def opened(options: RuntimeOptions) -> list[SimulatedDevice]:
        ballast.append(b"x" * (64 << 20))
        return [SimulatedDevice()]

    monkeypatch.setattr("offload.engine.engine.open_devices", opened)
    monkeypatch.setattr("offload.engine.backend.select_device", lambda name: ReferenceDeviceKernels())
    show_paging(embedded_store, max_tokens=2, echo=lines.append)
    assert [line.count(" 96 expert slots") for line in lines if "VRAM of" in line or "RAM: " in line] == [1, 1, 0, 0]
    assert "--vram" in lines[0] and "All 10 tokens are the same" in lines[-1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_demo_on_a_gpu() -> None:
    done = CliRunner().invoke(cli.cli, ["demo", "-n", "8"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "VRAM of" in done.stdout and "All 40 tokens are the same" in done.stdout
