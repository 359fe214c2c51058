"""Every tensor of a DeepSeek-V3 checkpoint, from the published config.json.

What makes it the real list is that its tensor count and its bytes are those of the published checkpoint, which a test
asserts. The listing that comes with the program is compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TENSORS, NBYTES = 91_991, 688_574_839_360
"""Of deepseek-ai/DeepSeek-V3, as published."""

_SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
Entry = tuple[str, str, tuple[int, ...]]


def tensors(c: Mapping[str, Any]) -> Iterator[Entry]:
    """(name, dtype, shape) of every tensor, the multi-token-prediction layer included."""
    h, vocab, last = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    yield "model.embed_tokens.weight", "BF16", (vocab, h)
    yield "lm_head.weight", "BF16", (vocab, h)
    yield "model.norm.weight", "BF16", (h,)
    for layer in range(last + c["num_nextn_predict_layers"]):
        yield from _layer(c, layer)
    for layer in range(last, last + c["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.embed_tokens.weight", "BF16", (vocab, h)
        yield f"{prefix}.shared_head.head.weight", "BF16", (vocab, h)
        yield f"{prefix}.eh_proj.weight", "BF16", (h, 2 * h)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{prefix}.{norm}.weight", "BF16", (h,)


def _layer(c: Mapping[str, Any], layer: int) -> Iterator[Entry]:
    h, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    prefix = f"model.layers.{layer}"
    for name, rows, cols in (
        ("q_a_proj", c["q_lora_rank"], h),
        ("q_b_proj", heads * (nope + rope), c["q_lora_rank"]),
        ("kv_a_proj_with_mqa", rank + rope, h),
        ("kv_b_proj", heads * (nope + v), rank),
        ("o_proj", h, heads * v),
    ):
        yield from _fp8(f"{prefix}.self_attn.{name}", rows, cols)
    for name, size in (
        ("self_attn.q_a_layernorm", c["q_lora_rank"]),
        ("self_attn.kv_a_layernorm", rank),
        ("input_layernorm", h),
        ("post_attention_layernorm", h),
    ):
        yield f"{prefix}.{name}.weight", "BF16", (size,)
    if layer < c["first_k_dense_replace"]:
        yield from _mlp(f"{prefix}.mlp", h, c["intermediate_size"])
        return
    experts, width = c["n_routed_experts"], c["moe_intermediate_size"]
    yield f"{prefix}.mlp.gate.weight", "BF16", (experts, h)
    yield f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (experts,)
    yield from _mlp(f"{prefix}.mlp.shared_experts", h, width * c["n_shared_experts"])
    for expert in range(experts):
        yield from _mlp(f"{prefix}.mlp.experts.{expert}", h, width)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[Entry]:
    yield from _fp8(f"{prefix}.gate_proj", width, hidden)
    yield from _fp8(f"{prefix}.up_proj", width, hidden)
    yield from _fp8(f"{prefix}.down_proj", hidden, width)


def _fp8(module: str, rows: int, cols: int) -> Iterator[Entry]:
    yield f"{module}.weight", "F8_E4M3", (rows, cols)
    yield f"{module}.weight_scale_inv", "F32", (-(-rows // 128), -(-cols // 128))


def nbytes(entry: Entry) -> int:
    """Bytes of a tensor."""
    count = _SIZES[entry[1]]
    for size in entry[2]:
        count *= size
    return count
