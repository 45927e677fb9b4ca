"""Check all nodes before training, under the same launcher as training and with the same arguments.

    srun|torchrun|deepspeed ... launcher/preflight.py --config FILE [key.path=value ...]

Versions, configuration, devices, collectives, clocks, storage and data. Rank 0 prints a table of each and adds
lines to run.dir/preflight.log. Exit codes: 0 all checks passed, 1 a check failed (the node is named),
2 wrong usage or configuration.
"""

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.console import positive, table_console
from deco_scale.config import RunConfig
from deco_scale.distributed.bootstrap import Environment, choose_device, read_environment
from deco_scale.distributed.collectives import broadcast_object, gather_objects, raise_together
from deco_scale.errors import ConfigError, RunError
from launcher.preflight.checks import check_config, check_devices, check_versions, read_versions
from launcher.preflight.network import check_clocks, check_collectives, join_process_group
from launcher.preflight.report import Check, RankInfo, Report, all_problems, problems_by_rank, write_report
from launcher.preflight.storage import check_data, check_storage
from launcher.schedulers.base import fit


def check_all(
    cfg: RunConfig,
    env: Environment,
    *,
    host: str,
    versions: Mapping[str, str],
    max_skew_s: float = 1.0,
    min_gbps: float | None = None,
) -> Report:
    """Every check, on all ranks together; all ranks return the same report.

    ``host`` and ``versions`` are this rank's. Refuses clocks further apart than ``max_skew_s`` seconds and links
    slower than ``min_gbps`` GB/s.
    """
    ranks = gather_objects(RankInfo(env.rank, env.local_rank, host))
    device = raise_together(lambda: choose_device(cfg.device, env.local_rank))
    configuration = check_config(cfg, ranks)
    report = {"versions": check_versions(versions, ranks), "configuration": configuration}
    kinds = gather_objects(device.type)
    if len(set(kinds)) > 1:
        advice = "computes on cpu; set device, or repair its GPUs"
        problems = problems_by_rank(ranks, kinds, lambda kind: advice if kind == "cpu" else None)
        return {**report, "devices": [Check("kind", "GPUs on some ranks only", problems)]}
    group = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl")
    report["devices"] = check_devices(device, ranks)
    report["collectives"] = check_collectives(device, group, ranks, min_gbps=min_gbps)
    report["clocks"] = check_clocks(ranks, max_skew_s=max_skew_s)
    if any(check.problems for check in configuration):
        report["storage and data"] = [Check("all", "not checked: configurations differ")]
    else:
        report |= {"storage": check_storage(cfg, ranks), "data": check_data(cfg, ranks)}
    # One verdict, whatever each rank saw.
    return broadcast_object(report)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launcher/preflight.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    option = partial(parser.add_argument, type=positive)
    option("--timeout-s", default=300.0, help="seconds to wait for all ranks; default 300")
    option("--max-skew-s", default=1.0, help="largest accepted clock difference of nodes in seconds; default 1")
    option("--min-gbps", help="lowest accepted GB/s from each rank to the next")
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
    args, host, env = parse(argv), socket.gethostname(), Environment(0, 1, 0)
    try:
        env = read_environment(os.environ)
        join_process_group(env, os.environ, timeout_s=args.timeout_s, host=host)
        cfg = raise_together(lambda: load(args, env, host))
        limits = {"max_skew_s": args.max_skew_s, "min_gbps": args.min_gbps}
        report = check_all(cfg, env, host=host, versions=read_versions(), **limits)
        if env.rank == 0:
            write_report(report, Path(cfg.run.dir) / "preflight.log", table_console())
        if problems := all_problems(report):
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
