"""Text states computed before training: which object they are in, and reading them.

Beside each shard's samples lies a sidecar tar with one member a sample: the states, in bfloat16, of every text
that training may show for it (each caption, and its prefixed forms where prefixes are used), only as many
tokens as were encoded. ``states.safetensors`` says where each sample's member is, and by what encoder it was made.

A member is: uint16 number of texts, uint16 number of tokens of each, then bfloat16 states, token by token.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import google_crc32c
import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.index import BLOCK, Index, pack_columns, unpack_columns
from data_pipeline.store import ObjectInfo, Store

STATES_KEY = "states.safetensors"
VERSION = 1
COLUMNS: dict[str, Any] = {"start": np.uint32, "size": np.uint32, "crc32c": np.uint32}
"""Of a sample's member: first block of its content in the sidecar, bytes, checksum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatesIdentity:
    """What states depend on; training refuses those of another identity.

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


def pack_states(states: Sequence["np.ndarray[Any, np.dtype[np.uint16]]"]) -> bytes:
    """A member from the states (tokens, width) of each text, bfloat16 bits."""
    counts = np.asarray([len(states), *(len(s) for s in states)], dtype="<u2")
    return counts.tobytes() + b"".join(np.ascontiguousarray(s, dtype="<u2").tobytes() for s in states)


def unpack_states(member: bytes, text: int, width: int) -> "np.ndarray[Any, np.dtype[np.uint16]]":
    """States (tokens, width) of the ``text``-th text of a member."""
    (count,) = np.frombuffer(member, dtype="<u2", count=1)
    if text >= count:
        raise DataError(f"text states hold {count} texts, wanted number {text}: embed again")
    tokens = np.frombuffer(member, dtype="<u2", count=int(count), offset=2).astype(np.int64)
    first = int(tokens[:text].sum()) * width
    states = np.frombuffer(member, dtype="<u2", offset=2 + 2 * int(count))
    if len(states) != int(tokens.sum()) * width:
        raise DataError(f"text states of {len(states)} values, wanted {int(tokens.sum())} tokens of {width}")
    return states[first : first + int(tokens[text]) * width].reshape(-1, width)


class TextStates:
    """Reads states of an index's samples; raises :class:`DataError` where they are not those of the index."""

    def __init__(self, store: Store, index: Index, identity: StatesIdentity | None = None) -> None:
        self.store = store
        where = f"{store.url}/{STATES_KEY}"
        raw = store.read_all(STATES_KEY)
        if raw is None:
            raise DataError(f"{where} is not there; make it with: deco embed --config ...")
        columns, header = unpack_columns(np.frombuffer(raw, dtype=np.uint8), where, COLUMNS, VERSION)
        if header["index"] != index.whole_digest:
            raise DataError(f"{where} was made for another index of the shards; embed again")
        self.identity = StatesIdentity(**{**header["identity"], "prefixes": tuple(header["identity"]["prefixes"])})
        if identity is not None and identity != self.identity:
            differ = [n for n, v in asdict(identity).items() if v != getattr(self.identity, n)]
            raise DataError(
                f"{where} was made otherwise than the configuration says: "
                + ", ".join(f"{n} {getattr(self.identity, n)!r}, wanted {getattr(identity, n)!r}" for n in differ)
            )
        self._columns = columns
        self._sidecars = [ObjectInfo(*entry) for entry in header["sidecars"]]
        self._null = np.asarray(header["null"], dtype=np.uint16)

    @property
    def null(self) -> "np.ndarray[Any, np.dtype[np.uint16]]":
        """States (tokens, width) of the empty caption, bfloat16 bits."""
        return self._null.reshape(-1, self.identity.width)

    def span(self, shard: int, rows: Sequence[int]) -> tuple[ObjectInfo, int, int]:
        """Sidecar and bytes that hold the members of neighbouring rows of a shard."""
        columns = self._columns
        start = BLOCK * int(columns["start"][rows[0]])
        end = BLOCK * int(columns["start"][rows[-1]]) + int(columns["size"][rows[-1]])
        return self._sidecars[shard], start, end

    def member(self, data: bytes, base: int, row: int) -> bytes | None:
        """Content of a row's member within ``data`` from byte ``base`` on; None where it is damaged."""
        start = BLOCK * int(self._columns["start"][row]) - base
        content = data[start : start + int(self._columns["size"][row])]
        return content if google_crc32c.value(content) == int(self._columns["crc32c"][row]) else None


def save_states(
    store: Store,
    columns: Mapping[str, Any],
    *,
    index: Index,
    identity: StatesIdentity,
    sidecars: Sequence[ObjectInfo],
    null: "np.ndarray[Any, np.dtype[np.uint16]]",
) -> None:
    """Write ``states.safetensors``, after all sidecars."""
    header = {
        "version": VERSION,
        "index": index.whole_digest,
        "identity": asdict(identity),
        "sidecars": [[s.key, s.size, s.etag] for s in sidecars],
        "null": null.ravel().tolist(),
    }
    store.write(STATES_KEY, pack_columns({n: np.asarray(columns[n], dtype=t) for n, t in COLUMNS.items()}, header))
