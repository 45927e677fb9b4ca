"""Text embeddings computed before training: file format, reader and writer.

Each shard has a sidecar tar with one member per sample: the embeddings, in bfloat16, of every text that training
may show for it (each caption, and its prefixed forms). ``states.safetensors`` says where each sample's member is,
and which encoder made it. A member is: uint16 number of texts, uint16 number of tokens of each, then the
embeddings, token by token. Any number of processes write sidecars, and an interrupted run resumes.
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
from data_pipeline.index.format import BLOCK, Index, pack_columns, read_sample, unpack_columns
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


@dataclass(frozen=True, slots=True)
class Embedder:
    """Encodes the captions of an index of ``data``, ``batch`` at a time, and writes sidecars to ``target``."""

    data: Store
    index: Index
    target: Store
    encode: Encode
    identity: TextEmbeddingIdentity
    batch: int

    def run(self, *, rank: int, world: int, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Encode every ``world``-th shard; rank 0 then waits for the others and writes the index.

        Shards that an earlier run with the same identity finished are not done again. Raises :class:`DataError`
        where a sample differs from the index.
        """
        mine = range(rank, len(self.index.shards), world)
        for done, number in enumerate(mine, start=1):
            if self._finished(number) is None:
                self._embed_shard(number)
            if progress:
                progress(self.index.shards[number].key, done, len(mine))
        if rank == 0:
            self._merge()

    def _embed_shard(self, number: int) -> None:
        rows = self.index.shard_rows(number)
        places: list[tuple[int, int, int]] = []
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "states.tar"
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for low in range(rows.start, rows.stop, READ_SAMPLES):
                    texts = list(self._texts(number, range(low, min(rows.stop, low + READ_SAMPLES))))
                    encoded = self._encoded([text for each in texts for text in each])
                    for row, each in enumerate(texts, start=low):
                        member = pack_embeddings(list(itertools.islice(encoded, len(each))))
                        info = tarfile.TarInfo(f"{row - rows.start:09d}.states")
                        info.size = len(member)
                        places.append((tar.offset // BLOCK + 1, len(member), google_crc32c.value(member)))
                        tar.addfile(info, io.BytesIO(member))
            self.target.write_file(self._key(number, "states.tar"), path)
        sidecar = self.target.info(self._key(number, "states.tar"))
        assert sidecar is not None
        values = np.asarray(places, dtype=np.uint32).reshape(-1, len(COLUMNS)).T
        made_of = self._made_of(number)
        header = {"version": VERSION, "made_of": made_of, "sidecar": [sidecar.size, sidecar.etag]}
        columns = pack_columns(dict(zip(COLUMNS, values, strict=True)), header)
        self.target.write(self._key(number, "states.rows"), columns)

    def _texts(self, number: int, rows: range) -> Iterator[tuple[str, ...]]:
        """All texts that training may show for each row."""
        index = self.index
        shard, fields = index.shards[number], index.header["scan"]["caption_fields"]
        first, last = index.locate(rows[0]), index.locate(rows[-1])
        raw = self.data.read(shard.key, first.start, last.end - first.start, shard.etag)
        for row in rows:
            location = index.locate(row)
            sample = raw[location.start - first.start : location.end - first.start]
            if google_crc32c.value(sample) != location.crc32c:
                sample = read_sample(self.data, index, location)
            if location.is_label:
                yield ()
                continue
            captions = parse_captions(sample[location.text], is_json=location.is_json, fields=fields)
            yield texts_of(captions, prefixes=self.identity.prefixes, short_words=self.identity.short_words)

    def _encoded(self, texts: Sequence[str]) -> Iterator[Any]:
        for low in range(0, len(texts), self.batch):
            part = texts[low : low + self.batch]
            embeddings = self.encode(part)
            if len(embeddings) != len(part):
                raise DataError(f"the encoder gave {len(embeddings)} embeddings for {len(part)} texts")
            yield from embeddings

    def _finished(self, number: int) -> Any:
        """Columns and sidecar of a shard that is done, or None."""
        key = self._key(number, "states.rows")
        raw = self.target.read_all(key)
        # Damaged or of another identity: made again.
        with contextlib.suppress(DataError):
            columns, header = unpack_columns(np.frombuffer(raw or b"", dtype=np.uint8), key, COLUMNS, VERSION)
            if header["made_of"] == self._made_of(number):
                return columns, ObjectInfo(self._key(number, "states.tar"), *header["sidecar"])
        return None

    def _merge(self) -> None:
        """Write ``states.safetensors`` once every shard is done."""
        parts = []
        for number in range(len(self.index.shards)):
            while (part := self._finished(number)) is None:
                # Another process is still encoding it.
                time.sleep(_WAIT_S)
            parts.append(part)
        (null,) = self.encode([""])
        header = {
            "version": VERSION,
            "index": self.index.whole_digest,
            "identity": asdict(self.identity),
            "sidecars": [[s.key, s.size, s.etag] for _, s in parts],
            "null": np.ravel(null).tolist(),
        }
        columns = {name: np.concatenate([columns[name] for columns, _ in parts]) for name in COLUMNS}
        self.target.write(EMBEDDINGS_KEY, pack_columns(columns, header))

    def _made_of(self, number: int) -> list[Any]:
        """What a shard's embeddings depend on, as JSON keeps it."""
        shard, rows = self.index.shards[number], len(self.index.shard_rows(number))
        fields = list(self.index.header["scan"]["caption_fields"])
        return [shard.key, shard.size, shard.etag, rows, fields, self.identity.digest]

    def _key(self, number: int, suffix: str) -> str:
        """Of a shard's ``states.tar`` (its sidecar) or ``states.rows`` (where each member lies, written last)."""
        return f"{self.index.shards[number].key.removesuffix('.tar')}.{suffix}"
