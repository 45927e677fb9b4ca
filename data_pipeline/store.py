"""Objects by key in an S3 bucket or a local folder, through one small interface.

Credentials, region and endpoint come the standard AWS ways (environment, profile, instance role,
``AWS_ENDPOINT_URL_S3``). Errors name bucket and key.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from data_pipeline.errors import DataError, StoreError

READ_ATTEMPTS = 8
"""Tries of one ranged read; each continues at the byte that was reached."""
BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Key relative to the store's URL, size in bytes, and a tag that changes with the content."""

    key: str
    size: int
    etag: str


class Store(Protocol):
    """A flat namespace of objects below one URL."""

    url: str

    def list(self) -> Iterator[ObjectInfo]:
        """All objects below the URL, sorted by key."""

    def read(self, key: str, offset: int, length: int, etag: str | None = None) -> bytes:
        """Exactly ``length`` bytes from ``offset``; with ``etag``, only of that very object."""

    def read_all(self, key: str) -> bytes | None:
        """The whole object, or None where there is none."""

    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object, all or nothing."""

    def write_file(self, key: str, path: Path) -> None:
        """Create or replace an object from a file, all or nothing."""


def open_store(url: str) -> Store:
    """Store for ``s3://bucket/prefix`` or a local path; raises :class:`DataError` for anything else."""
    scheme = urlparse(url).scheme if "://" in url else ""
    if scheme == "s3":
        return S3Store(url)
    if scheme in ("", "file"):
        return LocalStore(url.removeprefix("file://"))
    raise DataError(f"{url}: only s3:// URLs and local paths can be read")


class LocalStore:
    """Files below a folder."""

    def __init__(self, root: str) -> None:
        self.url = root
        self._root = Path(root).expanduser()

    def list(self) -> Iterator[ObjectInfo]:
        if not self._root.is_dir():
            raise StoreError(f"{self.url}: no such folder")
        for path in sorted(p for p in self._root.rglob("*") if p.is_file()):
            if not path.name.endswith(".partial"):
                yield self._info(path)

    def read(self, key: str, offset: int, length: int, etag: str | None = None) -> bytes:
        path = self._root / key
        try:
            if etag is not None and self._info(path).etag != etag:
                raise StoreError(f"{path} changed since it was indexed; run deco-data index again")
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        if len(data) != length:
            raise StoreError(f"{path}: ends at {offset + len(data)}, wanted {offset + length}")
        return data

    def read_all(self, key: str) -> bytes | None:
        try:
            return (self._root / key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{self._root / key}: {error.strerror}") from error

    def write(self, key: str, data: bytes) -> None:
        path = self._root / key
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error

    def write_file(self, key: str, path: Path) -> None:
        self.write(key, path.read_bytes())

    def _info(self, path: Path) -> ObjectInfo:
        stat = path.stat()
        key = path.relative_to(self._root).as_posix()
        return ObjectInfo(key, stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}")


class S3Store:
    """Objects below a prefix of an S3 bucket."""

    def __init__(self, url: str) -> None:
        parsed = urlparse(url)
        if not parsed.netloc:
            raise DataError(f"{url}: an S3 URL looks like s3://bucket/prefix")
        self.url = url
        self._bucket = parsed.netloc
        prefix = parsed.path.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = self._connect()

    def _connect(self) -> Any:
        import boto3
        from botocore.config import Config

        config = Config(
            connect_timeout=10,
            read_timeout=30,
            max_pool_connections=32,
            retries={"mode": "standard", "total_max_attempts": 5},
        )
        with self._errors(""):
            return boto3.session.Session().client("s3", config=config)

    def list(self) -> Iterator[ObjectInfo]:
        pages = self._client.get_paginator("list_objects_v2")
        with self._errors(""):
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                for entry in page.get("Contents", []):
                    key = entry["Key"].removeprefix(self._prefix)
                    yield ObjectInfo(key, entry["Size"], entry["ETag"].strip('"'))

    def read(self, key: str, offset: int, length: int, etag: str | None = None) -> bytes:
        received = bytearray()
        for attempt in range(READ_ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2**attempt)))
            first = offset + len(received)
            wanted: dict[str, Any] = {"Range": f"bytes={first}-{offset + length - 1}"}
            if etag is not None:
                wanted["IfMatch"] = f'"{etag}"'
            with self._errors(key):
                body = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **wanted)["Body"]
            self._drain(body, received)
            if len(received) == length:
                return bytes(received)
            if len(received) > length:
                raise StoreError(f"{self._name(key)}: the server ignores ranges")
        raise StoreError(
            f"{self._name(key)}: {len(received)} of {length} bytes at {offset} after {READ_ATTEMPTS} attempts"
        )

    @staticmethod
    def _drain(body: Any, received: bytearray) -> None:
        """Read on until the body ends or breaks; the caller continues where it stopped."""
        from botocore.exceptions import (
            ConnectionClosedError,
            IncompleteReadError,
            ReadTimeoutError,
            ResponseStreamingError,
        )

        broken = (
            ConnectionClosedError,
            IncompleteReadError,
            ReadTimeoutError,
            ResponseStreamingError,
        )
        with contextlib.suppress(*broken), contextlib.closing(body):
            while piece := body.read(PIECE_BYTES):
                received += piece

    def read_all(self, key: str) -> bytes | None:
        from botocore.exceptions import ClientError

        with self._errors(key):
            try:
                head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
            except ClientError as error:
                if _code(error) in ("404", "NoSuchKey", "NotFound"):
                    return None
                raise
        if head["ContentLength"] == 0:
            return b""
        return self.read(key, 0, head["ContentLength"], head["ETag"].strip('"'))

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data)

    def write_file(self, key: str, path: Path) -> None:
        with self._errors(key):
            self._client.upload_file(str(path), self._bucket, self._prefix + key)

    def _name(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn botocore's errors into one line each."""
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            hints = {
                "403": "access denied: check the credentials and the bucket's policy",
                "AccessDenied": "access denied: check the credentials and the bucket's policy",
                "InvalidAccessKeyId": "the access key is not known to this server",
                "SignatureDoesNotMatch": "the secret key is wrong",
                "NoSuchBucket": "no such bucket",
                "404": "no such object",
                "NoSuchKey": "no such object",
                "412": "changed since it was indexed; run deco-data index again",
                "PreconditionFailed": "changed since it was indexed; run deco-data index again",
            }
            hint = hints.get(_code(error), f"the server answered {_code(error)}")
            raise StoreError(f"{self._name(key)}: {hint}") from error
        except (BotoCoreError, S3UploadFailedError) as error:
            raise StoreError(f"{self._name(key)}: {error}") from error


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))
