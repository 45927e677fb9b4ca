"""Checkpoints in an object store: the data pipeline's store, with every upload verified."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

import google_crc32c

from data_pipeline.errors import DataError, StoreError
from data_pipeline.storage.base import open_store
from deco_scale.checkpoint.storage import ObjectStore
from deco_scale.errors import ConfigError, RunError

T = TypeVar("T")
_PIECE_BYTES = 16 * 2**20


def open_objects(url: str) -> ObjectStore:
    """The store below ``s3://bucket/prefix``; raises :class:`ConfigError` for a URL that is none."""
    return S3Objects(url)


class S3Objects:
    """See :class:`deco_scale.checkpoint.storage.ObjectStore`."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._store = open_store(url)
        except DataError as error:
            raise ConfigError(str(error)) from error

    def sizes(self) -> Mapping[str, int]:
        return _named(lambda: {found.key: found.size for found in self._store.list()})

    def read(self, key: str, offset: int, length: int) -> bytes:
        return _named(lambda: self._store.read(key, offset, length))

    def put_file(self, key: str, path: Path, crc32c: int) -> None:
        _named(lambda: self._put(key, path, crc32c))

    def delete(self, key: str) -> None:
        _named(lambda: self._store.delete(key))

    def discard_uploads(self) -> None:
        """Abort unfinished multipart uploads below the URL; they are billed, and no listing shows them."""
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        parsed = urlparse(self.url)
        target = {"Bucket": parsed.netloc}
        try:
            client: Any = boto3.session.Session().client("s3")
            pages = client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(**target, Prefix=f"{parsed.path.strip('/')}/".lstrip("/")):
                for upload in page.get("Uploads", []):
                    client.abort_multipart_upload(**target, Key=upload["Key"], UploadId=upload["UploadId"])
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "unknown")
            raise RunError(f"{self.url}: unfinished uploads could not be removed: {code}") from None
        except BotoCoreError as error:
            raise RunError(
                f"{self.url}: unfinished uploads could not be removed: {type(error).__name__}"
            ) from None

    def _put(self, key: str, path: Path, crc32c: int) -> None:
        """Upload, then compare size and ETag; where the ETag is no MD5 of the bytes, read them back."""
        # Importing it imports boto3, which a trainer needs only once it has opened a store.
        from data_pipeline.storage.s3 import expected_etag

        size = path.stat().st_size
        self._store.write_file(key, path)
        found = self._store.info(key)
        if found is None or found.size != size:
            raise StoreError(f"{self.url}/{key}: {found.size if found else 0} of {size} bytes were stored")
        if found.etag != expected_etag(path, size) and self._stored_crc(key, size) != crc32c:
            raise StoreError(f"{self.url}/{key}: the stored bytes differ from those that were sent")

    def _stored_crc(self, key: str, size: int) -> int:
        checksum = google_crc32c.Checksum()
        for start in range(0, size, _PIECE_BYTES):
            checksum.update(self._store.read(key, start, min(_PIECE_BYTES, size - start)))
        return int.from_bytes(checksum.digest(), "big")


def _named(action: Callable[[], T]) -> T:
    try:
        return action()
    except DataError as error:
        # Its own message says which object; a cause could hold credentials.
        raise RunError(str(error)) from None
