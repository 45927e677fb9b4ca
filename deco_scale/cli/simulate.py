"""``deco plan --simulate``: days and cost of a recipe on GPUs that fail, and how often to save checkpoints.

:mod:`deco_scale.planning.goodput_sim` has the model, its closed forms and its sources.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline.console import positive_int, print_line
from deco_scale.config import RunConfig
from deco_scale.errors import ConfigError
from deco_scale.observability.events import is_number
from deco_scale.observability.run_dir import RunDir
from deco_scale.planning.calibration import read_results
from deco_scale.planning.forecast import DAY_S, HOUR_S, Plan
from deco_scale.planning.goodput_sim import (
    LLAMA3_GPU_MTBF_HOURS,
    Faults,
    best_interval,
    daly_interval,
    expected_s,
    goodput,
    segments_of,
    simulate,
    young_interval,
)
from deco_scale.planning.hardware import GPUS_PER_NODE

SIZES = tuple(2**n for n in range(3, 13))
"""GPUs of the table, 8 to 4,096; ``--gpus`` is added."""
_DCP = "of a 7B model by PyTorch's DCP"
PUBLISHED = {
    "checkpoint_s": (148.8, f"the blocking save {_DCP}", "until a save is complete"),
    "stall_s": (6.3, f"the stall of an asynchronous save {_DCP}", "that a save blocks training"),
    "restart_s": (900.0, "MegaScale catches up within 15 minutes", "from a fault to the first step"),
}
"""Default seconds, their source, and what they are."""
_MAX_SIMULATED_FAULTS = 20_000
"""Runs with more expected faults are not simulated."""
_MAX_FAULTS = 1_000_000
"""Runs with more expected faults are reported as never ending."""
_WAYS = "--simulate needs one of --gpu (forecast), --step-s, --measured and --from-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --simulate")
    group.add_argument(
        "--simulate", action="store_true", help="predict goodput, save interval and days with faults"
    )
    nodes = f"number of nodes of {GPUS_PER_NODE} GPUs, instead of --gpus"
    group.add_argument("--nodes", type=positive_int, help=nodes)
    group.add_argument(
        "--mtbf-hours",
        type=float,
        help="mean hours between faults of one GPU (with --nodes: of one node). Llama 3's 419 unexpected "
        f"interruptions in 54 days on 16,384 GPUs are {LLAMA3_GPU_MTBF_HOURS:,.0f} a GPU",
    )
    group.add_argument(
        "--mtbf-of",
        choices=("gpu", "node"),
        help="what --mtbf-hours refers to; default: node with --nodes, else gpu",
    )
    for name, (seconds, why, meaning) in PUBLISHED.items():
        option = "--" + name.replace("_", "-")
        group.add_argument(option, type=float, help=f"seconds {meaning}; default {seconds:g} ({why})")
    group.add_argument(
        "--step-s", type=float, nargs="+", help="measured seconds per step on --gpus, one per stage"
    )
    group.add_argument("--measured", type=Path, help="folder of throughput results, one per resolution")
    group.add_argument("--from-run", type=Path, help="take save, stall, restart and step times from this run")
    group.add_argument("--runs", type=positive_int, default=2000, help="simulated runs per number of GPUs")
    group.add_argument("--seed", type=int, default=0, help="seed of the simulation")


def run(
    cfg: RunConfig, args: argparse.Namespace, console: Console, *, fastest: Callable[[int], Plan] | None
) -> int:
    """The table for 8 to 4,096 GPUs; ``fastest`` forecasts the plan of a number of GPUs, given ``--gpu``."""
    if args.nodes is not None and args.gpus is not None:
        raise ConfigError("give either --nodes or --gpus")
    gpus = args.gpus or (args.nodes or 0) * GPUS_PER_NODE
    if not gpus:
        raise ConfigError("--simulate needs --gpus or --nodes, at least 1")
    if args.mtbf_hours is None or not args.mtbf_hours > 0:
        raise ConfigError(
            "--simulate needs --mtbf-hours above 0, mean hours between faults of a GPU (with --nodes: a node); "
            f"Llama 3's training had {LLAMA3_GPU_MTBF_HOURS:,.0f} a GPU"
        )
    by_node = args.mtbf_of == "node" or (args.mtbf_of is None and args.nodes is not None)
    unit, name = (GPUS_PER_NODE, f"node of {GPUS_PER_NODE} GPUs") if by_node else (1, "GPU")
    if args.runs < 2:
        raise ConfigError(f"--runs {args.runs} must be at least 2")
    folder = None
    if args.from_run is not None:
        folder = RunDir(args.from_run)
        folder.refresh()
        if not folder.events:
            raise ConfigError(f"--from-run {args.from_run}: no events.jsonl with events in it")
    steps_of, origin = _step_times(cfg, args, gpus, folder, fastest)
    seconds = _seconds(args, folder)
    table = Table(
        "GPUs", "MTBF h", "step s", "days without", "save every", "Young", "Daly", "goodput", "days", "simulated",
        "faults", "GPU-h", *(["cost"] if args.price is not None else []),
        title=f"faults: one in {args.mtbf_hours:,g} h of one {name}",
    )  # fmt: skip
    refused = []
    for size in sorted({*SIZES, gpus}):
        try:
            steps = steps_of(size)
        except ConfigError as error:
            if size == gpus:
                raise
            refused.append(f"{size} GPUs: {error}")
            continue
        mtbf_s = args.mtbf_hours * HOUR_S / -(-size // unit)
        faults = Faults(mtbf_s=mtbf_s, **{name: value for name, (value, _) in seconds.items()})
        work = sum(each * stage.steps for each, stage in zip(steps, cfg.stages, strict=True))
        table.add_row(*_row(size, steps, work, faults, args), style="bold" if size == gpus else "")
        if size == gpus:
            # The configuration's own interval, at the recipe's mean time of a step.
            every = cfg.checkpoint.every
            interval = work / sum(stage.steps for stage in cfg.stages) * every
            share = goodput(faults, work, segments_of(work, interval))
            own = f"checkpoint.every={every} as configured is {interval:,.0f} s: goodput {share:.2%}"
    console.print(table)
    for line in (
        "save every: the best interval in this model; Young's and Daly's formulas for comparison",
        "goodput: work over mean wall clock since the first start, closed form; simulated: mean days of --runs "
        "runs and its standard error; -: too many faults to simulate",
        "faults occur at a constant rate and stop the job at once; --restart-s includes the detection of a hang",
        *refused,
        own,
        origin,
        *(f"{name}={value:g}: {why}" for name, (value, why) in seconds.items()),
    ):
        print_line(console, f"  - {line}")
    return 0


def _seconds(args: argparse.Namespace, folder: RunDir | None) -> dict[str, tuple[float, str]]:
    """Each time of :data:`PUBLISHED` with its source: the option, the run, or the published value."""
    times = {name: (seconds, f"assumed: {why}") for name, (seconds, why, _) in PUBLISHED.items()}
    if folder is not None:
        times |= {name: (mean, f"mean of {args.from_run}") for name, mean in measured_seconds(folder).items()}
    given = {name: getattr(args, name) for name in PUBLISHED if getattr(args, name) is not None}
    return times | {name: (seconds, "as given") for name, seconds in given.items()}


def measured_seconds(folder: RunDir) -> dict[str, float]:
    """Means of a run's saves, their stalls, and its restarts, if it had any.

    A restart takes from the last activity of an attempt to the end of the next first step, in whichever attempt:
    detecting the fault and failed starts are part of it.
    """
    saves = [event for event in folder.events if event.kind == "checkpoint"]
    means = {}
    if saves:
        means["checkpoint_s"] = statistics.fmean(event.fields["total_s"] for event in saves)
        means["stall_s"] = statistics.fmean(event.fields["stall_s"] for event in saves)
    accounting = folder.goodput(max(event.time for event in folder.events))
    trained = [a for a in (accounting.attempts if accounting else ()) if a.to_step is not None]
    restarts = []
    for before, after in itertools.pairwise(trained):
        first = [e.time for e in folder.events if e.kind == "first_step" and e.time >= after.start]
        if before.exit_code != 0 and first:
            restarts.append(first[0] - before.last_active)
    if restarts:
        means["restart_s"] = statistics.fmean(restarts)
    return means


def _step_times(
    cfg: RunConfig,
    args: argparse.Namespace,
    gpus: int,
    folder: RunDir | None,
    fastest: Callable[[int], Plan] | None,
) -> tuple[Callable[[int], list[float]], str]:
    """Seconds per step of each stage by number of GPUs (raises :class:`ConfigError` if impossible), and their
    source."""
    if sum(way is not None for way in (args.step_s, args.measured, fastest)) > 1:
        raise ConfigError(_WAYS)
    if fastest is not None:
        forecast = fastest
        return lambda size: [f.step_s for f in forecast(size).stages], f"step times: forecast for {args.gpu}"
    if args.step_s is not None:
        option, source = "--step-s", f"as given on {gpus} GPUs"
        gpu_seconds = [gpus * seconds for seconds in args.step_s]
    elif args.measured is not None:
        option, source, gpu_seconds = "--measured", args.measured, _of_results(cfg, args.measured)
    elif folder is not None:
        option, source, gpu_seconds = "--from-run", args.from_run, _of_run(cfg, folder)
    else:
        raise ConfigError(_WAYS)
    if len(gpu_seconds) != len(cfg.stages) or not all(seconds > 0 for seconds in gpu_seconds):
        names = ", ".join(stage.name for stage in cfg.stages)
        raise ConfigError(f"{option} must give one positive time for each of the stages {names}")
    origin = f"step times: {source}; other numbers of GPUs assume ideal scaling"
    return lambda size: [seconds / size for seconds in gpu_seconds], origin


def _of_results(cfg: RunConfig, path: Path) -> list[float]:
    """GPU-seconds of each stage's step, by the fastest result of its resolution and model."""
    results = [m for m in read_results(path)[0] if m.work.model == cfg.model]
    seconds = []
    for stage in cfg.stages:
        same = [m for m in results if m.stage.resolution == stage.resolution]
        rates = [m.step_s * m.world / m.stage.global_batch for m in same]
        if not rates:
            raise ConfigError(
                f"--measured {path}: no throughput result of this model at {stage.resolution} pixels"
            )
        seconds.append(min(rates) * stage.global_batch)
    return seconds


def _of_run(cfg: RunConfig, folder: RunDir) -> list[float]:
    worlds = [event.fields["world_size"] for event in folder.events if event.kind == "start"]
    seconds = []
    for stage in cfg.stages:
        lines = [line for line in folder.metrics if line.get("stage") == stage.name]
        times = [line["step_s"] for line in lines if is_number(line.get("step_s"))]
        if not times or len(set(worlds)) != 1:
            raise ConfigError(
                f"--from-run {folder.path}: needs logged steps of stage {stage.name!r}, on one number of ranks"
            )
        seconds.append(statistics.median(times) * worlds[0])
    return seconds


def _row(size: int, steps: list[float], work: float, faults: Faults, args: argparse.Namespace) -> list[str]:
    best = best_interval(faults)
    segments = segments_of(work, best)
    expected = expected_s(faults, work, segments)
    num_faults, hours, simulated = expected / faults.mtbf_s, expected * size / HOUR_S, "-"
    if num_faults <= _MAX_SIMULATED_FAULTS:
        played = simulate(faults, work, segments, runs=args.runs, seed=args.seed)
        if played is not None:
            simulated = f"{played.mean_s / DAY_S:.3g} +- {played.error_s / DAY_S:.1g}"
    totals = [f"{expected / DAY_S:.3g}", simulated, f"{num_faults:,.1f}", f"{hours:,.1f}"]
    if args.price is not None:
        totals.append(f"{hours * args.price:,.0f}")
    if num_faults > _MAX_FAULTS:
        totals = ["never", *["-"] * (len(totals) - 1)]
    every = "\n".join(f"{best / seconds:,.0f} steps" for seconds in steps)
    return [
        f"{size:,}",
        f"{faults.mtbf_s / HOUR_S:,.4g}",
        "\n".join(f"{seconds:.4g}" for seconds in steps),
        f"{work / DAY_S:.3g}",
        f"{best:,.1f} s\n{every}" if segments > 1 else "at the end",
        f"{young_interval(faults):,.1f} s",
        f"{daly_interval(faults):,.1f} s",
        f"{goodput(faults, work, segments):.2%}",
        *totals,
    ]
