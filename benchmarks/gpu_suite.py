"""What is to be measured and checked on one GPU, without a network, in two calls. No GPU has run it yet.

    python -m benchmarks.gpu_suite --out DIR --first      speed: matrix products, the XXL step, FP8, encoders
    python -m benchmarks.gpu_suite --out DIR --second     correctness, and what is worth a second look
    python -m benchmarks.gpu_suite --out DIR              both, one after the other

Each job is a process group with a time limit, killed as a whole when it is over; what it had measured by then is
kept. A job passes, fails, is not available or has not run, with the reason. DIR has a log and a JSON file for
each job and one JSON file for the call, rewritten after every job. Exit code 1 where a job failed or did not run.
With ``--device cpu`` (always tiny models) the same machinery runs without a GPU. ``--only NAME ...`` runs some.
"""

import argparse
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import record
from benchmarks.jobs.processes import end_of_process
from benchmarks.jobs.runner import Job, Outcome, failed, run_jobs

CALLS = {"first": "benchmarks.gpu.first", "second": "benchmarks.gpu.second"}
"""Modules with ``jobs(device)`` and ``BUDGET_S``; they import nothing that takes seconds."""
SPEED_UP = 3.0
"""Promised images/s against the straightforward eager model."""
FP8_GAIN = 1.15
"""Promised images/s of FP8 against bf16."""
CPU_FACTOR = 6.0
"""Limits on a CPU, in those of a GPU."""
MFU = 0.45
"""Promised share of the datasheet's bf16 FLOP/s."""


def compile_caches(base: Path) -> dict[str, str]:
    """Environment of all jobs: what one has compiled the others find. Outside of DIR, which is packed and sent."""
    return {
        name: os.environ.get(name, str(base / folder))
        for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton"))
    }


def chosen(jobs: Sequence[Job], only: Sequence[str] | None) -> list[Job]:
    """The jobs named, in their order, and the one that all depend on. Raises ``ValueError`` for unknown names."""
    unknown = set(only or ()) - {job.name for job in jobs}
    if unknown:
        raise ValueError(f"no job {sorted(unknown)}; possible: {[job.name for job in jobs]}")
    return [job for job in jobs if not only or job.name in only or job.gate]


def kept_checks(file: Path, header: Mapping[str, Any]) -> dict[str, Outcome]:
    """Outcomes in an earlier ``file`` of the same commit, device and sizes: ``--only`` replaces some of them."""
    earlier = json.loads(file.read_text()) if file.exists() else {}
    same = all(earlier.get(name) == header[name] for name in ("commit", "device", "quick"))
    return earlier.get("checks", {}) if same else {}


def print_plan(call: str, jobs: Sequence[Job], budget_s: float, console: Console) -> None:
    """Limits, and how long jobs are thought to take: estimates by arithmetic, not measurements."""
    table = Table("job", "limit s", "estimated s", "", title=f"{call} call, {budget_s:.0f} s at most")
    for job in jobs:
        estimate = "" if job.estimate_s is None else f"{job.estimate_s:.0f}"
        table.add_row(job.name, f"{job.limit_s:.0f}", estimate, "in the background" if job.background else "")
    limits, estimates = sums_s(jobs)
    table.add_row("sum", f"{limits:.0f}", f"{estimates:.0f}", "the longest in the background and the others")
    console.print(table)


def sums_s(jobs: Sequence[Job]) -> tuple[float, float]:
    """Limits and estimates of what is waited for: all in turn, and of those in the background the longest."""

    def whole(of: Callable[[Job], float]) -> float:
        beside = [of(job) for job in jobs if job.background]
        return sum(of(job) for job in jobs if not job.background) + max(beside, default=0.0)

    return whole(lambda job: job.limit_s), whole(lambda job: job.estimate_s or job.limit_s)


def promises(outcomes: Mapping[str, Outcome]) -> list[str]:
    """What was promised of speed and what this call found, where it has both figures; it fails nothing."""

    def figure(job: str, variant: str, name: str) -> float | None:
        return outcomes.get(job, {}).get("parts", {}).get(variant, {}).get(name)  # type: ignore[no-any-return]

    def verdict(found: float, promised: float) -> str:
        return "met   " if found >= promised else "MISSED"

    lines = []
    for job, variant, what in (
        ("xxl_256", "compiled_accumulation_4", "256 px, accumulation 4, no engine"),
        ("xxl_256_fsdp", "compiled_accumulation_4", "256 px, accumulation 4, FSDP2"),
        ("xxl_512", "compiled", "512 px, no engine"),
    ):
        share = figure(job, variant, "mfu_of_datasheet")
        if share is not None:
            lines.append(f"{verdict(share, MFU)} MFU at {what}: {share:.1%} of the datasheet ({MFU:.0%} promised)")
    for one, other, promised, what in (
        (
            ("xxl_256", "compiled"),
            ("xxl_256", "straightforward"),
            SPEED_UP,
            "compiled against straightforward eager",
        ),
        (("fp8_te", "compiled"), ("xxl_256", "compiled"), FP8_GAIN, "FP8 by Transformer Engine against bf16"),
        (("fp8_torchao", "compiled"), ("xxl_256", "compiled"), FP8_GAIN, "FP8 by torchao against bf16"),
    ):
        rates = [figure(*place, "images_per_s") for place in (one, other)]
        if rates[0] and rates[1]:
            sizes = [figure(*place, "micro_batch") for place in (one, other)]
            batches = "" if sizes[0] == sizes[1] else f", micro-batch {sizes[0]} against {sizes[1]}"
            found = rates[0] / rates[1]
            lines.append(f"{verdict(found, promised)} {what}: {found:.2f} times ({promised} promised{batches})")
    return lines


def print_kernels(outcomes: Mapping[str, Outcome], console: Console) -> None:
    """The kernels that took most of a profiled step; nothing where none was profiled."""
    for name, outcome in outcomes.items():
        trace = outcome["parts"].get("trace")
        if trace:
            title = f"{name}, {trace['variant']}: largest of {trace['total_ms']:.4g} ms"
            table = Table("kernel", "ms", "calls", "share", title=title)
            for kernel in trace["kernels"]:
                row = (f"{kernel['ms']:.3g}", str(kernel["calls"]), f"{kernel['share']:.1%}")
                table.add_row(escape(kernel["name"][:90]), *row)
            console.print(table)


def run_call(call: str, args: argparse.Namespace, console: Console) -> bool:
    """Run one call; whether a job failed or did not run."""
    module: Any = importlib.import_module(CALLS[call])
    jobs = chosen(module.jobs(args.device), args.only)
    caches = compile_caches(Path(tempfile.gettempdir()) / f"deco_compiled_{os.getuid()}")
    jobs = [dataclasses.replace(job, environment={**caches, **job.environment}) for job in jobs]
    budget_s = module.BUDGET_S
    if args.device == "cpu":
        # The limits are a GPU machine's, which has 16 cores.
        budget_s *= CPU_FACTOR
        jobs = [dataclasses.replace(job, limit_s=job.limit_s * CPU_FACTOR) for job in jobs]
    print_plan(call, jobs, budget_s, console)
    origin, quick = record.origin(), args.quick or args.device == "cpu"
    header = {**origin, "kind": f"gpu_suite_{call}", "device": args.device, "quick": quick}
    file = f"gpu_suite_{call}_{origin['date']}.json"
    if args.only:
        header["checks"] = kept_checks(args.out / file, header)
    with end_of_process(budget_s):
        outcomes = run_jobs(
            jobs,
            args.out,
            budget_s,
            console,
            device=args.device,
            quick=quick,
            file=file,
            header=header,
        )
    if quick:
        console.print("Tiny models: this shows that the jobs run, and nothing about speed.")
    print_kernels(outcomes, console)
    for text in [] if quick else promises(outcomes):
        console.print(text, highlight=False, soft_wrap=True)
    counts = Counter(outcome["status"] for outcome in outcomes.values())
    ends = ", ".join(f"{count} {status}" for status, count in counts.items())
    console.print(f"{call} call: {ends}; results in {args.out / file}", highlight=False, soft_wrap=True)
    return failed(outcomes)


def run_each(command: Sequence[str]) -> int:
    """Each call in a process of its own, so that one ended at its budget leaves the other; largest exit code."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    codes, before = [], signal.signal(signal.SIGTERM, stop)
    try:
        for call in CALLS:
            with subprocess.Popen([*command, f"--{call}"]) as process:
                try:
                    codes.append(abs(process.wait()))
                finally:
                    # Where this process is to end: the call ends its jobs, and is waited for.
                    process.terminate()
    finally:
        signal.signal(signal.SIGTERM, before)
    return max(codes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and JSON files")
    parser.add_argument("--first", action="store_true", help="the first call alone")
    parser.add_argument("--second", action="store_true", help="the second call alone")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the jobs of one call")
    args = parser.parse_args(argv)
    calls = [call for call in CALLS if getattr(args, call)] or list(CALLS)
    if args.only and len(calls) > 1:
        parser.error("--only goes with --first or --second")
    # A log file is no terminal, and 80 columns would break every line of the table.
    console = Console(width=None if sys.stdout.isatty() else 160)
    if len(calls) > 1:
        # Each in a process of its own: one that is ended at its budget leaves the other.
        given = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("--first", "--second")]
        return run_each([sys.executable, str(Path(__file__).resolve()), *given])
    try:
        return 1 if run_call(calls[0], args, console) else 0
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing that was left behind may hold up the end.
    os._exit(code)
