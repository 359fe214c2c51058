"""Recording an atlas: folders of texts through the router, one trace per domain.

Owns reading the texts and running them. The statistics are `cache.atlas`, the page is `atlas_page`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from offload.cache.atlas import Atlas, make_atlas
from offload.cache.policy import CacheShape
from offload.cache.trace import Trace, TraceRecorder
from offload.engine.atlas_page import atlas_page
from offload.engine.engine import Engine
from offload.errors import UsageError

Progress = Callable[[str, int, int], None]
"""Called with a label, the bytes done and all bytes."""


def record_atlas(
    engine: Engine, prompts: str | Path, *, max_tokens: int = 2048, progress: Progress | None = None
) -> tuple[Atlas, dict[str, Trace]]:
    """Route the texts under `prompts`, at most `max_tokens` of each, and describe the use of experts.

    A subfolder is a domain, its files are texts. Without subfolders every file is a domain. Raises UsageError
    if there are no texts.
    """
    texts = read_domains(prompts)
    config = engine.config
    shape = CacheShape(len(config.moe_layers), config.n_routed_experts, config.num_experts_per_tok)
    total, done = sum(path.stat().st_size for paths in texts.values() for path in paths), 0
    traces = {}
    for domain, paths in texts.items():
        recorder = TraceRecorder(shape)
        for path in paths:
            record(engine, engine.encode(_read(path))[: min(max_tokens, engine.context)], recorder)
            done += path.stat().st_size
            if progress:
                progress("texts routed", done, total)
        traces[domain] = recorder.trace(domain=domain)
    return make_atlas(traces, config.moe_layers.start), traces


def write_atlas(
    atlas: Atlas, traces: dict[str, Trace], model: str, *, html: Path | None = None, traces_to: Path | None = None
) -> None:
    """Write the page `html` and one trace per domain into the folder `traces_to`, as far as they are given."""
    if html is not None:
        atlas_page(atlas, f"Routing atlas of {model}").write(html)
    if traces_to is not None:
        traces_to.mkdir(parents=True, exist_ok=True)
        for domain, trace in traces.items():
            trace.save(traces_to / f"{domain}.npz")


def record(engine: Engine, token_ids: list[int], recorder: TraceRecorder) -> None:
    """Route one text as a session of its own. A text without tokens is left out."""
    if not token_ids:
        return
    first = engine.config.moe_layers.start
    recorder.begin_session()
    done = 0

    def watch(layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        nonlocal done
        if layer == first:
            recorder.begin_step(token_ids[done : done + len(ids)])
            done += len(ids)
        recorder.route(layer - first, ids.tolist())

    engine.observe(token_ids, watch)


def read_domains(prompts: str | Path) -> dict[str, list[Path]]:
    """The files of every domain under the folder `prompts`, in the order of their names."""
    root = Path(prompts)
    if not root.is_dir():
        raise UsageError(f"--prompts {root}: no such folder")
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    found = {folder.name: _files(folder) for folder in folders} or {path.stem: [path] for path in _files(root)}
    found = {domain: files for domain, files in found.items() if files}
    if not found:
        raise UsageError(f"--prompts {root}: no texts; expected one subfolder of text files per domain, or files")
    return found


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise UsageError(f"cannot read the text {path}: {fault}") from None
