"""YAML 1.2: what is a number and what is text, what is refused, and the round trip."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deco_scale.errors import ConfigError
from deco_scale.yaml import dump_yaml, load_yaml

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("0x10", 16), ("0o10", 8), ("1_000", 1000), ("1:30", "1:30"), ("1e-4", 1e-4), ("2E3", 2000.0),
        ("1.5", 1.5), ("yes", "yes"), ("no", "no"), ("on", "on"), ("true", True), ("null", None), ("~", None),
        ("2026-01-01", "2026-01-01"), ("=", "="), ("'1'", "1"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    loaded = load_yaml(f"key: {text}", "test")["key"]
    assert loaded == value and type(loaded) is type(value)


def test_aliases_and_merge_keys_work() -> None:
    assert load_yaml("a: &x {c: 1}\nb:\n  <<: *x\n  d: 2", "test") == {"a": {"c": 1}, "b": {"c": 1, "d": 2}}


def bomb(item: str) -> str:
    """Nine levels of ten aliases each; ``item`` is what a level does with them."""
    lines = ["a: &a {k: v}"]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{name}: &{name} {item % ', '.join([f'*{before}'] * 10)}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:\n  k: planted\n  k: planted", "key 'k' is given twice, line 3, column 3"),
        ("x: &x {c: 1}\na:\n  <<: *x\n  k: planted\n  k: 1", "key 'k' is given twice, line 5"),
        ("a: !!python/object/apply:os.system [planted]", "python/object/apply:os.system', line 1, column 4"),
        ("a: !planted 1", "could not determine a constructor"),
        ("a: !!set {b}", "constructor for the tag"),
        ("a: !!int planted", "does not fit its tag"),
        ("a: !!bool planted", "does not fit its tag"),
        ("a: " + "9" * 5000, "thousands of digits"),
        ("[" * 3000, "nested too deep"),
        ("a: 1\n---\nb: 2", "single document"),
        ("? {a: 1}\n: 2", "unhashable key"),
        ("a: &a [*a]", "more than 100000 values"),
        (bomb("[%s]"), "more than 100000 values"),
        (bomb("{<<: [%s]}"), "more than 100000 values"),
        ("\x07", "not allowed"),
        ("a: [", "line 1, column 5"),
    ],
)
def test_bad_documents_are_refused_without_quoting_them(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="^test.yaml is not valid YAML: ") as caught:
        load_yaml(text, "test.yaml")
    assert said in str(caught.value)
    assert "planted" not in str(caught.value) or text == "a: !planted 1"


@settings(max_examples=300, deadline=None)
@given(st.recursive(SCALARS, lambda c: st.lists(c) | st.dictionaries(st.text(), c), max_leaves=12))
def test_round_trip_is_exact(value: Any) -> None:
    assert load_yaml(dump_yaml(value), "test") == value


def test_dump_keeps_the_order_and_uses_no_aliases() -> None:
    shared = [1]
    assert dump_yaml({"z": shared, "a": shared}) == "z:\n- 1\na:\n- 1\n"
