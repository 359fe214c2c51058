"""OpenAI-compatible HTTP in front of one loaded engine.

Owns the way from a socket to `engine.generate` and back. Must not know models, stores or devices.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from offload.errors import UsageError
from offload.server.options import ServerOptions

if TYPE_CHECKING:
    from offload.server.scheduler import ServedEngine

__all__ = ["ServerOptions", "serve"]


def serve(engine: ServedEngine, options: ServerOptions | None = None) -> None:
    """Serve `engine` until interrupted. Raises UsageError if host and port cannot be listened on."""
    from offload.server.app import create_app
    from offload.server.uvicorn_server import Server

    options = options or ServerOptions()
    server = Server(create_app(engine, options))
    with _listen(options) as listening, suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


def _listen(options: ServerOptions) -> socket.socket:
    """A listening socket, made here because uvicorn ends the process where this raises an error."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=128)
    except OSError as error:
        reason = str(error.strerror).split(" (")[0]  # what follows repeats the address
        raise UsageError(
            f"cannot listen on {options.host} port {options.port}: {reason}; choose another host or port"
        ) from None
