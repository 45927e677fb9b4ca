"""Check all nodes before training, under the same launcher as training and with the same arguments.

    srun|torchrun|deepspeed ... launcher/preflight.py --config FILE [key.path=value ...]

Versions, configuration, devices, collectives, clocks, storage and data. Rank 0 prints a table of each and adds
lines to run.dir/preflight.log. Exit codes: 0 all is well, 1 a check refuses the run and names the node, 2 wrong
use or configuration.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from rich.console import Console

from deco_scale.config import RunConfig
from deco_scale.environment import Environment, choose_device, read_environment, start_processes
from deco_scale.errors import ConfigError, RunError
from deco_scale.training.processes import agreed
from launcher.preflight_checks import check_config, check_devices, check_versions, read_versions
from launcher.preflight_network import check_clocks, check_collectives
from launcher.preflight_report import Group, Place, Row, gathered, lines_of, problems_of, show
from launcher.preflight_storage import check_data, check_storage, free_on_disk
from launcher.scheduling.job import fit

_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is refused: clocks further apart (seconds), slower links (GB/s; None: none)."""

    skew_s: float = 1.0
    link_gbps: float | None = None

    def __post_init__(self) -> None:
        if self.skew_s <= 0:
            raise ConfigError(f"--max-skew-s {self.skew_s} must be positive")
        if self.link_gbps is not None and self.link_gbps <= 0:
            raise ConfigError(f"--min-gbps {self.link_gbps} must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Senses:
    """Where the facts of this process come from."""

    host: str = field(default_factory=socket.gethostname)
    versions: Callable[[], dict[str, str]] = read_versions
    clock: Callable[[], float] = time.time
    free_bytes: Callable[[Path], int] = free_on_disk


def join(env: Environment, variables: Mapping[str, str], *, timeout_s: float, host: str) -> None:
    """Form a gloo group; raises :class:`RunError` that names who came and who did not within ``timeout_s``."""
    if dist.is_initialized():
        return
    if "MASTER_ADDR" not in variables or "MASTER_PORT" not in variables:
        start_processes(env, torch.device("cpu"))
        return
    address, port = variables["MASTER_ADDR"], int(variables["MASTER_PORT"])
    # torchrun's agent has the store already.
    serve = env.rank == 0 and variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=timeout_s)
    try:
        raw = dist.TCPStore(address, port, is_master=serve, timeout=timeout, wait_for_workers=False)
        store = dist.PrefixStore(f"preflight{variables.get('TORCHELASTIC_RESTART_COUNT', '')}", raw)
        store.set(f"here{env.rank}", host)
        if env.rank == 0:
            store.set("verdict", _missing(store, env.world_size, timeout_s) or "all")
        store.wait(["verdict"], timedelta(seconds=2 * timeout_s))
        verdict = store.get("verdict").decode()
        if verdict == "all":
            dist.init_process_group("gloo", store=store, rank=env.rank, world_size=env.world_size, timeout=timeout)
            return
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise RunError(f"rank {env.rank} on {host} does not reach {address}:{port}: {error}") from error
    # Leave the server up until the others have read why.
    time.sleep(1.0 if serve else 0.0)
    raise RunError(verdict)


def _missing(store: dist.Store, world: int, timeout_s: float) -> str | None:
    """A sentence about ranks that have not come in time, None if all have."""
    absent, deadline = list(range(world)), time.monotonic() + timeout_s
    while absent and time.monotonic() < deadline:
        absent = [rank for rank in absent if not store.check([f"here{rank}"])]
        time.sleep(_POLL_S if absent else 0.0)
    if not absent:
        return None
    hosts: dict[str, int] = {}
    for rank in sorted(set(range(world)) - set(absent)):
        host = store.get(f"here{rank}").decode()
        hosts[host] = hosts.get(host, 0) + 1
    came = ", ".join(f"{count} on {host}" for host, count in hosts.items())
    names = ", ".join(map(str, absent[:16])) + (" and more" if len(absent) > 16 else "")
    return (
        f"{len(absent)} of {world} ranks did not come within {timeout_s:.0f} s: {names}; there are {came}. Look "
        "whether the other nodes run and reach MASTER_ADDR"
    )


def check_all(cfg: RunConfig, env: Environment, *, limits: Limits, senses: Senses) -> list[Group]:
    """Every check, on all ranks together; all ranks return the same groups."""
    places = gathered(Place(env.rank, env.local_rank, senses.host))
    device = agreed(lambda: choose_device(cfg.device, env.local_rank))
    groups = [check_versions(senses.versions(), places), check_config(cfg, places)]
    kinds = gathered(device.type)
    if len(set(kinds)) > 1:
        odd = [f"{p}: computes on {k}; set device, or mend its GPUs" for p, k in zip(places, kinds, strict=True)]
        told = tuple(line for line, kind in zip(odd, kinds, strict=True) if kind == "cpu")
        return [*groups, Group("devices", (Row("kind", "GPUs on some ranks only", told),))]
    group = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl")
    groups.append(check_devices(device, places))
    groups.append(check_collectives(device, group, places, least_gbps=limits.link_gbps))
    groups.append(check_clocks(places, most_s=limits.skew_s, clock=senses.clock))
    if problems_of(groups[1:2]):
        left = Group("storage and data", (Row("all", "not checked: configurations differ"),))
        return gathered([*groups, left])[0]
    groups.append(check_storage(cfg, places, free_bytes=senses.free_bytes))
    groups.append(check_data(cfg, places))
    # One verdict, whatever each rank saw.
    return gathered(groups)[0]


def run(cfg: RunConfig, env: Environment, *, limits: Limits, senses: Senses, console: Console) -> None:
    """Check and report; raises :class:`RunError` with every problem. All ranks together."""
    groups = check_all(cfg, env, limits=limits, senses=senses)
    problems = problems_of(groups)
    if env.rank == 0:
        for group in groups:
            show(group, console)
        _log(Path(cfg.run.dir), groups, console)
    if problems:
        raise RunError("\n".join(["preflight refuses this run:", *(f"- {problem}" for problem in problems)]))


def _log(folder: Path, groups: Sequence[Group], console: Console) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = "".join(f"{stamp} {line}\n" for line in lines_of(groups))
    try:
        with (folder / "preflight.log").open("a", encoding="utf-8") as log:
            log.write(text)
    except OSError as error:
        console.print(f"preflight.log was not written: {error.strerror}", highlight=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="how long to wait for all ranks")
    parser.add_argument("--max-skew-s", type=float, default=1.0, help="between clocks of nodes")
    parser.add_argument("--min-gbps", type=float, help="GB/s from each rank to the next, below which to refuse")
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def configure(path: str, overrides: Sequence[str], env: Environment, host: str) -> RunConfig:
    """The configuration, which must fit the number of ranks; errors name this rank's node."""
    try:
        return fit(Path(path), overrides, ranks=env.world_size)[0]
    except ConfigError as error:
        raise ConfigError(f"on {host}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    console, senses = Console(), Senses()
    if not console.is_terminal:
        console = Console(width=160)
    env = Environment(0, 1, 0)
    try:
        env = read_environment(os.environ)
        limits = Limits(skew_s=args.max_skew_s, link_gbps=args.min_gbps)
        if args.timeout_s <= 0:
            raise ConfigError(f"--timeout-s {args.timeout_s} must be positive")
        join(env, os.environ, timeout_s=args.timeout_s, host=senses.host)
        cfg = agreed(lambda: configure(args.config, args.overrides, env, senses.host))
        run(cfg, env, limits=limits, senses=senses, console=console)
    except (ConfigError, RunError) as error:
        # What all ranks know is told once; a rank that never joined is alone with what it knows.
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
