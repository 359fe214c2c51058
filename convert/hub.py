"""A repository of the Hugging Face hub as a source: byte ranges over HTTP, nothing stored on disk.

Owns requests, retries and the checks of every answer. All traffic goes through huggingface_hub's own session and URLs,
so tokens, HF_ENDPOINT mirrors and proxies work as they do everywhere. The revision is resolved to a commit once, so
every byte of a run comes from the same version. An answer of the wrong length, of another range or of another version
is never handed on.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar

from convert.source import Source
from offload.errors import CheckpointError

log = logging.getLogger("expertpager")

_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

_TOLD_ATTEMPT = 3
"""The fault in a row from which on a user should know what is waited for; single ones are everyday."""

T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    """How patient a request is. Times in seconds; `attempts` counts those without any progress.

    A connection that brings less than `slowest` bytes per second over `timeout` seconds is given up for a new one.
    """

    attempts: int = 8
    unreached: int = 3
    """Attempts while the hub has not answered at all: mostly there is no network, and somebody waits to be told."""
    first_delay: float = 0.5
    longest_delay: float = 60.0
    timeout: float = 30.0
    slowest: float = 8192.0


RETRY = Retry()


class _Fault(Exception):
    """Something that may be gone when asked again. `delay` is what the server wishes, in seconds."""

    def __init__(self, reason: str, delay: float | None = None) -> None:
        super().__init__(reason)
        self.delay = delay


class _UnreachedError(_Fault):
    """The hub, asked for the first time, did not answer."""


def is_repo_id(text: str) -> bool:
    """Whether `text` can name a repository: owner/name."""
    return bool(_REPO_ID.fullmatch(text)) and ".." not in text


class HubSource(Source):
    """The model repository `repo_id` at a revision (branch, tag or commit; default: main)."""

    parallel_reads = 8  # several connections fill a link that one cannot

    def __init__(self, repo_id: str, revision: str | None = None, retry: Retry | None = None) -> None:
        self.name = self.short_name = repo_id
        self.retry = retry or RETRY
        self._etags: dict[str, str] = {}
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        ask = partial(_repo_info, repo_id, revision, self.retry)
        info = self._patiently(f"the file list of the repository {repo_id} (no folder of that name here)", ask)
        self.revision = str(info.sha)
        self.files = {item.rfilename: item.size for item in info.siblings or [] if item.size is not None}

    def where(self, file: str) -> str:
        return f"{self.name}@{self.revision[:12]}/{file}"

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            # A range goes on where it broke off: only attempts that bring nothing are counted.
            fetch = partial(self._fetch, file, offset + done, buffer[done:])
            done += self._patiently(self.where(file), fetch)

    def cancel(self) -> None:
        self._cancelled.set()

    def _patiently(self, what: str, act: Callable[[], T]) -> T:
        """Call `act` until it succeeds. Raises CheckpointError after `retry.attempts` faults, and when cancelled."""
        delay = self.retry.first_delay
        for attempt in range(1, self.retry.attempts + 1):
            try:
                return act()
            except _Fault as fault:
                unreached = isinstance(fault, _UnreachedError)
                most = min(self.retry.attempts, self.retry.unreached) if unreached else self.retry.attempts
                if attempt >= most:
                    raise CheckpointError(
                        f"cannot read {what}: {fault} ({attempt} attempts); run the same command again later, "
                        "finished work is kept"
                    ) from None
                # Jitter keeps several connections from coming back all at once.
                wanted = delay * random.uniform(0.5, 1.0) if fault.delay is None else fault.delay
                if attempt == _TOLD_ATTEMPT:
                    log.warning("cannot read %s: %s; asking again, up to %d times", what, fault, most)
                if self._cancelled.wait(min(wanted, self.retry.longest_delay)):
                    raise CheckpointError(f"reading {what} was given up") from None
                delay *= 2
        raise AssertionError("unreachable")

    def _fetch(self, file: str, offset: int, buffer: memoryview) -> int:
        """Bytes received into `buffer`; fewer than asked for when the connection broke."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx, whichever it uses
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        last = offset + len(buffer) - 1
        headers = build_hf_headers() | {"Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
        url = hf_hub_url(self.name, file, revision=self.revision)
        done = 0
        try:
            with get_session().stream("GET", url, headers=headers, timeout=self.retry.timeout) as response:
                self._check(response, file, offset, last)
                mark, since = 0, time.monotonic()
                for chunk in response.iter_raw():
                    if done + len(chunk) > len(buffer):
                        done = 0
                        raise _Fault(f"the server sent more than the {len(buffer)} bytes asked for")
                    buffer[done : done + len(chunk)] = chunk
                    done += len(chunk)
                    if self._cancelled.is_set():
                        raise CheckpointError(f"reading {self.where(file)} was given up")
                    if time.monotonic() - since > self.retry.timeout:
                        if done - mark < self.retry.slowest * self.retry.timeout:
                            raise _Fault(f"the server sends less than {self.retry.slowest:.0f} bytes per second")
                        mark, since = done, time.monotonic()
        except (HTTPError, OSError) as fault:
            if not done:
                raise _Fault(f"{type(fault).__name__}: {_line(fault)}") from None
        if not done:
            raise _Fault("the server sent an empty body")
        return done

    def _check(self, response: Any, file: str, offset: int, last: int) -> None:
        """Accept exactly the answer to the question, from the version the run began with."""
        _check_status(response, self.where(file))
        size = self.files[file]
        whole = offset == 0 and last == size - 1
        if response.status_code == 200 and whole:
            length = response.headers.get("Content-Length")
            if length is not None and int(length) != size:
                raise _Fault(f"the server sends {length} bytes instead of {size}")
        elif response.status_code != 206:
            raise _Fault(f"the server answered {response.status_code} to a request for a byte range")
        else:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if not match:
                raise _Fault("the server does not say which byte range it sends")
            if int(match[3]) != size:
                raise CheckpointError(
                    f"{self.where(file)} has {match[3]} bytes now, it had {size}: it changed on the server; "
                    "nothing of the new version was written"
                )
            if (int(match[1]), int(match[2])) != (offset, last):
                raise _Fault(f"the server sends bytes {match[1]}-{match[2]} instead of {offset}-{last}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _Fault(f"the server sends {response.headers['Content-Encoding']} instead of plain bytes")
        self._check_version(response, file)

    def _check_version(self, response: Any, file: str) -> None:
        # Behind a redirect the hub's own answer names the content; the ETag of a delivery network may vary by node.
        chain = [*response.history, response]
        linked = next((r.headers["X-Linked-Etag"] for r in chain if "X-Linked-Etag" in r.headers), None)
        etag = linked or response.headers.get("ETag")
        if etag is None:
            return
        with self._lock:
            known = self._etags.setdefault(file, etag)
        if known != etag:
            raise CheckpointError(
                f"{self.where(file)} changed on the server while it was being read (ETag {etag}, before {known}); "
                "nothing of the new version was written; begin again with a fixed --revision"
            )


def _repo_info(repo_id: str, revision: str | None, retry: Retry) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    where = f"{repo_id} on {api.endpoint}"
    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=retry.timeout)
    except HFValidationError:
        raise CheckpointError(f"{repo_id} is neither a folder nor a Hugging Face repository (owner/name)") from None
    except GatedRepoError:
        raise CheckpointError(f"{where}: access is gated; accept its terms and log in with `hf auth login`") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{where} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo_id} is no folder here, and there is no such repository on {api.endpoint} (or it is private: "
            "log in with `hf auth login`)"
        ) from None
    except OfflineModeIsEnabled:
        raise CheckpointError(f"{repo_id} is no folder here, and the hub is switched off (HF_HUB_OFFLINE)") from None
    except HfHubHTTPError as fault:
        _check_status(fault.response, where)
        raise _Fault(_line(fault)) from None
    except (HTTPError, OSError) as fault:
        raise _UnreachedError(f"{type(fault).__name__}: {_line(fault)}") from None
    except ValueError as fault:
        raise _Fault(f"{type(fault).__name__}: {_line(fault)}") from None
    if not info.sha:
        raise _Fault("the server does not say which commit it serves")
    return info


def _check_status(response: Any, where: str) -> None:
    """Raise for an answer that is no success: _Fault when asking again may help."""
    status = response.status_code
    if status in _TRANSIENT:
        raise _Fault(f"HTTP status {status}", _retry_after(response.headers.get("Retry-After")))
    if status in (401, 403):
        raise CheckpointError(f"{where}: access denied (HTTP {status}); log in with `hf auth login`")
    if status >= 400:
        raise CheckpointError(f"{where}: the server answered HTTP {status}")


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for; it may also name a date."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _line(fault: BaseException) -> str:
    """The first line of an error's text."""
    return (str(fault).strip().splitlines() or ["no details"])[0]
