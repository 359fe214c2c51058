"""A served engine that needs no model, and a server around it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from offload.engine.generation import Generation, generate
from offload.engine.request import resolve_sampling
from offload.engine.tokenizer import Tokenizer
from offload.server.app import create_app
from offload.server.options import ServerOptions
from offload.server.uvicorn_server import Server

VOCAB = 512


class HashEngine:
    """Real loop, real tokenizer; the logits are a random function of all tokens given so far.

    `script` makes it say a text instead. While `gate` is clear the model stands still; `calls` counts
    its steps.
    """

    name = "tests/hash-model"
    context = 256
    vocab_size = VOCAB

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Tokenizer | None = Tokenizer.load(folder)
        self.script: str | None = None
        self.fault: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.pause_s = 0.0
        self.calls = 0
        self.prompts: list[list[int]] = []
        self.closed = 0

    def counters(self) -> dict[str, object]:
        return {"ram": {"hits": 3, "hit_rate": 0.5}, "layer_stall_s": [0.5, 1.5], "notes": ["text"]}

    def generate(self, prompt_ids: Sequence[int], **sampling: Any) -> Generation:
        self.prompts.append(list(prompt_ids))
        seen: list[int] = []
        said = [] if self.script is None else [*self.tokenizer.encode(self.script, add_special_tokens=False), 1]

        def step(token_ids: Sequence[int]) -> np.ndarray:
            assert self.gate.wait(20)
            time.sleep(self.pause_s)
            self.calls += 1
            if self.fault is not None:
                raise self.fault
            seen.extend(token_ids)
            row = np.random.default_rng(seen).normal(size=VOCAB).astype(np.float32)
            row[:3] = -50
            if said:
                row[said[len(seen) - len(prompt_ids)]] = 50
            return row

        run = generate(
            step,
            prompt_ids,
            resolve_sampling(sampling, {"temperature": 0.7}),
            tokenizer=self.tokenizer,
            eos_ids=(1,),
            context_limit=self.context,
            vocab_size=VOCAB,
        )
        close = run.close

        def counted_close() -> None:
            self.closed += 1
            close()

        run.close = counted_close  # type: ignore[method-assign]
        return run


class Running:
    """A server on a free local port, in a thread of its own."""

    def __init__(self, engine: HashEngine, options: ServerOptions) -> None:
        self._server = Server(create_app(engine, options), port=0, graceful_s=1)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)

    def stop(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
