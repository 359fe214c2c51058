"""What `convert --dry-run` says: how much is fetched and written, how long that takes here, whether it fits the disk.

Owns the report. Must not measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.display import duration
from convert.plan import ConversionPlan, files_present
from convert.speed import Speeds
from offload.types import format_size


@dataclass(frozen=True)
class DryRun:
    """The plan of a conversion into `out`. Of `fetch_nbytes` earlier runs have dealt with all but `left_nbytes`."""

    plan: ConversionPlan
    out: Path
    free_nbytes: int
    fetch_nbytes: int
    left_nbytes: int
    speeds: Speeds

    @property
    def disk_nbytes(self) -> int:
        """Bytes of disk that are still needed."""
        return self.plan.disk_nbytes(files_present(self.out, self.plan.file_sizes))

    @property
    def fits(self) -> bool:
        return self.disk_nbytes <= self.free_nbytes

    @property
    def seconds(self) -> float:
        """How long the rest takes at the measured speeds."""
        share = self.left_nbytes / max(1, self.plan.fetch_nbytes)
        return self.speeds.seconds(self.left_nbytes, int(share * self.plan.store_nbytes))

    def lines(self) -> list[str]:
        """The plan for people."""
        plan, recipe = self.plan, self.plan.recipe
        source = plan.checkpoint.source
        codecs = sorted(set(plan.resident_codecs.values()))
        need = self.disk_nbytes
        there = "" if self.left_nbytes == self.fetch_nbytes else f", {format_size(self.left_nbytes)} of it still to do"
        verdict = "fits" if self.fits else f"does not fit: {need - self.free_nbytes} bytes are missing"
        return [
            f"source: {source.name} ({source.revision}), {len(plan.checkpoint.tensors)} tensors",
            f"fetch:  {format_size(self.fetch_nbytes)} of {format_size(plan.checkpoint.nbytes)}{there}",
            f"write:  {format_size(plan.store_nbytes)}: {len(plan.mapped.experts)} experts of "
            f"{format_size(plan.layout.stride)} in {recipe.experts}, resident weights in {', '.join(codecs)}",
            f"time:   {duration(self.seconds)} or more: {self._links()}",
            f"disk:   {format_size(need)} needed in {self.out}, {format_size(self.free_nbytes)} free: {verdict}",
            *plan.notes,
        ]

    def to_dict(self) -> dict[str, Any]:
        """The plan for machines."""
        plan, speeds = self.plan, self.speeds
        return {
            "dry_run": True,
            "source": {"name": plan.checkpoint.source.name, "revision": plan.checkpoint.source.revision},
            "recipe": plan.recipe.as_dict(),
            "fetch_bytes": self.fetch_nbytes,
            "fetch_bytes_left": self.left_nbytes,
            "store_bytes": plan.store_nbytes,
            "disk_bytes_needed": self.disk_nbytes,
            "disk_bytes_free": self.free_nbytes,
            "fits": self.fits,
            "read_bytes_per_s": speeds.read,
            "encode_bytes_per_s": speeds.encode,
            "write_bytes_per_s": speeds.write,
            "seconds": self.seconds,
            "experts": len(plan.mapped.experts),
            "expert_bytes": plan.layout.stride,
            "notes": plan.notes,
        }

    def _links(self) -> str:
        """The measured speeds in words."""
        speeds = self.speeds
        read = "not measured" if speeds.read is None else f"{speeds.read / 1e6:.0f} MB/s"
        write = "not measured" if speeds.write is None else f"{speeds.write / 1e6:.0f} MB/s"
        drive = ", on the same drive" if speeds.same_drive else ""
        return f"reading {read}, encoding {speeds.encode / 1e6:.0f} MB/s, writing {write}{drive}"
