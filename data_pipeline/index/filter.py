"""Rows of an index that the filters keep."""

from typing import Any, Literal

import numpy as np

from data_pipeline.config import Filters
from data_pipeline.errors import DataError
from data_pipeline.index.format import IS_LABEL, SCORE, Index

_SLICE = 4 * 2**20


def select(index: Index, filters: Filters, *, target: Literal["caption", "label"], min_side: int) -> Index:
    """Samples with the target and enough pixels that pass the filters; DataError for a score not indexed."""
    for name in filters.min_scores:
        if name not in index.score_names:
            raise DataError(
                f"data.filters.min_scores.{name}: the index has scores {index.score_names}; "
                f"index with --score {name}"
            )
    rows = [
        low + np.flatnonzero(_keep(index, slice(low, low + _SLICE), filters, target, min_side))
        for low in range(0, len(index.columns["start"]), _SLICE)
    ]
    return index.only(np.concatenate(rows))


def _keep(index: Index, rows: slice, filters: Filters, target: str, min_side: int) -> Any:
    columns = {name: column[rows] for name, column in index.columns.items()}
    height, width = columns["height"].astype(np.int64), columns["width"].astype(np.int64)
    short, long = np.minimum(height, width), np.maximum(height, width)
    chars = columns["caption_chars"]
    keep = (short >= max(min_side, filters.min_side)) & (short > 0)
    keep &= ((columns["flags"] & IS_LABEL) != 0) == (target == "label")
    keep &= chars >= filters.min_caption_chars
    if filters.max_pixels is not None:
        keep &= height * width <= filters.max_pixels
    if filters.max_aspect is not None:
        keep &= long <= filters.max_aspect * short
    if filters.max_caption_chars is not None:
        keep &= chars <= filters.max_caption_chars
    for name, minimum in filters.min_scores.items():
        keep &= columns[SCORE + name] >= minimum
    return keep
