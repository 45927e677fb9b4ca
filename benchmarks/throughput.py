"""Images per second of the real training step, and where its time goes, for any configuration and layout.

    python -m benchmarks.throughput --config FILE [--world N] [key.path=value ...]
    torchrun --nproc_per_node 8 benchmarks/throughput.py --config FILE [key.path=value ...]
    python -m benchmarks.throughput [--device cpu]      fast against straightforward, with the promises

The engine, its step and its update are those of a run (benchmarks/train/steps.py). The step is timed as it is; a
second series with marks gives the breakdown by part (benchmarks/train/parts.py). A printed table, a JSON file
and a PNG. Exit codes: 0 done, 1 failed (without --config: the losses of the two differ), 2 usage or
configuration error.
"""

import argparse
import dataclasses
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.measure import Ceilings, Stopwatch, device_name, gemm_dtype, measure_ceilings, synchronise
from benchmarks.train import compare as straightforward
from benchmarks.train.parts import Timeline, watch
from benchmarks.train.steps import TrainingSteps, leave, resolved_layout
from deco_scale.config import RunConfig, dump_config, load_config
from deco_scale.distributed.bootstrap import Environment, choose_device, read_environment
from deco_scale.errors import ConfigError, RunError
from deco_scale.planning.hardware import peak_flops
from launcher.build.model import choose_compile


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file, see configs/; without it: the comparison")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--stage", help="which stage of the configuration; the first if not given")
    parser.add_argument("--micro-batch", type=int, help="in place of the stage's")
    parser.add_argument("--accumulation", type=int, help="micro-batches of a step; the global batch follows")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="in place of the configuration's")
    parser.add_argument("--world", type=int, default=1, help="start so many processes on this machine")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of which the median counts")
    parser.add_argument(
        "--steps", type=int, default=1, help="steps of a repetition, the device waited for at its end"
    )
    parser.add_argument("--warmup", type=int, default=2, help="steps before anything is timed")
    parser.add_argument("--encoders", action="store_true", help="load and run the frozen encoders")
    parser.add_argument("--data", action="store_true", help="read real samples as a run does")
    parser.add_argument(
        "--straightforward", action="store_true", help="the model written op by op, for comparison"
    )
    parser.add_argument("--no-parts", action="store_true", help="leave out the breakdown by part")
    parser.add_argument("--gemm-side", type=int, help="side of the GEMM that serves as ceiling")
    parser.add_argument("--copy-bytes", type=int, help="bytes of the copy that serves as ceiling")
    parser.add_argument("--out", type=Path, help="folder for a JSON file and a PNG")
    parser.add_argument("--name", help="of the files; made from the configuration if not given")
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("world", "repeats", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)} must be at least 1")
    if args.warmup < 0:
        parser.error(f"--warmup={args.warmup} must not be negative")
    return args


def configured(args: argparse.Namespace, world: int) -> RunConfig:
    """The configuration with what the command line changes of it, to one stage."""
    cfg = load_config(args.config, args.overrides)
    names = [stage.name for stage in cfg.stages]
    if args.stage is not None and args.stage not in names:
        raise ConfigError(f"--stage={args.stage} is none of {names}")
    stage = cfg.stages[names.index(args.stage) if args.stage else 0]
    try:
        if args.micro_batch is not None:
            stage = dataclasses.replace(stage, micro_batch=args.micro_batch)
        if args.accumulation is not None:
            dp = max(1, world // cfg.parallel.tp)
            stage = dataclasses.replace(stage, global_batch=stage.micro_batch * args.accumulation * dp)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return dataclasses.replace(cfg, stages=(stage,), device=args.device or cfg.device)


def time_steps(steps: TrainingSteps, *, warmup: int, repeats: int, steps_each: int = 1) -> dict[str, Any]:
    """Seconds of a step (median of ``repeats``, each of ``steps_each`` steps), the loss and the peak bytes.

    ``first_step_s`` is the first of the ``warmup`` steps: what compiles does so there.
    """
    device = steps.device
    batch, _ = steps.next_batch()
    began, first_step_s = time.perf_counter(), None
    for _ in range(warmup):
        steps.step(batch)
        if first_step_s is None:
            synchronise(device)
            first_step_s = time.perf_counter() - began
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock, series, waits = Stopwatch(device), [], []
    for _ in range(repeats):
        if dist.get_world_size() > 1:
            dist.barrier()
        synchronise(device)
        mark, waited = clock.mark(), 0.0
        for _ in range(steps_each):
            batch, wait_s = steps.next_batch()
            waited += wait_s
            result = steps.step(batch)
        series.append(clock.seconds(mark, clock.mark()) / steps_each)
        waits.append(waited / steps_each)
    return {
        "step_s": statistics.median(series),
        "step_s_all": series,
        "first_step_s": first_step_s,
        "data_wait_s": statistics.median(waits),
        "loss": result.losses["loss"].item(),
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def measure(steps: TrainingSteps, args: argparse.Namespace) -> dict[str, Any]:
    """What this process measured: seconds, bytes, ceilings, and the parts of its steps."""
    device = steps.device
    found = time_steps(steps, warmup=args.warmup, repeats=args.repeats, steps_each=args.steps)
    found["parts"] = {}
    if not args.no_parts:
        timeline = Timeline(device)
        watch(steps.objectives[-1], timeline)
        # Hooks may be compiled or traced anew in the first step.
        for _ in range(args.repeats + 1):
            batch, _ = steps.next_batch()
            with timeline.step():
                steps.step(batch, timeline)
        found["parts"] = timeline.medians()
    sizes = {"side": args.gemm_side, "size": args.copy_bytes}
    found["ceilings"] = measure_ceilings(device, gemm_dtype(steps.cfg.precision), **sizes)
    return found


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on the GPU since the last reset, or the process's largest resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summarise(
    steps: TrainingSteps, every: list[dict[str, Any]], args: argparse.Namespace, before_bytes: int
) -> dict[str, Any]:
    """The result file's contents: the slowest process's step, the fullest one's memory, this one's parts.

    TFLOP/s and both MFU are those of one process; ``memory_before_bytes`` is what it held before the model
    was built (on a CPU: Python and its libraries).
    """
    cfg, stage = steps.cfg, steps.stage
    step_s = max(found["step_s"] for found in every)
    ceilings: Ceilings = every[0]["ceilings"]
    tflops = stage.image_flops * steps.samples / step_s / len(every) / 1e12
    peak = peak_flops(torch.cuda.get_device_name(steps.device)) if steps.device.type == "cuda" else None
    deepspeed = cfg.parallel.engine == "deepspeed"
    return {
        "kind": "throughput_straightforward" if args.straightforward else "throughput",
        **record.origin(),
        "torch": torch.__version__,
        "config": args.config.name,
        "config_digest": hashlib.sha256(dump_config(cfg).encode()).hexdigest()[:12],
        "model": dataclasses.asdict(cfg.model),
        "device": device_name(steps.device),
        "threads": torch.get_num_threads(),
        "world": len(every),
        "engine": cfg.parallel.engine,
        "zero_stage": cfg.parallel.zero_stage if deepspeed else None,
        "layout": resolved_layout(steps.layout),
        "compute": cfg.precision.compute,
        "kernels": steps.kernels,
        "attention": cfg.attention.backend,
        "compile": choose_compile(cfg, steps.device)[0],
        "activation_checkpointing": cfg.parallel.activation_checkpointing,
        "encoders": args.encoders,
        "data": args.data,
        "resolution": stage.cfg.resolution,
        "micro_batch": stage.cfg.micro_batch,
        "accumulation": stage.accumulation,
        "repeats": args.repeats,
        "step_s": step_s,
        "step_s_all": every[0]["step_s_all"],
        "images_per_s": steps.samples / step_s,
        "tflops_per_s": tflops,
        **dataclasses.asdict(ceilings),
        "mfu_of_gemm": tflops / ceilings.gemm_tflops_per_s,
        "mfu_of_datasheet": tflops * 1e12 / peak if peak else None,
        "peak_memory_bytes": max(found["peak_memory_bytes"] for found in every),
        "memory_before_bytes": before_bytes,
        "data_wait_s": max(found["data_wait_s"] for found in every),
        "loss": every[0]["loss"],
        "parts": every[0]["parts"],
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The table of parts and the lines above it."""
    layout = " x ".join(f"{name} {size}" for name, size in result["layout"].items())
    engine = (
        result["engine"] if result["zero_stage"] is None else f"{result['engine']} ZeRO-{result['zero_stage']}"
    )
    console.print(
        f"{result['config']} at {result['resolution']} px on {result['world']} x {result['device']}: {engine}, "
        f"{layout}, {result['compute']}, kernels {result['kernels']}, micro-batch {result['micro_batch']} x "
        f"{result['accumulation']}",
        highlight=False,
    )
    peak = "no datasheet value for this device"
    if result["mfu_of_datasheet"] is not None:
        peak = f"{result['mfu_of_datasheet']:.1%} of the datasheet"
    table = Table("what", "value", title=None)
    table.add_row("step", f"{result['step_s']:.4g} s")
    table.add_row("images/s", f"{result['images_per_s']:.4g}")
    table.add_row("TFLOP/s of a process (model FLOPs)", f"{result['tflops_per_s']:.4g}")
    table.add_row("ceilings in this run", f"GEMM {result['gemm_tflops_per_s']:.4g} TFLOP/s, "
                  f"copy {result['copy_gb_per_s']:.4g} GB/s")  # fmt: skip
    table.add_row("MFU", f"{result['mfu_of_gemm']:.1%} of the GEMM, {peak}")
    table.add_row("peak memory", f"{result['peak_memory_bytes'] / 2**30:.3f} GiB, "
                  f"{result['memory_before_bytes'] / 2**30:.3f} before the model was built")  # fmt: skip
    waited = (
        f"{result['data_wait_s']:.4g} s" if result["data"] else "0: data are in memory (--data reads real ones)"
    )
    table.add_row("data wait", waited)
    table.add_row("encoders", "run in the step" if result["encoders"] else "replaced by states that are there")
    console.print(table)
    if result["parts"]:
        total = sum(result["parts"].values())
        parts = Table("part", "seconds", "share", title=f"parts of a step with marks ({total:.4g} s)")
        for name, value in result["parts"].items():
            parts.add_row(name, f"{value:.4g}", f"{value / total:.1%}")
        console.print(parts)


def run(cfg: RunConfig, env: Environment, args: argparse.Namespace) -> dict[str, Any]:
    """Measure in this process and collect from all; rank 0 prints and writes."""
    on_gpu = choose_device(cfg.device, env.local_rank).type == "cuda"
    before_bytes = 0 if on_gpu else peak_memory_bytes(torch.device("cpu"))
    options = {"encoders": args.encoders, "data": args.data, "straightforward": args.straightforward}
    steps = TrainingSteps(cfg, env, **options)
    try:
        found = measure(steps, args)
    finally:
        steps.close()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    result = summarise(steps, every, args, before_bytes)
    if env.rank == 0:
        console = Console()
        show(result, console)
        if args.out:
            path = record.write(result, args.out, args.name or file_name(result), console)
            title = f"{result['config']}, {result['resolution']} px, {result['images_per_s']:.3g} images/s"
            bars = result["parts"] or {"step": result["step_s"]}
            record.draw_bars({"step": bars}, path.with_suffix(".png"), title=title, unit="seconds of a step")
    return result


def file_name(result: dict[str, Any]) -> str:
    """Says what distinguishes this run from others of the same day."""
    layout, zero = result["layout"], result["zero_stage"]
    mesh = f"dp{layout['dp_replicate'] * layout['dp_shard']}tp{layout['tp']}"
    engine = "fsdp" if zero is None else f"zero{zero}"
    words = [
        result["kind"],
        Path(result["config"]).stem,
        str(result["resolution"]),
        engine,
        mesh,
        result["compute"],
    ]
    words += [result["kernels"]] + ["compile"] * result["compile"]
    return "_".join(words)


def start_several(argv: Sequence[str], world: int) -> int:
    """This command again on ``world`` processes of this machine, through torchrun."""
    kept, skip = [], False
    for word in argv:
        if skip or word == "--world" or word.startswith("--world="):
            skip = word == "--world"
            continue
        kept.append(word)
    environment = {**os.environ}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    return subprocess.run(
        [*command, str(Path(__file__).resolve()), *kept], env=environment, check=False
    ).returncode


def compare_straightforward(args: argparse.Namespace) -> int:
    """The comparison with the modules written op by op; 1 where the numbers differ."""
    device, console = choose_device(args.device or "auto", 0), Console()
    result = straightforward.compare(straightforward.Case(), device, repeats=args.repeats, console=console)
    if args.out:
        path = record.write(result, args.out, args.name or "straightforward", console)
        bars = {
            name: {what: result[what]["seconds"][name] for what in ("decoder", "step")}
            for name in straightforward.NAMES
        }
        title = "op by op, and ours: 256 px, batch 8"
        record.draw_bars(bars, path.with_suffix(".png"), title=title, unit="seconds")
    return 0 if result["same_numbers"] else 1


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    # DeepSpeed calls PyTorch functions that 2.13 renamed; nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    try:
        if args.config is None:
            return compare_straightforward(args)
        env = read_environment(os.environ)
        if args.world > 1 and env.world_size == 1:
            return start_several(argv, args.world)
        run(configured(args, env.world_size), env, args)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 1)
    leave()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Other ranks may wait in a collective that will never come; do not wait for them at exit.
    os._exit(code) if code else sys.exit(0)
