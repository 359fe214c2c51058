"""How much of a long prompt is computed and how long the rest will take, on stderr.

Owns when something is told and how. Must not know what computes.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

FIRST_S, TERMINAL_S, LOG_S = 3.0, 1.0, 10.0
"""Silence at the beginning, for most prompts are short; then time between two lines."""


class PromptProgress:
    """Called with the share that is done. On a terminal one line is written over, in a log each is a line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._begun = self._told = time.monotonic()
        self._shown = False

    def __call__(self, share: float) -> None:
        now = time.monotonic()
        if share >= 1:
            if self._shown and self._terminal:
                self._write("\r\033[K")
            return
        pause = FIRST_S if not self._shown else TERMINAL_S if self._terminal else LOG_S
        if now - self._told < pause:
            return
        left = (now - self._begun) * (1 - share) / share
        text = f"prompt {share:.0%} computed, about {_duration(left)} left"
        self._write(f"\r{text}\033[K" if self._terminal else text + "\n")
        self._told, self._shown = now, True

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
