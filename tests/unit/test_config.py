"""The configuration: strict, overridable, and round trip."""

import json
from pathlib import Path

import pytest

from deco_scale.config import ConfigError, dump_config, load_config
from deco_scale.parallel.config import ParallelConfig
from deco_scale.parallel.mesh import ParallelDims, accumulation_steps, fit_micro_batch, resolve_parallel_dims
from deco_scale.yaml import load_yaml
from tests.support import CONFIGS

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
        ("compile=1", ["compile=1", "boolean", "'auto'"]),
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


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: \xff")
    with pytest.raises(ConfigError, match=r"latin.yaml is not UTF-8"):
        load_config(tmp_path / "latin.yaml")
    write(tmp_path, list="[1]", twice="run:\n  dir: a\n  dir: b\n")
    with pytest.raises(ConfigError, match=r"list.yaml must be a mapping"):
        load_config(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match=r"twice.yaml is not valid YAML: key 'dir' is given twice, line 3"):
        load_config(tmp_path / "twice.yaml")


def test_base_mappings_merge_and_lists_and_null_replace(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    prompts = [f"samples.prompts={json.dumps(['a', 'b'])}"]
    write(tmp_path, first=dump_config(load_config(TINY, prompts)))
    write(tmp_path / "deep", second="base: ../first.yaml\nrun: {seed: 5}\nsamples: {prompts: [c]}\n")
    write(tmp_path, third="base: deep/second.yaml\nrun: {dir: there}\nwatchdog: null\nwandb: {mode: disabled}\n")
    expected = load_config(TINY, ["run.seed=5", "run.dir=there", "samples.prompts=[c]", "wandb.mode=disabled"])
    with pytest.raises(ConfigError, match=r"third.yaml \(base: .*second.yaml, .*first.yaml\): watchdog=None"):
        load_config(tmp_path / "third.yaml")
    cfg = load_config(tmp_path / "third.yaml", ["watchdog={}"])
    assert cfg == expected and "base" not in load_yaml(dump_config(cfg), "dump")


def test_stages_replace_those_of_the_base(tmp_path: Path) -> None:
    stage = "{name: only, resolution: 32, steps: 1, global_batch: 4, micro_batch: 4, lr: 1e-4}"
    write(tmp_path, first=dump_config(load_config(TINY, ["stages.demo.betas=[0.5, 0.6]"])))
    write(tmp_path, top=f"base: first.yaml\nstages: [{stage}]\n")
    (only,) = load_config(tmp_path / "top.yaml").stages
    assert (only.name, only.steps, only.lr) == ("only", 1, 1e-4)
    assert only.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a": "base: b.yaml"}, r"b.yaml \(base of .*a.yaml\): No such file"),
        ({"a": "base: b.yaml", "b": "base: a.yaml"}, r"a.yaml \(base of .*b.yaml\): .*each other's base"),
        ({"a": "base: ./a.yaml"}, r"a.yaml \(base of .*a.yaml\)"),
        ({"a": "base: s3://bucket/b.yaml"}, r"a.yaml: base='s3://bucket/b.yaml' must be the path of a local file"),
        ({"a": "base: [b.yaml]"}, r"a.yaml: base=\['b.yaml'\] must be"),
        ({"a": "base: b.yaml", "b": "run: ["}, r"b.yaml \(base of .*a.yaml\) is not valid YAML.*line 1, column 7"),
        ({"a": "base: b.yaml", "b": "wandb: {password: planted}"}, r"a.yaml \(base: .*b.yaml\): wandb.password"),
    ],
)
def test_a_bad_base_names_both_files(tmp_path: Path, files: dict[str, str], said: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(tmp_path / "a.yaml")
    assert "planted" not in str(caught.value)


def test_a_configuration_that_pyyaml_wrote_still_loads(tmp_path: Path) -> None:
    """Its forms that differ: 1.0e-05, quoted 1e-4 and yes, folded and escaped text."""
    changes = ["stages.demo.lr=1e-5", "wandb.name='yes'", "wandb.project='1e-4'"]
    cfg = load_config(TINY, [*changes, 'samples.prompts.0="a\\u00e9 b"'])
    old = dump_config(cfg).replace("1e-05", "1.0e-05").replace("name: yes", "name: 'yes'")
    old = old.replace('"a\\xE9 b"', '"a\\xE9\\\n  \\ b"')
    assert old.count("1.0e-05") == 1 and "\\xE9\\\n" in old and "'yes'" in old
    write(tmp_path, old=old)
    assert load_config(tmp_path / "old.yaml") == cfg


def test_impossible_batches_list_the_possible_ones() -> None:
    with pytest.raises(ConfigError, match=r"stages.a.micro_batch=6.*possible: \[1, 2, 7, 14\]"):
        accumulation_steps(global_batch=28, micro_batch=6, dp=2, where="stages.a")
    with pytest.raises(ConfigError, match=r"global_batch=24.*5 data-parallel.*\[1, 2, 3, 4, 6, 8"):
        accumulation_steps(global_batch=24, micro_batch=1, dp=5, where="stages.a")


@pytest.mark.parametrize(("ranks", "sizes"), [(8, (64, 16)), (16, (48, 16)), (64, (24, 8)), (512, (3, 1))])
def test_the_xxl_recipe_fits_any_number_of_ranks(ranks: int, sizes: tuple[int, int]) -> None:
    cfg = load_config(CONFIGS / "t2i_xxl.yaml")
    for stage, size in zip(cfg.stages, sizes, strict=True):
        batches = {"global_batch": stage.global_batch, "micro_batch": stage.micro_batch}
        assert fit_micro_batch(**batches, dp=ranks, where="x") == size
        assert accumulation_steps(**batches, dp=ranks, where="x") == stage.global_batch // ranks // size


@pytest.mark.parametrize("setting", [True, False, "auto"])
def test_compile_is_a_choice_or_automatic(setting: bool | str) -> None:
    assert load_config(TINY, [f"compile={str(setting).lower()}"]).compile == setting
    assert load_config(CONFIGS / "t2i_xxl.yaml").compile is True


def test_layouts() -> None:
    assert resolve_parallel_dims(ParallelConfig(dp_replicate=2), 8) == ParallelDims(2, 4)
    dims = resolve_parallel_dims(ParallelConfig(dp_replicate=2, tp=2), 8)
    assert dims == ParallelDims(2, 2, 2) and dims.dp == 4
    assert [dims.dp_rank(r) for r in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ConfigError, match=r"dp_replicate=3 does not divide 8 of 8 ranks.*\[1, 2, 4, 8\]"):
        resolve_parallel_dims(ParallelConfig(dp_replicate=3), 8)
    with pytest.raises(ConfigError, match="possible: dp_shard=8 or -1"):
        resolve_parallel_dims(ParallelConfig(dp_shard=3), 8)
    with pytest.raises(ValueError, match="HSDP"):
        ParallelConfig(engine="deepspeed", dp_replicate=2)
