"""The Mixture-of-Experts block: router, routed experts, shared expert.

Owns the `RoutedExperts` protocol, the joint between the model and whoever holds the experts. Must not
know where experts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from offload.config import ModelConfig
from offload.kernels import DenseLayer, FusedKernels, Kernels, MoeLayer, OneToken, Residents, RouterShape
from offload.model.blocks import blocks
from offload.model.preference import reroute
from offload.quant import QuantizedTensor


class RoutedExperts(Protocol):
    """Computes the routed part of MoE layers. The order of calls is that of the model."""

    def begin_step(self, tokens: Sequence[int]) -> None:
        """A forward pass over the token ids `tokens` begins: experts they usually need may be kept."""
        ...

    def preference(self, layer: int, ids: Tensor) -> Tensor | None:
        """Asked before `hint` with the router's choice ids [T, K]: None to keep it, or an addition to the biased
        scores, float32 [E], to choose again with."""
        ...

    def hint(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        """`layer` is about to be called with these ids [T, K]: reads may begin while the shared expert runs."""
        ...

    def lookahead(self) -> int:
        """For how many layers after the one that has run `expect` is worth its while in this step; 0 if for none."""
        ...

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """The router of `layer`, applied to an earlier layer's state, chose `experts`, best first."""
        ...

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """sum_j weights[t, j] * expert(ids[t, j])(x[t]) for x [T, H]; ids int64 [T, K]: [T, H]."""
        ...


@runtime_checkable
class ExpertsAtHand(RoutedExperts, Protocol):
    """Routed experts in the memory of a fused backend, which computes what is there without asking."""

    def residents(self) -> Residents | None:
        """Where experts are in the step under way; None where the routing has to be asked about in every layer."""
        ...

    def ran(self, token: OneToken, before: int) -> None:
        """The layers before `before` of which nothing was heard yet have run for `token`, with experts at hand."""
        ...

    def finish(self, layer: int, token: OneToken) -> None:
        """`layer`, where `token` has stopped: everything from the router's choice on."""
        ...

    def end_step(self, token: OneToken) -> None:
        """The last layer has run: time for what can be done while the head is computed."""
        ...


@runtime_checkable
class DeviceExperts(RoutedExperts, Protocol):
    """Routed experts on a device that computes those it has without being told which they are.

    For one token a layer is `send`, `present`, `complete` and `combined` instead of `hint` and the call. What is
    between them, and `present` and `combined` themselves, touches nothing but tensors that stay where they are: a
    device can repeat it by itself.
    """

    def present(self, layer: int, x: Tensor, ids: Tensor) -> None:
        """Compute, for x [1, H], those of the experts ids [1, K] that the device has. Behind `send`."""
        ...

    def combined(self, layer: int, ids: Tensor, weights: Tensor) -> Tensor:
        """The sum [1, H] of all experts ids [1, K] of `layer`, each times its weight. Behind `complete`."""
        ...

    def send(self, layer: int, ids: Tensor) -> None:
        """`layer` needs ids [1, K]: they set off for the host, and the device's tables are brought up to date."""
        ...

    def complete(self, layer: int, x: Tensor) -> None:
        """Queue the computation, for x [1, H], of whatever `present` did not find."""
        ...

    @property
    def early_routers(self) -> int:
        """How many later routers may ever be worth applying after a layer; 0 if every expert stays on the device."""
        ...

    def foresight(self) -> int:
        """How many of them are worth it in the step under way."""
        ...

    def foresee(self, layers: Sequence[int], ids: Tensor) -> None:
        """The routers of `layers`, applied early, choose ids [len(layers), K] on the device, best first.

        Asked between `send` and `complete`. Nobody waits for them: what comes too late is not used.
        """
        ...


@dataclass(frozen=True)
class MlpWeights:
    """A SwiGLU block: shared expert or dense layer."""

    gate: QuantizedTensor
    up: QuantizedTensor
    down: QuantizedTensor


@dataclass(frozen=True)
class MoeWeights:
    """The resident part of an MoE layer: router weight [E, H] in bf16 or fp32, bias [E] in fp32, shared expert."""

    router: Tensor
    bias: Tensor
    shared: MlpWeights | None


def router_shape(config: ModelConfig) -> RouterShape:
    """The router's numbers from the model's."""
    return RouterShape(
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )


def moe(
    x: Tensor,
    weights: MoeWeights,
    layer: int,
    shape: RouterShape,
    routed: RoutedExperts,
    kernels: Kernels,
) -> Tensor:
    """Output of the MoE block for normed inputs x [T, H]: routed experts plus the unscaled shared expert."""
    ids, scores = kernels.router(x, weights.router, weights.bias, shape)
    preference = routed.preference(layer, ids)
    if preference is not None:
        ids, scores = reroute(kernels, x, weights.router, weights.bias, shape, preference)
    routed.hint(layer, ids, scores)
    shared = mlp(x, weights.shared, kernels) if weights.shared else None
    out = routed(layer, x, ids, scores)
    return out if shared is None else out + shared


def mlp(x: Tensor, weights: MlpWeights, kernels: Kernels) -> Tensor:
    """down(silu(gate x) * up x) for x [T, H], block by block: the intermediate values of a long pass are many."""
    if len(parts := blocks(x.shape[0])) == 1:
        return kernels.swiglu_mlp(x, weights.gate, weights.up, weights.down)
    out = torch.empty_like(x)
    for rows in parts:
        out[rows] = kernels.swiglu_mlp(x[rows], weights.gate, weights.up, weights.down)
    return out


def moe_layer(weights: MoeWeights, norm: Tensor, config: ModelConfig) -> MoeLayer:
    """One layer as backends take it that compute the block in two calls."""
    shared = weights.shared
    return MoeLayer(
        norm=norm,
        eps=config.rms_norm_eps,
        router=weights.router,
        bias=weights.bias,
        shape=router_shape(config),
        shared=None if shared is None else (shared.gate, shared.up, shared.down),
    )


def dense_layer(weights: MlpWeights, norm: Tensor, config: ModelConfig) -> DenseLayer:
    """The other kind of block as such backends take it."""
    return DenseLayer(norm, config.rms_norm_eps, (weights.gate, weights.up, weights.down))


def fused_moe(
    hidden: Tensor,
    block: MoeLayer,
    layer: int,
    routed: RoutedExperts,
    kernels: FusedKernels,
) -> Tensor:
    """hidden [T, H] plus the MoE block of its norm, with the shared expert running while experts are looked up."""
    start = kernels.begin_moe(block, hidden)
    ids, scores = start.ids, start.weights
    preference = routed.preference(layer, ids)
    if preference is not None:
        ids, scores = reroute(kernels, start.x, block.router, block.bias, block.shape, preference)
    routed.hint(layer, ids, scores)
    return kernels.end_moe(block, hidden, start, routed(layer, start.x, ids, scores))


def stopped_layer(layer: int, token: OneToken, block: MoeLayer, at_hand: ExpertsAtHand, kernels: Kernels) -> None:
    """What is left of the MoE layer at whose experts `token` has stopped."""
    preference = at_hand.preference(layer, token.ids(layer))
    if preference is not None:
        ids, scores = reroute(kernels, token.x, block.router, block.bias, block.shape, preference)
        token.ids(layer).copy_(ids)
        token.weights.copy_(scores)
    at_hand.finish(layer, token)
