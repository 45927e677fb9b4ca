"""Text states computed before training: the same run, bit by bit, as with the encoder in the loop."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.index.format import load_index
from data_pipeline.storage.base import open_store
from data_pipeline.text_embeddings import TextEmbeddingStore
from deco_scale.cli.main import main
from deco_scale.config import build_config, dump_config
from tests.support.assets import TEXT_TOKENS, tiny_config
from tests.support.process_groups import Job, run_jobs, trace


@pytest.fixture
def config(tmp_path: Path, shards: Path, text_encoder: Path) -> dict[str, Any]:
    config = tiny_config(tmp_path / "run", shards, text_encoder)
    config["text_encoder"] |= {"round_states": True, "zero_padding": True}
    config["stages"][0] |= {"steps": 5}
    config["stages"][1] |= {"steps": 2}
    return config


def run_embed(config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, world: int = 1) -> list[int]:
    """``deco embed`` by ``world`` processes, the last of which waits for the others; in a SLURM script."""
    path = folder / "embed.yaml"
    path.write_text(dump_config(build_config(config, source="test")))
    codes = []
    for rank in reversed(range(world)):
        with monkeypatch.context() as environment:
            for name, value in {"SLURM_PROCID": 0, "SLURM_NTASKS": 8, "RANK": rank, "WORLD_SIZE": world}.items():
                if world > 1 or name.startswith("SLURM"):
                    environment.setenv(name, str(value))
            codes.append(main(["embed", "--config", str(path), f"data.text_states={folder / 'states'}"]))
    return codes


def test_precomputed_states_train_bit_by_bit_as_the_encoder_does(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = tmp_path / "states"
    assert run_embed(config, tmp_path, monkeypatch, world=2) == [0, 0]
    written = {p.name: p.stat().st_mtime_ns for p in states.glob("*.states.*")}
    assert len(written) > 2

    def variant(name: str, **data: Any) -> Job:
        copy = config | {"run": config["run"] | {"dir": str(tmp_path / name)}, "data": config["data"] | data}
        return Job(name, copy)

    jobs = [variant("encoded"), variant("read", text_states=str(states))]
    run_jobs(jobs, 1, tmp_path)
    assert trace(tmp_path / "read") == trace(tmp_path / "encoded")
    # A second run does nothing again, and one shard that is lost is made anew.
    (states / "shard-00001.states.rows").unlink()
    assert run_embed(config, tmp_path, monkeypatch) == [0]
    again = {p.name: p.stat().st_mtime_ns for p in states.glob("*.states.*")}
    assert {n for n in again if again[n] != written[n]} == {"shard-00001.states.rows", "shard-00001.states.tar"}


def test_states_of_another_encoder_length_or_index_are_refused(
    config: dict[str, Any], tmp_path: Path, shards: Path, text_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_embed(config, tmp_path, monkeypatch) == [0]
    store, index = open_store(str(tmp_path / "states")), load_index(open_store(str(shards)))
    states = TextEmbeddingStore(store, index)
    # Zeros behind the last token are not stored.
    members = states._columns["size"]
    assert members.max() < 2 * TEXT_TOKENS * 24 * 15 and members.min() < 2 * TEXT_TOKENS * 24 * 5
    for change, word in (
        ({"max_tokens": 7}, "max_tokens 6, expected 7"),
        ({"zero_padding": False}, "zero_padding True, expected False"),
        ({"revision": "other"}, "revision"),
    ):
        expected = type(states.identity)(**{**{n: getattr(states.identity, n) for n in FIELDS}, **change})
        with pytest.raises(DataError, match=word):
            TextEmbeddingStore(store, index, expected)
    copy = tmp_path / "other"
    shutil.copytree(shards, copy)
    other = index.__class__(**{**index.__dict__, "whole_digest": "changed"})
    with pytest.raises(DataError, match="made for another index"):
        TextEmbeddingStore(store, other)
    with pytest.raises(DataError, match="deco embed"):
        TextEmbeddingStore(open_store(str(copy)), index)


FIELDS = ("encoder", "revision", "width", "max_tokens", "zero_padding", "prefixes", "short_words", "dtype")
