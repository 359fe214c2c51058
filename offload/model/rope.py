"""Rotary angles with YaRN. Pure tables; the rotation itself is a kernel."""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor

from offload.config import ModelConfig, YarnScaling


class RotaryTable:
    """cos and sin, each float32 [positions, qk_rope_head_dim / 2], made once for a whole context."""

    def __init__(self, config: ModelConfig, positions: int) -> None:
        frequencies = rotary_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        amplitude = config.rope_scaling.amplitude if config.rope_scaling else 1.0
        self.cos = angles.cos() * amplitude
        self.sin = angles.sin() * amplitude

    def to(self, device: torch.device) -> RotaryTable:
        """The same table on `device`."""
        table = copy(self)
        table.cos, table.sin = self.cos.to(device), self.sin.to(device)
        return table

    def at(self, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Tables of positions start .. start + tokens - 1."""
        return self.cos[start : start + tokens], self.sin[start : start + tokens]


def rotary_frequencies(dim: int, theta: float, yarn: YarnScaling | None) -> Tensor:
    """Angle per position of each of the dim/2 pairs, float32.

    YaRN (arXiv 2309.00071, "NTK-by-parts"): pairs that turn more than `beta_fast` times within the original
    context keep their frequency, those that turn less than `beta_slow` times are slowed down by `factor`, with
    a linear ramp in between. It applies at every length, as the model was trained with it.
    """
    plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if yarn is None:
        return plain
    low = max(math.floor(_pair_of_turns(yarn.beta_fast, dim, theta, yarn)), 0)
    high = min(math.ceil(_pair_of_turns(yarn.beta_slow, dim, theta, yarn)), dim - 1)
    span = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain * (1 - ramp) + plain / yarn.factor * ramp


def _pair_of_turns(turns: float, dim: int, theta: float, yarn: YarnScaling) -> float:
    """Index (fractional) of the pair that turns `turns` times within the original context."""
    length = yarn.original_max_position_embeddings
    return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
