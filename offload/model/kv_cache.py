"""The latent KV cache: what attention remembers of earlier tokens.

Owns one fixed allocation, 576 values per token and layer for DeepSeek-V3: the normalised kv latent and
the rotated key that all heads share. Must not know how attention uses it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.config import ModelConfig
from offload.errors import UsageError


class KVCache:
    """Per layer [capacity, kv_lora_rank + qk_rope_head_dim], filled up to `length` tokens."""

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        devices: Sequence[torch.device] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`devices`: where each layer's part lies; the CPU unless given. `dtype`: what the kernels read latents as."""
        places = devices or [torch.device("cpu")] * config.num_hidden_layers
        self.layers = [torch.zeros(capacity, config.latent_dim, dtype=dtype, device=device) for device in places]
        self.capacity = capacity
        self.length = 0

    def require(self, tokens: int) -> None:
        """Raise UsageError unless `tokens` more fit."""
        if self.length + tokens > self.capacity:
            raise UsageError(
                f"{self.length + tokens} tokens do not fit into the context of {self.capacity}; give a larger --context"
            )

    def write(self, layer: int, latent: Tensor, first: int = 0) -> Tensor:
        """Put latent [T, R+D] of `layer` `first` rows behind the filled part; returns all rows up to its end."""
        start = self.length + first
        end = start + latent.shape[0]
        self.layers[layer][start:end] = latent
        return self.layers[layer][:end]

    def advance(self, tokens: int) -> None:
        """All layers have written `tokens` rows."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens."""
        assert 0 <= length <= self.length
        self.length = length
