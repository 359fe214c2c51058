"""The HTTP application: routes, streaming, errors.

Owns turning a request into a job of the scheduler and the job's steps into a response. Must not know
models, stores or devices.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from offload.engine.generation import check_prompt
from offload.engine.reasoning import ReasoningSplitter
from offload.engine.request import GenerationStep
from offload.errors import OffloadError, TokenizerError, UsageError
from offload.server.metrics import render_metrics
from offload.server.options import ServerOptions
from offload.server.protocol import ApiError, ApiRequest, ResponseShape, parse_body, parse_chat, parse_completion
from offload.server.scheduler import ClosedError, Job, QueueFullError, Scheduler, ServedEngine

_LOG = logging.getLogger(__name__)


def create_app(engine: ServedEngine, options: ServerOptions) -> Starlette:
    """The application that serves `engine`. Its `state.end_jobs` ends what runs and waits, with an answer to each."""
    api = _Api(engine, options)
    cors = Middleware(
        CORSMiddleware, allow_origins=list(options.allow_origins), allow_methods=["*"], allow_headers=["*"]
    )
    app = Starlette(
        routes=[
            Route("/health", api.health),
            Route("/metrics", api.metrics),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
        ],
        middleware=[cors] if options.allow_origins else [],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _nobody_there,
            Exception: _internal_error,
        },
        lifespan=api.lifespan,
    )
    app.state.end_jobs = api.end_jobs
    return app


class _Api:
    """The handlers, with what they share."""

    def __init__(self, engine: ServedEngine, options: ServerOptions) -> None:
        self._engine = engine
        self._options = options
        self._scheduler = Scheduler(engine, options.max_waiting)
        # Templates and tokenizers take a while on long prompts, and one thread keeps them in order.
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="expertpager-text")

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(self._scheduler.run())
        try:
            yield
        finally:
            self._scheduler.close()
            await running
            self._text_thread.shutdown(wait=False)

    def end_jobs(self) -> None:
        """Refuse new requests and answer the present ones that the server is shutting down."""
        self._scheduler.close()

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "running": self._scheduler.running, "waiting": self._scheduler.waiting})

    async def metrics(self, request: Request) -> Response:
        counted = {f"requests_{n}_total": v for n, v in asdict(self._scheduler.counters).items() if "tokens" not in n}
        tokens = {f"{n}_total": v for n, v in asdict(self._scheduler.counters).items() if "tokens" in n}
        now = {"requests_running": self._scheduler.running, "requests_waiting": self._scheduler.waiting}
        text = render_metrics(counted, tokens, now, self._engine.counters())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._authorize(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, parse_completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, parse_chat)

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._engine.name,
            "object": "model",
            "created": 0,
            "owned_by": "expertpager",
            "max_model_len": self._engine.context,
        }

    async def _answer(self, request: Request, parse: Callable[[dict[str, Any]], ApiRequest]) -> Response:
        self._authorize(request)
        asked = parse(parse_body(await self._body(request)))
        self._check_model(asked.model)
        loop = asyncio.get_running_loop()
        try:
            prompt_ids, splitter = await loop.run_in_executor(self._text_thread, self._prepare, asked)
        except OffloadError as error:
            raise _as_api_error(error) from None
        sampling = dict(asked.sampling)
        if asked.is_chat:  # a chat goes on until the model ends it
            sampling.setdefault("max_tokens", self._engine.context - len(prompt_ids))
        shape = ResponseShape(asked, self._engine.name, len(prompt_ids), self._engine.tokenizer)
        job = self._submit(prompt_ids, sampling)
        cancel = partial(self._scheduler.cancel, job)
        if asked.stream:
            events = _events(job, shape, splitter, asked.include_usage)
            return _EventStream(events, cancel, self._options.keep_alive_s)
        return await _unless_gone(request.receive, _whole(job, shape, splitter), cancel)

    def _prepare(self, asked: ApiRequest) -> tuple[tuple[int, ...], ReasoningSplitter | None]:
        """Prompt ids, checked, and what separates the reasoning of the answer."""
        splitter = None
        ids = asked.prompt
        if ids is None or isinstance(ids, str):
            tokenizer = self._engine.tokenizer
            if tokenizer is None:
                raise TokenizerError(f"{self._engine.name} has no tokenizer: give token ids to /v1/completions")
            text = ids
            if text is None:
                text = tokenizer.apply_chat_template(asked.messages, **asked.template_options)
                splitter = ReasoningSplitter(text) if asked.separate_reasoning else None
            ids = tokenizer.encode(text)
        if asked.sampling.get("stop") and self._engine.tokenizer is None:
            raise TokenizerError(f"{self._engine.name} has no tokenizer: use stop_token_ids instead of stop")
        engine = self._engine
        return check_prompt(ids, context_limit=engine.context, vocab_size=engine.vocab_size), splitter

    def _submit(self, prompt_ids: tuple[int, ...], sampling: dict[str, Any]) -> Job:
        try:
            return self._scheduler.submit(prompt_ids, sampling)
        except (QueueFullError, ClosedError) as error:
            raise _as_api_error(error) from None

    def _authorize(self, request: Request) -> None:
        key = self._options.api_key
        if key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", kind="authentication_error", code="invalid_api_key")

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._engine.name:
            message = f"the model {name!r} is not here: this server has {self._engine.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._options.max_body_bytes:
                raise ApiError(413, f"the body is larger than {self._options.max_body_bytes} bytes")
        return bytes(body)


async def _whole(job: Job, shape: ResponseShape, splitter: ReasoningSplitter | None) -> Response:
    """Wait for all of a job."""
    steps: list[GenerationStep] = []
    reasoning, answer = "", ""
    try:
        async for step in job:
            steps.append(step)
            more = _split(splitter, step)
            reasoning, answer = reasoning + more[0], answer + more[1]
    except Exception as error:
        raise _as_api_error(error) from None
    finish = steps[-1].finish_reason if steps else None
    return JSONResponse(shape.whole(reasoning, answer, steps, finish))


async def _events(
    job: Job, shape: ResponseShape, splitter: ReasoningSplitter | None, include_usage: bool
) -> AsyncIterator[str]:
    """The data of server-sent events, up to and including [DONE]."""
    for chunk in shape.opening():
        yield json.dumps(chunk)
    count = 0
    untold: list[GenerationStep] = []  # steps whose text is held back
    try:
        async for step in job:
            count += 1
            untold.append(step)
            reasoning, answer = _split(splitter, step)
            if reasoning or answer or step.finish_reason:
                yield json.dumps(shape.chunk(reasoning, answer, untold, step.finish_reason))
                untold.clear()
    except Exception as error:
        yield json.dumps(_as_api_error(error).body)
    else:
        if include_usage:
            yield json.dumps(shape.usage_chunk(count))
    yield "[DONE]"


def _split(splitter: ReasoningSplitter | None, step: GenerationStep) -> tuple[str, str]:
    """(reasoning, answer) of a step's text."""
    if splitter is None:
        return "", step.text
    reasoning, answer = splitter.push(step.text)
    if step.finish_reason is not None:
        rest = splitter.flush()
        reasoning, answer = reasoning + rest[0], answer + rest[1]
    return reasoning, answer


class _EventStream(Response):
    """Server-sent events; ends when the client is gone, and then calls `on_end`."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None], keep_alive_s: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_gone(receive, self._send_all(send), self._on_end)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        upcoming: asyncio.Future[str] = asyncio.ensure_future(anext(self._events))
        try:
            while True:
                done, _ = await asyncio.wait({upcoming}, timeout=self._keep_alive_s)
                if not done:
                    await send(_body(": still working\n\n"))
                    continue
                try:
                    event = upcoming.result()
                except StopAsyncIteration:
                    break
                await send(_body(f"data: {event}\n\n"))
                upcoming = asyncio.ensure_future(anext(self._events))
        finally:
            upcoming.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(text: str) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


async def _unless_gone(receive: Receive, work: Awaitable[Any], on_end: Callable[[], None]) -> Any:
    """The result of `work`; stops it when the client disconnects. Calls `on_end` in any case."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return Response(status_code=499)  # nobody reads it
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        on_end()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _as_api_error(error: Exception) -> ApiError:
    """The answer to a fault of a request or of the engine."""
    if isinstance(error, QueueFullError):
        return ApiError(
            429, "too many requests wait already: try again later", kind="rate_limit_error", code="queue_full"
        )
    if isinstance(error, ClosedError):
        return ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down")
    if isinstance(error, (UsageError, TokenizerError)):
        return ApiError(400, str(error))
    if isinstance(error, OffloadError):
        return ApiError(500, str(error), kind="server_error")
    return ApiError(500, "internal error: see the server's log", kind="server_error")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"retry-after": "5"} if error.status in (429, 503) else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}").body
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _nobody_there(request: Request, error: Exception) -> Response:
    """The client left while it sent its request: no fault of the server's."""
    return Response(status_code=499)


async def _internal_error(request: Request, error: Exception) -> Response:
    _LOG.error("request failed", exc_info=error)
    return JSONResponse(_as_api_error(error).body, status_code=500)
