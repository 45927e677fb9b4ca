"""The configurations that ship: they load, have the published sizes and recipes, and can be planned."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from deco_scale.cli.main import main
from deco_scale.config import RunConfig, load_config
from deco_scale.models import Denoiser
from deco_scale.yaml import load_yaml
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
IMAGENET = 1_281_167
PARAMETERS = {
    "t2i_xxl": 1_133_759_395,
    "t2i_xxl_precomputed": 1_133_759_395,
    "t2i_xxl_sft": 1_133_759_395,
    "c2i_xl": 682_282_851,
    "c2i_xl_512": 682_282_851,
    "c2i_l": 426_938_019,
    "baseline_l": 459_171_584,
}
"""Of the denoiser alone, as published (tables 1 and 5 of arXiv 2511.19365 round them)."""
TINY = {"t2i_tiny", "c2i_tiny"}


def config(name: str) -> RunConfig:
    return load_config(ROOT / "configs" / f"{name}.yaml")


def test_every_configuration_is_known_here() -> None:
    assert {path.stem for path in CONFIGS} == PARAMETERS.keys() | TINY


def same(top: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Keys that ``top`` need not give."""
    found = []
    for key, value in top.items():
        if isinstance(value, dict):
            found += [f"{key}.{inner}" for inner in same(value, base.get(key) or {})]
        elif key in base and base[key] == value:
            found.append(key)
    return found


def test_a_recipe_with_a_base_gives_only_what_differs() -> None:
    raw = {path.stem: load_yaml(path.read_text(), path.name) for path in CONFIGS}
    bases = {name: mapping["base"].removesuffix(".yaml") for name, mapping in raw.items() if "base" in mapping}
    assert bases == {
        "c2i_xl_512": "c2i_xl",
        "c2i_l": "c2i_xl",
        "baseline_l": "c2i_l",
        "t2i_xxl_precomputed": "t2i_xxl",
        "t2i_xxl_sft": "t2i_xxl",
    }
    for name, base in bases.items():
        assert same(raw[name], dataclasses.asdict(config(base))) == []


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Denoiser(config(name).model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [*PARAMETERS, *sorted(TINY)])
def test_every_configuration_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    gpus = "1" if name in TINY else "8"
    assert main(["plan", "--config", f"{ROOT}/configs/{name}.yaml", "--gpus", gpus, "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    # A model of one process has no layout to fail; the others must fit with the batches that are configured.
    assert "recommended: " in out and "as configured: not possible" not in out


@pytest.mark.parametrize(
    ("name", "resolution", "steps", "batch", "lr", "betas", "shift"),
    [
        ("c2i_xl", 256, math.ceil(320 * IMAGENET / 256), 256, 1e-4, (0.9, 0.999), 1.0),
        ("c2i_xl_512", 512, math.ceil(20 * IMAGENET / 256), 256, 1e-4, (0.9, 0.999), 1.0),
        ("c2i_l", 256, 200_000, 256, 1e-4, (0.9, 0.999), 1.0),
        ("baseline_l", 256, 200_000, 256, 1e-4, (0.9, 0.999), 1.0),
        ("t2i_xxl_sft", 512, 40_000, 512, 1e-5, (0.9, 0.999), 4.0),
    ],
)
def test_published_recipes(
    name: str, resolution: int, steps: int, batch: int, lr: float, betas: tuple[float, float], shift: float
) -> None:
    cfg = config(name)
    (stage,) = cfg.stages
    assert (stage.resolution, stage.steps, stage.global_batch) == (resolution, steps, batch)
    assert (stage.lr, stage.betas, stage.timestep_shift) == (lr, betas, shift)
    assert (cfg.optimizer.weight_decay, cfg.optimizer.clip_norm, cfg.optimizer.ema_decay) == (0.0, 1.0, 0.9999)
    assert cfg.objective.repa_weight == 0.5 and cfg.precision.compute == "bf16"
    if name.startswith("t2i"):
        assert cfg.objective.repa_layer == 6 and cfg.objective.condition_dropout == 0.1
        return
    assert cfg.objective.repa_layer == 8 and cfg.objective.condition_dropout == 0.2
    assert cfg.objective.freq_weight == (0.0 if name == "baseline_l" else 1.0)
    assert cfg.data.target == "label" and cfg.model.num_classes == 1000


def test_precomputed_text_changes_nothing_else() -> None:
    plain, precomputed = config("t2i_xxl"), config("t2i_xxl_precomputed")
    assert precomputed.data.has_text_embeddings and precomputed.text_encoder is not None
    assert precomputed.text_encoder.zero_padding
    changed = ("run", "data", "text_encoder")
    assert dataclasses.replace(plain, **{name: getattr(precomputed, name) for name in changed}) == precomputed


def test_later_stages_begin_where_the_earlier_ones_end() -> None:
    for name, before in (("c2i_xl_512", "c2i_xl"), ("t2i_xxl_sft", "t2i_xxl")):
        first = config(before)
        end = sum(stage.steps for stage in first.stages)
        assert config(name).checkpoint.init_from == f"{first.run.dir}/checkpoints/step_{end:08d}"
        assert config(name).model == first.model


def test_published_samplers() -> None:
    for name, guidance in (("c2i_xl", 3.2), ("c2i_xl_512", 5.0)):
        sampler = config(name).samples.sampler
        assert (sampler.solver, sampler.num_steps, sampler.guidance) == ("euler", 100, guidance)
        assert (sampler.guidance_min, sampler.guidance_max, sampler.timestep_shift) == (0.1, 1.0, 1.0)
    for name in ("c2i_l", "baseline_l"):
        sampler = config(name).samples.sampler
        assert (sampler.solver, sampler.num_steps, sampler.guidance) == ("euler", 50, 1.0)
