"""What one generation is asked for and what it gives back.

Owns the sampling options with their ranges and defaults, the record of one generated token and the
record of a finished generation. Must not know models, tokenizers, devices or the command line.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from offload.errors import ConfigError, UsageError

FinishReason = Literal["stop", "length"]

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    max_tokens        tokens generated at most, the stop token included
    temperature       0 is greedy: the highest logit, the lowest id on ties
    top_p             keep the fewest most probable tokens that together reach this probability
    top_k             keep this many most probable tokens; 0 keeps all
    min_p             keep tokens at least this probable relative to the most probable one
    seed              same seed, same logits: same tokens. None draws a fresh seed
    stop              texts that end generation; neither they nor what follows them is given out
    stop_token_ids    token ids that end generation beside the model's own end-of-sequence ids
    ignore_eos        go on past the model's end-of-sequence ids
    logprobs          None, or how many of the most probable tokens to report with each step

    Raises UsageError, naming the option and what it may be.
    """

    max_tokens: int = 256
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._set("max_tokens", _integer("max_tokens", self.max_tokens, 1))
        self._set("temperature", _number("temperature", self.temperature, 0.0, math.inf))
        self._set("top_p", _number("top_p", self.top_p, 0.0, 1.0))
        self._set("top_k", _integer("top_k", self.top_k, 0))
        self._set("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, 0, MAX_SEED))
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise UsageError(f"ignore_eos is {self.ignore_eos!r}: it must be true or false")
        if self.logprobs is not None:
            self._set("logprobs", _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class GenerationStep:
    """One generated token.

    `text` is what became certain with this token: it may be empty (half a character, or the possible
    beginning of a stop string is held back) and may hold more than this token's own text. `logprob`
    and `top_logprobs` (token id, natural log of its probability; best first) are those of the model's
    unmodified distribution. `finish_reason` is set on the last step only.
    """

    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class GenerationResponse:
    """A whole generation. `token_ids` ends with the stop token if there was one; `text` never shows it.

    `ttft_s` is the time to the first token in seconds, `prefill_tok_s` prompt tokens per second of
    prompt processing, `decode_tok_s` tokens per second after the first one; None where there is
    nothing to measure. Time that the consumer spends between steps does not count. `finish_reason`
    is None if the consumer stopped early.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None
    seed: int
    ttft_s: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {**asdict(self), "token_ids": list(self.token_ids)}


_FROM_GENERATION_CONFIG = ("temperature", "top_p", "top_k", "min_p")


def resolve_sampling(explicit: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> SamplingParams:
    """Sampling options: what the user gave, else the checkpoint's generation_config.json, else defaults.

    A value of None in either mapping counts as not given. From generation_config come temperature,
    top_p, top_k and min_p; `do_sample: false` there means temperature 0. Raises UsageError for what
    the user gave, ConfigError for what the checkpoint says.
    """
    known = {field.name for field in fields(SamplingParams)}
    given = {name: value for name, value in explicit.items() if value is not None}
    for name in given:
        if name not in known:
            raise UsageError(f"unknown sampling option {name!r}: known are {', '.join(sorted(known))}")
    config = generation_config or {}
    advised = {k: config[k] for k in _FROM_GENERATION_CONFIG if config.get(k) is not None}
    if config.get("do_sample") is False:
        advised["temperature"] = 0.0
    try:
        SamplingParams(**advised)
    except UsageError as error:
        raise ConfigError(f"generation_config.json: {error}") from None
    return SamplingParams(**{**advised, **given})


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    allowed = f"{low} or more" if high is None else f"{low} to {high}"
    complaint = f"{name} is {value!r}: it must be a whole number, {allowed}"
    if isinstance(value, bool):
        raise UsageError(complaint)
    try:
        number = operator.index(value)
    except TypeError:
        raise UsageError(complaint) from None
    if number < low or (high is not None and number > high):
        raise UsageError(complaint)
    return number


def _number(name: str, value: Any, low: float, high: float) -> float:
    allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
    complaint = f"{name} is {value!r}: it must be a number, {allowed}"
    if isinstance(value, (bool, str)):
        raise UsageError(complaint)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(complaint) from None
    if not (low <= number <= high) or math.isinf(number):
        raise UsageError(complaint)
    return number


def _stop_strings(value: str | Iterable[str]) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else _tuple("stop", value)
    for text in strings:
        if not isinstance(text, str) or not text:
            raise UsageError(f"stop holds {text!r}: each stop string must be a non-empty text")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError(f"stop holds {text!r}: each stop string must be text that UTF-8 can express")
    return strings


def _token_ids(name: str, value: Iterable[int]) -> tuple[int, ...]:
    return tuple(_integer(f"{name}[{i}]", token, 0) for i, token in enumerate(_tuple(name, value)))


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (Mapping, bytes)) or not isinstance(value, Iterable):
        raise UsageError(f"{name} is {value!r}: it must be a list")
    return tuple(value)
