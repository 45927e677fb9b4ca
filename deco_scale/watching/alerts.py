"""Lines about a run to a webhook: ``{"text": ...}`` as JSON, the form that Slack and Mattermost take.

The URL is a secret. It is read from an environment variable when it is needed and stands in no text or error.
"""

import collections
import contextlib
import http.client
import ipaddress
import json
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from deco_scale.errors import ConfigError
from deco_scale.watching.events import Event, is_fault
from deco_scale.watching.redact import conceal, scrub
from deco_scale.watching.settings import MonitorConfig

TIMEOUT_S = 5.0
SAME_KIND_S = 60.0
_KINDS = ("stop_signal", "end", "straggler")
_MAX_CHARS = 1000


def check(cfg: MonitorConfig) -> None:
    """Raises :class:`ConfigError` where alerts are asked for and the variable holds no URL that may be used."""
    if cfg.webhook_env is not None and (problem := _problem(cfg.webhook_env)) is not None:
        raise ConfigError(f"monitor.webhook_env: {problem}")


def send(env_name: str | None, text: str, *, timeout_s: float = TIMEOUT_S) -> str | None:
    """Post one line to the URL in the variable ``env_name``; never raises, takes ``timeout_s`` at most.

    Returns None once the server has taken it (or where there is no ``env_name``), else why not, without the URL.
    """
    if env_name is None:
        return None
    problem = _problem(env_name)
    if problem is not None:
        return problem
    outcome = [f"no answer within {timeout_s:g} s"]
    body = json.dumps({"text": " ".join(scrub(text).split())[:_MAX_CHARS]}).encode()

    def post() -> None:
        outcome[0] = _post(os.environ[env_name], body, timeout_s)

    try:
        # The socket's timeout is for each piece; names that do not resolve and answers in drops have none.
        thread = threading.Thread(target=post, daemon=True, name="alert")
        thread.start()
        thread.join(timeout_s)
    except RuntimeError:
        return "no thread could be started"
    return outcome[0] or None


class Alerts:
    """Alerts of a run's events: faults, signals to stop, ends and stragglers, each kind at most once a minute.

    Nothing waits for the network: a thread sends what stands in a queue of ``capacity`` lines, and what does not
    fit is dropped and counted.
    """

    def __init__(
        self,
        env_name: str,
        *,
        run: str,
        capacity: int = 64,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._env_name, self._run, self._timeout_s, self._clock = env_name, run, timeout_s, clock
        self._host = socket.gethostname()
        self._queue: queue.Queue[str | None] = queue.Queue(capacity)
        self._last: dict[str, float] = {}
        self._left_out: collections.Counter[str] = collections.Counter()
        self._problems: collections.deque[str] = collections.deque()
        self._offered, self._sent = 0, 0
        self._thread = threading.Thread(target=self._work, daemon=True, name="alerts")
        self._thread.start()

    def event(self, event: Event, step: int | None) -> None:
        """Queue an alert where the event is worth one; ``step`` is the last that is known."""
        if event.kind not in _KINDS and not is_fault(event):
            return
        now, kind = self._clock(), event.kind
        if kind in self._last and now - self._last[kind] < SAME_KIND_S:
            self._left_out[kind] += 1
            return
        self._last[kind] = now
        fields = {name: value for name, value in event.fields.items() if name not in ("host", "step")}
        host, step = event.fields.get("host", self._host), event.fields.get("step", step)
        more = self._left_out.pop(kind, 0)
        self._put(
            f"{self._run} on {host}"
            + (f", step {step}" if step is not None else "")
            + f": {kind.replace('_', ' ')}"
            + "".join(f", {name} {value}" for name, value in fields.items())
            + (f" ({more} more of this kind since the last alert)" if more else "")
        )

    def trouble(self) -> list[str]:
        """What went wrong for the first time since the last call."""
        new = [self._problems.popleft() for _ in range(len(self._problems))]
        return [f"WARNING: an alert was not sent: {problem}" for problem in new]

    def close(self, *, within_s: float = 10.0) -> str | None:
        """Send what is left, for ``within_s`` at most; a line about what was not sent, if anything was not."""
        if self._left_out:
            named = ", ".join(f"{count} {kind}" for kind, count in sorted(self._left_out.items()))
            self._put(f"{self._run} on {self._host}: events without an alert of their own: {named}")
            self._left_out.clear()
        until = time.monotonic() + within_s
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=within_s)
        self._thread.join(max(until - time.monotonic(), 0))
        lost = self._offered - self._sent
        return f"WARNING: {lost} of {self._offered} alerts were not sent" if lost else None

    def _put(self, text: str) -> None:
        self._offered += 1
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(text)

    def _work(self) -> None:
        known: set[str] = set()
        while (text := self._queue.get()) is not None:
            problem = send(self._env_name, text, timeout_s=self._timeout_s)
            if problem is None:
                self._sent += 1
                continue
            if problem not in known:
                known.add(problem)
                self._problems.append(problem)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the text, and what the URL gives away, to wherever the server says."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _problem(env_name: str) -> str | None:
    """Why the variable cannot be used, without its value; from here on the value is taken out of all texts."""
    url = os.environ.get(env_name, "").strip()
    if not url:
        return f"the environment variable {env_name} is not set; it must hold the webhook's URL"
    conceal(url)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return f"the environment variable {env_name} does not hold a URL"
    if not host or not url.isascii() or any(c <= " " for c in url) or "@" in parts.netloc:
        return f"the environment variable {env_name} does not hold a plain https URL"
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(host)):
        return f"the URL in {env_name} must be https; http goes to this machine only"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _post(url: str, body: bytes, timeout_s: float) -> str:
    """Why it failed; empty where it did not."""
    url = url.strip()
    handlers: list[Any] = [_NoRedirects()]
    if url.startswith("http:"):
        handlers.append(urllib.request.ProxyHandler({}))  # what is for this machine goes to no other
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"the server answered {error.code}"
    except urllib.error.URLError as error:
        return _unreached(error.reason, timeout_s)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _unreached(error, timeout_s)


def _unreached(reason: object, timeout_s: float) -> str:
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    return f"the server was not reached: {type(reason).__name__}"
