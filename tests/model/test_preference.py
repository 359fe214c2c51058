"""Routing again with a preference: groups kept, margins kept, true weights, and the joint in the MoE block."""

from __future__ import annotations

import pytest
import torch

from offload.kernels import RouterShape, select
from offload.kernels.selection import choose_experts
from offload.model.preference import affinities, reroute

SHAPES = [RouterShape(4, 4, 2, True, 2.5), RouterShape(3, 1, 1, False, 1.0), RouterShape(8, 8, 3, True, 1.5)]
EXPERTS = 32


@pytest.fixture(scope="module", params=["reference", "auto"])
def kernels(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    return select(request.param)


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, router = torch.randn(400, 64, generator=generator), torch.randn(EXPERTS, 64, generator=generator) / 12
    return x, router, torch.empty(EXPERTS).uniform_(-0.5, 0.3, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("margin", [0.02, 0.1, 2.0])
def test_every_change_is_to_a_preferred_expert_within_the_margin(kernels, shape: RouterShape, margin: float) -> None:
    x, router, bias = draw(3)
    resident = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(4)) < 0.4
    exact, exact_weights = kernels.router(x, router, bias, shape)
    ids, weights = reroute(kernels, x, router, bias, shape, resident * margin)
    scores = affinities(kernels, x, router, bias, shape)
    biased = scores + bias
    changed = 0
    for t in range(len(x)):
        old, new = set(exact[t].tolist()), set(ids[t].tolist())
        size = EXPERTS // shape.n_group
        groups = [sum(sorted(biased[t, g * size : (g + 1) * size].tolist())[-2:]) for g in range(shape.n_group)]
        kept = sorted(range(shape.n_group), key=lambda g: -groups[g])[: shape.topk_group]
        assert all(e // size in kept for e in new) and len(new) == shape.num_experts_per_tok
        assert all(resident[e] for e in new - old) and not any(resident[e] for e in old - new)
        for gone in old - new:
            assert all(biased[t, gone] - biased[t, come] < margin + 1e-6 for come in new - old)
        # No missing expert is left in while a resident one of a kept group is within the margin of it.
        outside = [e for e in range(EXPERTS) if resident[e] and e not in new and e // size in kept]
        for missing in (e for e in new if not resident[e]):
            assert all(biased[t, missing] - biased[t, e] >= margin - 1e-6 for e in outside)
        wanted = scores[t, ids[t]]
        wanted = wanted / wanted.sum() if shape.norm_topk_prob else wanted
        assert weights[t].tolist() == pytest.approx((wanted * shape.routed_scaling_factor).tolist(), rel=1e-5)
        changed += len(new - old)
        if new == old:
            assert weights[t].tolist() == pytest.approx(exact_weights[t].tolist(), rel=1e-6)
    assert changed > 10


def test_no_preference_is_the_routers_own_choice(kernels) -> None:  # type: ignore[no-untyped-def]
    x, router, bias = draw(5)
    for shape in SHAPES:
        ids, weights = kernels.router(x, router, bias, shape)
        again, weights_again = reroute(kernels, x, router, bias, shape, torch.zeros(EXPERTS))
        assert torch.equal(ids, again)
        assert torch.allclose(weights, weights_again, rtol=1e-6)


def test_a_preference_never_brings_back_a_group_that_was_left_out() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]])
    shape = RouterShape(2, 4, 1, True, 1.0)
    preference = torch.tensor([0.0, 0.0, 0.0, 0.0, 50.0, 50.0, 50.0, 50.0])
    assert choose_experts(scores, torch.zeros(8), shape, preference).tolist() == [[0, 1]]
