"""The sizes of a block of latent attention, and what follows from them alone.

Owns the list of its matrices and the arithmetic of earlier tokens, which the cost model and the probe share.
"""

from __future__ import annotations

from dataclasses import dataclass

from offload.config import ModelConfig


@dataclass(frozen=True)
class AttentionShapes:
    """Sizes of a block, DeepSeek-V3's unless given, under the names of config.json."""

    hidden_size: int = 7168
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    @classmethod
    def of(cls, config: ModelConfig) -> AttentionShapes:
        """Those of a model."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """[out, in] of every matrix; without `q_a` where queries have no low rank."""
        hidden, heads, rank = self.hidden_size, self.num_attention_heads, self.q_lora_rank
        queries = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        q = {"q_b": (queries, hidden)} if rank is None else {"q_a": (rank, hidden), "q_b": (queries, rank)}
        return q | {
            "kv_a": (self.kv_lora_rank + self.qk_rope_head_dim, hidden),
            "kv_b": (heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank),
            "o": (hidden, heads * self.v_head_dim),
        }

    @property
    def past_flops(self) -> float:
        """2 x multiply-adds of one row with one token before it, on latents."""
        return 2.0 * self.num_attention_heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim)


DEEPSEEK_V3 = AttentionShapes()
