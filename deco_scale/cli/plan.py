"""``deco plan``: a configuration's layout over ranks, and its memory, time and cost on N GPUs."""

import argparse
import dataclasses
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
from deco_scale.parallel.config import ParallelConfig
from deco_scale.parallel.engines.deepspeed_config import ZERO3_PERSISTENT
from deco_scale.parallel.mesh import ParallelDims, resolve_parallel_dims
from deco_scale.planning.calibration import Measured, ceilings_of, compare, median_errors, read_results
from deco_scale.planning.comms import seconds_of, step_traffic
from deco_scale.planning.flops import (
    DINOV2_B,
    IMAGE_ENCODER_DIM,
    KNOWN_TEXT_ENCODERS,
    Encoder,
    TrainStep,
    Workload,
)
from deco_scale.planning.forecast import Plan, all_plans, plan_as_configured, recommend
from deco_scale.planning.hardware import COPY_SHARE, GPUS, LAUNCH_S, Device, gpu_device
from deco_scale.planning.layouts import enumerate_layouts
from deco_scale.planning.memory import MARGIN, RESERVE_BYTES, state_copies
from deco_scale.planning.parameters import layout_rows
from deco_scale.precision.fp8_plan import BatchShape, plan_fp8, precision_rows
from deco_scale.precision.recipe import CHIPS, planned_machine, resolve_fp8

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
    if args.simulate:
        cfg = load_config(args.config, args.overrides)
        fastest = _fastest(cfg, args) if args.gpu is not None else None
        return simulate.run(cfg, args, console, fastest=fastest)
    args.gpus = 1 if args.gpus is None else args.gpus
    tables: list[Callable[[RunConfig, argparse.Namespace, Console], None]] = []
    if args.layout:
        tables.append(show_layout)
    if args.precision:
        tables.append(show_precision)
    elif args.gpu is not None:
        tables.append(show_forecast)
    if not tables:
        raise ConfigError(
            f"deco plan needs --layout, --precision, --simulate or --gpu ({', '.join(sorted(GPUS))})"
        )
    cfg = load_config(args.config, args.overrides)
    for show in tables:
        show(cfg, args, console)
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
    print_traffic(cfg, dims, console)


def show_precision(cfg: RunConfig, args: argparse.Namespace, console: Console) -> None:
    """Each module's number format, and why not FP8."""
    dims = resolve_parallel_dims(cfg.parallel, args.gpus)
    check_tp(cfg.model, dims.tp)
    plan, chip = None, args.gpu or "h100"
    if cfg.precision.compute == "fp8":
        if chip not in CHIPS:
            raise ConfigError(f"--gpu {chip}: unknown; possible: {', '.join(sorted(CHIPS))}")
        plan = plan_fp8(
            cfg.model,
            cfg.precision,
            resolve_fp8(cfg.precision, planned_machine(chip)),
            tp=dims.tp,
            batches=[BatchShape(*shape) for shape in cfg.batch_shapes()],
            recompute=cfg.parallel.activation_checkpointing,
            compile_blocks=cfg.compile,
        )
    where = f" on {chip}" if plan else ""
    table = Table("module", "in x out", "computes", "why not FP8", title=f"precision.compute{where}")
    for row in precision_rows(cfg.model, cfg.precision, plan, tp=dims.tp):
        table.add_row(row.name, f"{row.in_features}x{row.out_features}", row.computes, row.why)
    console.print(table)


def _zero_setting(cfg: RunConfig, name: str, default: int) -> int:
    """A value of DeepSpeed's ``zero_optimization`` in the configuration."""
    return int(cfg.parallel.deepspeed.get("zero_optimization", {}).get(name, default))


def print_traffic(cfg: RunConfig, dims: ParallelDims, console: Console, device: Device | None = None) -> None:
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
    layouts = enumerate_layouts(cfg.model, args.gpus, allowed=lambda parallel: _accepted(cfg, parallel))
    plans = all_plans(work, cfg.stages, layouts, device, gpus=args.gpus)
    best = recommend(plans, device)
    own, why_not = _configured(cfg, work, device, args.gpus)
    print_plans(plans, best, own, device, console, top=args.top, price=args.price)
    if why_not:
        print_line(console, f"as configured: not possible: {why_not}")
    print_plan(best, device, console, price=args.price)
    chosen = dataclasses.replace(cfg, parallel=best.parallel, stages=tuple(f.stage for f in best.stages))
    print_traffic(chosen, resolve_parallel_dims(best.parallel, args.gpus), console, device)
    print_assumptions(device, notes, console)
    print_errors(measured, skipped, args.results, console)


def _fastest(cfg: RunConfig, args: argparse.Namespace) -> Callable[[int], Plan]:
    """The fastest plan that fits, by the number of GPUs."""
    measured, _ = read_results(args.results)
    device, (work, _) = _device(cfg, args, measured), workload(cfg)

    def at(gpus: int) -> Plan:
        layouts = enumerate_layouts(cfg.model, gpus, allowed=lambda parallel: _accepted(cfg, parallel))
        return recommend(all_plans(work, cfg.stages, layouts, device, gpus=gpus), device)

    return at


def _device(cfg: RunConfig, args: argparse.Namespace, measured: list[Measured]) -> Device:
    compute = cfg.precision.compute
    ceilings = ceilings_of(measured, args.gpu, compute)
    return gpu_device(args.gpu, compute=compute, network_gbps=args.network_gbps, measured=ceilings)


def _accepted(cfg: RunConfig, parallel: ParallelConfig) -> bool:
    try:
        dataclasses.replace(cfg, parallel=parallel)
    except ValueError:
        return False
    return True


def _configured(cfg: RunConfig, work: Workload, device: Device, gpus: int) -> tuple[Plan | None, str]:
    """The plan as configured, or why it is impossible on these GPUs."""
    try:
        check_tp(cfg.model, resolve_parallel_dims(cfg.parallel, gpus).tp)
        return plan_as_configured(work, cfg.stages, cfg.parallel, device, gpus=gpus), ""
    except ConfigError as error:
        return None, str(error)


def workload(cfg: RunConfig) -> tuple[Workload, list[str]]:
    """What the configuration computes, and notes on what the plan leaves out."""
    notes: list[str] = []
    encoders = []
    if cfg.text_encoder is not None and (not cfg.data.has_text_embeddings or cfg.samples.every):
        name = Path(cfg.text_encoder.path).name
        if name in KNOWN_TEXT_ENCODERS:
            total, multiplied = KNOWN_TEXT_ENCODERS[name]
            runs = not cfg.data.has_text_embeddings
            encoders.append(
                Encoder(
                    name=name,
                    parameters=total,
                    multiplied=multiplied,
                    tokens=cfg.text_encoder.max_tokens,
                    runs=runs,
                )
            )
        else:
            known = ", ".join(KNOWN_TEXT_ENCODERS)
            notes.append(f"text encoder {name!r} is unknown (known: {known}): it is left out")
    repa = cfg.objective.repa_weight > 0
    if repa:
        encoders.append(DINOV2_B)
    work = Workload(
        model=cfg.model,
        compute=cfg.precision.compute,
        repa_dim=IMAGE_ENCODER_DIM if repa else 0,
        fused=cfg.kernels != "torch",
        compile=cfg.compile,
        encoders=tuple(encoders),
        persistent=_zero_setting(cfg, "stage3_param_persistence_threshold", ZERO3_PERSISTENT),
        reduce_bucket=_zero_setting(cfg, "reduce_bucket_size", 500_000_000),
        prefetch_bucket=_zero_setting(cfg, "stage3_prefetch_bucket_size", 50_000_000),
    )
    running = [encoder.name for encoder in encoders if encoder.runs]
    if running:
        notes.append(
            f"encoders in the step: {', '.join(running)}, in sequence with it, linears only; "
            "text_encoder.ahead and image_encoder.ahead would hide part of their time, which is not counted"
        )
    return work, notes


def layout_name(plan: Plan) -> str:
    """Engine and mesh, replicas x shards x tp."""
    parallel = plan.parallel
    shard = plan.gpus // (parallel.dp_replicate * parallel.tp)
    engine = "fsdp" if parallel.engine == "fsdp" else f"ZeRO-{parallel.zero_stage}"
    return f"{engine} {parallel.dp_replicate}x{shard}x{parallel.tp}"


def _row(plan: Plan, device: Device, price: float | None) -> list[str]:
    mfu = [forecast.mfu(device) for forecast in plan.stages]
    cells = [
        layout_name(plan),
        plan.parallel.activation_checkpointing,
        "\n".join(f"{f.stage.micro_batch}x{f.accumulation}" for f in plan.stages),
        "\n".join(f"{f.memory_bytes / GIB:.1f}" for f in plan.stages),
        "\n".join(f"{f.step_s:.3f}" for f in plan.stages),
        "\n".join(f"{f.images_per_s:,.0f}" for f in plan.stages),
        "\n".join("-" if share is None else f"{share:.1%}" for share in mfu),
        f"{plan.days:.2f}",
        f"{plan.gpu_hours:,.0f}",
    ]
    return cells + ([f"{plan.gpu_hours * price:,.0f}"] if price is not None else [])


def print_plans(
    plans: Sequence[Plan],
    best: Plan,
    own: Plan | None,
    device: Device,
    console: Console,
    *,
    top: int,
    price: float | None,
) -> None:
    """The fastest ``top`` layouts of each engine that fit, and the configured one; a line per stage."""
    names = ", ".join(f.stage.name for f in best.stages)
    table = Table(
        "", "layout", "recompute", "micro", "GiB", "step s", "img/s", "MFU", "days", "GPU-h",
        *(["cost"] if price is not None else []),
        title=f"{best.gpus} x {device.name}, stages: {names}",
    )  # fmt: skip
    engines = ("fsdp", "deepspeed")
    for engine in engines:
        of_engine = [p for p in plans if p.parallel.engine == engine and p.fits(device)]
        for plan in of_engine[:top]:
            table.add_row("*" if plan == best else "", *_row(plan, device, price))
        table.add_section()
    if own is not None:
        mark = "own" if own.fits(device) else "own, does not fit"
        table.add_row(mark, *_row(own, device, price))
    console.print(table)
    count = sum(plan.fits(device) for plan in plans)
    print_line(
        console,
        f"{count} of {len(plans)} layouts fit; *: the fastest of them, recommended; own: as configured. layout: "
        "dp_replicate x dp_shard x tp; micro: micro-batch x accumulation, the fastest that fits",
    )


def print_plan(plan: Plan, device: Device, console: Console, *, price: float | None) -> None:
    """The recommended layout: its settings, memory and time by part, and the full recipe."""
    parallel = plan.parallel
    shard = plan.gpus // (parallel.dp_replicate * parallel.tp)
    settings = [
        f"parallel.engine={parallel.engine}",
        *([f"parallel.zero_stage={parallel.zero_stage}"] if parallel.engine == "deepspeed" else []),
        f"parallel.dp_replicate={parallel.dp_replicate}",
        f"parallel.dp_shard={shard}",
        f"parallel.tp={parallel.tp}",
        f"parallel.activation_checkpointing={parallel.activation_checkpointing}",
        *(f"stages.{f.stage.name}.micro_batch={f.stage.micro_batch}" for f in plan.stages),
    ]
    print_line(console, "recommended: " + " ".join(settings))
    cost = f", cost {plan.gpu_hours * price:,.0f} at {price:g} per GPU-hour" if price is not None else ""
    print_line(console, f"full recipe: {plan.days:.2f} days, {plan.gpu_hours:,.0f} GPU-hours{cost}")
    names = [f.stage.name for f in plan.stages]
    memory = [{**f.memory, "sum": f.memory_bytes} for f in plan.stages]
    seconds = [{**f.seconds, "sum": f.step_s} for f in plan.stages]
    for title, parts, scale, digits in (
        ("memory of a GPU, GiB", memory, 1 / GIB, 3),
        ("time of a step, ms", seconds, 1e3, 1),
    ):
        table = Table(title, *names)
        for part in parts[0]:
            if part == "sum":
                table.add_section()
            table.add_row(part, *(f"{scale * each[part]:.{digits}f}" for each in parts))
        console.print(table)


def print_assumptions(device: Device, notes: Sequence[str], console: Console) -> None:
    """The source of each rate, and the rules of the prediction."""
    lines = [f"{figure}" for figure in device.figures]
    lines += [
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
    ]
    print_line(console, "assumptions:")
    for line in lines:
        print_line(console, f"  - {line}")


def print_errors(measured: Sequence[Measured], skipped: int, folder: Path, console: Console) -> None:
    """Predicted against measured values by file, and the median error."""
    skipped_text = f" ({skipped} throughput files of another kind skipped)" if skipped else ""
    if not measured:
        print_line(console, f"error of the prediction: unknown, no throughput result in {folder}{skipped_text}")
        return
    comparisons = [compare(m) for m in measured]
    print_line(console, f"error of the prediction against {len(comparisons)} result files{skipped_text}:")
    for comparison in comparisons:
        actual = comparison.measured
        notes = "".join(f"; {note}" for note in actual.notes)
        print_line(
            console,
            f"  {actual.file} ({actual.world} x {actual.device_name}): step {comparison.step_s:.4g} s predicted, "
            f"{actual.step_s:.4g} s measured ({comparison.step_error:+.0%}); "
            f"memory {comparison.memory_bytes / GIB:.3f} GiB predicted, "
            f"{actual.peak_memory_bytes / GIB:.3f} measured ({comparison.memory_error:+.0%}){notes}",
        )
    step, memory = median_errors(comparisons)
    print_line(console, f"  median error: step time {step:.0%}, memory {memory:.0%}")
