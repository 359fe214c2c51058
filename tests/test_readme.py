"""README says what was recorded and what exists."""

from __future__ import annotations

import re
from dataclasses import fields

import click
from click.testing import CliRunner

import cli
from benchmarks.embedded.train import Recipe
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


def test_options_named_in_the_docs_exist() -> None:
    """Every --option in README and docs is one of the command line's, or of a program in benchmarks."""
    parameters = [parameter for command in walk(cli.cli) for parameter in command.params]
    known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    known |= {f"--{field.name.replace('_', '-')}" for field in fields(Recipe)}
    programs = "".join(file.read_text(encoding="utf-8") for file in (README.parent / "benchmarks").rglob("*.py"))
    missing = [
        f"{page.name}: {option}"
        for page in (README, *(README.parent / "docs").glob("*.md"))
        for option in sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8"))))
        if option not in known and f'"{option}"' not in programs
    ]
    assert not missing


def walk(command: click.Command) -> list[click.Command]:
    """The command and all below it."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return [command, *(found for item in below for found in walk(item))]


def test_linked_files_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (README.parent / target).exists(), target
