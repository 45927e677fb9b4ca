"""Files of named tensors, tensor by tensor: reading Lightning's ``.ckpt``, reading and writing safetensors."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_tools.base import Advance, TensorSpec, read_checked
from checkpoints_tools.formats.torch_zip import Archive
from data_pipeline.storage.safetensors import encode_header
from deco_scale.checkpoint.integrity import ChecksummedFile, FileChecksums, raw_bytes, write_checksummed
from deco_scale.errors import ConfigError

MAX_JSON_BYTES = 64 * 2**20
"""Larger JSON files are refused."""
INDEX_SUFFIX = ".safetensors.index.json"
CHECKSUMS = "checksums.json"
"""In exported folders: size and CRC32C of each file, by its path in the folder."""
SETTINGS_CRC = "settings_crc32c"
"""Beside an exported ``.ckpt``: the checksum of the settings themselves."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class LightningStore:
    """The ``state_dict`` of a Lightning ``.ckpt``.

    Raises :class:`ConfigError` for a file that is not a ``torch.save`` archive, is truncated, holds anything that
    ``weights_only`` does not permit, has no ``state_dict``, or has anything but dense tensors in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        archive = Archive(path)
        content = archive.content
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            actual = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content).__name__
            raise ConfigError(f"{path} has no state_dict, so it is no Lightning checkpoint (it has: {actual})")
        state = content["state_dict"]
        unnamed = [repr(n)[:80] for n in state if not isinstance(n, str)]
        if unnamed:
            raise ConfigError(f"{path}: {unnamed[0]} is not a tensor name")
        self._stored = {name: archive.stored(tensor, name) for name, tensor in state.items()}
        self.specs = {n: TensorSpec(s.shape, s.dtype) for n, s in sorted(self._stored.items())}
        plain = {k: content.get(k) for k in ("global_step", "epoch", "pytorch-lightning_version")}
        self.facts = {k: v for k, v in plain.items() if isinstance(v, int | str)}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        return self._stored[name].read(rows)


class SafetensorsStore:
    """One safetensors file, or the files of an index; ``facts`` are the metadata strings.

    The library compares the header with the file's size. Raises :class:`ConfigError` naming the file.
    """

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        self.path = path
        self.specs: dict[str, TensorSpec] = {}
        self.facts: dict[str, Any] = {}
        self.file_of: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    self.facts |= opened.metadata() or {}
                    for name in opened.keys():  # noqa: SIM118
                        part = opened.get_slice(name)
                        if name in self.specs:
                            raise ConfigError(f"{file}: {name} is in another file already")
                        if part.get_dtype() not in DTYPES:
                            raise ConfigError(f"{file}: {name} has the type {part.get_dtype()}, not supported")
                        spec = TensorSpec(tuple(part.get_shape()), DTYPES[part.get_dtype()])
                        self.specs[name], self.file_of[name] = spec, file
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{file} is damaged or missing: {error}") from error

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        file = self.file_of[name]
        try:
            with safe_open(file, framework="pt") as opened:
                if rows is None:
                    return opened.get_tensor(name).clone()
                return opened.get_slice(name)[rows[0] : rows[1]].clone()
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file}: {name} cannot be read: {error}") from error


Store = LightningStore | SafetensorsStore
"""Named tensors of one or several files; ``facts`` are the files' metadata."""


def open_safetensors(path: Path) -> SafetensorsStore:
    """A ``.safetensors`` file, or shards by their index JSON, which must name each tensor's file."""
    if not path.name.endswith(INDEX_SUFFIX):
        return SafetensorsStore(path, [path])
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise ConfigError(f"{path} has no weight_map from tensors to files")
    files = sorted(set(table.values()))
    outside = [f for f in files if "/" in f or f in ("", ".", "..")]
    if outside:
        raise ConfigError(f"{path} names {outside[0]!r}, which is no file beside it")
    store = SafetensorsStore(path, [path.parent / f for f in files])
    for name in sorted(set(table) | set(store.specs)):
        if name not in store.specs:
            raise ConfigError(f"{path}: {name} is not in {table[name]}")
        if name not in table or store.file_of[name].name != table[name]:
            raise ConfigError(f"{store.file_of[name]}: {name} is not as {path.name} says")
    return store


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; raises :class:`ConfigError` naming the file."""
    try:
        size = path.stat().st_size
        content = json.loads(path.read_text(encoding="utf-8")) if size <= MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged or missing: {error}") from error
    if size > MAX_JSON_BYTES:
        raise ConfigError(f"{path}: {size} bytes of JSON are refused")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not contain a JSON object")
    return content


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
    metadata = metadata or {}
    for file, shard in zip(names, shards, strict=True):
        with ChecksummedFile(folder / file) as out:
            types = {n: (_NAMES[specs[n].dtype], specs[n].shape) for n in shard}
            out.write(encode_header(types, {"format": "pt", **metadata}))
            for name in shard:
                out.write(raw_bytes(read_checked(read, name, specs[name])))
                advance(name)
            checksums[file] = out.sync()
    if len(shards) > 1:
        table = {n: file for file, shard in zip(names, shards, strict=True) for n in shard}
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total, **metadata}, "weight_map": dict(sorted(table.items()))}
        checksums[f"{stem}{INDEX_SUFFIX}"] = write_checksummed(folder / f"{stem}{INDEX_SUFFIX}", as_json(index))
    return checksums


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def settings_crc(settings: Mapping[str, object]) -> int:
    """CRC32C of the settings in a release file's JSON."""
    fields = {k: v for k, v in settings.items() if k not in ("files", SETTINGS_CRC)}
    return int(google_crc32c.value(as_json(fields)))


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
