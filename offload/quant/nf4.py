"""NF4 in the bytes of bitsandbytes: sixteen quantiles of a normal distribution, one fp32 scale per block.

Owns the layout and the decoder. The matrix is taken row after row and cut into blocks of 64; a block is its largest
magnitude (`absmax`) and 4-bit indices into the table below, two to a byte, the first of a pair in the high nibble.
Encoding is `bitsandbytes.functional.quantize_4bit` on the CPU, where it is a fixed sequence of elementwise operations:
the same bytes for any number of threads. Decoding is table times absmax in fp32, as bitsandbytes does it, in torch, so
that reading a store does not import bitsandbytes (seconds, and on some machines a search for CUDA).

Source: QLoRA (arXiv 2305.14314), appendix E.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from offload.quant.codec import Codec, TensorSpec, require_finite
from offload.types import align_up, ceil_div

TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The values of the sixteen codes, as fractions of absmax."""

STATE = "weight.quant_state.bitsandbytes__nf4"


class Nf4Codec(Codec):
    """`weight` uint8 [ceil(n / 2), 1], `weight.absmax` fp32 [ceil(n / block)] for n = rows * cols."""

    def __init__(self, block: int = 64) -> None:
        self.block = block
        self.name = f"nf4-b{block}"
        self.row_unit = block  # so many rows are whole blocks, whatever the number of columns

    def parts(self, rows: int, cols: int) -> tuple[TensorSpec, ...]:
        count = rows * cols
        return (
            TensorSpec("weight", torch.uint8, (ceil_div(count, 2), 1)),
            TensorSpec("weight.absmax", torch.float32, (ceil_div(count, self.block),)),
        )

    def fits(self, rows: int, cols: int) -> bool:
        return cols % self.block == 0

    def companions(self, rows: int, cols: int) -> dict[str, Tensor]:
        state = {"quant_type": "nf4", "blocksize": self.block, "dtype": "bfloat16", "shape": [rows, cols]}
        text = json.dumps(state).encode()
        # JSON may end in spaces: so tensors that follow stay aligned.
        padded = text.ljust(align_up(len(text), 64))
        return {"weight.quant_map": torch.tensor(TABLE), STATE: torch.tensor(list(padded), dtype=torch.uint8)}

    def shape_of(self, payload: tuple[int, ...], companion: Callable[[str], Tensor]) -> tuple[int, int]:
        rows, cols = json.loads(bytes(companion(STATE).tolist()))["shape"]
        return rows, cols

    def encode(
        self, weight: Tensor, method: str = "rtn", importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        require_finite(weight, self.name)
        from bitsandbytes.functional import quantize_4bit

        flat = weight.float().contiguous().cpu()
        codes, state = quantize_4bit(flat, blocksize=self.block, quant_type="nf4")
        return {"weight": codes, "weight.absmax": state.absmax}

    def decode(
        self, parts: Mapping[str, Tensor], rows: int, cols: int, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        count = rows * cols
        packed, absmax = parts["weight"].flatten(), parts["weight.absmax"]
        codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:count]
        values = torch.tensor(TABLE, device=codes.device)[codes.int()]
        whole = count - count % self.block
        values[:whole].view(-1, self.block).mul_(absmax[: whole // self.block].unsqueeze(1))
        values[whole:].mul_(absmax[-1:])
        return values.view(rows, cols).to(dtype)

    def rows_of(self, parts: Mapping[str, Tensor], rows: int, cols: int, ids: Tensor) -> Tensor:
        at = ids.unsqueeze(1) * cols + torch.arange(cols, device=ids.device)  # [T, cols] in the flat matrix
        packed = parts["weight"].flatten()[at // 2]
        codes = torch.where(at % 2 == 0, packed >> 4, packed & 15)
        values = torch.tensor(TABLE, device=ids.device)[codes.int()] * parts["weight.absmax"][at // self.block]
        return values.to(torch.bfloat16)
