"""How a weight of each format is handed to kernels: its kind, its grid of scales, its bytes as words.

Owns the mapping from codecs to kernel constants. Must not decode anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from offload.kernels.device import SlabLayout
from offload.kernels.triton.rows import BF16, FP8, INT2, INT3, INT4, INT8, MAGIC, NF4
from offload.quant import Codec, QuantizedTensor
from offload.quant.fp8 import Fp8Codec
from offload.quant.grouped import GroupedIntCodec
from offload.quant.nf4 import TABLE, Nf4Codec
from offload.types import align_up, ceil_div


@dataclass(frozen=True)
class Format:
    """The constants of a codec's kernels. `group` columns and `block_rows` rows share a scale."""

    kind: int
    bits: int
    group: int
    block_rows: int
    payload: str
    scale: str | None
    scale_dtype: torch.dtype

    @property
    def per_word(self) -> int:
        """Columns that lie in a word; of int3, those that lie in it whole."""
        return 32 // self.bits

    def row_words(self, cols: int) -> int:
        return ceil_div(cols * self.bits, 32)

    def x_words(self, cols: int) -> int:
        """Elements between column i and column i + 1 of a word in a vector that is `arranged` (rows.py)."""
        return align_up(self.row_words(cols), 4)

    def x_width(self, cols: int) -> int:
        """Elements of such a vector."""
        return align_up(cols, 4) if self.kind == INT3.value else self.per_word * self.x_words(cols)

    def x_cols(self, cols: int) -> int:
        """Columns of such a vector that are read: to the end of the last word."""
        return cols if self.kind == INT3.value else self.per_word * self.row_words(cols)

    def scale_cols(self, cols: int) -> int:
        return ceil_div(cols, self.group)

    def raw_row(self, cols: int) -> int:
        """Elements of `raw_dtype` from one row to the next."""
        return cols if self.kind == BF16.value else 4 * self.row_words(cols)

    def aid(self, device: torch.device) -> Tensor | int:
        """What kernels on `device` need for decoding besides the bytes."""
        return _table(device) if self.kind == NF4.value else MAGIC

    @property
    def halves(self) -> bool:
        """Whether tensor-core kernels want even columns before odd ones."""
        return self.bits == 4

    @property
    def raw_dtype(self) -> torch.dtype:
        """What tensor-core kernels load."""
        return torch.bfloat16 if self.kind == BF16.value else torch.uint8

    @property
    def rows_meta(self) -> dict[str, int]:
        """Constants of the kernels on words."""
        return {"KIND": self.kind, "PER_WORD": self.per_word, "GROUP": self.group, "BLOCK_ROWS": self.block_rows}

    @property
    def tiles_meta(self) -> dict[str, int]:
        """Constants of the kernels on tensor cores."""
        return {"KIND": self.kind, "GROUP": self.group, "BLOCK_ROWS": self.block_rows}


@lru_cache(maxsize=64)
def format_of(codec: Codec, cols: int) -> Format | None:
    """The format of weights with `cols` columns, None where the kernels do not read them as they lie."""
    if isinstance(codec, GroupedIntCodec):
        kind = _INTEGERS[codec.bits]
        return Format(kind, codec.bits, codec.group, 1, "weight_packed", "weight_scale", torch.bfloat16)
    if isinstance(codec, Nf4Codec) and cols % codec.block == 0:  # else a block goes on in the next row
        return Format(NF4.value, 4, codec.block, 1, "weight", "weight.absmax", torch.float32)
    if isinstance(codec, Fp8Codec) and cols % 4 == 0 and _power_of_two(codec.block[1]) and codec.block[1] >= 16:
        rows, group = codec.block
        return Format(FP8.value, 8, group, rows, "weight", "weight_scale", torch.float32)
    if codec.name == "bf16" and cols % 2 == 0:
        return Format(BF16.value, 16, 8, 1, "weight", None, torch.bfloat16)
    return None


_INTEGERS = {8: INT8.value, 4: INT4.value, 3: INT3.value, 2: INT2.value}


@lru_cache(maxsize=16)
def _table(device: torch.device) -> Tensor:
    return torch.tensor(TABLE, device=device)


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


@dataclass(frozen=True)
class Packed:
    """A resident weight [rows, cols] as kernels read it."""

    format: Format
    rows: int
    cols: int
    payload: Tensor
    scale: Tensor

    @property
    def words(self) -> Tensor:
        return self.payload.view(torch.int32)

    @property
    def raw(self) -> Tensor:
        return self.payload.view(self.format.raw_dtype)


def pack(weight: QuantizedTensor) -> Packed | None:
    """`weight` for the kernels; None where they cannot read it."""
    form = format_of(weight.codec, weight.cols)
    if form is None:
        return None
    payload = weight.parts[form.payload].view(-1)
    scale = payload if form.scale is None else weight.parts[form.scale]
    return Packed(form, weight.rows, weight.cols, payload, scale)


@dataclass(frozen=True)
class PackedExperts:
    """Where the six parts of an expert begin in a slot, in elements of words, raw bytes and scales."""

    up: Format  # gate and up
    down: Format
    payload: dict[str, int]  # bytes
    scale: dict[str, int]  # elements of the scale's type


@lru_cache(maxsize=64)
def pack_experts(layout: SlabLayout) -> PackedExperts | None:
    """The experts of a layout for the kernels; None where they cannot read them."""
    up, down = (format_of(layout.codec, cols) for cols in (layout.hidden_size, layout.moe_intermediate_size))
    if up is None or down is None:
        return None
    offsets = {(item.projection, item.suffix): item.offset for item in layout.fields}
    payload = {p: at for (p, suffix), at in offsets.items() if suffix == up.payload}
    size = up.scale_dtype.itemsize
    scale = {p: offsets[p, up.scale] // size if up.scale else 0 for p in payload}
    return PackedExperts(up, down, payload, scale)
