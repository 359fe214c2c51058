"""Which model a config.json describes: `deepseek_v3`, asserted field by field.

Owns the meaning of every key of config.json. A key that this project does not know, or a value it does
not compute exactly, is refused by name: never guessed. Must not know tensors or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offload.errors import ConfigError

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
"""Model types with exactly this mathematics. Kimi-K2 is DeepSeek-V3 with other sizes."""

LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms of the q and kv latents, whatever `rms_norm_eps` says: the family's released code
leaves it at its default, and checkpoints are trained with that."""

REQUIRED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "mlp_bias": False,
}
"""Keys whose value changes the mathematics, with the one value (also the default) that is computed here."""

HARMLESS = frozenset(
    """
    architectures auto_map torch_dtype dtype transformers_version use_cache initializer_range _name_or_path
    aux_loss_alpha seq_aux pretraining_tp ep_size attention_dropout num_nextn_predict_layers pad_token_id
    decoder_start_token_id sep_token_id head_dim qk_head_dim is_decoder is_encoder_decoder output_attentions
    output_hidden_states return_dict return_dict_in_generate chunk_size_feed_forward problem_type id2label label2id
    num_local_experts num_key_value_heads quantization_config unsloth_fixed router_aux_loss_coef
    output_router_logits max_length min_length do_sample temperature top_p top_k num_beams tokenizer_class
    task_specific_params finetuning_task torchscript use_bfloat16 pruned_heads prefix bos_token_id eos_token_id
    """.split()  # noqa: SIM905
)
"""Keys without influence on the logits, or read elsewhere in this module."""


@dataclass(frozen=True)
class YarnScaling:
    """`rope_scaling` of type yarn, HF names."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def amplitude(self) -> float:
        """Factor on cos and sin: 1 for every released model of the family."""
        return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Factor m on queries and keys; the softmax scale gets m^2."""
        return _mscale(self.factor, self.mscale_all_dim) if self.mscale_all_dim else 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3 class model. Names are those of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: YarnScaling | None
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    quant_method: str | None
    weight_block_size: tuple[int, int] | None
    num_nextn_predict_layers: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """The model described by the content of a config.json.

        Raises ConfigError: unknown model type, a key or value that would change the mathematics, a
        missing key, a wrong type, sizes that contradict each other.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"config.json must hold a JSON object, not {type(config).__name__}")
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ConfigError(f"model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
        _refuse_other_maths(config)
        take = _Taker(config)
        quant_method, block = _quantization(config.get("quantization_config"))
        theta, scaling = _rope(config)
        model = cls(
            model_type=model_type,
            vocab_size=take.size("vocab_size"),
            hidden_size=take.size("hidden_size"),
            intermediate_size=take.size("intermediate_size"),
            moe_intermediate_size=take.size("moe_intermediate_size"),
            num_hidden_layers=take.size("num_hidden_layers"),
            first_k_dense_replace=take.size("first_k_dense_replace", low=0),
            num_attention_heads=take.size("num_attention_heads"),
            q_lora_rank=None if config.get("q_lora_rank") is None else take.size("q_lora_rank"),
            kv_lora_rank=take.size("kv_lora_rank"),
            qk_nope_head_dim=take.size("qk_nope_head_dim"),
            qk_rope_head_dim=take.size("qk_rope_head_dim"),
            v_head_dim=take.size("v_head_dim"),
            n_routed_experts=take.size("n_routed_experts"),
            n_shared_experts=take.size("n_shared_experts", low=0, default=0),
            num_experts_per_tok=take.size("num_experts_per_tok"),
            n_group=take.size("n_group", default=1),
            topk_group=take.size("topk_group", default=1),
            norm_topk_prob=take.flag("norm_topk_prob", default=True),
            routed_scaling_factor=take.number("routed_scaling_factor", default=1.0),
            rms_norm_eps=take.number("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=take.size("max_position_embeddings"),
            bos_token_id=None if config.get("bos_token_id") is None else take.size("bos_token_id", low=0),
            eos_token_id=_token_ids(config.get("eos_token_id")),
            quant_method=quant_method,
            weight_block_size=block,
            num_nextn_predict_layers=take.size("num_nextn_predict_layers", low=0, default=0),
        )
        model._check_sizes(config)
        return model

    @property
    def moe_layers(self) -> range:
        """Indices of the decoder layers with routed experts."""
        return range(min(self.first_k_dense_replace, self.num_hidden_layers), self.num_hidden_layers)

    @property
    def mtp_layers(self) -> range:
        """Indices of the multi-token-prediction layers, which follow the decoder's and are no part of its pass."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    def has_experts(self, layer: int) -> bool:
        """Whether the decoder or multi-token-prediction layer has routed experts."""
        return layer >= self.first_k_dense_replace

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: the kv latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of attention scores; with YaRN it carries m^2, also for short prompts."""
        m = self.rope_scaling.softmax_factor if self.rope_scaling else 1.0
        return float(self.qk_head_dim**-0.5 * m * m)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    def _check_sizes(self, config: Mapping[str, Any]) -> None:
        heads, kv_heads = self.num_attention_heads, config.get("num_key_value_heads")
        _require(kv_heads in (None, heads), f"num_key_value_heads {kv_heads!r} must equal num_attention_heads {heads}")
        _require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim {self.qk_rope_head_dim} must be even")
        if not self.moe_layers:
            return
        e, g, k = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        _require(e % g == 0, f"n_routed_experts {e} must be a multiple of n_group {g}")
        _require(self.topk_group <= g, f"topk_group {self.topk_group} must not exceed n_group {g}")
        # A group's score is the sum of its two best experts.
        _require(g == 1 or e // g >= 2, f"groups of {e // g} expert are too small: n_routed_experts {e}, n_group {g}")
        usable = e // g * self.topk_group
        _require(k <= usable, f"num_experts_per_tok {k} exceeds the {usable} experts of {self.topk_group} groups")


class _Taker:
    """Reads typed values; every complaint names the key and what it holds."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def _get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"config.json has no {key}")
        return value

    def size(self, key: str, low: int = 1, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            raise ConfigError(f"config.json: {key} is {value!r}; it must be a whole number of at least {low}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        # The bounds keep everything computed from it finite.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-30 < value < 1e30:
            raise ConfigError(f"config.json: {key} is {value!r}; it must be a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {key} is {value!r}; it must be true or false")
        return value


def _refuse_other_maths(config: Mapping[str, Any]) -> None:
    for key, wanted in REQUIRED.items():
        if config.get(key, wanted) != wanted:
            raise ConfigError(
                f"config.json: {key} = {config[key]!r} changes the model's mathematics; only {wanted!r} is supported"
            )
    known = HARMLESS | REQUIRED.keys() | ModelConfig.__dataclass_fields__.keys() | {"rope_parameters"}
    for key, value in config.items():
        # A key that is off (null, false, empty) asks for nothing.
        if key not in known and value not in (None, False, [], {}, ""):
            raise ConfigError(
                f"config.json: unknown key {key} = {value!r}; it may change the model's mathematics, so it is "
                "refused; remove it if you know that it does not"
            )


def _rope(config: Mapping[str, Any]) -> tuple[float, YarnScaling | None]:
    """rope_theta and YaRN, from the official keys or from the `rope_parameters` that transformers 5 writes."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: rope_scaling is {scaling!r}; it must be an object or null")
    theta = config.get("rope_theta")
    take = _Taker({"rope_theta": scaling.get("rope_theta") if theta is None else theta})
    theta = take.number("rope_theta", 10000.0)
    _require(theta > 1, f"rope_theta is {theta!r}; it must be above 1")
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    if kind not in ("default", "yarn"):
        raise ConfigError(f"config.json: rope_scaling of type {kind!r} is not supported; supported: yarn")
    known = {"type", "rope_type", "rope_theta", *(YarnScaling.__dataclass_fields__ if kind == "yarn" else ())}
    for key, value in scaling.items():
        if key not in known and value is not None:
            raise ConfigError(f"config.json: rope_scaling of type {kind!r} has the unknown key {key} = {value!r}")
    return theta, _yarn(scaling) if kind == "yarn" else None


def _yarn(scaling: Mapping[str, Any]) -> YarnScaling:
    take = _Taker({key: value for key, value in scaling.items() if value is not None})
    # 0 asks for no m^2 in the softmax scale, as does leaving the key out.
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if (all_dim and not mscale) or (not all_dim and mscale not in (None, 1)):
        raise ConfigError(
            f"config.json: rope_scaling with mscale = {mscale!r} and mscale_all_dim = {all_dim!r}: readers of "
            "this format do not agree on what that means; give both or neither"
        )
    return YarnScaling(
        factor=take.number("factor"),
        original_max_position_embeddings=take.size("original_max_position_embeddings"),
        beta_fast=take.number("beta_fast", YarnScaling.beta_fast),
        beta_slow=take.number("beta_slow", YarnScaling.beta_slow),
        mscale=take.number("mscale", YarnScaling.mscale),
        mscale_all_dim=take.number("mscale_all_dim") if all_dim else YarnScaling.mscale_all_dim,
    )


def _quantization(value: Any) -> tuple[str | None, tuple[int, int] | None]:
    if value is None:
        return None, None
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: quantization_config is {value!r}; it must be an object")
    method = value.get("quant_method")
    if method in ("compressed-tensors", "expertpager"):
        return method, None
    if method == "bitsandbytes" and value.get("load_in_4bit") and value.get("bnb_4bit_quant_type") == "nf4":
        return method, None
    if method != "fp8":
        raise ConfigError(f"config.json: quant_method {method!r} is not supported; supported: fp8, compressed-tensors")
    if value.get("fmt", "e4m3") != "e4m3":
        raise ConfigError(f"config.json: fp8 format {value['fmt']!r} is not supported; supported: e4m3")
    block = value.get("weight_block_size")
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(type(b) is int and b > 0 for b in block):
        raise ConfigError(
            f"config.json: weight_block_size is {block!r}; fp8 needs two whole numbers such as [128, 128]"
        )
    return method, (block[0], block[1])


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ConfigError(f"config.json: eos_token_id is {value!r}; it must be a token id or a list of them")
    return tuple(ids)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 and mscale else 1.0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"config.json: {message}")
