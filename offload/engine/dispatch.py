"""Which layer goes to which device.

Owns the question to accelerate's device map and the check of its answer. Must not move anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from offload.errors import BudgetError
from offload.types import format_size


def dispatch_layers(layer_nbytes: Sequence[int], limits: Sequence[int], names: Sequence[str]) -> list[range]:
    """Consecutive layers per device, in proportion to the devices' `limits`, by accelerate's `infer_auto_device_map`.

    `layer_nbytes`: what each decoder layer keeps resident on its device, with its share of the KV cache. What a
    device has beyond that becomes expert slots, so a device with twice the memory gets twice the layers. Raises
    BudgetError when the layers do not fit the devices together, or a device would have none.
    """
    total, room = sum(layer_nbytes), sum(limits)
    if len(limits) == 1:
        return [range(len(layer_nbytes))]
    if total > room:
        raise BudgetError(
            f"the resident weights and KV cache of {len(layer_nbytes)} layers take {format_size(total)}, the "
            f"devices {', '.join(names)} have {format_size(room)} together; give more --vram or a smaller --context"
        )
    # The map keeps room on the first device for one more layer, which it may use in the end or not.
    spares = (max(layer_nbytes), 0)
    ranges = next(filter(all, (_ask(layer_nbytes, limits, spare) for spare in spares)), None)
    if ranges is None:
        raise BudgetError(
            f"{len(layer_nbytes)} layers of up to {format_size(max(layer_nbytes))} leave one of the devices "
            f"{', '.join(names)} without any; use fewer devices"
        )
    for owned, limit, name in zip(ranges, limits, names, strict=True):
        need = sum(layer_nbytes[layer] for layer in owned)
        if need > limit:
            raise BudgetError(
                f"{name} has {format_size(limit)}; its share of the layers, {len(owned)} of {len(layer_nbytes)}, takes "
                f"{format_size(need)}; give more --vram or use fewer devices"
            )
    return ranges


def _ask(layer_nbytes: Sequence[int], limits: Sequence[int], spare: int) -> list[range]:
    """accelerate's answer for memory in proportion to `limits`; the last device takes what is left."""
    from accelerate import infer_auto_device_map

    total, room = sum(layer_nbytes), sum(limits)
    memory: dict[int | str, int | str] = {n: round(limit * total / room) for n, limit in enumerate(limits)}
    memory[0] = round(limits[0] * total / room) + spare
    memory[len(limits) - 1] = 2 * total
    placed = infer_auto_device_map(_skeleton(layer_nbytes), max_memory=memory, no_split_module_classes=["_Layer"])
    whole = placed.get("", placed.get("layers"))  # everything on one device comes as one entry
    owner = [placed.get(f"layers.{layer}", whole) for layer in range(len(layer_nbytes))]
    return [
        range(owner.index(n), owner.index(n) + owner.count(n)) if n in owner else range(0) for n in range(len(limits))
    ]


class _Layer(nn.Module):
    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(nbytes, dtype=torch.uint8, device="meta"), requires_grad=False)


def _skeleton(layer_nbytes: Sequence[int]) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(_Layer(nbytes) for nbytes in layer_nbytes)
    return model
