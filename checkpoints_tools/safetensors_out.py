"""Writing safetensors files tensor by tensor, as one file or shards with an index, and the exports' checksums."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import google_crc32c
from torch import Tensor

from checkpoints_tools.base import Advance, TensorSpec, read_checked
from checkpoints_tools.formats.tensor_files import DTYPES, INDEX_SUFFIX
from data_pipeline.storage.safetensors import encode_header
from deco_scale.checkpoint.integrity import ChecksummedFile, FileChecksums, raw_bytes, write_checksummed

CHECKSUMS = "checksums.json"
"""In exported folders: size and CRC32C of each file, by its path in the folder."""
SETTINGS_CRC = "settings_crc32c"
"""Beside an exported ``.ckpt``: the checksum of the settings themselves."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    folder: Path,
    stem: str,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    *,
    max_shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    advance: Advance = lambda name: None,
) -> FileChecksums:
    """Write ``stem.safetensors``, or shards of at most ``max_shard_bytes`` of data each and an index; durably.

    A tensor larger than that gets a shard of its own. Returns size and CRC32C of each file by name.
    """
    shards = list(_shards(specs, max_shard_bytes))
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    checksums: FileChecksums = {}
    for file, shard in zip(names, shards, strict=True):
        checksums[file] = _write_file(folder / file, {n: specs[n] for n in shard}, read, metadata or {}, advance)
    if len(shards) > 1:
        table = {n: file for file, shard in zip(names, shards, strict=True) for n in shard}
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total, **(metadata or {})}, "weight_map": dict(sorted(table.items()))}
        checksums[f"{stem}{INDEX_SUFFIX}"] = write_checksummed(folder / f"{stem}{INDEX_SUFFIX}", as_json(index))
    return checksums


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def settings_crc(settings: Mapping[str, object]) -> int:
    """CRC32C of the settings in a release file's JSON."""
    fields = {k: v for k, v in settings.items() if k not in ("files", SETTINGS_CRC)}
    return int(google_crc32c.value(as_json(fields)))


def _write_file(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    advance: Advance,
) -> tuple[int, int]:
    header = encode_header(
        {n: (_NAMES[spec.dtype], spec.shape) for n, spec in specs.items()}, {"format": "pt", **metadata}
    )
    with ChecksummedFile(path) as out:
        out.write(header)
        for name, spec in specs.items():
            out.write(raw_bytes(read_checked(read, name, spec)))
            advance(name)
        return out.sync()


def _shards(specs: Mapping[str, TensorSpec], limit: int | None) -> Iterator[list[str]]:
    current: list[str] = []
    size = 0
    for name in sorted(specs):
        if current and limit is not None and size + specs[name].nbytes > limit:
            yield current
            current, size = [], 0
        current.append(name)
        size += specs[name].nbytes
    yield current
