"""Train DeCo. Runs unchanged under ``deepspeed``, ``torchrun``, ``srun`` and plain ``python``.

    deepspeed launcher/train.py --config configs/t2i_xxl.yaml [key.path=value ...]

Exit codes: 0 done, 1 the run failed, 2 wrong use or configuration, 75 stopped by SIGTERM or SIGUSR1 after a
checkpoint, to be started again.
"""

import argparse
import dataclasses
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from data_pipeline.errors import DataError
from deco_scale.checkpoint.manager import CheckpointManager
from deco_scale.checkpoint.object_storage import open_objects
from deco_scale.config import RunConfig, dump_config, load_config
from deco_scale.distributed.bootstrap import Environment, choose_device, init_distributed, read_environment
from deco_scale.distributed.collectives import broadcast_object
from deco_scale.distributed.signals import StopRequest
from deco_scale.errors import ConfigError, RunError, Stopped
from deco_scale.kernels import choose_kernels
from deco_scale.models.attention import check_backend
from deco_scale.observability import redact
from deco_scale.observability.events import REQUEUE, Event, append_event
from deco_scale.observability.redact import scrub
from deco_scale.observability.webhooks import check_webhook
from deco_scale.parallel.mesh import resolve_parallel_dims
from deco_scale.parallel.tp_plan import check_tp
from deco_scale.training.metrics import memory_bytes
from deco_scale.training.trainer import Progress, Trainer, resumed
from deco_scale.watchdog.client import NoWatchdog, Watchdog
from launcher.assemble import assemble, derive_stages, fp8_plan_of, save_config

VERDICT_S = 15.0
"""How long a rank with an error that has no name waits to hear whether another one was lost."""


class Parser(argparse.ArgumentParser):
    """Repeats no secret of a wrong command line."""

    def error(self, message: str) -> NoReturn:
        super().error(scrub(message))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--resume", default="auto", metavar="auto|none|PATH")
    parser.add_argument("--print-config", action="store_true", help="show the resolved YAML and exit")
    parser.add_argument("--dry-run", action="store_true", help="one step on synthetic data, memory report, exit")
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(
    cfg: RunConfig,
    env: Environment,
    *,
    resume: str = "auto",
    dry_run: bool = False,
    stop: StopRequest | None = None,
    watch: Callable[[], Watchdog] = NoWatchdog,
) -> Progress:
    """Train as configured; joins the process group unless there is one. Raises :class:`Stopped` after a signal.

    ``watch`` starts the watchdog, on all ranks once they have joined.
    """
    layout = resolve_parallel_dims(cfg.parallel, env.world_size)
    check_tp(cfg.model, layout.tp)
    stages = derive_stages(cfg, layout)
    device = choose_device(cfg.device, env.local_rank)
    try:
        dtype = torch.float32 if cfg.precision.compute == "fp32" else torch.bfloat16
        check_backend(cfg.attention.backend, device, dtype=dtype, head_dim=cfg.model.head_dim)
        choose_kernels(cfg.kernels, device)
        fp8_plan_of(cfg, layout, device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    checkpoints = CheckpointManager(Path(cfg.run.dir) / "checkpoints", cfg.checkpoint, open_objects=open_objects)
    if resume != "auto":
        checkpoints.resolve(resume)
    torch.set_float32_matmul_precision("high" if cfg.precision.compute != "fp32" else "highest")
    init_distributed(env, device)
    loop = assemble(
        cfg,
        layout,
        device,
        stages=stages,
        checkpoints=checkpoints,
        dry_run=dry_run,
        stop=stop,
        heartbeat=watch(),
    )
    if dry_run:
        try:
            return _dry_run(loop, device)
        finally:
            loop.reporter.close()
    hosts = sorted(set(loop.hosts))
    loop.reporter.begin(world_size=env.world_size, layout=dataclasses.asdict(layout), hosts=hosts)
    reason, code = "", 1
    try:
        progress = _train(cfg, loop, resume)
        if loop.stopped is not None:
            reason, code = f"stopped by {loop.stopped}", REQUEUE
            raise Stopped(reason)
        reason, code = "done", 0
        return progress
    except (ConfigError, RunError, DataError) as error:
        reason, code = str(error), getattr(error, "exit_code", 1)
        raise
    finally:
        if reason:
            loop.reporter.event("end", reason=reason, exit_code=code)
        loop.reporter.close()


def _train(cfg: RunConfig, loop: Trainer, resume: str) -> Progress:
    """Resume, start from weights, or start anew; then train."""
    progress = Progress()
    found = loop.checkpoints.resume(loop.engine, resume, say=loop.reporter.say)
    if found is not None:
        meta, path = found
        if meta.seed != cfg.run.seed:
            raise ConfigError(
                f"{path} was trained with run.seed={meta.seed}, not {cfg.run.seed}: another seed would show "
                "other samples and noise; set it back, or start anew in another run.dir"
            )
        _check_same_output(cfg, meta.config, str(path))
        progress = resumed(meta)
        loop.reporter.say(f"resumed from {path}: step {meta.step}, {meta.samples} samples seen")
    elif cfg.checkpoint.init_from is not None:
        loop.checkpoints.initialise(loop.engine, loop.reporter.say)
    save_config(cfg)
    return loop.run(progress)


def _check_same_output(cfg: RunConfig, stored: dict[str, Any], where: str) -> None:
    """The weights fit whatever the network's output stands for, so nothing else would notice."""
    then = stored.get("objective", {}).get("prediction", "velocity")
    if then != cfg.objective.prediction:
        raise ConfigError(
            f"{where} was trained with objective.prediction={then}, not {cfg.objective.prediction}: set it back, "
            "or start anew in another run.dir"
        )


def _dry_run(loop: Trainer, device: torch.device) -> Progress:
    stage = loop.stages[0]
    batch = next(iter(loop.open_data(stage.cfg, 0)))
    result = loop.step(stage, batch)
    loop.reporter.say(
        f"dry run: one step of stage {stage.cfg.name} on synthetic data, "
        f"loss {result.losses['loss'].item():.4f}, gradient norm {result.grad_norm.item():.4f}"
    )
    used = torch.tensor([memory_bytes(device)], dtype=torch.int64, device=device)
    every = [torch.zeros_like(used) for _ in range(dist.get_world_size())]
    dist.all_gather(every, used)
    for rank, value in enumerate(every):
        loop.reporter.say(f"rank {rank}: {value.item() / 2**30:.2f} GiB at its peak")
    return Progress()


def _note_end(reason: str, code: int, folder: Path) -> None:
    """The event of an end without a name; one that came from a lost rank has the watchdog's event."""
    with suppress(OSError):
        append_event(folder, Event(time.time(), "end", {"reason": scrub(reason), "exit_code": code}))


def main(argv: Sequence[str] | None = None) -> int:
    # DeepSpeed and DCP call PyTorch functions that 2.13 renamed; nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args = parse(argv)
    env = Environment(0, 1, 0)
    folder: Path | None = None
    watchdog: Watchdog = NoWatchdog()

    def watch() -> Watchdog:
        nonlocal watchdog
        watchdog = Watchdog.start(
            cfg.watchdog,
            rank=env.rank,
            world_size=env.world_size,
            run_dir=Path(cfg.run.dir),
            share=broadcast_object,
            webhook_env=cfg.monitor.webhook_env,
        )
        return watchdog

    reason, code = "done", 0
    try:
        env = read_environment(os.environ)
        cfg = load_config(args.config, args.overrides)
        if args.print_config:
            if env.rank == 0:
                print(dump_config(cfg), end="")
            return 0
        check_webhook(cfg.monitor)
        folder = Path(cfg.run.dir)
        stop = StopRequest()
        stop.install()
        try:
            run(cfg, env, resume=args.resume, dry_run=args.dry_run, stop=stop, watch=watch)
        except Stopped as stopped:
            reason, code = str(stopped), REQUEUE
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except (ConfigError, RunError, DataError) as error:
        reason, code = str(error), getattr(error, "exit_code", 1)
        # Errors that all ranks share are told once per node; a rank that is alone with one says so.
        if env.local_rank == 0 or isinstance(error, DataError):
            where = f" [rank {env.rank} on {socket.gethostname()}]" if env.rank else ""
            print(scrub(f"error{where}: {error}"), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        reason, code = "interrupted", 130
    except Exception as error:
        # A bug, or what remains of a collective when another rank is lost: the watchdog knows which.
        sys.excepthook(type(error), error, error.__traceback__)
        reason, code = f"{type(error).__name__}: {error}", 1
        watchdog.report_exit(reason, code)
        watchdog.wait_for_verdict(VERDICT_S)
        if env.rank == 0 and folder is not None:
            _note_end(reason, code, folder)
    watchdog.report_exit(reason, code)
    watchdog.close()
    return code


if __name__ == "__main__":
    redact.install()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Other ranks may wait in a collective that will never come; do not wait for them at exit.
    os._exit(code)
