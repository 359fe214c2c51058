"""TOML files that users write: machine files, profiles, recipes.

Owns reading them and naming the line of a key. Must not know what keys mean.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from offload.errors import UsageError


def read_text(path: Path) -> str:
    """The text of `path`, without the byte order mark that some editors put first. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise UsageError(f"{path} cannot be read: {fault.strerror}") from None
    except UnicodeDecodeError as fault:
        raise UsageError(f"{path} cannot be read: it is no text in UTF-8, from byte {fault.start} on") from None


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """What the TOML `text` holds; `where` names it in messages. Raises UsageError."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as fault:  # ValueError: also numbers of thousands of digits
        raise UsageError(f"{where} is not TOML: {fault}") from None


def dotted(section: str, key: str) -> str:
    """`section`.`key`, the section "" being the top level."""
    return f"{section}.{key}" if section else key


# What lines must not be looked for in: texts of several lines, and comments. Single-line texts keep both at bay.
_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"""|' r"'''.*?'''|" r'"(?:\\.|[^"\\\n])*"|' r"'[^'\n]*'|" r"#[^\n]*", re.DOTALL
)
_HEADER = re.compile(r"\s*\[\[?([^\[\]]+)\]\]?\s*$")
_KEY = re.compile(r"\s*((?:[\w-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[\w-]+|\"[^\"]*\"|'[^']*'))*)\s*=")


def line_of(text: str, section: str, key: str) -> int:
    """The line that defines `section`.`key`: an assignment, a dotted assignment or a table header; for a key of an
    inline table the line on which that begins."""
    wanted = dotted(section, key)
    table, around, around_line = "", "", 1
    for number, line in enumerate(_TOKEN.sub(_blanked, text).split("\n"), 1):
        header, assignment = _HEADER.match(line), _KEY.match(line)
        if header:
            name = table = _plain(header[1])
        elif assignment:
            name = dotted(table, _plain(assignment[1]))
        else:
            continue
        if name == wanted or name.startswith(wanted + "."):
            return number
        if wanted.startswith(name + ".") and len(name) >= len(around):
            around, around_line = name, number
    return around_line


def _blanked(found: re.Match[str]) -> str:
    token = found[0]
    if token.startswith(('"""', "'''")):
        return '""' + "\n" * token.count("\n")
    return "" if token.startswith("#") else token


def _plain(name: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in name.split("."))
