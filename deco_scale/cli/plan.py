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
from deco_scale.config import RunConfig, load_config
from deco_scale.errors import ConfigError
from deco_scale.models.tp_plan import check_tp
from deco_scale.parallel.engines.deepspeed_config import ZERO3_PERSISTENT
from deco_scale.parallel.mesh import ParallelDims, resolve_parallel_dims
from deco_scale.planning.calibration import Measured, predict, read_results
from deco_scale.planning.comms import seconds_of, step_traffic
from deco_scale.planning.flops import (
    DINOV2_B,
    IMAGE_ENCODER_DIM,
    KNOWN_TEXT_ENCODERS,
    Encoder,
    TrainStep,
    Workload,
)
from deco_scale.planning.forecast import DAY_S, Plan, all_plans, plan_as_configured, recommend
from deco_scale.planning.hardware import COPY_SHARE, GPUS, LAUNCH_S, MARGIN, Device, gpu_device
from deco_scale.planning.layouts import enumerate_layouts
from deco_scale.planning.memory import RESERVE_BYTES, layout_rows, state_copies
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
            compile_blocks=cfg.compile,
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
    _print_plan(best, args.price, console)
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
    """With the ceilings that were measured on this GPU, in the number format of the configuration's GEMMs."""
    compute = cfg.precision.compute
    same = [m for m in measured if m.gpu == args.gpu and (m.work.compute == "fp32") == (compute == "fp32")]
    ceilings = [m.ceiling for m in same]
    return gpu_device(args.gpu, compute=compute, network_gbps=args.network_gbps, measured=ceilings)


def workload(cfg: RunConfig) -> tuple[Workload, list[str]]:
    """What the configuration computes, and notes on what the plan leaves out."""
    notes: list[str] = []
    encoders: list[Encoder] = []
    is_encoded = cfg.data.has_text_embeddings
    if cfg.text_encoder is not None and (not is_encoded or cfg.samples.every):
        name, tokens = Path(cfg.text_encoder.path).name, cfg.text_encoder.max_tokens
        if name in KNOWN_TEXT_ENCODERS:
            encoders.append(Encoder(name, *KNOWN_TEXT_ENCODERS[name], tokens=tokens, runs=not is_encoded))
        else:
            known = ", ".join(KNOWN_TEXT_ENCODERS)
            notes.append(f"text encoder {name!r} is unknown (known: {known}): it is left out")
    repa = cfg.objective.repa_weight > 0
    if repa:
        encoders.append(DINOV2_B)
    zero = cfg.parallel.deepspeed.get("zero_optimization", {})
    work = Workload(
        model=cfg.model,
        compute=cfg.precision.compute,
        repa_dim=IMAGE_ENCODER_DIM if repa else 0,
        fused=cfg.kernels != "torch",
        compile=cfg.compile,
        encoders=tuple(encoders),
        persistent=int(zero.get("stage3_param_persistence_threshold", ZERO3_PERSISTENT)),
        reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
    )
    running = [encoder.name for encoder in encoders if encoder.runs]
    if running:
        notes.append(
            f"encoders in the step: {', '.join(running)}, in sequence with it, linears only; "
            "text_encoder.ahead and image_encoder.ahead would hide part of their time, which is not counted"
        )
    return work, notes


def _row(plan: Plan, device: Device, price: float | None) -> list[str]:
    parallel, peak = plan.parallel, GPUS[device.name].bf16_flops * plan.gpus
    engine = "fsdp" if parallel.engine == "fsdp" else f"ZeRO-{parallel.zero_stage}"
    return [
        f"{engine} {parallel.dp_replicate}x{parallel.dp_shard}x{parallel.tp}",
        parallel.activation_checkpointing,
        "\n".join(f"{f.stage.micro_batch}x{f.accumulation}" for f in plan.stages),
        "\n".join(f"{f.memory_bytes / GIB:.1f}" for f in plan.stages),
        "\n".join(f"{f.step_s:.3f}" for f in plan.stages),
        "\n".join(f"{f.images_per_s:,.0f}" for f in plan.stages),
        "\n".join(f"{f.image_flops * f.images_per_s / peak:.1%}" for f in plan.stages),
        f"{plan.seconds / DAY_S:.2f}",
        f"{plan.gpu_hours:,.0f}",
        *([f"{plan.gpu_hours * price:,.0f}"] if price is not None else []),
    ]


def _print_plans(
    plans: Sequence[Plan], best: Plan, own: Plan | None, device: Device, args: argparse.Namespace, console: Console
) -> None:
    """The fastest ``--top`` layouts of each engine that fit, and the configured one; a line per stage."""
    table = Table(
        "", "layout", "recompute", "micro", "GiB", "step s", "img/s", "MFU", "days", "GPU-h",
        *(["cost"] if args.price is not None else []),
        title=f"{best.gpus} x {device.name}, stages: {', '.join(f.stage.name for f in best.stages)}",
    )  # fmt: skip
    fitting = [plan for plan in plans if device.fits(plan.memory_bytes)]
    for engine in ("fsdp", "deepspeed"):
        for plan in [plan for plan in fitting if plan.parallel.engine == engine][: args.top]:
            table.add_row("*" if plan == best else "", *_row(plan, device, args.price))
        table.add_section()
    if own is not None:
        mark = "own" if device.fits(own.memory_bytes) else "own, does not fit"
        table.add_row(mark, *_row(own, device, args.price))
    console.print(table)
    print_line(
        console,
        f"{len(fitting)} of {len(plans)} layouts fit; *: the fastest of them, recommended; own: as configured. "
        "layout: dp_replicate x dp_shard x tp; micro: micro-batch x accumulation, the fastest that fits",
    )


def _print_plan(plan: Plan, price: float | None, console: Console) -> None:
    """The recommended layout: its settings, memory and time by part, and the full recipe."""
    names = ["engine", "zero_stage", "dp_replicate", "dp_shard", "tp", "activation_checkpointing"]
    if plan.parallel.engine == "fsdp":
        names.remove("zero_stage")
    settings = [f"parallel.{name}={getattr(plan.parallel, name)}" for name in names]
    settings += [f"stages.{f.stage.name}.micro_batch={f.stage.micro_batch}" for f in plan.stages]
    print_line(console, "recommended: " + " ".join(settings))
    cost = f", cost {plan.gpu_hours * price:,.0f} at {price:g} per GPU-hour" if price is not None else ""
    print_line(console, f"full recipe: {plan.seconds / DAY_S:.2f} days, {plan.gpu_hours:,.0f} GPU-hours{cost}")
    for title, parts, scale, digits in (
        ("memory of a GPU, GiB", [f.memory for f in plan.stages], 1 / GIB, 3),
        ("time of a step, ms", [f.seconds for f in plan.stages], 1e3, 1),
    ):
        table = Table(title, *(f.stage.name for f in plan.stages))
        for part in parts[0]:
            table.add_row(part, *(f"{scale * each[part]:.{digits}f}" for each in parts))
        table.add_section()
        table.add_row("sum", *(f"{scale * sum(each.values()):.{digits}f}" for each in parts))
        console.print(table)


def _print_assumptions(device: Device, notes: Sequence[str], console: Console) -> None:
    """The source of each rate, and the rules of the prediction."""
    print_line(console, "assumptions:")
    for line in (
        *device.figures,
        f"host time of an operation {1e6 * LAUNCH_S[device.kind]:.0f} us (assumed)",
        f"reserve {RESERVE_BYTES[device.kind] / GIB:.1f} GiB for CUDA and NCCL (assumed); "
        f"{MARGIN:.0%} of the memory stays free",
        "a GPU's GEMMs reach the rate of a large one; memory-bound parts reach the copy rate "
        f"({COPY_SHARE:.0%} of the datasheet where nothing is measured)",
        "overlap: fsdp hides all-gathers and reductions behind computation except for one unit of the model, "
        "ZeRO-3 its all-gathers, ZeRO-2 its reductions; tp communication is never hidden; latency is left out",
        "data waits, checkpoints, sample images and faults are not counted",
        "gains of Triton kernels, compiled blocks and FP8 are calculated, not measured: not yet run on a GPU",
        *notes,
    ):
        print_line(console, f"  - {line}")


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
