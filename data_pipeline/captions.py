"""Which caption a sample shows in an epoch: chosen and prefixed by a generator keyed by (seed, epoch, sample)."""

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from data_pipeline.decode import DecodeError
from data_pipeline.stream.sampler import generator

JSON_FIELDS = ("captions", "caption", "text")
"""Where a ``.json`` member's captions are looked for."""
PREFIXES = ("A photo of ", "An image of ", "A picture of ", "This is a photo of ")
"""Short openings, as the release puts before short captions half of the time."""
WEIGHTS_FIELD = "weights"
MAX_TEXT_BYTES = 2**20
"""Longest member in bytes: a list nested in as many brackets takes some 30 times the memory."""
_MAX_LABEL_DIGITS = 18
_CAPTION_KEY = 3


@dataclass(frozen=True, slots=True)
class Captions:
    """A sample's captions and how often each is to be chosen; weights are positive and need not sum to 1."""

    texts: tuple[str, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.texts or len(self.texts) != len(self.weights):
            raise ValueError(f"{len(self.texts)} captions with {len(self.weights)} weights")
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ValueError(f"weights must be positive and finite, got {self.weights[:5]}")


def parse_captions(raw: bytes, *, is_json: bool, fields: Sequence[str] = JSON_FIELDS) -> Captions:
    """Captions of a ``.txt`` member, which is one caption, or of a ``.json`` one.

    The first of ``fields`` that the JSON object has (null counts as absent) holds a string, a list of strings,
    or a list of ``{"text": ..., "weight": ...}`` (weight 1 where it has none). ``"weights"`` beside a list of
    strings weighs them. Blank entries of a list are left out. Raises :class:`DecodeError` of kind
    ``bad_caption`` for anything else.
    """
    entries = json_object(raw) if is_json else {}
    try:
        found = next((entries[name] for name in fields if entries.get(name) is not None), None)
        value = found if is_json else _text(raw)
        if isinstance(value, str):
            return _captions([(value, 1.0)])
        if not isinstance(value, list):
            raise ValueError(f"none of the fields {tuple(fields)} holds text")
        return _captions(_weighted(value, entries.get(WEIGHTS_FIELD)))
    except ValueError as error:
        raise DecodeError("bad_caption", f"{type(error).__name__}: {error}") from error


def json_numbers(raw: bytes, fields: Sequence[str]) -> list[float]:
    """Numbers of a ``.json`` member; nan where one is absent, no number, or not finite."""
    entries = json_object(raw)
    return [_number(entries.get(name)) for name in fields]


def parse_label(raw: bytes) -> int:
    """Class number of a ``.cls`` member: decimal digits."""
    text = raw.decode("ascii", errors="replace").strip()
    if not text.isdigit() or len(text) > _MAX_LABEL_DIGITS:
        raise DecodeError("bad_label", f"{text[:20]!r} is not a class number")
    return int(text)


def choose_caption(
    captions: Captions, *, seed: int, epoch: int, sample: int, prefix_probability: float, short_words: int
) -> str:
    """One caption by weight; those under ``short_words`` words get a prefix with the given probability."""
    random = generator(seed, _CAPTION_KEY, epoch, sample)
    texts, weights = captions.texts, captions.weights
    largest = max(weights)
    if min(weights) == largest:
        caption = texts[int(random.integers(len(texts)))]
    else:
        # Divided by the largest, so that the sum stays finite.
        ends = list(accumulate(weight / largest for weight in weights))
        point = random.random() * ends[-1]
        caption = next((text for text, end in zip(texts, ends, strict=True) if point < end), texts[-1])
    if len(caption.split()) < short_words and random.random() < prefix_probability:
        caption = PREFIXES[int(random.integers(len(PREFIXES)))] + caption
    return caption


def texts_of(captions: Captions, *, prefixes: Sequence[str], short_words: int) -> tuple[str, ...]:
    """Every text that :func:`choose_caption` may give: each caption, and a short one behind each prefix."""
    texts: list[str] = []
    for text in captions.texts:
        texts.append(text)
        if len(text.split()) < short_words:
            texts.extend(prefix + text for prefix in prefixes)
    return tuple(texts)


def _text(raw: bytes) -> str:
    if len(raw) > MAX_TEXT_BYTES:
        raise ValueError(f"{len(raw)} bytes are over {MAX_TEXT_BYTES}")
    return raw.decode("utf-8-sig")


def json_object(raw: bytes) -> dict[str, Any]:
    """Entries of a ``.json`` member; raises :class:`DecodeError` (``bad_caption``) for all but a JSON object."""
    try:
        entries = json.loads(_text(raw))
        if not isinstance(entries, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise DecodeError("bad_caption", f"{type(error).__name__}: {error}") from error
    return entries


def _number(value: object) -> float:
    """A JSON number that a float holds, else nan; true and false are no numbers."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value) if math.isfinite(value) else math.nan
    return math.nan


def _weighted(value: list[Any], weights: object) -> list[tuple[str, float]]:
    """Texts and weights of a list of strings or of mappings."""
    if all(isinstance(entry, str) for entry in value):
        if weights is None:
            weights = [1.0] * len(value)
        if not isinstance(weights, list) or len(weights) != len(value):
            raise ValueError(f"{WEIGHTS_FIELD!r} must be a list of {len(value)} numbers")
        return [(text, _number(weight)) for text, weight in zip(value, weights, strict=True)]
    if not all(isinstance(entry, dict) and isinstance(entry.get("text"), str) for entry in value):
        raise ValueError('captions must be strings or {"text": ..., "weight": ...}')
    return [(entry["text"], _number(entry.get("weight", 1.0))) for entry in value]


def _captions(pairs: list[tuple[str, float]]) -> Captions:
    """What is left without blank texts; weights are checked before that."""
    checked = Captions(tuple(text.strip() for text, _ in pairs), tuple(weight for _, weight in pairs))
    # Half of a surrogate pair, which JSON can escape, is no text: tokenizers and UTF-8 refuse it.
    " ".join(checked.texts).encode()
    nonblank = [pair for pair in zip(checked.texts, checked.weights, strict=True) if pair[0]]
    if not nonblank:
        raise ValueError("an empty caption")
    return Captions(tuple(text for text, _ in nonblank), tuple(weight for _, weight in nonblank))
