"""Choosing runtime options for this machine: candidates from a replay, a decision by real runs.

Owns the search and the profile it writes. A change is kept only if it is measurably faster and the tokens are the
same. Candidates are tried one option at a time, from the one with the largest expected effect: memory, split,
policy and its half-life, threads, reads ahead and how far, readers; then all over again while something was kept,
since options depend on each other.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from offload.cache.policy import HALF_LIVES
from offload.cache.simulator import replay
from offload.cache.trace import Trace
from offload.engine.bench import TOPICS
from offload.engine.engine import Engine
from offload.engine.options import LIVE_POLICIES, SAVED_PROFILE, RuntimeOptions, find_profile, resolve_options
from offload.engine.tune_page import tune_page
from offload.errors import BudgetError, OffloadError, UsageError
from offload.kernels.native import usable_cpus
from offload.report import Page

GAIN = 0.03
"""A candidate that decodes faster by this share replaces what is there: less may be noise."""

SMALL_GAIN = 0.005
"""So does one that is faster by this share with every single prompt, if there are enough of them."""

ENOUGH_PROMPTS = 3

ROUNDS = 3
"""Times that the options are gone through."""

READER_COUNTS = (4, 8, 16)
DEPTHS = (0, 1, 2)
"""Of reading ahead, in layers."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """What one setting did. `seconds` per decoded token, one figure per prompt."""

    options: RuntimeOptions
    seconds: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]
    slots: int
    trace: Trace | None = None

    @property
    def tok_s(self) -> float:
        return 1 / median(self.seconds)


Run = Callable[[RuntimeOptions, bool], Trial]


@dataclass(frozen=True)
class Step:
    """One candidate beside the best before it."""

    what: str
    tok_s: float
    kept: bool
    note: str = ""


@dataclass(frozen=True)
class TuneReport:
    """Before, after, every step between, and where the profile is."""

    before: Trial
    after: Trial
    steps: Sequence[Step]
    path: Path
    saved: bool = False
    """Whether the profile is where runs of the store look for it."""

    def page(self) -> Page:
        """For people, with charts."""
        return tune_page(self)

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"before: {self.before.tok_s:.2f} tok/s with {self.before.slots} slots"
        for step in self.steps:
            speed = f"{step.tok_s:.2f} tok/s" if step.tok_s else "not run"
            yield f"  {step.what:<24} {speed:>14}  {'kept' if step.kept else 'dropped'}{step.note and ': ' + step.note}"
        gain = self.after.tok_s / self.before.tok_s - 1
        yield f"after: {self.after.tok_s:.2f} tok/s with {self.after.slots} slots ({gain:+.0%}), the same tokens"
        use = "runs of this store take it by themselves" if self.saved else "use it with --profile"
        yield f"profile: {self.path} ({use})"

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "profile": str(self.path),
            "before_tok_s": self.before.tok_s,
            "after_tok_s": self.after.tok_s,
            "options": profile_values(self.after.options),
            "steps": [vars(step) for step in self.steps],
        }


def tune(
    store: str | Path,
    *,
    output: str | Path | None = None,
    prompts: str | Path | None = None,
    max_tokens: int = 24,
    profile: str | Path | None = None,
    tell: Tell | None = None,
    run: Run | None = None,
    **options: Any,
) -> TuneReport:
    """Find faster options for `store` than those of `profile`, and write them to `output` as a profile.

    Without `output` the profile is saved in the store's folder, where later runs find it. `options` given here are
    fixed. `prompts` is a file with one prompt per line. Raises OffloadError if a setting
    changes the tokens, which would be a defect.
    """
    target = Path(output) if output is not None else Path(store) / SAVED_PROFILE
    if not target.absolute().parent.is_dir():
        raise UsageError(f"--output {target}: there is no folder {target.absolute().parent}")
    if not os.access(target.absolute().parent, os.W_OK):
        raise UsageError(f"{target} cannot be written; give --output, and that file as --profile later")
    fixed = {name for name, value in options.items() if value is not None}
    start = replace(resolve_options(options, find_profile(store, profile)), trace=None)
    run = run or runner(Path(store), prompts, max_tokens)
    tell = tell or _silent
    tell("as it is")
    before = run(start, True)
    best, steps = _search(before, fixed, run, tell)
    write_profile(best, target)
    return TuneReport(before, best, steps, target, target == Path(store) / SAVED_PROFILE)


def _search(before: Trial, fixed: set[str], run: Run, tell: Tell) -> tuple[Trial, list[Step]]:
    """The best trial, by going through the options until nothing is kept any more."""
    best, tried, steps = before, {before.options}, []
    for _ in range(ROUNDS):
        since = best
        for stage in STAGES:
            for what, changes in stage(best, fixed):
                options = replace(best.options, **changes)
                if options in tried:
                    continue
                tried.add(options)
                tell(what)
                try:
                    trial = replace(run(options, False), trace=before.trace)
                except BudgetError as fault:
                    steps.append(Step(what, 0.0, False, str(fault)))
                    continue
                if trial.tokens != before.tokens and "split" in changes:
                    steps.append(Step(what, trial.tok_s, False, "other tokens, by rounding"))
                    continue
                if trial.tokens != before.tokens:
                    raise OffloadError(
                        f"the tokens depend on {what}: {trial.tokens} instead of {before.tokens}; report this"
                    )
                kept = measurably_faster(trial, best)
                steps.append(Step(what, trial.tok_s, kept))
                best = trial if kept else best
        if best is since:
            break
    return best, steps


def measurably_faster(trial: Trial, best: Trial) -> bool:
    """Faster by more than noise, or by less with every prompt."""
    if trial.tok_s > best.tok_s * (1 + GAIN):
        return True
    pairs = list(zip(trial.seconds, best.seconds, strict=True))
    return (
        len(pairs) >= ENOUGH_PROMPTS
        and trial.tok_s > best.tok_s * (1 + SMALL_GAIN)
        and all(new < old for new, old in pairs)
    )


Changes = list[tuple[str, dict[str, Any]]]


def memory_candidates(best: Trial, fixed: set[str]) -> Changes:
    """More slots than a budget that somebody wrote down."""
    if "ram" in fixed or best.options.ram is None:
        return []
    return [("ram: what is free", {"ram": None, "allow_slow": False})]


def policy_candidates(best: Trial, fixed: set[str]) -> Changes:
    """What a replay with as many slots finds no worse, with the half-life that was given or else the policy's own."""
    if "policy" in fixed:
        return []
    given = best.options.half_life if "half_life" in fixed else None
    others = [name for name in LIVE_POLICIES if name != best.options.policy and (given is None or name in HALF_LIVES)]
    found = promising(best, [(name, given) for name in others])
    return [(f"policy {name}", {"policy": name, "half_life": half_life}) for name, half_life in found]


def half_life_candidates(best: Trial, fixed: set[str]) -> Changes:
    """Half and twice the policy's half-life, where a replay with as many slots finds that no worse."""
    policy = best.options.policy
    if "half_life" in fixed or policy not in HALF_LIVES:
        return []
    own = HALF_LIVES[policy]
    now = best.options.half_life or own
    found = promising(best, [(policy, None if half_life == own else half_life) for half_life in (now / 2, now * 2)])
    return [(f"half-life {half_life or own:g}", {"half_life": half_life}) for _, half_life in found]


def thread_candidates(best: Trial, fixed: set[str]) -> Changes:
    """All cores, one less for the readers, half of them."""
    if "threads" in fixed:
        return []
    cores = usable_cpus()
    counts = sorted({cores, max(1, cores - 1), max(1, cores // 2)} - {best.options.threads or cores}, reverse=True)
    return [(f"threads {count}", {"threads": count}) for count in counts]


def prefetch_candidates(best: Trial, fixed: set[str]) -> Changes:
    """The other way, where something is left to read."""
    if "prefetch" in fixed or not _reads(best):
        return []
    other = not best.options.prefetch
    return [("prefetch" if other else "no prefetch", {"prefetch": other})]


def depth_candidates(best: Trial, fixed: set[str]) -> Changes:
    """Routers applied for fewer or more layers ahead, where there is reading ahead."""
    if "prefetch_depth" in fixed or not best.options.prefetch or not _reads(best):
        return []
    depths = [depth for depth in DEPTHS if depth != best.options.prefetch_depth]
    return [(f"prefetch depth {depth}", {"prefetch_depth": depth}) for depth in depths]


def reader_candidates(best: Trial, fixed: set[str]) -> Changes:
    """Fewer or more reads under way, where something is left to read."""
    if "readers" in fixed or not _reads(best):
        return []
    return [(f"readers {count}", {"readers": count}) for count in READER_COUNTS if count != best.options.readers]


def split_candidates(best: Trial, fixed: set[str]) -> Changes:
    """With a VRAM tier, the other place for experts that it lacks."""
    if "split" in fixed or best.options.vram is None:
        return []
    other = "gpu" if best.options.split == "hybrid" else "hybrid"
    return [(f"split {other}", {"split": other})]


def _reads(best: Trial) -> bool:
    return best.trace is None or best.slots < best.trace.shape.keys


STAGES = (
    memory_candidates,
    split_candidates,
    policy_candidates,
    half_life_candidates,
    thread_candidates,
    prefetch_candidates,
    depth_candidates,
    reader_candidates,
)


Setting = tuple[str, float | None]
"""A policy and its half-life in tokens; None: its own."""


def promising(best: Trial, settings: Sequence[Setting]) -> list[Setting]:
    """Those of `settings` that miss no more than what is there, fewest misses first, as a replay counts them.

    Reads ahead are left out of all replays, since only those of the recorded setting are known. With every expert
    resident no policy has anything to decide.
    """
    if best.trace is None or not _reads(best):
        return []
    trace = replace(best.trace, prefetches=[])

    def misses(setting: Setting) -> int:
        policy, half_life = setting
        result = replay(trace, policy, best.slots, half_life=half_life)
        return result.decode_misses or result.events.misses

    limit = misses((best.options.policy, best.options.half_life)) * 1.02
    found = [(misses(setting), setting) for setting in settings]
    return [setting for count, setting in sorted(found, key=lambda item: item[0]) if count <= limit]


def profile_values(options: RuntimeOptions) -> dict[str, Any]:
    """The options that differ from the defaults."""
    default = RuntimeOptions()
    return {
        field.name: getattr(options, field.name)
        for field in fields(RuntimeOptions)
        if field.name != "trace" and getattr(options, field.name) != getattr(default, field.name)
    }


def write_profile(trial: Trial, path: Path) -> None:
    """A TOML file that `--profile` reads. Raises UsageError if it cannot be written."""
    rows = [f"{name} = {json.dumps(_plain(value))}" for name, value in profile_values(trial.options).items()]
    text = "\n".join([f"# Found by expertpager tune: {trial.tok_s:.2f} tok/s, {trial.slots} expert slots.", *rows])
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as fault:
        raise UsageError(f"{path} cannot be written: {fault.strerror}") from None


def _plain(value: Any) -> Any:
    return str(value.absolute()) if isinstance(value, Path) else value


def runner(store: Path, prompts: str | Path | None, max_tokens: int) -> Run:
    """Real runs: the first prompt warms the slots, the others are timed."""
    texts = _texts(prompts)

    def run(options: RuntimeOptions, record: bool) -> Trial:
        with tempfile.TemporaryDirectory(prefix="expertpager-tune-") as folder:
            file = Path(folder) / "trace.npz"
            with Engine(store, replace(options, trace=file if record else None, usage="off")) as engine:
                seconds, tokens = [], []
                for number, text in enumerate(texts):
                    prompt = engine.encode(text) if engine.tokenizer else _ids(text, engine.vocab_size)
                    steps = engine.generate(
                        prompt, max_tokens=max_tokens, temperature=0.8, seed=number, ignore_eos=True
                    )
                    first = next(steps).token_id
                    begun = time.perf_counter()
                    rest = [step.token_id for step in steps]
                    if number:
                        seconds.append((time.perf_counter() - begun) / max(1, len(rest)))
                    tokens.append((first, *rest))
                slots = engine.plan.slots
            trace = Trace.load(file) if record else None
        return Trial(options, tuple(seconds), tuple(tokens), slots, trace)

    return run


def _texts(prompts: str | Path | None) -> list[str]:
    if prompts is None:
        return list(TOPICS[:4])
    try:
        texts = [line for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as fault:
        raise UsageError(f"--prompts {prompts} cannot be read: {fault}") from None
    if len(texts) < 2:
        raise UsageError(f"--prompts {prompts}: at least two prompts are needed, one per line")
    return texts


def _ids(text: str, vocab_size: int) -> list[int]:
    """Token ids for a store without a tokenizer: any will do, if they are the same every time."""
    return [byte % vocab_size for byte in text.encode()]


def _silent(_: str) -> None:
    return
