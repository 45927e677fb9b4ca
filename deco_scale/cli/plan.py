"""``deco plan``: a configuration's layout over ranks, and its memory, time and cost on N GPUs."""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline.console import positive, positive_int, print_line
from data_pipeline.text import shape_text
from deco_scale.cli import simulate
from deco_scale.cli.workload import workload
from deco_scale.config import RunConfig, load_config
from deco_scale.errors import ConfigError
from deco_scale.models.tp_plan import check_tp
from deco_scale.parallel.mesh import ParallelDims, resolve_parallel_dims
from deco_scale.planning.calibration import Measured, predict, read_gemm_corrections, read_results
from deco_scale.planning.comms import seconds_of, step_traffic
from deco_scale.planning.flops import (
    TrainStep,
    Workload,
)
from deco_scale.planning.forecast import (
    DAY_S,
    HOST_SHARE,
    TIE,
    Plan,
    all_plans,
    plan_as_configured,
    recommend,
    smallest_batches,
)
from deco_scale.planning.hardware import COPY_SHARE, GPUS, MARGIN, Device, gpu_device
from deco_scale.planning.host import ADDITION_S, COMPILED_SHARE, read_host_times
from deco_scale.planning.layouts import enumerate_layouts
from deco_scale.planning.memory import RESERVE_BYTES, layout_rows, state_copies
from deco_scale.planning.uncertainty import (
    ASSUMPTIONS,
    MEMORY_SHARE,
    PUBLISHED,
    Range,
    compared,
    memory_range,
    step_range,
)
from deco_scale.precision.fp8_plan import BatchShape, plan_fp8, precision_rows
from deco_scale.precision.recipe import planned_machine, resolve_fp8

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "With --gpu: memory, step time, days and cost of every layout on --gpus GPUs, and the recommended one. "
        "With --layout: each parameter's split and a step's communication, under the configured layout. "
        "With --simulate: goodput, the best save interval, days and cost on GPUs that fail."
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--gpus", type=positive_int, help="number of ranks; default 1")
    parser.add_argument("--gpu", help=f"predict on this GPU: {', '.join(sorted(GPUS))}")
    parser.add_argument("--price", type=positive, help="price of one GPU-hour, to predict the cost")
    parser.add_argument("--network-gbps", type=float, help="network bandwidth per GPU in Gbit/s")
    parser.add_argument("--top", type=positive_int, default=4, help="layouts shown per engine")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of measured result files")
    parser.add_argument("--layout", action="store_true", help="print how each parameter is split")
    parser.add_argument("--precision", action="store_true", help="print each module's number format, on --gpu")
    simulate.add_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Print the requested tables."""
    cfg = load_config(args.config, args.overrides)
    if args.simulate:
        fastest = _fastest(cfg, args) if args.gpu is not None else None
        return simulate.run(cfg, args, console, fastest=fastest)
    args.gpus = 1 if args.gpus is None else args.gpus
    if not (args.layout or args.precision or args.gpu is not None):
        raise ConfigError(
            f"deco plan needs --layout, --precision, --simulate or --gpu ({', '.join(sorted(GPUS))})"
        )
    if args.layout:
        show_layout(cfg, args, console)
    if args.precision:
        show_precision(cfg, args, console)
    elif args.gpu is not None:
        show_forecast(cfg, args, console)
    return 0


def show_layout(cfg: RunConfig, args: argparse.Namespace, console: Console) -> None:
    """Each parameter's split, the state of a rank, and a step's communication."""
    dims = resolve_parallel_dims(cfg.parallel, args.gpus)
    rows = layout_rows(cfg.model, dims)
    mesh = f"dp_replicate {dims.dp_replicate} x dp_shard {dims.dp_shard} x tp {dims.tp}"
    table = Table("parameter", "global shape", "split over tp", "tp shape", "bytes per rank, fp32", title=mesh)
    for row in rows:
        table.add_row(
            row.name, shape_text(row.global_shape), row.split, shape_text(row.tp_shape), f"{row.local_bytes:,}"
        )
    console.print(table)
    shard, full = sum(row.local_bytes for row in rows), sum(4 * row.tp_numel for row in rows)
    num_shards, num_full = state_copies(cfg.parallel.engine, cfg.parallel.zero_stage)
    console.print(
        f"state of a rank: {(num_shards * shard + num_full * full) / GIB:.3f} GiB = {num_shards} x "
        f"{shard / GIB:.3f} (sharded over dp) + {num_full} x {full / GIB:.3f} (replicated) of weights, masters, "
        "gradients, two moments and EMA (without the REPA head)"
    )
    _print_traffic(cfg, dims, console)


def show_precision(cfg: RunConfig, args: argparse.Namespace, console: Console) -> None:
    """Each module's number format, and why not FP8."""
    tp, plan, where = resolve_parallel_dims(cfg.parallel, args.gpus).tp, None, ""
    check_tp(cfg.model, tp)
    if cfg.precision.compute == "fp8":
        chip = args.gpu or "h100"
        where = f" on {chip}"
        plan = plan_fp8(
            cfg.model,
            cfg.precision,
            resolve_fp8(cfg.precision, planned_machine(chip)),
            tp=tp,
            batches=[BatchShape(*shape) for shape in cfg.batch_shapes()],
            recompute=cfg.parallel.activation_checkpointing,
            compile_blocks=cfg.compile is True,
        )
    table = Table("module", "in x out", "computes", "why not FP8", title=f"precision.compute{where}")
    for row in precision_rows(cfg.model, cfg.precision, plan, tp=tp):
        table.add_row(row.name, f"{row.in_features}x{row.out_features}", row.computes, row.why)
    console.print(table)


def _print_traffic(cfg: RunConfig, dims: ParallelDims, console: Console, device: Device | None = None) -> None:
    """A step's communication in each stage, by formulas that a test compares with a real step.

    ``device`` adds the time of each line alone on the links.
    """
    columns = ["stage", "what", "collective", "axis", "MiB per rank and step"]
    table = Table(*columns, *(["ms"] if device else []), title="communication")
    work, _ = workload(cfg)
    for stage in cfg.stages:
        for line in step_traffic(TrainStep.of_stage(work, stage, cfg.parallel, dims)):
            cells = [stage.name, line.what, line.kind, line.axis, f"{line.bytes / 2**20:,.1f}"]
            table.add_row(*cells, *([f"{1e3 * seconds_of(line, dims, device):,.1f}"] if device else []))
    if table.row_count:
        console.print(table)


def show_forecast(cfg: RunConfig, args: argparse.Namespace, console: Console) -> None:
    """All layouts on N GPUs, the recommended one, the assumptions, and the error against measurements."""
    measured, skipped = read_results(args.results)
    device = _device(cfg, args, measured)
    work, notes = workload(cfg)
    plans = _plans(cfg, work, device, args.gpus)
    best = recommend(plans, device)
    own, why_not = None, ""
    try:
        check_tp(cfg.model, resolve_parallel_dims(cfg.parallel, args.gpus).tp)
        own = plan_as_configured(work, cfg.stages, cfg.parallel, device, gpus=args.gpus)
    except ConfigError as error:
        why_not = f"as configured: not possible: {error}"
    _print_plans(plans, best, own, device, args, console)
    if why_not:
        print_line(console, why_not)
    ranges = [step_range(forecast, device) for forecast in best.stages]
    _print_plan(best, ranges, args.price, console)
    _print_host(best, work, device, lambda gpus: recommend(_plans(cfg, work, device, gpus), device), console)
    _print_published(best, ranges, device, console)
    _print_encoders(work, best, device, console)
    chosen = dataclasses.replace(cfg, parallel=best.parallel, stages=tuple(f.stage for f in best.stages))
    _print_traffic(chosen, resolve_parallel_dims(best.parallel, args.gpus), console, device)
    _print_assumptions(device, notes, console)
    skipped_text = f" ({skipped} throughput files of another kind skipped)" if skipped else ""
    if measured:
        _print_errors(measured, skipped_text, console)
    else:
        text = f"error of the prediction: unknown, no throughput result in {args.results}{skipped_text}"
        print_line(console, text)


def _fastest(cfg: RunConfig, args: argparse.Namespace) -> Callable[[int], Plan]:
    """The fastest plan that fits, by the number of GPUs."""
    device, (work, _) = _device(cfg, args, read_results(args.results)[0]), workload(cfg)
    return lambda gpus: recommend(_plans(cfg, work, device, gpus), device)


def _plans(cfg: RunConfig, work: Workload, device: Device, gpus: int) -> list[Plan]:
    layouts = enumerate_layouts(cfg.model, gpus, check=lambda layout: dataclasses.replace(cfg, parallel=layout))
    return all_plans(work, cfg.stages, layouts, device, gpus=gpus)


def _device(cfg: RunConfig, args: argparse.Namespace, measured: list[Measured]) -> Device:
    """With what was measured of this GPU in the number format of the configuration's GEMMs, and of the host."""
    compute = cfg.precision.compute
    same = [m for m in measured if m.gpu == args.gpu and (m.work.compute == "fp32") == (compute == "fp32")]
    corrections, source = read_gemm_corrections(args.results, args.gpu) if compute == "bf16" else ({}, "")
    device = gpu_device(
        args.gpu,
        compute=compute,
        network_gbps=args.network_gbps,
        measured=[m.ceiling for m in same],
        host=read_host_times(args.results),
        gemm_corrections=corrections,
    )
    shapes = f"measured: {source}" if source else "estimated from tiles, waves and K; planning/gemm.py"
    return dataclasses.replace(device, figures=(*device.figures, f"GEMM rates by shape ({shapes})"))


def _row(plan: Plan, device: Device, price: float | None) -> list[str]:
    parallel, peak = plan.parallel, GPUS[device.name].bf16_flops * plan.gpus
    ranges = [step_range(forecast, device) for forecast in plan.stages]
    low, high = (_total(plan, [getattr(each, end) for each in ranges]) for end in ("low_s", "high_s"))
    return [
        _layout_name(plan),
        parallel.activation_checkpointing,
        "\n".join(f"{f.stage.micro_batch}x{f.accumulation}" for f in plan.stages),
        "\n".join(_with_range(*(size / GIB for size in (f.memory_bytes, *memory_range(f)))) for f in plan.stages),
        "\n".join(_with_range(f.step_s, r.low_s, r.high_s) for f, r in zip(plan.stages, ranges, strict=True)),
        "\n".join(f"{f.host_share:.0%}" for f in plan.stages),
        "\n".join(f"{f.images_per_s:,.0f}" for f in plan.stages),
        "\n".join(f"{f.image_flops * f.images_per_s / peak:.1%}" for f in plan.stages),
        _with_range(plan.seconds / DAY_S, low / DAY_S, high / DAY_S),
        f"{plan.gpu_hours:,.0f}",
        *([f"{plan.gpu_hours * price:,.0f}"] if price is not None else []),
    ]


def _layout_name(plan: Plan) -> str:
    parallel = plan.parallel
    engine = "fsdp" if parallel.engine == "fsdp" else f"ZeRO-{parallel.zero_stage}"
    return f"{engine} {parallel.dp_replicate}x{parallel.dp_shard}x{parallel.tp}"


def _with_range(likely: float, low: float, high: float) -> str:
    return f"{likely:.3g} ({low:.3g}-{high:.3g})"


def _total(plan: Plan, step_seconds: Sequence[float]) -> float:
    """Seconds of the recipe with these seconds for a step of each stage."""
    return sum(seconds * f.stage.steps for seconds, f in zip(step_seconds, plan.stages, strict=True))


def _print_plans(
    plans: Sequence[Plan],
    best: Plan,
    own: Plan | None,
    device: Device,
    args: argparse.Namespace,
    console: Console,
) -> None:
    """The fastest ``--top`` layouts of each engine that fit, and the configured one; a line per stage."""
    table = Table(
        "", "layout", "recompute", "micro", "GiB", "step s", "host", "img/s", "MFU", "days", "GPU-h",
        *(["cost"] if args.price is not None else []),
        title=f"{best.gpus} x {device.name}, stages: {', '.join(f.stage.name for f in best.stages)}",
    )  # fmt: skip
    fitting = [plan for plan in plans if device.fits(plan.memory_bytes)]
    for engine in ("fsdp", "deepspeed"):
        shown = [plan for plan in fitting if plan.parallel.engine == engine][: args.top]
        if best.parallel.engine == engine and best not in shown:
            shown.append(best)
        for plan in shown:
            table.add_row("*" if plan == best else "", *_row(plan, device, args.price))
        table.add_section()
    if own is not None:
        mark = "own" if device.fits(own.memory_bytes) else "own, does not fit"
        table.add_row(mark, *_row(own, device, args.price))
    console.print(table)
    print_line(
        console,
        f"{len(fitting)} of {len(plans)} layouts fit; *: recommended, of those within {TIE:.0%} of the fastest "
        "the one with the least host time; own: as configured. layout: dp_replicate x dp_shard x tp; micro: "
        "micro-batch x accumulation; host: time to launch a step over the step; (low-high): range of the "
        "assumptions below",
    )


def _print_plan(plan: Plan, ranges: Sequence[Range], price: float | None, console: Console) -> None:
    """The recommended layout: its settings, memory and time by part, what is least sure, and the full recipe."""
    names = ["engine", "zero_stage", "dp_replicate", "dp_shard", "tp", "activation_checkpointing"]
    if plan.parallel.engine == "fsdp":
        names.remove("zero_stage")
    settings = [f"parallel.{name}={getattr(plan.parallel, name)}" for name in names]
    settings += [f"stages.{f.stage.name}.micro_batch={f.stage.micro_batch}" for f in plan.stages]
    print_line(console, "recommended: " + " ".join(settings))
    cost = f", cost {plan.gpu_hours * price:,.0f} at {price:g} per GPU-hour" if price is not None else ""
    low, high = (_total(plan, [getattr(each, end) for each in ranges]) / DAY_S for end in ("low_s", "high_s"))
    print_line(
        console,
        f"full recipe: {_with_range(plan.seconds / DAY_S, low, high)} days, {plan.gpu_hours:,.0f} GPU-hours{cost}",
    )
    for title, parts, scale, digits in (
        ("memory of a GPU, GiB", [f.memory for f in plan.stages], 1 / GIB, 3),
        ("time of a step, ms", [f.seconds for f in plan.stages], 1e3, 1),
        ("an assumption may add, ms", [each.slower_s for each in ranges], 1e3, 1),
    ):
        table = Table(title, *(f.stage.name for f in plan.stages))
        for part in parts[0]:
            table.add_row(part, *(f"{scale * each[part]:.{digits}f}" for each in parts))
        if parts[0].keys() != ranges[0].slower_s.keys():
            table.add_section()
            table.add_row("sum", *(f"{scale * sum(each.values()):.{digits}f}" for each in parts))
        console.print(table)


def _print_host(
    plan: Plan, work: Workload, device: Device, plan_on: Callable[[int], Plan], console: Console
) -> None:
    """Whether host and network keep up with the GPUs, and what to do where they do not."""
    for f in plan.stages:
        verdict = "below" if f.host_share < HOST_SHARE else "NOT below"
        print_line(
            console,
            f"host time of {f.stage.name}: {1e3 * f.host_s:.0f} ms of a {1e3 * f.step_s:.0f} ms step, "
            f"{f.host_share:.0%}, {verdict} half of the step; the GPU waits for host and network "
            f"{f.waiting_share:.0%} of the time",
        )
    if not plan.is_starved:
        return
    fewer = plan.gpus // 2
    found = None
    while fewer and found is None:
        try:
            smaller = plan_on(fewer)
        except ConfigError:
            break
        found, fewer = (smaller if not smaller.is_starved else None), fewer // 2
    if found is not None:
        print_line(
            console,
            f"  with these global batches take {found.gpus} GPUs, {_layout_name(found)}: "
            f"{found.seconds / DAY_S:.3g} days and {found.gpu_hours:,.0f} GPU-hours instead of "
            f"{plan.seconds / DAY_S:.3g} and {plan.gpu_hours:,.0f}",
        )
    larger = smallest_batches(work, plan, device)
    if larger is not None:
        share = max(
            f.host_share for f in plan_as_configured(work, larger, plan.parallel, device, gpus=plan.gpus).stages
        )
        settings = " ".join(
            f"stages.{s.name}.global_batch={s.global_batch} stages.{s.name}.micro_batch={s.micro_batch}"
            for s, f in zip(larger, plan.stages, strict=True)
            if s != f.stage
        )
        print_line(
            console,
            f"  or train with larger global batches on {plan.gpus} GPUs, {_layout_name(plan)}, and fewer steps: "
            f"{settings}; host time is then at most {share:.0%} of a step; the learning rate has to follow, by "
            "lr_scaling and a warmup (docs/training.md)",
        )


def _print_published(plan: Plan, ranges: Sequence[Range], device: Device, console: Console) -> None:
    """The plan's MFU beside that of published runs."""
    peak = GPUS[device.name].bf16_flops * plan.gpus
    print_line(console, "compared with published runs (MFU of the datasheet's dense bf16 rate, encoders aside):")
    for each in PUBLISHED:
        print_line(console, f"  {each.low:.0%}-{each.high:.0%}  {each.what}")
    for f, r in zip(plan.stages, ranges, strict=True):
        flops = f.image_flops * f.stage.global_batch / peak
        low, likely, high = (flops / seconds for seconds in (r.high_s, f.step_s, r.low_s))
        print_line(console, f"  {f.stage.name}: {likely:.0%} ({low:.0%}-{high:.0%}) predicted; {compared(likely)}")


def _print_encoders(work: Workload, plan: Plan, device: Device, console: Console) -> None:
    """What precomputed text would save, where that is more than a tie."""
    without = tuple(dataclasses.replace(e, runs=False) if e.tokens else e for e in work.encoders)
    if without == work.encoders:
        return
    stages = [f.stage for f in plan.stages]
    saved = plan_as_configured(
        dataclasses.replace(work, encoders=without), stages, plan.parallel, device, gpus=plan.gpus
    )
    if saved.seconds > (1 - TIE) * plan.seconds:
        return
    print_line(
        console,
        f"with precomputed text (data.text_states, docs/data.md) the recipe would take "
        f"{saved.seconds / DAY_S:.3g} days instead of {plan.seconds / DAY_S:.3g}, "
        f"{1 - saved.seconds / plan.seconds:.0%} less",
    )


def _print_assumptions(device: Device, notes: Sequence[str], console: Console) -> None:
    """The source of each rate, and the rules of the prediction."""
    print_line(console, "assumptions:")
    for line in (
        *device.figures,
        f"host time of a micro-batch and an update, ms: {_host_text(device)} ({device.host.source}); a small "
        f"addition in {1e6 * ADDITION_S:g} us, compiled blocks {COMPILED_SHARE:.0%} of the eager ones' (assumed)",
        f"latency of a collective {1e6 * device.latency.call_s:.1f} us, {1e6 * device.latency.link_s:.1f} us for "
        f"each step of a ring in a node, {1e6 * device.latency.network_s:.0f} us between nodes (NCCL's own model)",
        f"reserve {RESERVE_BYTES[device.kind] / GIB:.1f} GiB for CUDA and NCCL (assumed); "
        f"{MARGIN:.0%} of the memory stays free",
        f"memory-bound parts reach the copy rate ({COPY_SHARE:.0%} of the datasheet where nothing is measured)",
        "overlap: fsdp hides all-gathers and reductions behind computation except for one unit of the model, "
        "ZeRO-3 its all-gathers, ZeRO-2 its reductions; tp communication is never hidden",
        "ranges: "
        + "; ".join(f"{a.what} {1 / a.fast - 1:+.0%} to {1 / a.slow - 1:+.0%} of the time" for a in ASSUMPTIONS)
        + f"; memory beside the state {MEMORY_SHARE:.0%} either way",
        "data waits, checkpoints, sample images and faults are not counted",
        "gains of Triton kernels, compiled blocks and FP8 are calculated, not measured: not yet run on a GPU",
        *notes,
    ):
        print_line(console, f"  - {line}")


def _host_text(device: Device) -> str:
    return ", ".join(
        f"{engine} {1e3 * t.micro_batch_s:.0f} + {1e3 * t.update_s:.0f}"
        for engine, t in device.host.engines.items()
    )


def _print_errors(measured: Sequence[Measured], skipped: str, console: Console) -> None:
    """Predicted against measured values by file, and the medians of the absolute errors."""
    print_line(console, f"error of the prediction against {len(measured)} result files{skipped}:")
    step_errors, memory_errors = [], []
    for m in measured:
        step_s, memory = predict(m)
        step_errors.append(step_s / m.step_s - 1)
        memory_errors.append(memory / m.peak_memory_bytes - 1)
        note = "; with encoders, which the prediction leaves out" if m.encoders else ""
        print_line(
            console,
            f"  {m.file} ({m.world} x {m.device_name}): step {step_s:.4g} s predicted, {m.step_s:.4g} s measured "
            f"({step_errors[-1]:+.0%}); memory {memory / GIB:.3f} GiB predicted, "
            f"{m.peak_memory_bytes / GIB:.3f} measured ({memory_errors[-1]:+.0%}){note}",
        )
    step, memory = (statistics.median(map(abs, errors)) for errors in (step_errors, memory_errors))
    print_line(console, f"  median error: step time {step:.0%}, memory {memory:.0%}")
