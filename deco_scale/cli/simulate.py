"""``deco plan --simulate``: days and cost of a recipe on GPUs that fail, and how often to save checkpoints.

:mod:`deco_scale.planning.goodput_sim` has the model, its closed forms and its sources.
"""

import argparse
import dataclasses
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
PUBLISHED = {
    "checkpoint_s": (148.8, "the blocking save of a 7B model by PyTorch's DCP"),
    "stall_s": (6.3, "the stall of an asynchronous save of a 7B model by PyTorch's DCP"),
    "restart_s": (900.0, "MegaScale catches up within 15 minutes"),
}
"""Default seconds, and their source."""
_MAX_SIMULATED_FAULTS = 20_000
"""Runs with more expected faults are not simulated."""
_MAX_FAULTS = 1_000_000
"""Runs with more expected faults are reported as never ending."""

Seconds = tuple[float, str]
"""A time and its source."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds per step of each stage by number of GPUs (raises :class:`ConfigError` if impossible), and their
    source."""

    of: Callable[[int], list[float]]
    origin: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --simulate")
    group.add_argument(
        "--simulate", action="store_true", help="predict goodput, save interval and days with faults"
    )
    group.add_argument("--nodes", type=int, help=f"number of nodes of {GPUS_PER_NODE} GPUs, instead of --gpus")
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
    for name, (seconds, why) in PUBLISHED.items():
        meaning = {
            "checkpoint_s": "until a save is complete",
            "stall_s": "that a save blocks training",
            "restart_s": "from a fault to the first step",
        }[name]
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
    gpus = gpus_of(args)
    mtbf_s, meaning = _mtbf(args)
    if args.runs < 2:
        raise ConfigError(f"--runs {args.runs} must be at least 2")
    folder = _read_run(args.from_run) if args.from_run is not None else None
    times = _step_times(cfg, args, gpus, folder, fastest)
    seconds = _seconds(args, folder)
    table = Table(
        "GPUs", "MTBF h", "step s", "days without", "save every", "Young", "Daly", "goodput", "days", "simulated",
        "faults", "GPU-h", *(["cost"] if args.price is not None else []),
        title=f"faults: {meaning}",
    )  # fmt: skip
    refused = []
    for size in sorted({*SIZES, gpus}):
        try:
            steps = times.of(size)
        except ConfigError as error:
            if size == gpus:
                raise
            refused.append(f"{size} GPUs: {error}")
            continue
        faults = Faults(mtbf_s=mtbf_s(size), **{name: value for name, (value, _) in seconds.items()})
        cells = _row(cfg, size, steps, faults, args)
        table.add_row(*cells, style="bold" if size == gpus else "")
        if size == gpus:
            own = _configured(cfg, steps, faults)
    console.print(table)
    _explain(console, [*refused, own, times.origin, *(f"{n}={v:g}: {why}" for n, (v, why) in seconds.items())])
    return 0


def gpus_of(args: argparse.Namespace) -> int:
    """``--gpus``, or the GPUs of ``--nodes``; raises :class:`ConfigError` without exactly one of them."""
    if args.nodes is not None and args.gpus is not None:
        raise ConfigError("give either --nodes or --gpus")
    gpus = args.gpus if args.nodes is None else args.nodes * GPUS_PER_NODE
    if gpus is None or gpus < 1:
        raise ConfigError("--simulate needs --gpus or --nodes, at least 1")
    return int(gpus)


def _mtbf(args: argparse.Namespace) -> tuple[Callable[[int], float], str]:
    """Seconds between faults of a job by its number of GPUs, and a description."""
    if args.mtbf_hours is None or not args.mtbf_hours > 0:
        raise ConfigError(
            "--simulate needs --mtbf-hours above 0, mean hours between faults of a GPU (with --nodes: a node); "
            f"Llama 3's training had {LLAMA3_GPU_MTBF_HOURS:,.0f} a GPU"
        )
    unit = args.mtbf_of or ("node" if args.nodes is not None else "gpu")
    size = 1 if unit == "gpu" else GPUS_PER_NODE
    name = "GPU" if unit == "gpu" else f"node of {GPUS_PER_NODE} GPUs"
    return lambda gpus: args.mtbf_hours * HOUR_S / -(-gpus // size), f"one in {args.mtbf_hours:,g} h of one {name}"


def _read_run(path: Path) -> RunDir:
    folder = RunDir(path)
    folder.refresh()
    if not folder.events:
        raise ConfigError(f"--from-run {path}: no events.jsonl with events in it")
    return folder


def _seconds(args: argparse.Namespace, folder: RunDir | None) -> dict[str, Seconds]:
    """Each time of :data:`PUBLISHED` with its source: the option, the run, or the published value."""
    measured = measured_seconds(folder) if folder is not None else {}
    times: dict[str, Seconds] = {}
    for name, (published, why) in PUBLISHED.items():
        given = getattr(args, name)
        if given is not None:
            times[name] = given, "as given"
        elif name in measured:
            times[name] = measured[name], f"mean of {args.from_run}"
        else:
            times[name] = published, f"assumed: {why}"
    return times


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
) -> StepTimes:
    ways = [args.step_s is not None, args.measured is not None, fastest is not None]
    if sum(ways) > 1 or not (any(ways) or folder is not None):
        raise ConfigError("--simulate needs one of --gpu (forecast), --step-s, --measured and --from-run")
    if fastest is not None:
        forecast = fastest
        return StepTimes(
            lambda size: [f.step_s for f in forecast(size).stages], f"step times: forecast for {args.gpu}"
        )
    scaled = "; other numbers of GPUs assume ideal scaling"
    if args.step_s is not None:
        return _scaled(
            cfg, [gpus * s for s in args.step_s], f"step times: as given on {gpus} GPUs{scaled}", "--step-s"
        )
    if args.measured is not None:
        return _scaled(cfg, _of_results(cfg, args.measured), f"step times: {args.measured}{scaled}", "--measured")
    assert folder is not None
    return _scaled(cfg, _of_run(cfg, folder), f"step times: {args.from_run}{scaled}", "--from-run")


def _scaled(cfg: RunConfig, gpu_seconds: list[float], origin: str, option: str) -> StepTimes:
    if len(gpu_seconds) != len(cfg.stages) or not all(seconds > 0 for seconds in gpu_seconds):
        names = ", ".join(stage.name for stage in cfg.stages)
        raise ConfigError(f"{option} must give one positive time for each of the stages {names}")
    return StepTimes(lambda size: [seconds / size for seconds in gpu_seconds], origin)


def _of_results(cfg: RunConfig, path: Path) -> list[float]:
    """GPU-seconds of each stage's step, by the fastest result of its resolution and model."""
    results, _ = read_results(path)
    seconds = []
    for stage in cfg.stages:
        rates = [
            m.step_s * m.world / m.stage.global_batch
            for m in results
            if m.stage.resolution == stage.resolution and m.work.model == cfg.model
        ]
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


def _row(cfg: RunConfig, size: int, steps: list[float], faults: Faults, args: argparse.Namespace) -> list[str]:
    work = sum(seconds * stage.steps for seconds, stage in zip(steps, cfg.stages, strict=True))
    best = best_interval(faults)
    segments = segments_of(work, best)
    expected = expected_s(faults, work, segments)
    simulated = None
    if expected / faults.mtbf_s <= _MAX_SIMULATED_FAULTS:
        simulated = simulate(faults, work, segments, runs=args.runs, seed=args.seed)
    every = "\n".join(f"{best / seconds:,.0f} steps" for seconds in steps)
    hours = expected * size / HOUR_S
    ends = expected / faults.mtbf_s <= _MAX_FAULTS
    cells = [
        f"{size:,}",
        f"{faults.mtbf_s / HOUR_S:,.4g}",
        "\n".join(f"{seconds:.4g}" for seconds in steps),
        f"{work / DAY_S:.3g}",
        f"{best:,.1f} s\n{every}" if segments > 1 else "at the end",
        f"{young_interval(faults):,.1f} s",
        f"{daly_interval(faults):,.1f} s",
        f"{goodput(faults, work, segments):.2%}",
        f"{expected / DAY_S:.3g}" if ends else "never",
        "-" if simulated is None else f"{simulated.mean_s / DAY_S:.3g} +- {simulated.error_s / DAY_S:.1g}",
        f"{expected / faults.mtbf_s:,.1f}" if ends else "-",
        f"{hours:,.1f}" if ends else "-",
    ]
    if args.price is not None:
        cells.append(f"{hours * args.price:,.0f}" if ends else "-")
    return cells


def _configured(cfg: RunConfig, steps: list[float], faults: Faults) -> str:
    """Goodput with the configuration's own ``checkpoint.every``, at the recipe's mean time of a step."""
    work = sum(seconds * stage.steps for seconds, stage in zip(steps, cfg.stages, strict=True))
    mean = work / sum(stage.steps for stage in cfg.stages)
    interval = mean * cfg.checkpoint.every
    share = goodput(faults, work, segments_of(work, interval))
    return f"checkpoint.every={cfg.checkpoint.every} as configured is {interval:,.0f} s: goodput {share:.2%}"


def _explain(console: Console, notes: list[str]) -> None:
    lines = [
        "save every: the best interval in this model; Young's and Daly's formulas for comparison",
        "goodput: work over mean wall clock since the first start, closed form; simulated: mean days of --runs "
        "runs and its standard error; -: too many faults to simulate",
        "faults occur at a constant rate and stop the job at once; --restart-s includes the detection of a hang",
        *notes,
    ]
    for line in lines:
        print_line(console, f"  - {line}")
