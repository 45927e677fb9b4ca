"""Read every shard again and compare it with the index, with ``shards.json`` and with the tar format.

One pass in pieces: memory holds a few pieces, one sample, and the position of each tar member.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import google_crc32c

from data_pipeline.captions import parse_captions, parse_label
from data_pipeline.decode import PILLOW_PIXELS, DecodeError, decode, image_size
from data_pipeline.errors import Reject, StoreError
from data_pipeline.index.build import PIECE_BYTES, Progress, ShardFile, over_processes, shard_samples
from data_pipeline.index.format import Location, load_index
from data_pipeline.pack.writer import MANIFEST_KEY
from data_pipeline.storage.base import ObjectInfo, Store

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
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


_Task = tuple[ObjectInfo, list[Location], tuple[int, str] | None]
"""A shard as it is stored, its samples as they should be, and its size and SHA-256 in ``shards.json``."""


def verify(
    store: Store, *, workers: int = 1, decode_images: bool = False, progress: Progress | None = None
) -> VerifyReport:
    """Check every shard of the index; DataError where there is none. ``workers`` above 1 are processes."""
    index = load_index(store)
    report = VerifyReport()
    objects = {info.key: info for info in store.list() if info.key.endswith(".tar")}
    manifest = _manifest(store, report.problems)
    indexed = {shard.key for shard in index.shards}
    report.problems += [f"{key}: is not in the index" for key in objects if key not in indexed]
    report.problems += [f"{key}: in {MANIFEST_KEY}, but missing" for key in manifest if key not in objects]

    def tasks() -> Iterator[_Task]:
        """Shards that can be read; made one by one, since the locations of all samples would not fit in memory."""
        for number, shard in enumerate(index.shards):
            stored = objects.get(shard.key)
            if stored is None:
                report.problems.append(f"{shard.key}: in the index, but missing")
                continue
            if stored.size != shard.size:
                report.problems.append(f"{shard.key}: {stored.size} bytes, the index has {shard.size}")
            elif stored.etag != shard.etag:
                what = f"ETag {stored.etag}, the index has {shard.etag}"
                report.problems.append(f"{shard.key}: was replaced: {what}")
            yield stored, list(map(index.locate, index.shard_rows(number))), manifest.get(shard.key)

    fields = tuple(index.header["scan"]["caption_fields"])
    work = functools.partial(_verify_shard, decode_as=fields if decode_images else None)
    workers = min(workers, len(objects))
    parts = over_processes(work, tasks(), store=store, workers=workers)
    for done, ((shard, *_), part) in enumerate(parts, start=1):
        report.add(part)
        if progress:
            progress(shard.key, done, len(index.shards))
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


def _verify_shard(store: Store, task: _Task, decode_as: tuple[str, ...] | None) -> VerifyReport:
    """Read one shard from start to end; ``decode_as`` are the fields of captions where samples are decoded."""
    shard, locations, listed = task
    file, sha256, report = ShardFile(store, shard), hashlib.sha256(), VerifyReport(shards=1)
    rejects: list[Reject] = []
    sample_problems: list[str] = []
    keys: dict[int, str] = {}
    sizes: dict[int, int] = {}
    samples = shard_samples(file, rejects)
    try:
        for start in range(0, max(1, shard.size), PIECE_BYTES):
            end = min(start + PIECE_BYTES, shard.size)
            sha256.update(file.span(start, end))
            report.bytes = end
            for key, members, sample_end in samples:
                keys[min(member.offset for member in members.values())] = key
                sizes |= {member.offset_data: member.size for member in members.values()}
                if sample_end >= end < shard.size:
                    break
            while report.samples < len(locations) and (location := locations[report.samples]).end <= end:
                report.samples += 1
                if problem := _sample_problem(file.span(location.start, location.end), location, decode_as):
                    key = keys.get(location.start, f"sample at byte {location.start}")
                    sample_problems.append(f"{key.encode('utf-8', 'replace').decode()}: {problem}")
                else:
                    report.decoded += decode_as is not None
    except StoreError as error:
        return VerifyReport(shards=1, bytes=report.bytes, problems=[str(error)])
    # A repeated key is in the index's own list of problems.
    problems = [reject.reason for reject in rejects if reject.name == shard.key]
    parts = [(at.start + part.start, part.stop - part.start) for at in locations for part in (at.image, at.text)]
    if misplaced := sum(sizes.get(start, -1) != size for start, size in parts):
        problems.append(f"{misplaced} of {len(parts)} images and texts are not where the index has")
    if listed is not None:
        report.checksums = 1
        if listed != (shard.size, sha256.hexdigest()):
            problems.append(f"SHA-256 or size differs from {MANIFEST_KEY}")
    if missing := len(locations) - report.samples:
        problems.append(f"{missing} samples of the index: outside of the shard")
    problems += sample_problems[:LISTED_PER_SHARD]
    if unlisted := sample_problems[LISTED_PER_SHARD:]:
        problems.append(f"and {len(unlisted)} more samples")
    report.problems = [f"{shard.key}: {problem}" for problem in problems]
    return report


def _sample_problem(raw: bytes, location: Location, decode_as: tuple[str, ...] | None) -> str | None:
    crc32c = google_crc32c.value(raw)
    if crc32c != location.crc32c:
        return f"CRC32C {crc32c:08x}, the index has {location.crc32c:08x}"
    if decode_as is not None:
        try:
            image, text = raw[location.image], raw[location.text]
            side = min(image_size(image))
            decode(image, (side, side), mode="exact", max_pixels=PILLOW_PIXELS)
            if location.is_label:
                parse_label(text)
            else:
                parse_captions(text, is_json=location.is_json, fields=decode_as)
        except DecodeError as error:
            return f"{error.kind}: {error}"
    return None
