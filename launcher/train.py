"""Train DeCo. Runs unchanged under ``deepspeed``, ``torchrun``, ``srun`` and plain ``python``.

    deepspeed launcher/train.py --config configs/t2i_xxl.yaml [key.path=value ...]

Exit codes: 0 done, 1 the run failed, 2 wrong usage or configuration, 75 stopped by SIGTERM or SIGUSR1 after saving
a checkpoint: start it again, 130 interrupted.
"""

import argparse
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

# Also works from a clone that is not installed: launchers start this file by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipeline.errors import DataError
from deco_scale.config import RunConfig, dump_config, load_config
from deco_scale.distributed.bootstrap import Environment, read_environment
from deco_scale.distributed.collectives import broadcast_object
from deco_scale.distributed.signals import StopRequest
from deco_scale.errors import ConfigError, RunError, Stopped
from deco_scale.observability import redact
from deco_scale.observability.events import REQUEUE, Event, append_event
from deco_scale.observability.redact import scrub
from deco_scale.observability.run_logger import logged_to
from deco_scale.observability.webhooks import check_webhook
from deco_scale.training.trainer import Progress
from deco_scale.watchdog.client import NoWatchdog, Watchdog
from launcher.build.trainer import build_trainer

VERDICT_S = 15.0
"""How long a rank with an unexpected error waits to learn whether another rank was lost."""


class Parser(argparse.ArgumentParser):
    """Repeats no secret of a wrong command line."""

    def error(self, message: str) -> NoReturn:
        super().error(scrub(message))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="auto (default): newest checkpoint of run.dir, if any; none: start anew",
    )
    parser.add_argument("--print-config", action="store_true", help="show the resolved YAML and exit")
    parser.add_argument("--dry-run", action="store_true", help="one step on synthetic data, report memory, exit")
    # The deepspeed launcher passes it; the environment has the same.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(
    cfg: RunConfig,
    env: Environment,
    *,
    resume: str = "auto",
    dry_run: bool = False,
    stop: StopRequest | None = None,
    start_watchdog: Callable[[], Watchdog] = NoWatchdog,
) -> Progress:
    """Train as configured; joins the process group unless there is one. Raises :class:`Stopped` after a signal."""
    trainer, run_logger = build_trainer(
        cfg, env, resume=resume, dry_run=dry_run, stop=stop, start_watchdog=start_watchdog
    )
    try:
        if dry_run:
            trainer.dry_run()
            return Progress()
        return trainer.fit(resume)
    finally:
        run_logger.close()


@contextmanager
def leave_group_in_order() -> Iterator[None]:
    """Ranks that are done, or were stopped by a signal, leave the process group together."""
    stopped: Stopped | None = None
    try:
        yield
    except Stopped as signal:
        stopped = signal
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if stopped is not None:
        raise stopped


def main(argv: Sequence[str] | None = None) -> int:
    # DeepSpeed and DCP call PyTorch functions that 2.13 renamed; nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args = parse(argv)
    env, run_dir, reason, code = Environment(0, 1, 0), None, "done", 0
    watchdog: Watchdog = NoWatchdog()

    def start_watchdog() -> Watchdog:
        """All ranks together."""
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

    try:
        env = read_environment(os.environ)
        # All ranks read the same configuration: its notices are shown once.
        with logged_to(logging.NullHandler()) if env.rank else nullcontext():
            cfg = load_config(args.config, args.overrides)
        if args.print_config:
            if env.rank == 0:
                print(dump_config(cfg), end="")
            return 0
        check_webhook(cfg.monitor)
        run_dir = Path(cfg.run.dir)
        stop = StopRequest()
        stop.install()
        with leave_group_in_order():
            run(cfg, env, resume=args.resume, dry_run=args.dry_run, stop=stop, start_watchdog=start_watchdog)
    except Stopped as stopped:
        reason, code = str(stopped), REQUEUE
    except (ConfigError, RunError, DataError) as error:
        reason, code = str(error), getattr(error, "exit_code", 1)
        # Errors that all ranks share are shown once per node; a rank that is alone with one names itself.
        if env.local_rank == 0 or isinstance(error, DataError):
            where = f" [rank {env.rank} on {socket.gethostname()}]" if env.rank else ""
            print(scrub(f"error{where}: {error}"), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        reason, code = "interrupted", 130
    except Exception as error:
        # A bug, or what remains of a collective when another rank is lost: the watchdog knows which, and records
        # the end of a run that lost a rank.
        sys.excepthook(type(error), error, error.__traceback__)
        reason, code = f"{type(error).__name__}: {error}", 1
        watchdog.report_exit(reason, code)
        watchdog.wait_for_verdict(VERDICT_S)
        if env.rank == 0 and run_dir is not None:
            with suppress(OSError):
                append_event(run_dir, Event(time.time(), "end", {"reason": scrub(reason), "exit_code": code}))
    watchdog.report_exit(reason, code)
    watchdog.close()
    return code


if __name__ == "__main__":
    redact.install()
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Other ranks may be in a collective that will never complete; do not wait for them at exit.
    os._exit(exit_code)
