"""The models of the benchmarks: DeepSeek-V3's architecture at 10B parameters, or a few of its layers in their true
shapes; random weights.

Owns their configs and where checkpoints and stores lie. Every benchmark that needs a whole model uses the first, so
that their rows can be compared.
"""

from __future__ import annotations

from pathlib import Path

from convert import convert
from convert.synthetic import V3_CONFIG, write_checkpoint

CONFIG_10B = V3_CONFIG | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 1024,
    # Not 26 or 27 layers: llama.cpp takes those for V2-Lite and looks for other tensors.
    "num_hidden_layers": 28,
    "first_k_dense_replace": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 4,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "vocab_size": 32768,
    "max_position_embeddings": 163840,
}
"""10.6B parameters, 10.1B of them in 25 x 64 routed experts of 6.3M; 1.4B work on a token."""


CONFIG_V3_LAYERS = V3_CONFIG | {
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "vocab_size": 32768,
    "num_nextn_predict_layers": 0,
}
"""One dense layer and three of 64 experts in DeepSeek-V3's true shapes: 44M parameters an expert."""

SHAPES = {"10b": CONFIG_10B, "v3": CONFIG_V3_LAYERS}


def checkpoint(folder: Path, shape: str = "10b") -> Path:
    """The FP8 checkpoint in `folder`/checkpoint-SHAPE, written if it is not there (10 GB)."""
    path = folder / f"checkpoint-{shape}"
    if not (path / "config.json").exists():
        write_checkpoint(path, SHAPES[shape], shards=4, tokenizer=True, router_skew=0.3)
    return path


def store(
    folder: Path, experts: str = "int4-g32", resident: str = "int8-g128", head: str = "bf16", shape: str = "10b"
) -> Path:
    """The converted store in `folder`; resumed or made if need be. `head` is the codec of head and embedding."""
    suffix = "" if head == "bf16" else f"-{head}"
    path = folder / f"store-{shape}-{experts}-{resident}{suffix}"
    if not (path / "expertpager.json").exists():
        convert(checkpoint(folder, shape), path, experts=experts, resident=resident, head=head, embedding=head)
    return path
