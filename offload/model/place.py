"""Where layers are computed. Must not know what kind of device a place is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """A device as the model sees it. Everything on it is computed within `scope`."""

    device: torch.device
    scope: Callable[[], AbstractContextManager[None]] = nullcontext
    record: Callable[[Callable[[], None]], Callable[[], None]] = lambda work: work
    """Makes work over tensors that stay where they are cheap to repeat: a captured graph, where there are graphs."""
    call: Callable[[Callable[[], Tensor]], Tensor] = lambda work: work()
    """Torch calls outside of recordings, which follow all of them."""
    sender: Callable[[Tensor], Callable[[Tensor], object]] = lambda target: target.copy_
    """For a tensor that stays where it is: what fills it, in order with all else, from one in host memory, which is
    free to change at once."""
