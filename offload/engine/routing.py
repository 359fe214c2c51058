"""Why each token went to which experts: the router's own numbers, laid open.

Owns the explanation of one prompt. Affinities come from the very kernel that routes, asked for all experts
instead of the best few; biases, groups and weights are then worked out again here, step by step, and must
give exactly what the runtime executed. Must not change what is executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offload.engine.engine import Engine
from offload.errors import KernelError, UsageError
from offload.kernels import RouterShape
from offload.model.moe import router_shape
from offload.model.preference import affinities


@dataclass(frozen=True)
class Choice:
    """One expert as one token saw it. `weight` is 0 for an expert that was not chosen."""

    expert: int
    group: int
    affinity: float
    bias: float
    biased: float
    weight: float
    group_kept: bool


@dataclass(frozen=True)
class TokenRouting:
    """How one layer routed one token. `chosen` and `runners_up` are in the order of preference."""

    layer: int
    position: int
    affinities: list[float]
    group_scores: list[float]
    kept_groups: list[int]
    chosen: list[Choice]
    runners_up: list[Choice]


@dataclass(frozen=True)
class Explanation:
    """The routing of a prompt, layer by layer, token by token."""

    token_ids: list[int]
    texts: list[str]
    shape: RouterShape
    biases: dict[int, list[float]]
    routing: list[TokenRouting]

    def lines(self) -> Iterator[str]:
        """For people: a block per layer and token."""
        shape = self.shape
        yield (
            f"{len(self.token_ids)} tokens; {shape.num_experts_per_tok} experts per token and layer out of the best "
            f"{shape.topk_group} of {shape.n_group} groups; weights times {shape.routed_scaling_factor:g}"
        )
        for one in self.routing:
            yield f"layer {one.layer}  token {one.position}: {self.texts[one.position]!r}"
            if one.group_scores:
                scores = (
                    f"{group}:{score:.3f}{'*' if group in one.kept_groups else ''}"
                    for group, score in enumerate(one.group_scores)
                )
                yield f"  groups (* kept)  {'  '.join(scores)}"
            for choice in one.chosen:
                yield _line("chosen", choice)
            for choice in one.runners_up:
                yield _line("next" if choice.group_kept else "group left out", choice)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, unrounded."""
        return {
            "token_ids": self.token_ids,
            "tokens": self.texts,
            "router": vars(self.shape),
            "biases": {str(layer): values for layer, values in self.biases.items()},
            "routing": [
                vars(one) | {"chosen": list(map(vars, one.chosen)), "runners_up": list(map(vars, one.runners_up))}
                for one in self.routing
            ],
        }


def explain(engine: Engine, token_ids: list[int], *, layer: int | None = None, runners_up: int = 4) -> Explanation:
    """Route `token_ids` and explain every MoE layer, or `layer` only.

    Raises UsageError for a layer without experts, KernelError should the explanation differ from what ran.
    """
    moe_layers = engine.config.moe_layers
    if layer is not None and layer not in moe_layers:
        raise UsageError(
            f"--layer {layer}: the layers with routed experts are {moe_layers.start} to {moe_layers.stop - 1}"
        )
    shape, biases = router_shape(engine.config), {}
    routing: list[TokenRouting] = []
    done: dict[int, int] = {}

    def watch(index: int, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        if layer is not None and index != layer:
            return
        router, bias = engine.router(index)
        first = done.get(index, 0)
        done[index] = first + len(ids)
        biases[index] = bias.tolist()
        scores = affinities(engine.kernels, x, router, bias, shape)
        routing.extend(_explain(index, first, scores, bias, shape, ids, weights, runners_up))

    engine.observe(token_ids, watch)
    routing.sort(key=lambda one: (one.layer, one.position))
    texts = [engine.tokenizer.decode([token], False) if engine.tokenizer else str(token) for token in token_ids]
    return Explanation(list(token_ids), texts, shape, biases, routing)


def _explain(
    layer: int,
    first: int,
    scores: Tensor,
    bias: Tensor,
    shape: RouterShape,
    ids: Tensor,
    weights: Tensor,
    runners_up: int,
) -> Iterator[TokenRouting]:
    """Explanations of the tokens at positions first ..; ids and weights [T, K] are those that ran."""
    for t in range(len(ids)):
        biased = scores[t] + bias  # [E]
        groups = biased.view(shape.n_group, -1)
        group_scores = groups.topk(min(2, groups.shape[1]), dim=1).values.sum(1).tolist() if shape.n_group > 1 else []
        kept = _best(group_scores, shape.topk_group) if group_scores else [0]
        by_preference = _best(biased.tolist(), len(bias))
        size = groups.shape[1]
        chosen = [expert for expert in by_preference if expert // size in kept][: shape.num_experts_per_tok]
        others = [expert for expert in by_preference if expert not in chosen][:runners_up]
        own_weights = _weights([float(scores[t, expert]) for expert in chosen], shape)
        _require_same(layer, first + t, chosen, own_weights, ids[t].tolist(), weights[t].tolist())
        executed = dict(zip(ids[t].tolist(), weights[t].tolist(), strict=True))

        def choice(
            expert: int,
            row: Tensor = scores[t],
            total: Tensor = biased,
            executed: dict[int, float] = executed,
            kept: list[int] = kept,
            size: int = size,
        ) -> Choice:
            return Choice(
                expert,
                expert // size,
                float(row[expert]),
                float(bias[expert]),
                float(total[expert]),
                executed.get(expert, 0.0),
                expert // size in kept,
            )

        yield TokenRouting(
            layer,
            first + t,
            scores[t].tolist(),
            group_scores,
            sorted(kept),
            [choice(expert) for expert in chosen],
            [choice(expert) for expert in others],
        )


def _best(values: list[float], count: int) -> list[int]:
    """Indices of the `count` largest values, ties to the lower index."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def _weights(scores: list[float], shape: RouterShape) -> list[float]:
    """Final weights of the chosen affinities."""
    total = sum(scores) + 1e-20 if shape.norm_topk_prob else 1.0
    return [score / total * shape.routed_scaling_factor for score in scores]


def _require_same(
    layer: int, position: int, chosen: list[int], weights: list[float], ran: list[int], ran_weights: list[float]
) -> None:
    """The experts must be the same; weights may differ by the rounding of a float32 sum."""
    close = all(abs(a - b) <= 1e-5 * max(abs(b), 1e-9) for a, b in zip(weights, ran_weights, strict=True))
    if chosen != ran or not close:
        raise KernelError(
            f"layer {layer}, token {position}: the explanation gives experts {chosen} with weights {weights}, but "
            f"{ran} with {ran_weights} ran; please report this"
        )


def _line(what: str, choice: Choice) -> str:
    weight = f"  weight {choice.weight:.4f}" if choice.weight else ""
    return (
        f"  {what:<15}  expert {choice.expert:>3} (group {choice.group})  affinity {choice.affinity:.4f} "
        f"{choice.bias:+.4f} = {choice.biased:+.4f}{weight}"
    )
