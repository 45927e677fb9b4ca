"""Objects below a prefix of an S3 bucket, read and written exactly through the faults of servers and networks.

Credentials, region and endpoint come the standard AWS ways (environment, profile, instance role,
``AWS_ENDPOINT_URL_S3``). Botocore's own retries are off: they never retry a body that broke, and two policies
would multiply. An error that was refused for good carries no cause, because botocore's may hold credentials.
"""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

import boto3
import botocore
import botocore.exceptions as aws
import urllib3.exceptions
from botocore.config import Config

from data_pipeline.errors import DataError, StoreError
from data_pipeline.storage.base import Access, Counters, ObjectInfo, Store, open_store
from data_pipeline.storage.retry import Backoff, RetryBudget

PIECE_BYTES = 1 << 20
PART_BYTES = 16 << 20
MAX_PARTS = 10_000
"""Limit of S3 for one object."""
WRITERS = 4
"""Parts of one upload sent at once; each holds ``PART_BYTES``."""
CONNECT_TIMEOUT_S = 10.0
FIRST_CONTACT_S = 60.0
"""Deadline while the server has never answered: then a wrong endpoint is likelier than an outage."""

_FAULTS = ("fault_503", "fault_5xx", "fault_reset", "fault_stall", "fault_truncated")
_THROTTLED = ("SlowDown", "ServiceUnavailable", "RequestLimitExceeded", "Throttling", "ThrottlingException")
_CHANGED = "changed since it was indexed; run deco-data index again"
_DENIED = "access denied: check the credentials and the bucket's policy"
_REGION = "the bucket is in another region: set AWS_DEFAULT_REGION"
_HINTS = {
    **dict.fromkeys(("401", "403", "AccessDenied"), _DENIED),
    **dict.fromkeys(("404", "NoSuchKey"), "no such object"),
    **dict.fromkeys(("412", "PreconditionFailed"), _CHANGED),
    **dict.fromkeys(("416", "InvalidRange"), "it is shorter than in the index; run deco-data index again"),
    **dict.fromkeys(("AuthorizationHeaderMalformed", "PermanentRedirect"), _REGION),
    "InvalidAccessKeyId": "the access key is not known to this server",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the credentials have expired: renew them",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "NoSuchBucket": "no such bucket",
}
_NETWORK_FAULTS = (
    ("fault_truncated", (aws.IncompleteReadError, urllib3.exceptions.IncompleteRead)),
    ("fault_stall", (aws.ReadTimeoutError, aws.ConnectTimeoutError, urllib3.exceptions.TimeoutError)),
    ("fault_reset", (aws.ConnectionError, aws.HTTPClientError, urllib3.exceptions.HTTPError)),
)
"""Counters of failures between here and the server, and the errors counted; the first that fits."""
_md5 = functools.partial(hashlib.md5, usedforsecurity=False)
T = TypeVar("T")


def part_bytes(size: int) -> int:
    """Bytes of each part (but the last) of an upload of ``size`` bytes."""
    return max(PART_BYTES, -(-size // MAX_PARTS))


def expected_etag(path: Path, size: int) -> str:
    """What S3 answers for unencrypted objects: MD5, of the parts' MD5s where the upload had parts."""
    if size <= PART_BYTES:
        return _md5(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        parts = [_md5(piece).digest() for piece in iter(lambda: file.read(part_bytes(size)), b"")]
    return f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}"


class _Fault(Exception):
    """A failure that may pass: the counter of its kind, and a line for the user."""


class _Missing(StoreError):
    """There is no such object."""


class _NoUpload(StoreError):
    """There is no such multipart upload."""


_REFUSALS = {"404": _Missing, "NoSuchKey": _Missing, "NoSuchUpload": _NoUpload}


class S3Store(Store):
    """See :class:`data_pipeline.storage.base.Store`; threads share its connections and its budget of retries."""

    def __init__(self, url: str, access: Access, budget: RetryBudget) -> None:
        parsed = urlparse(url)
        if not parsed.netloc:
            raise DataError(f"{url}: an S3 URL looks like s3://bucket/prefix")
        self.url, self.counters = url, Counters(dict.fromkeys(("requests", "bytes", "retries", *_FAULTS), 0))
        self._access, self._budget = access, budget
        self._bucket = parsed.netloc
        prefix = parsed.path.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._answered = False
        config = Config(
            connect_timeout=min(CONNECT_TIMEOUT_S, access.read_timeout_s),
            read_timeout=access.read_timeout_s,
            max_pool_connections=access.connections,
            tcp_keepalive=True,
            retries={"mode": "standard", "total_max_attempts": 1},
            signature_version=botocore.UNSIGNED if access.anonymous else None,
        )
        with self._errors(""):
            self._client = boto3.session.Session().client("s3", config=config)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.url, self._access)

    def list(self) -> Iterator[ObjectInfo]:
        for page in self._pages("list_objects_v2", ContinuationToken="NextContinuationToken"):
            for entry in page.get("Contents", []):
                key = entry["Key"].removeprefix(self._prefix)
                yield ObjectInfo(key, entry["Size"], entry["ETag"].strip('"'))

    def read(self, key: str, offset: int, length: int, etag: str | None = None) -> bytes:
        return self._read(key, offset, length, etag) if length else b""

    def read_all(self, key: str) -> bytes | None:
        with contextlib.suppress(_Missing):
            return self._read(key, 0, None, None)
        return None

    def info(self, key: str) -> ObjectInfo | None:
        with contextlib.suppress(_Missing):
            answer = self._call(key, "head_object", Key=self._prefix + key)
            return ObjectInfo(key, answer["ContentLength"], answer["ETag"].strip('"'))
        return None

    def delete(self, key: str) -> None:
        self._call(key, "delete_object", Key=self._prefix + key)

    def write(self, key: str, data: bytes) -> None:
        self._upload(key, len(data), lambda start, size: data[start : start + size])

    def write_file(self, key: str, path: Path) -> None:
        try:
            with path.open("rb") as file:

                def part(start: int, size: int) -> bytes:
                    data = os.pread(file.fileno(), size, start)
                    if len(data) != size:
                        raise StoreError(f"{path}: became shorter while it was uploaded")
                    return data

                self._upload(key, os.fstat(file.fileno()).st_size, part)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error

    def abort_uploads(self) -> None:
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for page in self._pages("list_multipart_uploads", **markers):
            for upload in page.get("Uploads", []):
                self._call("", "abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"])

    def _read(self, key: str, offset: int, length: int | None, etag: str | None) -> bytes:
        """Each attempt goes on at the byte, and insists on the object, of the one before."""
        received = bytearray()

        def attempt(backoff: Backoff) -> bytes:
            nonlocal length, etag
            request = {} if etag is None else {"IfMatch": f'"{etag}"'}
            first = offset + len(received)
            if length is not None:
                request["Range"] = f"bytes={first}-{offset + length - 1}"
            response = self._send("get_object", Key=self._prefix + key, **request)
            length = self._check(key, response, first, offset, length)
            etag = response["ETag"].strip('"')
            # The context is urllib3's own stream: unlike botocore's it has read1, which returns what
            # has arrived, so a break loses nothing that was received and a drip of bytes is noticed.
            with response["Body"] as stream:
                self._drain(stream, received, length, backoff)
            return bytes(received)

        return self._retried(key, attempt)

    def _check(self, key: str, response: Any, first: int, offset: int, length: int | None) -> int:
        """Length of the whole read, or an error where the answer is not for the range from ``first`` on."""
        if length is None:
            return int(response["ContentLength"])
        end = offset + length
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.get("ContentRange", ""))
        if match is None:
            if first == 0 and response["ContentLength"] == length:
                return length
            raise StoreError(f"{self._name(key)}: the server ignores ranges; read it from another server")
        if int(match[1]) != first or int(match[2]) != end - 1:
            raise StoreError(f"{self._name(key)}: ends at {int(match[2]) + 1}, expected {end}: {_CHANGED}")
        return length

    def _drain(self, stream: Any, received: bytearray, length: int, backoff: Backoff) -> None:
        while len(received) < length:
            piece = stream.read1(min(PIECE_BYTES, length - len(received)))
            if not piece:
                raise _Fault("fault_truncated", f"the body ended at {len(received)} of {length} bytes")
            received += piece
            backoff.progress(len(piece))
            self.counters.add(bytes=len(piece))
            if backoff.overdue and len(received) < length:
                raise _Fault("fault_stall", f"the body came too slowly, {len(received)} of {length} bytes")

    def _upload(self, key: str, size: int, part: Callable[[int, int], bytes]) -> None:
        """One request for a small object; parts, each retried by itself, for a large one."""
        if size <= PART_BYTES:
            self._call(key, "put_object", Key=self._prefix + key, Body=part(0, size))
            return
        target = {"Key": self._prefix + key}
        target["UploadId"] = self._call(key, "create_multipart_upload", **target)["UploadId"]
        step = part_bytes(size)

        def send(number: int) -> dict[str, Any]:
            body = part(number * step, min(step, size - number * step))
            answer = self._call(key, "upload_part", **target, PartNumber=number + 1, Body=body)
            return {"PartNumber": number + 1, "ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(WRITERS, thread_name_prefix="upload") as pool:
                parts = list(pool.map(send, range(-(-size // step))))
            try:
                self._call(key, "complete_multipart_upload", **target, MultipartUpload={"Parts": parts})
            except _NoUpload:
                # The answer to an attempt that succeeded may have been lost; the upload is gone then.
                if self._call(key, "head_object", Key=target["Key"])["ContentLength"] != size:
                    raise
        except BaseException:
            with contextlib.suppress(StoreError, _Fault), self._errors(key):
                self._send("abort_multipart_upload", **target)
            raise

    def _pages(self, operation: str, **markers: str) -> Iterator[Any]:
        """Pages of a listing; ``markers`` maps the arguments of the next request to fields of the last answer."""
        query: dict[str, Any] = {"Prefix": self._prefix}
        while True:
            page = self._call("", operation, **query)
            yield page
            if not page.get("IsTruncated"):
                return
            # Some servers leave out a marker that they do not need.
            query |= {argument: page[field] for argument, field in markers.items() if field in page}

    def _call(self, key: str, operation: str, **arguments: Any) -> Any:
        """One operation without a body in its answer."""
        return self._retried(key, lambda _: self._send(operation, **arguments))

    def _retried(self, key: str, attempt: Callable[[Backoff], T]) -> T:
        """An attempt's result, tried until it succeeds, is refused or time is up."""
        limit_s = self._access.deadline_s
        deadline_s = limit_s if self._answered else min(limit_s, FIRST_CONTACT_S)
        backoff = Backoff(self._name(key), deadline_s, self._budget)
        while True:
            try:
                with self._errors(key):
                    result = attempt(backoff)
                self._budget.succeed()
                return result
            except _Fault as fault:
                kind, text = fault.args
                self.counters.add(**{kind: 1})
                backoff.wait(text)
                self.counters.add(retries=1)

    def _send(self, operation: str, **arguments: Any) -> Any:
        self.counters.add(requests=1)
        if self._access.requester_pays:
            arguments["RequestPayer"] = "requester"
        answer = getattr(self._client, operation)(Bucket=self._bucket, **arguments)
        self._answered = True
        return answer

    def _name(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn the errors of botocore and urllib3 into :class:`_Fault` or :class:`StoreError`."""
        problem: Exception
        try:
            yield
            return
        except aws.ClientError as error:
            self._answered = True
            problem = self._classify(key, error)
        except (aws.BotoCoreError, urllib3.exceptions.HTTPError) as error:
            text = _plain(error)
            kind = next((kind for kind, types in _NETWORK_FAULTS if isinstance(error, types)), None)
            # Trying again does not mend a certificate.
            passes = kind is not None and "CERTIFICATE_VERIFY_FAILED" not in text
            problem = _Fault(kind, text) if passes else StoreError(f"{self._name(key)}: {text}")
        raise problem from None

    def _classify(self, key: str, error: Any) -> Exception:
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        answer = f"the server answered {code} (HTTP {status})"
        if status in (429, 503) or code in _THROTTLED:
            return _Fault("fault_503", answer)
        if status >= 500 or code == "InternalError":
            return _Fault("fault_5xx", answer)
        if code == "RequestTimeout":
            return _Fault("fault_stall", answer)
        hint = _HINTS.get(code) or _HINTS.get(str(status), answer)
        if hint == _DENIED and self._access.anonymous:
            hint = "access denied to an anonymous reader: the bucket is not public, so credentials are needed"
        return _REFUSALS.get(code, StoreError)(f"{self._name(key)}: {hint}")


def _plain(error: Exception) -> str:
    """One line about a failure, without what may be secret: queries of URLs, or a credential helper's output."""
    if isinstance(error, aws.NoCredentialsError):
        return "no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
    if isinstance(error, aws.CredentialRetrievalError):
        return f"credentials could not be retrieved by {error.kwargs.get('provider', 'their provider')}"
    return re.sub(r"\?[^\s\"']*", "", " ".join(str(error).split()))
