"""Host time of a micro-batch and of an update: the plain module, the fsdp engine and ZeRO-3, in one run on a CPU.

    python -m benchmarks.host_time [--world N] [--against PATH] [key.path=value ...]

The XXL recipe's module tree (16 + 4 blocks, decoder, REPA head) at width 64 and 32 px, micro-batch 1, one thread,
eager and fp32 (a CPU's small bf16 products take longer than their dispatch): hooks, wrappers and dispatch are most
of the time, as they are on a GPU with few images. Times are the dispatching thread's CPU time, in ms and in small
additions (``x + y`` of four values) timed beside every step: those change less with the core and with what else it
does. With ``--world N`` an engine shards over N ranks of which one exists: PyTorch's fake process group returns
from collectives at once, since processes on both threads of a core would each take twice as long. Values are then
meaningless. Each engine has a process of its own, because ZeRO-3 replaces ``F.linear`` for its process; they take
turns, round by round. ``--against`` measures the engines of another checkout beside (``git worktree add PATH
COMMIT``). ``benchmarks/gpu/host_time.py`` measures the XXL itself on a GPU.

A printed table and a JSON file. Exit codes: 0 done, 1 a process failed, 2 usage.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

ENGINES = ("plain", "fsdp", "zero3")
SMALL = [
    "model.dim=64", "model.num_heads=4", "model.decoder_width=8", "model.text_dim=32", "model.text_tokens=16",
    "text_encoder.max_tokens=16", "device=cpu", "compile=false", "precision.compute=fp32",
]  # fmt: skip
SHARDED = "parallel.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 400}}"
"""ZeRO-3 shards all but biases and norms, as it does at the XXL's width."""
FIGURES = {
    "micro_batch_ms": "micro-batch, ms",
    "update_ms": "update, ms",
    "micro_batch_additions": "micro-batch, additions",
    "update_additions": "update, additions",
}
"""By name in the result file: what is measured, and its column."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes of the configuration")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--world", type=int, default=1, help="ranks that fsdp and ZeRO-3 shard over")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--rounds", type=int, default=8, help="how often the engines take turns")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--against", type=Path, help="another checkout, whose engines are measured beside")
    parser.add_argument("--out", type=Path, help="folder of the result file; benchmarks/results if not given")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("world", "accumulation", "rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)} must be at least 1")
    if args.against is not None and not (args.against / "deco_scale").is_dir():
        parser.error(f"--against {args.against} is no checkout: it has no folder deco_scale")
    return args


class HostTimed:
    """An engine that adds up how long its calls take to return, by ``clock``."""

    def __init__(self, engine: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._engine, self._clock = engine, clock
        self.forward_backward_s = self.update_s = 0.0

    def forward_backward(self, inputs: Any, *, scale: float, last: bool) -> Any:
        began = self._clock()
        losses = self._engine.forward_backward(inputs, scale=scale, last=last)
        self.forward_backward_s += self._clock() - began
        return losses

    def update(self, **options: Any) -> Any:
        began = self._clock()
        update = self._engine.update(**options)
        self.update_s += self._clock() - began
        return update


class Subject:
    """The process of one engine of one checkout."""

    def __init__(self, engine: str, tree: Path, args: argparse.Namespace, folder: Path) -> None:
        world = 1 if engine == "plain" else args.world
        options = ["--accumulation", str(args.accumulation), "--steps", str(args.steps), *args.overrides]
        folder.mkdir()
        # Started as a file, so that the packages are those of ``tree``.
        command = [sys.executable, __file__, *options, "--serve", engine, "--out", str(folder)]
        environment = os.environ | {
            "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
            "WORLD_SIZE": str(world), "RANK": "0", "LOCAL_RANK": "0",
        }  # fmt: skip
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self) -> dict[str, Any]:
        """What the process found; ends this program where it has failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise SystemExit(1)
        return json.loads(line)  # type: ignore[no-any-return]

    def turn(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(args: argparse.Namespace) -> None:
    """The first rank: steps for every line that comes in, seconds of each out."""
    # Libraries print: the answers have the real standard output to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # All of the tree that is measured.
    from benchmarks.gpu.host_time import ENGINES as SETTINGS
    from benchmarks.gpu.sizes import XXL, one_stage
    from benchmarks.train.steps import TrainingSteps
    from deco_scale.config import load_config
    from deco_scale.distributed.bootstrap import read_environment

    torch.set_num_threads(1)
    env = read_environment(os.environ)
    # What was never gathered may be denormal, which a CPU computes slowly.
    torch.set_flush_denormal(True)
    dist.init_process_group("fake", store=FakeStore(), rank=env.rank, world_size=env.world_size)
    settings = [
        *SMALL,
        *([SHARDED] if args.serve == "zero3" else []),
        *SETTINGS.get(args.serve, []),
        f"run.dir={args.out / 'run'}",
        *args.overrides,
    ]
    cfg = load_config(XXL, settings)
    cfg = one_stage(cfg, resolution=32, micro_batch=1, global_batch=args.accumulation * env.world_size)
    run = TrainingSteps(cfg, env, plain=args.serve == "plain")
    timed = HostTimed(run.engine, time.thread_time)
    run.engine = timed  # type: ignore[assignment]
    batch, _ = run.next_batch()
    for _ in range(3):
        run.step(batch)
    values = torch.ones(4)

    def addition_s(count: int = 2000) -> float:
        began = time.thread_time()
        for _ in range(count):
            values + values
        return (time.thread_time() - began) / count

    print(json.dumps({}), file=answers, flush=True)
    for _ in sys.stdin:
        found: dict[str, list[float]] = {name: [] for name in FIGURES}
        for _ in range(args.steps):
            timed.forward_backward_s = timed.update_s = 0.0
            run.step(batch)
            unit_s = addition_s()
            micro_batch_s = timed.forward_backward_s / args.accumulation
            for name, seconds in (("micro_batch", micro_batch_s), ("update", timed.update_s)):
                found[f"{name}_ms"].append(1e3 * seconds)
                found[f"{name}_additions"].append(seconds / unit_s)
        print(json.dumps(found), file=answers, flush=True)
    run.close()


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Medians of the :data:`FIGURES` of each engine of each checkout."""
    trees = {"": ROOT} | ({"before: ": args.against.resolve()} if args.against else {})
    subjects: dict[str, Subject] = {}
    try:
        for number, (prefix, tree) in enumerate(trees.items()):
            for engine in args.engines:
                name = f"{prefix}{engine}"
                subjects[name] = Subject(engine, tree, args, folder / f"{number}_{engine}")
                subjects[name].answer()
        found: dict[str, dict[str, list[float]]] = {name: {key: [] for key in FIGURES} for name in subjects}
        for _ in range(args.rounds):
            for name, subject in subjects.items():
                for key, values in subject.turn().items():
                    found[name][key] += values
    finally:
        for subject in subjects.values():
            subject.close()
    return {
        name: {key: statistics.median(values) for key, values in figures.items()}
        for name, figures in found.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.serve:
        serve(args)
        return 0
    from rich.console import Console
    from rich.table import Table

    from benchmarks import record

    with tempfile.TemporaryDirectory() as folder:
        medians = measure(args, Path(folder))
    console = Console()
    title = f"world size {args.world}, accumulation {args.accumulation}, {args.rounds * args.steps} steps"
    table = Table("engine", *FIGURES.values(), title=title)
    for name, figures in medians.items():
        table.add_row(
            name, *(f"{figures[key]:,.0f}" if figures[key] > 1000 else f"{figures[key]:.1f}" for key in FIGURES)
        )
    console.print(table)
    result = {
        **record.origin(),
        "against": _commit(args.against) if args.against else None,
        **{key: getattr(args, key) for key in ("world", "accumulation", "rounds", "steps", "overrides")},
        "medians": medians,
    }
    record.write(result, args.out or record.RESULTS, f"host_time_{args.world}", console)
    return 0


def _commit(tree: Path) -> str:
    found = subprocess.run(["git", "-C", tree, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
