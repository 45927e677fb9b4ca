"""The tables of ``deco plan --gpu``."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deco_scale.planning.calibration import Measured, compare, median_errors
from deco_scale.planning.forecast import Plan
from deco_scale.planning.hardware import COPY_SHARE, LAUNCH_S, Device
from deco_scale.planning.memory import MARGIN, RESERVE_BYTES

GIB = 2**30


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
    """The fastest ``top`` layouts of each engine that fit, and the configuration's own; a line for each stage."""
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
    console.print(
        f"{count} of {len(plans)} layouts fit; *: the fastest of them, recommended; own: as configured. layout: "
        "dp_replicate x dp_shard x tp; micro: micro-batch x accumulation, the fastest that fits",
        highlight=False,
    )


def print_plan(plan: Plan, device: Device, console: Console, *, price: float | None) -> None:
    """The recommended layout: what to set, memory and time by part, the whole recipe."""
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
    console.print("recommended: " + " ".join(settings), highlight=False, soft_wrap=True)
    cost = f", cost {plan.gpu_hours * price:,.0f} at {price:g} a GPU-hour" if price is not None else ""
    console.print(
        f"the whole recipe: {plan.days:.2f} days, {plan.gpu_hours:,.0f} GPU-hours{cost}", highlight=False
    )
    names = [f.stage.name for f in plan.stages]
    memory = Table("memory of a GPU, GiB", *names)
    for part in plan.stages[0].memory:
        memory.add_row(part, *(f"{f.memory[part] / GIB:.3f}" for f in plan.stages))
    memory.add_section()
    memory.add_row("sum", *(f"{f.memory_bytes / GIB:.3f}" for f in plan.stages))
    console.print(memory)
    seconds = Table("time of a step, ms", *names)
    for part in plan.stages[0].seconds:
        seconds.add_row(part, *(f"{1e3 * f.seconds[part]:.1f}" for f in plan.stages))
    seconds.add_section()
    seconds.add_row("sum", *(f"{1e3 * f.step_s:.1f}" for f in plan.stages))
    console.print(seconds)


def print_assumptions(device: Device, notes: Sequence[str], console: Console) -> None:
    """Where each rate comes from, and the rules of the prediction."""
    lines = [f"{figure}" for figure in device.figures]
    lines += [
        f"host time of an operation {1e6 * LAUNCH_S[device.kind]:.0f} us (assumed)",
        f"reserve {RESERVE_BYTES[device.kind] / GIB:.1f} GiB for CUDA and NCCL (assumed); "
        f"{MARGIN:.0%} of the memory stay free",
        "a GPU's GEMMs reach the rate of a large one; memory-bound parts reach the copy rate "
        f"({COPY_SHARE:.0%} of the datasheet where nothing is measured)",
        "overlap: fsdp hides gathers and reductions behind computation but for one unit of the model, ZeRO-3 its "
        "gathers, ZeRO-2 its reductions; what tp sends is never hidden; latency is left out",
        "waiting for data, checkpoints, pictures and faults are not counted",
        "what Triton kernels, compiled blocks and FP8 save is counted, not measured: not yet run on a GPU",
        *notes,
    ]
    console.print("assumptions:", highlight=False)
    for line in lines:
        console.print(f"  - {line}", highlight=False, soft_wrap=True, markup=False)


def print_errors(measured: Sequence[Measured], skipped: int, folder: Path, console: Console) -> None:
    """Predicted against measured, file by file, and the median error."""
    aside = f" ({skipped} throughput files of another kind skipped)" if skipped else ""
    if not measured:
        console.print(
            f"error of the prediction: no measured throughput result in {folder}{aside}, so it is not known",
            highlight=False,
            soft_wrap=True,
        )
        return
    comparisons = [compare(m) for m in measured]
    console.print(f"error of the prediction against {len(comparisons)} result files{aside}:", highlight=False)
    for found in comparisons:
        measure = found.measured
        notes = "".join(f"; {note}" for note in measure.notes)
        console.print(
            f"  {measure.file} ({measure.world} x {measure.device_name}): step {found.step_s:.4g} s predicted, "
            f"{measure.step_s:.4g} s measured ({found.step_error:+.0%}); "
            f"memory {found.memory_bytes / GIB:.3f} GiB predicted, "
            f"{measure.peak_memory_bytes / GIB:.3f} measured ({found.memory_error:+.0%}){notes}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    step, memory = median_errors(comparisons)
    console.print(f"  median error: step time {step:.0%}, memory {memory:.0%}", highlight=False)
