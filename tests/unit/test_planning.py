"""The planner against the model: FLOPs, state, activations and traffic of memory; and what it refuses."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deco_scale import cli
from deco_scale.config import load_config
from deco_scale.errors import ConfigError
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.layers import Block
from deco_scale.models.pixel_decoder import PixelDecoder
from deco_scale.models.position import rope_angles
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.parallel.layout import (
    ActivationCheckpointing,
    Layout,
    ParallelConfig,
    accumulation_steps,
    resolve_layout,
)
from deco_scale.parallel.plan import check_tp, layout_rows
from deco_scale.parallel.recompute import apply_recompute
from deco_scale.planning.communication import Traffic
from deco_scale.planning.flops import forward_flops, training_flops
from deco_scale.planning.forecast import all_plans, as_configured, fits, forecast_stage, recommend
from deco_scale.planning.hardware import GPUS, Device, gpu_device, gpu_named
from deco_scale.planning.layouts import possible_layouts
from deco_scale.planning.measured import ceilings_of, compare, median_errors, predict, read_results
from deco_scale.planning.memory import activation_bytes, memory_by_part, state_bytes
from deco_scale.planning.network import seconds_of
from deco_scale.planning.passes import block_moved, decoder_moved
from deco_scale.planning.state import held_of_state, state_by_part
from deco_scale.planning.step_time import step_by_part
from deco_scale.planning.workload import Workload
from deco_scale.training.settings import StageConfig
from tests.straightforward import saved_bytes

ROOT = Path(__file__).resolve().parents[2]
XXL = ROOT / "configs" / "t2i_xxl.yaml"
TINY = ROOT / "configs" / "t2i_tiny.yaml"
SMALL = ModelConfig(
    kind="t2i_deco", dim=128, num_heads=4, num_blocks=3, num_text_blocks=2, patch_size=16, decoder_width=32,
    decoder_blocks=3, text_dim=96, text_tokens=32,
)  # fmt: skip
CLASSES = ModelConfig(
    kind="c2i_deco", dim=128, num_heads=4, num_blocks=3, patch_size=16, decoder_width=16, decoder_blocks=2,
    num_classes=10,
)  # fmt: skip
BASELINE = ModelConfig(kind="c2i_baseline", dim=128, num_heads=4, num_blocks=3, num_classes=10)
REPA_DIM = 48


def _any(parallel: ParallelConfig) -> bool:
    return True


def _stage(**changes: Any) -> StageConfig:
    settings: dict[str, Any] = {"name": "s", "resolution": 256, "steps": 10, "global_batch": 64, "micro_batch": 4}
    return StageConfig(lr=1e-4, **{**settings, **changes})


@pytest.mark.parametrize(("side", "anchor"), [(256, 1.17e12), (512, 4.39e12)])
def test_flops_of_a_training_image_are_the_anchors(side: int, anchor: float) -> None:
    # The anchors have three digits and count norms as well: within 1%.
    assert training_flops(load_config(XXL).model, side, side) == pytest.approx(anchor, rel=0.01)


@pytest.mark.parametrize("model", [SMALL, CLASSES, BASELINE], ids=lambda m: m.kind)
def test_flops_are_those_that_pytorch_counts(model: ModelConfig) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    denoiser, grid = Denoiser(model), model.grid(128, 128)
    condition = torch.zeros(1, dtype=torch.int64)
    if model.kind == "t2i_deco":
        condition = torch.randn(1, model.text_tokens, model.text_dim)
    # Attention as plain products, which the counter knows on any device.
    for module in denoiser.modules():
        if hasattr(module, "backend"):
            module.backend = "math"
    patches = torch.randn(1, grid[0] * grid[1], model.patch_values)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(patches, torch.rand(1), condition, grid=grid)
    expected = counter.get_total_flops()
    if model.decoder_width:
        # The model's formula embeds the position of every pixel; the decoder does it once for a patch.
        wide, pixels, channels = model.decoder_width, 128**2, model.channels
        position = 2 * (64 * wide + wide * wide)
        expected += (pixels - model.patch_size**2) * position - 2 * wide * wide * channels
    assert forward_flops(model, 128, 128) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("mesh", [(1, 1), (4, 1), (2, 2)])
def test_state_is_as_often_as_held(engine: Any, stage: Any, mesh: tuple[int, int]) -> None:
    if stage == 0 and (engine == "deepspeed" and mesh[1] > 1):
        pytest.skip("ZeRO-0 has no tensor parallelism")
    layout = Layout(1, *mesh)
    parallel = ParallelConfig(engine=engine, zero_stage=stage, dp_shard=mesh[0], tp=mesh[1])
    rows = layout_rows(SMALL, layout)
    cut, whole = sum(row.local_bytes for row in rows), sum(4 * row.tp_numel for row in rows)
    cuts, wholes = held_of_state(engine, stage)
    found = state_bytes(Workload(model=SMALL, compute="fp32"), parallel, layout)
    assert sum(found.values()) == cuts * cut + wholes * whole
    assert set(found) == set(state_by_part(engine, stage))
    if mesh == (1, 1):
        # One rank holds whole copies, as tests/distributed/test_memory.py measures: 4 and 6 of them, and fsdp's
        # gradients.
        whole_bytes = 4 * sum(p.numel() for p in Denoiser(SMALL).parameters())
        expected = 5 if engine == "fsdp" or stage == 0 else 6
        assert sum(found.values()) == expected * whole_bytes


def test_the_repa_head_has_state_but_no_average() -> None:
    parallel, layout = ParallelConfig(dp_shard=1), Layout(1, 1)
    without = state_bytes(Workload(model=SMALL, compute="fp32"), parallel, layout)
    work = Workload(model=SMALL, compute="fp32", repa_dim=REPA_DIM)
    head = Objective(Denoiser(SMALL), ObjectiveConfig(repa_layer=1), encoder_dim=REPA_DIM).repa_head
    assert head is not None
    count = sum(p.numel() for p in head.parameters())
    assert work.repa_parameters == count
    more = {part: size - without[part] for part, size in state_bytes(work, parallel, layout).items()}
    assert more == {"weights": 4 * count, "gradients": 4 * count, "moments": 8 * count, "average": 0}


def _objective(model: ModelConfig, mode: ActivationCheckpointing) -> tuple[Objective, Callable[[], Tensor]]:
    torch.manual_seed(0)
    objective = Objective(Denoiser(model), ObjectiveConfig(repa_layer=2), encoder_dim=REPA_DIM)
    apply_recompute(objective.denoiser.transformer_blocks, mode)
    images, tokens = 1, 64
    condition = torch.zeros(images, dtype=torch.int64)
    if model.kind == "t2i_deco":
        condition = torch.randn(images, model.text_tokens, model.text_dim)
    image, noise = torch.rand(2, images, 3, 128, 128).unbind()
    features = torch.randn(images, tokens, REPA_DIM)
    return objective, lambda: objective(image, noise, torch.rand(images), condition, features)["loss"]


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("model", [SMALL, CLASSES, BASELINE], ids=lambda m: m.kind)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(
    model: ModelConfig, compute: Any, mode: ActivationCheckpointing
) -> None:
    objective, forward = _objective(model, mode)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bf16"):
        kept = saved_bytes(objective, forward)
    if compute == "bf16":
        # Autocast's copies of weights belong to the working weights; all linears but the head's small ones.
        kept -= _cast_weights(objective, forward)
    work = Workload(model=model, compute=compute, repa_dim=REPA_DIM)
    parallel = ParallelConfig(dp_shard=1, activation_checkpointing=mode)
    planned = activation_bytes(work, parallel, Layout(1, 1), images=1, resolution=128, kind="cpu")
    # Picture and noise are inputs that no operation keeps; what is held for a moment comes in backward.
    total = sum(planned.values()) - planned["moment"] - 2 * 4 * 3 * 128**2
    print(model.kind, compute, mode, f"{total / 2**20:.2f} MiB planned, {kept / 2**20:.2f} kept")
    # Left out: times, modulations, statistics of norms, rotary angles.
    assert total == pytest.approx(kept, rel=0.04)


def _cast_weights(objective: Objective, forward: Callable[[], Tensor]) -> int:
    """Bytes of the bf16 copies that autocast keeps of weights in one forward pass."""
    shapes = {tuple(p.shape) for p in objective.parameters() if p.ndim == 2}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage, shape = tensor.untyped_storage(), tuple(tensor.shape)
        is_weight = tensor.dtype == torch.bfloat16 and shape[::-1] in shapes and not tensor.is_contiguous()
        if is_weight and storage.nbytes() == 2 * tensor.numel():
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        out = forward()
    assert out.requires_grad
    return sum(sizes.values())


class _Moved(TorchDispatchMode):
    """Adds up what operations read and write, matrix products and attention apart."""

    PRODUCTS = ("mm", "addmm", "bmm", "_scaled_dot_product")
    NOTHING = ("empty_like", "empty", "detach", "new_empty_strided", "empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.product_bytes = self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        name = func._schema.name.split("::")[1]
        own = {x.untyped_storage().data_ptr() for x in read}
        is_view = all(x.untyped_storage().data_ptr() in own for x in written) and not name.endswith("_")
        if is_view or name in self.NOTHING:
            return out
        self.count += 1
        size = sum(x.numel() * x.element_size() for x in (*read, *written))
        if name.startswith(self.PRODUCTS):
            self.product_bytes += size
        else:
            self.bytes += size
        return out


def _both_passes(forward: Callable[[], Tensor]) -> tuple[_Moved, _Moved]:
    with _Moved() as first:
        out = forward()
    with _Moved() as second:
        out.backward(torch.ones_like(out))
    return first, second


@pytest.mark.parametrize("context", [0, 32])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_bytes_that_a_block_moves(compute: Any, context: int) -> None:
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    model = dataclasses.replace(SMALL, text_tokens=32)
    block = Block(
        model.dim, model.num_heads, mlp_hidden_dim=model.mlp_hidden_dim, with_context=context > 0, cast_first=False
    ).to(dtype)  # fmt: skip
    sizes = (256, 1, 32)
    x, condition, text = (torch.randn(2, n, model.dim, dtype=dtype, requires_grad=True) for n in sizes)
    angles = rope_angles(16, 16, head_dim=model.head_dim, scale="grid", device=torch.device("cpu"))
    extra = (angles, text) if context else ()
    passes = _both_passes(lambda: block(x, condition, *extra))
    work = Workload(model=model, compute=compute)
    planned = block_moved(work, tokens=256, context=context, rotary=context > 0, tp=1, kind="cpu")
    for counted, expected in zip(passes, planned, strict=True):
        print(compute, context, counted.bytes, 2 * expected, counted.count)
        # Statistics, angles and modulations are left out.
        assert 2 * expected == pytest.approx(counted.bytes, rel=0.04)


@pytest.mark.parametrize("blocks", [1, 3])
def test_bytes_that_the_torch_decoder_moves(blocks: int) -> None:
    decoder = PixelDecoder(dim=16, width=32, num_blocks=blocks, patch_size=16, channels=3, features="rotary")
    patches, token = torch.randn(1, 256, 768), torch.randn(1, 256, 16, requires_grad=True)
    passes = _both_passes(lambda: decoder(patches, token))
    work = Workload(model=dataclasses.replace(SMALL, decoder_blocks=blocks), compute="fp32")
    planned = decoder_moved(work, resolution=256, tp=1)
    for counted, expected in zip(passes, planned, strict=True):
        # Pixels and the condition's projection come on top.
        assert expected == pytest.approx(counted.bytes + counted.product_bytes, rel=0.06)


@pytest.mark.parametrize("gpus", [1, 6, 8, 16])
def test_every_layout_is_one_that_a_run_accepts(gpus: int) -> None:
    model, device = load_config(XXL).model, gpu_device("h100", compute="bf16")
    stages = (_stage(global_batch=48), _stage(name="t", resolution=512, global_batch=96))
    layouts = list(possible_layouts(model, gpus, allowed=_any))
    assert len(layouts) == len(set(map(repr, layouts)))
    plans = all_plans(Workload(model=model, compute="bf16"), stages, layouts, device, gpus=gpus)
    for plan in plans:
        layout = resolve_layout(plan.parallel, gpus)
        assert layout.dp * layout.tp == gpus and layout.tp <= 8
        check_tp(model, layout.tp)
        for forecast in plan.stages:
            steps = accumulation_steps(
                global_batch=forecast.stage.global_batch,
                micro_batch=forecast.stage.micro_batch,
                dp=layout.dp,
                where="here",
            )
            assert steps == forecast.accumulation
    best = recommend(plans, device)
    assert best.fits(device) and best.seconds == min(p.seconds for p in plans if p.fits(device))
    assert {p.parallel.engine for p in plans} == {"fsdp", "deepspeed"}


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("tp", [1, 2])
def test_more_gpus_never_need_more_memory(engine: Any, tp: int) -> None:
    work = Workload(model=load_config(XXL).model, compute="bf16")
    for stage in (1, 2, 3):
        sizes = []
        for gpus in (2, 4, 8, 16, 64):
            parallel = ParallelConfig(engine=engine, zero_stage=stage, tp=tp)
            layout = resolve_layout(parallel, gpus)
            parts = memory_by_part(work, parallel, layout, images=4, accumulation=2, resolution=256, kind="cuda")
            sizes.append(sum(parts.values()))
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("fused", [False, True])
def test_bigger_batches_never_take_less(mode: ActivationCheckpointing, fused: bool) -> None:
    work = Workload(model=load_config(XXL).model, compute="bf16", fused=fused)
    device, parallel = gpu_device("h100", compute="bf16"), ParallelConfig(activation_checkpointing=mode)
    layout, sizes = resolve_layout(parallel, 16), (1, 2, 4, 8, 16, 64)
    options: dict[str, Any] = {"accumulation": 2, "resolution": 256}
    seconds = [sum(step_by_part(work, parallel, layout, device, images=n, **options).values()) for n in sizes]
    memory = [
        sum(memory_by_part(work, parallel, layout, images=n, kind="cuda", **options).values()) for n in sizes
    ]
    assert seconds == sorted(seconds) and memory == sorted(memory)
    # Enough for the host not to be the limit: time grows with the batch.
    assert seconds[-1] > 3 * seconds[-2]


def test_recomputation_trades_time_for_memory() -> None:
    work, device = Workload(model=load_config(XXL).model, compute="bf16"), gpu_device("h100", compute="bf16")
    stage = _stage(micro_batch=16, global_batch=128)
    found = [
        forecast_stage(work, stage, ParallelConfig(activation_checkpointing=mode), device, gpus=8)
        for mode in ("none", "selective", "full")
    ]
    memory, seconds = [f.memory_bytes for f in found], [f.step_s for f in found]
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == 3
    assert seconds == sorted(seconds) and len(set(seconds)) == 3


def test_links_are_as_fast_as_the_slower_of_node_and_network() -> None:
    device = gpu_device("h100", compute="bf16", network_gbps=400)
    line = Traffic("weights", "all-gather", "dp_shard", 10**9)
    inside = seconds_of(line, Layout(1, 8), device)
    assert inside == pytest.approx(1e9 * 7 / 8 / (450e9 * 0.8))
    # Two nodes: half of it enters each through eight adapters.
    assert seconds_of(line, Layout(1, 16), device) == pytest.approx(
        max(1e9 * 15 / 16 / (450e9 * 0.8), 1e9 / 2 / (8 * 50e9 * 0.8))
    )
    # One rank of each replica group in a node: one adapter.
    replicas = Traffic("gradients", "all-reduce", "dp_replicate", 10**9)
    assert seconds_of(replicas, Layout(2, 8), device) == pytest.approx(2 * 1e9 / 2 / (50e9 * 0.8))
    slow = gpu_device("h100", compute="bf16", network_gbps=100)
    assert seconds_of(replicas, Layout(2, 8), slow) == pytest.approx(4 * 2 * 1e9 / 2 / (50e9 * 0.8))
    assert seconds_of(line, Layout(1, 1), device) == 0


def test_rates_say_whether_they_were_measured() -> None:
    def origins(device: Device) -> dict[str, str]:
        return {figure.what: figure.origin for figure in device.figures}

    assert origins(gpu_device("h100", compute="bf16"))["GEMM"] == "measured"
    assert gpu_device("h100", compute="bf16").gemm_flops == 798e12
    assert origins(gpu_device("b200", compute="bf16"))["GEMM"] == "assumed"
    assert gpu_device("b200", compute="fp8").fp8_flops == 4.5e15 * 0.65
    assert gpu_named("NVIDIA H100 80GB HBM3") == "h100" and gpu_named("some processor") is None


def _result(**changes: Any) -> dict[str, Any]:
    model = dataclasses.asdict(load_config(XXL).model)
    return {
        "kind": "throughput", "date": "2026-01-02", "commit": "abc", "machine": "x86_64", "python": "3.11",
        "torch": "2.13.0", "config": "t2i_xxl.yaml", "config_digest": "0", "model": model,
        "device": "NVIDIA H100 80GB HBM3", "threads": 1, "world": 1, "engine": "fsdp", "zero_stage": None,
        "layout": {"dp_replicate": 1, "dp_shard": 1, "tp": 1}, "compute": "bf16", "kernels": "triton",
        "attention": "auto", "compile": False, "activation_checkpointing": "none", "resolution": 256,
        "micro_batch": 32, "accumulation": 1, "step_s": 1.0, "images_per_s": 32.0, "tflops_per_s": 1.0,
        "gemm_tflops_per_s": 700.0, "copy_gb_per_s": 2900.0, "mfu_of_gemm": 0.1, "mfu_of_datasheet": 0.1,
        "peak_memory_bytes": 2**35, "data_wait_s": 0.0, "parts": {}, **changes,
    }  # fmt: skip


def _write(folder: Path, name: str, content: Any) -> Path:
    path = folder / f"throughput_{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_error_is_stated_for_every_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path, "a", _result())
    measured, _ = read_results(tmp_path)
    forecast = predict(measured[0])
    # Files whose true values are known: the prediction is half, and one and a half times, of what was measured.
    memory = forecast.memory_bytes - forecast.memory["reserve"]
    _write(tmp_path, "a", _result(step_s=2 * forecast.step_s, peak_memory_bytes=2 * memory))
    _write(tmp_path, "b", _result(step_s=forecast.step_s / 1.5, peak_memory_bytes=memory / 1.5))
    _write(tmp_path, "other", {"kind": "throughput_straightforward"})
    measured, skipped = read_results(tmp_path)
    assert skipped == 1 and [m.file for m in measured] == ["throughput_a.json", "throughput_b.json"]
    errors = [compare(m) for m in measured]
    assert [e.step_error for e in errors] == pytest.approx([-0.5, 0.5])
    assert [e.memory_error for e in errors] == pytest.approx([-0.5, 0.5])
    assert median_errors(errors) == pytest.approx((0.5, 0.5))
    assert len(ceilings_of(measured, "h100", "bf16")) == 2
    assert not ceilings_of(measured, "h100", "fp32") and not ceilings_of(measured, "h200", "bf16")
    arguments = ["plan", "--config", str(XXL), "--gpus", "8", "--gpu", "h100", "--results", str(tmp_path)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "throughput_a.json (1 x NVIDIA H100 80GB HBM3): step" in shown and "measured (-50%)" in shown
    assert "throughput_b.json" in shown and "measured (+50%)" in shown
    assert "median error: step time 50%, memory 50%" in shown
    # The file's own ceilings are the rates, marked as measured.
    assert "GEMM 700 TFLOP/s (measured: throughput_a.json)" in shown


def test_a_cpu_file_is_predicted_by_its_own_ceilings(tmp_path: Path) -> None:
    model = dataclasses.asdict(load_config(TINY).model)
    slow = _result(
        model=model, device="AMD EPYC 7B13", resolution=32, compute="fp32", kernels="torch",
        gemm_tflops_per_s=0.1, copy_gb_per_s=10.0, memory_before_bytes=2**29, mfu_of_datasheet=None,
    )  # fmt: skip
    _write(tmp_path, "a", slow)
    _write(tmp_path, "b", {**slow, "gemm_tflops_per_s": 0.2, "copy_gb_per_s": 20.0})
    found, fast = (compare(m) for m in read_results(tmp_path)[0])
    assert 1 < found.step_s / fast.step_s <= 2
    assert found.memory_bytes == fast.memory_bytes > 2**29
    assert found.measured.device().peak_flops is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected an object, found list"),
        ({k: v for k, v in _result().items() if k != "step_s"}, "'step_s' is missing"),
        (_result(step_s=0), "step_s=0 must be a positive number"),
        (_result(step_s="fast"), "step_s='fast'"),
        (_result(world=2), "is not world=2"),
        (_result(micro_batch=1.5), "micro_batch=1.5 must be a whole number"),
        (_result(compute="fp4"), "compute='fp4'"),
        (_result(engine="deepspeed", zero_stage=0, layout={"dp_replicate": 2, "dp_shard": 1, "tp": 1}, world=2),
         "dp_replicate > 1"),
        (_result(model={"dim": 3}), "missing"),
    ],
)  # fmt: skip
def test_a_malformed_result_file_is_named(content: Any, said: str, tmp_path: Path) -> None:
    path = _write(tmp_path, "bad", content)
    with pytest.raises(ConfigError) as caught:
        read_results(tmp_path)
    assert str(path) in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0", "--gpu", "h100"], "--gpus 0 must be at least 1"),
        (["--gpus", "8", "--gpu", "v100"], "--gpu v100: unknown; possible: a100, b200, h100, h200"),
        (["--gpus", "8"], "needs --gpu"),
        (["--gpus", "7", "--gpu", "h100"], "no layout takes the global batches"),
        (["--gpus", "8", "--gpu", "h100", "--price", "0"], "--price 0.0 must be positive"),
        (["--gpus", "8", "--gpu", "h100", "--network-gbps", "-1"], "--network-gbps -1.0 must be positive"),
        (["--gpus", "8", "--gpu", "h100", "--top", "0"], "--top 0"),
        (["--gpus", "2", "--gpu", "a100", "model.dim=12288", "model.num_heads=96"], "nothing fits on 2 x a100"),
    ],
)
def test_the_impossible_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--config", str(XXL), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_table_has_both_engines_the_cost_and_the_recommendation(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    command = ["plan", "--config", str(XXL), "--gpus", "8", "--gpu", "h100", "--results", str(tmp_path)]
    assert cli.main([*command, "--price", "3"]) == 0
    shown = capsys.readouterr().out
    for part in ("fsdp", "ZeRO-3", "recommended: parallel.engine=", "cost", "assumed", "measured", "own"):
        assert part in shown, part
    assert f"no measured throughput result in {tmp_path}" in shown
    assert cli.main(command) == 0
    assert "cost" not in capsys.readouterr().out
    # What is recommended can be given to the trainer as it stands.
    line = next(line for line in shown.splitlines() if line.startswith("recommended: "))
    cfg = load_config(XXL, line.removeprefix("recommended: ").split())
    layout = resolve_layout(cfg.parallel, 8)
    check_tp(cfg.model, layout.tp)
    device = gpu_device("h100", compute=cfg.precision.compute)
    plan = as_configured(
        Workload(model=cfg.model, compute="bf16", fused=True), cfg.stages, cfg.parallel, device, gpus=8
    )
    assert fits(plan.memory_bytes, device)


def test_layout_table_still_lists_every_parameter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["plan", "--config", str(TINY), "--gpus", "2", "--layout"]) == 0
    shown = capsys.readouterr().out
    for row in layout_rows(load_config(TINY).model, Layout(1, 2)):
        assert row.name in shown
    assert "state of a rank" in shown and "all-gather" in shown


def test_memory_of_every_gpu_of_the_table_is_used() -> None:
    """A GPU with more memory takes at least the micro-batch of a smaller one."""
    work = Workload(model=load_config(XXL).model, compute="bf16")
    layouts = [ParallelConfig(dp_shard=8)]
    largest = {}
    for gpu, sheet in GPUS.items():
        device = gpu_device(gpu, compute="bf16")
        plan = all_plans(work, [_stage(resolution=512, global_batch=4096)], layouts, device, gpus=8)[0]
        assert plan.fits(device)
        largest[sheet.memory_bytes] = plan.memory_bytes
    assert [largest[m] for m in sorted(largest)] == sorted(largest.values())
