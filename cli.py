"""The command line: parse, call one function, print.

Owns options, exit codes and what goes to stdout (text, JSON) or stderr (progress, summary, errors).
Holds no logic: every command is a thin shell around one function of `convert` or `offload`. Those are
imported inside the commands, so that `--help` does not wait for torch.

Exit codes: 0 done, 1 a fault told in one line, 2 wrong usage, 128 + signal after Ctrl-C (130), SIGTERM (143) or
SIGHUP (129), 141 whoever read standard output is gone.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from typing import Protocol

    from convert.display import ProgressDisplay
    from offload.engine.engine import Engine
    from offload.report import Page

    class HasPage(Protocol):
        def page(self) -> Page: ...


VERSION = "0.1.0"


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 24GiB, 24GB, 1500MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from offload.errors import UsageError
        from offload.types import parse_size

        try:
            return parse_size(value)
        except UsageError as fault:
            self.fail(str(fault), param, ctx)


class TokenIds(click.ParamType):  # type: ignore[type-arg]
    """Token ids separated by commas: 0,5,7."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            ids = [int(part) for part in value.replace(",", " ").split()]
        except ValueError:
            self.fail(f"cannot read {value!r} as token ids; write them like 0,5,7", param, ctx)
        return ids or self.fail("there are no token ids in it; write them like 0,5,7", param, ctx)


SIZE, TOKEN_IDS = Size(), TokenIds()


def options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Several click options as one decorator, shown in the given order."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


html_option = click.option("--html", type=click.Path(dir_okay=False), help="Also write a page with charts.")
json_option = click.option("--json", "as_json", is_flag=True, help="The last line of stdout is one JSON object.")
runtime_options = options(
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: auto]"),
    click.option(
        "--kernels",
        type=click.Choice(["auto", "native", "reference"]),
        help="native: compiled CPU kernels; reference: torch in fp32, slow and exact.  [default: auto]",
    ),
    click.option("--ram", type=SIZE, help="All RAM the process may use. Default: what is free, up to the whole model."),
    click.option("--vram", type=SIZE, help="VRAM that may be used on each GPU. Default: most of what is free."),
    click.option(
        "--split",
        type=click.Choice(["gpu", "hybrid"]),
        help="gpu: the GPU computes every expert; hybrid: the CPU computes a part of those that VRAM does not hold, "
        "which is faster on a slow link, and then tokens depend on budgets by rounding.  [default: gpu]",
    ),
    click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: one per core."),
    click.option("--readers", type=click.IntRange(1), help="Reads of experts under way at once.  [default: 8]"),
    click.option(
        "--prefetch/--no-prefetch", default=None, help="Read experts ahead of their layer.  [default: prefetch]"
    ),
    click.option(
        "--prefetch-depth",
        type=click.IntRange(0, 8),
        help="Layers ahead for which routers are applied early to know what to read; 0: reads ahead by the token table "
        "of the policy ema+tokens alone.  [default: 1]",
    ),
    click.option(
        "--mirror", type=click.Path(file_okay=False), help="A copy of STORE on another drive; both drives are read."
    ),
    click.option(
        "--usage",
        type=click.Path(dir_okay=False),
        help="File in which what is learned about expert use is kept between runs; off: none.  [default: with STORE]",
    ),
    click.option("--context", type=click.IntRange(1), help="Longest prompt plus answer, in tokens. Default: 4096."),
    click.option(
        "--prefill-chunk",
        type=click.IntRange(1),
        help="Most tokens of a prompt computed at once, from 512 on in whole blocks of 512. A bound below that, or any "
        "on a GPU, may change tokens by rounding. Default: chosen from context and memory; 2048 on a GPU.",
    ),
    click.option("--policy", help="Cache policy of the expert slots.  [default: ema+tokens]"),
    click.option(
        "--half-life",
        type=click.FloatRange(0, min_open=True),
        metavar="TOKENS",
        help="Tokens after which a use counts half: for the policy ema (32 by default), or by the middle one of the "
        "three half-lives of ema+tokens (60 by default). Other policies have none.",
    ),
    click.option("--allow-slow", is_flag=True, default=None, help="Run with fewer slots than one token's working set."),
    click.option(
        "--profile",
        type=click.Path(dir_okay=False),
        help="TOML file with runtime options (flags win), or a domain's routing (from `routing atlas --traces`): its "
        "experts are read at the start. Default: what `tune` saved in STORE; none: nothing.",
    ),
    click.option(
        "--trace", type=click.Path(dir_okay=False), help="Record in this file which experts every token used."
    ),
)
prefer_option = click.option(
    "--prefer-resident",
    type=click.FloatRange(0),
    metavar="MARGIN",
    help="Choose a resident expert before a missing one whose biased score is less than MARGIN above it. Fewer reads, "
    "but the text then depends on what is resident.  [default: exact routing]",
)
sampling_options = options(
    click.option("-n", "--max-tokens", type=int, help="Tokens to generate at most.  [default: 256]"),
    click.option(
        "--temperature", type=float, help="0 is greedy. Default: the checkpoint's generation_config, else 0.6."
    ),
    click.option("--top-p", type=float),
    click.option("--top-k", type=int),
    click.option("--min-p", type=float),
    click.option("--seed", type=int, help="Same seed, same tokens."),
    click.option("--stop", multiple=True, help="Text that ends generation; may be given several times."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Do not stop at the end-of-sequence token."),
)
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos")


class ReaderGoneError(Exception):
    """Nobody reads standard output any more, as behind `| head -1`."""


class Commands(click.Group):
    """The commands. Click itself would end with 1, as after a fault, where a pipe was closed."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise ReaderGoneError from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION, prog_name="expertpager")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Run DeepSeek-V3 class Mixture-of-Experts models on one machine.

    Convert the official checkpoint once, then generate while routed experts are paged between disk and
    RAM.
    """


# -- stores ----------------------------------------------------------------------------------


@cli.command()
@click.argument("source")
@click.option("-o", "--output", "out", required=True, type=click.Path(file_okay=False), help="Folder of the store.")
@click.option("--recipe", help="A recipe of configs/recipes by name, or a TOML file; the options below win.")
@click.option("--experts", help="Codec of the routed experts.  [default: int4-g32, or the source's own ints]")
@click.option(
    "--resident",
    help="Codec of attention, shared experts and dense layers.  [default: int8-g128; fp8 with --experts fp8]",
)
@click.option("--head", help="Codec of the output head.  [default: bf16]")
@click.option("--embedding", help="Codec of the token embedding.  [default: bf16]")
@click.option(
    "--scales", help="How int scales are found: ls (least squares) or rtn (to the largest magnitude).  [default: ls]"
)
@click.option("--mtp", is_flag=True, help="Keep the multi-token-prediction layer in the store too.")
@click.option("--revision", help="Revision of a hub repository.")
@click.option(
    "--only-layers",
    help="Convert these layers only (all, 0-30, 3,7,40-60), together with other runs that have this option.",
)
@click.option("--workers", type=click.IntRange(1), help="Experts converted at the same time. Default: one per core.")
@click.option("--delete-source", is_flag=True, help="Delete each shard of a folder once its content is safe.")
@click.option("--dry-run", is_flag=True, help="Read headers only; print what would be fetched and written.")
@json_option
def convert(as_json: bool, dry_run: bool, recipe: str | None, **arguments: Any) -> None:
    """Convert SOURCE (a folder or a hub repo id) into a store.

    Run the same command again to resume after an interruption. Several processes, also on several machines with
    shared storage, convert one store together when each is given --only-layers: a layer that another process is at
    is left to it, and the last process finishes the store.
    """
    from convert.pipeline import convert as run
    from convert.recipe_files import with_recipe

    with _progress(as_json) as progress:
        report = run(progress=progress, dry_run=dry_run, **with_recipe(recipe, arguments))
    _report(report.lines(), report.to_dict(), as_json)


@cli.command()
@click.argument("store", type=click.Path(file_okay=False))
@click.option("--source", help="Also derive experts again from this checkpoint and compare.")
@click.option("--sample", type=click.IntRange(1), help="With --source: compare this many experts instead of all.")
@click.option("--repair", is_flag=True, help="Rewrite damaged experts from the source.")
@json_option
def verify(as_json: bool, **arguments: Any) -> None:
    """Check every byte of STORE against its checksums."""
    from convert.verify import verify as run

    with _progress(as_json) as progress:
        report = run(progress=progress, **arguments)
    _report(report.lines(), report.to_dict(), as_json)
    if not report.ok:
        sys.exit(1)


@cli.command()
@click.argument("path")
@click.option("--errors", is_flag=True, help="Quantization error per layer and projection, worst experts, outliers.")
@click.option("--html", type=click.Path(dir_okay=False), help="With --errors: also write a page with charts.")
@click.option("--revision", help="Revision of a hub repository.")
@click.option(
    "--listing",
    type=click.Path(dir_okay=False),
    help="Also write names, dtypes and shapes of a checkpoint to this .json.xz file, for `plan` without a network.",
)
@json_option
def inspect(as_json: bool, **arguments: Any) -> None:
    """Describe a checkpoint or a store: sizes, codecs, experts, parameters."""
    from convert.inspect import inspect as run

    report = run(**arguments)
    _report(report.lines(), report.to_dict(), as_json)


# -- text ------------------------------------------------------------------------------------


@cli.command()
@click.argument("store", type=click.Path(file_okay=False))
@click.option("-p", "--prompt", help="The prompt.")
@click.option("--prompt-file", type=click.Path(dir_okay=False, allow_dash=True), help="Read the prompt from a file.")
@click.option("--prompt-ids", type=TOKEN_IDS, help="The prompt as token ids, used exactly as given.")
@click.option("--chat", "as_chat", is_flag=True, help="Wrap the prompt as a user message in the chat template.")
@sampling_options
@runtime_options
@prefer_option
@json_option
def generate(
    store: str,
    prompt: str | None,
    prompt_file: str | None,
    prompt_ids: list[int] | None,
    as_chat: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Continue a prompt with the model in STORE.

    The prompt comes from -p, --prompt-file, --prompt-ids or standard input.
    """
    from offload.engine.prompt_progress import PromptProgress
    from offload.engine.request import resolve_sampling

    text = None if prompt_ids is not None else _prompt_text(prompt, prompt_file)
    if prompt_ids is not None and (prompt is not None or prompt_file is not None):
        raise click.UsageError("give one of -p, --prompt-file and --prompt-ids")
    sampling = {name: arguments.pop(name) for name in SAMPLING}
    resolve_sampling(sampling)  # what cannot be used is told before a large model is loaded
    with _load(store, arguments) as engine:
        if prompt_ids is None:
            assert text is not None
            prompt_ids = engine.encode_chat([{"role": "user", "content": text}]) if as_chat else engine.encode(text)
        for step in engine.generate(prompt_ids, progress=PromptProgress(), **sampling):
            if not as_json:
                click.echo(step.text, nl=False)
        if not as_json:
            click.echo()
        summary = engine.summary()
        _echo(summary.lines())
        if as_json:
            click.echo(json.dumps(summary.to_dict()))


@cli.command()
@click.argument("store", type=click.Path(file_okay=False))
@click.option("--system", help="System message.")
@sampling_options
@runtime_options
@prefer_option
def chat(store: str, system: str | None, **arguments: Any) -> None:
    """Talk with the model in STORE. An empty line or Ctrl-D ends the chat, /reset begins anew."""
    from offload.engine.prompt_progress import PromptProgress
    from offload.engine.request import resolve_sampling

    sampling = {name: arguments.pop(name) for name in SAMPLING}
    resolve_sampling(sampling)
    opening = [{"role": "system", "content": system}] if system else []
    with _load(store, arguments) as engine:
        messages = list(opening)
        while True:
            try:
                line = click.prompt("you", prompt_suffix="> ", default="", show_default=False, err=True)
            except click.Abort:
                line = ""
            if not line.strip():
                break
            if line.strip() == "/reset":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": line})
            answer = []
            for step in engine.generate(engine.encode_chat(messages), progress=PromptProgress(), **sampling):
                answer.append(step.text)
                click.echo(step.text, nl=False)
            click.echo()
            messages.append({"role": "assistant", "content": "".join(answer)})
            _echo(engine.summary().lines())


@cli.command()
@click.argument("store", type=click.Path(file_okay=False))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on.")
@click.option("--max-waiting", default=16, show_default=True, help="Requests that may wait; more get status 429.")
@click.option("--api-key", help="Require this bearer token.")
@runtime_options
@prefer_option
def serve(store: str, host: str, port: int, max_waiting: int, api_key: str | None, **arguments: Any) -> None:
    """Serve STORE over HTTP in the manner of OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models."""
    from offload.server import ServerOptions
    from offload.server import serve as run

    options = ServerOptions(host=host, port=port, max_waiting=max_waiting, api_key=api_key)
    with _load(store, arguments) as engine:
        click.echo(f"listening on http://{host}:{port}/v1", err=True)
        run(engine, options)
        _echo(engine.beside_plan())


# -- planning --------------------------------------------------------------------------------


@cli.command()
@click.argument("model")
@click.option("--machine", help="Machine file, or the name of one in configs/machines.  [default: this machine]")
@click.option("--recipe", "recipes", multiple=True, help="Recipe to plan; several are allowed.  [default: all]")
@click.option("--ram", type=SIZE, help="All RAM the process may use. Default: a share of what is free.")
@click.option("--vram", type=SIZE, help="All the VRAM it may use. Default: what a run takes, 94% of what is free.")
@click.option(
    "--split", type=click.Choice(["gpu", "hybrid"]), default="gpu", show_default=True, help="As for `generate`."
)
@click.option("--context", type=click.IntRange(1), help="Longest prompt plus answer, in tokens. Default: 4096.")
@click.option("--prompt-tokens", "prompt", type=click.IntRange(1), default=1024, show_default=True)
@click.option(
    "--prefill-chunk",
    type=click.IntRange(1),
    help="Most tokens of a prompt computed at once, as for `generate`. Default: chosen from context and memory.",
)
@click.option("--hits", help="Where hit rates come from: local, flat, uniform, or a trace file.  [default: local]")
@click.option("--allow-slow", is_flag=True, help="Plan with fewer slots than one token's working set, too.")
@click.option("--revision", help="Revision of a hub repository.")
@html_option
@json_option
def plan(
    model: str, as_json: bool, html: str | None, recipes: tuple[str, ...], revision: str | None, **arguments: Any
) -> None:
    """Say whether MODEL (a store, a checkpoint, or a hub repo id) runs on a machine, how fast, and what would help.

    Where the machine has a GPU, with the processor alone and with --device cuda. Reads headers only: nothing has to be
    downloaded.
    """
    from convert.footprint import footprints
    from offload.tune.planner import plan as run

    report = run(footprints(model, recipes=recipes, revision=revision), **arguments)
    _write_page(report, html)
    _report(report.lines(), report.to_dict(), as_json)
    if report.best is None and report.best_on_gpu is None:
        sys.exit(1)


@cli.command()
@click.argument("location", type=click.Path(file_okay=False), default=".")
@click.option("-o", "--output", type=click.Path(dir_okay=False), default="machine.toml", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: one per core.")
@click.option("--kernels", type=click.Choice(["auto", "native", "reference"]), default="auto", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@json_option
def probe(as_json: bool, **arguments: Any) -> None:
    """Measure this machine, its first GPU and the drive at LOCATION (a store, or a folder) for `plan` and `bench`.

    Takes about a minute, with a GPU somewhat more, above all the first time, when its kernels are compiled. A file
    of 1 GiB is written and deleted where LOCATION is no store.
    """
    from offload.engine.probing import probe as run

    report = run(tell=lambda what: click.echo(f"measuring: {what}", err=True), **arguments)
    _report(report.lines(), report.to_dict(), as_json)


@cli.command()
@click.argument("store", type=click.Path(file_okay=False))
@click.option("--cold", type=click.IntRange(1), default=1, show_default=True, help="Runs that begin with empty slots.")
@click.option("--warm", type=click.IntRange(1), default=3, show_default=True, help="Runs after them.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("-n", "--max-tokens", type=click.IntRange(2), default=32, show_default=True)
@click.option("--prompts", type=click.Path(dir_okay=False), help="File with one prompt per line. Default: built in.")
@click.option("--machine", help="Machine file to predict with.  [default: machine.toml, where it exists]")
@click.option("--hits", help="Hit rates to predict with: local, flat, uniform, or a trace file.  [default: local]")
@click.option("--drop-caches", is_flag=True, help="Empty the system's page cache before cold runs (needs root).")
@runtime_options
@prefer_option
@html_option
@json_option
def bench(store: str, as_json: bool, html: str | None, **arguments: Any) -> None:
    """Measure generation with STORE, cold and warm, and explain the difference to the plan.

    On a GPU that is the plan of a GPU: hits in VRAM, copies over the link, and what probe found of its kernels.
    """
    from offload.engine.bench import bench as run

    report = run(store, tell=lambda what: click.echo(what, err=True), **arguments)
    _write_page(report, html)
    _report(report.lines(), report.to_dict(), as_json)


@cli.command()
@click.argument("store", type=click.Path(file_okay=False))
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="The profile.  [default: profile.toml in STORE]")
@click.option("--prompts", type=click.Path(dir_okay=False), help="File with one prompt per line: your own work.")
@click.option("-n", "--max-tokens", type=click.IntRange(2), default=24, show_default=True, help="Tokens per prompt.")
@runtime_options
@html_option
@json_option
def tune(store: str, as_json: bool, html: str | None, **arguments: Any) -> None:
    """Find faster options for STORE by replay and short real runs; later runs of STORE take them by themselves.

    Options given here are kept as they are; --profile is where the search begins.
    """
    from offload.engine.tuning import tune as run

    report = run(store, tell=lambda what: click.echo(f"trying: {what}", err=True), **arguments)
    _write_page(report, html)
    _report(report.lines(), report.to_dict(), as_json)


# -- caches ----------------------------------------------------------------------------------


@cli.command()
@click.argument("trace", type=click.Path(dir_okay=False))
@click.option("--policy", "policies", multiple=True, help="Policy to replay; several are allowed.  [default: all]")
@click.option("--slots", "sizes", multiple=True, type=click.IntRange(1), help="Number of slots; several are allowed.")
@click.option(
    "--half-life",
    type=click.FloatRange(0, min_open=True),
    metavar="TOKENS",
    help="Tokens after which a use counts half, for policies that have such a number. Default: the recording's for its "
    "policy, their own for others.",
)
@click.option("--drive", type=SIZE, default="3GB", show_default=True, help="Bytes per second of the drive.")
@click.option("--memory", type=SIZE, default="30GB", show_default=True, help="Bytes per second of the RAM.")
@html_option
@json_option
def simulate(as_json: bool, html: str | None, **arguments: Any) -> None:
    """Replay TRACE (made with --trace) for a grid of policies and cache sizes, beside Belady's optimum."""
    from offload.cache.report import simulate as run

    report = run(**arguments)
    _report(report.lines(), report.to_dict(), as_json)
    _write_page(report, html)


# -- routing ---------------------------------------------------------------------------------


@cli.group()
def routing() -> None:
    """Show how experts are chosen: for a prompt, or for folders of texts."""


@routing.command()
@click.argument("store", type=click.Path(file_okay=False))
@click.option("-p", "--prompt", help="The text to route.")
@click.option("--prompt-file", type=click.Path(dir_okay=False, allow_dash=True), help="Read the text from a file.")
@click.option("--prompt-ids", type=TOKEN_IDS, help="The text as token ids, used exactly as given.")
@click.option("--layer", type=click.IntRange(0), help="Only this decoder layer.")
@click.option(
    "--runners-up", type=click.IntRange(0), default=4, show_default=True, help="Experts shown after the chosen."
)
@runtime_options
@json_option
def explain(
    store: str,
    prompt: str | None,
    prompt_file: str | None,
    prompt_ids: list[int] | None,
    layer: int | None,
    runners_up: int,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Show for every token the affinities, biases, groups, chosen experts with weights, and runners-up."""
    from offload.engine.routing import explain as run

    text = "" if prompt_ids is not None else _prompt_text(prompt, prompt_file)
    with _load(store, arguments) as engine:
        ids = engine.encode(text) if prompt_ids is None else prompt_ids
        explanation = run(engine, ids, layer=layer, runners_up=runners_up)
    _report(explanation.lines(), explanation.to_dict(), as_json)


@routing.command()
@click.argument("store", type=click.Path(file_okay=False))
@click.option(
    "--prompts", required=True, type=click.Path(file_okay=False), help="Folder with one subfolder of texts per domain."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Tokens of each text at most."
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page with plots.")
@click.option(
    "--traces",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write the routing of each domain, for --profile and `simulate`.",
)
@runtime_options
@json_option
def atlas(
    store: str, prompts: str, max_tokens: int, html: Path | None, traces: Path | None, as_json: bool, **arguments: Any
) -> None:
    """Show which experts the texts under --prompts use: load, specialization, coverage, reuse, overlap."""
    from offload.engine.atlas import record_atlas, write_atlas

    with _load(store, arguments) as engine, _progress() as progress:
        found, recorded = record_atlas(engine, prompts, max_tokens=max_tokens, progress=progress)
        write_atlas(found, recorded, engine.name, html=html, traces_to=traces)
    _report(found.lines(), found.to_dict(), as_json)


# -- demo ------------------------------------------------------------------------------------


@cli.command()
@click.option("--keep", type=click.Path(file_okay=False), help="Leave the store in this folder.")
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=32, show_default=True)
def demo(keep: str | None, max_tokens: int) -> None:
    """Convert the embedded model and generate with a quarter of its experts in RAM, then with all."""
    from convert.demo import convert_embedded, working_folder
    from offload.engine.demo import show_paging

    with working_folder(keep) as folder:
        with _progress() as progress:
            store = convert_embedded(folder, progress=progress, echo=click.echo)
        show_paging(store, max_tokens=max_tokens, echo=click.echo)


# -- plumbing --------------------------------------------------------------------------------


def _load(store: str, arguments: dict[str, Any]) -> Engine:
    import offload

    engine = offload.load(store, **arguments)
    _echo(engine.describe())
    return engine


def _echo(lines: Iterable[str]) -> None:
    """Lines about a run, which stdout has no room for."""
    for line in lines:
        click.echo(line, err=True)


def _prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    from offload.errors import UsageError

    if prompt is not None and prompt_file is not None:
        raise click.UsageError("give one of -p, --prompt-file and --prompt-ids")
    if prompt is not None:
        return prompt
    try:
        if prompt_file not in (None, "-"):
            return Path(str(prompt_file)).read_text(encoding="utf-8")
        if sys.stdin.isatty():
            click.echo("reading the prompt from standard input; end it with Ctrl-D", err=True)
        return sys.stdin.buffer.read().decode()
    except (OSError, UnicodeDecodeError) as fault:
        raise UsageError(f"cannot read the prompt from {prompt_file or 'standard input'}: {fault}") from None


def _report(lines: Iterable[str], values: dict[str, Any], as_json: bool) -> None:
    """Lines for people, or one JSON object for machines."""
    if as_json:
        click.echo(json.dumps(values))
        return
    for line in lines:
        click.echo(line)


def _write_page(report: HasPage, html: str | None) -> None:
    if html:
        click.echo(f"report: {report.page().write(html)}", err=True)


@contextmanager
def _progress(as_json: bool = False) -> Iterator[ProgressDisplay]:
    """Progress on stderr. The first Ctrl-C ends the work in order, a second one ends the process at once."""
    from convert.display import ProgressDisplay

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGINT, interrupt)
    try:
        with ProgressDisplay(as_json) as progress:
            yield progress
    finally:
        signal.signal(signal.SIGINT, former)


def _open_streams() -> None:
    """Standard streams that were closed (`2>&-`) read and write nothing."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # Also for the libraries: the number of a closed stream would go to the next file that is opened.
            nothing = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(nothing, "r" if name == "stdin" else "w"))


def main() -> None:
    """Entry point: every fault becomes one line on stderr and an exit code."""
    from offload.errors import OffloadError
    from offload.interrupts import ENDING

    _open_streams()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    debug = "--debug" in sys.argv[1:]
    ended_by = 0

    def interrupt(number: int, frame: object) -> None:
        nonlocal ended_by
        ended_by = number
        raise KeyboardInterrupt

    # Whoever ends a run gets what Ctrl-C gets: the summary, the trace. Signals that are ignored (nohup) stay so.
    for number in ENDING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, interrupt)
    try:
        code = cli.main(standalone_mode=False, auto_envvar_prefix="EXPERTPAGER")
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as fault:
        sys.exit(fault.exit_code)
    except click.ClickException as fault:
        fault.show()
        sys.exit(fault.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _end_interrupted(ended_by)
    except ReaderGoneError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed
        sys.exit(141)
    except (OffloadError, OSError, MemoryError) as fault:
        if debug:
            raise
        what = "the output cannot be written: " if _of_output(fault) else ""
        click.echo(f"error: {what}{fault or type(fault).__name__}", err=True)
        sys.exit(1)
    except Exception as fault:
        if ended_by:  # Libraries that are interrupted while they are imported raise anything.
            _end_interrupted(ended_by)
        if debug:
            raise
        click.echo(
            f"error: internal fault: {type(fault).__name__}: {fault}; run `expertpager --debug ...` for the traceback",
            err=True,
        )
        sys.exit(1)


def _of_output(fault: BaseException) -> bool:
    """Whether what was to be printed could not be written, as on a full disk: such a fault names no file."""
    return any(frame.f_code is click.echo.__code__ for frame, _ in walk_tb(fault.__traceback__))


def _end_interrupted(number: int) -> NoReturn:
    """The end after signal `number` (0: Ctrl-C that nobody has counted)."""
    number = number or signal.SIGINT
    signal.signal(number, signal.SIG_DFL)  # once more: at once, without a word
    click.echo("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}", err=True)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
