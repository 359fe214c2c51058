from __future__ import annotations

from typing import Any

import pytest

from offload.server.protocol import ApiError, parse_body, parse_chat, parse_completion

HI = [{"role": "user", "content": "hi"}]


def test_a_completion_is_read() -> None:
    asked = parse_completion(
        parse_body(
            b'{"model": "m", "prompt": "a", "max_tokens": 5, "temperature": 0, "top_p": null, "stop": "x", "seed": 1,'
            b' "logprobs": 2, "n": 1, "user": "me", "stream": true, "stream_options": {"include_usage": true}}'
        )
    )
    assert asked.sampling == {"max_tokens": 5, "temperature": 0, "stop": "x", "seed": 1, "logprobs": 2}
    assert (asked.model, asked.prompt, asked.stream, asked.include_usage) == ("m", "a", True, True)
    assert not asked.is_chat


@pytest.mark.parametrize(("prompt", "read"), [("", ""), (["a"], "a"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), ([], [])])
def test_forms_of_a_prompt(prompt: Any, read: Any) -> None:
    assert parse_completion({"prompt": prompt}).prompt == read


def test_a_chat_is_read() -> None:
    asked = parse_chat(
        {
            "messages": [
                {"role": "system", "content": None},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            ],
            "max_completion_tokens": 7,
            "top_logprobs": 4,
            "logprobs": True,
            "chat_template_kwargs": {"thinking": True},
            "tools": [],
            "response_format": {"type": "text"},
            "frequency_penalty": 0.0,
            "logit_bias": {},
        }
    )
    assert asked.is_chat
    assert [m["content"] for m in asked.messages] == [None, "a\nb"]
    assert asked.sampling == {"max_tokens": 7, "logprobs": 4}
    assert asked.template_options == {"thinking": True}
    assert asked.separate_reasoning
    assert parse_chat({"messages": HI, "logprobs": True}).sampling == {"logprobs": 0}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 2),
        ("max_tokens", 0),
        ("stop", ["a", 3]),
        ("seed", -1),
        ("stream", "yes"),
        ("stream_options", {"other": 1}),
        ("n", 2),
        ("n", True + 1),
        ("presence_penalty", 0.5),
        ("logit_bias", {"5": 1}),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("nonsense", 1),
        ("messages", []),
        ("messages", "hi"),
        ("messages", [{"content": "hi"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("chat_template_kwargs", [1]),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"self": 1}),
        ("chat_template_kwargs", {"special_tokens": {}}),
        ("chat_template_kwargs", {"tools": [{}]}),
        ("chat_template_kwargs", {"template": []}),
        ("chat_template_kwargs", {"add_generation_prompt": "no"}),
        ("stream_options", {"include_usage": "yes"}),
        ("tool_choice", "required"),
        ("stop", {"a": 1}),
        ("separate_reasoning", 1),
        ("top_logprobs", 2),
        ("logprobs", 2),
    ],
)
def test_what_is_not_understood_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ApiError) as error:
        parse_chat({"messages": HI, field: value})
    assert error.value.status == 400
    assert error.value.body["error"]["param"] == field
    assert field in error.value.body["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": 5},
        {"prompt": ["a", "b"]},
        {"prompt": [1, "a"]},
        {"prompt": [True]},
        {"prompt": "a", "echo": True},
        {"prompt": "a", "suffix": "b"},
        {"prompt": "a", "best_of": 3},
        {"prompt": "a", "logprobs": 21},
        {"prompt": "a", "messages": HI},
    ],
)
def test_completions_that_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as error:
        parse_completion(body)
    assert error.value.status == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b'{"a": \xff}', b"[" * 100_000])
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError) as error:
        parse_body(body)
    assert error.value.body["error"]["type"] == "invalid_request_error"
