"""Write a job for a cluster, show it, and submit it only with --submit.

    python launcher/submit.py slurm --config FILE --nodes 4 [key.path=value ...]
    python launcher/submit.py k8s   --config FILE --nodes 4 --image IMAGE --volume CLAIM:/runs run.dir=/runs/xxl
    python launcher/submit.py hosts --config FILE --nodes 2 --hosts node0,node1 --out hostfile

The job goes to standard output (or --out), a summary to standard error. SLURM and Kubernetes jobs are rendered
from the Jinja2 templates in launcher/schedulers/templates/; copy one, edit it and pass it as --template. Exit
codes: 0 done, 1 the cluster refused the job, 2 wrong usage or configuration.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from data_pipeline.console import positive_int
from deco_scale.config import RunConfig, dump_config
from deco_scale.errors import ConfigError, RunError
from launcher.schedulers.base import ClusterJob, fit, parse_variables, refuse_secret
from launcher.schedulers.hosts import host_commands, render_hostfile
from launcher.schedulers.kubernetes import KubernetesOptions, render_kubernetes
from launcher.schedulers.slurm import SlurmOptions, render_slurm

ROOT = Path(__file__).resolve().parents[1]
Options = TypeVar("Options", SlurmOptions, KubernetesOptions)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets = parser.add_subparsers(dest="target", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", required=True, type=Path, help="YAML file, see configs/")
    common.add_argument("overrides", nargs="*", metavar="key.path=value")
    common.add_argument("--nodes", required=True, type=positive_int, help="number of nodes")
    common.add_argument(
        "--gpus-per-node",
        type=positive_int,
        default=8,
        help="processes per node, each with one GPU unless device=cpu; default 8",
    )
    common.add_argument("--name", help="name of the job; default: that of the configuration")
    common.add_argument(
        "--env", action="append", default=[], metavar="NAME|NAME=value", help="environment variable of the job"
    )
    common.add_argument("--python", help="interpreter on the nodes")
    common.add_argument("--entry", help="folder of this repository on the nodes")
    common.add_argument("--no-preflight", action="store_true", help="do not check the nodes first")
    common.add_argument(
        "--grace-s",
        type=positive_int,
        default=120,
        help="seconds between the stop signal and SIGKILL; default 120",
    )
    common.add_argument(
        "--max-restarts",
        type=int,
        default=10,
        help="restarts after crashes; stop signals do not count; default 10",
    )
    common.add_argument("--out", type=Path, help="write the job to this file")
    common.add_argument("--submit", action="store_true", help="submit it; otherwise it is only shown")
    scheduled = argparse.ArgumentParser(add_help=False)
    scheduled.add_argument(
        "--template", type=Path, help="an edited copy of a file of launcher/schedulers/templates"
    )
    _add_slurm_options(targets.add_parser("slurm", parents=[common, scheduled], help="a script for sbatch"))
    _add_kubernetes_options(targets.add_parser("k8s", parents=[common, scheduled], help="a JobSet or PyTorchJob"))
    hosts = targets.add_parser("hosts", parents=[common], help="a hostfile for deepspeed")
    hosts.add_argument("--hosts", required=True, metavar="A,B,...")
    args, rest = parser.parse_known_args(argv)
    # argparse takes one run of positional arguments; overrides may stand between options as well.
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    args.overrides = [*args.overrides, *rest]
    return args


def _add_slurm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--time", default="24:00:00", help="time limit in sbatch's format; default 24:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--cpus-per-task", type=positive_int)
    parser.add_argument("--requeue", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-dir", default=".", help="folder of the job's output")


def _add_kubernetes_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, help="container image")
    parser.add_argument("--kind", choices=["JobSet", "PyTorchJob"], default="JobSet")
    parser.add_argument("--namespace")
    parser.add_argument("--secret", help="Secret that contains each --env NAME without a value")
    parser.add_argument(
        "--volume", action="append", default=[], metavar="CLAIM:/path", help="mount this persistent volume claim"
    )
    parser.add_argument("--shm", default="16Gi", help="size limit of /dev/shm")
    parser.add_argument("--cpus", help="cores that a pod requests")
    parser.add_argument("--memory", help="memory limit of a pod")


def _options(kind: type[Options], args: argparse.Namespace) -> Options:
    """The arguments that are fields of ``kind``."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def make_job(args: argparse.Namespace, cfg: RunConfig) -> ClusterJob:
    """The job that the arguments describe; on Kubernetes paths are those inside the image."""
    in_image = args.target == "k8s"
    literals, references = parse_variables(args.env)
    return ClusterJob(
        name=args.name or args.config.stem.replace("_", "-"),
        config=str(args.config.resolve()),
        overrides=tuple(args.overrides),
        nodes=args.nodes,
        processes=args.gpus_per_node,
        gpus=cfg.device != "cpu",
        entry=args.entry or ("/workspace/deco-scale" if in_image else str(ROOT)),
        python=args.python or ("python" if in_image else sys.executable),
        preflight=not args.no_preflight,
        literals=literals,
        references=references,
        grace_s=args.grace_s,
        max_restarts=args.max_restarts,
    )


def prepare(args: argparse.Namespace) -> tuple[str, list[str], Callable[[], int]]:
    """The job's text, lines about it, and what ``--submit`` does. Raises :class:`ConfigError`."""
    for override in args.overrides:
        key, _, value = override.partition("=")
        refuse_secret(key, value, instead="the standard AWS and wandb variables are read from the environment")
    cfg, lines = fit(args.config, args.overrides, ranks=args.nodes * args.gpus_per_node)
    job = make_job(args, cfg)
    if args.target == "slurm":
        text = render_slurm(job, _options(SlurmOptions, args), args.template)
        return text, lines, lambda: run_all([["sbatch"]], text)
    if args.target == "k8s":
        # Resolved: files that it names as its base are not in the pod.
        config_text = dump_config(cfg)
        text = render_kubernetes(job, _options(KubernetesOptions, args), cfg, config_text, args.template)
        return text, lines, lambda: run_all([["kubectl", "create", "-f", "-"]], text)
    text = render_hostfile(job, args.hosts.split(","))
    if args.submit and args.out is None:
        raise ConfigError("hosts --submit needs --out: the file that deepspeed reads the hosts from")
    commands = host_commands(job, (args.out or Path("hostfile")).resolve())
    return text, [*lines, " && \\\n".join(map(shlex.join, commands))], lambda: run_all(commands)


def run_all(commands: Sequence[Sequence[str]], text: str | None = None) -> int:
    """Run commands up to the first that fails, and return its exit code; ``text`` is their input.

    Raises :class:`RunError` where a command is not installed, or a scheduler's client refuses the job.
    """
    for command in commands:
        try:
            code = subprocess.run(command, input=text, text=True, check=False).returncode
        except FileNotFoundError:
            advice = "submit where it is (--out writes the job to a file)"
            raise RunError(f"{command[0]} is not installed here: {advice}") from None
        if code and text is not None:
            raise RunError(f"{' '.join(command)} ended with {code}; nothing was submitted")
        if code:
            return code
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        text, lines, submit = prepare(args)
        if args.out is None:
            print(text, end="", flush=True)
        else:
            try:
                args.out.write_text(text, encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--out {args.out}: {error.strerror}") from error
            console.print(f"written: {args.out}")
        for line in lines:
            console.print(line)
        if not args.submit:
            console.print("not submitted: pass --submit to submit it")
            return 0
        return submit()
    except (ConfigError, RunError) as error:
        print(f"submit: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
