"""bf16: the weight as it is. Owns nothing but the pass-through."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offload.quant.codec import Codec, TensorSpec, require_finite


class Bf16Codec(Codec):
    """`weight` bf16 [rows, cols]."""

    name = "bf16"

    def parts(self, rows: int, cols: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", torch.bfloat16, (rows, cols)),)

    def encode(
        self, weight: Tensor, method: str = "rtn", importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        require_finite(weight, self.name)
        return {"weight": weight.to(torch.bfloat16)}

    def decode(
        self, parts: Mapping[str, Tensor], rows: int, cols: int, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        return parts["weight"].to(dtype)
