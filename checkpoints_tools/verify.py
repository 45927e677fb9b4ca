"""Verifying a checkpoint: checksums, index and sizes, and the weights' digest."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from checkpoints_tools.base import Advance
from checkpoints_tools.formats.canonical import CanonicalReader
from checkpoints_tools.formats.tensor_files import read_json
from checkpoints_tools.formats.torch_zip import check_record_crcs
from checkpoints_tools.registry import PIPELINE, open_checkpoint
from checkpoints_tools.safetensors_out import CHECKSUMS, SETTINGS_CRC, as_json, settings_crc
from deco_scale.checkpoint.format import COMPLETE, META, find_checkpoint, read_meta
from deco_scale.checkpoint.integrity import MODEL_PREFIX, crc32c_of, digest_of_sums, word_sum
from deco_scale.errors import ConfigError


def problems_of(path: Path, *, advance: Advance = lambda name: None) -> Iterator[str]:
    """Everything that is wrong, as text naming the file or tensor; nothing if all is well."""
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        yield from _canonical_problems(checkpoint, advance)
        return
    problems = list(_export_problems(path, advance))
    yield from problems
    if problems:
        return
    try:
        source = open_checkpoint(path)
        if path.is_file() and path.suffix == ".ckpt":
            check_record_crcs(path)
        for name in source.specs:
            source.read(name)
            advance(name)
    except ConfigError as error:
        yield str(error)


def has_checksums(path: Path) -> bool:
    """Whether :func:`problems_of` can compare every byte of it with a recorded checksum."""
    if path.is_dir():
        return find_checkpoint(path) is not None or (path / CHECKSUMS).is_file()
    return path.with_name(f"{path.name}.json").is_file()


def _canonical_problems(path: Path, advance: Advance) -> Iterator[str]:
    try:
        recorded = read_json(path / COMPLETE)
        _check_text(path / COMPLETE, json.dumps(recorded, indent=1))
    except ConfigError as error:
        yield str(error)
        return
    problems = list(_compare(path, recorded, COMPLETE, advance))
    problems += _unlisted(path, recorded, COMPLETE)
    yield from problems
    if problems:
        return
    try:
        meta = read_meta(path)
        reader = CanonicalReader(path)
        word_sums = {}
        for name in reader.specs:
            reader.check_tensor(name)
            if name.startswith(MODEL_PREFIX):
                word_sums[name] = word_sum(reader.read(name))
            advance(name)
        digest = digest_of_sums(word_sums)
        if digest != meta.parameter_digest:
            yield f"{path / META}: the weights' digest is {digest}, expected {meta.parameter_digest}"
    except ConfigError as error:
        yield str(error)


def _export_problems(path: Path, advance: Advance) -> Iterator[str]:
    """Differences from the recorded checksums of an exported file or folder, if there are any."""
    beside = path.with_name(f"{path.name}.json") if path.is_file() else path / CHECKSUMS
    if not beside.is_file():
        if path.is_dir() and (path / PIPELINE).is_file():
            yield f"{beside} is missing"
        return
    try:
        content = read_json(beside)
        recorded = content.get("files") if path.is_file() else content
        if not isinstance(recorded, dict):
            raise ConfigError(f"{beside} is damaged: it has no table of files")
        _check_text(beside, as_json(content).decode())
        if path.is_file() and content.get(SETTINGS_CRC) != settings_crc(content):
            raise ConfigError(f"{beside} is damaged: its settings differ from their checksum")
    except ConfigError as error:
        yield str(error)
        return
    folder = path.parent if path.is_file() else path
    yield from _compare(folder, recorded, beside.name, advance)
    if path.is_dir():
        yield from _unlisted(path, recorded, CHECKSUMS)


def _unlisted(folder: Path, recorded: Mapping[str, object], listing: str) -> list[str]:
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {listing}
    return [f"{folder / name} is not listed in {listing}" for name in sorted(present - set(recorded))]


def _check_text(path: Path, expected: str) -> None:
    """A list of checksums has no checksum itself, so it must be byte for byte as it is written."""
    if path.read_bytes() != expected.encode():
        raise ConfigError(f"{path} is damaged: it is not as it was written")


def _compare(folder: Path, recorded: Mapping[str, object], listing: str, advance: Advance) -> Iterator[str]:
    for name, entry in sorted(recorded.items()):
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            yield f"{folder / listing} is damaged: it names {name!r}"
        elif not isinstance(entry, list) or len(entry) != 2:
            yield f"{folder / listing} is damaged: {json.dumps(entry)[:80]} for {name}"
        elif not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != entry[0] or crc32c_of(file) != entry[1]:
            yield f"{file} is damaged: size or checksum differ from {listing}"
        advance(name)
