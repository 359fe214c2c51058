"""Is every byte of a store what its manifest says, and what the source gives?

Owns finding damage: structure, checksums at disk speed, and deriving experts again from the source. Rewriting is in
`convert.repair`. Must not know how codecs work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from convert.checksums import RangeReader
from convert.damage import Damage
from convert.plan import CONFIG_NAME, MANIFEST_COPY
from convert.progress import Progress, Silent
from convert.repair import Origin, restore_manifests, rewrite
from offload.config import ModelConfig
from offload.errors import OffloadError, StoreError, UsageError
from offload.quant import get_codec
from offload.store.hf_config import scale_suffix
from offload.store.layout import ExpertLayout, LayerFile
from offload.store.manifest import MANIFEST_NAME, Manifest, checksum
from offload.store.reader import read_json
from offload.store.safetensors import read_header
from offload.types import ExpertId, format_size

_THREADS = 4
_SHOWN = 40


@dataclass
class VerifyReport:
    """What `verify` found. `derived` experts were computed again from the source."""

    path: Path
    damages: list[Damage] = field(default_factory=list)
    repaired: list[Damage] = field(default_factory=list)
    nbytes: int = 0
    seconds: float = 0.0
    experts: int = 0
    derived: int = 0

    @property
    def ok(self) -> bool:
        """Whether the store is sound now."""
        return not self.damages

    def note(self, damages: list[Damage], repaired: bool) -> None:
        """Add `damages` to those that were or were not repaired."""
        (self.repaired if repaired else self.damages).extend(damages)

    def lines(self) -> list[str]:
        """The findings for people."""
        rate = self.nbytes / max(self.seconds, 1e-9) / 1e9
        checked = f"{format_size(self.nbytes)}, {self.experts} experts in {self.seconds:.1f} s ({rate:.1f} GB/s)"
        shown = [f"repaired: {damage}" for damage in self.repaired]
        shown += [f"damaged: {damage}" for damage in self.damages]
        lines = shown[:_SHOWN]
        if len(shown) > _SHOWN:
            lines.append(f"... and {len(shown) - _SHOWN} more")
        if self.derived:
            lines.append(f"{self.derived} experts derived again from the source")
        if self.damages:
            advice = "run `expertpager verify --repair --source SOURCE` on it"
            count = "1 damage" if len(self.damages) == 1 else f"{len(self.damages)} damages"
            lines.append(f"{self.path}: {count}; {checked}; {advice}")
        else:
            lines.append(f"{self.path}: every byte is sound; {checked}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The findings for machines."""
        return {
            "store": str(self.path),
            "ok": self.ok,
            "damages": [damage.to_dict() for damage in self.damages],
            "repaired": [damage.to_dict() for damage in self.repaired],
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "experts": self.experts,
            "experts_derived": self.derived,
        }


def verify(
    store: str | Path,
    *,
    source: str | Path | None = None,
    sample: int | None = None,
    repair: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check every byte of `store`.

    With `source`, experts are also derived again from the checkpoint and compared: `sample` of them, evenly spread,
    or all. `repair` rewrites what is damaged, and only that, from `source` (default: the hub repository the store
    was made of). Raises StoreError when the folder is no store or cannot be judged, and whatever the source raises.
    """
    if sample is not None and source is None:
        raise UsageError("--sample counts experts to derive from a source; give --source too")
    begun = time.monotonic()
    progress = progress or Silent()
    report = VerifyReport(Path(store))
    manifest, damages = load_manifest(report.path)
    with _Origins(manifest, source) as origins:
        report.note(damages, repair)
        if repair:
            restore_manifests(report.path, manifest, damages)
        _verify_files(report, manifest, origins if repair else None, progress)
        if source is not None and not report.repaired:
            differing, report.derived = origins.get().derive(manifest, sample, progress)
            report.damages += differing
    report.seconds = time.monotonic() - begun
    return report


def _verify_files(report: VerifyReport, manifest: Manifest, origins: _Origins | None, progress: Progress) -> None:
    """Everything but the manifests; damage is repaired when there are `origins` to repair it from."""
    damage = check_config(report.path, manifest)
    if damage:
        report.note([damage], origins is not None)
        if origins is None:
            return  # nothing else can be located without it
        rewrite(report.path, manifest, origins.get(), [damage])
    checker = Checker(report.path, manifest)
    damages = checker.check(progress)
    report.nbytes, report.experts = checker.nbytes, checker.experts
    report.note(damages, origins is not None)
    if damages and origins is not None:
        rewrite(report.path, manifest, origins.get(), damages)
        report.damages += Checker(report.path, manifest).check(Silent())


class _Origins:
    """The source of a store, opened when it is needed and closed at the end."""

    def __init__(self, manifest: Manifest, source: str | Path | None) -> None:
        self._open = partial(Origin.open, manifest, source)
        self._origin: Origin | None = None

    def get(self) -> Origin:
        self._origin = self._origin or self._open()
        return self._origin

    def __enter__(self) -> _Origins:
        return self

    def __exit__(self, *_: object) -> None:
        if self._origin:
            self._origin.close()


def load_manifest(directory: Path) -> tuple[Manifest, list[Damage]]:
    """The manifest of a store, from its copy when the first one is damaged, and what was wrong with either."""
    found: dict[str, Manifest] = {}
    damages: list[Damage] = []
    faults: list[StoreError] = []
    for name in (MANIFEST_NAME, MANIFEST_COPY):
        try:
            found[name] = Manifest.load(directory, name)
        except StoreError as fault:
            faults.append(fault)
            damages.append(Damage(name, "missing" if not (directory / name).exists() else "damaged"))
    if not found:
        raise faults[0]
    if len(found) == 2 and found[MANIFEST_NAME] != found[MANIFEST_COPY]:
        damages.append(Damage(MANIFEST_COPY, f"is sound but differs from {MANIFEST_NAME}"))
    return next(iter(found.values())), damages


def check_config(directory: Path, manifest: Manifest) -> Damage | None:
    """Damage of config.json: without it no other file can be understood."""
    path = directory / CONFIG_NAME
    if not path.exists():
        return Damage(CONFIG_NAME, "missing")
    if checksum(path.read_bytes()) != manifest.files.get(CONFIG_NAME):
        return Damage(CONFIG_NAME, "wrong checksum")
    return None


@dataclass(frozen=True)
class _Range:
    """Bytes with a known checksum, and the damage they stand for."""

    file: str
    offset: int
    nbytes: int
    checksum: str
    tensor: str | None
    expert: ExpertId | None


class Checker:
    """Compares all files of a store with its manifest."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self.damages: list[Damage] = []
        self.nbytes = 0
        self.experts = 0
        self._lock = threading.Lock()

    def check(self, progress: Progress) -> list[Damage]:
        """All damages, in the order of the store."""
        ranges = [*self._layer_ranges(), *self._resident_ranges(), *self._small_files()]
        total = sum(item.nbytes for item in ranges)

        def check(item: _Range) -> Damage | None:
            damage = self._check_range(reader, item)
            with self._lock:
                self.nbytes += item.nbytes
                progress("verifying", self.nbytes, total)
            return damage

        # Neighbouring ranges go to the threads in turn: the drive sees a few sequential streams side by side.
        with RangeReader() as reader, ThreadPoolExecutor(_THREADS) as pool:
            self.damages += [damage for damage in pool.map(check, ranges) if damage]
        return self.damages

    def _layer_ranges(self) -> Iterator[_Range]:
        for layer, file in layer_files(self.directory, self.manifest).items():
            if not self._size_ok(file.name, file.nbytes):
                continue
            record = self.manifest.layers[layer]
            yield _Range(file.name, 0, file.data_start, record.header, "header", None)
            for expert, digest in enumerate(record.experts):
                self.experts += 1
                offset = file.offset(expert)
                yield _Range(file.name, offset, file.layout.stride, digest, None, ExpertId(layer, expert))
            if file.tail:
                yield _Range(file.name, file.tail_start, len(file.tail), record.tail, file.tail_names, None)

    def _resident_ranges(self) -> Iterator[_Range]:
        for name, sums in self.manifest.tensors.items():
            path = self.directory / name
            if not self._size_ok(name, None):
                continue
            try:
                header = read_header(path)
            except StoreError as fault:
                self.damages.append(Damage(name, str(fault).removeprefix(f"{path}: "), "header"))
                continue
            with path.open("rb") as handle:
                raw = handle.read(header.data_start)
            if checksum(raw) != sums[""] or set(header.tensors) != set(sums) - {""}:
                self.damages.append(Damage(name, "wrong checksum", "header"))
                continue
            self.nbytes += header.data_start
            for tensor, entry in header.tensors.items():
                yield _Range(name, entry.offset, entry.nbytes, sums[tensor], tensor, None)

    def _small_files(self) -> Iterator[_Range]:
        for name, digest in self.manifest.files.items():
            if self._size_ok(name, None):
                yield _Range(name, 0, (self.directory / name).stat().st_size, digest, None, None)

    def _size_ok(self, name: str, expected: int | None) -> bool:
        path = self.directory / name
        if not path.is_file():
            self.damages.append(Damage(name, "missing"))
            return False
        size = path.stat().st_size
        if expected is not None and size != expected:
            self.damages.append(Damage(name, f"{size} bytes instead of {expected}"))
            return False
        return True

    def _check_range(self, reader: RangeReader, item: _Range) -> Damage | None:
        try:
            found = reader.checksum(self.directory / item.file, item.offset, item.nbytes)
        except OSError as fault:
            return Damage(item.file, f"cannot be read: {fault.strerror}", item.tensor, item.expert)
        if found != item.checksum:
            return Damage(item.file, "wrong checksum", item.tensor, item.expert)
        return None


def layer_files(directory: Path, manifest: Manifest) -> dict[int, LayerFile]:
    """Layout of the expert files of a store whose config.json is sound."""
    hf_config = read_json(directory / CONFIG_NAME)
    try:
        config = ModelConfig.from_hf(hf_config)
        codec = get_codec(manifest.recipe["experts"])
    except (OffloadError, KeyError) as fault:
        raise StoreError(f"{directory}: cannot be understood: {fault}") from None
    layout = ExpertLayout(codec, config.hidden_size, config.moe_intermediate_size)
    suffix = scale_suffix(hf_config)
    return {layer: LayerFile(layer, config.n_routed_experts, layout, suffix) for layer in manifest.layers}
