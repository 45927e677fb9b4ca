"""An ASGI application around gradio that accepts only the page's own requests.

Gradio serves more than the page needs (uploads, a proxy, direct calls beside the queue, files given as URLs, which
it fetches). A request is answered 403, 404, 413 or 400 unless its path belongs to the page, its body is small, its
data are plain values, and a requested file is one of the page's images.
"""

import ipaddress
import json
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 2**16
MAX_VALUES = 32
_MAX_NAME_CHARS = 64
_API = "/gradio_api"
_FILE = f"{_API}/file="
_READ = {
    "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", f"{_API}/info",
    f"{_API}/app_id", f"{_API}/startup-events", f"{_API}/queue/data", f"{_API}/queue/status",
}  # fmt: skip
_READ_BELOW = ("/assets/", "/static/", "/svelte/", f"{_API}/heartbeat/", f"{_API}/call/generate/")
_JOIN = {f"{_API}/queue/join", f"{_API}/call/generate"}
_POST = _JOIN | {f"{_API}/cancel", f"{_API}/reset"}
_HEADERS = {
    # Gradio's page has inline scripts and styles. Nothing is fetched from other hosts.
    "content-security-policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "
    "frame-ancestors 'none'; base-uri 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def is_loopback(host: str) -> bool:
    """Whether a host name or address (without a port) is this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class RequestLimits:
    """Wraps ``app``; only images in ``folder`` can be fetched.

    With ``local_only`` the Host header must name this machine, against DNS rebinding: another site's page cannot
    reach this one through a name that resolves to it.
    """

    def __init__(self, app: ASGIApp, *, folder: Path, local_only: bool) -> None:
        self._app, self._folder, self._local_only = app, folder.resolve(), local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = self._refuse(scope)
        if refusal is None and scope["method"] == "POST":
            body = await _read_body(Request(scope, receive))
            if body is None:
                refusal = (413, "the request is too large")
            elif scope["path"] in _JOIN and not _is_plain(body):
                refusal = (400, "the data must be a list of plain values")
            else:
                receive = _replayed(body, receive)
        app = self._app if refusal is None else JSONResponse({"error": refusal[1]}, refusal[0])
        await app(scope, receive, send_with_headers)

    def _refuse(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, None for an accepted request."""
        method, path = scope["method"], scope["path"]
        if self._local_only and not is_loopback(_host_name(Headers(scope=scope).get("host", ""))):
            return 403, "this page is only for the machine that it runs on"
        if path.startswith(_FILE):
            allowed = method in ("GET", "HEAD") and self._is_image(path.removeprefix(_FILE))
            return None if allowed else (403, "no such image")
        if method in ("GET", "HEAD") and (path in _READ or path.startswith(_READ_BELOW)):
            return None
        return None if method == "POST" and path in _POST else (404, "not part of this page")

    def _is_image(self, name: str) -> bool:
        try:
            path = Path(name)
            return path.suffix == ".png" and path.resolve().is_relative_to(self._folder) and path.is_file()
        except (OSError, ValueError):
            return False


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _read_body(request: Request) -> bytes | None:
    """The full body, None if it is too large or incomplete."""
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return None
    except ClientDisconnect:
        return None
    return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    pending = [body]

    async def replay() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay


def _is_plain(body: bytes) -> bool:
    """Whether a call's data are numbers, strings and booleans: gradio fetches what looks like a file."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(call, dict) or not isinstance(call.get("data"), list) or len(call["data"]) > MAX_VALUES:
        return False
    session = call.get("session_hash")
    if session is not None and not (isinstance(session, str) and len(session) <= _MAX_NAME_CHARS):
        return False
    return all(value is None or isinstance(value, str | int | float) for value in call["data"])
