"""Digests of an index: whatever changes the samples or their order changes them, and nothing else does."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config import DataConfig, Filters, Source
from data_pipeline.index.build import build_index, save_index
from data_pipeline.index.filter import select
from data_pipeline.index.format import COLUMNS, SCORE, Index, make_index
from data_pipeline.storage.base import ObjectInfo, open_store
from data_pipeline.stream.loader import Loader
from data_pipeline.text_embeddings import TextEmbeddingIdentity
from tests.support.sets import image_bytes, tar_of

SHARDS = [ObjectInfo("a.tar", 10_000, "tag"), ObjectInfo("b.tar", 20_000, "tag")]
COUNTS = [4, 6]


def columns_of(**changed: Any) -> dict[str, Any]:
    made: dict[str, Any] = {name: np.arange(10) for name in COLUMNS}
    return made | {"height": np.arange(10) + 60, "width": np.full(10, 64), "flags": np.zeros(10)} | changed


def index_of(shards: list[ObjectInfo] = SHARDS, counts: list[int] = COUNTS, **changed: Any) -> Index:
    return make_index(shards, counts, columns_of(**changed))


def chosen(**filters: Any) -> Index:
    return select(index_of(), Filters(**filters), target="caption", min_side=0)


def test_a_selection_has_a_digest_of_its_own_though_as_many_are_chosen() -> None:
    whole = index_of()
    picks = [[0, 1, 2], [0, 1, 3], [1, 2, 3], [7, 8, 9], [0, 1], [0, 1, 2, 3], []]
    digests = [whole.only(np.array(rows)).digest for rows in picks]
    assert len({whole.digest, *digests}) == 1 + len(picks)
    assert digests == [index_of().only(np.array(rows)).digest for rows in picks]
    assert {whole.only(np.array(rows)).whole_digest for rows in picks} == {whole.digest}


def test_the_same_rows_of_another_index_have_another_digest() -> None:
    rows = np.array([1, 2])
    assert index_of().only(rows).digest != index_of(crc32c=np.arange(10) + 1).only(rows).digest


def test_all_rows_are_the_index_itself() -> None:
    whole = index_of()
    assert whole.only(np.arange(10)).digest == whole.digest == chosen().digest


def test_filters_that_choose_as_many_others_have_another_digest() -> None:
    low, high = chosen(max_pixels=62 * 64), chosen(min_side=64, max_aspect=1.05)
    assert low.rows is not None and high.rows is not None
    low_rows, high_rows = low.rows.tolist(), high.rows.tolist()
    assert low_rows == [0, 1, 2] and high_rows != low_rows
    same = index_of().only(np.array(high_rows[:3]))
    assert len(same) == len(low) and same.digest != low.digest
    # Not how, but what was chosen counts.
    assert chosen(max_caption_chars=2).digest == low.digest


@pytest.mark.parametrize("name", [*COLUMNS, SCORE + "aesthetic"])
def test_every_column_is_part_of_the_digest(name: str) -> None:
    base = np.arange(10)
    other = base.copy()
    other[4] += 1
    first, second = index_of(**{name: base}), index_of(**{name: other})
    assert first.digest != second.digest and first.digest == index_of(**{name: base}).digest
    # Values that have moved from a sample to the next one are others, too.
    assert index_of(**{name: base[::-1]}).digest != first.digest


def test_the_name_of_a_column_is_part_of_the_digest() -> None:
    score = np.linspace(0, 1, 10)
    made = {name: index_of(**{SCORE + name: score}).digest for name in ("a", "b")}
    assert len({index_of().digest, *made.values()}) == 3


@pytest.mark.parametrize(
    ("shards", "counts"),
    [
        ([dataclasses.replace(SHARDS[0], key="c.tar"), SHARDS[1]], COUNTS),
        ([dataclasses.replace(SHARDS[0], size=10_512), SHARDS[1]], COUNTS),
        (SHARDS[::-1], COUNTS),
        (SHARDS, [5, 5]),
    ],
    ids=["key", "size", "order", "counts"],
)
def test_shards_are_part_of_the_digest(shards: list[ObjectInfo], counts: list[int]) -> None:
    assert index_of(shards, counts).digest != index_of().digest


def test_a_copy_of_the_shards_under_other_tags_has_the_same_digest() -> None:
    """So that a run goes on from a copy in another bucket."""
    copied = [dataclasses.replace(shard, etag="other") for shard in SHARDS]
    assert index_of(copied).digest == index_of().digest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of different heights."""
    folder = tmp_path_factory.mktemp("digests")
    members: dict[str, bytes] = {}
    for i in range(6):
        members |= {f"{i}.png": image_bytes(i, size=(16 + i, 16)), f"{i}.txt": b"caption"}
    (folder / "a.tar").write_bytes(tar_of(members))
    store = open_store(str(folder))
    save_index(store, build_index(store)[0])
    return folder


def state(data: Path, seed: int = 0, **changed: Any) -> str:
    """What a checkpoint keeps of the data, by which a resume tells that they are the same."""
    cfg = DataConfig(**{"url": str(data), "workers": 0, "streams": 2, "window": 1, **changed})
    loader = Loader(cfg, resolution=16, multiple=8, seed=seed, global_batch=2, rank=0, world=1, start=0)
    loader.close()
    return json.dumps(loader.state(2))


def test_a_run_s_data_state_tells_selections_apart(data: Path) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"streams": 1}, {"window": 2}, {"filters": Filters(max_pixels=18 * 16)},
        {"filters": Filters(max_pixels=19 * 16)}, {"url": "", "mixture": (Source(url=str(data), weight=2.0),)},
    ]  # fmt: skip
    states = [state(data, **change) for change in changes]
    assert len(set(states)) == len(states)
    assert states == [state(data, **change) for change in changes]


def test_how_fast_data_are_read_is_no_part_of_a_run_s_data_state(data: Path, tmp_path: Path) -> None:
    for change in ({"workers": 2}, {"fetchers": 1}, {"ahead": 3}, {"cache_dir": str(tmp_path)}):
        assert state(data, **change) == state(data)


IDENTITY = TextEmbeddingIdentity(
    encoder="e", revision="r", width=8, max_tokens=4, zero_padding=False, prefixes=("A ",), short_words=3
)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TextEmbeddingIdentity)])
def test_every_field_of_the_text_embedding_identity_is_part_of_its_digest(field: str) -> None:
    value = getattr(IDENTITY, field)
    other: Any = ("B ",) if field == "prefixes" else f"{value}x" if isinstance(value, str) else value + 1
    assert dataclasses.replace(IDENTITY, **{field: other}).digest != IDENTITY.digest
    assert dataclasses.replace(IDENTITY).digest == IDENTITY.digest
