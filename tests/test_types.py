"""Sizes in text: exact, and refused when they mean nothing."""

from __future__ import annotations

import pytest

from offload.errors import UsageError
from offload.types import parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 << 30),
        ("24GB", 24 * 10**9),
        (" 1.5 mib ", 3 << 19),
        ("4096", 4096),
        (4096, 4096),
        ("9007199254740993", 2**53 + 1),  # a float would round it
        ("8388607.5TiB", (1 << 63) - (1 << 39)),
    ],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "GB", "1e9", "-1", "0", "0.0001B", "1.GB", "٣GB", "nan", "8388608TiB", "9" * 400 + "GB", "9" * 5000, 2**63],
)
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)
