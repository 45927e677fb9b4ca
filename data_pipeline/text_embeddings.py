"""Text embeddings computed before training: file format, reader and writer.

Each shard has a sidecar tar with one member per sample: the embeddings, in bfloat16, of every text that training
may show for it (each caption, and its prefixed forms). ``states.safetensors`` says where each sample's member is,
and which encoder made it. A member is: uint16 number of texts, uint16 number of tokens of each, then the
embeddings, token by token.

Any number of processes write them, one sidecar at a time each, and an interrupted run resumes.
"""

import contextlib
import hashlib
import io
import itertools
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from data_pipeline.captions import parse_captions, texts_of
from data_pipeline.errors import DataError
from data_pipeline.index.format import BLOCK, IS_LABEL, Index, pack_columns, read_sample, unpack_columns
from data_pipeline.storage.base import ObjectInfo, Store

EMBEDDINGS_KEY = "states.safetensors"
VERSION = 1
COLUMNS: dict[str, Any] = {"start": np.uint32, "size": np.uint32, "crc32c": np.uint32}
"""Of a sample's member: first block of its content in the sidecar, bytes, checksum."""
Embeddings = Sequence["np.ndarray[Any, np.dtype[np.uint16]]"]
Encode = Callable[[Sequence[str]], Embeddings]
"""Texts to the embedding (tokens, width) of each, bfloat16 bits."""
READ_SAMPLES = 256
"""Samples read and encoded at a time."""
_WAIT_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEmbeddingIdentity:
    """What embeddings depend on; training refuses those of another identity.

    ``encoder`` is its name, ``revision`` a digest of its weights; ``zero_padding`` and ``max_tokens`` are as in
    the text encoder's settings; ``prefixes`` may stand before captions under ``short_words`` words.
    """

    encoder: str
    revision: str
    width: int
    max_tokens: int
    zero_padding: bool
    prefixes: tuple[str, ...]
    short_words: int
    dtype: str = "bfloat16"

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def pack_embeddings(embeddings: Embeddings) -> bytes:
    """A member from the embedding (tokens, width) of each text, bfloat16 bits."""
    counts = np.asarray([len(embeddings), *map(len, embeddings)], dtype="<u2")
    return counts.tobytes() + b"".join(np.ascontiguousarray(e, dtype="<u2").tobytes() for e in embeddings)


def unpack_embeddings(member: bytes, text: int, width: int) -> "np.ndarray[Any, np.dtype[np.uint16]]":
    """Embedding (tokens, width) of the ``text``-th text of a member."""
    (count,) = np.frombuffer(member, dtype="<u2", count=1)
    if text >= count:
        raise DataError(f"a sample has {count} text embeddings, expected text number {text}; run deco embed again")
    tokens = np.frombuffer(member, dtype="<u2", count=int(count), offset=2).astype(np.int64)
    first = int(tokens[:text].sum()) * width
    values = np.frombuffer(member, dtype="<u2", offset=2 + 2 * int(count))
    if len(values) != int(tokens.sum()) * width:
        raise DataError(f"text embeddings of {len(values)} values, expected {int(tokens.sum())} tokens of {width}")
    return values[first : first + int(tokens[text]) * width].reshape(-1, width)


class TextEmbeddingStore:
    """Reads embeddings of an index's samples; raises :class:`DataError` where they are not those of the index."""

    def __init__(self, store: Store, index: Index, identity: TextEmbeddingIdentity | None = None) -> None:
        self.store = store
        where = f"{store.url}/{EMBEDDINGS_KEY}"
        raw = store.read_all(EMBEDDINGS_KEY)
        if raw is None:
            raise DataError(f"{where} does not exist; make it with: deco embed --config ...")
        self._columns, header = unpack_columns(np.frombuffer(raw, dtype=np.uint8), where, COLUMNS, VERSION)
        if header["index"] != index.whole_digest:
            raise DataError(f"{where} was made for another index of the shards; embed again")
        self.identity = TextEmbeddingIdentity(
            **{**header["identity"], "prefixes": tuple(header["identity"]["prefixes"])}
        )
        if identity is not None and identity != self.identity:
            actual, expected = asdict(self.identity), asdict(identity)
            differ = (f"{n} {actual[n]!r}, expected {expected[n]!r}" for n in actual if actual[n] != expected[n])
            raise DataError(f"{where} does not match the configuration: {', '.join(differ)}")
        self._sidecars = [ObjectInfo(*entry) for entry in header["sidecars"]]
        self.null = np.asarray(header["null"], dtype=np.uint16).reshape(-1, self.identity.width)
        """Embedding (tokens, width) of the empty caption, bfloat16 bits."""

    def span(self, shard: int, rows: Sequence[int]) -> tuple[ObjectInfo, int, int]:
        """Sidecar and bytes that hold the members of neighbouring rows of a shard."""
        (start, _), (last, size) = self._place(rows[0]), self._place(rows[-1])
        return self._sidecars[shard], start, last + size

    def member(self, data: bytes, base: int, row: int) -> bytes | None:
        """Content of a row's member within ``data`` from byte ``base`` on; None where it is damaged."""
        start, size = self._place(row)
        content = data[start - base : start - base + size]
        return content if google_crc32c.value(content) == int(self._columns["crc32c"][row]) else None

    def _place(self, row: int) -> tuple[int, int]:
        """First byte and size of a row's member in its sidecar."""
        return BLOCK * int(self._columns["start"][row]), int(self._columns["size"][row])


def embed(
    data: Store,
    index: Index,
    target: Store,
    encode: Encode,
    identity: TextEmbeddingIdentity,
    *,
    rank: int,
    world: int,
    batch: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Encode the captions of every ``world``-th shard; rank 0 then waits for the others and writes the index.

    ``batch`` texts are encoded at a time. Shards that an earlier run with the same identity finished are not
    done again. Raises :class:`DataError` where a sample differs from the index.
    """
    mine = range(rank, len(index.shards), world)
    for done, number in enumerate(mine, start=1):
        if _finished(target, index, number, identity) is None:
            _embed_shard(data, index, number, target, encode, identity, batch)
        if progress:
            progress(index.shards[number].key, done, len(mine))
    if rank == 0:
        _merge(target, index, identity, encode)


def _embed_shard(
    data: Store,
    index: Index,
    number: int,
    target: Store,
    encode: Encode,
    identity: TextEmbeddingIdentity,
    batch: int,
) -> None:
    rows = index.shard_rows(number)
    columns: dict[str, list[int]] = {name: [] for name in COLUMNS}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "states.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for low in range(rows.start, rows.stop, READ_SAMPLES):
                texts = list(_texts(data, index, number, range(low, min(rows.stop, low + READ_SAMPLES)), identity))
                encoded = _encoded([text for each in texts for text in each], encode, batch)
                for row, each in enumerate(texts, start=low):
                    member = pack_embeddings(list(itertools.islice(encoded, len(each))))
                    info = tarfile.TarInfo(f"{row - rows.start:09d}.states")
                    info.size = len(member)
                    columns["start"].append((tar.offset + BLOCK) // BLOCK)
                    columns["size"].append(len(member))
                    columns["crc32c"].append(google_crc32c.value(member))
                    tar.addfile(info, io.BytesIO(member))
        key = _key(index, number, "states.tar")
        target.write_file(key, path)
    sidecar = target.info(key)
    assert sidecar is not None
    arrays = {name: np.asarray(columns[name], dtype=dtype) for name, dtype in COLUMNS.items()}
    made_of = _made_of(index, number, identity)
    header = {"version": VERSION, "made_of": made_of, "sidecar": [sidecar.size, sidecar.etag]}
    target.write(_key(index, number, "states.rows"), pack_columns(arrays, header))


def _texts(
    data: Store, index: Index, number: int, rows: range, identity: TextEmbeddingIdentity
) -> Iterator[tuple[str, ...]]:
    """All texts that training may show for each row."""
    if not rows:
        return
    shard, fields = index.shards[number], index.header["scan"]["caption_fields"]
    first, last = index.locate(rows[0]), index.locate(rows[-1])
    raw = data.read(shard.key, first.start, last.end - first.start, shard.etag)
    for row in rows:
        location = index.locate(row)
        sample = raw[location.start - first.start : location.end - first.start]
        if google_crc32c.value(sample) != location.crc32c:
            sample = read_sample(data, index, location)
        if index.columns["flags"][row] & IS_LABEL:
            yield ()
            continue
        captions = parse_captions(sample[location.text], is_json=location.is_json, fields=fields)
        yield texts_of(captions, prefixes=identity.prefixes, short_words=identity.short_words)


def _encoded(texts: Sequence[str], encode: Encode, batch: int) -> Iterator[Any]:
    for low in range(0, len(texts), batch):
        part = texts[low : low + batch]
        embeddings = encode(part)
        if len(embeddings) != len(part):
            raise DataError(f"the encoder gave {len(embeddings)} embeddings for {len(part)} texts")
        yield from embeddings


def _finished(target: Store, index: Index, number: int, identity: TextEmbeddingIdentity) -> Any:
    """Columns and sidecar of a shard that is done, or None."""
    key = _key(index, number, "states.rows")
    raw = target.read_all(key)
    if raw is None:
        return None
    # Damaged or of another identity: made again.
    with contextlib.suppress(DataError):
        columns, header = unpack_columns(np.frombuffer(raw, dtype=np.uint8), key, COLUMNS, VERSION)
        if header["made_of"] == _made_of(index, number, identity):
            return columns, ObjectInfo(_key(index, number, "states.tar"), *header["sidecar"])
    return None


def _merge(target: Store, index: Index, identity: TextEmbeddingIdentity, encode: Encode) -> None:
    """Write ``states.safetensors`` once every shard is done."""
    parts = []
    for number in range(len(index.shards)):
        while (part := _finished(target, index, number, identity)) is None:
            # Another process is still encoding it.
            time.sleep(_WAIT_S)
        parts.append(part)
    (null,) = encode([""])
    header = {
        "version": VERSION,
        "index": index.whole_digest,
        "identity": asdict(identity),
        "sidecars": [[s.key, s.size, s.etag] for _, s in parts],
        "null": np.ravel(null).tolist(),
    }
    columns = {name: np.concatenate([columns[name] for columns, _ in parts]) for name in COLUMNS}
    target.write(EMBEDDINGS_KEY, pack_columns(columns, header))


def _made_of(index: Index, number: int, identity: TextEmbeddingIdentity) -> list[Any]:
    """What a shard's embeddings depend on, as JSON keeps it."""
    shard = index.shards[number]
    fields = list(index.header["scan"]["caption_fields"])
    return [shard.key, shard.size, shard.etag, len(index.shard_rows(number)), fields, identity.digest]


def _key(index: Index, number: int, suffix: str) -> str:
    """Key of a shard's ``states.tar`` (its sidecar) or ``states.rows`` (where each member lies, written last)."""
    return f"{index.shards[number].key.removesuffix('.tar')}.{suffix}"
