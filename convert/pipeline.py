"""The conversion as a whole: what may begin, who shares it, and how a store becomes finished.

Owns the checks before the first byte, the identity that runs of one conversion must have in common, the manifest and
the report. The work between is `convert.run`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.dry_run import DryRun
from convert.journal import Claim, Journal, Records, Unit, recorded, remove_journal
from convert.plan import (
    MANIFEST_COPY,
    ConversionPlan,
    files_present,
    plan_conversion,
    small_files,
)
from convert.progress import Progress, Silent
from convert.recipe import Recipe
from convert.removal import DepletedSource, SourceRemover, saved_state
from convert.requantize import ENCODING
from convert.run import Run
from convert.selection import format_layers, parse_layers
from convert.source import Checkpoint, open_source
from convert.speed import existing_parent, measure_speeds
from convert.threads import cores
from convert.unit import UnitWork, finished_nbytes, surviving, unit_nbytes
from offload.errors import BudgetError, StoreError, UsageError
from offload.store.manifest import FORMAT_VERSION, MANIFEST_NAME, LayerRecord, Manifest, checksum
from offload.store.writer import disk_faults, write_file
from offload.types import ExpertId, format_size


@dataclass(frozen=True)
class Conversion:
    """What a run did. `source_nbytes` and `seconds` are of this run; `resumed` of its `experts` were there before.

    `manifest` is None while units (decoder layers; None: embedding, final norm and head) are `missing`, which other
    runs are converting or nobody has begun.
    """

    path: Path
    plan: ConversionPlan
    manifest: Manifest | None
    seconds: float
    source_nbytes: int
    experts: int
    resumed: int
    missing: Sequence[Unit] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the store."""
        return sum(entry.stat().st_size for entry in self.path.iterdir() if entry.is_file())

    def lines(self) -> list[str]:
        """What the user wants to know."""
        recipe = self.plan.recipe
        if self.resumed == self.experts and not self.source_nbytes and not self.missing:
            return [f"{self.path} is complete: {format_size(self.nbytes)}, {self.experts} experts; nothing to do"]
        found = f", {self.resumed} of them in earlier runs" if self.resumed else ""
        what = f"{self.experts} experts in {recipe.experts}{found}, resident weights in {recipe.resident}"
        rate = self.source_nbytes / max(self.seconds, 1e-9) / 1e6
        lines = [
            f"{self.path}: {what}" if self.missing else f"{self.path}: {format_size(self.nbytes)}, {what}",
            f"read {format_size(self.source_nbytes)} in {self.seconds:.1f} s ({rate:.0f} MB/s)",
        ]
        if self.missing:
            lines.append(
                f"not finished yet: {_names(self.missing)}; other runs are at it, or nobody is; the run that completes "
                "them finishes the store, and so does this command without --only-layers"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The same for machines."""
        source = self.plan.checkpoint.source
        return {
            "store": str(self.path),
            "finished": not self.missing,
            "missing": ["resident" if unit is None else unit for unit in self.missing],
            "recipe": self.plan.recipe.as_dict(),
            "source": dict(self.manifest.source if self.manifest else _source(source.short_name, source.revision)),
            "store_bytes": self.nbytes,
            "source_bytes_read": self.source_nbytes,
            "seconds": self.seconds,
            "experts": self.experts,
            "experts_resumed": self.resumed,
            "notes": self.plan.notes,
        }


def convert(
    source: str | Path,
    out: str | Path,
    *,
    experts: str | None = None,
    resident: str | None = None,
    head: str = Recipe.head,
    embedding: str = Recipe.embedding,
    scales: str = Recipe.scales,
    mtp: bool = Recipe.mtp,
    revision: str | None = None,
    only_layers: str | None = None,
    workers: int | None = None,
    kernels: str = "auto",
    delete_source: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Conversion | DryRun:
    """Convert the checkpoint `source` (a folder or a hub repository) into the store `out`.

    Run again with the same arguments it resumes. `only_layers` (all, 0-30, 3,7,40-60) makes this one of several runs
    that convert one store together: each takes layers of its choice that no other run is at, and the last one
    finishes the store. `workers` threads encode (default: one per core) with `kernels` (auto, native, reference: the
    same bytes). `delete_source` deletes each shard of a local source once everything from it was read back from the
    store. `dry_run` reads headers only and reports what would be done. Raises CheckpointError for a bad source,
    StoreError when `out` belongs to something else or is locked, BudgetError when the disk is too small or full; what
    is written already stays good in every case.
    """
    progress = progress or Silent()
    begun = time.monotonic()
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be 1 or more, not {workers}")
    if delete_source and only_layers is not None:
        raise UsageError("--delete-source needs one run that sees every layer; leave out --only-layers")
    saved = saved_state(Path(out))
    opened = DepletedSource(source, saved) if saved and Path(source).is_dir() else open_source(source, revision)
    try:
        checkpoint = Checkpoint(opened)
        codecs = {"head": head, "embedding": embedding, "scales": scales}
        plan = plan_conversion(checkpoint, experts=experts, resident=resident, **codecs, mtp=mtp, kernels=kernels)
        units = _chosen(plan, only_layers)
        if dry_run:
            return _dry_run(plan, Path(out), units, workers or cores())
        directory = _prepare(Path(out), source)
        for line in plan.notes:
            progress.note(line)
        if (directory / MANIFEST_NAME).exists():
            return _already_done(plan, directory, begun)
        with _told_in_full(plan, directory, None):
            journal = Journal(directory, _identity(plan), alone=only_layers is None)
        try:
            if journal.ended:  # by another run, since the look above
                return _already_done(plan, directory, begun)
            run = _converted(plan, directory, journal, units, workers or cores(), progress, delete_source)
            manifest, missing = _finish(plan, directory, journal)
        finally:
            journal.close()
    finally:
        opened.close()
    count = len(plan.mapped.experts) if not missing else run.experts
    return Conversion(directory, plan, manifest, time.monotonic() - begun, run.nbytes, count, run.resumed, missing)


def free_nbytes(directory: Path) -> int:
    """Bytes that can still be written to the file system of `directory`."""
    return shutil.disk_usage(existing_parent(directory)).free


def _dry_run(plan: ConversionPlan, out: Path, units: Sequence[Unit], workers: int) -> DryRun:
    fetch = sum(unit_nbytes(plan, unit) for unit in units)
    found = ((unit, surviving(plan, out, unit, recorded(out, unit))) for unit in units)
    done = fetch if (out / MANIFEST_NAME).exists() else sum(finished_nbytes(plan, *item) for item in found)
    return DryRun(plan, out, free_nbytes(out), fetch, fetch - done, measure_speeds(plan, out, workers))


def _prepare(directory: Path, source: str | Path) -> Path:
    if Path(source).is_dir() and directory.exists() and os.path.samefile(source, directory):
        raise UsageError(f"{directory} is the source itself; choose another folder for the store")
    if directory.exists() and not directory.is_dir():
        raise StoreError(f"{directory} is a file; a store is a folder")
    with disk_faults(directory, 0):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def _chosen(plan: ConversionPlan, only_layers: str | None) -> list[Unit]:
    """The units of a run. What belongs to no layer is taken by whichever run comes first."""
    layers = [unit for unit in plan.units if unit is not None]
    return [None, *(layers if only_layers is None else parse_layers(only_layers, layers))]


def _identity(plan: ConversionPlan) -> dict[str, Any]:
    source = plan.checkpoint.source
    return {
        "source": source.short_name,
        "source revision": source.revision,
        "store format": FORMAT_VERSION,
        "encoding": ENCODING,
        **plan.recipe.as_dict(),
    }


def _already_done(plan: ConversionPlan, directory: Path, begun: float) -> Conversion:
    manifest = Manifest.load(directory)
    wanted = {"source revision": plan.checkpoint.source.revision, **plan.recipe.as_dict()}
    found = {"source revision": manifest.source.get("revision"), **Recipe(**manifest.recipe).as_dict()}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise StoreError(
                f"{directory}: holds a finished store with {key} {found.get(key)}, not {value}; "
                "choose another folder or delete it"
            )
    for name, size in plan.file_sizes.items():
        path = directory / name
        if not path.exists() or path.stat().st_size != size:
            state = f"has {path.stat().st_size} bytes instead of {size}" if path.exists() else "is missing"
            raise StoreError(
                f"{directory}: was finished once, but {name} {state}; "
                "run `expertpager verify --repair --source SOURCE` on it"
            )
    remove_journal(directory)  # a kill between manifest and clean-up leaves it
    total = len(plan.mapped.experts)
    return Conversion(directory, plan, manifest, time.monotonic() - begun, 0, total, total)


def _converted(
    plan: ConversionPlan,
    directory: Path,
    journal: Journal,
    units: Sequence[Unit],
    workers: int,
    progress: Progress,
    delete_source: bool,
) -> Run:
    """A run that has done all it could."""
    run = Run(plan, directory, journal, units, workers, progress)
    remover = SourceRemover(plan, directory, run.found) if delete_source else None
    if remover and remover.kept_line:
        progress.note(remover.kept_line)
    _check_space(plan, directory, remover)
    if run.resumed or run.resumed_files:
        progress.note(
            f"resuming: {run.resumed} of {run.experts} experts and {run.resumed_files} of {len(units)} resident files "
            "are there"
        )
    try:
        with _told_in_full(plan, directory, remover):
            run.convert(remover.finished if remover else None)
    except KeyboardInterrupt:
        done = sum(len(recorded(directory, unit).experts) for unit in units)
        progress.note(
            f"interrupted: {done} of {run.experts} experts are finished and kept; the same command goes on from there"
        )
        raise
    return run


@contextmanager
def _told_in_full(plan: ConversionPlan, directory: Path, remover: SourceRemover | None) -> Iterator[None]:
    """Adds to the news of a full disk what is missing in all, not for the file at hand only."""
    try:
        yield
    except BudgetError as fault:
        raise BudgetError(f"{fault}; {_missing_nbytes(plan, directory, remover)} bytes are missing in all") from None


def _missing_nbytes(plan: ConversionPlan, directory: Path, remover: SourceRemover | None) -> int:
    """Bytes by which the free disk falls short of what is still to be written."""
    present = files_present(directory, plan.file_sizes)
    need = plan.disk_nbytes(present) - (remover.saved_nbytes(present) if remover else 0)
    return max(0, need - free_nbytes(directory))


def _check_space(plan: ConversionPlan, directory: Path, remover: SourceRemover | None) -> None:
    missing = _missing_nbytes(plan, directory, remover)
    if missing:
        free = free_nbytes(directory)
        raise BudgetError(
            f"{directory}: the store needs {format_size(free + missing)} more, the disk has {format_size(free)} free; "
            f"{missing} bytes are missing; make room or choose another disk, finished work is kept"
        )


def _finish(plan: ConversionPlan, directory: Path, journal: Journal) -> tuple[Manifest | None, list[Unit]]:
    """Write texts and manifest when every unit is complete; otherwise name the units that are not."""
    with journal.turn():
        if journal.ended:
            return Manifest.load(directory), []
        records, missing = Records(), []
        for unit in plan.units:
            claim = journal.claim(unit)
            if claim is None or not _published(plan, directory, unit, claim):
                missing.append(unit)
            else:
                records.update(claim.records)
        if missing:
            return None, missing
        files = {name: write_file(directory / name, data) for name, data in small_files(plan).items()}
        manifest = make_manifest(plan, str(journal.identity["source"]), records, files)
        text = manifest.dump().encode()
        write_file(directory / MANIFEST_COPY, text)
        # Last: a folder with this file is a finished store.
        write_file(directory / MANIFEST_NAME, text)
        journal.remove()
        return manifest, []


def _published(plan: ConversionPlan, directory: Path, unit: Unit, claim: Claim) -> bool:
    """Whether everything of `unit` is there under its final name; its owner may have died right before that."""
    work = UnitWork(plan, directory, unit, claim)
    try:
        if work.complete:
            work.open()
        return work.complete
    finally:
        work.close()


def make_manifest(plan: ConversionPlan, name: str, records: Records, files: Mapping[str, str]) -> Manifest:
    """The manifest of the finished store of the source called `name`, from records and the checksums of its texts."""
    layers = {}
    for layer, file in plan.layers.items():
        experts = [records.experts[ExpertId(layer, e)] for e in range(file.n_routed_experts)]
        layers[layer] = LayerRecord(
            header=checksum(file.header),
            tail=checksum(file.tail),
            experts=tuple(record.checksum for record in experts),
            errors=tuple(record.errors for record in experts),
        )
    tensors = {name: records.files[name] for name in plan.residents}
    source = _source(name, plan.checkpoint.source.revision)
    return Manifest(source, plan.recipe.as_dict(), plan.resident_codecs, layers, tensors, files)


def _source(name: str, revision: str) -> dict[str, str]:
    """What a manifest says about where the weights came from."""
    return {"name": name, "revision": revision}


def _names(units: Sequence[Unit]) -> str:
    layers = format_layers(unit for unit in units if unit is not None)
    return " and ".join((["layers " + layers] if layers else []) + (["embedding and head"] if None in units else []))
