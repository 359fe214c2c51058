"""Recipe files: shipped ones are sound, malformed ones refused, options win."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.recipe import make_recipe
from convert.recipe_files import RECIPES, read_recipe, recipe_names, with_recipe
from offload.errors import UsageError


def test_shipped_recipes() -> None:
    assert {"int4", "int4-all", "int4-small", "int8", "fp8"} <= set(recipe_names())
    for name in recipe_names():
        assert read_recipe(name).description, name
    assert make_recipe(**read_recipe("int4").values) == make_recipe()
    assert read_recipe(RECIPES / "fp8.toml").values == {"experts": "fp8", "resident": "fp8"}


def test_options_win_over_the_recipe() -> None:
    options = with_recipe("int4-small", {"experts": None, "resident": "fp8", "workers": 2})
    assert options == {
        **{"experts": "int4-g128", "resident": "fp8", "head": "int8-g128", "embedding": "int8-g128"},
        **{"scales": "ls", "workers": 2},
    }
    assert with_recipe(None, {"experts": None, "scales": "rtn"}) == {"scales": "rtn"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('experts = "int4-g32"\nresidnet = "fp8"', "line 2: key residnet is unknown; known: description"),
        ("# x\nexperts = 4", "line 2: key experts is 4: it must be text"),
        ('resident = "fp8"', "key experts is missing"),
        ('experts = "int5-g32"', "unknown codec 'int5-g32'"),
        ('experts = "int4-g32"\nhead = "int9"', "unknown codec 'int9'"),
        ('experts = "int4-g32"\nscales = "magic"', "unknown scale method"),
        ("experts =", "is not TOML"),
        ('experts = "int4-g32"\n[more]\na = 1', "line 2: key more is unknown"),
    ],
)
def test_malformed(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "r.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as fault:
        read_recipe(file)
    assert message in str(fault.value) and "r.toml" in str(fault.value)


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="there is no recipe best; shipped ones: fp8, int3, int4"):
        read_recipe("best")
