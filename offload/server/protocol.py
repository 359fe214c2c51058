"""The shapes of OpenAI's API: requests read and checked, responses built.

Owns field names, which values are understood and what errors look like. A field that would change the
answer and is not supported is refused, never ignored. Must not know sockets, queues or engines.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from offload.engine.chat_template import check_messages
from offload.engine.request import GenerationStep, SamplingParams
from offload.engine.tokenizer import Tokenizer
from offload.errors import UsageError

_SAMPLING = frozenset(f.name for f in fields(SamplingParams)) - {"logprobs"}

# Fields that change nothing here: who asks, what for, and how it is billed or kept elsewhere.
_IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# Fields of the API that are not supported, with the values that ask for nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}

_NOT_FOR_TEMPLATES = frozenset({"self", "messages", "tools", "documents", "special_tokens"})


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        message = _tellable(message)
        super().__init__(message)
        self.status = status
        told = None if param is None else _tellable(param)
        self.body = {"error": {"message": message, "type": kind, "param": told, "code": code}}


def _tellable(text: str) -> str:
    """`text` without halves of surrogate pairs, which a client may send and no answer can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class ApiRequest:
    """A checked request. `prompt` is a text or token ids; for a chat it is None and `messages` are set.

    `sampling` holds the fields of SamplingParams that were given.
    """

    model: str | None
    sampling: Mapping[str, Any]
    stream: bool
    include_usage: bool
    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)
    separate_reasoning: bool = False

    @property
    def is_chat(self) -> bool:
        return self.prompt is None


def parse_body(body: bytes) -> dict[str, Any]:
    """The fields of a request, those that are null left out; raises ApiError."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return {name: item for name, item in value.items() if item is not None}


def parse_completion(body: dict[str, Any]) -> ApiRequest:
    """A request to /v1/completions; raises ApiError naming the field."""
    rest = dict(body)
    if "prompt" not in rest:
        raise ApiError(400, "prompt is missing", param="prompt")
    prompt = rest.pop("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not ids and not isinstance(prompt, str):
        raise ApiError(400, "prompt must be one text or one list of token ids", param="prompt")
    logprobs = rest.pop("logprobs", None)
    return ApiRequest(prompt=prompt, **_common(rest, logprobs))


def parse_chat(body: dict[str, Any]) -> ApiRequest:
    """A request to /v1/chat/completions; raises ApiError naming the field."""
    rest = dict(body)
    messages = [_message(m, i) for i, m in enumerate(_list("messages", rest.pop("messages", None)))]
    try:
        check_messages(messages)
    except UsageError as error:
        raise ApiError(400, str(error), param="messages") from None
    options = rest.pop("chat_template_kwargs", {})
    _check_template_options(options)
    if "max_completion_tokens" in rest:
        rest["max_tokens"] = rest.pop("max_completion_tokens")
    separate = _boolean(rest, "separate_reasoning", True)
    wanted, top = _boolean(rest, "logprobs", False), rest.pop("top_logprobs", 0)
    if top and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return ApiRequest(
        messages=messages,
        template_options=options,
        separate_reasoning=separate,
        **_common(rest, top if wanted else None),
    )


def _common(rest: dict[str, Any], logprobs: Any) -> dict[str, Any]:
    """What both kinds of request share; `rest` must be used up by it."""
    model = rest.pop("model", None)
    stream = _boolean(rest, "stream", False)
    stream_options = rest.pop("stream_options", {})
    if not isinstance(stream_options, dict) or stream_options.keys() - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, "stream_options may hold include_usage", param="stream_options")
    if not isinstance(stream_options.get("include_usage", False), bool):
        raise ApiError(400, "stream_options.include_usage must be true or false", param="stream_options")
    sampling = {name: rest.pop(name) for name in _SAMPLING & rest.keys()}
    if logprobs is not None:
        sampling["logprobs"] = logprobs
    for name, value in sampling.items():
        try:
            SamplingParams(**{name: value})
        except UsageError as error:
            raise ApiError(400, str(error), param=name) from None
    for name in sorted(rest.keys() - _IGNORED):
        if name not in _ONLY:
            raise ApiError(400, f"unknown field {name!r}", param=name, code="unknown_parameter")
        if rest[name] not in _ONLY[name]:
            raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
    return {
        "model": None if model is None else str(model),
        "sampling": sampling,
        "stream": stream,
        "include_usage": stream_options.get("include_usage") is True,
    }


def _message(message: Any, index: int) -> Any:
    """A chat message with its content as one text; parts that are no text are refused."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, f"messages[{index}].content may hold text parts only", param="messages")
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}


def _check_template_options(options: Any) -> None:
    """`chat_template_kwargs` are for the template's own names, not for those by which it is called."""
    wrong = None
    if not isinstance(options, dict):
        wrong = "must be an object"
    elif taken := _NOT_FOR_TEMPLATES & options.keys():
        wrong = f"must not hold {', '.join(sorted(taken))}"
    elif not isinstance(options.get("add_generation_prompt", True), bool):
        wrong = "holds add_generation_prompt, which must be true or false"
    elif not isinstance(options.get("template", ""), str):
        wrong = "holds template, which must be the name of one"
    if wrong:
        raise ApiError(400, f"chat_template_kwargs {wrong}", param="chat_template_kwargs")


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ApiError(400, f"{name} must be a list", param=name)
    return value


def _boolean(rest: dict[str, Any], name: str, default: bool) -> bool:
    value = rest.pop(name, default)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", param=name)
    return value


class ResponseShape:
    """Builds the JSON objects of one response: chunks of a stream, or the whole."""

    def __init__(self, request: ApiRequest, model: str, prompt_tokens: int, tokenizer: Tokenizer | None) -> None:
        self._chat = request.is_chat
        self._logprobs = "logprobs" in request.sampling
        self._prompt_tokens = prompt_tokens
        self._tokenizer = tokenizer
        self._id = ("chatcmpl-" if self._chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())
        self._model = model

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        return [self._chunk(delta={"role": "assistant", "content": ""})] if self._chat else []

    def chunk(self, reasoning: str, text: str, steps: Sequence[GenerationStep], finish: str | None) -> dict[str, Any]:
        """One chunk of a stream: new text and the steps that it came with."""
        logprobs = self._logprobs_of(steps)
        if not self._chat:
            return self._chunk(text=text, logprobs=logprobs, finish=finish)
        delta = {name: value for name, value in (("reasoning_content", reasoning), ("content", text)) if value}
        return self._chunk(delta=delta, logprobs=logprobs, finish=finish)

    def usage_chunk(self, completion_tokens: int) -> dict[str, Any]:
        """The last chunk, if usage was asked for."""
        return {**self._head(stream=True), "choices": [], "usage": self._usage(completion_tokens)}

    def whole(self, reasoning: str, text: str, steps: Sequence[GenerationStep], finish: str | None) -> dict[str, Any]:
        """The response to a request without streaming."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": self._logprobs_of(steps)}
        if self._chat:
            message = {"role": "assistant", "content": text}
            choice["message"] = message | ({"reasoning_content": reasoning} if reasoning else {})
        else:
            choice["text"] = text
        return {**self._head(stream=False), "choices": [choice], "usage": self._usage(len(steps))}

    def _chunk(self, logprobs: Any = None, finish: str | None = None, **content: Any) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head(stream=True), "choices": [choice]}

    def _head(self, *, stream: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        total = self._prompt_tokens + completion_tokens
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": total,
        }

    def _logprobs_of(self, steps: Sequence[GenerationStep]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        if self._chat:
            content = [
                self._entry(step.token_id, step.logprob)
                | {"top_logprobs": [self._entry(token, value) for token, value in step.top_logprobs]}
                for step in steps
            ]
            return {"content": content}
        return {
            "tokens": [self._token(step.token_id) for step in steps],
            "token_logprobs": [step.logprob for step in steps],
            "top_logprobs": [{self._token(t): value for t, value in step.top_logprobs} for step in steps],
        }

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = self._token(token_id)
        whole = self._tokenizer is not None and "\ufffd" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    def _token(self, token_id: int) -> str:
        """A token's text; its id where there is no tokenizer or the token is part of a character."""
        text = "" if self._tokenizer is None else self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text if text and "\ufffd" not in text else f"token_id:{token_id}"
