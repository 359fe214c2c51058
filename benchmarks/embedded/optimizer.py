"""One optimizer out of two: Muon for the matrices that every token uses, AdamW for everything else.

Owns which parameter is moved by which rule. Muon (Jordan et al. 2024) moves a matrix by its orthogonalised momentum and
learns more per step. Experts stay with AdamW: there are so many of them that orthogonalising costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.embedded.model import Model

_QUINTICS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Coefficients of x, x^3 and x^5 per step: together they bring singular values close to 1 fast."""


class MixedOptimizer:
    """Both rules behind one step; set `scale` (0..1) to follow a schedule, all learning rates follow."""

    def __init__(self, model: Model, lr: float, muon_lr: float, embed_lr: float, weight_decay: float) -> None:
        named = dict(model.named_parameters())
        common = {n for n, p in named.items() if n.startswith("layers.") and p.ndim == 2 and not n.endswith(".gate")}
        ends = {"embed_tokens", "lm_head"}
        others = [p for name, p in named.items() if name not in common | ends and p.ndim > 1]
        self._muon = Muon([named[name] for name in sorted(common)], muon_lr, weight_decay)
        self._adam = torch.optim.AdamW(
            [
                {"params": others, "lr": lr, "weight_decay": weight_decay},
                {"params": [p for p in named.values() if p.ndim == 1], "lr": lr, "weight_decay": 0.0},
                {"params": [named[name] for name in sorted(ends)], "lr": embed_lr, "weight_decay": 0.01},
            ],
            betas=(0.9, 0.95),
            fused=True,
        )
        self._base = [group["lr"] for group in self._adam.param_groups]
        self._parameters = list(named.values())
        self.scale = 1.0

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def step(self) -> None:
        """Move every parameter once, at `scale` of its learning rate."""
        for group, lr in zip(self._adam.param_groups, self._base, strict=True):
            group["lr"] = lr * self.scale
        self._adam.step()
        self._muon.step(self.scale)


class Muon:
    """Momentum orthogonalised, in fp32: torch's own computes in bf16, which takes a CPU without it ten times as long.

    Updates are scaled to the size that AdamW's have (0.2 sqrt(longer side); Liu et al. 2025), so that one learning rate
    suits both.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        self._matrices = list(matrices)
        self._momenta = [torch.zeros_like(p) for p in self._matrices]
        self._lr, self._weight_decay, self._momentum = lr, weight_decay, momentum

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step at `scale` of the learning rate."""
        lr = self._lr * scale
        for p, momentum in zip(self._matrices, self._momenta, strict=True):
            assert p.grad is not None
            momentum.lerp_(p.grad, 1 - self._momentum)
            update = orthogonalise(p.grad.lerp(momentum, self._momentum))
            p.mul_(1 - lr * self._weight_decay).add_(update, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The matrix [M, N] with its singular values brought close to 1, by Newton-Schulz steps of degree five."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for a, b, c in _QUINTICS:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
