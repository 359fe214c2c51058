"""Addresses: the published numbers for DeepSeek-V3, alignment, and one expert = one contiguous extent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from offload.quant import get_codec
from offload.store.layout import ExpertLayout, LayerFile
from offload.store.writer import LayerFileWriter
from offload.types import PAGE, PROJECTIONS

# Bytes per expert of DeepSeek-V3 (hidden 7168, width 2048).
STRIDES = {
    "int4-g32": 24_772_608,
    "int4-g128": 22_708_224,
    "int3-g32": 19_267_584,
    "int2-g32": 13_762_560,
    "nf4-b64": 24_772_608,
    "int8-g128": 44_728_320,
    "fp8": 44_050_944,
}


@pytest.mark.parametrize(("codec", "stride"), STRIDES.items())
def test_expert_sizes_of_deepseek_v3(codec: str, stride: int) -> None:
    layout = ExpertLayout(get_codec(codec), 7168, 2048)
    assert layout.stride == stride
    if codec != "fp8":
        assert layout.slot_nbytes == stride  # a whole number of pages: direct I/O needs no slack


def test_field_offsets_of_the_default_codec() -> None:
    fields = ExpertLayout(get_codec("int4-g32"), 7168, 2048).fields
    assert [(f.projection, f.suffix, f.offset) for f in fields] == [
        ("gate_proj", "weight_packed", 0),
        ("up_proj", "weight_packed", 7_340_032),
        ("down_proj", "weight_packed", 14_680_064),
        ("gate_proj", "weight_scale", 22_020_096),
        ("up_proj", "weight_scale", 22_937_600),
        ("down_proj", "weight_scale", 23_855_104),
    ]


@pytest.mark.parametrize("codec", ["int4-g32", "int8-g128", "int3-g32", "int2-g32", "nf4-b64", "fp8", "bf16"])
@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (96, 33), (7, 5)])
def test_a_written_layer_file_is_a_safetensors_file_with_experts_back_to_back(
    tmp_path: Path, codec: str, hidden: int, width: int
) -> None:
    layout = ExpertLayout(get_codec(codec), hidden, width)
    file = LayerFile(3, 5, layout, "weight_scale_inv" if codec == "fp8" else "weight_scale")
    weights = {(e, p): torch.randn(layout.shape(p)) for e in range(5) for p in PROJECTIONS}
    writer = LayerFileWriter(tmp_path, file)
    for expert in (4, 0, 2, 1, 3):  # any order
        writer.write_expert(expert, {p: layout.codec.encode(weights[expert, p]) for p in PROJECTIONS})
    writer.finish()

    path = tmp_path / file.name
    raw = path.read_bytes()
    assert len(raw) == file.nbytes and file.data_start % PAGE == 0
    with safe_open(path, "pt") as handle:
        for expert in range(5):
            start = file.offset(expert)
            views = layout.views(torch.frombuffer(bytearray(raw[start : start + layout.stride]), dtype=torch.uint8))
            for projection in PROJECTIONS:
                module = f"model.layers.3.mlp.experts.{expert}.{projection}"
                ours = views.projections[projection]
                for suffix, part in ours.parts.items():
                    name = file.scale_suffix if suffix == "weight_scale" else suffix
                    assert torch.equal(handle.get_tensor(f"{module}.{name}").view(torch.uint8), part.view(torch.uint8))
                expected = layout.codec.encode(weights[expert, projection])
                assert torch.equal(ours.dequantize(), layout.codec.decode(expected, *layout.shape(projection)))
                if layout.codec.name.startswith("int"):
                    assert handle.get_tensor(f"{module}.weight_shape").tolist() == list(layout.shape(projection))


def test_a_slot_has_room_for_the_enclosing_pages_of_any_expert() -> None:
    layout = ExpertLayout(get_codec("fp8"), 7168, 2048)
    file = LayerFile(3, 256, layout)
    for expert in range(256):
        start = file.offset(expert)
        first, last = start // PAGE * PAGE, -(-(start + layout.stride) // PAGE) * PAGE
        assert last - first <= layout.slot_nbytes
