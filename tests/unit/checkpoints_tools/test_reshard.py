"""``deco-ckpt reshard`` without processes: random models and layouts, refusals, bounded memory."""

import dataclasses
import json
import math
import os
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoints_tools import cli, reshard
from checkpoints_tools.base import CheckpointReader, TensorSpec
from checkpoints_tools.formats.canonical import CanonicalReader, write_canonical
from checkpoints_tools.formats.zero import writer
from checkpoints_tools.formats.zero.layout import partitions, sub_groups
from checkpoints_tools.formats.zero.writer import ZeroLayout
from checkpoints_tools.infer_config import denoiser_shapes, repa_shapes
from checkpoints_tools.registry import open_checkpoint
from checkpoints_tools.reshard import byte_count, plan_reshard
from deco_scale.checkpoint.format import CheckpointMeta, verify
from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig, stored_names

META = CheckpointMeta(
    step=7, stage="a", samples=70, seed=0, optimizer_steps=6, data_state={"at": 70}, parameter_digest="", config={}
)
MODEL = ModelConfig(
    kind="c2i_deco", dim=48, num_heads=4, num_blocks=1, patch_size=8, decoder_width=4, decoder_blocks=1,
    num_classes=3,
)  # fmt: skip


def make_canonical(
    folder: Path, model: ModelConfig = MODEL, *, head: int | None = 5, moments: bool = True, ema: bool = True
) -> CanonicalReader:
    """A checkpoint of random tensors."""
    weights = {f"denoiser.{n}": s for n, s in denoiser_shapes(model).items()}
    trained = weights | ({f"repa_head.{n}": s for n, s in repa_shapes(model.dim, head).items()} if head else {})
    kinds = ("model", "exp_avg", "exp_avg_sq") if moments else ("model",)
    shapes = {f"{kind}.{n}": s for kind in kinds for n, s in trained.items()}
    shapes |= {f"ema.{n}": s for n, s in weights.items()} if ema else {}
    shapes |= {"fp8.scale": (3,)}
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {n: torch.rand(s, generator=generator) for n, s in sorted(shapes.items())}
    write_canonical(folder, {n: TensorSpec(s) for n, s in shapes.items()}, tensors.__getitem__, META)
    return CanonicalReader(folder)


def write(source: CheckpointReader, target: Path, **options: Any) -> CheckpointReader:
    plan_reshard(source, **options).write(target, lambda name: None)
    return open_checkpoint(target)


def check_equal(found: CheckpointReader, wanted: CheckpointReader) -> None:
    assert list(found.specs) == list(wanted.specs)
    for name, spec in wanted.specs.items():
        assert torch.equal(found.read(name), wanted.read(name)), name
        if spec.shape and spec.shape[0] > 2:
            assert torch.equal(found.read(name, (1, spec.shape[0] - 1)), wanted.read(name)[1:-1]), name


@pytest.fixture
def canonical(tmp_path: Path) -> CanonicalReader:
    return make_canonical(tmp_path / "canonical")


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, ZeroLayout, int | None, bool]:
    """A small model, a layout that fits it, the width of a REPA head or none, and whether there are moments."""
    tp = draw(st.sampled_from([1, 2, 4]))
    heads = tp * draw(st.integers(1, 2))
    kind = draw(st.sampled_from(["t2i_deco", "c2i_deco", "c2i_baseline"]))
    sizes: dict[str, Any] = {"dim": heads * 12, "num_heads": heads, "num_blocks": 1, "patch_size": 8}
    if kind != "c2i_baseline":
        sizes |= {"decoder_width": draw(st.integers(1, 5)), "decoder_blocks": 1}
    if kind == "t2i_deco":
        sizes |= {
            "num_text_blocks": draw(st.integers(0, 1)),
            "text_dim": draw(st.integers(1, 7)),
            "text_tokens": draw(st.integers(1, 5)),
        }
    else:
        sizes["num_classes"] = draw(st.integers(1, 6))
    layout = ZeroLayout(draw(st.integers(1, 7)), tp, draw(st.sampled_from([1, 2, 3])), draw(st.booleans()))
    head = draw(st.one_of(st.none(), st.integers(1, 5)))
    return ModelConfig(kind=kind, **sizes), layout, head, draw(st.booleans())


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(cases())
def test_any_layout_and_back(case: tuple[ModelConfig, ZeroLayout, int | None, bool]) -> None:
    model, layout, head, moments = case
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        wanted = make_canonical(root / "canonical", model, head=head, moments=moments)
        native = write(wanted, root / "native", to="deepspeed", layout=layout, workers=16, memory=2**20)
        check_equal(native, wanted)
        assert native.model == model
        back = write(native, root / "back", to="canonical", files=2)
        check_equal(back, wanted)
        assert back.meta == wanted.meta
        verify(back.path)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=2), min_size=1, max_size=6),
    st.integers(1, 6),
    st.sampled_from([1, 2, 3]),
)
def test_every_element_has_one_place(shapes: list[list[int]], dp: int, stage: int) -> None:
    group = {f"p{i}": tuple(shape) for i, shape in enumerate(shapes)}
    parts = partitions([group], dp=dp, stage=stage)
    places = set()
    for name, shape in group.items():
        elements = [e.first + i for e in parts.extents[name] for i in range(e.count)]
        assert elements == list(range(prod(shape)))
        for extent in parts.extents[name]:
            assert extent.start + extent.count <= parts.used[extent.rank][0] <= parts.sizes[0]
            places |= {(extent.rank, extent.start + i) for i in range(extent.count)}
    assert len(places) == sum(prod(shape) for shape in group.values())


def test_tensor_parallel_1_2_4_1(canonical: CanonicalReader, tmp_path: Path) -> None:
    source: CheckpointReader = canonical
    for tp, stage in ((1, 3), (2, 1), (4, 3), (1, 2)):
        layout = ZeroLayout(dp=2, tp=tp, stage=stage)
        source = write(source, tmp_path / f"native_{tp}_{stage}", to="deepspeed", layout=layout)
    check_equal(write(source, tmp_path / "back", to="canonical"), canonical)


def test_universal_and_number_of_files(canonical: CanonicalReader, tmp_path: Path) -> None:
    universal = write(canonical, tmp_path / "universal", to="universal", workers=2)
    check_equal(universal, canonical)
    back = write(universal, tmp_path / "back", to="canonical", files=3)
    assert back.meta == canonical.meta
    assert len(list(back.path.glob("*.distcp"))) == 3
    check_equal(write(back, tmp_path / "one", to="canonical", files=1), canonical)


@pytest.mark.parametrize("tp", [1, 2])
def test_files_have_one_parameter_where_several_tensors_are_stored(
    tp: int, canonical: CanonicalReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSpeed saves the module; files of a module with a parameter for each are read as well."""
    layout, name = ZeroLayout(dp=3, tp=tp, stage=1), "denoiser.blocks.0.mlp.{}.weight"
    native = write(canonical, tmp_path / "native", to="deepspeed", layout=layout)
    module = torch.load(next(native.path.glob("mp_rank_00_*")), weights_only=False)["module"]
    gate, up = (canonical.read("model." + name.format(part)).chunk(tp)[0] for part in ("gate", "up"))
    assert torch.equal(module[name.format("gate_up")], torch.cat([gate, up]))
    assert name.format("gate") not in module
    # Without entries in the table, files are as they were before it.
    shapes = denoiser_shapes(MODEL)
    monkeypatch.setattr(writer, "denoiser_shapes", lambda model: shapes)
    monkeypatch.setattr(stored_names, "FUSED", {})
    older, universal = tmp_path / "older", tmp_path / "older_universal"
    plan_reshard(canonical, to="deepspeed", layout=layout).write(older)
    plan_reshard(canonical, to="universal").write(universal)
    assert next(universal.glob("*/zero/" + name.format("gate"))).is_dir()
    monkeypatch.undo()
    for path in (older, universal):
        check_equal(open_checkpoint(path), canonical)


def test_large_models_have_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints_tools.formats.zero.layout.SUB_GROUP_ELEMENTS", 500)
    wanted = make_canonical(tmp_path / "canonical")
    shapes = {f"denoiser.{n}": s for n, s in denoiser_shapes(MODEL).items()}
    assert len(sub_groups(shapes, dp=2, stage=3)) > 2
    check_equal(write(wanted, tmp_path / "z", to="deepspeed", layout=ZeroLayout(2, 1, 3)), wanted)


def test_ema_is_named_and_explicit(tmp_path: Path) -> None:
    wanted = make_canonical(tmp_path / "canonical", ema=False)
    with pytest.raises(ConfigError, match="no EMA; --ema-from model"):
        plan_reshard(wanted, to="canonical")
    made = write(wanted, tmp_path / "made", to="universal", ema_from_model=True)
    name = "denoiser.label_embed.table.weight"
    assert torch.equal(made.read(f"ema.{name}"), wanted.read(f"model.{name}"))
    with pytest.raises(ConfigError, match="has an EMA"):
        plan_reshard(made, to="canonical", ema_from_model=True)


def _native(canonical: CanonicalReader, tmp_path: Path, stage: int = 3) -> Path:
    write(canonical, tmp_path / "native", to="deepspeed", layout=ZeroLayout(2, 2, stage))
    return tmp_path / "native" / "global_step7"


@pytest.mark.parametrize("stage", [1, 3])
def test_every_missing_file_is_named(canonical: CanonicalReader, tmp_path: Path, stage: int) -> None:
    folder = _native(canonical, tmp_path, stage)
    for file in sorted(folder.glob("*.pt")):
        held = file.rename(tmp_path / "held")
        with pytest.raises(ConfigError, match=r"rank \d.* is missing|has optimizer files of"):
            open_checkpoint(folder)
        held.rename(file)
    check_equal(open_checkpoint(folder), canonical)


def test_cut_short_files_are_named(canonical: CanonicalReader, tmp_path: Path) -> None:
    folder = _native(canonical, tmp_path)
    for file in sorted(folder.glob("*.pt")):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ConfigError, match=file.name):
            open_checkpoint(folder)
        file.write_bytes(whole)


def _change(file: Path, change: Any) -> None:
    """Edit a file of plain tensors and numbers."""
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def test_mixed_steps_and_other_shapes_are_refused(canonical: CanonicalReader, tmp_path: Path) -> None:
    folder = _native(canonical, tmp_path)
    file = folder / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    whole = file.read_bytes()
    _change(file, lambda content: content.update(global_steps=8))
    with pytest.raises(ConfigError, match="mixes steps"):
        open_checkpoint(folder)
    file.write_bytes(whole)
    for one in folder.glob("*mp_rank_00_model_states.pt"):
        _change(one, lambda c: c["param_shapes"][0].update({"denoiser.patch_embed.bias": torch.Size([49])}))
    with pytest.raises(ConfigError, match="patch_embed.bias|flat buffer"):
        open_checkpoint(folder)


def test_unknown_parameters_are_refused(canonical: CanonicalReader, tmp_path: Path) -> None:
    folder = _native(canonical, tmp_path)
    for one in folder.glob("*model_states.pt"):
        _change(one, lambda content: content["param_shapes"][0].update({"other.weight": torch.Size([1])}))
    with pytest.raises(ConfigError, match="unknown parameter 'other.weight'"):
        open_checkpoint(folder)


def test_a_side_file_of_another_step_is_refused(canonical: CanonicalReader, tmp_path: Path) -> None:
    folder = _native(canonical, tmp_path)
    for one in folder.glob("*model_states.pt"):
        _change(one, lambda content: content.update(global_steps=9))
    with pytest.raises(ConfigError, match="is of step 7, the files beside it of step 9"):
        open_checkpoint(folder)


def test_row_parallel_weights_merged_along_the_wrong_side_are_refused(
    canonical: CanonicalReader, tmp_path: Path
) -> None:
    write(canonical, tmp_path / "u", to="universal")
    file = tmp_path / "u" / "global_step7" / "zero" / "denoiser.blocks.0.attn.proj.weight" / "fp32.pt"
    _change(file, lambda content: content.update(param=torch.cat(content["param"].chunk(2, dim=1))))
    with pytest.raises(ConfigError, match=r"attn\.proj\.weight has shape \(96, 24\), expected \(48, 48\)"):
        open_checkpoint(tmp_path / "u")


def test_no_code_is_run(canonical: CanonicalReader, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "hacked"),)

    folder = _native(canonical, tmp_path)
    write(canonical, tmp_path / "u", to="universal")
    victims = [next(folder.glob("*optim_states.pt")), next(folder.glob("*model_states.pt"))]
    victims.append(tmp_path / "u" / "global_step7" / "zero" / "optimizer_state.pt")
    for file in victims:
        torch.save({"optimizer_state_dict": Attack()}, file)
        with pytest.raises(ConfigError, match="refused.*mkdir"):
            open_checkpoint(file.parent.parent if file.parent.name == "zero" else folder)
    assert not (tmp_path / "hacked").exists()


def test_nothing_half_written_is_left(
    canonical: CanonicalReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(reshard, "write_side", refuse)
        code = cli.main(["reshard", str(canonical.path), str(tmp_path / "u"), "--to", "universal"])
    assert code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["canonical"]


def test_memory_bounds_what_is_read_at_once(canonical: CanonicalReader, tmp_path: Path) -> None:
    memory, workers, read, largest = 170_000, 8, canonical.read, 0

    def counted(name: str, rows: tuple[int, int] | None = None) -> Tensor:
        nonlocal largest
        tensor = read(name, rows)
        if not name.startswith(("ema.", "fp8.")):
            largest = max(largest, tensor.nbytes)
        return tensor

    canonical.read = counted  # type: ignore[method-assign]
    write(canonical, tmp_path / "z", to="deepspeed", layout=ZeroLayout(2, 1, 1), workers=workers, memory=memory)
    assert 0 < largest * workers <= memory
    assert 4 * largest < max(spec.nbytes for spec in canonical.specs.values())
    with pytest.raises(ConfigError, match="--memory 100:"):
        plan_reshard(canonical, to="canonical", memory=100)


def test_byte_counts() -> None:
    assert (byte_count("10"), byte_count("3MiB"), byte_count("4GiB")) == (10, 3 * 2**20, 2**32)
    for text in ("0", "4GB", "-1MiB", ""):
        with pytest.raises(ValueError):
            byte_count(text)


def test_command(canonical: CanonicalReader, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, native = str(canonical.path), tmp_path / "native"
    to = ["--to", "deepspeed", "--dp", "3", "--tp", "2", "--zero-stage", "2"]
    assert cli.main(["reshard", source, str(native), *to, "--dry-run"]) == 0
    assert "zero_pp_rank_2_mp_rank_01_optim_states.pt" in capsys.readouterr().out
    assert not native.exists()
    assert cli.main(["reshard", source, str(native), *to]) == 0
    assert cli.main(["diff", source, str(native)]) == 0
    assert cli.main(["reshard", source, str(native), *to]) == 2
    assert cli.main(["reshard", source, str(tmp_path / "x"), *to[:-4], "--tp", "3", "--zero-stage", "2"]) == 2
    assert "possible: [1, 2, 4]" in capsys.readouterr().err
    assert cli.main(["reshard", source, str(tmp_path / "x"), "--to", "deepspeed"]) == 2
    assert cli.main(["reshard", source, str(tmp_path / "x"), "--to", "universal", "--files", "2"]) == 2


def test_a_plain_runs_files_get_a_configuration(canonical: CanonicalReader, tmp_path: Path) -> None:
    folder = _native(canonical, tmp_path)
    (folder / "deco_scale.safetensors").unlink()
    found = open_checkpoint(folder)
    back = write(found, tmp_path / "back", to="canonical", ema_from_model=True)
    assert back.meta is not None
    assert (back.meta.step, back.meta.samples, back.meta.optimizer_steps) == (7, 70, 6)
    assert back.meta.config["model"] == json.loads(json.dumps(dataclasses.asdict(MODEL)))


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 1.0), (10, 1.0), (12, 1.0), (20, 1.0), (21, 0.2), (32, 1 + math.cos(math.pi / 4))]
)
def test_exported_learning_rate_is_that_of_the_last_step(step: int, rate: float) -> None:
    ramp = {"kind": "cosine", "warmup_steps": 10, "decay_steps": 0, "min_lr_ratio": 0.0}
    common = {"resolution": 16, "micro_batch": 1, "betas": [0.9, 0.98]}
    # The first stage is of a version without schedules.
    stages = [
        {"name": "a", "steps": 20, "global_batch": 2, "lr": 1.0, **common},
        {"name": "b", "steps": 14, "global_batch": 8, "lr": 1.0, "lr_schedule": ramp, "lr_scaling": "sqrt",
         "lr_reference_batch": 2, **common},
    ]  # fmt: skip
    meta = dataclasses.replace(META, config={"stages": stages}, step=step, stage="a" if step <= 20 else "b")
    group = writer.adamw_group(meta, [0])
    # The batch is 4 times the reference, so the rate twice; step 32 is the second of the four that fall.
    assert group["lr"] == pytest.approx(rate) and group["betas"] == (0.9, 0.98)
