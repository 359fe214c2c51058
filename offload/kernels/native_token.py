"""One token through the layers of a model, over memory that stays where it is.

Owns what is the same for every token: buffers, descriptions and the calls themselves, whose arguments are put
together once. With code and data out of the processor's caches, as between two weights, checking tensors and making
new ones for every call takes longer than some of the calls. Must not know models, tiers or how the kernels work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import addressof, byref, c_int64
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offload.errors import KernelError
from offload.kernels.api import Residents
from offload.kernels.native_library import Attention, Layer, Moe, Token, Where

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
        attention: Sequence[Attention],
        blocks: Sequence[Moe],
        ends: Ends,
        sizes: tuple[int, int, int, int],
        describe: Describe,
    ) -> None:
        """Per layer the descriptions of its two blocks. `sizes`: width of the hidden state, of a cache row and of a
        rotation, experts per token. `describe`: the library's words for a layout of experts."""
        width, self._latent, half, k = sizes
        self._library, self._context = library, context
        self._describe = describe
        self._blocks = blocks
        self.hidden, self.attended, self.x, self._final = (torch.zeros(1, width) for _ in range(4))
        self.weights, self._angles = torch.zeros(1, k), (torch.zeros(1, half), torch.zeros(1, half))
        count = len(blocks)
        self._k, self._chosen = k, (c_int64 * (k * count))()
        self._ids = torch.frombuffer(self._chosen, dtype=torch.int64).view(count, 1, k)
        # The descriptions are held by who made them, for as long as there are kernels.
        pairs = zip(attention, blocks, strict=True)
        self._layers = (Layer * count)(*[Layer(addressof(first), addressof(second), None) for first, second in pairs])
        tensors = *self._angles, self.hidden, self.attended, self.x, self.weights, self._ids
        self._token = Token(addressof(self._layers), *(tensor.data_ptr() for tensor in tensors))
        self._stopped, self._where = c_int64(), Where()
        self._at, token = byref(self._stopped), byref(self._token)
        self._anywhere = partial(library.ep_layers, context, token, byref(self._where))
        self._nowhere = partial(library.ep_layers, context, token, None)
        self._vocab = ends.vocab
        self._embed = partial(library.ep_embed, context, ends.embed)
        rows = self.hidden.data_ptr(), self._final.data_ptr()
        self._head = partial(library.ep_head_begin, context, ends.head, ends.norm, ends.eps, *rows)
        self._normed, self._early_weights = torch.zeros(1, width), torch.zeros(1, k)
        self._early = (c_int64 * k)()
        self._norms = [self._norm_of(block) for block in blocks]
        self._routers = [self._router_of(block) for block in blocks]
        self._caches: Sequence[Tensor] | None = None
        self._capacity = 0
        self._residents: Residents | None = None

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
        self._token.start = start

    def run(self, first: int, last: int, residents: Residents | None, routed: bool = False) -> int:
        if residents is None:
            call = self._nowhere
        else:
            if residents is not self._residents:
                self._look_up(residents)
            call = self._anywhere
        bad = call(first, last, routed, self._at)
        if bad:
            raise not_finite(bad)
        return self._stopped.value

    def ids(self, index: int) -> Tensor:
        return self._ids[index]

    def chosen(self, index: int) -> list[int]:
        return self._chosen[index * self._k : (index + 1) * self._k]

    def end(self, index: int, routed: Tensor) -> None:
        if routed.shape != self.hidden.shape or routed.dtype is not torch.float32 or not routed.is_contiguous():
            raise KernelError(f"expected contiguous float32 {tuple(self.hidden.shape)}, not {tuple(routed.shape)}")
        rows = self.attended.data_ptr(), self.x.data_ptr(), routed.data_ptr()
        bad = self._library.ep_moe_end(
            self._context, byref(self._blocks[index]), *rows, 1, self._token.mark, self.hidden.data_ptr()
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
        assert router is not None, "only MoE layers have a router"
        norm()
        bad = router()
        if bad:
            raise not_finite(bad)
        return self._early[:]

    def _norm_of(self, block: Moe) -> Callable[[], None]:
        width, normed = self.hidden.shape[1], self._normed.data_ptr()
        row = self.hidden.data_ptr(), block.norm, block.eps
        return partial(self._library.ep_rms_norm, self._context, *row, 1, width, normed)

    def _router_of(self, block: Moe) -> Callable[[], int] | None:
        if not block.router.rows:
            return None
        config, weights = byref(block.config), (byref(block.router), block.bias)
        row, results = (self._normed.data_ptr(), 1), (self._early, self._early_weights.data_ptr())
        return partial(self._library.ep_router_topk, self._context, config, *row, *weights, *results)

    def _bind(self, caches: Sequence[Tensor]) -> None:
        for cache in caches:
            if cache.dtype is not torch.float32 or not cache.is_contiguous() or cache.shape[1] != self._latent:
                raise KernelError(
                    f"expected contiguous float32 [.., {self._latent}], not {cache.dtype} {tuple(cache.shape)}"
                )
        for layer, cache in zip(self._layers, caches, strict=True):
            layer.cache = cache.data_ptr()
        self._capacity = min(cache.shape[0] for cache in caches)
        self._caches = caches  # held, so that the addresses stay theirs

    def _look_up(self, residents: Residents) -> None:
        """Experts are where `residents` says from now on."""
        described, width = self._describe(residents.layout), self.hidden.shape[1]
        if (described[0].cols, described[2].rows) != (width, width):
            raise KernelError(f"experts {described[0].cols} wide do not fit a hidden state of {width}")
        slots, addresses, first = residents.slots, residents.addresses, residents.first
        moe = {index: block for index, block in enumerate(self._blocks) if block.router.rows}
        experts = {block.router.rows for block in moe.values()}
        if list(moe) != list(range(first, first + slots.shape[0])) or experts != {slots.shape[1]}:
            raise KernelError(f"a table of {slots.shape} experts from layer {first} on does not fit layers {list(moe)}")
        if slots.dtype != np.int32 or addresses.dtype != np.uint64 or not slots.flags.c_contiguous:
            raise KernelError(f"expected contiguous slots in int32 and addresses in uint64, not {slots.dtype}")
        where = self._where
        where.layout, where.first = addressof(described), first
        where.slots, where.addresses = slots.ctypes.data, addresses.ctypes.data
        self._residents = residents  # held, as are its tables


def not_finite(row: int) -> KernelError:
    """What the library means by the number of a row."""
    return KernelError(
        f"activations of row {row - 1} hold NaN or infinity: the model overflowed or its weights are damaged; "
        "check the store with `expertpager verify`"
    )
