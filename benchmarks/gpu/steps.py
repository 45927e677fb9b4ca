"""The XXL training step in its variants: several in one process, each figure on disk the moment it exists.

Engine, step and losses are the product's (benchmarks/train/steps.py); encoders are replaced by random text
embeddings and features. No GPU has run these jobs yet.
"""

import contextlib
import dataclasses
import functools
import gc
import gzip
import math
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.attention import attention_overrides, raced_attention
from benchmarks.gpu.sizes import TINY_CEILINGS, TINY_SIDE, XXL, overrides_of
from benchmarks.jobs.runner import CheckFailed, Found, NotAvailable, Where, first_line
from benchmarks.measure import Ceilings, device_name, gpu_lost, measure_ceilings, synchronise
from benchmarks.throughput import time_steps
from benchmarks.train.eager_reference import REFERENCE_CLASSES
from benchmarks.train.plain_engine import PlainEngine
from benchmarks.train.steps import TrainingSteps
from deco_scale.config import RunConfig, load_config
from deco_scale.distributed.bootstrap import Environment
from deco_scale.errors import ConfigError
from deco_scale.objectives import Objective
from deco_scale.planning.hardware import peak_flops

ALONE = Environment(0, 1, 0)
TRACE_BYTES = 12 * 2**20
"""A larger trace is not kept: files come back from the GPU machine one by one, of at most 16 MiB."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to take the step."""

    name: str
    micro_batch: int
    accumulation: int = 1
    compile: bool = True
    straightforward: bool = False


def config(where: Where, *, resolution: int, variant: Variant, precision: Mapping[str, Any]) -> RunConfig:
    """The XXL recipe cut to one stage of the variant's sizes; tiny where quick."""
    overrides = [
        *overrides_of(where),
        *attention_overrides(where),
        "parallel.engine=fsdp",
        f"compile={str(variant.compile).lower()}",
        f"kernels={'triton' if where.device == 'cuda' else 'torch'}",
        *(f"precision.{name}={str(value).lower()}" for name, value in precision.items()),
    ]
    cfg = load_config(XXL, overrides)
    stage = next(stage for stage in cfg.stages if stage.resolution == resolution)
    micro_batch = 2 if where.quick else variant.micro_batch
    stage = dataclasses.replace(
        stage,
        resolution=TINY_SIDE[resolution] if where.quick else resolution,
        micro_batch=micro_batch,
        global_batch=micro_batch * variant.accumulation,
    )
    return dataclasses.replace(cfg, stages=(stage,), device=where.device)


def steps(
    where: Where,
    *,
    resolution: int,
    variants: Sequence[Mapping[str, Any]],
    engine: str = "none",
    precision: Mapping[str, Any] | None = None,
    trace: bool = False,
) -> Found:
    """Measure ``variants`` (fields of :class:`Variant`) on one build of the model; ``trace`` profiles the fastest.

    Raises :class:`NotAvailable` where the machine lacks what the configuration asks for, and
    :class:`CheckFailed` where a variant failed or its loss is not finite; the others are measured all the same,
    unless the GPU answers no more.
    """
    plain = engine == "none"
    if not plain and len(variants) > 1:
        raise ValueError(f"engine {engine!r} holds one variant's model, {len(variants)} were asked for")
    ceilings, raced = measured_ceilings(where), raced_attention(where)
    lines: list[str] = []
    failed: list[str] = []
    held: PlainEngine | None = None
    rates: dict[Variant, float] = {}
    last: TrainingSteps | None = None

    def make(variant: Variant) -> TrainingSteps:
        nonlocal held
        cfg = config(where, resolution=resolution, variant=variant, precision=precision or {})
        # What the variant before has cached in other sizes.
        _free(held)
        made = TrainingSteps(cfg, ALONE, plain=plain, reuse=held, attention=raced)
        held = made.engine if plain else None
        return made

    for fields in variants:
        variant = Variant(**fields)
        try:
            with compiler(where.device):
                made = make(variant)
                numbers = measure_variant(made, variant, ceilings, plain=plain)
        except ConfigError as error:
            raise NotAvailable(str(error)) from error
        except Exception as error:
            # Out of memory, or a kernel that does not compile: the next variant may fare better.
            traceback.print_exc()
            numbers = {"failed": first_line(error)}
        where.write(variant.name, numbers)
        if "failed" in numbers:
            failed.append(f"{variant.name} failed ({numbers['failed']})")
            if lost := gpu_lost(torch.device(where.device)):
                failed.append(f"nothing after {variant.name} ran: the GPU answers no more ({lost})")
                trace = False
                break
            continue
        if not variant.straightforward:
            rates[variant], last = numbers["images_per_s"], made
        lines.append(line(variant.name, numbers))
        print(lines[-1], flush=True)
        if not math.isfinite(numbers["loss"]):
            failed.append(f"the loss of {variant.name} is {numbers['loss']}")
    if trace and last is not None:
        fastest = max(rates, key=rates.__getitem__)
        try:
            with compiler(where.device):
                made = last if fastest == [*rates][-1] else make(fastest)
                # Of a variant that failed after it.
                _free(held)
                if plain:
                    made.engine.compile(fastest.compile)
                profiled(made, fastest.name, where)
        except Exception as error:
            traceback.print_exc()
            failed.append(f"no trace ({first_line(error)})")
    if failed:
        raise CheckFailed("; ".join(failed + lines))
    return Found("; ".join(lines), {"ceilings": dataclasses.asdict(ceilings)})


def measure_variant(made: TrainingSteps, variant: Variant, ceilings: Ceilings, *, plain: bool) -> dict[str, Any]:
    """Time the steps as the variant wants them, and give figures with their units in their names."""
    objective: Objective | None = None
    if plain:
        objective = made.engine.objective
        made.engine.compile(variant.compile)
    with straightforward(objective) if variant.straightforward else contextlib.nullcontext():
        found = time_steps(made, warmup=2, repeats=3, steps_each=2 if variant.accumulation == 1 else 1)
    device, stage = made.device, made.stage
    tflops = stage.image_flops * made.samples / found["step_s"] / 1e12
    peak = peak_flops(device_name(device)) if device.type == "cuda" else None
    return {
        **found,
        "images_per_s": made.samples / found["step_s"],
        "tflops_per_s": tflops,
        "mfu_of_gemm": tflops / ceilings.gemm_tflops_per_s,
        "mfu_of_datasheet": tflops * 1e12 / peak if peak else None,
        "engine": "none" if plain else made.cfg.parallel.engine,
        "kernels": made.kernels,
        "compute": made.cfg.precision.compute,
        "resolution": stage.cfg.resolution,
        **dataclasses.asdict(variant),
        "micro_batch": stage.cfg.micro_batch,
        "attention": [choice.line() for choice in made.attention],
        "device": device_name(device),
        "torch": torch.__version__,
    }


@contextlib.contextmanager
def compiler(device: str) -> Iterator[None]:
    """On a CPU, graphs are traced and run as they are: generating and compiling C++ for them takes minutes."""
    before = torch.compile
    if device == "cpu":
        torch.compile = functools.partial(before, backend="aot_eager")
    try:
        yield
    finally:
        torch.compile = before


def line(name: str, numbers: Mapping[str, Any]) -> str:
    """Images/s, milliseconds of a step, both MFU and memory in one line."""
    share = numbers["mfu_of_datasheet"]
    datasheet = "" if share is None else f"{share:.1%} of the datasheet, "
    return (
        f"{name} {numbers['images_per_s']:.1f} images/s, {1e3 * numbers['step_s']:.0f} ms, MFU {datasheet}"
        f"{numbers['mfu_of_gemm']:.1%} of the GEMM, {numbers['peak_memory_bytes'] / 2**30:.1f} GiB"
    )


@contextlib.contextmanager
def straightforward(objective: Objective | None) -> Iterator[None]:
    """The objective's modules written op by op within the context, with the same parameters; then as before."""
    if objective is None:
        raise ValueError("the straightforward model is measured without an engine")
    before = [(module, module.__class__) for module in objective.modules()]
    for module, kind in before:
        module.__class__ = REFERENCE_CLASSES.get(kind, kind)
    try:
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind


def measured_ceilings(where: Where) -> Ceilings:
    """What the GEMM job of this suite found, or measured here where it has not."""
    found = where.parts_of("gemm").get("ceilings")
    if found is not None:
        return Ceilings(found["gemm_tflops_per_s"], found["copy_gb_per_s"])
    sizes = TINY_CEILINGS if where.quick else {}
    return measure_ceilings(torch.device(where.device), torch.bfloat16, **sizes, repeats=5)


def profiled(made: TrainingSteps, name: str, where: Where) -> None:
    """One step under torch's profiler: part ``trace`` with the ten largest kernels, and the trace where small."""
    gpu = made.device.type == "cuda"
    batch, _ = made.next_batch()
    made.step(batch)
    synchronise(made.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, acc_events=True) as trace:
        made.step(batch)
        synchronise(made.device)
    numbers: dict[str, Any] = {"variant": name, **largest(trace.key_averages(), gpu=gpu)}
    for kernel in numbers["kernels"]:
        print(f"{kernel['ms']:9.3f} ms {kernel['share']:6.1%} {kernel['calls']:5} x {kernel['name'][:110]}")
    where.write("trace", numbers)
    plain, packed = where.out / "trace.json", where.out / "trace.json.gz"
    trace.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
        shutil.copyfileobj(source, target)
    plain.unlink()
    size = packed.stat().st_size
    if size > TRACE_BYTES:
        packed.unlink()
    kept = packed.name if size <= TRACE_BYTES else f"left out, larger than {TRACE_BYTES} bytes"
    where.write("trace", {**numbers, "trace": kept, "trace_bytes": size})


def largest(events: Sequence[Any], *, gpu: bool, count: int = 10) -> dict[str, Any]:
    """The ``count`` kernels (on a CPU: operators) with the most time of their own, and the time of all."""

    def own_us(event: Any) -> float:
        return float(event.self_device_time_total if gpu else event.self_cpu_time_total)

    def counts(event: Any) -> bool:
        # Annotations span kernels, which would count twice.
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        return not gpu or (on_gpu and not getattr(event, "is_user_annotation", False))

    ranked = sorted(filter(counts, events), key=own_us, reverse=True)
    total_us = sum(map(own_us, ranked))
    if not total_us:
        raise CheckFailed("the profiler saw no kernel")
    kernels = [
        {"name": e.key[:160], "ms": own_us(e) / 1e3, "calls": e.count, "share": own_us(e) / total_us}
        for e in ranked[:count]
    ]
    return {"kernels": kernels, "total_ms": total_us / 1e3}


def warm_up(
    where: Where,
    *,
    resolution: int,
    precision: Mapping[str, Any],
    variant: Mapping[str, Any],
    engine: str = "none",
) -> Found:
    """Compile what a later job will: one step of a model with two text blocks and two image blocks.

    Graphs and kernels are those of the whole model, and go to the caches on disk that jobs share; an engine has
    its own, since it casts weights outside of them. Two blocks of a kind, since the first one's input may be of
    another type.
    """
    compiled = Variant(**variant)
    cfg = config(where, resolution=resolution, variant=compiled, precision=precision)
    model = dataclasses.replace(cfg.model, num_blocks=2, num_text_blocks=2)
    objective = dataclasses.replace(cfg.objective, repa_layer=1)
    cfg = dataclasses.replace(cfg, model=model, objective=objective)
    began = time.perf_counter()
    try:
        with compiler(where.device):
            made = TrainingSteps(cfg, ALONE, plain=engine == "none", attention=raced_attention(where))
            loss = time_steps(made, warmup=0, repeats=1)["loss"]
    except ConfigError as error:
        raise NotAvailable(str(error)) from error
    taken = time.perf_counter() - began
    return Found(f"{taken:.0f} s to compile two blocks of each kind", {"seconds": taken, "loss": loss})


def _free(held: PlainEngine | None) -> None:
    """Give back what earlier steps had allocated, one that broke off included."""
    if held is not None:
        held.objective.zero_grad()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
