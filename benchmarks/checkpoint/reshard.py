"""How fast checkpoints are resharded against ``cp`` and a sync of the same bytes, and in how much memory.

Part of ``python -m benchmarks.checkpoint``. The state is that of a text-to-image model of XXL's width with fewer
blocks, so that its tensors are of the real sizes. Each conversion runs as users run it, with the comparison of the
source's checksums, but within this process: the seconds of imports would hide the rest. Its memory is the peak
of a process of its own.
"""

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import ROOT
from checkpoints_tools.base import TensorSpec
from checkpoints_tools.formats.canonical import write_canonical
from checkpoints_tools.formats.zero.writer import ZeroLayout
from checkpoints_tools.infer_config import denoiser_shapes
from checkpoints_tools.memory_budget import peak_bytes, use_large_pages
from checkpoints_tools.registry import open_checkpoint
from checkpoints_tools.reshard import plan_reshard
from deco_scale.checkpoint.format import CheckpointMeta, verify
from deco_scale.config import RunConfig, load_config

KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")
PROMISE = 0.5
"""Least speed of resharding, as a part of the speed of ``cp``."""
CONFIG = ROOT / "configs" / "t2i_xxl.yaml"


def make_checkpoint(folder: Path, num_bytes: int) -> Path:
    """A canonical checkpoint of random weights of XXL's width, of ``num_bytes`` at least."""
    cfg = load_config(CONFIG, ["objective.repa_weight=0.0"])
    for blocks in range(1, cfg.model.num_blocks + 1):
        model = dataclasses.replace(cfg.model, num_blocks=blocks, num_text_blocks=0)
        small = dataclasses.replace(cfg, model=model)
        if sum(spec.nbytes for spec in state_specs(small, KINDS).values()) >= num_bytes:
            break
    return write_random(folder, small, KINDS)


def state_specs(cfg: RunConfig, kinds: Sequence[str]) -> dict[str, TensorSpec]:
    """Tensors of a training state, from the model on the meta device."""
    return {f"{k}.denoiser.{n}": TensorSpec(s) for k in kinds for n, s in denoiser_shapes(cfg.model).items()}


def write_random(folder: Path, cfg: RunConfig, kinds: Sequence[str]) -> Path:
    """A canonical checkpoint of random values, made tensor by tensor."""
    specs = state_specs(cfg, kinds)
    meta = CheckpointMeta(
        step=1, stage=cfg.stages[0].name, samples=1, seed=0, optimizer_steps=1, data_state={}, parameter_digest="",
        config=json.loads(json.dumps(dataclasses.asdict(cfg))),
    )  # fmt: skip
    write_canonical(folder, specs, lambda name: torch.randn(specs[name].shape), meta, files=4, workers=2)
    return folder


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds of ``cp`` of a folder and of a sync of its file system; the copy is removed."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def reshard_once(source: Path, target: Path, options: Mapping[str, Any], workers: int) -> float:
    """Seconds of one conversion, made durable."""
    began = time.perf_counter()
    opened = open_checkpoint(source)
    if opened.meta is not None:
        verify(opened.path)
    plan_reshard(opened, workers=workers, **options).write(target, lambda name: None)
    return time.perf_counter() - began


class Ran(NamedTuple):
    """What one command took."""

    seconds: float
    peak_bytes: int
    said: str


def run_tool(*arguments: object) -> Ran:
    """Run ``deco-ckpt`` as a process of its own; raises ``CalledProcessError`` where it fails."""
    code = (
        # Not getrusage, whose peak begins with that of the parent.
        "import re, sys; from checkpoints_tools.cli import main; code = main(sys.argv[1:]); "
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024); sys.exit(code)"
    )
    began = time.perf_counter()
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    *said, peak = done.stdout.strip().splitlines()
    return Ran(time.perf_counter() - began, int(peak), "\n".join(said))


def measure(folder: Path, num_bytes: int, rounds: int, workers: int) -> dict[str, Any]:
    """Median seconds of each conversion and of ``cp`` in the same rounds."""
    use_large_pages()
    layout = ZeroLayout(dp=8, tp=2, stage=3)
    ways: dict[str, tuple[str, dict[str, Any], list[str]]] = {
        "canonical to ZeRO-3, 8 x TP 2": (
            "canonical",
            {"to": "deepspeed", "layout": layout},
            ["--to", "deepspeed", "--dp", "8", "--tp", "2", "--zero-stage", "3"],
        ),
        "ZeRO-3, 8 x TP 2 to canonical": ("zero", {"to": "canonical"}, ["--to", "canonical"]),
        "canonical to canonical": ("canonical", {"to": "canonical"}, ["--to", "canonical"]),
        "canonical to universal": ("canonical", {"to": "universal"}, ["--to", "universal"]),
        "universal to canonical": ("universal", {"to": "canonical"}, ["--to", "canonical"]),
    }  # fmt: skip
    sources = {"canonical": make_checkpoint(folder / "canonical", num_bytes)}
    sources["zero"], sources["universal"] = folder / "zero", folder / "universal"
    reshard_once(sources["canonical"], sources["zero"], {"to": "deepspeed", "layout": layout}, workers)
    reshard_once(sources["canonical"], sources["universal"], {"to": "universal"}, workers)
    specs = open_checkpoint(sources["canonical"]).specs
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    copies: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (source, options, _) in ways.items():
            copies[name].append(copy_seconds(sources[source], folder / "copy"))
            seconds[name].append(reshard_once(sources[source], folder / "made", options, workers))
            shutil.rmtree(folder / "made")
    found = {}
    for name, (source, _, arguments) in ways.items():
        command = ["reshard", sources[source], folder / "made", *arguments]
        idle = run_tool(*command, "--dry-run").peak_bytes
        peak = run_tool(*command, "--workers", workers).peak_bytes
        shutil.rmtree(folder / "made")
        taken, copied = statistics.median(seconds[name]), statistics.median(copies[name])
        ratio = statistics.median(c / s for c, s in zip(copies[name], seconds[name], strict=True))
        found[name] = {
            "seconds": taken, "cp_s": copied, "speed_against_cp": ratio, "peak_bytes": peak, "idle_bytes": idle,
        }  # fmt: skip
    return {
        "bytes": sum(spec.nbytes for spec in specs.values()),
        "largest_tensor_bytes": max(peak_bytes(spec) for spec in specs.values()),
        "rounds": rounds,
        "workers": workers,
        "conversions": found,
    }


def show(result: dict[str, Any], console: Console) -> bool:
    """Print the table; whether all conversions keep the promise."""
    title = f"resharding {result['bytes'] / 2**30:.2f} GiB, {result['workers']} workers"
    table = Table("", "seconds", "cp and sync", "speed against cp", "peak MiB", "beyond start MiB", title=title)
    for name, one in result["conversions"].items():
        table.add_row(
            name, f"{one['seconds']:.2f}", f"{one['cp_s']:.2f}", f"{one['speed_against_cp']:.0%}",
            f"{one['peak_bytes'] / 2**20:.0f}", f"{(one['peak_bytes'] - one['idle_bytes']) / 2**20:.0f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"largest tensor: {result['largest_tensor_bytes'] / 2**20:.0f} MiB")
    slow = [name for name, one in result["conversions"].items() if one["speed_against_cp"] < PROMISE]
    console.print(f"at least {PROMISE:.0%} of cp: {'NOT KEPT by ' + ', '.join(slow) if slow else 'kept'}")
    return not slow
