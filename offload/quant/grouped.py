"""Grouped integers in the `pack-quantized` layout of compressed-tensors: 8, 4, 3 and 2 bits, symmetric.

Owns the bit layout and the search for scales. Per row, `group` consecutive columns share one bf16
scale; the codes of a row, stored as code + 2^(b-1), are one stream of bits: code k takes the bits from
b * k on, bit i being bit i % 32 of the int32 word i // 32. On a little-endian machine that is: int4 has
the even column in the low nibble of each byte, int8 is one byte per code, and a code of 3 bits may lie
across two words. A last group shorter than `group` is legal here; readers of compressed-tensors want
whole groups (`fits`).

Scales: `rtn` spans the largest magnitude; `ls` tries several starting scales, refines each by least
squares for its own codes (s = sum(h w q) / sum(h q^2)) and keeps the one with the smallest squared
error, optionally weighted by `importance` h. Codes are always rounded against the bf16 scale that is
stored, never against the one that was searched. Every step is one fp32 operation in a fixed order
(sums fold a group in halves), so that a compiled encoder can give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.errors import CodecError
from offload.quant.codec import Codec, TensorSpec, require_finite
from offload.types import ceil_div

SCALE_METHODS = ("rtn", "ls")
_LS_SHRINK = (1.0, 0.93, 0.86, 0.79, 0.72)
"""Starting scales of the least-squares search, as fractions of the `rtn` scale."""


class GroupedIntCodec(Codec):
    """`weight_packed` int32 [rows, ceil(cols * bits / 32)], `weight_scale` bf16 [rows, ceil(cols / group)]."""

    def __init__(self, bits: int, group: int) -> None:
        self.bits = bits
        self.group = group
        self.name = f"int{bits}-g{group}"
        self.qmax = 2 ** (bits - 1) - 1
        self.offset = 2 ** (bits - 1)

    def parts(self, rows: int, cols: int) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("weight_packed", torch.int32, (rows, ceil_div(cols * self.bits, 32))),
            TensorSpec("weight_scale", torch.bfloat16, (rows, ceil_div(cols, self.group))),
        )

    def fits(self, rows: int, cols: int) -> bool:
        return cols % self.group == 0

    def companions(self, rows: int, cols: int) -> dict[str, Tensor]:
        return {"weight_shape": torch.tensor([rows, cols], dtype=torch.int64)}

    def shape_of(self, payload: tuple[int, ...], companion: Callable[[str], Tensor]) -> tuple[int, int]:
        rows, cols = companion("weight_shape").tolist()
        return rows, cols

    def encode(
        self, weight: Tensor, method: str = "rtn", importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        if method not in SCALE_METHODS:
            raise CodecError(f"unknown scale method {method!r}; known: {', '.join(SCALE_METHODS)}")
        require_finite(weight, self.name)
        rows, cols = weight.shape
        groups = pad(weight.float(), (0, -cols % self.group)).view(rows, -1, self.group)
        # Half a step past the last positive code: the extreme loses half a step, all others gain.
        scale = groups.abs().amax(dim=2, keepdim=True) / (self.qmax + 0.5)  # [rows, groups, 1]
        if method == "ls":
            scale = self._search(groups, scale, self._column_weights(importance, groups))
        scale = scale.to(torch.bfloat16)
        codes = self._round(groups, scale.float()).view(rows, -1)[:, :cols]
        return {"weight_packed": self.pack(codes), "weight_scale": scale.squeeze(2)}

    def decode(
        self, parts: Mapping[str, Tensor], rows: int, cols: int, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        codes = pad(self.unpack(parts["weight_packed"], cols), (0, -cols % self.group))
        scale = parts["weight_scale"].float().unsqueeze(2)
        weight = codes.view(rows, -1, self.group).float().mul_(scale)
        return weight.view(rows, -1)[:, :cols].to(dtype)

    def pack(self, codes: Tensor) -> Tensor:
        """int8 codes [rows, cols] as int32 words; columns beyond the last are zero bits."""
        biased = (codes + self.offset).to(torch.uint8) if self.bits < 8 else codes.view(torch.uint8) ^ 0x80
        biased = pad(biased, (0, -codes.shape[1] % 32))
        if self.bits == 4:
            biased = biased[:, 0::2] | (biased[:, 1::2] << 4)
        elif self.bits < 4:
            biased = self._pack_octets(biased)
        words = ceil_div(codes.shape[1] * self.bits, 32)
        return biased[:, : words * 4].contiguous().view(torch.int32)

    def _pack_octets(self, biased: Tensor) -> Tensor:
        """Every 8 codes as `bits` bytes, lowest code in the lowest bits; zeros where no code is."""
        octets = biased.view(biased.shape[0], -1, 8).to(torch.int32)
        stream = sum((octets[..., k] << (self.bits * k) for k in range(8)), torch.zeros((), dtype=torch.int32))
        return torch.stack([(stream >> (8 * i) & 0xFF) for i in range(self.bits)], dim=2).flatten(1).to(torch.uint8)

    def unpack(self, words: Tensor, cols: int) -> Tensor:
        """int8 codes [rows, cols] from int32 words."""
        raw = words.contiguous().view(torch.uint8)
        if self.bits == 4:
            raw = torch.stack((raw & 0x0F, raw >> 4), dim=2).flatten(1)
        elif self.bits < 4:
            raw = pad(raw, (0, -raw.shape[1] % self.bits)).view(raw.shape[0], -1, self.bits).to(torch.int32)
            stream = sum((raw[..., i] << (8 * i) for i in range(self.bits)), torch.zeros((), dtype=torch.int32))
            raw = torch.stack([stream >> (self.bits * k) & 2**self.bits - 1 for k in range(8)], dim=2).flatten(1)
        return (raw.to(torch.int16) - self.offset).to(torch.int8)[:, :cols]

    def _round(self, groups: Tensor, scale: Tensor) -> Tensor:
        """int8 codes [rows, groups, group] nearest to groups / scale."""
        # A zero scale means a zero group (or one too small for bf16): its codes are zero.
        inverse = torch.where(scale > 0, 1.0 / scale, 0.0).nan_to_num_(posinf=0.0)
        return (groups * inverse).round_().clamp_(-self.offset, self.qmax).to(torch.int8)

    def _search(self, groups: Tensor, start: Tensor, h: Tensor | None) -> Tensor:
        best_scale, best_error = start, torch.full_like(start, torch.inf)
        for shrink in _LS_SHRINK:
            q = self._round(groups, start * shrink).float()
            hq = q if h is None else q * h
            scale = _fold_sum(hq * groups) / _fold_sum(hq * q).clamp_min(1e-30)
            scale = scale.to(torch.bfloat16).float()
            residual = (groups - self._round(groups, scale).float() * scale).square_()
            error = _fold_sum(residual if h is None else residual * h)
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.where(better, error, best_error)
        return best_scale

    def _column_weights(self, importance: Tensor | None, groups: Tensor) -> Tensor | None:
        if importance is None:
            return None
        padded = pad(importance.float(), (0, groups.shape[1] * self.group - importance.numel()))
        return padded.view(1, -1, self.group)


def _fold_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension (a power of two), adding the upper half to the lower until one is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x
