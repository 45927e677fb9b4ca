"""Writing text states before training: one sidecar tar a shard, by any number of processes, resumable.

The encoder is a callable; this module knows nothing of it but its identity.
"""

import contextlib
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from data_pipeline.captions import parse_captions, texts_of
from data_pipeline.errors import DataError
from data_pipeline.index import BLOCK, IS_LABEL, Index, pack_columns, unpack_columns
from data_pipeline.states import COLUMNS, VERSION, StatesIdentity, pack_states, save_states
from data_pipeline.store import ObjectInfo, Store

States = Sequence["np.ndarray[Any, np.dtype[np.uint16]]"]
Encode = Callable[[Sequence[str]], States]
"""Texts to states (tokens, width) of each, bfloat16 bits."""
READ_SAMPLES = 256
"""Samples read and encoded at a time."""
_WAIT_S = 2.0


def embed(
    data: Store,
    index: Index,
    target: Store,
    encode: Encode,
    identity: StatesIdentity,
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
    data: Store, index: Index, number: int, target: Store, encode: Encode, identity: StatesIdentity, batch: int
) -> None:
    rows = range(int(index.ends[number - 1]) if number else 0, int(index.ends[number]))
    columns: dict[str, list[int]] = {name: [] for name in COLUMNS}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "states.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for low in range(rows.start, rows.stop, READ_SAMPLES):
                texts = list(_texts(data, index, number, range(low, min(rows.stop, low + READ_SAMPLES)), identity))
                states = list(_encoded([text for each in texts for text in each], encode, batch))
                for row, each in enumerate(texts, start=low):
                    member, states = pack_states(states[: len(each)]), states[len(each) :]
                    info = tarfile.TarInfo(f"{row - rows.start:09d}.states")
                    info.size = len(member)
                    columns["start"].append((tar.offset + BLOCK) // BLOCK)
                    columns["size"].append(len(member))
                    columns["crc32c"].append(google_crc32c.value(member))
                    tar.addfile(info, io.BytesIO(member))
        key = _sidecar_key(index, number)
        target.write_file(key, path)
    sidecar = target.info(key)
    assert sidecar is not None
    arrays = {name: np.asarray(columns[name], dtype=dtype) for name, dtype in COLUMNS.items()}
    header = {
        "version": VERSION,
        "made_of": _made_of(index, number, identity),
        "sidecar": [sidecar.size, sidecar.etag],
    }
    # Last, so that a sidecar with rows is a whole one.
    target.write(_rows_key(index, number), pack_columns(arrays, header))


def _texts(
    data: Store, index: Index, number: int, rows: range, identity: StatesIdentity
) -> Iterator[tuple[str, ...]]:
    """All texts that training may show for each row."""
    if not rows:
        return
    shard, fields = index.shards[number], index.header["scan"]["caption_fields"]
    first, last = index.locate(rows[0]), index.locate(rows[-1])
    raw = data.read(shard.key, first.start, last.end - first.start, shard.etag)
    for row in rows:
        place = index.locate(row)
        sample = raw[place.start - first.start : place.end - first.start]
        if google_crc32c.value(sample) != place.crc32c:
            sample = data.read(shard.key, place.start, place.end - place.start, shard.etag)
            if google_crc32c.value(sample) != place.crc32c:
                raise DataError(f"{data.url}/{shard.key}: bytes {place.start}-{place.end} differ from the index")
        if index.columns["flags"][row] & IS_LABEL:
            yield ()
            continue
        captions = parse_captions(sample[place.text], is_json=place.is_json, fields=fields)
        yield texts_of(captions, prefixes=identity.prefixes, short_words=identity.short_words)


def _encoded(texts: Sequence[str], encode: Encode, batch: int) -> Iterator[Any]:
    for low in range(0, len(texts), batch):
        part = texts[low : low + batch]
        states = encode(part)
        if len(states) != len(part):
            raise DataError(f"the encoder gave {len(states)} states for {len(part)} texts")
        yield from states


def _finished(target: Store, index: Index, number: int, identity: StatesIdentity) -> Any:
    """Columns and sidecar of a shard that is done, or None."""
    key = _rows_key(index, number)
    raw = target.read_all(key)
    if raw is None:
        return None
    # Damaged or of another identity: made again.
    with contextlib.suppress(DataError):
        columns, header = unpack_columns(np.frombuffer(raw, dtype=np.uint8), key, COLUMNS, VERSION)
        if header["made_of"] == _made_of(index, number, identity):
            return columns, ObjectInfo(_sidecar_key(index, number), *header["sidecar"])
    return None


def _merge(target: Store, index: Index, identity: StatesIdentity, encode: Encode) -> None:
    parts = []
    for number in range(len(index.shards)):
        while (part := _finished(target, index, number, identity)) is None:
            # Another process has it in hand.
            time.sleep(_WAIT_S)
        parts.append(part)
    columns = {name: np.concatenate([part[0][name] for part in parts]) for name in COLUMNS}
    (null,) = encode([""])
    save_states(target, columns, index=index, identity=identity, sidecars=[part[1] for part in parts], null=null)


def _made_of(index: Index, number: int, identity: StatesIdentity) -> list[Any]:
    shard = index.shards[number]
    rows = int(index.ends[number]) - (int(index.ends[number - 1]) if number else 0)
    fields = index.header["scan"]["caption_fields"]
    return [shard.key, shard.size, shard.etag, rows, list(fields), identity.digest]


def _sidecar_key(index: Index, number: int) -> str:
    return index.shards[number].key.removesuffix(".tar") + ".states.tar"


def _rows_key(index: Index, number: int) -> str:
    return index.shards[number].key.removesuffix(".tar") + ".states.rows"
