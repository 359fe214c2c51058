"""What CUDA and torch take of a GPU's memory besides tensors: known without a GPU, for those who plan for one."""

from __future__ import annotations

DRIVER_NBYTES = 640 << 20
"""Context and modules: 588 MiB were seen on an H200."""


def rounding_nbytes(nbytes: int) -> int:
    """What torch's allocator may lose, of `nbytes` in many tensors, to rounding and to blocks that were split."""
    # torch hands out tensors from 1 to 10 MiB in blocks of 20 MiB, larger ones in multiples of 2 MiB, and graphs
    # have blocks of their own. An estimate from these sizes, not measured on any GPU yet.
    return (64 << 20) + nbytes // 64
