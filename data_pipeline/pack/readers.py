"""What is packed: folders of images, parquet files or tar shards, read as one stream of samples.

Nothing is unpacked to disk, and no URL is fetched. What cannot be trained on is listed by name.
"""

import bisect
import contextlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.captions import MAX_TEXT_BYTES, WEIGHTS_FIELD, json_object, parse_captions, parse_label
from data_pipeline.decode import DecodeError, image_size
from data_pipeline.errors import DataError, Reject
from data_pipeline.index import build
from data_pipeline.index.build import IMAGE_SUFFIXES, MAX_SAMPLE_BYTES, TEXT_SUFFIXES, ShardFile
from data_pipeline.storage.base import Store, open_store
from data_pipeline.stream.sampler import generator

IMAGE_COLUMNS = ("image", "jpg", "png", "image_bytes", "image_path", "path")
CAPTION_FIELDS = ("captions", "caption", "text", "txt", "long_caption", "short_caption")
"""Fields of a ``.json`` and columns of a parquet file whose texts are a sample's captions."""
URL_COLUMNS = ("url", "image_url", "URL")
MAX_FIELD_CHARS = 4096
"""Longer strings beside the captions (EXIF dumps, web pages) are not kept."""
_OTHER_IMAGE_SUFFIXES = ("bmp", "tif", "tiff", "avif", "heic", "jxl", "jp2")
_ROWS = 64
_ORDER_KEY = 9


@dataclass(frozen=True, slots=True)
class PackedSample:
    """Encoded image, captions or a class number, and scalars that came with them; ``name`` is for messages."""

    name: str
    image: bytes
    suffix: str
    captions: list[str]
    fields: dict[str, Any] = field(default_factory=dict)
    label: int | None = None

    def texts(self) -> dict[str, bytes]:
        """Members beside the image, by suffix: ``.txt`` for a bare caption, ``.json`` for more, ``.cls``."""
        members: dict[str, bytes] = {}
        if len(self.captions) == 1 and not self.fields:
            members["txt"] = self.captions[0].encode()
        elif self.captions or self.fields:
            entries = ({"captions": self.captions} if self.captions else {}) | self.fields
            members["json"] = json.dumps(entries, ensure_ascii=False, allow_nan=False).encode()
        if self.label is not None:
            members["cls"] = str(self.label).encode()
        return members


def make_sample(
    name: str, image: bytes, *, entries: Mapping[str, Any], text: bytes | None, label: bytes | None
) -> PackedSample:
    """Sample of an image, a JSON object or row, a ``.txt`` and a ``.cls``; raises :class:`DecodeError`."""
    image_size(image)
    captions, weights = _captions(entries, text)
    number = None if label is None else parse_label(label)
    if not captions and number is None:
        raise DecodeError("no_caption", "no caption")
    fields = {key: value for key, value in entries.items() if _is_kept(key, value)}
    if len(set(weights)) > 1:
        fields[WEIGHTS_FIELD] = weights
    sample = PackedSample(name, image, _image_suffix(image), captions, fields, number)
    for suffix, raw in sample.texts().items():
        # As the index will read it: a text beyond its limits is better left out here, by name.
        if captions and suffix != "cls":
            parse_captions(raw, is_json=suffix == "json")
    return sample


def _captions(entries: Mapping[str, Any], text: bytes | None) -> tuple[list[str], list[float]]:
    """All captions, each once; where ``captions`` have weights, only those."""
    weights: dict[str, float] = {}
    if text is not None and text.strip():
        weights[parse_captions(text, is_json=False).texts[0]] = 1.0
    for name in CAPTION_FIELDS:
        value = entries.get(name)
        if not isinstance(value, str | list) or not value or (isinstance(value, str) and not value.strip()):
            continue
        raw: dict[str, Any] = {"captions": value}
        if name == "captions" and entries.get(WEIGHTS_FIELD) is not None:
            raw[WEIGHTS_FIELD] = entries[WEIGHTS_FIELD]
        try:
            parsed = parse_captions(json.dumps(raw).encode(), is_json=True)
        # A parquet column may hold what JSON has no word for.
        except (TypeError, RecursionError) as error:
            raise DecodeError("bad_caption", f"{name}: {error}") from error
        if len(set(parsed.weights)) > 1:
            return list(parsed.texts), list(parsed.weights)
        for caption in parsed.texts:
            weights.setdefault(caption, 1.0)
    return list(weights), list(weights.values())


def _is_kept(key: str, value: Any) -> bool:
    """Numbers, flags and short strings, as far as JSON and UTF-8 hold them."""
    if key in (*CAPTION_FIELDS, WEIGHTS_FIELD) or not isinstance(value, str | bool | int | float):
        return False
    if isinstance(value, str) and len(value) > MAX_FIELD_CHARS:
        return False
    try:
        return bool(json.dumps({key: value}, ensure_ascii=False, allow_nan=False).encode())
    # Infinite, or half of a surrogate pair.
    except ValueError:
        return False


def _image_suffix(image: bytes) -> str:
    """By content: files are often named for another format than theirs."""
    suffixes = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"GIF8": "gif"}
    return next((suffix for start, suffix in suffixes.items() if image.startswith(start)), "webp")


def read_source(
    source: str, rejects: list[Reject], opened: Callable[[str], Store] = open_store, *, workers: int = 1
) -> Iterator[PackedSample]:
    """Samples of a folder, a parquet or tar file, or of the tar shards below an ``s3://`` URL.

    A folder is read as what the first tar or image in it says, else as a folder of parquet files: img2dataset
    writes parquet files with numbers beside its tars and images. What cannot be packed is added to ``rejects``.
    Raises :class:`DataError` if there is nothing to read.
    """
    if source.startswith("s3://"):
        return read_tars(opened(source), rejects)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix == ".tar":
            return read_tars(open_store(str(path.parent)), rejects, only=path.name)
        return read_parquet(path, rejects)
    if not path.is_dir():
        raise DataError(f"{source}: no such folder or file")
    kind = next((s for s in map(_suffix, _files(path)) if s == "tar" or s in IMAGE_SUFFIXES), None)
    if kind == "tar":
        return read_tars(open_store(str(path)), rejects)
    if kind is not None:
        return read_folder(path, rejects, workers=workers)
    tables = [file for file in _files(path) if file.suffix == ".parquet"]
    if not tables:
        raise DataError(f"{path}: has no images, parquet files or tar shards")
    return itertools.chain.from_iterable(read_parquet(table, rejects, root=path) for table in tables)


def read_folder(folder: Path, rejects: list[Reject], *, workers: int = 1) -> Iterator[PackedSample]:
    """Images below ``folder`` in the order of their names, with the texts beside them; read by threads."""

    def read(path: Path) -> PackedSample:
        texts = {}
        for suffix in TEXT_SUFFIXES:
            with contextlib.suppress(FileNotFoundError), path.with_suffix(f".{suffix}").open("rb") as file:
                texts[suffix] = file.read(MAX_TEXT_BYTES + 1)
                if len(texts[suffix]) > MAX_TEXT_BYTES:
                    raise DecodeError("too_large", f"over {MAX_TEXT_BYTES} bytes of text")
        if not texts:
            raise DecodeError("no_caption", "no .txt or .json beside it")
        return _from_members(str(path), path.read_bytes(), texts)

    return read_images(read, image_files(folder), rejects, workers=workers)


def class_names(root: Path, rejects: list[Reject]) -> list[str]:
    """Sorted names of the folders in ``root``; hidden folders, and files beside them, are added to ``rejects``.

    Raises :class:`DataError` where there is none, or one without images, which would shift the numbers behind it.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; classes are folders on a local disk")
    names = []
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            rejects.append(Reject(str(path), "hidden"))
        elif path.is_dir():
            names.append(path.name)
        else:
            rejects.append(Reject(str(path), "lies in no class's folder"))
    if not names:
        raise DataError(f"{root}: has no folders; one folder per class is needed")
    for name in names:
        if not name.isprintable():
            raise DataError(f"{root}: {name!r} cannot be the name of a class")
        if next(image_files(root / name), None) is None:
            raise DataError(f"{root / name}: has no images; remove it, or it would count as a class")
    return names


def read_class_folders(
    root: Path, names: Sequence[str], rejects: list[Reject], *, workers: int = 1
) -> Iterator[PackedSample]:
    """Images of all classes, labelled by place in ``names`` (sorted), in an order that depends on names alone.

    They are mixed, since a run reads neighbours together: sorted, a batch would hold few classes.
    """
    images = [path for name in names for path in image_files(root / name)]
    order = generator(0, _ORDER_KEY).permutation(len(images))

    def labelled(path: Path) -> PackedSample:
        number = bisect.bisect_left(names, path.relative_to(root).parts[0])
        return make_sample(str(path), path.read_bytes(), entries={}, text=None, label=str(number).encode())

    return read_images(labelled, (images[i] for i in order), rejects, workers=workers)


def image_files(folder: Path) -> Iterator[Path]:
    """Files below ``folder`` with the suffix of an image, also of formats that are not read."""
    return (path for path in _files(folder) if _suffix(path) in IMAGE_SUFFIXES + _OTHER_IMAGE_SUFFIXES)


def read_images(
    read: Callable[[Path], PackedSample], images: Iterable[Path], rejects: list[Reject], *, workers: int
) -> Iterator[PackedSample]:
    """``read`` of each image, in order, computed ahead by threads; failures are added to ``rejects``."""

    def attempt(path: Path) -> PackedSample | Reject:
        if _suffix(path) in _OTHER_IMAGE_SUFFIXES:
            return Reject(str(path), f"{path.suffix} is not among {', '.join(IMAGE_SUFFIXES)}")
        try:
            if path.stat().st_size > MAX_SAMPLE_BYTES:
                return Reject(str(path), f"{path.stat().st_size} bytes are over {MAX_SAMPLE_BYTES}")
            return read(path)
        except (OSError, DecodeError) as error:
            return Reject(str(path), str(getattr(error, "strerror", error)))

    def results(pool: Executor) -> Iterator[PackedSample | Reject]:
        pending: deque[Future[PackedSample | Reject]] = deque()
        for path in images:
            pending.append(pool.submit(attempt, path))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)

    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        for result in results(pool):
            if isinstance(result, Reject):
                rejects.append(result)
            else:
                yield result


def _from_members(name: str, image: bytes, texts: Mapping[str, bytes]) -> PackedSample:
    entries = json_object(texts["json"]) if "json" in texts else {}
    return make_sample(name, image, entries=entries, text=texts.get("txt"), label=texts.get("cls"))


def read_tars(store: Store, rejects: list[Reject], *, only: str | None = None) -> Iterator[PackedSample]:
    """Samples of all ``.tar`` objects, or of ``only`` one, as :mod:`data_pipeline.index.build` finds them."""
    for shard in store.list():
        if not shard.key.endswith(".tar") or only not in (None, shard.key):
            continue
        file = ShardFile(store, shard)
        for key, members, _ in build.shard_samples(file, rejects):
            name = f"{shard.key}: {key}"
            try:
                image = build.image_member(members)
                texts = {s: members[s] for s in TEXT_SUFFIXES if s in members}
                sizes = [image.size, *(member.size for member in texts.values())]
                if sum(sizes) > MAX_SAMPLE_BYTES or max(sizes[1:], default=0) > MAX_TEXT_BYTES:
                    raise DecodeError("too_large", f"members of {sizes} bytes")
                contents = {suffix: file.content(member) for suffix, member in texts.items()}
                sample = _from_members(name, file.content(image), contents)
            except DecodeError as error:
                rejects.append(Reject(name, str(error)))
                continue
            yield sample


def read_parquet(file: Path, rejects: list[Reject], *, root: Path | None = None) -> Iterator[PackedSample]:
    """Rows of a parquet file with images as bytes, or as paths to files below ``root`` (default: its folder)."""
    try:
        import pyarrow.parquet as parquet
        from pyarrow.lib import ArrowException
    except ImportError as error:
        raise DataError("parquet files need: pip install 'deco-scale[parquet]'") from error
    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            image_column, columns = _columns(file, table.schema_arrow)
            for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
                for entry in batch.to_pylist():
                    name = f"{file}: row {row}"
                    row += 1
                    try:
                        image = _parquet_image(entry.pop(image_column), file.parent, root or file.parent)
                        yield make_sample(name, image, entries=entry, text=None, label=None)
                    except DecodeError as error:
                        rejects.append(Reject(name, str(error)))
    except (ArrowException, ValueError, OSError, OverflowError) as error:
        rejects.append(Reject(str(file), f"after row {row}: {' '.join(str(error).split())}"))


def _columns(file: Path, schema: Any) -> tuple[str, list[str]]:
    """The image's column, and all that are read."""
    from pyarrow import types

    names = schema.names
    image = next((n for n in IMAGE_COLUMNS if n in names), None)
    captions = [n for n in CAPTION_FIELDS if n in names]
    if image is None and any(n in names for n in URL_COLUMNS):
        raise DataError(f"{file}: names its images by URL; download them first, for example with img2dataset")
    if image is None or not captions:
        raise DataError(
            f"{file}: needs one of the columns {IMAGE_COLUMNS} and one of {CAPTION_FIELDS}, has {names}"
        )
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    scalars = [n for n in names if any(test(schema.field(n).type) for test in tests)]
    weights = [n for n in names if n == WEIGHTS_FIELD]
    return image, list(dict.fromkeys([image, *captions, *weights, *scalars]))


def _parquet_image(value: Any, folder: Path, root: Path) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise DecodeError("no_image", f"the image is {type(value).__name__}, not bytes or a path")
    path = Path(os.path.normpath(folder / value))
    if not path.is_relative_to(os.path.normpath(root)):
        raise DecodeError("no_image", f"{value} lies outside of {root}")
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise DecodeError("no_image", f"{value}: {error}") from error


def _suffix(path: Path) -> str:
    return path.suffix.lower().lstrip(".")


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, in the order of their names; folders behind links are not entered."""
    # The listing says what each is: on a network file system asking takes longer than listing.
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)
