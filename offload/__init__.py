"""Runtime of expertpager: DeepSeek-V3 class models with routed experts paged from disk and RAM.

    import offload
    with offload.load("store", ram="24GiB") as engine:
        for step in engine.generate(engine.encode("Hello"), max_tokens=32):
            print(step.text, end="")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload.engine.engine import Engine

__all__ = ["load"]


def load(store: str | Path, *, profile: str | Path | None = None, **options: Any) -> Engine:
    """Open a store and load everything but the routed experts.

    `options` are the fields of `offload.engine.options.RuntimeOptions`: ram, vram, device, kernels, threads,
    readers, prefetch, prefetch_depth, context, prefill_chunk, policy, half_life, allow_slow, trace and more. `profile`
    is a TOML file with such options; what is given here wins. Without one, what `tune` saved with the store is taken
    where it exists; "none" takes only defaults.

    Raises OffloadError subclasses: StoreError, ConfigError, BudgetError, KernelError, UsageError.
    """
    from offload.engine.engine import Engine
    from offload.engine.options import find_profile, resolve_options

    found = find_profile(store, profile)
    return Engine(store, resolve_options(options, found), saved_profile=None if profile else found)
