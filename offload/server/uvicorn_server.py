"""uvicorn's server, in which those who wait are told of a shutdown.

Owns the order of ending. Must not know requests.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette


class Server(uvicorn.Server):
    """Serves `app`. A shutdown first ends its jobs with `app.state.end_jobs`: uvicorn itself waits for connections,
    which wait for jobs, and cuts them off without a word when its patience is over."""

    def __init__(self, app: Starlette, *, port: int = 8000, graceful_s: int = 2) -> None:
        self._end_jobs: Callable[[], None] = app.state.end_jobs
        super().__init__(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=graceful_s))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the jobs, then connections, then the application."""
        self._end_jobs()
        await super().shutdown(sockets)
