"""One unit of a conversion under way: a decoder layer's two files, or the file of what belongs to no layer.

Owns what is still to do in a claimed unit and the order in which its bytes become durable, recorded and published.
Must not know threads nor other units.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from convert.encode import EncodedExpert, encode_resident
from convert.journal import Claim, ExpertRecord, Records, Unit
from convert.plan import ConversionPlan, ResidentFile
from offload.store.layout import LayerFile, resident_file_name
from offload.store.writer import PARTIAL, LayerFileWriter, TensorFileWriter
from offload.types import ExpertId


class UnitWork:
    """The unit `unit`, whose `claim` this process holds until the unit is complete or this is closed.

    `write_expert` and `write_resident` may be called from any thread; what they return goes to `commit`.
    """

    def __init__(self, plan: ConversionPlan, directory: Path, unit: Unit, claim: Claim) -> None:
        self.plan, self.directory, self.unit, self.claim = plan, directory, unit, claim
        self._writer: LayerFileWriter | None = None
        there = surviving(plan, directory, unit, claim.records)
        if there != claim.records:
            claim.keep(there)

    @property
    def complete(self) -> bool:
        """Whether everything is recorded."""
        return is_complete(self.plan, self.unit, self.claim.records)

    @property
    def lacks_resident(self) -> bool:
        """Whether the file of resident tensors is still to be written."""
        return resident_file(self.plan, self.unit).name not in self.claim.records.files

    @property
    def missing_experts(self) -> list[ExpertId]:
        """Experts that are still to be written, in the order of the store."""
        return [expert for expert in experts_of(self.plan, self.unit) if expert not in self.claim.records.experts]

    def open(self) -> None:
        """Take room on the disk for the experts; publish what a killed run had only recorded."""
        layer = layer_file(self.plan, self.unit)
        if layer is not None and (self.missing_experts or not (self.directory / layer.name).exists()):
            self._writer = LayerFileWriter(self.directory, layer)
        self._publish_if_complete()

    def write_expert(self, expert: ExpertId, encoded: EncodedExpert) -> Records:
        """Write `expert`, which `encode_expert` has encoded."""
        assert self._writer is not None
        parts, errors = encoded
        return Records({expert: ExpertRecord(self._writer.write_expert(expert.expert, parts), errors)})

    def write_resident(self) -> Records:
        """Fetch, encode and write the resident tensors; the file is durable afterwards."""
        file = resident_file(self.plan, self.unit)
        writer = TensorFileWriter(self.directory / file.name, file.slots)
        try:
            for tensor, chunks in encode_resident(self.plan, file):
                writer.write_chunks(tensor, chunks)
            return Records(files={file.name: writer.finish()})
        finally:
            writer.close()

    def commit(self, records: Records) -> None:
        """Make the bytes of `records` durable, then remember them; give the unit back when it is complete."""
        if records.experts:
            assert self._writer is not None
            self._writer.sync()
        self.claim.add(records)
        self._publish_if_complete()

    def close(self) -> None:
        """Give the unit back, whatever its state."""
        if self._writer is not None:
            self._writer.close()
        self.claim.close()

    def _publish_if_complete(self) -> None:
        if self.complete:
            if self._writer is not None:
                self._writer.finish()
            self.claim.close()


def layer_file(plan: ConversionPlan, unit: Unit) -> LayerFile | None:
    """The file of routed experts of `unit`, if it has any."""
    return None if unit is None else plan.layers.get(unit)


def resident_file(plan: ConversionPlan, unit: Unit) -> ResidentFile:
    """The file of resident tensors of `unit`."""
    return plan.residents[resident_file_name(unit)]


def experts_of(plan: ConversionPlan, unit: Unit) -> Iterator[ExpertId]:
    """All routed experts of `unit`, in the order of the store."""
    layer = layer_file(plan, unit)
    return iter(()) if layer is None else (ExpertId(layer.layer, index) for index in range(layer.n_routed_experts))


def is_complete(plan: ConversionPlan, unit: Unit, records: Records) -> bool:
    """Whether `records` hold everything of `unit`."""
    has_resident = resident_file(plan, unit).name in records.files
    return has_resident and all(expert in records.experts for expert in experts_of(plan, unit))


def surviving(plan: ConversionPlan, directory: Path, unit: Unit, records: Records) -> Records:
    """`records` of `unit` without those whose files somebody deleted or cut since: they are worth nothing."""
    sizes = plan.file_sizes
    kept = Records(files={name: sums for name, sums in records.files.items() if _size(directory / name) == sizes[name]})
    layer = layer_file(plan, unit)
    if layer is not None and records.experts:
        nbytes, name = sizes[layer.name], layer.name
        published = len(records.experts) == layer.n_routed_experts and _size(directory / name) == nbytes
        if published or _size(directory / (name + PARTIAL)) == nbytes:
            kept.experts = dict(records.experts)
    return kept


def unit_nbytes(plan: ConversionPlan, unit: Unit) -> int:
    """Bytes of the source that `unit` is made of."""
    return resident_nbytes(plan, unit) + sum(expert_nbytes(plan, expert) for expert in experts_of(plan, unit))


def finished_nbytes(plan: ConversionPlan, unit: Unit, records: Records) -> int:
    """Bytes of the source that the `records` of `unit` speak of."""
    experts = sum(expert_nbytes(plan, expert) for expert in records.experts)
    return experts + (resident_nbytes(plan, unit) if records.files else 0)


def expert_nbytes(plan: ConversionPlan, expert: ExpertId) -> int:
    """Bytes of `expert` in the source."""
    return sum(linear.nbytes for linear in plan.mapped.experts[expert].values())


def resident_nbytes(plan: ConversionPlan, unit: Unit) -> int:
    """Bytes of the resident tensors of `unit` in the source."""
    tensors = plan.checkpoint.tensors
    return sum(tensors[name].nbytes for name in resident_file(plan, unit).source_names)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
