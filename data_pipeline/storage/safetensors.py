"""Safetensors files: headers for writing tensor by tensor, columns for reading in place.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, little
endian; the header, a JSON object with type, shape and byte range of each tensor; the data without gaps.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of an element by the format's name of its type."""
_ALIGNMENT = 8
MAX_HEADER_BYTES = 256 * 2**20


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


def views(raw: Any, types: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Columns in place, and metadata, of a file in memory (uint8 array); the library's own reader copies.

    ``types`` are NumPy's by the format's names. Raises ``ValueError``, ``KeyError``, ``TypeError`` or
    ``AttributeError`` for a damaged header, gaps, or a tensor that is no column.
    """
    size = int.from_bytes(bytes(raw[:8]), "little")
    if len(raw) < 8 or size > min(len(raw) - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {size} bytes in a file of {len(raw)}")
    header, data = json.loads(bytes(raw[8 : 8 + size])), raw[8 + size :]
    metadata, end, arrays = header.pop("__metadata__", {}), 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        arrays[name] = data[first:last].view(types[entry["dtype"]])
        if first != end or last - first != arrays[name].nbytes or entry["shape"] != [len(arrays[name])]:
            raise ValueError(
                f"{name} of shape {entry['shape']} lies at bytes {first} to {last}, not from {end} on"
            )
        end = last
    if end != len(data):
        raise ValueError(f"{len(data)} bytes of data, the header has {end}")
    return arrays, metadata
