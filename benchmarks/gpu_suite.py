"""Everything that needs a GPU, in under nine minutes on one H100 and without a network. No GPU has run it yet.

    python -m benchmarks.gpu_suite --out DIR [--quick] [--device cpu]

Each check is a process group of its own with a time limit, killed as a whole when it is over. A check passes,
fails, or is not available, with the reason. A table at the end, a JSON file and a log for each check in DIR; exit
code 1 where one failed. With ``--device cpu`` (always tiny models) the same machinery runs without a GPU.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.measure import device_name

BUDGET_S = 540.0
"""What the whole suite may take; a check that has no time left fails."""
XXL = "configs/t2i_xxl.yaml"
SPEED_UP = 3.0
"""Promised images/s against the straightforward eager model."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A check as a command; ``result`` is the throughput file it writes, or None where it writes its outcome."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    result: str | None = None
    promised_mfu: float | None = None


def correctness_jobs(device: str, quick: bool, out: Path) -> list[Job]:
    """The checks of benchmarks/checks.py with their limits in seconds."""
    limits = {"kernels": 120, "attention": 45, "fp8": 75, "engines": 60, "tensor_parallel": 60, "twins": 45}
    options = ("--device", device, "--out", str(out), *(("--quick",) if quick else ()))
    return [Job(n, ("-m", "benchmarks.checks", n, *options), limit) for n, limit in limits.items()]


def speed_jobs(quick: bool, out: Path) -> list[Job]:
    """The training step of the XXL model on one GPU, in its variants, encoders precomputed."""
    # (stage, micro-batch, name, settings, promised MFU); quick leaves out all but the two ends.
    ours, plain = ("kernels=triton", "compile=true"), ("kernels=torch", "compile=false")
    variants: list[tuple[str, int, str, tuple[str, ...], float | None]] = [
        ("pretrain_256", 32, "straightforward", plain, None),
        ("pretrain_256", 32, "ours", ours, None),
        ("pretrain_256", 64, "bf16_triton_compile", ours, 0.45),
        ("pretrain_256", 64, "bf16_triton", ("kernels=triton", "compile=false"), None),
        ("pretrain_256", 64, "bf16_torch_compile", ("kernels=torch", "compile=true"), None),
        ("pretrain_256", 64, "bf16_torch", plain, None),
        ("pretrain_256", 64, "fp8_triton_compile", (*ours, "precision.compute=fp8"), None),
        ("pretrain_512", 16, "bf16_triton_compile", ours, 0.45),
        ("pretrain_512", 16, "fp8_triton_compile", (*ours, "precision.compute=fp8"), None),
    ]
    jobs = []
    for stage, micro_batch, name, settings, mfu in variants[:2] if quick else variants:
        full = f"xxl_{stage.removeprefix('pretrain_')}_{name}"
        command = [
            "-m", "benchmarks.throughput", "--config", XXL, "--stage", stage, "--micro-batch", str(micro_batch),
            "--accumulation", "1", "--device", "cuda", "--steps", "3", "--repeats", "3", "--out", str(out),
            "--name", full, "parallel.engine=fsdp", *settings,
        ]  # fmt: skip
        command += ["--straightforward", "--no-parts"] if name == "straightforward" else []
        jobs.append(Job(full, tuple(command), 90, result=full, promised_mfu=mfu))
    return jobs


def cpu_speed_jobs(out: Path) -> list[Job]:
    """One tiny run of the same command, so that its way is covered without a GPU."""
    command = (
        "-m", "benchmarks.throughput", "--config", "configs/t2i_tiny.yaml", "--device", "cpu", "--out", str(out),
        "--name", "tiny", "--micro-batch", "2", "--accumulation", "1", "--repeats", "1", "--warmup", "1",
        "--gemm-side", "64", "--copy-bytes", "65536", "parallel.engine=fsdp", "model.num_blocks=1", "model.dim=32",
    )  # fmt: skip
    return [Job("tiny", command, 60, result="tiny")]


def run_job(job: Job, out: Path, limit_s: float) -> dict[str, Any]:
    """Start ``job`` as the head of a group of its own, end the group at the limit, and read what it wrote."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    with (out / f"{job.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *job.command],
            cwd=record.ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Also what outlives the head: ranks and workers it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcome = read_outcome(job, out, code, limit_s)
    return {**outcome, "seconds": time.monotonic() - began}


def read_outcome(job: Job, out: Path, code: int | None, limit_s: float) -> dict[str, Any]:
    """Status, line and numbers of a job that ended with ``code`` (None: killed at its limit)."""
    log = f"see {job.name}.log"
    if code is None:
        return {"status": "fail", "line": f"took more than {limit_s:.0f} s; {log}", "numbers": {}}
    if job.result is None:
        path = out / f"{job.name}.json"
        if code or not path.exists():
            return {"status": "fail", "line": f"ended with {code}; {log}", "numbers": {}}
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    if code:
        last = (out / f"{job.name}.log").read_text().strip().splitlines()[-1:] or [""]
        # Exit code 2: the configuration asks for what this machine lacks, and the message says what.
        status = "not available" if code == 2 else "fail"
        return {"status": status, "line": f"{last[0]}; {log}", "numbers": {}}
    numbers = json.loads(max(out.glob(f"{job.result}_*.json")).read_text())
    if not math.isfinite(numbers["loss"]):
        return {"status": "fail", "line": f"the loss is {numbers['loss']}; {log}", "numbers": numbers}
    return {"status": "pass", "line": speed_line(job, numbers), "numbers": numbers}


def speed_line(job: Job, numbers: dict[str, Any]) -> str:
    """Images/s, MFU, memory, and whether a promised MFU was met: speed is stated, and fails nothing."""
    mfu = numbers["mfu_of_datasheet"]
    shares = f"MFU {numbers['mfu_of_gemm']:.1%} of the GEMM"
    if mfu is not None:
        shares += f", {mfu:.1%} of the datasheet"
    line = f"{numbers['images_per_s']:.1f} images/s, {shares}, {numbers['peak_memory_bytes'] / 2**30:.1f} GiB"
    if job.promised_mfu is not None and mfu is not None:
        line += f"; {job.promised_mfu:.0%} {'met' if mfu >= job.promised_mfu else 'MISSED'}"
    return line


def ratios(outcomes: dict[str, dict[str, Any]]) -> list[str]:
    """Promised ratios between runs of this suite, where both are there."""
    wanted = [
        ("xxl_256_ours", "xxl_256_straightforward", SPEED_UP, "ours against the straightforward eager model"),
        ("xxl_256_fp8_triton_compile", "xxl_256_bf16_triton_compile", 1.15, "FP8 against bf16 at 256"),
        ("xxl_512_fp8_triton_compile", "xxl_512_bf16_triton_compile", 1.15, "FP8 against bf16 at 512"),
    ]
    lines = []
    for one, other, promised, what in wanted:
        rates = [outcomes.get(name, {}).get("numbers", {}).get("images_per_s") for name in (one, other)]
        if rates[0] and rates[1]:
            found = rates[0] / rates[1]
            lines.append(
                f"{'met' if found >= promised else 'MISSED':6} {what}: {found:.2f} times ({promised} promised)"
            )
    return lines


def run_suite(jobs: list[Job], out: Path, console: Console) -> dict[str, dict[str, Any]]:
    """All jobs within the budget, a line each as they end."""
    began, outcomes = time.monotonic(), {}
    for job in jobs:
        left = BUDGET_S - (time.monotonic() - began)
        if left < 5:
            line = f"not run: the {BUDGET_S:.0f} s of the suite are used up"
            outcome: dict[str, Any] = {"status": "fail", "line": line, "numbers": {}, "seconds": 0.0}
        else:
            outcome = run_job(job, out, min(job.limit_s, left))
        outcomes[job.name] = outcome
        console.print(f"{job.name}: {outcome['status']} ({outcome['seconds']:.0f} s)", highlight=False)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and JSON files")
    parser.add_argument("--quick", action="store_true", help="tiny models, and two of the XXL runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the checks")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    out, cpu, console = args.out.resolve(), args.device == "cpu", Console()
    jobs = correctness_jobs(args.device, args.quick or cpu, out)
    jobs += cpu_speed_jobs(out) if cpu else speed_jobs(args.quick, out)
    if args.only:
        unknown = set(args.only) - {job.name for job in jobs}
        if unknown:
            parser.error(f"no check {sorted(unknown)}; possible: {[job.name for job in jobs]}")
        jobs = [job for job in jobs if job.name in args.only]
    if not cpu and not torch.cuda.is_available():
        why = "PyTorch sees no GPU on this machine"
        nothing: dict[str, Any] = {"status": "not available", "line": why, "numbers": {}, "seconds": 0.0}
        outcomes = {job.name: dict(nothing) for job in jobs}
    else:
        outcomes = run_suite(jobs, out, console)
    table = Table("check", "result", "s", "what")
    for name, outcome in outcomes.items():
        table.add_row(name, outcome["status"], f"{outcome['seconds']:.0f}", outcome["line"])
    console.print(table)
    for line in ratios(outcomes):
        console.print(line, highlight=False)
    device = "none" if not cpu and not torch.cuda.is_available() else device_name(torch.device(args.device))
    result = {
        **record.origin(),
        "kind": "gpu_suite",
        "torch": torch.__version__,
        "device": device,
        "checks": outcomes,
    }
    record.write(result, out, "gpu_suite", console)
    return 1 if any(outcome["status"] == "fail" for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
