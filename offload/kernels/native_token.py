"""One token through the layers of a model, over memory that stays where it is.

Owns what is the same for every token: buffers, descriptions and the calls themselves, whose arguments are put
together once. With code and data out of the processor's caches, as between two weights, checking tensors and making
new ones for every call takes longer than some of the calls. Must not know models, tiers or how the kernels work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import byref, c_int64, c_uint64
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offload.errors import KernelError
from offload.kernels.native_library import Moe

Describe = Callable[[Any], Any]


class Ends(NamedTuple):
    """Pointers to the descriptions of embedding and head, and what is between head and layers."""

    embed: Any
    head: Any
    norm: int
    """Address of its weight."""
    eps: float
    vocab: int
    """Rows of embedding and head."""


class NativeToken:
    """Satisfies `OneToken` with the calls of the native library."""

    def __init__(
        self,
        library: Any,
        context: Any,
        attention: Sequence[Any],
        moe: Sequence[Moe | None],
        ends: Ends,
        sizes: tuple[int, int, int, int],
        describe: Describe,
    ) -> None:
        """Per layer a pointer to the description of its attention, and the description of its MoE block or None.
        `sizes`: width of the hidden state, of a cache row and of a rotation, experts per token. `describe`: the
        library's words for a layout of experts."""
        width, self._latent, half, k = sizes
        self._library, self._context = library, context
        self._describe = describe
        self._attention, self._moe = attention, [None if block is None else byref(block) for block in moe]
        self.hidden, self.attended, self.x, self._final = (torch.zeros(1, width) for _ in range(4))
        self._vocab = ends.vocab
        self._embed = partial(library.ep_embed, context, ends.embed)
        rows = self.hidden.data_ptr(), self._final.data_ptr()
        self._head = partial(library.ep_head_begin, context, ends.head, ends.norm, ends.eps, *rows)
        self.weights = torch.zeros(1, k)
        self._angles = torch.zeros(1, half), torch.zeros(1, half)
        self._chosen = (c_int64 * k)()
        self.ids = torch.frombuffer(self._chosen, dtype=torch.int64).view(1, k)
        self._bases: Any = (c_uint64 * k)()
        self._start, self._mark = c_int64(), c_uint64()
        results = self.x.data_ptr(), self.ids.data_ptr(), self.weights.data_ptr(), byref(self._mark)
        self._routes = [
            partial(library.ep_moe_begin, context, block, self.attended.data_ptr(), 1, *results) for block in self._moe
        ]
        self._normed, self._early_weights = torch.zeros(1, width), torch.zeros(1, k)
        self._early = (c_int64 * k)()
        self._norms = [None if block is None else self._norm_of(block) for block in moe]
        self._routers = [None if block is None else self._router_of(block) for block in moe]
        self._attends: list[Callable[[], int]] = []
        self._finishes: list[Callable[[], int]] = []
        self._caches: Sequence[Tensor] | None = None
        self._capacity = 0
        self._layout: Any = None

    def begin(self, token_id: int, cos: Tensor, sin: Tensor, caches: Sequence[Tensor], start: int) -> None:
        if not 0 <= token_id < self._vocab:
            raise KernelError(f"token {token_id} is none of the {self._vocab} of the embedding")
        if caches is not self._caches:
            self._bind(caches)
        if start >= self._capacity:
            raise KernelError(f"the latent cache has {self._capacity} rows, this call needs {start + 1}")
        self._embed(token_id, self.hidden.data_ptr())
        self._angles[0].copy_(cos)
        self._angles[1].copy_(sin)
        self._start.value = start

    def attention(self, index: int) -> None:
        bad = self._attends[index]()
        if bad:
            raise not_finite(bad)

    def route(self, index: int) -> list[int]:
        bad = self._routes[index]()
        if bad:
            raise not_finite(bad)
        return self._chosen[:]

    def finish(self, index: int, layout: Any, addresses: list[int]) -> None:
        if layout is not self._layout:
            self._lay_out(layout)
        self._bases[:] = addresses
        bad = self._finishes[index]()
        if bad:
            raise not_finite(bad)

    def end(self, index: int, routed: Tensor) -> None:
        if routed.shape != self.hidden.shape or routed.dtype is not torch.float32 or not routed.is_contiguous():
            raise KernelError(f"expected contiguous float32 {tuple(self.hidden.shape)}, not {tuple(routed.shape)}")
        rows = self.attended.data_ptr(), self.x.data_ptr(), routed.data_ptr()
        bad = self._library.ep_moe_end(
            self._context, self._moe[index], *rows, 1, self._mark, self.hidden.data_ptr()
        )
        if bad:
            raise not_finite(bad)

    def begin_head(self) -> None:
        bad = self._head()
        if bad:
            raise not_finite(bad)

    def logits(self) -> Tensor:
        out = self.hidden.new_empty(1, self._vocab)
        self._library.ep_head_end(self._context, out.data_ptr())
        return out

    def early(self, index: int) -> list[int]:
        norm, router = self._norms[index], self._routers[index]
        assert norm is not None and router is not None, "only MoE layers have a router"
        norm()
        bad = router()
        if bad:
            raise not_finite(bad)
        return self._early[:]

    def _norm_of(self, block: Moe) -> Callable[[], None]:
        width, normed = self.hidden.shape[1], self._normed.data_ptr()
        row = self.hidden.data_ptr(), block.norm, block.eps
        return partial(self._library.ep_rms_norm, self._context, *row, 1, width, normed)

    def _router_of(self, block: Moe) -> Callable[[], int]:
        config, weights = byref(block.config), (block.router.payload, block.bias)
        row, results = (self._normed.data_ptr(), 1, self.hidden.shape[1]), (self._early, self._early_weights.data_ptr())
        return partial(self._library.ep_router_topk, self._context, config, *row, *weights, *results)

    def _bind(self, caches: Sequence[Tensor]) -> None:
        for cache in caches:
            if cache.dtype is not torch.float32 or not cache.is_contiguous() or cache.shape[1] != self._latent:
                raise KernelError(
                    f"expected contiguous float32 [.., {self._latent}], not {cache.dtype} {tuple(cache.shape)}"
                )
        rows = self.hidden.data_ptr(), *(part.data_ptr() for part in self._angles)
        out = self.attended.data_ptr()
        self._attends = [
            partial(self._library.ep_attention, self._context, layer, *rows, 1, self._start, cache.data_ptr(), out)
            for layer, cache in zip(self._attention, caches, strict=True)
        ]
        self._capacity = min(cache.shape[0] for cache in caches)
        self._caches = caches  # held, so that the addresses stay theirs

    def _lay_out(self, layout: Any) -> None:
        described, width = self._describe(layout), self.hidden.shape[1]
        if (described[0].cols, described[2].rows) != (width, width):
            raise KernelError(f"experts {described[0].cols} wide do not fit a hidden state of {width}")
        chosen = self.ids.data_ptr(), self.weights.data_ptr(), len(self._chosen)
        rows = self.attended.data_ptr(), self.x.data_ptr(), self._mark, self.hidden.data_ptr()
        self._finishes = [
            partial(self._library.ep_moe_finish, self._context, block, described, self._bases, *chosen, *rows)
            for block in self._moe
        ]
        self._layout = layout


def not_finite(row: int) -> KernelError:
    """What the library means by the number of a row."""
    return KernelError(
        f"activations of row {row - 1} hold NaN or infinity: the model overflowed or its weights are damaged; "
        "check the store with `expertpager verify`"
    )
