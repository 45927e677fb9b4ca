"""Checks of numbers on a GPU: FP8, engines, tensor parallelism and the model against its formulas.

Each is a function job of ``benchmarks/gpu/second.py``. On a CPU, and with ``quick``, models are tiny: that shows
that a check works and what it would find. No GPU has run them yet.
"""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

from benchmarks.gpu.sizes import XXL, one_stage, overrides_of
from benchmarks.jobs.runner import CheckFailed, Found, NotAvailable, Where
from benchmarks.train import compare as straightforward
from benchmarks.train.steps import TrainingSteps
from deco_scale.config import RunConfig, load_config
from deco_scale.distributed.bootstrap import Environment
from deco_scale.errors import ConfigError

SAME = 1e-5
"""Largest relative difference of losses and gradient norms in fp32 between engines and layouts."""
SMALL = (
    "model.dim=512", "model.num_heads=8", "model.num_blocks=4", "model.num_text_blocks=1", "model.text_dim=256",
    "model.text_tokens=32", "text_encoder.max_tokens=32",
)  # fmt: skip
"""Sizes where not quick."""
Trace = list[tuple[float, float]]
"""Loss and gradient norm, step by step."""


def small_config(where: Where, *overrides: str) -> RunConfig:
    """A small text model in one stage, in fp32 and on FSDP2 unless ``overrides`` say otherwise."""
    settings = [
        *(overrides_of(where) or SMALL),
        "objective.repa_weight=0.0",
        "parallel.engine=fsdp",
        "precision.compute=fp32",
        # The same kernel for all that are compared; the race is a job of its own.
        "attention.backend=sdpa",
        # Compiling takes longer than these steps; the suite's first call has the compiled ones.
        "compile=false",
        f"device={where.device}",
        f"run.dir={where.out / 'run'}",
    ]
    side, batch = (32, 4) if where.quick else (256, 16)
    cfg = load_config(XXL, [*settings, *overrides])
    return one_stage(cfg, resolution=side, global_batch=batch, micro_batch=batch, lr=1e-3)


def trace(cfg: RunConfig, steps: int, env: Environment | None = None) -> Trace:
    """Losses and gradient norms of a fresh run on fixed data."""
    run = TrainingSteps(cfg, env or Environment(0, 1, 0))
    try:
        return run.trace(steps)
    finally:
        run.close()


def worst(actual: Trace, expected: Trace) -> float:
    """Largest relative difference, printed by step; a value that is not finite is a failure."""
    pairs = [pair for steps in zip(actual, expected, strict=True) for pair in zip(*steps, strict=True)]
    if not all(math.isfinite(value) for pair in pairs for value in pair):
        raise CheckFailed(f"losses or gradient norms are not finite: {actual}, expected {expected}")
    differences = [abs(a - b) / abs(b) for a, b in pairs]
    # Where only later steps differ, the gradients agree and Adam enlarges their rounding.
    print(
        "by step, loss and gradient norm:", " ".join(f"{difference:.1e}" for difference in differences), flush=True
    )
    return max(differences)


def require_same(differences: Mapping[str, float]) -> Found:
    """Pass where all are at most :data:`SAME`."""
    line = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    if not all(value <= SAME for value in differences.values()):
        raise CheckFailed(f"relative differences above {SAME:g}: {line}")
    return Found(f"largest relative difference: {line}", dict(differences))


def fp8(where: Where) -> Found:
    """FP8 against bf16 on the same data: closer than bf16 is to itself from another start.

    Both backends are tried, torchao in emulation on a CPU; one that fails does not hide the other.
    """
    steps = 10 if where.quick else 50
    emulate = ["precision.fp8_emulate=true"] if where.device == "cpu" else []
    bf16 = {
        name: [loss for loss, _ in trace(small_config(where, "precision.compute=bf16", f"run.seed={seed}"), steps)]
        for name, seed in (("bf16", 0), ("other", 1))
    }
    where.write("bf16", {"losses": bf16})
    seeds = _distance(bf16["other"], bf16["bf16"])
    lines, wrong, missing, numbers = [], [], [], {"between_seeds": seeds}
    for backend, options in (("te", []), ("torchao", emulate)):
        overrides = ["precision.compute=fp8", f"precision.fp8_backend={backend}", *options]
        try:
            losses = [loss for loss, _ in trace(small_config(where, *overrides), steps)]
        except ConfigError as error:
            missing.append(f"{backend}: {error}")
            continue
        except Exception as error:
            # A package may raise anything, and the other backend is still to be tried.
            wrong.append(f"{backend}: {type(error).__name__}: {error}")
            continue
        numbers[backend] = far = _distance(losses, bf16["bf16"])
        where.write(backend, {"losses": losses, "mean_difference": far, "between_seeds": seeds})
        lines.append(f"{backend}{' (emulated)' if options else ''} {far:.2e}")
        if not 0 < far < seeds:
            wrong.append(f"{backend}: mean |fp8 - bf16| {far:.2e}, but between two seeds of bf16 {seeds:.2e}")
    if wrong:
        raise CheckFailed("; ".join([*wrong, *lines, *missing]))
    if not lines:
        raise NotAvailable("; ".join(missing))
    without = f"; not available: {'; '.join(missing)}" if missing else ""
    return Found(
        f"{steps} steps: mean |fp8 - bf16| {', '.join(lines)}; two seeds of bf16 {seeds:.2e}{without}", numbers
    )


def _distance(one: list[float], other: list[float]) -> float:
    """Mean absolute difference."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def engines(where: Where) -> Found:
    """FSDP2 and ZeRO-3 on one device give the same losses and gradient norms in fp32."""
    cfg = small_config(where)
    fsdp = trace(cfg, 4)
    where.write("fsdp", {"trace": fsdp})
    zero3 = trace(dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, engine="deepspeed")), 4)
    where.write("zero3", {"trace": zero3})
    return require_same({"ZeRO-3 against FSDP2": worst(zero3, fsdp)})


def tensor_parallel(where: Where) -> Found:
    """Two ranks of tensor parallelism, on one GPU where there is one, over gloo, against one rank.

    NCCL takes one rank a GPU. gloo copies CUDA tensors through host memory: PyTorch 2.11 has all_reduce and
    all_gather for them, and reduce_scatter_tensor as an all_reduce, which is all that this path calls.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_tp_rank, args=(where, folder), nprocs=2, start_method="spawn")
        two = json.loads((Path(folder) / "trace.json").read_text())
    where.write("tp2", {"trace": two})
    one = trace(small_config(where), 4)
    where.write("tp1", {"trace": one})
    return require_same({"tp 2 against tp 1": worst(two, one)})


def _tp_rank(rank: int, where: Where, folder: str) -> None:
    if where.device == "cpu":
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    losses = trace(small_config(where, "parallel.tp=2"), 4, Environment(rank, 2, 0))
    if rank == 0:
        (Path(folder) / "trace.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


def twins(where: Where) -> Found:
    """The model in fp32 gives the numbers of the straightforward modules in float64."""
    case = straightforward.Case(batch=2)
    if where.quick:
        case = straightforward.Case(
            side=32, batch=2, dim=32, num_heads=2, num_blocks=1, text_dim=16, text_tokens=4, encoder_dim=16
        )
    result = straightforward.compare(case, torch.device(where.device), repeats=1, console=Console())
    where.write("comparison", result)
    kinds = [(what, kind) for what in ("decoder", "step") for kind in ("loss", "gradients")]
    return require_same({f"{what} {kind}": result[what][kind]["ours"] for what, kind in kinds})
