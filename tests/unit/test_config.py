"""The configuration: strict, overridable, and round trip."""

from pathlib import Path

import pytest

from deco_scale.config import ConfigError, dump_config, load_config
from deco_scale.parallel.layout import (
    Layout,
    ParallelConfig,
    accumulation_steps,
    resolve_layout,
)

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "t2i_tiny.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_resolved_config_reads_back_equal(path: Path, tmp_path: Path) -> None:
    cfg = load_config(path)
    (tmp_path / "config.yaml").write_text(dump_config(cfg))
    assert load_config(tmp_path / "config.yaml") == cfg


def test_xxl_is_the_published_recipe() -> None:
    cfg = load_config(CONFIGS / "t2i_xxl.yaml")
    first, second = cfg.stages
    assert (first.resolution, first.steps, first.global_batch, first.lr) == (256, 200_000, 1536, 2e-4)
    assert (second.resolution, second.global_batch, second.lr) == (512, 512, 1e-4)
    assert (first.timestep_shift, second.timestep_shift) == (2.0, 4.0)
    assert first.betas == second.betas == (0.9, 0.95)
    assert (cfg.objective.repa_layer, cfg.objective.repa_weight) == (6, 0.5)
    assert (cfg.optimizer.ema_decay, cfg.optimizer.clip_norm) == (0.9999, 1.0)
    # 64 x 8 GPUs x 3 accumulation steps, as published.
    assert accumulation_steps(global_batch=1536, micro_batch=64, dp=8, where="x") == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.dmi=3", ["model.dmi", "did you mean 'dim'"]),
        ("modle.dim=3", ["modle", "did you mean 'model'"]),
        ("model.dim=wide", ["model.dim='wide'", "integer"]),
        ("run.seed=1.5", ["run.seed=1.5", "integer"]),
        ("compile=1", ["compile=1", "boolean"]),
        ("parallel.engine=horovod", ["parallel.engine='horovod'", "'fsdp' or 'deepspeed'"]),
        ("parallel.zero_stage=4", ["parallel.zero_stage=4", "0, 1, 2 or 3"]),
        ("model.dim=190", ["model", "dim=190", "num_heads=4"]),
        ("model.num_classes=7", ["num_classes=7", "no meaning for t2i_deco"]),
        ("stages.demo.resolution=33", ["stages.demo.resolution=33", "patch_size=8"]),
        ("stages.demo.betas=[0.9, 1.5]", ["betas", "[0, 1)"]),
        ("stages.nope.lr=1", ["no entry 'nope'", "demo"]),
        ("text_encoder=null", ["text_encoder is missing"]),
        ("text_encoder.max_tokens=5", ["max_tokens=5", "model.text_tokens=16"]),
        ("objective.repa_weight=1.0", ["image_encoder is missing"]),
        ("objective.freq_quality=0", ["freq_quality=0", "1..100"]),
        ("parallel={engine: deepspeed, tp: 2, zero_stage: 0}", ["zero_stage=0", "possible: 1, 2, 3"]),
        (
            "parallel={engine: deepspeed, activation_checkpointing: selective}",
            ["does not work with zero_stage=3", "possible: none, full"],
        ),
        ("data.target=label", ["data.target=label", "needs caption"]),
        ("run.seed", ["key.path=value"]),
        ("run.seed.x=1", ["run.seed", "is a value"]),
        ("run.seed=[", ["not valid YAML"]),
        ("optimizer.eps=.nan", ["nan"]),
    ],
)
def test_bad_override_names_key_value_and_what_is_allowed(override: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, [override])
    for part in said:
        assert part in str(caught.value)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, ["model.dmi=1", "run.seed=x"])
    assert len(str(caught.value).splitlines()) == 2


def test_missing_file_and_repeated_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "twice.yaml").write_text("run: {dir: a}\nrun: {dir: b}\n")
    with pytest.raises(ConfigError, match="'run' is given twice"):
        load_config(tmp_path / "twice.yaml")


def test_scientific_notation_is_a_number() -> None:
    assert load_config(TINY, ["stages.demo.lr=2e-4"]).stages[0].lr == 2e-4


def test_impossible_batches_list_the_possible_ones() -> None:
    with pytest.raises(ConfigError, match=r"stages.a.micro_batch=5.*possible: \[1, 2, 3, 4, 6, 12\]"):
        accumulation_steps(global_batch=24, micro_batch=5, dp=2, where="stages.a")
    with pytest.raises(ConfigError, match=r"global_batch=24.*5 data-parallel.*\[1, 2, 3, 4, 6, 8"):
        accumulation_steps(global_batch=24, micro_batch=1, dp=5, where="stages.a")


def test_compile_under_tp_refuses_what_it_cannot_do() -> None:
    parallel = "parallel={engine: fsdp, tp: 2, activation_checkpointing: selective}"
    with pytest.raises(ConfigError, match=r"activation_checkpointing=selective; possible: none, full"):
        load_config(TINY, ["compile=true", parallel])
    with pytest.raises(ConfigError, match=r"compile=true with parallel.tp > 1 needs parallel.engine: fsdp"):
        load_config(TINY, ["compile=true", "parallel={engine: deepspeed, tp: 2}"])


def test_layouts() -> None:
    assert resolve_layout(ParallelConfig(dp_replicate=2), 8) == Layout(2, 4)
    layout = resolve_layout(ParallelConfig(dp_replicate=2, tp=2), 8)
    assert layout == Layout(2, 2, 2) and layout.dp == 4
    assert [layout.dp_rank(r) for r in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ConfigError, match=r"dp_replicate=3 does not divide 8 of 8 ranks.*\[1, 2, 4, 8\]"):
        resolve_layout(ParallelConfig(dp_replicate=3), 8)
    with pytest.raises(ConfigError, match="possible: dp_shard=8 or -1"):
        resolve_layout(ParallelConfig(dp_shard=3), 8)
    with pytest.raises(ValueError, match="HSDP"):
        ParallelConfig(engine="deepspeed", dp_replicate=2)
