"""Captions, their weights and prefixes, and numbers of a .json."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.captions import (
    PREFIXES,
    Captions,
    choose_caption,
    json_numbers,
    parse_captions,
    parse_label,
)
from tests.support.sets import kind_of


def parse(value: object, **options: Any) -> Captions:
    return parse_captions(json.dumps(value).encode(), is_json=True, **options)


def test_captions_are_parsed() -> None:
    assert parse_captions(b"\xef\xbb\xbf a cat\n", is_json=False) == Captions(("a cat",), (1.0,))
    assert parse({"text": " x "}) == parse({"caption": "x", "text": "y"}) == Captions(("x",), (1.0,))
    assert parse({"captions": None, "caption": "x"}) == Captions(("x",), (1.0,))
    assert parse({"captions": ["x", " ", "y"], "weights": [1, 5, 0.5]}) == Captions(("x", "y"), (1.0, 0.5))
    weighed = {"captions": [{"text": "x", "weight": 3}, {"text": "y"}]}
    assert parse(weighed) == Captions(("x", "y"), (3.0, 1.0))
    two = {"short_caption": "s", "long_caption": "l"}
    assert parse(two, fields=("long_caption", "short_caption")).texts == ("l",)
    assert parse(two, fields=("short_caption", "long_caption")).texts == ("s",)


JSON_KEYS = ["captions", "text", "weight", "weights"]
BAD_JSON: dict[str, bytes] = {
    "list": b"[]", "cut": b"{", "not utf-8": b"\xff", "deep": b'{"a":' * 10**5, "deep list": b"[" * 10**5,
    "long": b'{"caption": "' + b"x" * 2**21 + b'"}', "digits": b'{"a": ' + b"9" * 10**5 + b"}",
}  # fmt: skip
BAD_WEIGHTS: tuple[object, ...] = ([], [1, 2], [0], [-1], ["1"], [True], [None], 1, [10**400])
BAD_SHARES: tuple[object, ...] = (0, float("nan"), float("inf"), None, "1", [])
BAD_CAPTIONS: list[object] = [
    {}, {"captions": []}, {"captions": [1]}, {"captions": ["x", 1]}, {"captions": 3}, {"caption": " "},
    {"caption": "\ud800"}, {"captions": {"text": "x"}}, {"captions": [{"weight": 1}]}, {"captions": [[]]},
    *({"captions": ["x"], "weights": w} for w in BAD_WEIGHTS),
    *({"captions": [{"text": "x", "weight": w}]} for w in BAD_SHARES),
]  # fmt: skip


def test_bad_captions_are_refused() -> None:
    for raw in BAD_JSON.values():
        assert kind_of(lambda raw=raw: parse_captions(raw, is_json=True)) == "bad_caption"  # type: ignore[misc]
        assert kind_of(lambda raw=raw: json_numbers(raw, ["a"])) == "bad_caption"  # type: ignore[misc]
    for value in BAD_CAPTIONS:
        assert kind_of(lambda value=value: parse(value)) == "bad_caption", value  # type: ignore[misc]
    for raw in (b"", b" \n", b"\xff", b"x" * 2**21):
        assert kind_of(lambda raw=raw: parse_captions(raw, is_json=False)) == "bad_caption"  # type: ignore[misc]
    for raw in (b"", b"-1", b"1.5", b"9" * 5000, b"\xb2"):
        assert kind_of(lambda raw=raw: parse_label(raw)) == "bad_label"  # type: ignore[misc]
    assert parse_label(b" 12\n") == 12


def test_numbers_of_a_json_member() -> None:
    raw = b'{"a": 1, "b": 2.5, "c": true, "d": "3", "e": 1e999, "f": NaN, "g": 1' + b"0" * 400 + b', "h": null}'
    found = json_numbers(raw, list("abcdefghi"))
    assert found[:2] == [1.0, 2.5] and np.isnan(found[2:]).all()


@settings(max_examples=60, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(JSON_KEYS), inner),
    )
)
def test_any_json_gives_captions_or_a_fault(value: object) -> None:
    raw = json.dumps(value).encode()
    if kind_of(lambda: parse_captions(raw, is_json=True)) is None:
        captions = parse_captions(raw, is_json=True)
        assert all(text == text.strip() and text for text in captions.texts)
        assert all(0 < weight < float("inf") for weight in captions.weights)


GOLDEN = [
    "A picture of one",
    "one",
    "one",
    "An image of one",
    "one",
    "zero",
    "A picture of one",
    "zero",
    "three words here",
    "three words here",
    "two",
    "one",
    "A picture of zero",
    "zero",
    "two",
    "zero",
]


def test_equal_weights_choose_as_ever() -> None:
    # Chosen by the code before there were weights: a run that is resumed must see the same captions.
    texts = ("zero", "one", "two", "three words here")
    for weight in (1.0, 0.3):
        found = [
            choose_caption(
                Captions(texts, (weight,) * 4), seed=7, epoch=2, sample=i, prefix_probability=0.5, short_words=3
            )
            for i in range(16)
        ]
        assert found == GOLDEN


def test_weights_are_kept_and_prefixes_are_given() -> None:
    def choose(sample: int, epoch: int = 0, words: int = 30) -> str:
        captions = Captions(("one", "two", "three"), (1e308, 1.5e308, 0.5e308))
        return choose_caption(
            captions, seed=1, epoch=epoch, sample=sample, prefix_probability=0.5, short_words=words
        )

    count = 4000
    many = [choose(i) for i in range(count)]
    assert many == [choose(i) for i in range(count)] != [choose(i, epoch=1) for i in range(count)]
    # Five standard deviations are 158.
    for word, share in (("one", 1 / 3), ("two", 1 / 2), ("three", 1 / 6)):
        assert abs(sum(c.endswith(word) for c in many) - share * count) < 158
    assert abs(sum(c.startswith(PREFIXES) for c in many) - count / 2) < 158
    assert not any(choose(i, words=1).startswith(PREFIXES) for i in range(50))
    for texts, weights in (((), ()), (("x",), ()), (("x",), (0.0,)), (("x",), (float("nan"),))):
        with pytest.raises(ValueError):
            Captions(texts, weights)
