"""A hub on 127.0.0.1 for huggingface_hub's real client: file list, redirects, byte ranges, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPO = "someone/tiny-v3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

FAULTS = (
    "timeout",
    "reset",
    "reset in the body",
    "429",
    "500",
    "503",
    "short body",
    "short length",
    "long body",
    "other range",
    "no range",
    "whole file",
    "empty",
    "slow drip",
)


class Hub(ThreadingHTTPServer):
    """Serves the files of `folder` as REPO at COMMIT. A request meets a fault with probability `fault_rate`."""

    daemon_threads = True

    def __init__(self, folder: Path, fault_rate: float = 0.0, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fault_rate = fault_rate
        self.rng = random.Random(seed)
        self.lock = threading.Lock()
        self.faults: list[str] = []
        self.kinds: tuple[str, ...] = FAULTS
        self.served = 0
        self.requests: list[str] = []
        self.etag_suffix = ""
        self.token: str | None = None
        self.proxied = 0
        self.retry_after = "0"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw_fault(self) -> str | None:
        with self.lock:
            if self.rng.random() >= self.fault_rate:
                return None
            fault = self.rng.choice(self.kinds)
            self.faults.append(fault)
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # clients that go away are part of the plan


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        if path.startswith("http://"):  # asked as a proxy
            self.server.proxied += 1
            path = "/" + path.split("/", 3)[3]
        with self.server.lock:
            self.server.requests.append(path)
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._plain(401, b"who are you?")
        elif path.startswith("/api/models/"):
            self._list(path.removeprefix("/api/models/"))
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            name = path.rsplit("/", 1)[1]
            if name.endswith(".safetensors"):  # as the hub does with large files
                headers = {"Location": f"/cdn/{name}", "X-Linked-Etag": self._etag(name), "X-Repo-Commit": COMMIT}
                self._plain(302, b"", headers)
            else:
                self._file(name)
        elif path.startswith("/cdn/"):
            self._file(path.rsplit("/", 1)[1])
        else:
            self._plain(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _etag(self, name: str) -> str:
        return f'"{hashlib.sha256(name.encode()).hexdigest()}{self.server.etag_suffix}"'

    def _plain(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _list(self, what: str) -> None:
        fault = self.server.draw_fault()
        if fault in ("429", "500", "503"):
            self._plain(int(fault), b"busy", {"Retry-After": self.server.retry_after})
            return
        repo, _, revision = what.partition("/revision/")
        if repo != REPO:
            self._plain(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if revision not in ("", "main", COMMIT):
            self._plain(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = sorted(p for p in self.server.folder.iterdir() if p.is_file())
        siblings = [{"rfilename": p.name, "size": p.stat().st_size, "blobId": "0" * 40} for p in files]
        body = {"_id": "1", "id": REPO, "modelId": REPO, "sha": COMMIT, "private": False, "siblings": siblings}
        self._plain(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        path = self.server.folder / name
        if not path.exists():
            self._plain(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        size = path.stat().st_size
        first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
        with path.open("rb") as file:
            file.seek(first)
            body = file.read(last - first + 1)
        fault = self.server.draw_fault()
        shown, length, status = f"bytes {first}-{last}/{size}", len(body), 206
        if fault == "timeout":
            time.sleep(0.6)
            return self._reset()
        if fault == "hang":
            time.sleep(25)
            return self._reset()
        if fault == "reset":
            return self._reset()
        if fault in ("429", "500", "503"):
            return self._plain(int(fault), b"<html>busy</html>", {"Retry-After": self.server.retry_after})
        if fault == "short length":
            body = body[: len(body) // 2]
            length = len(body)
        elif fault == "long body":
            body += b"\0" * 10
            length = len(body)
        elif fault == "other range":
            shown = f"bytes {first + 1}-{last + 1}/{size}"
        elif fault == "no range":
            shown = ""
        elif fault == "whole file" and (first, last) != (0, size - 1):
            status, body = 200, path.read_bytes()
            length = len(body)
        elif fault == "empty":
            body, length = b"", 0
        self.send_response(status)
        self.send_header("ETag", self._etag(name))
        self.send_header("Content-Length", str(length))
        if shown and status == 206:
            self.send_header("Content-Range", shown)
        self.end_headers()
        if fault in ("short body", "reset in the body"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "reset in the body":
                self._reset()
            return None
        if fault == "slow drip":
            self.close_connection = True
            for at in range(0, min(len(body), 500), 10):  # gone before everything is sent
                self.wfile.write(body[at : at + 10])
                time.sleep(0.02)
            return None
        self.wfile.write(body)
        with self.server.lock:
            self.server.served += len(body)
        return None

    def _reset(self) -> None:
        """Drop the connection with a TCP reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
