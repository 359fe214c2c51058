"""Named recipes: TOML files that say which codec holds what, shared by `convert` and `plan`.

Owns reading and refusing them. A recipe file has the keys `description`, `experts`, `resident`, `head`, `embedding`
and `scales`; all but `experts` may be left out. Must not know checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.recipe import make_recipe
from offload.errors import CodecError, UsageError
from offload.toml_file import line_of, parse_toml, read_text

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "recipes"
"""The recipes that come with the program."""

_KEYS = ("description", "experts", "resident", "head", "embedding", "scales")


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe file. What it leaves out is chosen as by `convert` without that option."""

    name: str
    values: Mapping[str, Any]
    """experts, resident, head, embedding, scales as far as the file gives them."""
    description: str = ""


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(item.stem for item in RECIPES.glob("*.toml"))


def read_recipe(name: str | Path) -> NamedRecipe:
    """The shipped recipe called `name`, or the one in a file. Raises UsageError with file, line and key."""
    path = Path(name)
    if not path.exists() and path.name == str(name):
        path = RECIPES / (path.name if path.suffix == ".toml" else f"{path.name}.toml")
        if not path.exists():
            raise UsageError(f"there is no recipe {name}; shipped ones: {', '.join(recipe_names())}")
    text = read_text(path)
    values = parse_toml(text, str(path))
    for key, value in values.items():
        where = f"{path}, line {line_of(text, '', key)}: key {key}"
        if key not in _KEYS:
            raise UsageError(f"{where} is unknown; known: {', '.join(_KEYS)}")
        if not isinstance(value, str):
            raise UsageError(f"{where} is {value!r}: it must be text")
    if "experts" not in values:
        raise UsageError(f"{path}: key experts is missing")
    description = values.pop("description", "")
    try:
        make_recipe(**values)
    except (CodecError, UsageError) as fault:
        raise UsageError(f"{path}: {fault}") from None
    return NamedRecipe(path.stem, values, description)


def with_recipe(name: str | Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` of a conversion that are not None, over those of the recipe called `name`."""
    base = {} if name is None else dict(read_recipe(name).values)
    return base | {key: value for key, value in options.items() if value is not None}
