"""What there is for the process, and what it takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from offload.tune.memory import Memory, memory, process_nbytes

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


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_that_of_the_control_group(tmp_path: Path, version: int) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    base = tmp_path / ("sys/fs/cgroup/memory" if version == 1 else "sys/fs/cgroup")
    group = base / "outer/inner"
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/outer/inner\n" if version == 1 else "0::/outer/inner\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for folder, limit, used in ((group, "max", 10), (group.parent, str(100 << 20), 60 << 20)):
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
    (group.parent / "memory.stat").write_text(f"inactive_file {20 << 20}\n")
    assert memory(tmp_path) == Memory(100 << 20, 60 << 20, True)
    shutil.rmtree(tmp_path / "proc")
    assert not memory(tmp_path).limited_by_group
