"""``deco-ckpt import`` and ``export``: bit-exact round trips, inferred settings, refusals."""

import dataclasses
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoints_tools import cli
from checkpoints_tools.base import EMA, MODEL
from checkpoints_tools.convert import plan_export, plan_import
from checkpoints_tools.formats import release
from checkpoints_tools.formats.canonical import CanonicalReader
from checkpoints_tools.infer_config import denoiser_shapes, infer_model, release_shapes
from checkpoints_tools.registry import open_checkpoint
from deco_scale.checkpoint.format import read_meta, read_tensors, verify
from deco_scale.config import build_config
from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig
from tests.support import FIXTURES
from tests.support.checkpoints import (
    CLASSES,
    TEXT,
    assert_same_bits,
    release_file,
    release_state,
    save,
    tensors_of,
)
from tests.support.release import model_config_from_release

GOLDENS = ["t2i_tiny", "c2i_tiny", "c2i_baseline_tiny"]


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Small models of all kinds."""
    kind = draw(st.sampled_from(["t2i_deco", "c2i_deco", "c2i_baseline"]))
    heads = draw(st.integers(1, 4))
    sizes: dict[str, Any] = {
        "dim": heads * 4 * draw(st.integers(1, 3)),
        "num_heads": heads,
        "num_blocks": draw(st.integers(1, 3)),
        "patch_size": draw(st.integers(1, 5)),
    }
    if kind != "c2i_baseline":
        sizes |= {
            "channels": draw(st.integers(1, 4)),
            "decoder_width": draw(st.integers(1, 6)),
            "decoder_blocks": draw(st.integers(1, 3)),
        }
    if kind == "t2i_deco":
        sizes |= {
            "num_text_blocks": draw(st.integers(0, 2)),
            "text_dim": draw(st.integers(1, 9)),
            "text_tokens": draw(st.integers(1, 7)),
        }
    else:
        sizes["num_classes"] = draw(st.integers(1, 11))
    return ModelConfig(kind=kind, **sizes)


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    path = FIXTURES / f"{name}.safetensors"
    weights = {n: t for n, t in load_file(path).items() if n.startswith((release.DENOISER, release.REPA))}
    assert cli.main(["import", str(path), str(tmp_path / "canonical")]) == 0
    verify(tmp_path / "canonical")
    out = tmp_path / "back.ckpt"
    assert (
        cli.main(["export", str(tmp_path / "canonical"), str(out), "--format", "release", "--weights", "model"])
        == 0
    )
    assert_same_bits(torch.load(out, weights_only=True)["state_dict"], weights)
    with safe_open(path, framework="pt") as file:
        golden = json.loads(file.metadata()["golden"])
    stored = ModelConfig(**read_meta(tmp_path / "canonical").config["model"])
    assert stored == model_config_from_release(golden["kind"], golden["model"])


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(model=models(), encoder_dim=st.integers(0, 3), files=st.integers(1, 3), seed=st.integers(0, 99))
def test_canonical_to_release_and_back(
    model: ModelConfig, encoder_dim: int, files: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    tensors = tensors_of(model, seed=seed, encoder_dim=encoder_dim)
    source = CanonicalReader(save(folder / "first", tensors))
    plan_export(source, format="release", weights="both", dtype=torch.float32).write(folder / "there.ckpt")
    there = open_checkpoint(folder / "there.ckpt")
    assert there.model == source.model == model
    meta = plan_import(there, files=files).write(folder / "back")
    back = CanonicalReader(folder / "back")
    assert_same_bits({n: back.read(n) for n in back.specs}, tensors)
    assert meta is not None and meta.parameter_digest == read_meta(folder / "first").parameter_digest


@settings(max_examples=60, deadline=None)
@given(model=models())
def test_settings_are_inferred_from_names_and_shapes(model: ModelConfig) -> None:
    for shapes in (denoiser_shapes(model), release_shapes(model)):
        assert infer_model(shapes, where="here") == model


def test_the_baselines_channels_are_the_configurations() -> None:
    """12 channels of 1 pixel, or 3 of 4: the tensors are the same."""
    model = ModelConfig(
        kind="c2i_baseline", dim=8, num_heads=1, num_blocks=1, patch_size=1, channels=12, num_classes=2
    )
    shapes = release_shapes(model)
    assert infer_model(shapes, where="here").channels == 3
    assert infer_model(shapes, where="here", stated=dataclasses.asdict(model)) == model


def test_settings_that_the_release_lacks_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = release_file(tmp_path / "w.ckpt", {"state_dict": release_state(), "global_step": 3})
    assert cli.main(["import", str(path), str(tmp_path / "out"), "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert cli.main(["import", str(path), str(tmp_path / "out")]) == 0
    assert "has no EMA: the weights are copied" in capsys.readouterr().out
    found = read_tensors(tmp_path / "out", "")
    for name in denoiser_shapes(CLASSES):
        assert torch.equal(found[MODEL + name], found[EMA + name])
    assert not any(n.startswith("exp_avg") for n in found)
    assert read_meta(tmp_path / "out").step == 0


def test_a_contradicting_config_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text_encoder: Path
) -> None:
    path = release_file(tmp_path / "w.ckpt", {"state_dict": release_state(TEXT)})
    assert cli.main(["import", str(path), str(tmp_path / "bare"), "--text-encoder", str(text_encoder)]) == 0
    config = read_meta(tmp_path / "bare").config
    assert build_config(config, source="meta").model == TEXT
    (tmp_path / "fits.yaml").write_text(json.dumps(config))
    assert cli.main(["import", str(path), str(tmp_path / "out"), "--config", str(tmp_path / "fits.yaml")]) == 0
    config["model"]["num_heads"] = 4
    (tmp_path / "other.yaml").write_text(json.dumps(config))
    capsys.readouterr()
    assert cli.main(["import", str(path), str(tmp_path / "no"), "--config", str(tmp_path / "other.yaml")]) == 2
    assert "model.num_heads=4 of the configuration contradicts" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


class _Creates:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mknod, (str(self._path),)


def _changed(change: Any) -> Any:
    def make(folder: Path) -> Path:
        state: dict[Any, Any] = dict(release_state())
        content = change(state)
        return release_file(folder / "bad.ckpt", {"state_dict": state} if content is None else content)

    return make


def _truncated(folder: Path) -> Path:
    path = release_file(folder / "bad.ckpt", {"state_dict": release_state()})
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def _plain_pickle(folder: Path) -> Path:
    (folder / "bad.ckpt").write_bytes(pickle.dumps(_Creates(folder / "ran")))
    return folder / "bad.ckpt"


def _legacy(folder: Path) -> Path:
    torch.save({"state_dict": release_state()}, folder / "bad.ckpt", _use_new_zipfile_serialization=False)
    return folder / "bad.ckpt"


FIRST = "denoiser.blocks.0.norm1.weight"
REFUSALS = {
    "no state_dict": (_changed(lambda s: {"weights": s}), "has no state_dict"),
    "a bare tensor": (_changed(lambda s: torch.zeros(2)), "has no state_dict"),
    "unknown tensor": (_changed(lambda s: s.update({"vae.w": torch.zeros(2)})), "unknown tensor 'vae.w'"),
    "unknown weight": (_changed(lambda s: s.update({"denoiser.more": torch.zeros(2)})), "unexpected more"),
    "missing tensor": (_changed(lambda s: s.__delitem__(FIRST)), "missing blocks.0.norm1.weight"),
    "misshapen": (_changed(lambda s: s.update({FIRST: torch.zeros(3)})), r"norm1.weight has shape \(3,\)"),
    "not a tensor": (_changed(lambda s: s.update({FIRST: 1.0})), "is a float, not a tensor"),
    "sparse": (_changed(lambda s: s.update({FIRST: torch.eye(4).to_sparse()})), "not a plain dense tensor"),
    "integers": (_changed(lambda s: s.update({FIRST: torch.ones(16, dtype=torch.int32)})), "fp32 cannot"),
    "not a name": (_changed(lambda s: s.update({3: torch.zeros(2)})), "is not a tensor name"),
    "truncated": (_truncated, "damaged or truncated"),
    "plain pickle": (_plain_pickle, "plain pickles are not read"),
    "before 1.6": (_legacy, "plain pickles are not read"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_no_release_file_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = REFUSALS[what]
    path = make(tmp_path)
    assert cli.main(["import", str(path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and "Traceback" not in error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["beside the state_dict", "inside of it"])
def test_a_malicious_pickle_runs_nothing(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary = tmp_path / "ran"
    state: dict[str, Any] = dict(release_state())
    content: dict[str, Any] = {"state_dict": state}
    (content if place.startswith("beside") else state)["hyper_parameters"] = _Creates(canary)
    path = release_file(tmp_path / "evil.ckpt", content)
    for arguments in (["import", str(path), str(tmp_path / "out")], ["inspect", str(path)], ["verify", str(path)]):
        assert cli.main(arguments) in (1, 2)
        assert "is refused" in capsys.readouterr().err
    assert not canary.exists() and not (tmp_path / "out").exists()
    # The payload does work where pickles are trusted.
    torch.load(path, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_safetensors_single_and_sharded(dtype: str, tmp_path: Path) -> None:
    tensors = tensors_of(TEXT)
    source = save(tmp_path / "source", tensors)
    common = ["--format", "safetensors", "--weights", "both", "--dtype", dtype]
    assert cli.main(["export", str(source), str(tmp_path / "one"), *common]) == 0
    assert cli.main(["export", str(source), str(tmp_path / "many"), *common, "--max-shard-bytes", "4000"]) == 0
    wanted = {n: t.to(torch.float32 if dtype == "fp32" else torch.bfloat16) for n, t in tensors.items()}
    assert_same_bits(load_file(tmp_path / "one" / "model.safetensors"), wanted)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert_same_bits({n: t for shard in shards for n, t in load_file(shard).items()}, wanted)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "many" / file)
    for shard in shards:
        held = load_file(shard)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 4000
    settings = json.loads((tmp_path / "many" / "config.json").read_text())
    assert ModelConfig(**settings["model"]) == TEXT
    assert settings["provenance"]["parameter_digest"] == read_meta(source).parameter_digest
    assert cli.main(["import", str(tmp_path / "many"), str(tmp_path / "back")]) == 0
    if dtype == "fp32":
        assert_same_bits(read_tensors(tmp_path / "back", ""), tensors)


def test_safetensors_with_the_releases_names(tmp_path: Path) -> None:
    state = release_state(TEXT)
    save_file(state, tmp_path / "w.safetensors")
    assert cli.main(["import", str(tmp_path / "w.safetensors"), str(tmp_path / "out")]) == 0
    reader = CanonicalReader(tmp_path / "out")
    ours = {n: reader.read(MODEL + n) for n in denoiser_shapes(TEXT)}
    back = release.denoiser_to_release(ours, TEXT)
    assert_same_bits({release.DENOISER + n: t.contiguous() for n, t in back.items()}, state)


@pytest.mark.parametrize("weights", ["ema", None])
def test_a_bare_denoiser_is_what_its_config_says(weights: str | None, tmp_path: Path) -> None:
    """The files that a run exports of its EMA; without their config.json they are plain weights."""
    bare = {n.removeprefix(EMA): t for n, t in tensors_of(CLASSES).items() if n.startswith(EMA)}
    save_file(bare, tmp_path / "model.safetensors")
    if weights:
        (tmp_path / "config.json").write_text(json.dumps({"weights": weights}))
    source = open_checkpoint(tmp_path)
    prefix = EMA if weights else MODEL
    assert source.model == CLASSES
    assert_same_bits({n: source.read(n) for n in source.specs}, {prefix + n: t for n, t in bare.items()})


def test_export_refuses_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {n: t for n, t in tensors_of(CLASSES).items() if not n.startswith(EMA)}
    source = save(tmp_path / "source", tensors)
    assert cli.main(["export", str(source), str(tmp_path / "out"), "--format", "safetensors"]) == 2
    assert "no ema.denoiser.* tensors" in capsys.readouterr().err
    (tmp_path / "there").mkdir()
    arguments = ["export", str(source), str(tmp_path / "there"), "--format", "safetensors", "--weights", "model"]
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"named \*.ckpt"):
        plan = plan_export(CanonicalReader(source), format="release", weights="model", dtype=torch.float32)
        plan.write(tmp_path / "name.bin")
