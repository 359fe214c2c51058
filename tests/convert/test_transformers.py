"""transformers with compressed-tensors loads a store as any checkpoint and sees the same weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convert.pipeline import convert
from convert.synthetic import TINY_CONFIG, write_checkpoint
from offload.store import Store
from offload.types import ExpertId

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig  # noqa: E402
from compressed_tensors.utils.match import match_name  # noqa: E402

# Whole groups of 128 everywhere, and 192 ragged rows of kv_a_proj_with_mqa.
WHOLE_GROUPS = {
    "moe_intermediate_size": 128,
    "intermediate_size": 384,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
}


def load(path: Path) -> dict[str, torch.Tensor]:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16,
        output_loading_info=True,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )
    assert not any(report.values()), report
    return model.state_dict()


@pytest.mark.parametrize(
    ("experts", "resident", "head", "embedding", "overrides"),
    [
        ("int4-g32", "int8-g128", "bf16", "bf16", WHOLE_GROUPS),
        ("int4-g32", "int8-g128", "bf16", "bf16", {}),  # some resident tensors stay bf16
        ("int4-g32", "fp8", "bf16", "bf16", {}),
        ("int4-g32", "bf16", "int8-g128", "bf16", {}),
        ("int8-g128", "fp8", "bf16", "bf16", WHOLE_GROUPS),
        ("int4-g128", "int8-g128", "int8-g128", "int8-g128", WHOLE_GROUPS),
        ("int4-g32", "int4-g32", "int4-g32", "int4-g32", WHOLE_GROUPS),
        ("int3-g32", "int8-g128", "bf16", "bf16", WHOLE_GROUPS),
        ("int2-g32", "int3-g32", "int3-g32", "bf16", WHOLE_GROUPS),
    ],
)
def test_weights_are_equal_bit_for_bit(
    tmp_path: Path, experts: str, resident: str, head: str, embedding: str, overrides: dict[str, int]
) -> None:
    sizes = {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2} | overrides
    source = write_checkpoint(tmp_path / "c", TINY_CONFIG, seed=2, **sizes)
    convert(source, tmp_path / "s", experts=experts, resident=resident, head=head, embedding=embedding)
    store = Store.open(tmp_path / "s")
    loaded = load(tmp_path / "s")

    codecs = store.manifest.resident_codecs
    assert set(codecs.values()) >= {resident}
    assert (codecs["lm_head"], codecs["model.embed_tokens"]) == (head, embedding)
    for module in store.manifest.resident_codecs:
        got = loaded[f"{module}.weight"]
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, store.resident(module).dequantize()), module

    width = store.config.moe_intermediate_size
    gate_up = loaded["model.layers.1.mlp.experts.gate_up_proj"]
    down = loaded["model.layers.1.mlp.experts.down_proj"]
    for expert in range(4):
        extent = store.locate(ExpertId(1, expert))
        raw = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
        ours = store.layout.views(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        assert torch.equal(gate_up[expert, :width], ours.gate_proj.dequantize())
        assert torch.equal(gate_up[expert, width:], ours.up_proj.dequantize())
        assert torch.equal(down[expert], ours.down_proj.dequantize())

    bias = loaded["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, store.tensor("model.layers.1.mlp.gate.e_score_correction_bias"))


def test_every_module_finds_its_scheme_where_codecs_differ(tmp_path: Path) -> None:
    """What config.json says is enough for compressed-tensors: scheme by module name, then its own decoder."""
    source = write_checkpoint(tmp_path / "c", TINY_CONFIG, seed=2, num_hidden_layers=2, **WHOLE_GROUPS)
    convert(source, tmp_path / "s", experts="int4-g128", resident="int4-g32", head="int8-g128", embedding="fp8")
    store = Store.open(tmp_path / "s")
    description = QuantizationConfig.model_validate(store.hf_config["quantization_config"])
    codecs = store.manifest.resident_codecs
    assert set(codecs.values()) == {"int4-g32", "int8-g128", "fp8"}
    for module in codecs:
        schemes = [
            group
            for group in description.config_groups.values()
            if any(match_name(module, target) for target in group.targets)
        ]
        assert len(schemes) == 1, module
        names = [spec.suffix for spec in store.resident(module).codec.parts(1, 1)]
        names += ["weight_shape"] if "weight_packed" in names else []
        tensors = {name: store.tensor(f"{module}.{name}") for name in names}
        compressor = BaseCompressor.get_value_from_registry(schemes[0].format)
        decoded = compressor.decompress(tensors, schemes[0])["weight"].to(torch.bfloat16)
        assert torch.equal(decoded, store.resident(module).dequantize()), module
