"""Deriving parts of a store again from its source: to compare them, or to write them anew.

Owns the check that source and store belong together, and rewriting exactly the damaged parts. A part is only written
when its bytes have the checksum in the manifest. Must not look for damage.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash
from torch import Tensor

from convert.damage import Damage
from convert.encode import encode_expert, encode_resident, load_expert
from convert.plan import MANIFEST_COPY, ConversionPlan, ResidentFile, plan_conversion, small_files
from convert.progress import Progress
from convert.source import Checkpoint, Source, open_source
from convert.threads import cores, one_core_each
from offload.errors import StoreError, UsageError
from offload.store.layout import LayerFile
from offload.store.manifest import MANIFEST_NAME, Manifest, checksum
from offload.store.safetensors import read_header
from offload.store.writer import TensorFileWriter, disk_faults, expert_chunks, raw_bytes, write_file
from offload.types import ExpertId


@dataclass(frozen=True)
class Origin:
    """The checkpoint a store was made of, with the plan that makes the same bytes again."""

    source: Source
    plan: ConversionPlan

    @classmethod
    def open(cls, manifest: Manifest, source: str | Path | None) -> Origin:
        """The source of the store with this `manifest`. Raises StoreError when it is another one."""
        made_of, revision = manifest.source["name"], manifest.source["revision"]
        if source is None:
            if "/" not in made_of:
                raise UsageError(f"the store was made of the local folder {made_of}; say where it is with --source")
            source = made_of
        local = Path(source).is_dir()
        opened = open_source(source, None if local or ":" in revision else revision)
        try:
            if opened.revision != revision:
                raise StoreError(
                    f"{source} is not what this store was made of: its revision is {opened.revision}, the store's "
                    f"is {revision}"
                )
            plan = plan_conversion(Checkpoint(opened), **manifest.recipe)
        except BaseException:
            opened.close()
            raise
        return cls(opened, plan)

    def close(self) -> None:
        """Give back files and connections."""
        self.source.close()

    def expert(self, expert: ExpertId) -> bytes:
        """The extent of `expert`."""
        parts, _ = encode_expert(self.plan, expert, load_expert(self.plan, expert))
        return b"".join(expert_chunks(self.plan.layers[expert.layer], parts))

    def derive(self, manifest: Manifest, sample: int | None, progress: Progress) -> tuple[list[Damage], int]:
        """What differs from `manifest` when it is derived again, and the number of experts compared.

        `sample` experts, evenly spread, or all experts and all resident tensors.
        """
        experts, residents = list(self.plan.experts), list(self.plan.residents.values())
        if sample is not None:
            residents = []
            if sample < len(experts):
                experts = [experts[index * len(experts) // sample] for index in range(sample)]
        parts: list[ExpertId | ResidentFile] = [*experts, *residents]
        differing: list[Damage] = []
        with one_core_each(cores()) as pool:
            for done, damages in enumerate(pool.map(partial(self._compare, manifest), parts), 1):
                differing += damages
                progress("deriving", done * self.plan.layout.stride, len(parts) * self.plan.layout.stride)
        return differing, len(experts)

    def _compare(self, manifest: Manifest, part: ExpertId | ResidentFile) -> list[Damage]:
        reason = "differs from what the source gives"
        if isinstance(part, ResidentFile):
            sums = manifest.tensors[part.name]
            found = ((name, _digest(chunks)) for name, chunks in encode_resident(self.plan, part))
            return [Damage(part.name, reason, tensor=name) for name, digest in found if digest != sums[name]]
        if checksum(self.expert(part)) != manifest.layers[part.layer].experts[part.expert]:
            return [Damage(self.plan.layers[part.layer].name, reason, expert=part)]
        return []


def _digest(chunks: Iterable[Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for chunk in chunks:
        digest.update(raw_bytes(chunk))
    return digest.hexdigest()


def rewrite(directory: Path, manifest: Manifest, origin: Origin, damages: Sequence[Damage]) -> None:
    """Rewrite what is damaged, and nothing else. Raises StoreError when the source gives other bytes."""
    plan = origin.plan
    small = small_files(plan)
    layers = {file.name: file for file in plan.layers.values()}
    for name in dict.fromkeys(damage.file for damage in damages):
        ours = [damage for damage in damages if damage.file == name]
        if name in layers:
            _repair_layer(directory, manifest, origin, layers[name], ours)
        elif name in plan.residents:
            _repair_resident(directory / name, manifest.tensors[name], plan, plan.residents[name], ours)
        elif name in small:
            _require(name, checksum(small[name]), manifest.files[name])
            write_file(directory / name, small[name])
        else:
            raise StoreError(f"{directory / name}: the source has no such file; convert the store again")


def restore_manifests(directory: Path, manifest: Manifest, damages: Sequence[Damage]) -> None:
    """Write the damaged one of the two manifests from the sound one; no source is needed for that."""
    for damage in damages:
        assert damage.file in (MANIFEST_NAME, MANIFEST_COPY), damage
        write_file(directory / damage.file, manifest.dump().encode())


def _repair_layer(
    directory: Path, manifest: Manifest, origin: Origin, file: LayerFile, damages: Iterable[Damage]
) -> None:
    path, record = directory / file.name, manifest.layers[file.layer]
    _require(f"the header of {file.name}", checksum(file.header), record.header)
    if any(damage.expert is None and damage.tensor is None for damage in damages):
        # Missing or of another size: which experts survived is unknown, so all are derived.
        experts: Sequence[int] = range(file.n_routed_experts)
    else:
        experts = sorted(damage.expert.expert for damage in damages if damage.expert)
    with disk_faults(path, file.nbytes), _Patch(path, file.nbytes) as patch:
        patch.write(0, file.header)
        patch.write(file.tail_start, file.tail)
        for expert in experts:
            which = ExpertId(file.layer, expert)
            data = origin.expert(which)
            _require(f"expert {expert} of layer {file.layer}", checksum(data), record.experts[expert])
            patch.write(file.offset(expert), data)


def _repair_resident(
    path: Path, sums: Mapping[str, str], plan: ConversionPlan, file: ResidentFile, damages: Sequence[Damage]
) -> None:
    if all(damage.tensor not in (None, "header") for damage in damages):
        _repair_tensors(path, sums, plan, file, {str(damage.tensor) for damage in damages})
        return
    writer = TensorFileWriter(path, file.slots)
    try:
        for tensor, chunks in encode_resident(plan, file):
            writer.write_chunks(tensor, chunks)
        for tensor, digest in writer.checksums.items():
            _require(f"{tensor or 'the header'} of {file.name}", digest, sums.get(tensor, ""))
        writer.finish()
    finally:
        writer.close()


def _repair_tensors(
    path: Path, sums: Mapping[str, str], plan: ConversionPlan, file: ResidentFile, damaged: set[str]
) -> None:
    entries = read_header(path).tensors
    with disk_faults(path, 0), _Patch(path, path.stat().st_size) as patch:
        for tensor, chunks in encode_resident(plan, file, only=damaged):
            digest, data = xxhash.xxh3_128(), []
            for chunk in chunks:
                data.append(raw_bytes(chunk))
                digest.update(data[-1])
            _require(tensor, digest.hexdigest(), sums[tensor])
            offset = entries[tensor].offset
            for part in data:
                patch.write(offset, part)
                offset += len(part)


class _Patch:
    """A file whose parts are overwritten in place; durable when the block ends."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes

    def __enter__(self) -> _Patch:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if os.fstat(self.fd).st_size > self.nbytes:
            os.ftruncate(self.fd, self.nbytes)
        os.posix_fallocate(self.fd, 0, self.nbytes)
        return self

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self.fd, view, offset)
            view, offset = view[count:], offset + count

    def __exit__(self, *_: object) -> None:
        os.fsync(self.fd)
        os.close(self.fd)


def _require(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise StoreError(
            f"the source gives other bytes for {what} than this store was made of; nothing was written for it; "
            "convert the store again"
        )
