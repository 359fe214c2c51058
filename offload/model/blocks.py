"""How a long forward pass is cut, layer by layer, into blocks of tokens.

Owns the size of a block. Attention, norms, dense layers and the shared expert are computed one block at a time;
only the routed experts see a whole pass, so that each of them is read once for all its tokens. The rows of a pass
therefore have the bits of passes of one block each, and how long a pass may be is a question of memory alone.
"""

from __future__ import annotations

BLOCK = 512
"""Tokens. Passes that are followed by others must be a multiple of it long."""


def blocks(tokens: int) -> list[slice]:
    """Consecutive rows of a pass of `tokens` tokens, at most BLOCK at a time."""
    return [slice(first, min(first + BLOCK, tokens)) for first in range(0, tokens, BLOCK)]
