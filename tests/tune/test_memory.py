"""What the process takes, without what it has freed."""

from __future__ import annotations

from offload.tune.memory import process_nbytes

BLOCK, COUNT = 60_000, 1000


def test_freed_memory_is_not_counted() -> None:
    process_nbytes()  # collects what other tests left
    before = process_nbytes()
    blocks = [bytearray(BLOCK) for _ in range(COUNT)]
    last = bytearray(BLOCK)  # the end of the heap is in use
    held = process_nbytes()
    del blocks
    assert held - before > 0.9 * BLOCK * COUNT
    assert process_nbytes() - before < 0.2 * BLOCK * COUNT
    del last
