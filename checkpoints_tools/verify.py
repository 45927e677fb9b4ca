"""Verifying a checkpoint: checksums, index and sizes, and the weights' digest."""

from collections.abc import Iterator
from pathlib import Path

from checkpoints_tools.base import Advance
from checkpoints_tools.formats.canonical import CanonicalReader
from checkpoints_tools.formats.tensor_files import CHECKSUMS, SETTINGS_CRC, as_json, read_json, settings_crc
from checkpoints_tools.formats.torch_zip import check_record_crcs
from checkpoints_tools.registry import PIPELINE, open_checkpoint
from deco_scale.checkpoint.format import (
    COMPLETE,
    META,
    find_checkpoint,
    parse_checksums,
    read_checksums,
    read_meta,
)
from deco_scale.checkpoint.integrity import MODEL_PREFIX, FileChecksums, check_file, digest_of_sums, word_sum
from deco_scale.errors import ConfigError


def problems_of(path: Path, *, advance: Advance = lambda name: None) -> Iterator[str]:
    """Everything that is wrong, as text naming the file or tensor; nothing if all is well."""
    listing = _listing(path)
    if listing.is_file():
        problems = list(_file_problems(path, listing, advance))
    else:
        problems = [f"{listing} is missing"] if path.is_dir() and (path / PIPELINE).is_file() else []
    yield from problems
    if problems:
        return
    try:
        if listing.name == COMPLETE:
            yield from _digest_problems(listing.parent, advance)
            return
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
    return _listing(path).is_file()


def _listing(path: Path) -> Path:
    """Where the checksums of a checkpoint's files are listed, if they are."""
    if path.is_file():
        return path.with_name(f"{path.name}.json")
    checkpoint = find_checkpoint(path)
    return path / CHECKSUMS if checkpoint is None else checkpoint / COMPLETE


def _file_problems(path: Path, listing: Path, advance: Advance) -> Iterator[str]:
    """Differences from the listed checksums, and files that are not listed."""
    try:
        recorded = read_checksums(listing.parent) if listing.name == COMPLETE else _exported(path, listing)
    except ConfigError as error:
        yield str(error)
        return
    folder = listing.parent
    for name, (size, crc) in sorted(recorded.items()):
        try:
            check_file(folder / name, size, crc, listing=listing.name)
        except ConfigError as error:
            yield str(error)
        advance(name)
    if path.is_dir():
        present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {listing.name}
        yield from (f"{folder / name} is not listed in {listing.name}" for name in sorted(present - set(recorded)))


def _exported(path: Path, listing: Path) -> FileChecksums:
    """The checksums beside an exported file or in an exported folder.

    A listing has no checksum itself, so it must be byte for byte as it is written.
    """
    content = read_json(listing)
    recorded = parse_checksums(content.get("files") if path.is_file() else content, listing)
    if listing.read_bytes() != as_json(content):
        raise ConfigError(f"{listing} is damaged: it is not as it was written")
    if path.is_file() and content.get(SETTINGS_CRC) != settings_crc(content):
        raise ConfigError(f"{listing} is damaged: its settings differ from their checksum")
    return recorded


def _digest_problems(path: Path, advance: Advance) -> Iterator[str]:
    """Headers that differ from the index, and weights of another digest, in a canonical folder."""
    meta, reader, word_sums = read_meta(path), CanonicalReader(path), {}
    for name in reader.specs:
        reader.check_tensor(name)
        if name.startswith(MODEL_PREFIX):
            word_sums[name] = word_sum(reader.read(name))
        advance(name)
    digest = digest_of_sums(word_sums)
    if digest != meta.parameter_digest:
        yield f"{path / META}: the weights' digest is {digest}, expected {meta.parameter_digest}"
