"""The checks of the GPU suite; each runs in a process of its own (``python -m benchmarks.checks NAME ...``).

A check returns what it found or raises: :class:`NotAvailable` where this machine lacks something, and
:class:`CheckFailed` where a result is wrong. On a CPU, and with ``--quick``, models are tiny: that shows that the
machinery works, and nothing about speed. No GPU has run them yet.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

from benchmarks import record, straightforward
from benchmarks.steps import TrainingSteps
from deco_scale.config import RunConfig, build_config
from deco_scale.environment import Environment
from deco_scale.errors import ConfigError
from deco_scale.models.attention import KERNELS, kernel_missing
from deco_scale.models.attention_choice import choose_backend, model_shapes

SAME = 1e-5
"""Largest relative difference of losses and gradient norms in fp32 between engines and layouts."""
Trace = list[tuple[float, float]]


class NotAvailable(Exception):
    """This machine lacks what the check needs; the text says what."""


class CheckFailed(Exception):
    """The check ran and the result is wrong."""


@dataclasses.dataclass(frozen=True)
class Where:
    """Device (``cpu`` or ``cuda``), whether sizes are small, and where files go."""

    device: str
    quick: bool
    out: Path


@dataclasses.dataclass(frozen=True)
class Found:
    """A line for the table, and numbers for the JSON."""

    line: str
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)


def small_config(where: Where, **sections: Any) -> RunConfig:
    """A small text model; ``sections`` are merged over it, section by section."""
    tiny = where.quick
    model = {
        "kind": "t2i_deco",
        "dim": 64 if tiny else 512,
        "num_heads": 4 if tiny else 8,
        "num_blocks": 2 if tiny else 4,
        "num_text_blocks": 1,
        "decoder_width": 8 if tiny else 32,
        "decoder_blocks": 1 if tiny else 3,
        "text_dim": 32 if tiny else 256,
        "text_tokens": 16 if tiny else 32,
    }
    side, batch = (32, 4) if tiny else (256, 16)
    stage = {
        "name": "small",
        "resolution": side,
        "steps": 100,
        "global_batch": batch,
        "micro_batch": batch,
        "lr": 1e-3,
    }
    raw: dict[str, Any] = {
        "run": {"dir": str(where.out / "run")},
        "model": model,
        "text_encoder": {"path": "none", "max_tokens": model["text_tokens"]},
        "objective": {"repa_weight": 0.0},
        "data": {"url": "none"},
        "device": where.device,
        "precision": {"compute": "fp32"},
        "stages": [stage],
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values} if isinstance(values, dict) else values
    return build_config(raw, source="the suite's small model")


def trace(cfg: RunConfig, steps: int, env: Environment | None = None) -> Trace:
    """Losses and gradient norms of a fresh run on fixed data."""
    run = TrainingSteps(cfg, env or Environment(0, 1, 0))
    try:
        return run.trace(steps)
    finally:
        run.close()


def worst(found: Trace, wanted: Trace) -> float:
    """Largest relative difference; a value that is not finite is a failure."""
    pairs = [pair for steps in zip(found, wanted, strict=True) for pair in zip(*steps, strict=True)]
    if not all(math.isfinite(value) for pair in pairs for value in pair):
        raise CheckFailed(f"losses or gradient norms are not finite: {found} against {wanted}")
    return max(abs(a - b) / abs(b) for a, b in pairs)


def require_same(differences: dict[str, float]) -> Found:
    """Pass where all are below :data:`SAME`."""
    line = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    if not all(value <= SAME for value in differences.values()):
        raise CheckFailed(f"relative differences above {SAME:g}: {line}")
    return Found(f"largest relative difference: {line}", differences)


def kernels(where: Where) -> Found:
    """The kernels' own tests: on a GPU they run there, else Triton's interpreter runs one module of them."""
    if where.device == "cuda":
        wanted = ["tests/gpu", *sorted(str(p) for p in (record.ROOT / "tests/unit").glob("test_triton_*.py"))]
    else:
        wanted = ["tests/unit/test_triton_adamw.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *wanted]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
    if done.returncode:
        raise CheckFailed(f"pytest ended with {done.returncode}: {last}")
    return Found(last)


def attention(where: Where) -> Found:
    """Every attention kernel that can run here against the formula, forward and backward, with its times."""
    device = torch.device(where.device)
    dtype = torch.bfloat16 if where.device == "cuda" else torch.float32
    cfg = small_config(where).model
    if not where.quick:
        cfg = dataclasses.replace(cfg, dim=1536, num_heads=24, text_tokens=128)
    reasons = {name: kernel_missing(name, device, dtype, cfg.head_dim) for name in KERNELS}  # type: ignore[arg-type]
    candidates = {name: KERNELS[name] for name, reason in reasons.items() if reason is None}
    numbers: dict[str, Any] = {"missing": {n: r for n, r in reasons.items() if r is not None}}
    wrong, fastest = [], []
    for resolution in (32,) if where.quick else (256, 512):
        for shape in model_shapes(cfg, resolution=resolution, batch=2 if where.quick else 16):
            choice = choose_backend(shape, device=device, dtype=dtype, candidates=candidates)
            numbers[f"{shape.queries} x {shape.keys}"] = dict(choice.times_ms)
            wrong += [f"{name} ({reason})" for name, reason in choice.left_out]
            fastest.append(f"{shape.queries} x {shape.keys}: {choice.kernel}")
    if wrong:
        raise CheckFailed("; ".join(wrong))
    return Found(f"{', '.join(candidates)} agree with the formula; fastest {', '.join(fastest)}", numbers)


def fp8(where: Where) -> Found:
    """FP8 against bf16 on the same data: closer than bf16 is to itself from another start."""
    steps = 10 if where.quick else 50
    emulated = where.device == "cpu"
    backend = {"fp8_backend": "torchao", "fp8_emulate": True} if emulated else {"fp8_backend": "te"}
    runs = {
        "bf16": small_config(where, precision={"compute": "bf16"}),
        "fp8": small_config(where, precision={"compute": "fp8", **backend}),
        "other": small_config(where, precision={"compute": "bf16"}, run={"seed": 1}),
    }
    try:
        losses = {name: [loss for loss, _ in trace(cfg, steps)] for name, cfg in runs.items()}
    except ConfigError as error:
        raise NotAvailable(str(error)) from error
    far = {
        name: sum(abs(a - b) for a, b in zip(losses[name], losses["bf16"], strict=True)) / steps
        for name in ("fp8", "other")
    }
    line = f"{steps} steps: mean |fp8 - bf16| {far['fp8']:.2e}, between two seeds of bf16 {far['other']:.2e}"
    if not 0 < far["fp8"] < far["other"]:
        raise CheckFailed(f"{line}; fp8 must differ, and less than the seeds do")
    return Found(line + (" (emulated)" if emulated else ""), {"losses": losses, **far})


def engines(where: Where) -> Found:
    """FSDP2 and ZeRO-3 on one device give the same losses and gradient norms in fp32."""
    cfg = small_config(where)
    fsdp = trace(cfg, 4)
    zero = trace(dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, engine="deepspeed")), 4)
    return require_same({"ZeRO-3 against FSDP2": worst(zero, fsdp)})


def tensor_parallel(where: Where) -> Found:
    """Two ranks of tensor parallelism, on one GPU where there is one, over gloo, against one rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_tp_rank, args=(where, folder), nprocs=2, start_method="spawn")
        two = json.loads((Path(folder) / "trace.json").read_text())
    return require_same({"tp 2 against tp 1": worst(two, trace(small_config(where), 4))})


def _tp_rank(rank: int, where: Where, folder: str) -> None:
    if where.device == "cpu":
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    # NCCL takes one rank a GPU; both ranks sit on the first.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = trace(small_config(where, parallel={"tp": 2}), 4, Environment(rank, 2, 0))
    if rank == 0:
        (Path(folder) / "trace.json").write_text(json.dumps(found))
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
    kinds = [(what, kind) for what in ("decoder", "step") for kind in ("loss", "gradients")]
    return require_same({f"{what} {kind}": result[what][kind]["ours"] for what, kind in kinds})


CHECKS: dict[str, Callable[[Where], Found]] = {
    "kernels": kernels,
    "attention": attention,
    "fp8": fp8,
    "engines": engines,
    "tensor_parallel": tensor_parallel,
    "twins": twins,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one check and write ``NAME.json``; the exit code is 0 unless the check itself broke off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(CHECKS))
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    try:
        found = CHECKS[args.name](Where(args.device, args.quick, args.out))
        outcome = {"status": "pass", "line": found.line, "numbers": found.numbers}
    except CheckFailed as error:
        outcome = {"status": "fail", "line": str(error), "numbers": {}}
    except NotAvailable as error:
        outcome = {"status": "not available", "line": str(error), "numbers": {}}
    (args.out / f"{args.name}.json").write_text(json.dumps(outcome, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A process group that was left open must not hold up the end.
    os._exit(code)
