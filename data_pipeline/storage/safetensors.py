"""Headers of safetensors files, for writing tensor by tensor.

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
