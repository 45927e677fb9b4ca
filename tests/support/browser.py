"""A running demo page, and requests sent to it as its own interface takes them."""

import http.client
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil

from deco_scale.demo_app.validation import GenerationLimits
from tests.conftest import ROOT

GOOD: dict[str, Any] = {
    "subject": "a red square", "negative": "", "seed": 3, "random": False, "steps": 3, "guidance": 2.0,
    "solver": "adams", "width": 32, "height": 16, "count": 2,
}  # fmt: skip
LIMITS = GenerationLimits(max_side=64, max_images=4, max_steps=20)


class Page(NamedTuple):
    """A running page: its process, its address, and the folder where it keeps its images."""

    process: psutil.Popen
    host: str
    temporary: Path


def serve(checkpoint: Path, temporary: Path, *arguments: str) -> Page:
    """``deco demo`` on a free port; returns when it listens."""
    temporary.mkdir()
    command = [sys.executable, "-m", "deco_scale.cli", "demo", "--checkpoint", str(checkpoint), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    process = psutil.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("page at http://"):
            # Unread output would fill the pipe in the end.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return Page(process, urlsplit(line.split()[2].rstrip(",")).netloc, temporary)
    raise AssertionError("".join(lines))


def request(page: Page, method: str, path: str, body: bytes | None = None, host: str = "") -> tuple[int, bytes]:
    """Status and body of one request, whose path is sent as it is."""
    connection = http.client.HTTPConnection(page.host, timeout=60)
    try:
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", host or page.host)
        if body is not None:
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        # A large body may be answered before all of it was read.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sock.sendall(body or b"")
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def call(page: Page, data: Any, **more: Any) -> tuple[int, str, list[Any]]:
    """Status, message and outputs of a request sent as the page's own interface takes it."""
    body = data if isinstance(data, bytes) else json.dumps({"data": data, **more}).encode()
    status, answer = request(page, "POST", "/gradio_api/call/generate", body)
    if status != 200:
        return status, answer.decode(errors="replace"), []
    event = json.loads(answer)["event_id"]
    status, answer = request(page, "GET", f"/gradio_api/call/generate/{event}")
    lines = answer.decode().splitlines()
    outcome = json.loads(next(line for line in reversed(lines) if line.startswith("data: "))[6:])
    if "event: complete" not in lines:
        return 500, json.dumps(outcome), []
    return status, outcome[0], outcome


def draws(page: Page, **changes: Any) -> list[str]:
    """Paths of the files of a request that must be answered with images."""
    status, message, outputs = call(page, [*(GOOD | changes).values()])
    assert status == 200 and message.endswith("generated."), message
    return [f"/gradio_api/file={file['path']}" for file in outputs[2]]
