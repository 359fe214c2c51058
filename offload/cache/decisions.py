"""What `residency` answers: which experts are there, which have to be read and into which slots.

Owns the records alone, for those who carry decisions out or charge them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple


class Load(NamedTuple):
    """Read `expert` into `slot`. The bytes of `victim` (a key, or -1) there are given up."""

    expert: int
    slot: int
    victim: int


class Decision(NamedTuple):
    """What one wave of a layer needs. All its slots are pinned until `release`."""

    layer: int
    hits: list[tuple[int, int]]
    """(expert, slot) whose bytes are there."""
    joins: list[tuple[int, int]]
    """(expert, slot) that a prefetch is already reading."""
    loads: list[Load]
    slots: list[int]
    """All slots this decision pins; none if nothing could be decided before others are released."""


class Service(NamedTuple):
    """A layer whose first wave is under way."""

    held: Decision
    waiting: list[int]
    """Experts that no wave has taken up yet."""

    @property
    def layer(self) -> int:
        """Whose experts they are."""
        return self.held.layer


# What Load(...) and the others do, in half the time.
new_load = partial(tuple.__new__, Load)
new_decision = partial(tuple.__new__, Decision)
new_service = partial(tuple.__new__, Service)
