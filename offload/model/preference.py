"""Routing again with a preference: experts that are at hand before experts that are missing.

Owns the step between router and executor that `--prefer-resident` switches on. Must not know why an expert is
preferred: whoever computes the experts says so, by a number per expert.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from offload.kernels import Kernels, RouterShape
from offload.kernels.selection import choose_experts, weigh_experts


def reroute(
    kernels: Kernels, x: Tensor, router: Tensor, bias: Tensor, shape: RouterShape, preference: Tensor
) -> tuple[Tensor, Tensor]:
    """The router's ids and weights [T, K] for x [T, H], with `preference` [E] added to the biased scores.

    Like the bias it takes part in the choice only, and only within the groups that were kept without it; the
    weights are the true affinities of the chosen experts, normalised anew. With a preference of `margin` for some
    experts, each of them that is newly chosen replaces one of the others whose biased score was less than
    `margin` above its own.
    """
    scores = affinities(kernels, x, router, bias, shape)
    ids = choose_experts(scores, bias, shape, preference)
    return ids, weigh_experts(scores, ids, shape)


def affinities(kernels: Kernels, x: Tensor, router: Tensor, bias: Tensor, shape: RouterShape) -> Tensor:
    """The affinity of every expert for inputs x [T, H], to the bit what the backend routes with: float32 [T, E].

    The backend's router is asked for all experts of one group, unnormalised: then its weights are affinities.
    """
    everything = replace(
        shape,
        num_experts_per_tok=router.shape[0],
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
    )
    ids, scores = kernels.router(x, router, bias, everything)
    return torch.empty_like(scores).scatter_(1, ids, scores)
