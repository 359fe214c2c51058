"""DeepSeek-V3 in every shipped recipe, from the header listing that comes with the program: built once, read only."""

from __future__ import annotations

import pytest

from convert.footprint import Footprint, of_checkpoint
from convert.listing import FOLDER, load_listing
from convert.recipe_files import read_recipe, recipe_names
from convert.source import Checkpoint


@pytest.fixture(scope="session")
def v3_checkpoint() -> Checkpoint:
    return Checkpoint(load_listing(FOLDER / "deepseek-v3.json.xz"))


@pytest.fixture(scope="session")
def v3(v3_checkpoint: Checkpoint) -> dict[str, Footprint]:
    """Footprints by recipe."""
    return {item.recipe: item for item in of_checkpoint(v3_checkpoint, [read_recipe(n) for n in recipe_names()])}
