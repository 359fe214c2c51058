"""Which decoder layers a run converts (`--only-layers`).

Owns reading and writing such a choice: `all`, `0-30`, `3,7,40-60`. Must not know files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from offload.errors import UsageError

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def parse_layers(text: str, layers: Sequence[int]) -> list[int]:
    """The decoder layers out of `layers` (rising) that `text` names. Raises UsageError for anything else."""
    if text.strip() == "all":
        return list(layers)
    wanted: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match:
            raise UsageError(f"--only-layers: cannot read {part.strip()!r}; write all, 0-30 or 3,7,40-60")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last > layers[-1]:
            raise UsageError(
                f"--only-layers: {part.strip()} is no range of this model's layers {format_layers(layers)}"
            )
        wanted.update(range(first, last + 1))
    return [layer for layer in layers if layer in wanted]


def format_layers(layers: Iterable[int]) -> str:
    """`layers` in the same words: 0-2, 7."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
