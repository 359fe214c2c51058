"""How large a model is in each recipe, known from headers.

Owns the sizes handed to the planner. Reads headers and manifests only; must not know machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from convert.listing import ListingSource, load_listing, shipped_listing
from convert.plan import ConversionPlan, plan_conversion
from convert.recipe import HEAD
from convert.recipe_files import NamedRecipe, read_recipe, recipe_names
from convert.source import Checkpoint, Source, open_source
from offload.config import ModelConfig
from offload.store import Store
from offload.store.hf_config import EMBEDDING
from offload.store.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class Footprint:
    """A model in one recipe. Bytes are exact but for the small text files of a store to be made."""

    config: ModelConfig
    recipe: str
    experts: str
    resident: str
    head: str
    embedding: str
    resident_nbytes: int
    store_nbytes: int
    download_nbytes: int


@dataclass(frozen=True)
class Footprints:
    """What `expertpager plan` was asked about: one entry for a store, one per recipe for a checkpoint."""

    name: str
    kind: str
    items: Sequence[Footprint]


def footprints(model: str | Path, *, recipes: Sequence[str] = (), revision: str | None = None) -> Footprints:
    """The sizes of a store, a local checkpoint, a header listing or a hub repository (headers only).

    `recipes` are names or files; none means every shipped one that can hold the model's shapes. Repositories whose
    listing comes with the program are not asked, unless a `revision` is given.
    """
    folder = Path(model)
    if (folder / MANIFEST_NAME).exists():
        return Footprints(str(model), "store", [_of_store(Store.open(folder))])
    shipped = shipped_listing(str(model)) if revision is None and not folder.exists() else None
    source = load_listing(shipped, str(model)) if shipped else open_source(model, revision)
    try:
        checkpoint = Checkpoint(source)
        wanted = [read_recipe(name) for name in recipes or recipe_names()]
        return Footprints(str(model), source_kind(source), of_checkpoint(checkpoint, wanted))
    finally:
        source.close()


def source_kind(source: Source) -> str:
    """What a plan says the sizes are of."""
    return "header listing" if isinstance(source, ListingSource) else "checkpoint"


def of_checkpoint(checkpoint: Checkpoint, recipes: Sequence[NamedRecipe]) -> list[Footprint]:
    """One entry per recipe, smallest store first."""
    found = []
    for item in recipes:
        plan = plan_conversion(checkpoint, **item.values)
        found.append(
            Footprint(
                config=plan.config,
                recipe=item.name,
                experts=plan.recipe.experts,
                resident=plan.recipe.resident,
                head=plan.resident_codecs[HEAD],
                embedding=plan.resident_codecs[EMBEDDING],
                resident_nbytes=resident_nbytes(plan),
                store_nbytes=plan.store_nbytes,
                download_nbytes=plan.fetch_nbytes,
            )
        )
    return sorted(found, key=lambda item: item.store_nbytes)


def resident_nbytes(plan: ConversionPlan) -> int:
    """Bytes of all resident tensors, as `Store.resident_nbytes` counts them in the finished store."""
    files = [file for file in plan.residents.values() if file.layer not in plan.config.mtp_layers]
    return sum(prod(shape) * dtype.itemsize for file in files for _, dtype, shape in file.slots)


def _of_store(store: Store) -> Footprint:
    files = [item for item in store.path.iterdir() if item.is_file()]
    return Footprint(
        config=store.config,
        recipe="as stored",
        experts=store.manifest.recipe["experts"],
        resident=store.manifest.recipe["resident"],
        head=store.codec_name(HEAD),
        embedding=store.codec_name(EMBEDDING),
        resident_nbytes=store.resident_nbytes,
        store_nbytes=sum(item.stat().st_size for item in files),
        download_nbytes=0,
    )
