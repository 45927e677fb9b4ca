"""Alerts about a run, sent through apprise to a webhook or to any service that it knows.

An ``https://`` URL of no known service gets ``{"text": ...}`` as JSON, the form that Slack and Mattermost take.
The URL is a secret: it is read from an environment variable and never repeated. apprise's own log may repeat parts
of it, so only the HTTP status is taken from there.
"""

import collections
import contextlib
import ipaddress
import logging
import math
import os
import queue
import re
import socket
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from deco_scale.errors import ConfigError
from deco_scale.observability.config import MonitorConfig
from deco_scale.observability.deadline import within
from deco_scale.observability.events import Event, is_fault
from deco_scale.observability.redact import register_secret, scrub

if TYPE_CHECKING:
    from apprise import Apprise

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0
MIN_INTERVAL_S = 60.0  # shortest time between two alerts of one kind
CAPACITY = 64
CLOSE_S = 10.0
_KINDS = ("stop_signal", "end", "straggler")
_MAX_CHARS, _MIN_TOKEN = 1000, 16
_JSON_FIELDS = {"message": "text", "version": "", "title": "", "attachments": "", "type": ""}
"""New names of the fields of apprise's JSON; those without a name are left out."""


def check_webhook(cfg: MonitorConfig) -> None:
    """Raises :class:`ConfigError` where alerts are configured and the variable holds no URL that can be used."""
    if cfg.webhook_env is not None:
        _service(cfg.webhook_env)


def send_alert(env_name: str | None, text: str, *, timeout_s: float = TIMEOUT_S) -> str | None:
    """Send one line to the URL in the variable ``env_name``; never raises and takes at most ``timeout_s``.

    Returns None once the service has taken it (or without ``env_name``), else the reason, without the URL.
    """
    if env_name is None:
        return None
    try:
        # Timeouts of sockets apply to each read; slow name servers and slow answers need one for the whole.
        return within(timeout_s, lambda: _post(env_name, text))
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except ConfigError as error:
        return str(error)
    except Exception as error:  # of one of apprise's services; its text may have the URL in it
        return f"{type(error).__name__} in apprise"


class AlertSender:
    """Sends alerts of faults, stop signals, ends and stragglers, each kind at most once a minute.

    Training never waits for the network: a thread sends from a queue of :data:`CAPACITY` lines; what does not fit
    is dropped and counted. Failures are logged, each reason once.
    """

    def __init__(self, env_name: str, *, run: str) -> None:
        self._env_name, self._run, self._host = env_name, run, socket.gethostname()
        register_secret(os.environ.get(env_name, "").strip())
        self._queue: queue.Queue[str | None] = queue.Queue(CAPACITY)
        self._last: dict[str, float] = {}
        self._suppressed: collections.Counter[str] = collections.Counter()
        self._queued, self._sent = 0, 0
        self._thread = threading.Thread(target=self._work, daemon=True, name="alerts")
        self._thread.start()

    def event(self, event: Event, step: int | None) -> None:
        """Queue an alert where the event deserves one; ``step`` is the last known one."""
        kind, now = event.kind, time.monotonic()
        if kind not in _KINDS and not is_fault(event):
            return
        if now - self._last.get(kind, -math.inf) < MIN_INTERVAL_S:
            self._suppressed[kind] += 1
            return
        self._last[kind] = now
        fields = {"host": self._host, "step": step, **event.fields}
        host, step = fields.pop("host"), fields.pop("step")
        where = f"{self._run} on {host}" + (f", step {step}" if step is not None else "")
        what = ", ".join([kind.replace("_", " "), *(f"{name} {value}" for name, value in fields.items())])
        more = self._suppressed.pop(kind, 0)
        self._put(f"{where}: {what}" + (f" ({more} more of this kind since the last alert)" if more else ""))

    def close(self) -> None:
        """Send what is queued, for at most :data:`CLOSE_S`, and log how many alerts were not sent."""
        if self._suppressed:
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self._suppressed.items()))
            self._put(f"{self._run} on {self._host}: events without an alert of their own: {counts}")
        deadline = time.monotonic() + CLOSE_S
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_S)
        self._thread.join(max(deadline - time.monotonic(), 0))
        if self._sent < self._queued:
            logger.warning("%d of %d alerts were not sent", self._queued - self._sent, self._queued)

    def _put(self, text: str) -> None:
        self._queued += 1
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(text)

    def _work(self) -> None:
        logged: set[str | None] = {None}
        while (text := self._queue.get()) is not None:
            problem = send_alert(self._env_name, text, timeout_s=TIMEOUT_S)
            self._sent += problem is None
            if problem not in logged:
                logged.add(problem)
                logger.warning("an alert was not sent: %s", problem)


def _service(env_name: str) -> "Apprise":
    """The service at the URL, which is redacted everywhere from here on; raises :class:`ConfigError`."""
    url, variable = os.environ.get(env_name, "").strip(), f"monitor.webhook_env: the variable {env_name}"
    if not url:
        raise ConfigError(f"{variable} is not set; set it to the webhook's URL")
    register_secret(url)
    try:
        import apprise
        from apprise.plugins.custom_json import NotifyJSON
    except ImportError:
        raise ConfigError("monitor.webhook_env: alerts need the package apprise (pip install apprise)") from None
    logging.getLogger("apprise").propagate = False  # it repeats URLs
    # A redirect would take the text to wherever the server says.
    service = apprise.Apprise(asset=apprise.AppriseAsset(http_redirects=False))
    scheme, _, rest = url.partition("://")
    if scheme.lower() not in ("http", "https"):
        # Tokens stand anywhere in such a URL, also in place of the host.
        for part in re.split(r"[/@:?&=]+", rest):
            if len(part) >= _MIN_TOKEN:
                register_secret(part)
        if not service.add(url):
            raise ConfigError(f"{variable} is neither an https URL nor one of apprise")
        return service
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"{variable} is not a URL") from None
    if not host or not url.isascii() or any(c <= " " for c in url) or "@" in parts.netloc:
        raise ConfigError(f"{variable} is not a plain https URL")
    if parts.scheme == "http":
        _check_local(url, host, variable)
    elif service.add(url):
        return service
    target = {"host": parts.netloc, "fullpath": rest.removeprefix(parts.netloc), "secure": parts.scheme == "https"}
    service.add(NotifyJSON(**target, redirect=False, payload=_JSON_FIELDS))
    return service


def _check_local(url: str, host: str, variable: str) -> None:
    """Raises :class:`ConfigError` unless the URL leads to this machine, and not through a proxy."""
    from requests.utils import get_environ_proxies, select_proxy

    loopback = host == "localhost"
    with contextlib.suppress(ValueError):
        loopback = loopback or ipaddress.ip_address(host).is_loopback
    if not loopback:
        raise ConfigError(f"{variable} must be an https URL; http is allowed to this machine only")
    if select_proxy(url, get_environ_proxies(url)) is not None:
        raise ConfigError(f"{variable} has an http URL that goes through a proxy: add {host} to no_proxy")


def _post(env_name: str, text: str) -> str | None:
    """Send the text; the reason where that failed. Raises what :func:`_service` does."""
    service = _service(env_name)
    import apprise

    body = " ".join(scrub(text).split())[:_MAX_CHARS]
    with apprise.LogCapture(level=logging.DEBUG) as log:
        if service.notify(body=body, body_format=apprise.NotifyFormat.TEXT):
            return None
    if status := re.search(r" WARNING .*\berror=(\d{3})\b", log.getvalue()):
        return f"the server answered {status[1]}"
    if not re.search(r" WARNING .*[Cc]onnection error", log.getvalue()):
        return "apprise could not send it"
    cause = re.search(r"Socket Exception: .*Caused by (\w+)", log.getvalue())
    return f"the server was not reached{f': {cause[1]}' if cause else ''}"
