"""Which caption a sample shows in an epoch: chosen and prefixed by a generator keyed by (seed, epoch, sample)."""

import json
from collections.abc import Sequence

from data_pipeline.decode import DecodeError
from data_pipeline.order import generator

PREFIXES = ("A photo of ", "An image of ", "A picture of ", "This is a photo of ")
"""Short openings, as the release puts before short captions half of the time."""
_CAPTION_KEY = 3
_JSON_FIELDS = ("captions", "caption", "text")


def parse_captions(raw: bytes, *, is_json: bool) -> list[str]:
    """Captions of a ``.txt`` member (the whole of it) or of a ``.json`` one (``captions`` or ``caption``)."""
    try:
        text = raw.decode("utf-8")
        if not is_json:
            return [text.strip()]
        fields = json.loads(text)
        value = next((fields[name] for name in _JSON_FIELDS if name in fields), None)
    except (UnicodeDecodeError, ValueError, TypeError) as error:
        raise DecodeError("bad_caption", f"{type(error).__name__}: {error}") from error
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
        raise DecodeError("bad_caption", f"none of the fields {_JSON_FIELDS} holds text")
    return [c.strip() for c in captions]


def parse_label(raw: bytes) -> int:
    """Class number of a ``.cls`` member: decimal digits."""
    text = raw.decode("ascii", errors="replace").strip()
    if not text.isdigit():
        raise DecodeError("bad_label", f"{text[:20]!r} is not a class number")
    return int(text)


def choose_caption(
    captions: Sequence[str],
    *,
    seed: int,
    epoch: int,
    sample: int,
    prefix_probability: float,
    short_words: int,
) -> str:
    """One caption; those under ``short_words`` words get a prefix with the given probability."""
    random = generator(seed, _CAPTION_KEY, epoch, sample)
    caption = captions[int(random.integers(len(captions)))]
    if len(caption.split()) < short_words and random.random() < prefix_probability:
        caption = PREFIXES[int(random.integers(len(PREFIXES)))] + caption
    return caption
