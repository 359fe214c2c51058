"""What is said about DeepSeek-V3's routing, measured: sizes of V3, and the routing of a store on its kinds of text.

    python -m benchmarks.embedded.statements STORE TEXTS [--record]

The figures of docs/ROUTING.md. With --record they are appended to benchmarks/results/routing.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import offload
from benchmarks.embedded.balance import expert_counts, max_violation
from benchmarks.record import append
from convert.inspect import parameter_counts
from convert.synthetic import V3_CONFIG
from offload.cache.trace import Trace
from offload.config import ModelConfig
from offload.engine.atlas import read_domains, record_atlas
from offload.engine.routing import Explanation, explain
from offload.kernels.selection import choose_experts
from offload.store import Store


def sizes(config: ModelConfig) -> dict[str, Any]:
    """Experts and parameters of a model, from its config alone."""
    parts = {name: part.parameters for name, part in parameter_counts(config).items() if name != "MTP"}
    routed, total = parts["routed experts"], sum(parts.values())
    used = routed * config.num_experts_per_tok // config.n_routed_experts
    return {
        "shared_experts": config.n_shared_experts,
        "routed_experts": config.n_routed_experts,
        "active_experts": config.num_experts_per_tok,
        "moe_layers": len(config.moe_layers),
        "parameters": total,
        "active_parameters": total - routed + used - parts["embedding"],
    }


def explanations(store: Path, texts: Path, tokens: int) -> tuple[list[Explanation], Trace, dict[int, Tensor]]:
    """Every domain's first `tokens` tokens explained, with the trace of the same run and the biases by layer."""
    with tempfile.TemporaryDirectory() as folder:
        with offload.load(store, context=tokens, trace=Path(folder) / "run.npz") as engine:
            found = [
                explain(engine, engine.encode(paths[0].read_text(encoding="utf-8"))[:tokens])
                for paths in read_domains(texts).values()
            ]
            biases = {layer: engine.router(layer)[1] for layer in engine.config.moe_layers}
        return found, Trace.load(Path(folder) / "run.npz"), biases


def choices(found: list[Explanation], trace: Trace, biases: dict[int, Tensor]) -> dict[str, Any]:
    """Explained against executed, and what the bias does to choice and load."""
    first, at, same = min(biases), 0, 0
    scores: dict[int, list[list[float]]] = {layer: [] for layer in biases}
    for one in found:
        for routing in one.routing:
            ran = trace.experts[at + routing.position, routing.layer - first].tolist()
            same += [choice.expert for choice in routing.chosen] == ran
            scores[routing.layer].append(routing.affinities)
        at += len(one.token_ids)
    total = at * len(scores)
    moved, with_bias, without = 0, [], []
    for layer, rows in scores.items():
        affinities, bias, experts = torch.tensor(rows), biases[layer], len(rows[0])
        chosen = choose_experts(affinities, bias, found[0].shape)
        plain = choose_experts(affinities, torch.zeros_like(bias), found[0].shape)
        moved += int((chosen.unsqueeze(2) != plain.unsqueeze(1)).all(2).sum())
        with_bias.append(max_violation(expert_counts(chosen, experts)))
        without.append(max_violation(expert_counts(plain, experts)))
    return {
        "explained": total,
        "explained_as_executed": same,
        "choices_moved_by_bias": moved / (total * found[0].shape.num_experts_per_tok),
        "max_vio": sum(with_bias) / len(with_bias),
        "max_vio_bias_removed": sum(without) / len(without),
    }


def specialization(store: Path, texts: Path) -> dict[str, Any]:
    """Figures of the atlas."""
    with offload.load(store) as engine:
        atlas, _ = record_atlas(engine, texts)
    quarter = round(0.25 * atlas.shape.experts) - 1
    overlap = atlas.overlap[~torch.eye(len(atlas.domains), dtype=torch.bool).numpy()]
    return {
        "tokens": dict(zip(atlas.domains, atlas.tokens, strict=True)),
        "information_bits": atlas.information.round(4).tolist(),
        "information_by_chance_bits": atlas.information_floor.round(4).tolist(),
        "top_quarter_of_all": float(atlas.coverage[quarter]),
        "top_quarter_within_domain": float(atlas.domain_coverage[:, quarter].mean()),
        "overlap_of_domains": float(overlap.mean()),
        "reuse": float(atlas.reuse.mean()),
        "reuse_by_chance": atlas.chance_reuse,
        "specialists": {name: atlas.specialists(index, 1)[0].share for index, name in enumerate(atlas.domains)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--tokens", type=int, default=256, help="explained per domain")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    found, trace, biases = explanations(arguments.store, arguments.texts, arguments.tokens)
    numbers = {
        "deepseek_v3": sizes(ModelConfig.from_hf(V3_CONFIG)),
        "embedded": sizes(Store.open(arguments.store).config),
        "choices": choices(found, trace, biases),
        "atlas": specialization(arguments.store, arguments.texts),
    }
    print(json.dumps(numbers))
    if arguments.record:
        append("routing", "python -m benchmarks.embedded.statements " + " ".join(sys.argv[1:]), numbers)


if __name__ == "__main__":
    main()
