"""What the user decides of a plan, and what stands for it where nothing was said."""

from __future__ import annotations

from dataclasses import dataclass

from offload.config import ModelConfig
from offload.tune.budget import DEFAULT_CONTEXT

PROCESS_NBYTES = 320 << 20
"""Interpreter and libraries before a model is loaded; the engine measures its own."""

DEFAULT_PROMPT = 1024


@dataclass(frozen=True)
class Setting:
    """What the user decides."""

    ram: int | None = None
    vram: int | None = None
    context: int | None = None
    prompt: int = DEFAULT_PROMPT
    allow_slow: bool = False
    prefill_chunk: int | None = None
    """Most tokens of a prompt that share one sweep; None: as many as context and memory allow."""
    split: str = "gpu"
    """Who computes what VRAM lacks, `gpu` or `hybrid`, where there is a GPU."""

    def context_of(self, config: ModelConfig) -> int:
        """Tokens of the context of a run."""
        return self.context or min(DEFAULT_CONTEXT, config.max_position_embeddings)
