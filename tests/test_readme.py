"""README says what was recorded and what exists."""

from __future__ import annotations

import re

from click.testing import CliRunner

import cli
from benchmarks.measured import BEGIN, END, README, table


def test_the_table_is_that_of_the_recorded_rows() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == table(), "run python benchmarks/measured.py"


def test_commands_of_the_readme_exist() -> None:
    text = README.read_text(encoding="utf-8")
    named = set(re.findall(r"^expertpager (\w+)", text, flags=re.MULTILINE))
    assert named and named <= set(cli.cli.commands)
    for line in re.findall(r"^expertpager .*?(?=\s{2,}#|$)", text, flags=re.MULTILINE):
        words = line.split()[1:]
        known = CliRunner().invoke(cli.cli, [words[0], "--help"]).output
        assert all(option in known for option in words if option.startswith("-")), line


def test_linked_files_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (README.parent / target).exists(), target
