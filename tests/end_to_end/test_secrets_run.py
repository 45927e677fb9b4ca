"""Runs that use every kind of credential, well and badly; then nothing that was written holds one."""

import base64
import dataclasses
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus
from urllib.request import urlopen

import pytest

from data_pipeline.storage.dev_server import S3Server
from data_pipeline.tools import cli as data_cli
from deco_scale.cli.main import main
from deco_scale.yaml import dump_yaml
from launcher import train
from tests.conftest import ROOT
from tests.support.assets import make_images_folder, tiny_config
from tests.support.ports import free_port

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "Pl4nted/AwsSecret+" + secrets.token_hex(11),
    "AWS_ACCESS_KEY_ID": "AKIA" + secrets.token_hex(8).upper(),
    "AWS_SESSION_TOKEN": "IQoJb3JpZ2lu" + base64.b64encode(secrets.token_bytes(90)).decode(),
    "WANDB_API_KEY": secrets.token_hex(20),
    "HF_TOKEN": "hf_" + secrets.token_hex(17),
    "hook": "/alerts/" + secrets.token_urlsafe(24),
    "signature": secrets.token_hex(32),
    "password": "Pw:" + secrets.token_urlsafe(12),
}


class Echo(ThreadingHTTPServer):
    """Takes alerts; refuses everything else, and says in its answer what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.alerts: list[str] = []
        self.seen = ""


class _Handler(BaseHTTPRequestHandler):
    server: Echo

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == PLANTED["hook"]:
            self.server.alerts.append(body.decode())
            self.send_response(200)
            self.end_headers()
            return
        sent = f"{self.path} {' '.join(f'{name}: {value}' for name, value in self.headers.items())}"
        self.server.seen += sent + "\n"
        answer = f"<Error><Code>AccessDenied</Code><Message>{sent}</Message></Error>".encode()
        self.send_response(403, sent[:2000])
        self.send_header("X-Error-Message", sent[:2000])
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_HEAD = do_PUT = do_POST

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def forms(secret: str) -> set[bytes]:
    """As it is, percent-encoded, and what base64 has of it wherever it begins."""
    found = {secret, quote(secret, safe=""), quote_plus(secret), quote(secret, safe="").lower()}
    for before in ("", "x", "xx"):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = encode((before + secret).encode()).decode().rstrip("=")
            found.add(encoded[4 if before else 0 : -2])
    return {form.encode() for form in found}


def leaks(data: bytes, planted: dict[str, str]) -> list[str]:
    return [name for name, secret in planted.items() if any(form in data for form in forms(secret))]


@dataclasses.dataclass
class Attempt:
    """A run of ``launcher/train.py`` as a process of its own."""

    run: Path
    process: subprocess.Popen[bytes]
    said: bytes = b""

    @classmethod
    def start(cls, run: Path, config: dict[str, Any], environment: dict[str, str]) -> "Attempt":
        run.mkdir()
        path = run.with_suffix(".yaml")
        path.write_text(dump_yaml({**config, "run": {**config["run"], "dir": str(run)}}))
        command = [sys.executable, str(ROOT / "launcher" / "train.py"), "--config", str(path)]
        return cls(
            run,
            subprocess.Popen(
                command, env=environment, cwd=run.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ),
        )

    def end(self) -> int:
        self.said, _ = self.process.communicate(timeout=150)
        return self.process.returncode


def written_below(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes()


def test_nothing_that_a_run_writes_or_says_holds_a_secret(
    s3_environment: S3Server,
    echo: Echo,
    tmp_path: Path,
    shards: Path,
    text_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    s3_environment.create_bucket("secrets")
    images = make_images_folder(tmp_path / "images", 24)
    assert data_cli.main(["pack", str(images), "s3://secrets/train", "--shard-mb", "0.1"]) == 0
    capfd.readouterr()
    real = s3_environment.environment
    planted = {
        **PLANTED,
        "real AWS key": real["AWS_SECRET_ACCESS_KEY"],
        "real AWS key ID": real["AWS_ACCESS_KEY_ID"],
        "hook's URL": echo.url + PLANTED["hook"],
    }
    signed = f"https://bucket.example/shard?X-Amz-Credential=a&X-Amz-Signature={PLANTED['signature']}"
    environment = {
        **os.environ,
        **{name: PLANTED[name] for name in ("WANDB_API_KEY", "HF_TOKEN")},
        "DECO_ALERTS": echo.url + PLANTED["hook"],
        "EXPORT_URL": signed,
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_BASE_URL": echo.url, "HF_ENDPOINT": echo.url,
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    for name in ("HF_HUB_OFFLINE", "WANDB_MODE", "AWS_ENDPOINT_URL_S3"):
        environment.pop(name, None)
    with_password = echo.url.replace("//", f"//me:{quote(PLANTED['password'])}@")
    # Without a number of threads, one is worked out from this variable.
    without_threads = {**environment, "LOCAL_WORLD_SIZE": with_password}
    del without_threads["OMP_NUM_THREADS"]
    broken = {**environment, **{name: PLANTED[name] for name in PLANTED if name.startswith("AWS_")}}

    config = tiny_config(tmp_path, shards, text_encoder)
    config["stages"] = [{**config["stages"][0], "steps": 3}]
    config["data"]["deadline_s"] = 2.0
    port = free_port()
    over_s3 = {**config, "data": {**config["data"], "url": "s3://secrets/train"}}
    monitor = {"webhook_env": "DECO_ALERTS", "prometheus_port": port}
    good = {**over_s3, "wandb": {"mode": "offline"}, "monitor": monitor}
    good["data"] = {**good["data"], "deadline_s": 60.0}
    from_hub = {**config, "text_encoder": {**config["text_encoder"], "path": "me/model", "allow_download": True}}
    began = [
        Attempt.start(tmp_path / "good", good, {**environment, **real}),
        Attempt.start(tmp_path / "denied", over_s3, {**broken, "AWS_ENDPOINT_URL_S3": echo.url}),
        # Nothing expects this variable to be wrong: the error has no name and ends in a traceback.
        Attempt.start(tmp_path / "crash", config, without_threads),
        Attempt.start(tmp_path / "hub", from_hub, environment),
        Attempt.start(tmp_path / "tracked", {**config, "wandb": {"mode": "online"}}, environment),
    ]
    attempts = {attempt.run.name: attempt for attempt in began}
    try:
        metrics = b""
        while attempts["good"].process.poll() is None:
            try:
                with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    metrics = answer.read()
            except OSError:
                pass
            time.sleep(0.02)
        codes = {name: attempt.end() for name, attempt in attempts.items()}
    finally:
        for attempt in began:
            attempt.process.kill()
    told = {name: attempt.said.decode(errors="replace") for name, attempt in attempts.items()}
    # In this process: one more that does not begin, and what is made of a finished run.
    monkeypatch.setenv("DECO_ALERTS", environment["DECO_ALERTS"])
    arguments = ["--config", str(tmp_path / "good.yaml"), f"data.url={signed}"]
    assert train.main(arguments) == 2 and main(["report", str(tmp_path / "good")]) == 0
    here = capfd.readouterr()

    # Each was used.
    assert codes == {"good": 0, "denied": 1, "crash": 1, "hub": 2, "tracked": 0}, told
    assert "deco_step " in metrics.decode() and "end, reason done" in echo.alerts[-1]
    assert list((tmp_path / "good" / "wandb").glob("offline-run-*/*.wandb"))
    assert {"AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "HF_TOKEN"} <= set(
        leaks(echo.seen.encode(), planted)
    ), echo.seen
    assert "Traceback" in told["crash"] and echo.url.replace("//", "//(removed)@") in told["crash"], told
    assert "no wandb from here on" in told["tracked"] and "access denied" in told["denied"], told
    assert "data.url looks like a secret" in here.err
    # And none was written or said.
    assert (tmp_path / "good" / "report.html").exists() and (tmp_path / "good" / "config.yaml").exists()
    files = dict(written_below(tmp_path))
    assert any(path.name == "meta.json" for path in files) and len(files) > 60
    files |= {Path("stdout of", name): attempt.said for name, attempt in attempts.items()}
    files |= {Path("here"): (here.out + here.err).encode(), Path("metrics"): metrics}
    files[Path("alerts")] = "".join(echo.alerts).encode()
    assert {str(path): found for path, data in files.items() if (found := leaks(data, planted))} == {}
