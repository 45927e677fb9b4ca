"""What the GPU suite's jobs measure: GEMM shapes, the step in its variants, the race of attention kernels."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import attention as gpu_attention
from benchmarks.gpu import first as gpu_first
from benchmarks.gpu import sizes as gpu_sizes
from benchmarks.gpu import steps as gpu_steps
from benchmarks.gpu.gemm import products
from benchmarks.jobs.runner import CheckFailed, NotAvailable, Where
from deco_scale.config import load_config
from tests.support.saving import alone


@pytest.fixture
def group(one_thread: None) -> Iterator[None]:
    """A process group that goes with the test."""
    with alone():
        yield


def test_products_are_the_linears_of_the_model() -> None:
    model = load_config(gpu_sizes.XXL, []).model
    found = {product.name: product for product in products(model, micro_batch=64, resolution=256)}
    shapes = {name: (p.rows, p.in_features, p.out_features, p.count) for name, p in found.items()}
    assert shapes["image qkv"] == (16384, 1536, 4608, 16)
    assert shapes["image gate+up"] == (16384, 1536, 12288, 16)
    assert shapes["image down"] == (16384, 6144, 1536, 16)
    assert shapes["text proj"] == (8192, 1536, 1536, 4)
    assert shapes["context_kv"] == (8192, 1536, 3072, 16)
    assert shapes["cond_proj"] == (16384, 1536, 8192, 1)


def test_steps_without_an_engine_train_as_with_one(tmp_path: Path, group: None) -> None:
    where = Where("cpu", True, tmp_path)
    variant = gpu_steps.Variant("eager", 2, accumulation=2, compile=False)
    cfg = gpu_steps.config(where, resolution=256, variant=variant, precision={"compute": "fp32"})
    env = gpu_steps.Environment(0, 1, 0)
    sharded = gpu_steps.TrainingSteps(cfg, env)
    plain = gpu_steps.TrainingSteps(cfg, env, plain=True)
    state = {name: tensor for name, tensor in sharded.engine.state().items() if name.startswith("model.")}
    weights = {name.removeprefix("model."): tensor.full_tensor() for name, tensor in state.items()}
    plain.engine.objective.load_state_dict(weights)
    # The averages start at the weights; they have no part in the losses.
    for one, other in zip(plain.trace(3), sharded.trace(3), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_straightforward_modules_are_put_back(tmp_path: Path, group: None) -> None:
    where = Where("cpu", True, tmp_path)
    variant = gpu_steps.Variant("eager", 2, compile=False)
    cfg = gpu_steps.config(where, resolution=256, variant=variant, precision={"compute": "fp32"})
    made = gpu_steps.TrainingSteps(cfg, gpu_steps.Environment(0, 1, 0), plain=True)
    objective = made.engine.objective
    before = [type(module) for module in objective.modules()]
    batch, _ = made.next_batch()
    inputs = next(made._inputs(batch, None))
    wanted = objective(*inputs)["loss"].item()
    with gpu_steps.straightforward(objective):
        assert not {type(module) for module in objective.modules()} & set(gpu_steps.REFERENCE_CLASSES)
        assert objective(*inputs)["loss"].item() == pytest.approx(wanted, rel=1e-5)
    assert [type(module) for module in objective.modules()] == before


def test_a_variant_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: None
) -> None:
    real = gpu_steps.time_steps

    def time_steps(made: Any, **options: int) -> dict[str, Any]:
        if made.stage.accumulation == 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(made, warmup=0, repeats=1)

    monkeypatch.setattr(gpu_steps, "time_steps", time_steps)
    where = Where("cpu", True, tmp_path / "steps")
    sizes = [{"name": f"by_{n}", "micro_batch": 2, "accumulation": n, "compile": False} for n in (1, 2, 3)]
    with pytest.raises(CheckFailed, match=r"by_2 failed \(OutOfMemoryError: out of memory\); by_1 .* by_3 "):
        gpu_steps.steps(where, resolution=256, variants=sizes)
    parts = where.parts_of("steps")
    assert list(parts) == ["by_1", "by_2", "by_3"] and parts["by_2"] == {
        "failed": "OutOfMemoryError: out of memory"
    }
    for name in ("by_1", "by_3"):
        assert parts[name]["images_per_s"] == pytest.approx(2 * int(name[-1]) / parts[name]["step_s"])
        assert parts[name]["mfu_of_datasheet"] is None and parts[name]["engine"] == "none"
    with pytest.raises(ValueError, match="holds one variant's model"):
        gpu_steps.steps(where, resolution=256, variants=sizes, engine="fsdp")


def test_after_a_gpu_that_is_lost_no_variant_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: None
) -> None:
    def time_steps(made: Any, **options: int) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_steps, "time_steps", time_steps)
    monkeypatch.setattr(gpu_steps, "gpu_lost", lambda device: "AcceleratorError: CUDA error")
    sizes = [{"name": f"by_{n}", "micro_batch": 2, "accumulation": n, "compile": False} for n in (1, 2)]
    where = Where("cpu", True, tmp_path / "steps")
    with pytest.raises(CheckFailed, match=r"^by_1 failed .* nothing after by_1 ran: the GPU answers no more"):
        gpu_steps.steps(where, resolution=256, variants=sizes, trace=True)
    assert list(where.parts_of("steps")) == ["by_1"]


def test_the_fastest_variant_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: None) -> None:
    real, seconds = gpu_steps.time_steps, {1: 1.0, 2: 1.0, 3: 9.0}

    def time_steps(made: Any, **options: int) -> dict[str, Any]:
        return {**real(made, warmup=0, repeats=1), "step_s": seconds[made.stage.accumulation]}

    profiled: list[tuple[str, int]] = []
    monkeypatch.setattr(gpu_steps, "time_steps", time_steps)
    monkeypatch.setattr(
        gpu_steps, "profiled", lambda made, name, where: profiled.append((name, made.stage.accumulation))
    )
    sizes = [{"name": f"by_{n}", "micro_batch": 2, "accumulation": n, "compile": False} for n in seconds]
    where = Where("cpu", True, tmp_path / "steps")
    gpu_steps.steps(where, resolution=256, variants=sizes, trace=True)
    assert profiled == [("by_2", 2)]


def test_the_gemm_jobs_ceilings_serve_later_jobs(tmp_path: Path) -> None:
    Where("cpu", True, tmp_path / "gemm").write("ceilings", {"gemm_tflops_per_s": 700.0, "copy_gb_per_s": 2600.0})
    found = gpu_steps.measured_ceilings(Where("cpu", True, tmp_path / "steps"))
    assert (found.gemm_tflops_per_s, found.copy_gb_per_s) == (700.0, 2600.0)


def race(folder: Path) -> tuple[Where, Any]:
    """The attention job of a suite in ``folder``, as a function, and where a later job runs."""
    (folder / "attention.log").touch()
    where = Where("cpu", True, folder / "attention")
    return Where("cpu", True, folder / "steps"), lambda: gpu_attention.attention(
        where, sizes=[(256, 64), (512, 16)]
    )


def test_attention_is_raced_once(tmp_path: Path, one_thread: None) -> None:
    later = Where("cpu", True, tmp_path / "steps")
    assert gpu_attention.raced_attention(later) == [] and gpu_attention.attention_overrides(later) == []
    later, run = race(tmp_path)
    run()
    found = gpu_attention.raced_attention(later)
    # Tiny: 4 and 16 patches with 16 text tokens, and text alone.
    assert [(c.shape.queries, c.shape.keys) for c in found] == [(4, 20), (16, 16), (16, 32)]
    assert {choice.kernel for choice in found} == {"sdpa"} and found[0].times_ms[0][1] > 0
    assert gpu_attention.attention_overrides(later) == []


def test_a_race_that_broke_off_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    later, run = race(tmp_path)

    class Crash(BaseException):
        pass

    def crash(*inputs: torch.Tensor) -> torch.Tensor:
        raise Crash

    # A kernel whose package ends the process: PyTorch's own was measured before.
    monkeypatch.setattr(gpu_attention, "RACED", ("te", "sdpa"))
    monkeypatch.setattr(gpu_attention, "kernel_missing", lambda *arguments: None)
    monkeypatch.setitem(gpu_attention.KERNELS, "te", crash)
    with pytest.raises(Crash):
        run()
    found = gpu_attention.raced_attention(later)
    assert [[name for name, _ in choice.times_ms] for choice in found] == 3 * [["sdpa"]]
    # And one that ended it before anything was measured.
    (tmp_path / "attention" / "parts" / "choices.json").unlink()
    assert gpu_attention.attention_overrides(later) == ["attention.backend=sdpa"]
    assert "takes sdpa" in capsys.readouterr().out
    variant = gpu_steps.Variant("eager", 2, compile=False)
    cfg = gpu_steps.config(later, resolution=256, variant=variant, precision={})
    assert cfg.attention.backend == "sdpa"


def test_an_attention_kernel_that_is_wrong_fails_and_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    # As in the job's own process: a training step before may have allowed TF32, and the bound with it.
    torch.set_float32_matmul_precision("highest")
    later, run = race(tmp_path)
    monkeypatch.setattr(gpu_attention, "RACED", ("te", "sdpa"))
    monkeypatch.setattr(gpu_attention, "kernel_missing", lambda *arguments: None)
    monkeypatch.setitem(
        gpu_attention.KERNELS, "te", lambda q, k, v: 1.001 * gpu_attention.KERNELS["sdpa"](q, k, v)
    )
    with pytest.raises(CheckFailed, match="'te': 'differs from the formula by"):
        run()
    assert [[name for name, _ in choice.times_ms] for choice in gpu_attention.raced_attention(later)] == 3 * [
        ["sdpa"]
    ]


def test_a_faster_attention_kernel_that_breaks_graphs_is_measured_and_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Compiled jobs would fail with it: they allow no graph break."""
    later, run = race(tmp_path)
    monkeypatch.setattr(gpu_attention, "RACED", ("te", "sdpa"))
    monkeypatch.setattr(gpu_attention, "kernel_missing", lambda *arguments: None)
    monkeypatch.setattr(gpu_attention, "graph_break", lambda name: "breaks" if name == "te" else None)
    monkeypatch.setitem(gpu_attention.KERNELS, "te", gpu_attention.KERNELS["sdpa"])
    monkeypatch.setattr(gpu_attention, "preferred", lambda times_ms, hopper: max(times_ms))  # "te", if it may be
    run()
    for choice in gpu_attention.raced_attention(later):
        assert {name for name, _ in choice.times_ms} == {"te", "sdpa"} and choice.kernel == "sdpa"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_whatever_a_timed_job_compiles_is_compiled_before(device: str) -> None:
    names = ("resolution", "precision", "engine")
    jobs = gpu_first.jobs(device)
    warmed = [job.options for job in jobs if job.background]
    ahead = [(*(w[name] for name in names), w["variant"]["micro_batch"]) for w in warmed]
    for job in jobs[3:]:
        assert job.background != job.alone
        for variant in job.options.get("variants", []):
            if variant.get("compile", True):
                assert (*(job.options[name] for name in names), variant["micro_batch"]) in ahead


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["none", "fsdp"])
def test_graphs_of_the_warm_up_are_those_of_the_steps(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: None
) -> None:
    race(tmp_path)[1]()
    graphs: set[Any] = set()

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        values = tuple((x.dtype, tuple(x.shape)) if isinstance(x, torch.Tensor) else x for x in inputs)
        graphs.add((module.code, values))
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(gpu_steps, "compiler", lambda device: contextlib.nullcontext())
    options: dict[str, Any] = {"resolution": 256, "precision": {"compute": "bf16"}, "engine": engine}
    variant = {"name": "compiled", "micro_batch": 2}
    found = gpu_steps.warm_up(Where("cpu", True, tmp_path / "warm_up"), variant=variant, **options)
    assert found.numbers["loss"] > 0
    ahead = set(graphs)
    graphs.clear()
    torch._dynamo.reset()
    gpu_steps.steps(Where("cpu", True, tmp_path / "steps"), variants=[variant], **options)
    # A text block, an image block, the decoder; the first block of a kind may have a graph of its own.
    assert len(graphs) >= 3 and graphs <= ahead


def test_a_warm_up_that_needs_what_is_missing_is_not_available(tmp_path: Path, group: None) -> None:
    variant = {"name": "te", "micro_batch": 2}
    with pytest.raises(NotAvailable):
        gpu_steps.warm_up(
            Where("cpu", True, tmp_path / "warm_up"), resolution=256, precision=gpu_first.TE, variant=variant
        )


def test_annotations_do_not_count_as_kernels() -> None:
    class Event:
        def __init__(self, key: str, us: float, gpu: bool, annotation: bool) -> None:
            kind = torch.autograd.DeviceType
            self.key, self.count, self.self_device_time_total, self.self_cpu_time_total = key, 1, us, us
            self.device_type, self.is_user_annotation = kind.CUDA if gpu else kind.CPU, annotation

    events = [Event("gemm", 30, True, False), Event("norm", 10, True, False)]
    noise = [Event("region", 40, True, True), Event("aten::mm", 99, False, False)]
    found = gpu_steps.largest(events + noise, gpu=True)
    assert [kernel["name"] for kernel in found["kernels"]] == ["gemm", "norm"]
    assert found["total_ms"] == 0.04 and found["kernels"][0]["share"] == 0.75
    with pytest.raises(CheckFailed, match="no kernel"):
        gpu_steps.largest(noise, gpu=True)
