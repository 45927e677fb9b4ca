"""Train DeCo. Runs unchanged under ``deepspeed``, ``torchrun``, ``srun`` and plain ``python``.

    deepspeed launcher/train.py --config configs/t2i_xxl.yaml [key.path=value ...]

Exit codes: 0 done, 1 the run failed, 2 wrong usage or configuration, 75 stopped by SIGTERM or SIGUSR1 after saving
a checkpoint: start it again.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NoReturn

# Also works from a clone that is not installed: launchers start this file by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deco_scale.config import RunConfig, dump_config, load_config
from deco_scale.distributed.bootstrap import Environment, read_environment, set_cuda_defaults
from deco_scale.distributed.signals import StopRequest
from deco_scale.observability import redact
from deco_scale.observability.redact import scrub
from deco_scale.observability.run_logger import logged_to
from deco_scale.observability.webhooks import check_webhook
from deco_scale.training.trainer import Progress
from deco_scale.watchdog.client import NoWatchdog, Watchdog
from launcher.build.trainer import build_trainer
from launcher.exit_status import ExitStatus, exit_now, leave_group_in_order


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


def main(argv: Sequence[str] | None = None) -> int:
    # DeepSpeed and DCP call PyTorch functions that 2.13 renamed; nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_cuda_defaults(os.environ)
    args = parse(argv)
    with ExitStatus() as status:
        env = status.env = read_environment(os.environ)
        # All ranks read the same configuration: its notices are shown once.
        with logged_to(logging.NullHandler()) if env.rank else nullcontext():
            cfg = load_config(args.config, args.overrides)
        if args.print_config:
            if env.rank == 0:
                print(dump_config(cfg), end="")
            return 0
        check_webhook(cfg.monitor)
        status.run_dir = Path(cfg.run.dir)
        stop = StopRequest()
        stop.install()
        start_watchdog = partial(status.start_watchdog, cfg)
        with leave_group_in_order():
            run(cfg, env, resume=args.resume, dry_run=args.dry_run, stop=stop, start_watchdog=start_watchdog)
    return status.code


if __name__ == "__main__":
    redact.install()
    exit_now(main())
