"""Embedding and head that begin as a bigram model: what follows what, learned before anything else.

Owns the pair frequencies of the training text and the fit to them. Without layers the model's logits are
head @ norm(embedding[previous token]), and that can be fitted to all pairs at once for a hundredth of the work that
the whole model needs to learn the same; layers then begin small and learn what a bigram cannot know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import rms_norm

from benchmarks.embedded.model import Mlp, Model

LAYER_SHARE = 0.3
"""What the matrices that write into the residual stream are multiplied by at the start."""


@dataclass(frozen=True)
class Pairs:
    """A fitted bigram model: embedding and head, both [vocab, hidden], and its loss in nats per token."""

    embedding: Tensor
    head: Tensor
    loss: float


def pair_frequencies(streams: Mapping[str, NDArray[np.int32]], shares: Mapping[str, float], vocab_size: int) -> Tensor:
    """How often token j follows token i in the domains, mixed by `shares`: float32 [vocab, vocab], sum 1.

    Row 0, what follows the beginning of a sequence, is the mixture over all tokens, as windows begin anywhere.
    """
    table = torch.zeros(vocab_size * vocab_size)
    for name, stream in streams.items():
        tokens = torch.from_numpy(stream.astype(np.int64))
        pairs = tokens[:-1] * vocab_size + tokens[1:]
        table += torch.bincount(pairs, minlength=len(table)) * (shares[name] / len(pairs))
    table = table.view(vocab_size, vocab_size)
    table[0] = table.sum(0) / 256
    return table / table.sum()


def fit_pairs(table: Tensor, hidden: int, steps: int, lr: float = 0.05) -> Pairs:
    """Minimize the cross entropy of head @ norm(embedding) with `table` [vocab, vocab] by Adam on all pairs at once."""
    embedding = torch.randn(len(table), hidden).requires_grad_()
    head = torch.zeros(len(table), hidden, requires_grad=True)
    optimizer = torch.optim.Adam([embedding, head], betas=(0.9, 0.95))
    loss = torch.tensor(torch.nan)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        loss = -(table * (rms_norm(embedding, (hidden,)) @ head.T).log_softmax(1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Pairs(rms_norm(embedding.detach(), (hidden,)), head.detach(), float(loss.detach()))


@torch.no_grad()
def start_from_pairs(model: Model, pairs: Pairs) -> None:
    """Give `model` the fitted embedding and head, and layers that say little at first."""
    model.embed_tokens.copy_(pairs.embedding)
    model.lm_head.copy_(pairs.head)
    for layer in model.layers:
        layer.self_attn.o_proj.mul_(LAYER_SHARE)
        writers = [layer.mlp] if isinstance(layer.mlp, Mlp) else [layer.mlp.shared_experts]
        for mlp in writers:
            mlp.down_proj.mul_(LAYER_SHARE)
        if not isinstance(layer.mlp, Mlp):
            layer.mlp.down.mul_(LAYER_SHARE)
