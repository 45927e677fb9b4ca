"""``deco plan``: how a configuration is laid out over ranks, and what N GPUs would make of it."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deco_scale.cli import simulate
from deco_scale.cli.plan_tables import print_assumptions, print_errors, print_plan, print_plans
from deco_scale.config import RunConfig, load_config
from deco_scale.errors import ConfigError
from deco_scale.models.tp_plan import check_tp
from deco_scale.parallel.config import ParallelConfig
from deco_scale.parallel.engines.deepspeed_config import ZERO3_PERSISTENT
from deco_scale.parallel.mesh import ParallelDims, accumulation_steps, resolve_parallel_dims
from deco_scale.planning.calibration import Measured, ceilings_of, read_results
from deco_scale.planning.comms import StepShape, Traffic, fsdp_traffic, seconds_of, zero_traffic
from deco_scale.planning.flops import (
    DINOV2_B,
    IMAGE_ENCODER_DIM,
    KNOWN_TEXT_ENCODERS,
    Encoder,
    Workload,
)
from deco_scale.planning.forecast import Plan, all_plans, plan_as_configured, recommend
from deco_scale.planning.hardware import GPUS, Device, gpu_device
from deco_scale.planning.layouts import enumerate_layouts
from deco_scale.planning.memory import state_copies
from deco_scale.planning.parameters import layout_rows
from deco_scale.precision.fp8_plan import BatchShape, plan_fp8, precision_rows
from deco_scale.precision.recipe import CHIPS, planned_machine, resolve_fp8

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "With --gpu: memory, step time, days and cost of every layout on --gpus GPUs, and the one to take. "
        "With --layout: each parameter's split and what a step sends, under the configuration's own layout. "
        "With --simulate: goodput, the best interval between saves, days and cost where GPUs fail."
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--gpus", type=int, help="number of ranks; default 1")
    parser.add_argument("--gpu", help=f"predict on this GPU: {', '.join(sorted(GPUS))}")
    parser.add_argument("--price", type=float, help="of one GPU-hour, for the cost of the recipe")
    parser.add_argument("--network-gbps", type=float, help="Gbit/s of a GPU's share of the network")
    parser.add_argument("--top", type=int, default=4, help="layouts shown of each engine")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of measured result files")
    parser.add_argument("--layout", action="store_true", help="each parameter's split")
    parser.add_argument("--precision", action="store_true", help="what each module computes in, on --gpu")
    simulate.add_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """One table after another, as asked for."""
    if args.simulate:
        cfg = load_config(args.config, args.overrides)
        fastest = _fastest(cfg, args) if args.gpu is not None else None
        return simulate.run(cfg, args, console, fastest=fastest)
    args.gpus = 1 if args.gpus is None else args.gpus
    wanted: list[Callable[[RunConfig, argparse.Namespace, Console], None]] = []
    if args.layout:
        wanted.append(show_layout)
    if args.precision:
        wanted.append(show_precision)
    elif args.gpu is not None:
        wanted.append(show_forecast)
    if not wanted:
        raise ConfigError(f"deco plan needs --gpu ({', '.join(sorted(GPUS))}), --layout --precision or --simulate")
    if args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus} must be at least 1")
    cfg = load_config(args.config, args.overrides)
    for show in wanted:
        show(cfg, args, console)
    return 0


def show_layout(cfg: RunConfig, args: argparse.Namespace, console: Console) -> None:
    """Each parameter's split, the state of a rank, and what a step sends."""
    dims = resolve_parallel_dims(cfg.parallel, args.gpus)
    rows = layout_rows(cfg.model, dims)
    mesh = f"dp_replicate {dims.dp_replicate} x dp_shard {dims.dp_shard} x tp {dims.tp}"
    table = Table("parameter", "global shape", "split over tp", "tp shape", "bytes a rank, fp32", title=mesh)
    for row in rows:
        shapes = ["x".join(map(str, shape)) for shape in (row.global_shape, row.tp_shape)]
        table.add_row(row.name, shapes[0], row.split, shapes[1], f"{row.local_bytes:,}")
    console.print(table)
    part, whole = sum(row.local_bytes for row in rows), sum(4 * row.tp_numel for row in rows)
    parts, wholes = state_copies(cfg.parallel.engine, cfg.parallel.zero_stage)
    console.print(
        f"state of a rank: {(parts * part + wholes * whole) / 2**30:.3f} GiB = "
        f"{parts} x {part / 2**30:.3f} (cut over dp) + {wholes} x {whole / 2**30:.3f} (whole) "
        "of weights, masters, gradients, two moments and average (REPA head aside)"
    )
    print_traffic(cfg, dims, console)


def show_precision(cfg: RunConfig, args: argparse.Namespace, console: Console) -> None:
    """Module by module what computes in which number format, and why not in FP8."""
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
    """A number of DeepSpeed's ``zero_optimization`` that the YAML sets by hand."""
    return int(cfg.parallel.deepspeed.get("zero_optimization", {}).get(name, default))


def _traffic(cfg: RunConfig, dims: ParallelDims, shape: StepShape) -> Iterator[Traffic]:
    if cfg.parallel.engine == "fsdp":
        return fsdp_traffic(cfg.model, dims, shape)
    persistent = _zero_setting(cfg, "stage3_param_persistence_threshold", ZERO3_PERSISTENT)
    return zero_traffic(cfg.model, dims, shape, stage=cfg.parallel.zero_stage, persistent=persistent)


def print_traffic(cfg: RunConfig, dims: ParallelDims, console: Console, device: Device | None = None) -> None:
    """What a step of each stage sends, from the same formulas that a test holds against a real step.

    ``device`` adds the time that each line takes alone on the links.
    """
    columns = ["stage", "what", "collective", "axis", "MiB a rank and step"]
    table = Table(*columns, *(["ms"] if device else []), title="communication")
    for stage in cfg.stages:
        rows, cols = cfg.model.grid(stage.resolution, stage.resolution)
        steps = accumulation_steps(
            global_batch=stage.global_batch,
            micro_batch=stage.micro_batch,
            dp=dims.dp,
            where=f"stages.{stage.name}",
        )
        shape = StepShape(
            micro_batch=stage.micro_batch,
            accumulation=steps,
            tokens=rows * cols,
            compute_bytes=4 if cfg.precision.compute == "fp32" else 2,
            recompute=cfg.parallel.activation_checkpointing,
        )
        for line in _traffic(cfg, dims, shape):
            cells = [stage.name, line.what, line.kind, line.axis, f"{line.bytes / 2**20:,.1f}"]
            table.add_row(*cells, *([f"{1e3 * seconds_of(line, dims, device):,.1f}"] if device else []))
    if table.row_count:
        console.print(table)


def show_forecast(cfg: RunConfig, args: argparse.Namespace, console: Console) -> None:
    """Every layout on N GPUs, the one to take, what is assumed, and the error against what was measured."""
    if args.price is not None and not args.price > 0:
        raise ConfigError(f"--price {args.price} must be positive")
    if args.top < 1:
        raise ConfigError(f"--top {args.top} must be at least 1")
    measured, skipped = read_results(args.results)
    device = _device(cfg, args, measured)
    work, notes = workload(cfg)
    layouts = enumerate_layouts(cfg.model, args.gpus, allowed=lambda parallel: _accepted(cfg, parallel))
    plans = all_plans(work, cfg.stages, layouts, device, gpus=args.gpus)
    best = recommend(plans, device)
    own, why_not = _configured(cfg, work, device, args.gpus)
    print_plans(plans, best, own, device, console, top=args.top, price=args.price)
    if why_not:
        console.print(f"as configured: not possible: {why_not}", highlight=False)
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
    """The configuration's own layout and micro-batches, or why these GPUs do not take them."""
    try:
        check_tp(cfg.model, resolve_parallel_dims(cfg.parallel, gpus).tp)
        return plan_as_configured(work, cfg.stages, cfg.parallel, device, gpus=gpus), ""
    except ConfigError as error:
        return None, str(error)


def workload(cfg: RunConfig) -> tuple[Workload, list[str]]:
    """What the configuration computes, and what of it is left out of the plan."""
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
            notes.append(f"text encoder {name!r} is unknown here ({known} are known): it is left out")
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
            f"encoders in the step: {', '.join(running)}, one after the other with it, linears only; "
            "text_encoder.ahead and image_encoder.ahead would hide part of their time, which is not counted"
        )
    return work, notes
