"""Read every shard again and compare it with the index, with ``shards.json`` and with the tar format.

One pass in pieces: memory does not grow with the shards, except for the position of each tar member, and for one
sample at a time where images are decoded.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import google_crc32c

from data_pipeline.captions import parse_captions, parse_label
from data_pipeline.decode import PILLOW_PIXELS, DecodeError, decode, image_size
from data_pipeline.errors import StoreError
from data_pipeline.index.format import BLOCK, Index, Location, load_index
from data_pipeline.pack.writer import MANIFEST_KEY
from data_pipeline.process_pool import over_processes
from data_pipeline.storage.base import Access, ObjectInfo, Store

PIECE_BYTES = 8 * 2**20
LISTED_PER_SHARD = 20
"""Samples of one shard named; the rest are counted."""


@dataclass
class VerifyReport:
    """What was read, and what is wrong, as ``<shard>: <what>``."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    decoded: int = 0
    checksums: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, other: "VerifyReport") -> None:
        for name in ("shards", "samples", "bytes", "decoded", "checksums"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.problems += other.problems


@dataclass(frozen=True, slots=True)
class _Task:
    """A shard as it should be. ``sha256`` and ``listed_size`` are those of ``shards.json``."""

    shard: ObjectInfo
    locations: tuple[Location, ...]
    caption_fields: tuple[str, ...]
    sha256: str | None
    listed_size: int | None
    decode: bool


def verify(
    store: Store,
    *,
    access: Access = Access(),
    workers: int = 1,
    decode_images: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> VerifyReport:
    """Check every shard of the index; ``workers`` above 1 are processes.

    Raises :class:`DataError` where there is no index to compare with. A shard that cannot be read is a problem.
    """
    index = load_index(store)
    report = VerifyReport()
    objects = {info.key: info for info in store.list() if info.key.endswith(".tar")}
    manifest = _manifest(store, report.problems)
    indexed = {shard.key for shard in index.shards}
    report.problems += [f"{key}: is not in the index" for key in objects if key not in indexed]
    report.problems += [f"{key}: in {MANIFEST_KEY}, but missing" for key in manifest if key not in objects]
    tasks = _tasks(index, objects, manifest, decode_images, report.problems)
    workers = min(workers, len(objects))
    parts = over_processes(verify_shard, tasks, store=store, access=access, workers=workers)
    for done, (task, part) in enumerate(parts, start=1):
        report.add(part)
        if progress:
            progress(task.shard.key, done, len(index.shards))
    return report


def _manifest(store: Store, problems: list[str]) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by key, where ``pack`` wrote them."""
    raw = store.read_all(MANIFEST_KEY)
    if raw is None:
        return {}
    try:
        return {str(e["key"]): (int(e["size"]), str(e["sha256"])) for e in json.loads(raw)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problems.append(f"{MANIFEST_KEY}: damaged ({type(error).__name__}: {error})")
        return {}


def _tasks(
    index: Index,
    objects: dict[str, ObjectInfo],
    manifest: dict[str, tuple[int, str]],
    decode_images: bool,
    problems: list[str],
) -> Iterator[_Task]:
    """Shards that can be read; made one by one, since the places of all samples would not fit."""
    fields = tuple(index.header["scan"]["caption_fields"])
    for number, shard in enumerate(index.shards):
        stored = objects.get(shard.key)
        if stored is None:
            problems.append(f"{shard.key}: in the index, but missing")
            continue
        if stored.size != shard.size:
            problems.append(f"{shard.key}: {stored.size} bytes, the index says {shard.size}")
        elif stored.etag != shard.etag:
            problems.append(f"{shard.key}: was replaced: ETag {stored.etag}, the index says {shard.etag}")
        size, sha256 = manifest.get(shard.key, (None, None))
        locations = tuple(map(index.locate, index.shard_rows(number)))
        yield _Task(stored, locations, fields, sha256, size, decode_images)


def verify_shard(store: Store, task: _Task) -> VerifyReport:
    """Read one shard from its beginning to its end."""
    shard = task.shard
    walk, samples, sha256 = _TarWalk(), _Samples(task), hashlib.sha256()
    report = VerifyReport(shards=1)
    try:
        for offset in range(0, shard.size, PIECE_BYTES):
            length = min(PIECE_BYTES, shard.size - offset)
            piece = memoryview(store.read(shard.key, offset, length, shard.etag))
            sha256.update(piece)
            walk.feed(piece, offset)
            samples.feed(piece, offset)
            report.bytes += length
    except StoreError as error:
        report.problems.append(str(error))
        return report
    report.samples, report.decoded = samples.checked, samples.decoded
    problems = walk.problems(shard.size, task.locations)
    if task.sha256 is not None:
        report.checksums = 1
        if (task.listed_size, task.sha256) != (shard.size, sha256.hexdigest()):
            problems.append(f"SHA-256 or size differs from {MANIFEST_KEY}")
    faults = [f"{walk.name(start)}: {what}" for start, what in samples.faults]
    problems += [f"{missing} samples of the index: outside of the shard"] if (missing := samples.missing) else []
    if samples.num_faults > len(faults):
        faults.append(f"and {samples.num_faults - len(faults)} more samples")
    report.problems = [f"{shard.key}: {problem}" for problem in problems + faults]
    return report


class _TarWalk:
    """Follows tar headers through pieces of a shard; pieces are whole blocks, except the last."""

    def __init__(self) -> None:
        self._next = 0
        self._members: dict[int, tuple[str, int]] = {}
        self._ended = False
        self._damage = ""

    def feed(self, piece: memoryview, offset: int) -> None:
        while not self._ended and not self._damage and self._next + BLOCK <= offset + len(piece):
            block = bytes(piece[self._next - offset :][:BLOCK])
            if not any(block):
                self._ended = True
                return
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                self._damage = f"damaged tar header at byte {self._next}: {error}"
                return
            if header.size < 0:
                self._damage = f"tar member of {header.size} bytes at byte {self._next}"
                return
            self._members[self._next] = (header.name, header.size)
            self._next += BLOCK + -(-header.size // BLOCK) * BLOCK

    def name(self, start: int) -> str:
        """Name of the sample that starts there, without the suffix."""
        name, _ = self._members.get(start, (f"sample at byte {start}", 0))
        folder, slash, base = name.rpartition("/")
        return (folder + slash + base.partition(".")[0]).encode("utf-8", "replace").decode()

    def problems(self, size: int, locations: tuple[Location, ...]) -> list[str]:
        problems = [self._damage] if self._damage else []
        if not self._damage and not self._ended:
            problems.append(f"no end-of-archive mark in {size} bytes, the shard may be cut off")
        parts = [(at.start, part) for at in locations for part in (at.image, at.text)]
        lost = sum(
            self._members.get(start + part.start - BLOCK, ("", -1))[1] != part.stop - part.start
            for start, part in parts
        )
        if lost:
            problems.append(f"{lost} of {len(parts)} images and texts are not where the index says")
        return problems


class _Samples:
    """Checksums (and decodes) the index's samples as their bytes come by."""

    def __init__(self, task: _Task) -> None:
        self._task = task
        self._next = 0
        self._crc = 0
        self._sample = bytearray()
        self.checked, self.decoded, self.num_faults = 0, 0, 0
        self.faults: list[tuple[int, str]] = []

    def feed(self, piece: memoryview, offset: int) -> None:
        locations, end = self._task.locations, offset + len(piece)
        while self._next < len(locations) and locations[self._next].start < end:
            location = locations[self._next]
            part = bytes(piece[max(location.start - offset, 0) : location.end - offset])
            self._crc = google_crc32c.extend(self._crc, part)
            if self._task.decode:
                self._sample += part
            if location.end > end:
                return
            self._finish(location)

    @property
    def missing(self) -> int:
        return len(self._task.locations) - self.checked

    def _finish(self, location: Location) -> None:
        raw = bytes(self._sample)
        if self._crc != location.crc32c:
            self._fault(location, f"CRC32C {self._crc:08x}, the index says {location.crc32c:08x}")
        elif self._task.decode:
            try:
                self._decode(raw, location)
                self.decoded += 1
            except DecodeError as error:
                self._fault(location, f"{error.kind}: {error}")
        self.checked += 1
        self._next, self._crc, self._sample = self._next + 1, 0, bytearray()

    def _decode(self, raw: bytes, location: Location) -> None:
        image, text = raw[location.image], raw[location.text]
        side = min(image_size(image))
        decode(image, (side, side), mode="exact", max_pixels=PILLOW_PIXELS)
        if location.is_label:
            parse_label(text)
        else:
            parse_captions(text, is_json=location.is_json, fields=self._task.caption_fields)

    def _fault(self, location: Location, what: str) -> None:
        self.num_faults += 1
        if len(self.faults) < LISTED_PER_SHARD:
            self.faults.append((location.start, what))
