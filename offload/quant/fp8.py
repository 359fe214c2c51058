"""FP8 e4m3 with one fp32 scale per block: the format of the official checkpoint.

Owns encoding, decoding and the ragged block grid. The official file calls the scale
`weight_scale_inv` although it is the multiplier: W[i, j] = float(q[i, j]) * S[i // 128, j // 128].
The grid is the ceiling of shape / block: the quantiser pads, takes the scale and crops, so a block
at the edge may be partial and the block size can never be inferred from the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offload.errors import CodecError
from offload.quant.codec import Codec, TensorSpec, require_finite
from offload.types import ceil_div

E4M3_MAX = 448.0


class Fp8Codec(Codec):
    """`weight` float8_e4m3fn [rows, cols], `weight_scale` fp32 [ceil(rows/br), ceil(cols/bc)]."""

    def __init__(self, block_rows: int = 128, block_cols: int = 128) -> None:
        if block_rows < 1 or block_cols < 1:
            raise CodecError(f"fp8 needs a block size of at least 1x1, not {block_rows}x{block_cols}")
        self.block = (block_rows, block_cols)
        self.row_unit = block_rows
        self.name = "fp8" if self.block == (128, 128) else f"fp8-b{block_rows}x{block_cols}"

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of the scale tensor of a [rows, cols] weight."""
        return ceil_div(rows, self.block[0]), ceil_div(cols, self.block[1])

    def parts(self, rows: int, cols: int) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("weight", torch.float8_e4m3fn, (rows, cols)),
            TensorSpec("weight_scale", torch.float32, self.grid(rows, cols)),
        )

    def encode(
        self, weight: Tensor, method: str = "rtn", importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        require_finite(weight, self.name)
        w = weight.float()
        rows, cols = w.shape
        scale = self._block_amax(w).clamp_min(torch.finfo(torch.float32).tiny) / E4M3_MAX
        # Clamp before the cast: what an overflowing cast gives differs between torch versions.
        codes = (w / self.expand(scale, rows, cols)).clamp(-E4M3_MAX, E4M3_MAX)
        return {"weight": codes.to(torch.float8_e4m3fn), "weight_scale": scale}

    def decode(
        self, parts: Mapping[str, Tensor], rows: int, cols: int, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        codes = parts["weight"].float()
        return codes.mul_(self.expand(parts["weight_scale"].float(), rows, cols)).to(dtype)

    def rows_of(self, parts: Mapping[str, Tensor], rows: int, cols: int, ids: Tensor) -> Tensor:
        scale = parts["weight_scale"].index_select(0, ids // self.block[0])  # [T, blocks of columns]
        codes = parts["weight"].view(torch.uint8).index_select(0, ids).view(torch.float8_e4m3fn).float()
        wide = scale.float().repeat_interleave(self.block[1], 1)[:, :cols]
        return codes.mul_(wide).to(torch.bfloat16)

    def expand(self, scale: Tensor, rows: int, cols: int) -> Tensor:
        """`scale` repeated over its blocks and cropped to [rows, cols]."""
        br, bc = self.block
        return scale.repeat_interleave(br, 0)[:rows].repeat_interleave(bc, 1)[:, :cols]

    def _block_amax(self, w: Tensor) -> Tensor:
        rows, cols = w.shape
        grid_rows, grid_cols = self.grid(rows, cols)
        br, bc = self.block
        padded = torch.nn.functional.pad(w, (0, grid_cols * bc - cols, 0, grid_rows * br - rows))
        return padded.view(grid_rows, br, grid_cols, bc).abs().amax(dim=(1, 3))
