"""Safetensors files written tensor by tensor, one file or shards with an index.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, little
endian; the header, a JSON object of type, shape and place of each tensor; the data without gaps.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import google_crc32c
import torch
from torch import Tensor

from checkpoints_tools.base import Advance, TensorSpec
from checkpoints_tools.formats.tensor_files import INDEX_SUFFIX
from deco_scale.checkpoint.format import ChecksummedFile
from deco_scale.errors import ConfigError

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_ALIGNMENT = 8

SUMS = "checksums.json"
"""In exported folders: size and CRC32C of each file, by its path in the folder."""
SETTINGS_SUM = "settings_crc32c"
"""Beside an exported ``.ckpt``: the checksum of the settings themselves."""

Sums = dict[str, tuple[int, int]]
"""Size and CRC32C by file name."""


def write_safetensors(
    folder: Path,
    stem: str,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    *,
    max_shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    advance: Advance = lambda name: None,
) -> Sums:
    """Write ``stem.safetensors``, or shards of at most ``max_shard_bytes`` of data each and an index.

    A tensor larger than that has a shard of its own. Returns size and CRC32C of each file; all are made durable.
    """
    shards = list(_shards(specs, max_shard_bytes))
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    sums: Sums = {}
    for file, shard in zip(names, shards, strict=True):
        sums[file] = _write_one(folder / file, {n: specs[n] for n in shard}, read, metadata or {}, advance)
    if len(shards) > 1:
        table = {n: file for file, shard in zip(names, shards, strict=True) for n in shard}
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total, **(metadata or {})}, "weight_map": dict(sorted(table.items()))}
        sums[f"{stem}{INDEX_SUFFIX}"] = write_summed(folder / f"{stem}{INDEX_SUFFIX}", as_json(index))
    return sums


def write_summed(path: Path, data: bytes) -> tuple[int, int]:
    """Write a small file durably; size and CRC32C."""
    with path.open("wb") as raw:
        out = ChecksummedFile(raw)
        out.write(data)
        raw.flush()
        os.fsync(raw.fileno())
    return out.size, out.crc


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def settings_sum(settings: Mapping[str, object]) -> int:
    """CRC32C of what a release file's JSON says beside its checksums."""
    said = {k: v for k, v in settings.items() if k not in ("files", SETTINGS_SUM)}
    return int(google_crc32c.value(as_json(said)))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any type, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_one(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    advance: Advance,
) -> tuple[int, int]:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as raw:
        out = ChecksummedFile(raw)
        out.write(struct.pack("<Q", len(text)) + text)
        for name, spec in specs.items():
            tensor = read(name).to(spec.dtype).contiguous()
            if tuple(tensor.shape) != spec.shape:
                raise ConfigError(f"{name} has shape {tuple(tensor.shape)}, expected {spec.shape}")
            if tensor.numel():
                out.write(raw_bytes(tensor))
            advance(name)
        raw.flush()
        os.fsync(raw.fileno())
    return out.size, out.crc


def _shards(specs: Mapping[str, TensorSpec], limit: int | None) -> Iterator[list[str]]:
    current: list[str] = []
    held = 0
    for name in sorted(specs):
        if current and limit is not None and held + specs[name].nbytes > limit:
            yield current
            current, held = [], 0
        current.append(name)
        held += specs[name].nbytes
    yield current
