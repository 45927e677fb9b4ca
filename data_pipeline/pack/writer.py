"""Pack samples into WebDataset tar shards: the same samples give the same bytes, anywhere and at any time.

A shard appears whole or not at all; ``shards.json`` (key, size, samples and SHA-256 of each) is written last.
"""

import hashlib
import io
import itertools
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError, Reject
from data_pipeline.index.format import INDEX_KEY
from data_pipeline.pack.readers import PackedSample
from data_pipeline.storage.base import Store

MANIFEST_KEY = "shards.json"
CLASSES_KEY = "classes.txt"
"""Names of the classes, one a line; the first line is class 0."""
MARK_KEY = "shards.partial"
"""There while packing: says that the shards beside it may be replaced."""
_MARK = b"deco-data pack is running or was interrupted here; running it again replaces the shards.\n"
_OURS = re.compile(r"shard-\d{5,}\.tar")


class OccupiedError(DataError):
    """The URL holds shards that packing would mix with, or replace."""


@dataclass
class PackReport:
    """What was written; ``captioned`` samples have more than a class number."""

    samples: int = 0
    shards: list[str] = field(default_factory=list)
    captioned: int = 0


def pack(
    samples: Iterable[PackedSample],
    store: Store,
    *,
    shard_bytes: int,
    rejects: list[Reject],
    classes: Sequence[str] = (),
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> PackReport:
    """Write ``shard-00000.tar``, ... of about ``shard_bytes`` each, one uploaded while the next is packed.

    ``classes``, if any, are written to ``classes.txt``. Raises :class:`OccupiedError` for shards that are there,
    unless an interrupted ``pack`` left them or ``overwrite`` is given; those of others are never replaced.
    """
    replaced = _replaceable(store, overwrite)
    report = PackReport()

    def noted() -> Iterator[PackedSample]:
        for sample in samples:
            if not report.samples:
                store.write(MARK_KEY, _MARK)
                # They describe what is about to be replaced.
                for key in (MANIFEST_KEY, INDEX_KEY, CLASSES_KEY) if replaced else ():
                    store.delete(key)
            report.samples += 1
            report.captioned += bool(sample.captions)
            if progress:
                progress(report.samples)
            yield sample

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1, thread_name_prefix="upload") as uploader:
        uploads: list[Future[dict[str, Any]]] = []
        for path, count in _shards(noted(), Path(scratch), shard_bytes):
            # Waiting keeps at most two shards on the disk: this one, and the one that is packed next.
            if uploads:
                uploads[-1].result()
            uploads.append(uploader.submit(_upload, store, path, count))
        packed = [future.result() for future in uploads]
    if not packed:
        raise DataError(f"nothing to pack; left out: {[str(reject) for reject in rejects[:5]]}")
    report.shards = [entry["key"] for entry in packed]
    for key in replaced - set(report.shards):
        store.delete(key)
    if classes:
        store.write(CLASSES_KEY, "".join(f"{name}\n" for name in classes).encode())
    store.write(MANIFEST_KEY, json.dumps(packed, indent=1).encode())
    store.delete(MARK_KEY)
    return report


def _replaceable(store: Store, overwrite: bool) -> set[str]:
    """Shards that are there and may be replaced."""
    root = store.local_path("")
    if root is not None and not root.exists():
        return set()
    tars = {info.key for info in store.list() if info.key.endswith(".tar")}
    if tars and not overwrite and store.read_all(MARK_KEY) is None:
        raise OccupiedError(f"{store.url}: holds {len(tars)} tar shards; give --overwrite to replace them")
    foreign = sorted(key for key in tars if not _OURS.fullmatch(key))
    if foreign:
        raise OccupiedError(f"{store.url}: holds {foreign[0]}, which deco-data pack did not write; pack elsewhere")
    return tars


def _shards(samples: Iterable[PackedSample], folder: Path, shard_bytes: int) -> Iterator[tuple[Path, int]]:
    """Path and number of samples of each shard that is complete."""
    keyed = enumerate(samples)
    for number in itertools.count():
        path, count = folder / f"shard-{number:05d}.tar", 0
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, sample in keyed:
                count += 1
                for suffix, raw in {sample.suffix: sample.image, **sample.texts()}.items():
                    # Time, owner and mode are TarInfo's defaults, the same everywhere.
                    info = tarfile.TarInfo(f"{key:09d}.{suffix}")
                    info.size = len(raw)
                    tar.addfile(info, io.BytesIO(raw))
                if tar.offset >= shard_bytes:
                    break
        if not count:
            return
        yield path, count


def _upload(store: Store, path: Path, count: int) -> dict[str, Any]:
    """Upload and remove a shard's file; returns the shard's entry of ``shards.json``."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    store.write_file(path.name, path)
    size = path.stat().st_size
    path.unlink()
    return {"key": path.name, "size": size, "samples": count, "sha256": sha256}
