from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serving import HashEngine, Running, wait_until

from offload.errors import DiskError

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "seed": 5}
PLAIN = {"prompt": "the cache", "max_tokens": 12, "seed": 5}


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events; the last must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_completion(client: httpx.Client, engine: HashEngine) -> None:
    answer = client.post("/v1/completions", json=PLAIN).json()
    choice = answer["choices"][0]
    assert answer["object"] == "text_completion"
    assert answer["model"] == engine.name
    assert answer["usage"] == {
        "prompt_tokens": len(engine.prompts[0]),
        "completion_tokens": 12,
        "total_tokens": len(engine.prompts[0]) + 12,
    }
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    assert engine.prompts[0] == engine.tokenizer.encode("the cache")
    steps = list(engine.generate(engine.prompts[0], max_tokens=12, seed=5))
    assert choice["text"] == "".join(step.text for step in steps)
    assert choice["text"]


def test_streamed_and_whole_answers_are_the_same(client: httpx.Client) -> None:
    for path, request in (("/v1/completions", PLAIN), ("/v1/chat/completions", CHAT)):
        whole = client.post(path, json=request).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = events(client.post(path, json={**request, **options}))
        assert last["choices"] == []
        assert last["usage"] == whole["usage"]
        assert {c["id"] for c in chunks} == {last["id"]}
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
        if path == "/v1/completions":
            text = "".join(c["choices"][0]["text"] for c in chunks)
            assert text == whole["choices"][0]["text"]
        else:
            assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
            text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
            assert text == whole["choices"][0]["message"]["content"]
        assert len(chunks) > 4


def test_sampling_options_reach_the_engine(client: httpx.Client) -> None:
    def text(**changes: Any) -> str:
        return client.post("/v1/completions", json={**PLAIN, **changes}).json()["choices"][0]["text"]

    assert text() == text() != text(seed=6)
    assert text(temperature=0) == text(temperature=0, seed=6) == text(top_k=1) == text(top_p=0) == text(min_p=1)
    whole = text()
    assert text(stop=whole[5:8]) == whole[: whole.find(whole[5:8])]
    greedy = client.post("/v1/completions", json={**PLAIN, "temperature": 0, "logprobs": 2}).json()["choices"][0]
    logprobs = greedy["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 12
    assert [max(top.values()) for top in logprobs["top_logprobs"]] == logprobs["token_logprobs"]


def test_token_ids_as_prompt(client: httpx.Client, engine: HashEngine) -> None:
    assert client.post("/v1/completions", json={**PLAIN, "prompt": [5, 9, 300]}).status_code == 200
    assert engine.prompts == [[5, 9, 300]]


def test_a_chat_goes_through_the_template(client: httpx.Client, engine: HashEngine) -> None:
    engine.script = "Good day."
    system = {"role": "system", "content": "Be brief."}
    messages = [system, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    answer = client.post("/v1/chat/completions", json={"messages": messages}).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Good day."}
    assert answer["choices"][0]["finish_reason"] == "stop"
    text = engine.tokenizer.apply_chat_template([system, {"role": "user", "content": "hi"}])
    assert engine.prompts == [engine.tokenizer.encode(text)]


def test_chat_log_probabilities(client: httpx.Client) -> None:
    request = {**CHAT, "logprobs": True, "top_logprobs": 3}
    whole = client.post("/v1/chat/completions", json=request).json()["choices"][0]["logprobs"]["content"]
    assert len(whole) == 12
    assert all(len(entry["top_logprobs"]) == 3 for entry in whole)
    chunks = events(client.post("/v1/chat/completions", json={**request, "stream": True}))
    streamed = [e for c in chunks[1:] for e in c["choices"][0]["logprobs"]["content"]]
    assert streamed == whole
    known = [entry for entry in whole if entry["bytes"] is not None]
    assert known
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in known)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_apart(client: httpx.Client, engine: HashEngine, stream: bool) -> None:
    engine.script = "<think>\nWhy?\n</think>\n\nBecause <b>."

    def parts(**changes: Any) -> tuple[str, str]:
        response = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 99, "stream": stream, **changes})
        if not stream:
            message = response.json()["choices"][0]["message"]
            return message.get("reasoning_content", ""), message["content"]
        deltas = [chunk["choices"][0]["delta"] for chunk in events(response)]
        return tuple("".join(d.get(n, "") for d in deltas) for n in ("reasoning_content", "content"))

    assert parts() == ("\nWhy?\n", "\n\nBecause <b>.")
    assert parts(separate_reasoning=False) == ("", engine.script)
    engine.script = "<think>never closed"
    assert parts() == ("never closed", "")


def test_models_and_health(client: httpx.Client, engine: HashEngine) -> None:
    cards = client.get("/v1/models").json()
    assert cards["object"] == "list"
    assert [card["id"] for card in cards["data"]] == [engine.name]
    assert client.get(f"/v1/models/{engine.name}").json() == cards["data"][0]
    assert client.post("/v1/completions", json={**PLAIN, "model": engine.name}).status_code == 200
    assert error_of(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    error = error_of(client.post("/v1/completions", json={**PLAIN, "model": "gpt-4"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert engine.name in error["message"]
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


BAD = [
    ("/v1/completions", {**PLAIN, "temperature": -1}, "temperature is -1"),
    ("/v1/completions", {**PLAIN, "prompt": [512]}, "prompt id 512 at position 0 is not in the vocabulary"),
    ("/v1/completions", {**PLAIN, "prompt": []}, "the prompt is empty"),
    ("/v1/completions", {**PLAIN, "prompt": "x" * 300}, "the context holds 256"),
    ("/v1/completions", {**PLAIN, "prompt": "\ud83d"}, "invalid character"),
    ("/v1/completions", {**PLAIN, "n": 2}, "n is not supported"),
    ("/v1/chat/completions", {"messages": []}, "messages must be a non-empty list"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": 3}]}, "chat template"),
    ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"bos_token": ""}}, "bos_token"),
    ("/v1/completions", {**PLAIN, "stop": "\ud83d"}, "stop holds '\\ud83d'"),
    ("/v1/completions", {**PLAIN, "\ud83d": 1}, "unknown field '\\ud83d'"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_answered_at_once(client: httpx.Client, engine: HashEngine, stream: bool) -> None:
    for path, body, message in BAD:
        text = json.dumps({**body, "stream": stream})
        error = error_of(client.post(path, content=text), 400)
        assert message in error["message"]
        assert error["type"] == "invalid_request_error"
    assert engine.prompts == []


def test_errors_of_http_have_the_same_shape(client: httpx.Client) -> None:
    assert "not valid JSON" in error_of(client.post("/v1/completions", content="{"), 400)["message"]
    assert "/v1/nowhere" in error_of(client.get("/v1/nowhere"), 404)["message"]
    assert "GET" in error_of(client.get("/v1/completions"), 405)["message"]


def test_a_body_that_is_too_large(start: Callable[..., Running]) -> None:
    client = start(max_body_bytes=1000).client
    assert (
        "1000 bytes" in error_of(client.post("/v1/completions", json={**PLAIN, "prompt": "x" * 2000}), 413)["message"]
    )
    assert client.post("/v1/completions", json=PLAIN).status_code == 200


@pytest.mark.parametrize(("fault", "told"), [(DiskError("disk is gone"), "is gone"), (ValueError("secret"), "log")])
def test_faults_of_the_engine(client: httpx.Client, engine: HashEngine, fault: Exception, told: str) -> None:
    engine.fault = fault
    error = error_of(client.post("/v1/completions", json=PLAIN), 500)
    assert error["type"] == "server_error"
    assert told in error["message"]
    assert "secret" not in error["message"]
    (streamed,) = events(client.post("/v1/completions", json={**PLAIN, "stream": True}))
    assert streamed["error"] == error
    engine.fault = None
    assert client.post("/v1/completions", json=PLAIN).status_code == 200
    assert "expertpager_requests_failed_total 2\n" in client.get("/metrics").text


def test_without_a_tokenizer_ids_work_and_texts_say_why_not(client: httpx.Client, engine: HashEngine) -> None:
    engine.tokenizer = None
    answer = client.post("/v1/completions", json={**PLAIN, "prompt": [4, 5], "logprobs": 1}).json()
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")
    for path, body in (("/v1/completions", PLAIN), ("/v1/chat/completions", CHAT)):
        assert "has no tokenizer" in error_of(client.post(path, json=body), 400)["message"]
    body = {**PLAIN, "prompt": [4, 5], "stop": "x"}
    assert "use stop_token_ids" in error_of(client.post("/v1/completions", json=body), 400)["message"]


def test_one_at_a_time_in_order_and_no_more_than_may_wait(start: Callable[..., Running], engine: HashEngine) -> None:
    client = start(max_waiting=2).client
    engine.gate.clear()

    def ask(number: int) -> int:
        return client.post("/v1/completions", json={**PLAIN, "prompt": [number, 7]}).status_code

    with ThreadPoolExecutor(3) as pool:
        asked = []
        for number in (11, 12, 13):
            asked.append(pool.submit(ask, number))
            wanted = {"status": "ok", "running": 1, "waiting": len(asked) - 1}
            wait_until(lambda wanted=wanted: client.get("/health").json() == wanted)
        refused = client.post("/v1/completions", json=PLAIN)
        assert error_of(refused, 429)["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) > 0
        assert engine.prompts == [[11, 7]]
        engine.gate.set()
        assert [future.result() for future in asked] == [200, 200, 200]
    assert engine.prompts == [[11, 7], [12, 7], [13, 7]]
    text = client.get("/metrics").text
    assert "expertpager_requests_rejected_total 1\n" in text
    assert "expertpager_requests_finished_total 3\n" in text


def raw_request(port: int, body: dict[str, Any]) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_generation(
    start: Callable[..., Running], engine: HashEngine, stream: bool
) -> None:
    server = start()
    engine.gate.clear()
    connection = raw_request(server.port, {**PLAIN, "max_tokens": 200, "stream": stream})
    wait_until(lambda: engine.prompts != [])
    connection.close()
    wait_until(lambda: server.client.get("/health").json()["running"] == 1)
    wait_until(lambda: "requests_running 1" in server.client.get("/metrics").text)
    threading.Timer(0.05, engine.gate.set).start()
    wait_until(lambda: server.client.get("/health").json()["running"] == 0)
    assert engine.calls < 50
    assert engine.closed == 1
    assert "expertpager_requests_cancelled_total 1\n" in server.client.get("/metrics").text
    assert server.client.post("/v1/completions", json=PLAIN).status_code == 200


def test_a_client_that_leaves_while_waiting_is_never_served(start: Callable[..., Running], engine: HashEngine) -> None:
    server = start()
    engine.gate.clear()
    first = raw_request(server.port, PLAIN)
    wait_until(lambda: engine.prompts != [])
    second = raw_request(server.port, {**PLAIN, "prompt": [9, 9]})
    wait_until(lambda: server.client.get("/health").json()["waiting"] == 1)
    second.close()
    wait_until(lambda: server.client.get("/health").json()["waiting"] == 0)
    engine.gate.set()
    wait_until(lambda: server.client.get("/health").json()["running"] == 0)
    assert len(engine.prompts) == 1
    assert b"200 OK" in first.recv(100)
    first.close()


def test_a_client_that_does_not_read_does_not_hold_up_the_others(
    start: Callable[..., Running], engine: HashEngine
) -> None:
    server = start()
    lazy = raw_request(server.port, {**PLAIN, "max_tokens": 200, "stream": True, "logprobs": 20})
    assert server.client.post("/v1/completions", json=PLAIN).status_code == 200
    assert len(engine.prompts) == 2
    lazy.close()


def test_silence_is_filled_with_comments(start: Callable[..., Running], engine: HashEngine) -> None:
    client = start(keep_alive_s=0.02).client
    engine.gate.clear()
    threading.Timer(0.3, engine.gate.set).start()
    response = client.post("/v1/completions", json={**PLAIN, "stream": True})
    assert response.text.count(": still working\n\n") >= 3
    assert len(events(response)) > 4


def test_an_api_key(start: Callable[..., Running]) -> None:
    client = start(api_key="s\u00e9same").client
    for headers in ({}, {"authorization": "Bearer other"}):
        assert error_of(client.post("/v1/completions", json=PLAIN, headers=headers), 401)["code"] == "invalid_api_key"
        assert error_of(client.get("/v1/models", headers=headers), 401)
    assert client.get("/health").status_code == 200
    headers = {"authorization": "Bearer s\u00e9same".encode("latin-1")}
    assert client.post("/v1/completions", json=PLAIN, headers=headers).status_code == 200


def test_web_pages_are_let_in_only_if_named(start: Callable[..., Running]) -> None:
    origin = {"origin": "http://example.org"}
    assert "access-control-allow-origin" not in start().client.get("/v1/models", headers=origin).headers
    client = start(allow_origins=("http://example.org",)).client
    assert client.get("/v1/models", headers=origin).headers["access-control-allow-origin"] == "http://example.org"
    assert "access-control-allow-origin" not in client.get("/v1/models", headers={"origin": "http://other"}).headers


def test_metrics(client: httpx.Client) -> None:
    client.post("/v1/completions", json={**PLAIN, "prompt": [3, 4, 5]})
    lines = client.get("/metrics").text.splitlines()
    assert "expertpager_requests_accepted_total 1" in lines
    assert "expertpager_prompt_tokens_total 3" in lines
    assert "expertpager_completion_tokens_total 12" in lines
    assert "expertpager_ram_hits 3" in lines
    assert 'expertpager_layer_stall_s{index="1"} 1.5' in lines


@pytest.mark.parametrize("stream", [False, True])
def test_shutdown_ends_what_is_under_way(start: Callable[..., Running], engine: HashEngine, stream: bool) -> None:
    server = start()
    engine.pause_s = 0.05  # 200 tokens would take ten seconds, the server waits for one
    connection = raw_request(server.port, {**PLAIN, "max_tokens": 200, "stream": stream})
    wait_until(lambda: engine.calls > 1)
    server.stop()
    assert engine.closed == 1
    assert engine.calls < 200
    with connection, connection.makefile("rb") as answer:
        text = answer.read().decode()
    assert text.startswith("HTTP/1.1 200" if stream else "HTTP/1.1 503")
    assert '"code": "shutting_down"' in text if stream else '"code":"shutting_down"' in text
    assert not stream or text.endswith("data: [DONE]\n\n\r\n0\r\n\r\n")  # a whole answer, not one cut off


def test_a_client_that_leaves_while_it_sends_is_no_fault(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    server = start()
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"pro')
    time.sleep(0.2)
    connection.close()
    time.sleep(0.2)
    assert server.client.post("/v1/completions", json=PLAIN).status_code == 200
    assert not caplog.records
