"""Expert selection from affinities (noaux_tc) in torch: groups, top-k, weights.

Owns the rule that every backend's router follows. Must not know where affinities come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.kernels.api import RouterShape


def choose_experts(scores: Tensor, bias: Tensor, shape: RouterShape, preference: Tensor | None = None) -> Tensor:
    """Ids int64 [T, K], best first, for affinities `scores` [T, E] and the correction bias [E].

    Groups are kept by their two best biased scores. `preference` [E] is added after that: it moves choices
    within the kept groups, and neither the choice of groups nor the order of the ids.
    """
    choice = scores + bias
    if shape.n_group > 1:
        grouped = choice.unflatten(1, (shape.n_group, -1))  # [T, G, E/G]
        best_groups = _top(grouped.topk(2, dim=2).values.sum(2), shape.topk_group)
        kept = torch.zeros_like(grouped[:, :, 0], dtype=torch.bool).scatter_(1, best_groups, True)
        # -inf, not 0: a kept expert may have a negative biased score.
        choice = grouped.masked_fill(~kept.unsqueeze(2), -torch.inf).flatten(1)
    if preference is None:
        return _top(choice, shape.num_experts_per_tok)
    chosen = _top(choice + preference, shape.num_experts_per_tok).sort(dim=1).values
    return chosen.gather(1, _top(choice.gather(1, chosen), shape.num_experts_per_tok))


def weigh_experts(scores: Tensor, ids: Tensor, shape: RouterShape) -> Tensor:
    """Weights float32 [T, K] of the chosen `ids`: their affinities, normalised and scaled as `shape` says."""
    weights = scores.gather(1, ids)
    if shape.norm_topk_prob:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return weights * shape.routed_scaling_factor


def _top(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest per row, ties to the lower index (topk promises no order)."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
