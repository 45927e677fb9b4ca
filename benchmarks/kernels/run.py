"""Each kernel against the roofline of this device, against its eager and its compiled equivalent.

    python -m benchmarks.kernels [--config FILE] [--batch N] [--resolution N] [--only WORD] [--out DIR]
    python -m benchmarks.kernels --compile-only [--out benchmarks/results]
    python -m benchmarks.kernels --host

Forward and backward together; shapes are those of a micro-batch of the configuration. The roofline is the larger
of the least bytes over the copy bandwidth and the FLOPs over the GEMM, both measured in the same run. On a CPU
only twins are timed, never Triton's interpreter. On a GPU the actions are CUDA graphs, so that launches do not
count (not yet run on a GPU). A variant that fails is named with its reason, and the exit code is 1.

``--compile-only`` needs no GPU: the Triton kernels of the released models are compiled for sm_90 (see
:mod:`benchmarks.kernels.compile`), and registers, spills and shared memory are shown; ``--out`` puts them into
``kernels_sm90.json`` there, in place of those of the same version of Triton. ``--host`` measures what calling an
operator costs the host (:mod:`benchmarks.kernels.host_cost`), also without a GPU.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.jobs.runner import first_line
from benchmarks.kernels.cases import (
    BY_OP,
    BY_OP_COMPILED,
    COMPILED,
    EAGER,
    TRITON,
    Case,
    Setting,
    all_cases,
)
from benchmarks.measure import Ceilings, captured, device_name, measure_ceilings, medians_s
from benchmarks.train.compare import Promise
from deco_scale.config import load_config
from deco_scale.distributed.bootstrap import choose_device
from deco_scale.errors import ConfigError

BATCH = {"cuda": 64, "cpu": 2}
"""Micro-batch where none is given: the published one, and one that a CPU finishes."""

SO_FAR = "kernels_so_far.json"
"""In ``--out`` until the last case has been measured."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=record.ROOT / "configs" / "t2i_xxl.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch", type=int, help="samples of a micro-batch")
    parser.add_argument("--resolution", type=int, help="in place of the first stage's")
    parser.add_argument("--compute", choices=("fp32", "bf16"), help="activations; bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--only", default="", help="cases whose name has this word in it")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-compiled", action="store_true", help="leave out what torch.compile makes")
    parser.add_argument("--no-graphs", action="store_true", help="on a GPU: time the launches too")
    parser.add_argument("--gemm-side", type=int, help="side of the GEMM that serves as ceiling")
    parser.add_argument("--copy-bytes", type=int, help="bytes of the copy that serves as ceiling")
    parser.add_argument("--compile-only", action="store_true", help="registers, spills and shared memory on sm_90")
    parser.add_argument("--host", action="store_true", help="what calling an operator costs the host")
    parser.add_argument("--out", type=Path, help="folder for a JSON file and a PNG")
    return parser.parse_args(argv)


def measure(case: Case, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each variant; reasons of those that are not there or failed."""
    ready: dict[str, Callable[[], object]] = {}
    missing, failed = dict(case.missing), {}
    for name, action in case.variants.items():
        if args.no_compiled and COMPILED in name:
            missing[name] = "left out by --no-compiled"
            continue
        try:
            action()
            graph = case.capturable and not args.no_graphs
            ready[name] = captured(action, setting.device) if graph else action
        except Exception as error:
            # A compiler or a package may raise anything; the table says it and the exit code does.
            failed[name] = first_line(error)
    options = {"repeats": args.repeats, "device": setting.device, "launches": args.no_graphs}
    return {
        "seconds": medians_s(ready, **options) if ready else {},
        "min_bytes": case.min_bytes,
        "flops": case.flops,
        "missing": missing,
        "failed": failed,
    }


def show(name: str, found: dict[str, Any], ceilings: Ceilings, console: Console) -> None:
    """One table: time, rates and share of the roofline by variant."""
    table = Table("variant", "ms", "GB/s", "TFLOP/s", "of the roofline", "times the first", title=name)
    seconds = found["seconds"]
    first = next(iter(seconds.values()), 0.0)
    for variant, value in seconds.items():
        table.add_row(
            variant,
            f"{1e3 * value:.4g}",
            f"{found['min_bytes'] / value / 1e9:.4g}" if found["min_bytes"] else "-",
            f"{found['flops'] / value / 1e12:.4g}" if found["flops"] else "-",
            f"{roofline_s(found, ceilings) / value:.1%}",
            f"{first / value:.2f}",
        )
    console.print(table)
    for kind in ("missing", "failed"):
        for variant, reason in found[kind].items():
            console.print(f"  {variant} {kind}: {reason}", highlight=False, markup=False)


def roofline_s(found: dict[str, Any], ceilings: Ceilings) -> float:
    """Seconds that the bytes or the FLOPs take at the measured ceilings, whichever are more."""
    moving = found["min_bytes"] / (ceilings.copy_gb_per_s * 1e9)
    return max(moving, found["flops"] / (ceilings.gemm_tflops_per_s * 1e12))


def decoder_promises(found: dict[str, Any], ceilings: Ceilings) -> list[Promise]:
    """What the fused decoder has to reach, against the better twin each time; none without a Triton time."""
    seconds = found["seconds"]
    if TRITON not in seconds:
        return []
    fused = seconds[TRITON]
    promises = []
    for wanted, names in ((5.0, (EAGER, BY_OP)), (2.0, (COMPILED, BY_OP_COMPILED))):
        twins = [seconds[name] for name in names if name in seconds]
        if twins:
            promises.append(Promise(f"decoder kernel: times as fast as {names[0]}", wanted, min(twins) / fused))
    bandwidth = found["min_bytes"] / fused / 1e9
    promises.append(Promise("decoder kernel: share of the copy", 0.6, bandwidth / ceilings.copy_gb_per_s))
    return promises


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All cases, one after the other; with ``--out`` what there is so far is on disk after each."""
    cfg = load_config(args.config, args.overrides)
    device = choose_device(args.device, 0)
    compute = args.compute or ("bf16" if device.type == "cuda" else "fp32")
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    side, _ = cfg.model.grid(*[args.resolution or cfg.stages[0].resolution] * 2)
    batch = args.batch or BATCH[device.type]
    # Triton's interpreter is never timed.
    on_gpu = device.type == "cuda"
    setting = Setting(model=cfg.model, batch=batch, side=side, device=device, dtype=dtype, triton=on_gpu)
    ceilings = measure_ceilings(device, dtype, side=args.gemm_side, size=args.copy_bytes)
    console.print(
        f"{device_name(device)}: GEMM {ceilings.gemm_tflops_per_s:.4g} TFLOP/s, copy {ceilings.copy_gb_per_s:.4g} "
        f"GB/s; {args.config.name}, micro-batch {batch}, {side * cfg.model.patch_size} px, {compute}",
        highlight=False,
    )
    if device.type == "cpu":
        console.print("no GPU: Triton kernels are not timed, only their twins")
    cases: dict[str, Any] = {}
    promises: list[Promise] = []
    result = {
        **record.origin(),
        "kind": "kernels",
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "config": args.config.name,
        "model": dataclasses.asdict(cfg.model),
        "micro_batch": batch,
        "resolution": side * cfg.model.patch_size,
        "compute": compute,
        **dataclasses.asdict(ceilings),
        "cases": cases,
        "promises": [],
    }
    for case in all_cases(setting):
        if args.only not in case.name:
            continue
        found = cases[case.name] = measure(case, setting, args)
        show(case.name, found, ceilings, console)
        if case.name == "pixel decoder":
            promises = decoder_promises(found, ceilings)
            result["promises"] = [{**dataclasses.asdict(p), "met": p.met} for p in promises]
        if args.out:
            record.write_json(args.out / SO_FAR, result)
    for promise in promises:
        word = "met" if promise.met else "MISSED"
        console.print(
            f"{word:6} {promise.what}: {promise.found:.3g} (at least {promise.wanted:g})", highlight=False
        )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    args, console = parse(argv), Console()
    if args.compile_only:
        # Triton is imported where it is needed.
        from benchmarks.kernels.compile import main as compile_only

        return compile_only(args.out, console)
    if args.host:
        from benchmarks.kernels.host_cost import main as host_cost

        return host_cost(console)
    try:
        result = run(args, console)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cases = result["cases"]
    if not cases:
        print(f"error: no case has {args.only!r} in its name", file=sys.stderr)
        return 2
    if args.out:
        path = record.write(result, args.out, "kernels", console)
        (args.out / SO_FAR).unlink()
        shares: dict[str, dict[str, float]] = {}
        ceilings = Ceilings(result["gemm_tflops_per_s"], result["copy_gb_per_s"])
        for name, found in cases.items():
            for variant, seconds in found["seconds"].items():
                shares.setdefault(variant, {})[name] = roofline_s(found, ceilings) / seconds
        record.draw_bars(shares, path.with_suffix(".png"), title=result["device"], unit="share of the roofline")
    return 1 if any(found["failed"] for found in cases.values()) else 0
