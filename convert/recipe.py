"""Which codec holds which tensor.

Owns the choice and its defaults. Router weights, their bias and all norms are never quantized; embedding and head
have codecs of their own, by default bf16. Must not read tensors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from convert.mapping import CheckpointMap
from offload.errors import UsageError
from offload.quant import get_codec
from offload.quant.fp8 import Fp8Codec
from offload.quant.grouped import SCALE_METHODS
from offload.quant.nf4 import Nf4Codec
from offload.store.hf_config import is_embedding

HEAD = "lm_head"


@dataclass(frozen=True)
class Recipe:
    """Codecs of routed experts, resident linears, head and embedding; how scales of grouped integers are found;
    whether the multi-token-prediction layer is kept."""

    experts: str = "int4-g32"
    resident: str = "int8-g128"
    head: str = "bf16"
    embedding: str = "bf16"
    scales: str = "ls"
    mtp: bool = False

    def wanted(self, module: str) -> str:
        """The codec asked for the resident linear `module`."""
        if module.endswith(".eh_proj"):
            return "bf16"  # as the official checkpoint has it, beside FP8
        if is_embedding(module):
            return self.embedding
        return self.head if module == HEAD or module.endswith(".shared_head.head") else self.resident

    def codec_name(self, module: str, rows: int, cols: int) -> str:
        """The codec of the resident linear `module`: bf16 where the recipe's codec cannot hold its shape."""
        wanted = self.wanted(module)
        return wanted if get_codec(wanted).fits(rows, cols) else "bf16"

    def as_dict(self) -> dict[str, Any]:
        """What a manifest records: keywords of `make_recipe`."""
        return asdict(self)


def make_recipe(
    experts: str = Recipe.experts,
    resident: str | None = None,
    scales: str = Recipe.scales,
    head: str = Recipe.head,
    embedding: str = Recipe.embedding,
    mtp: bool = Recipe.mtp,
    block: tuple[int, int] = (128, 128),
) -> Recipe:
    """A checked recipe. Raises CodecError for unknown codecs and UsageError for unknown scale methods.

    Resident weights default to int8-g128, or to fp8 when the experts are fp8, so that such a store is lossless.
    `fp8` means the blocks of the source.
    """
    if scales not in SCALE_METHODS:
        raise UsageError(f"unknown scale method {scales!r}; known: {', '.join(SCALE_METHODS)}")
    if resident is None:
        resident = "fp8" if experts.startswith("fp8") else Recipe.resident
    own = "fp8" if block == (128, 128) else f"fp8-b{block[0]}x{block[1]}"

    def checked(name: str) -> str:
        return get_codec(own if name == "fp8" else name).name

    return Recipe(checked(experts), checked(resident), checked(head), checked(embedding), scales, mtp)


def notes(recipe: Recipe, mapped: CheckpointMap) -> list[str]:
    """Lines about what the recipe does not do as asked, for the user."""
    lines = []
    config = mapped.config
    sizes = {config.hidden_size, config.moe_intermediate_size}
    if not all(get_codec(recipe.experts).fits(1, size) for size in sizes):
        lines.append(
            f"expert sizes {sorted(sizes)} are no multiples of the group of {recipe.experts}: "
            "this store works here, but other engines cannot read its experts"
        )
    first = next(iter(mapped.experts.values()), {}).get("gate_proj")
    if first is not None and first.codec is not None:
        same = first.codec.name == recipe.experts
        lines.append(
            f"experts are {first.codec.name} in the source: "
            + ("copied byte for byte" if same else f"encoding them as {recipe.experts} adds an error of its own")
        )
    if any(name.startswith("int2-") for name in (recipe.experts, recipe.resident, recipe.head)):
        lines.append("2 bits found without calibration keep little of a model: an experiment, not a recipe")
    lines += _other_engines(recipe)
    kept: dict[str, list[str]] = {}
    for linear in (linear for linears in mapped.linears.values() for linear in linears):
        wanted = recipe.wanted(linear.module)
        if recipe.codec_name(linear.module, linear.rows, linear.cols) != wanted:
            kept.setdefault(wanted, []).append(linear.module)
    for wanted, modules in kept.items():
        lines.append(
            f"{len(modules)} resident tensors stay bf16, because {wanted} cannot hold their shape; "
            f"the first is {modules[0]}"
        )
    return lines


def _other_engines(recipe: Recipe) -> list[str]:
    """What transformers and bitsandbytes cannot do with such a store."""
    dense = {recipe.resident, recipe.head, recipe.embedding} - {"bf16"}
    codecs = dense | {recipe.experts}
    if any(isinstance(get_codec(name), Nf4Codec) for name in codecs):
        if codecs == {recipe.experts} and recipe.embedding == "bf16":
            return ["bitsandbytes reads every matrix of this store, but transformers 5 takes no single experts in NF4"]
        return [f"{', '.join(sorted(codecs))} side by side work here, but no other engine loads such a store"]
    if isinstance(get_codec(recipe.experts), Fp8Codec) and recipe.resident not in (recipe.experts, "bf16"):
        return [
            f"{recipe.experts} experts beside {recipe.resident} residents work here, but transformers cannot load them"
        ]
    if len(dense) > 1:
        return [
            f"resident tensors in {', '.join(sorted(dense))} work here and for compressed-tensors, but transformers "
            "decodes all of them alike: it cannot load this store"
        ]
    return []
