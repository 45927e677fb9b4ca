"""The 1.1B model's checkpoint through all tools on one machine: commands, times and peak memory.

    python -m benchmarks.checkpoint.large --folder /mnt/disk   # needs 60 GB there

Random weights and EMA of ``configs/t2i_xxl.yaml`` are made on the meta device, materialised tensor by tensor, and
exported as a file of the public release. That is imported, resharded for DeepSpeed ZeRO-3 on 8 x TP 2 ranks,
verified, resharded back, compared, and exported. Every command is a process of its own.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.checkpoint.reshard import CONFIG, run_tool, state_specs, write_random
from checkpoints_tools.memory_budget import peak_bytes
from deco_scale.config import load_config


def walk(folder: Path, console: Console) -> dict[str, Any]:
    """Run all commands; raises where one fails or where what comes back differs."""
    cfg = load_config(CONFIG, ["objective.repa_weight=0.0"])
    kinds = ("model", "ema")
    specs = state_specs(cfg, kinds)
    console.print(f"making {sum(s.nbytes for s in specs.values()) / 2**30:.2f} GiB of weights and EMA")
    made, release = write_random(folder / "made", cfg, kinds), folder / "xxl.ckpt"
    run_tool("export", made, release, "--format", "release")
    shutil.rmtree(made)
    canonical, zero, back = folder / "canonical", folder / "zero", folder / "back"
    commands: list[list[object]] = [
        ["import", release, canonical],
        ["reshard", canonical, zero, "--to", "deepspeed", "--dp", 8, "--tp", 2, "--zero-stage", 3],
        ["verify", canonical],
        ["verify", zero],
        ["reshard", zero, back, "--to", "canonical"],
        ["diff", canonical, back],
        ["export", back, folder / "again.ckpt", "--format", "release"],
        ["export", back, folder / "weights", "--format", "safetensors", "--dtype", "bf16"],
        ["diff", release, folder / "again.ckpt"],
    ]
    found = []
    for command in commands:
        ran = run_tool(*command)
        shown = " ".join(Path(c).name if isinstance(c, Path) else str(c) for c in command)
        found.append({"command": f"deco-ckpt {shown}", "seconds": ran.seconds, "peak_bytes": ran.peak_bytes})
        console.print(f"{shown}: {ran.seconds:.1f} s, {ran.peak_bytes / 2**20:.0f} MiB")
        for gone in _done_with(command, back, canonical, zero):
            shutil.rmtree(gone)
    return {
        "bytes": sum(s.nbytes for s in specs.values()),
        "largest_tensor_bytes": max(peak_bytes(s) for s in specs.values()),
        "commands": found,
    }


def _done_with(command: list[object], back: Path, canonical: Path, zero: Path) -> list[Path]:
    """Folders that no later command reads."""
    if command[:2] == ["reshard", zero]:
        return [zero]
    return [canonical] if command == ["diff", canonical, back] else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to use (default: the temporary folder)")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        result = {**record.origin(), **walk(Path(scratch), console)}
    table = Table("command", "seconds", "peak MiB", title="the 1.1B model's checkpoint")
    for one in result["commands"]:
        table.add_row(one["command"], f"{one['seconds']:.1f}", f"{one['peak_bytes'] / 2**20:.0f}")
    console.print(table)
    record.write(result, args.out, "big_checkpoint", console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
