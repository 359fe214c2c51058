"""A second copy of a store on another drive.

Owns the check that it is one. Must not know who reads from it.
"""

from __future__ import annotations

from pathlib import Path

from offload.errors import OffloadError, StoreError
from offload.store.reader import Store


def check_mirror(store: Store, mirror: str | Path) -> Path:
    """`mirror` as a path, if the store in it has the experts of `store`, byte for byte as far as manifests tell.

    Raises StoreError: no store there, an incomplete one, or one with other experts.
    """
    path = Path(mirror)
    if path.resolve() == store.path.resolve():
        raise StoreError(f"--mirror {path} is the store itself; give the folder of its copy on another drive")
    try:
        copy = Store.open(path)
    except OffloadError as fault:
        raise StoreError(f"--mirror {path} cannot be used: {fault}") from None
    if copy.layout != store.layout or copy.manifest.layers.keys() != store.manifest.layers.keys():
        raise StoreError(f"--mirror {path} holds another model or other codecs than {store.path}; copy the store again")
    for layer, record in store.manifest.layers.items():
        theirs = copy.manifest.layers[layer]
        if record.experts != theirs.experts or record.header != theirs.header:
            differ = sum(a != b for a, b in zip(record.experts, theirs.experts, strict=True))
            raise StoreError(
                f"--mirror {path}: {differ} experts of layer {layer} differ from those of {store.path}; "
                "copy the store again"
            )
    return path
