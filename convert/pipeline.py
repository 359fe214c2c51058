"""The conversion itself: fetch, requantize, write, remember; stopped at any instant, it goes on where it was.

Owns the order of work, the threads and the bound on memory. Every unit (one routed expert, one file of resident
tensors) has a place that is known beforehand; its record goes to the journal after its bytes are durable. So a killed
run loses a moment's work, and its result is the same bytes as that of an undisturbed one.

Memory: `workers` experts are encoded while `ahead` more are being fetched; one in flight costs its FP8 source and
twice its encoded bytes. Resident tensors are handled one at a time, embedding and head in chunks.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.encode import encode_expert, encode_resident, load_expert
from convert.journal import FOLDER, ExpertRecord, Journal
from convert.plan import (
    MANIFEST_COPY,
    ConversionPlan,
    PlanReport,
    files_present,
    plan_conversion,
    small_files,
)
from convert.progress import Progress, Silent
from convert.recipe import Recipe
from convert.removal import DepletedSource, SourceRemover, saved_state
from convert.requantize import ENCODING
from convert.source import Checkpoint, open_source
from offload.errors import BudgetError, StoreError, UsageError
from offload.store.manifest import FORMAT_VERSION, MANIFEST_NAME, LayerRecord, Manifest, checksum
from offload.store.writer import PARTIAL, LayerFileWriter, TensorFileWriter, disk_faults, write_file
from offload.types import ExpertId, format_size

_COMMIT_SECONDS = 1.0  # work that a kill may cost
_COMMIT_EXPERTS = 64


@dataclass(frozen=True)
class Conversion:
    """A finished conversion. `source_nbytes` and `seconds` are of this run; `resumed` experts were there before."""

    path: Path
    plan: ConversionPlan
    manifest: Manifest
    seconds: float
    source_nbytes: int
    resumed: int

    @property
    def nbytes(self) -> int:
        """Bytes of the store."""
        return sum(entry.stat().st_size for entry in self.path.iterdir() if entry.is_file())

    def lines(self) -> list[str]:
        """What the user wants to know."""
        total = len(self.plan.mapped.experts)
        if self.resumed == total and not self.source_nbytes:
            return [f"{self.path} is complete: {format_size(self.nbytes)}, {total} experts; nothing to do"]
        rate = self.source_nbytes / self.seconds / 1e6
        found = f", {self.resumed} of them in earlier runs" if self.resumed else ""
        recipe = self.plan.recipe
        return [
            f"{self.path}: {format_size(self.nbytes)}, {total} experts in {recipe.experts}{found}, "
            f"resident weights in {recipe.resident}",
            f"read {format_size(self.source_nbytes)} in {self.seconds:.1f} s ({rate:.0f} MB/s)",
        ]

    def to_dict(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "store": str(self.path),
            "recipe": self.plan.recipe.as_dict(),
            "source": dict(self.manifest.source),
            "store_bytes": self.nbytes,
            "source_bytes_read": self.source_nbytes,
            "seconds": self.seconds,
            "experts": len(self.plan.mapped.experts),
            "experts_resumed": self.resumed,
            "notes": self.plan.notes,
        }


def convert(
    source: str | Path,
    out: str | Path,
    *,
    experts: str = Recipe.experts,
    resident: str | None = None,
    head: str = Recipe.head,
    embedding: str = Recipe.embedding,
    scales: str = Recipe.scales,
    revision: str | None = None,
    workers: int | None = None,
    kernels: str = "auto",
    delete_source: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Conversion | PlanReport:
    """Convert the checkpoint `source` (a folder or a hub repository) into the store `out`.

    Run again with the same arguments it resumes. `workers` threads encode (default: one per core) with `kernels`
    (auto, native, reference: the same bytes). `delete_source` deletes each shard of a local source once everything
    from it was read back from the store. `dry_run` reads headers only and reports what would be done. Raises
    CheckpointError for a bad source, StoreError when `out` belongs to something else or is locked, BudgetError when
    the disk is too small or full; what is written already stays good in every case.
    """
    progress = progress or Silent()
    begun = time.monotonic()
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be 1 or more, not {workers}")
    saved = saved_state(Path(out))
    opened = DepletedSource(source, saved) if saved and Path(source).is_dir() else open_source(source, revision)
    try:
        codecs = {"experts": experts, "head": head, "embedding": embedding, "scales": scales}
        plan = plan_conversion(Checkpoint(opened), **codecs, resident=resident, kernels=kernels)
        if dry_run:
            return PlanReport(plan, Path(out), free_nbytes(Path(out)))
        directory = _prepare(Path(out), source)
        for line in plan.notes:
            progress.note(line)
        if (directory / MANIFEST_NAME).exists():
            return _already_done(plan, directory, begun)
        journal = Journal(directory, _identity(plan))
        try:
            run = _Run(plan, directory, journal, workers or os.cpu_count() or 1, progress)
            if delete_source:
                run.delete_source()
            manifest = run.convert()
            journal.remove()
        finally:
            journal.close()
    finally:
        opened.close()
    return Conversion(directory, plan, manifest, time.monotonic() - begun, run.nbytes, run.resumed)


def free_nbytes(directory: Path) -> int:
    """Bytes that can still be written to the file system of `directory`."""
    while not directory.exists():
        directory = directory.absolute().parent
    return shutil.disk_usage(directory).free


def _prepare(directory: Path, source: str | Path) -> Path:
    if Path(source).is_dir() and directory.exists() and os.path.samefile(source, directory):
        raise UsageError(f"{directory} is the source itself; choose another folder for the store")
    if directory.exists() and not directory.is_dir():
        raise StoreError(f"{directory} is a file; a store is a folder")
    with disk_faults(directory, 0):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def _identity(plan: ConversionPlan) -> dict[str, str | int]:
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
    shutil.rmtree(directory / FOLDER, ignore_errors=True)  # a kill between manifest and clean-up leaves it
    return Conversion(directory, plan, manifest, time.monotonic() - begun, 0, len(plan.mapped.experts))


class _Run:
    """One run of a conversion: the state between the first and the last byte."""

    def __init__(
        self, plan: ConversionPlan, directory: Path, journal: Journal, workers: int, progress: Progress
    ) -> None:
        self.plan, self.directory, self.journal = plan, directory, journal
        self.workers = workers
        self.ahead = plan.checkpoint.source.parallel_reads
        self.progress = progress
        self.nbytes = 0
        self._forget_lost()
        self.resumed = len(journal.experts)
        self.total = plan.fetch_nbytes - self._finished_nbytes()
        self.remover: SourceRemover | None = None

    def delete_source(self) -> None:
        """Delete shards as they become superfluous."""
        self.remover = SourceRemover(self.plan, self.directory, self.journal)
        if self.remover.kept_line:
            self.progress.note(self.remover.kept_line)

    def convert(self) -> Manifest:
        self._check_space()
        if self.resumed or self.journal.files:
            files = f"{len(self.journal.files)} of {len(self.plan.residents)} resident files"
            total = len(self.plan.mapped.experts)
            self.progress.note(f"resuming: {self.resumed} of {total} experts and {files} are there")
        self._write_residents()
        self._write_experts()
        return self._write_manifest()

    # ------------------------------------------------------------ before the first byte

    def _forget_lost(self) -> None:
        """Records of files that somebody deleted or cut since the last run are worth nothing."""
        for layer, file in self.plan.layers.items():
            recorded = sum(expert.layer == layer for expert in self.journal.experts)
            complete = recorded == file.n_routed_experts and _size(self.directory / file.name) == file.nbytes
            if recorded and not complete and _size(self.directory / (file.name + PARTIAL)) != file.nbytes:
                self.journal.forget(layer=layer)
        for name, resident in self.plan.residents.items():
            if name in self.journal.files and _size(self.directory / name) != resident.nbytes:
                self.journal.forget(file=name)

    def _check_space(self) -> None:
        need = self.plan.disk_nbytes(files_present(self.directory, list(self.plan.file_sizes)))
        free = free_nbytes(self.directory)
        if free < need:
            raise BudgetError(
                f"{self.directory}: the store needs {format_size(need)} more, the disk has {format_size(free)} free; "
                f"{need - free} bytes are missing; make room or choose another disk, finished work is kept"
            )

    # ------------------------------------------------------------ resident tensors

    def _write_residents(self) -> None:
        for name, file in self.plan.residents.items():
            if name in self.journal.files:
                continue
            writer = TensorFileWriter(self.directory / name, file.slots)
            try:
                for tensor, chunks in encode_resident(self.plan, file):
                    writer.write_chunks(tensor, chunks)
                sums = writer.finish()
            finally:
                writer.close()
            self.record({}, {name: sums})
            self._advance(self._resident_nbytes(name))

    # ------------------------------------------------------------ routed experts

    def _write_experts(self) -> None:
        committer = _Committer(self)
        try:
            committer.finish_recorded()
            with _pools(self.workers, self.ahead) as (fetchers, encoders):
                try:
                    for expert, record in self._results(committer, fetchers, encoders):
                        committer.add(expert, record)
                        self._advance(self._expert_nbytes(expert))
                except BaseException:
                    # What is under way is finished and kept, what waits is dropped.
                    fetchers.shutdown(wait=False, cancel_futures=True)
                    encoders.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            committer.close()

    def _results(
        self, committer: _Committer, fetchers: ThreadPoolExecutor, encoders: ThreadPoolExecutor
    ) -> Iterator[tuple[ExpertId, ExpertRecord]]:
        """Experts in the order in which they get done; at most workers + ahead of them are in flight."""
        flight: dict[Future[tuple[ExpertId, ExpertRecord]], ExpertId] = {}

        def landed() -> Iterator[tuple[ExpertId, ExpertRecord]]:
            done, _ = wait(flight, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=flight.__getitem__):
                del flight[future]
                yield future.result()

        for expert in self.plan.experts:
            if expert in self.journal.experts:
                continue
            if len(flight) >= self.workers + self.ahead:
                yield from landed()
            fetched = fetchers.submit(load_expert, self.plan, expert)
            writer = committer.writer(expert.layer)
            flight[encoders.submit(_encode, self.plan, expert, fetched, writer)] = expert
        while flight:
            yield from landed()

    # ------------------------------------------------------------ the end

    def _write_manifest(self) -> Manifest:
        files = {name: write_file(self.directory / name, data) for name, data in small_files(self.plan).items()}
        manifest = make_manifest(self.plan, self.journal, files)
        text = manifest.dump().encode()
        write_file(self.directory / MANIFEST_COPY, text)
        # Last: a folder with this file is a finished store.
        write_file(self.directory / MANIFEST_NAME, text)
        return manifest

    def _finished_nbytes(self) -> int:
        """Source bytes that earlier runs have dealt with."""
        experts = sum(self._expert_nbytes(expert) for expert in self.journal.experts)
        return experts + sum(self._resident_nbytes(name) for name in self.journal.files)

    def _expert_nbytes(self, expert: ExpertId) -> int:
        return sum(linear.nbytes for linear in self.plan.mapped.experts[expert].values())

    def _resident_nbytes(self, file: str) -> int:
        tensors = self.plan.checkpoint.tensors
        return sum(tensors[name].nbytes for name in self.plan.residents[file].source_names)

    def record(self, experts: Mapping[ExpertId, ExpertRecord], files: Mapping[str, Mapping[str, str]]) -> None:
        """Remember finished work, and delete the shards that nothing needs any more."""
        self.journal.add(experts, files)
        if self.remover:
            self.remover.remove_finished()

    def _advance(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self.progress("converting", self.nbytes, self.total)


class _Committer:
    """Layer files being written, and the experts in them that are not yet in the journal."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.writers: dict[int, LayerFileWriter] = {}
        self.pending: dict[ExpertId, ExpertRecord] = {}
        self.last = time.monotonic()

    def writer(self, layer: int) -> LayerFileWriter:
        if layer not in self.writers:
            self.writers[layer] = LayerFileWriter(self.run.directory, self.run.plan.layers[layer])
        return self.writers[layer]

    def finish_recorded(self) -> None:
        """Publish files whose last expert was recorded by a run that was killed right then."""
        for layer, file in self.run.plan.layers.items():
            if self._complete(layer) and not (self.run.directory / file.name).exists():
                self.writer(layer)
        self.commit()

    def add(self, expert: ExpertId, record: ExpertRecord) -> None:
        self.pending[expert] = record
        if len(self.pending) >= _COMMIT_EXPERTS or time.monotonic() - self.last > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make the pending experts durable, then remember them; close the files that are complete."""
        pending, self.pending = self.pending, {}
        for layer in {expert.layer for expert in pending}:
            self.writers[layer].sync()
        if pending:
            self.run.record(pending, {})
        for layer in [layer for layer in self.writers if self._complete(layer)]:
            self.writers.pop(layer).finish()
        self.last = time.monotonic()

    def _complete(self, layer: int) -> bool:
        done = self.run.journal.experts
        return all(ExpertId(layer, e) in done for e in range(self.run.plan.config.n_routed_experts))

    def close(self) -> None:
        try:
            self.commit()
        finally:
            for writer in self.writers.values():
                writer.close()


def _encode(
    plan: ConversionPlan, expert: ExpertId, fetched: Future[dict[str, Tensor]], writer: LayerFileWriter
) -> tuple[ExpertId, ExpertRecord]:
    parts, errors = encode_expert(plan, expert, fetched.result())
    return expert, ExpertRecord(writer.write_expert(expert.expert, parts), errors)


@contextmanager
def _pools(workers: int, ahead: int) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """Threads that fetch and threads that encode, one core each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as encoders, ThreadPoolExecutor(ahead) as fetchers:
            yield fetchers, encoders
    finally:
        torch.set_num_threads(threads)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def make_manifest(plan: ConversionPlan, journal: Journal, files: Mapping[str, str]) -> Manifest:
    """The manifest of the finished store, from the journal's records and the checksums of its text files."""
    layers = {}
    for layer, file in plan.layers.items():
        records = [journal.experts[ExpertId(layer, e)] for e in range(file.n_routed_experts)]
        layers[layer] = LayerRecord(
            header=checksum(file.header),
            tail=checksum(file.tail),
            experts=tuple(record.checksum for record in records),
            errors=tuple(record.errors for record in records),
        )
    source = {"name": journal.identity["source"], "revision": plan.checkpoint.source.revision}
    tensors = {name: journal.files[name] for name in plan.residents}
    return Manifest(source, plan.recipe.as_dict(), plan.resident_codecs, layers, tensors, files)
