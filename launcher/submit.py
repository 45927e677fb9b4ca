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
from pathlib import Path

from data_pipeline.console import positive_int
from deco_scale.config import RunConfig
from deco_scale.errors import ConfigError, RunError
from launcher.schedulers.base import ClusterJob, fit, parse_variables, refuse_secret
from launcher.schedulers.hosts import host_commands, render_hostfile
from launcher.schedulers.kubernetes import add_kubernetes_options, render_kubernetes
from launcher.schedulers.slurm import add_slurm_options, render_slurm

ROOT = Path(__file__).resolve().parents[1]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets = parser.add_subparsers(dest="target", required=True)
    common = argparse.ArgumentParser(add_help=False)
    option = common.add_argument
    option("--config", required=True, type=Path, help="YAML file, see configs/")
    option("overrides", nargs="*", metavar="key.path=value")
    option("--nodes", required=True, type=positive_int, help="number of nodes")
    gpus = "processes per node, each with one GPU unless device=cpu; default 8"
    option("--gpus-per-node", type=positive_int, default=8, help=gpus)
    option("--name", help="name of the job; default: that of the configuration")
    option("--env", action="append", default=[], metavar="NAME|NAME=value", help="environment variable of the job")
    option("--python", help="interpreter on the nodes")
    option("--entry", help="folder of this repository on the nodes")
    option("--no-preflight", dest="preflight", action="store_false", help="do not check the nodes first")
    grace = "seconds between the stop signal and SIGKILL; default 120"
    option("--grace-s", type=positive_int, default=120, help=grace)
    restarts = "restarts after crashes; stop signals do not count; default 10"
    option("--max-restarts", type=int, default=10, help=restarts)
    option("--out", type=Path, help="write the job to this file")
    option("--submit", action="store_true", help="submit it; otherwise it is only shown")
    scheduled = argparse.ArgumentParser(add_help=False)
    template = "an edited copy of a file of launcher/schedulers/templates"
    scheduled.add_argument("--template", type=Path, help=template)
    add_slurm_options(targets.add_parser("slurm", parents=[common, scheduled], help="a script for sbatch"))
    add_kubernetes_options(targets.add_parser("k8s", parents=[common, scheduled], help="a JobSet or PyTorchJob"))
    hosts = targets.add_parser("hosts", parents=[common], help="a hostfile for deepspeed")
    hosts.add_argument("--hosts", required=True, metavar="A,B,...")
    args, rest = parser.parse_known_args(argv)
    # argparse takes one run of positional arguments; overrides may stand between options as well.
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    args.overrides = [*args.overrides, *rest]
    return args


def make_job(args: argparse.Namespace, cfg: RunConfig) -> ClusterJob:
    """The job that the arguments describe; on Kubernetes paths are those inside the image."""
    in_image = args.target == "k8s"
    variables = parse_variables(args.env)
    # train.py recognises SLURM by itself.
    binding = ["run.cpu_binding=numa"] if args.target == "hosts" and cfg.run.cpu_binding == "auto" else []
    return ClusterJob(
        name=args.name or args.config.stem.replace("_", "-"),
        config=str(args.config.resolve()),
        overrides=[*args.overrides, *binding],
        nodes=args.nodes,
        processes=args.gpus_per_node,
        gpus=cfg.device != "cpu",
        entry=args.entry or ("/workspace/deco-scale" if in_image else str(ROOT)),
        python=args.python or ("python" if in_image else sys.executable),
        preflight=args.preflight,
        literals=[(name, value) for name, value in variables.items() if value is not None],
        references=[name for name, value in variables.items() if value is None],
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
        text = render_slurm(job, args)
        return text, lines, lambda: run_all([["sbatch"]], text)
    if args.target == "k8s":
        text = render_kubernetes(job, args, cfg)
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
    try:
        text, lines, submit = prepare(args)
        if args.out is None:
            print(text, end="", flush=True)
        else:
            try:
                args.out.write_text(text, encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--out {args.out}: {error.strerror}") from error
            lines = [f"written: {args.out}", *lines]
        if not args.submit:
            lines.append("not submitted: pass --submit to submit it")
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        return submit() if args.submit else 0
    except (ConfigError, RunError) as error:
        print(f"submit: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
