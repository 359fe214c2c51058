"""What a kernel backend offers. One protocol, several backends.

Owns the signatures and what every backend promises:
- activations are float32, contiguous, row-major; results are new tensors unless `out` says otherwise;
- a row's result depends on that row only, never on how many threads compute it;
- weights are read in the bytes of their format, where they lie.
Must not know models, tiers or stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offload.quant import QuantizedTensor


@dataclass(frozen=True)
class RouterShape:
    """The numbers of a noaux_tc router (names of config.json)."""

    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


class Expert(Protocol):
    """One routed expert in memory: its three matrices, views into one contiguous `buffer` (uint8)."""

    @property
    def buffer(self) -> Tensor: ...
    @property
    def gate_proj(self) -> QuantizedTensor: ...
    @property
    def up_proj(self) -> QuantizedTensor: ...
    @property
    def down_proj(self) -> QuantizedTensor: ...


Wave = Sequence[tuple[Expert, Tensor]]
"""Experts with the positions (int64 [n]) they compute; position p = token * num_experts_per_tok + j."""


class Kernels(Protocol):
    """A backend. `name` is what `--kernels` selects and what summaries print."""

    name: str

    def linear(self, x: Tensor, weight: QuantizedTensor) -> Tensor:
        """x [T, K] times the transposed weight [N, K]: [T, N]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension; weight float32 [H]."""
        ...

    def swiglu_mlp(self, x: Tensor, gate: QuantizedTensor, up: QuantizedTensor, down: QuantizedTensor) -> Tensor:
        """down(silu(gate x) * up x): [T, H] -> [T, H]."""
        ...

    def router(self, x: Tensor, weight: Tensor, bias: Tensor, shape: RouterShape) -> tuple[Tensor, Tensor]:
        """Expert choice for x [T, H]: ids int64 [T, K] and weights float32 [T, K], best first.

        weight float32 [E, H], bias float32 [E] (selection only).
        """
        ...

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate interleaved pairs (x[2i], x[2i+1]) of x [T, heads, D] by cos/sin [T, D/2]."""
        ...

    def absorb_query(self, q_nope: Tensor, kv_b: QuantizedTensor) -> Tensor:
        """Queries in latent space: q_nope [T, heads, nope] times W_UK of each head: [T, heads, R].

        kv_b [heads * (nope + v), R]: per head the rows of W_UK, then those of W_UV.
        """
        ...

    def expand_value(self, latent: Tensor, kv_b: QuantizedTensor, v_head_dim: int) -> Tensor:
        """Head outputs from weighted latents: latent [T, heads, R] times W_UV of each head: [T, heads, v]."""
        ...

    def mla_absorbed(self, q_latent: Tensor, q_rope: Tensor, cache: Tensor, start: int, scale: float) -> Tensor:
        """Attention over the latent cache.

        q_latent [T, heads, R] and q_rope [T, heads, D] against cache [S, R+D], S >= start + T; query t
        sees rows 0..start+t. Returns the weighted latents [T, heads, R].
        """
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
        """Ordinary causal attention: q [T, heads, Dq], k [S, heads, Dq], v [S, heads, Dv]: [T, heads, Dv].

        S = start + T; query t sees rows 0..start+t.
        """
        ...

    def experts(self, x: Tensor, wave: Wave, k: int, partial: Tensor) -> None:
        """partial[p] = expert(x[p // k]) for every expert and position of the wave; partial [T*k, H]."""
        ...

    def combine(self, partial: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """sum_j weights[t, j] * partial[t*K + j] in ascending order of ids[t, j]: [T, H].

        The order is fixed by the ids alone, so neither placement nor arrival changes a bit.
        """
        ...


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One layer of multi-head latent attention, with its input norm (names of config.json and of the checkpoint).

    `q_a` and its norm are None when the model has a plain `q_proj` (in `q_b`). Norm weights are float32.
    """

    input_norm: Tensor
    q_a: QuantizedTensor | None
    q_a_norm: Tensor | None
    q_b: QuantizedTensor
    kv_a: QuantizedTensor
    kv_a_norm: Tensor
    kv_b: QuantizedTensor
    o: QuantizedTensor
    eps: float
    latent_eps: float
    scale: float
    num_attention_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, eq=False)
class MoeLayer:
    """Resident part of an MoE block: norm, router [E, H] (bfloat16 or float32) and bias [E], shared expert if any."""

    norm: Tensor
    eps: float
    router: Tensor
    bias: Tensor
    shape: RouterShape
    shared: tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor] | None
    """gate, up, down"""


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """The block of a layer without routed experts: its norm (float32) and its MLP."""

    norm: Tensor
    eps: float
    mlp: tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor]
    """gate, up, down"""


Block = MoeLayer | DenseLayer
"""What follows attention in a layer."""


@dataclass(frozen=True, eq=False)
class Residents:
    """Where routed experts are in memory. The tables are those of whoever keeps the experts, and change."""

    layout: Any
    """Of an expert's bytes: an ExpertLayout of a store."""
    first: int
    """The layer of the first row of `slots`."""
    slots: NDArray[np.int32]
    """[MoE layers, E]: the slot of each expert, -1 for one whose bytes are not there."""
    addresses: NDArray[np.uint64]
    """[slots]: where the expert in each slot begins."""


class MoeStart(NamedTuple):
    """An MoE block whose routed experts are still to be computed."""

    x: Tensor
    """The normed input [T, H] of the experts."""
    ids: Tensor
    weights: Tensor
    token: int
    """The backend's mark of the shared expert under way."""


@dataclass(frozen=True)
class ModelEnds:
    """What lies before and behind the layers."""

    embed: QuantizedTensor
    """[vocab, H]"""
    norm: Tensor
    """[H]"""
    eps: float
    head: QuantizedTensor
    """[vocab, H]"""


class OneToken(Protocol):
    """A token on its way through the layers of a model: the blocks of `FusedKernels` over tensors that stay, so that
    nothing is made, checked or looked up per call. All of them but `ids` are overwritten by the next layer."""

    hidden: Tensor
    """What goes into a layer, and what comes out of it [1, H]."""
    attended: Tensor
    """What lies between attention and the other block [1, H]."""
    x: Tensor
    """The normed input [1, H] of the experts."""
    weights: Tensor
    """Of the router's choice [1, K]."""

    def begin(self, token_id: int, cos: Tensor, sin: Tensor, caches: Sequence[Tensor], start: int) -> None:
        """`hidden` = the embedding of the token at position `start`; `caches`: that of every layer."""
        ...

    def run(self, first: int, last: int, residents: Residents | None, routed: bool = False) -> int:
        """The layers first .. last, as far as `residents` have every expert that the routers choose.

        Returns `last`, or the MoE layer where an expert is missing: it goes as far as `begin_moe`, and `end` is the
        rest of it. `routed`: that is where the token stands with `first`, and its experts are looked up once more.
        """
        ...

    def ids(self, index: int) -> Tensor:
        """The router's choice in layer `index`, int64 [1, K], which may be overwritten before its experts run."""
        ...

    def chosen(self, index: int) -> list[int]:
        """The same as a list."""
        ...

    def end(self, index: int, routed: Tensor) -> None:
        """`hidden` = what `end_moe` gives for the routed experts' sum `routed` [1, H]."""
        ...

    def early(self, index: int) -> list[int]:
        """What the router of layer `index` would choose for `hidden` as it is, best first."""
        ...

    def begin_head(self) -> None:
        """The final norm of `hidden` and the head, which may go on behind the caller's back until `logits`."""
        ...

    def logits(self) -> Tensor:
        """[1, vocab], of what `begin_head` has begun."""
        ...


@runtime_checkable
class FusedKernels(Kernels, Protocol):
    """A backend that also computes whole blocks in few calls, with the bits of its single kernels in turn."""

    def attention(
        self, layer: AttentionLayer, hidden: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, start: int
    ) -> Tensor:
        """hidden [T, H] plus the absorbed attention of its norm: [T, H].

        Writes rows start..start+T of the layer's latent cache [capacity, R+D] (float32); cos, sin [T, D/2].
        """
        ...

    def begin_moe(self, layer: MoeLayer, hidden: Tensor) -> MoeStart:
        """Norm and router for hidden [T, H]. May go on with the shared expert behind the caller's back."""
        ...

    def end_moe(self, layer: MoeLayer, hidden: Tensor, start: MoeStart, routed: Tensor) -> Tensor:
        """hidden + (routed + shared expert): [T, H], for the routed experts' sum `routed` [T, H]."""
        ...

    def one_token(self, attention: Sequence[AttentionLayer], blocks: Sequence[Block], ends: ModelEnds) -> OneToken:
        """A model for one token at a time, from both blocks of every layer."""
        ...
