"""Headers of safetensors files, for writing tensor by tensor and for reading in place.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, little
endian; the header, a JSON object with type, shape and byte range of each tensor; the data without gaps.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

MAX_HEADER_BYTES = 256 * 2**20
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of an element by the format's name of its type."""
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """Type (by the format's name) and shape of a tensor; bytes ``start`` to ``end`` of the file hold it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Header of a file with ``tensors`` (type and shape by name), whose data follow in this order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def parse_header(raw: Any) -> tuple[dict[str, HeaderEntry], dict[str, str]]:
    """Tensors and metadata of a file in memory (bytes, or a NumPy array of them), whose data must have no gaps.

    Raises ``ValueError``, ``KeyError``, ``TypeError`` or ``AttributeError`` for a damaged header.
    """
    size = int.from_bytes(bytes(raw[:8]), "little")
    if len(raw) < 8 or size > min(len(raw) - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {size} bytes in a file of {len(raw)}")
    header = json.loads(bytes(raw[8 : 8 + size]))
    metadata = header.pop("__metadata__", {})
    entries: dict[str, HeaderEntry] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if first != end or last - first != prod(shape) * ITEM_BYTES[entry["dtype"]] or min(shape, default=0) < 0:
            raise ValueError(f"{name} of shape {shape} lies at bytes {first} to {last}, expected from {end} on")
        entries[name] = HeaderEntry(entry["dtype"], shape, 8 + size + first, 8 + size + last)
        end = last
    if end != len(raw) - 8 - size:
        raise ValueError(f"{len(raw) - 8 - size} bytes of data, the header has {end}")
    return entries, metadata
