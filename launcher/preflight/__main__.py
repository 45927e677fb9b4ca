"""Check all nodes before training, under the same launcher as training and with the same arguments.

    srun|torchrun|deepspeed ... launcher/preflight.py --config FILE [key.path=value ...]

Versions, configuration, devices, collectives, clocks, storage and data. Rank 0 prints a table of each and adds
lines to run.dir/preflight.log. Exit codes: 0 all checks passed, 1 a check failed (the node is named),
2 wrong usage or configuration.
"""

import argparse
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.console import positive, table_console
from deco_scale.config import RunConfig
from deco_scale.distributed.bootstrap import Environment, choose_device, read_environment
from deco_scale.distributed.collectives import gather_objects, raise_together
from deco_scale.errors import ConfigError, RunError
from launcher.preflight.checks import check_config, check_devices, check_versions, read_versions
from launcher.preflight.network import check_clocks, check_collectives, join_process_group
from launcher.preflight.report import Check, CheckGroup, RankInfo, all_problems, problems_by_rank, write_report
from launcher.preflight.storage import check_data, check_storage
from launcher.schedulers.base import fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Probes:
    """How this process reads the facts about itself."""

    host: str = field(default_factory=socket.gethostname)
    versions: Callable[[], dict[str, str]] = read_versions
    clock: Callable[[], float] = time.time
    free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free


def check_all(
    cfg: RunConfig, env: Environment, *, probes: Probes, max_skew_s: float = 1.0, min_gbps: float | None = None
) -> list[CheckGroup]:
    """Every check, on all ranks together; all ranks return the same groups.

    Refuses clocks further apart than ``max_skew_s`` seconds and links slower than ``min_gbps`` GB/s.
    """
    ranks = gather_objects(RankInfo(env.rank, env.local_rank, probes.host))
    device = raise_together(lambda: choose_device(cfg.device, env.local_rank))
    groups = [check_versions(probes.versions(), ranks), check_config(cfg, ranks)]
    kinds = gather_objects(device.type)
    if len(set(kinds)) > 1:
        advice = "computes on cpu; set device, or repair its GPUs"
        problems = problems_by_rank(ranks, kinds, lambda kind: advice if kind == "cpu" else None)
        return [*groups, CheckGroup("devices", (Check("kind", "GPUs on some ranks only", problems),))]
    group = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl")
    groups.append(check_devices(device, ranks))
    groups.append(check_collectives(device, group, ranks, min_gbps=min_gbps))
    groups.append(check_clocks(ranks, max_skew_s=max_skew_s, clock=probes.clock))
    if all_problems(groups[1:2]):
        groups.append(CheckGroup("storage and data", (Check("all", "not checked: configurations differ"),)))
    else:
        groups += [check_storage(cfg, ranks, free_bytes=probes.free_bytes), check_data(cfg, ranks)]
    # One verdict, whatever each rank saw.
    return gather_objects(groups)[0]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launcher/preflight.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument(
        "--timeout-s", type=positive, default=300.0, help="seconds to wait for all ranks; default 300"
    )
    parser.add_argument(
        "--max-skew-s",
        type=positive,
        default=1.0,
        help="largest accepted clock difference between nodes in seconds; default 1",
    )
    parser.add_argument("--min-gbps", type=positive, help="lowest accepted GB/s from each rank to the next")
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def load(args: argparse.Namespace, env: Environment, host: str) -> RunConfig:
    """The configuration, which must fit the number of ranks; errors name this rank's node."""
    try:
        return fit(Path(args.config), args.overrides, ranks=env.world_size)[0]
    except ConfigError as error:
        raise ConfigError(f"on {host}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    args, probes, env = parse(argv), Probes(), Environment(0, 1, 0)
    try:
        env = read_environment(os.environ)
        join_process_group(env, os.environ, timeout_s=args.timeout_s, host=probes.host)
        cfg = raise_together(lambda: load(args, env, probes.host))
        groups = check_all(cfg, env, probes=probes, max_skew_s=args.max_skew_s, min_gbps=args.min_gbps)
        if env.rank == 0:
            write_report(groups, Path(cfg.run.dir) / "preflight.log", table_console())
        if problems := all_problems(groups):
            raise RunError("\n".join(["preflight refuses this run:", *(f"- {problem}" for problem in problems)]))
    except (ConfigError, RunError) as error:
        # What all ranks know is printed once; a rank that never joined is alone with what it knows.
        if env.rank == 0 or not dist.is_initialized():
            print(f"preflight: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized() and code != 130:
        dist.barrier()
        dist.destroy_process_group()
    # Other ranks may wait in a collective that will never come; do not wait for them at exit.
    os._exit(code)
