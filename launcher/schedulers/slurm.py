"""A batch script for SLURM, from ``templates/slurm.sh.j2``."""

import argparse

from data_pipeline.console import positive_int
from deco_scale.errors import ConfigError
from deco_scale.observability.events import REQUEUE
from launcher.schedulers.base import ClusterJob, check_names, check_text, render_template

EXIT_WAIT_S = 60
"""How long the remaining tasks may run after the first one exits, so that they report their own exit codes."""
SHELL_VARIABLES = ("PATH", "HOME", "USER", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV")
"""Exported to the job, with those of ``--env``; no other variable of the submitting shell is."""
_NAMES = r"[A-Za-z0-9_][A-Za-z0-9_.,-]{0,127}"


def add_slurm_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``submit.py slurm``; the template sees them as ``slurm``."""
    parser.add_argument("--time", default="24:00:00", help="time limit in sbatch's format; default 24:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--cpus-per-task", type=positive_int)
    parser.add_argument("--requeue", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-dir", default=".", help="folder of the job's output; restarts append to it")


def render_slurm(job: ClusterJob, options: argparse.Namespace) -> str:
    """The script for ``sbatch``. Raises :class:`ConfigError`."""
    times = "minutes, [hours:]minutes:seconds or days-hours[:minutes[:seconds]], as sbatch takes it"
    check_names(
        ("--name", job.name, r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", "letters, digits and _ . -, 64 at most"),
        ("--time", options.time, r"(\d+-)?\d{1,3}(:\d{2}){0,2}", times),
        ("--partition", options.partition, _NAMES, "letters, digits and _ . - ,"),
        ("--account", options.account, _NAMES, "letters, digits and _ . - ,"),
    )
    check_text(options.log_dir, option="--log-dir")
    # sbatch expands % in the names of output files, and its directives know no escape for quotes.
    if set(options.log_dir) & set("%'\"\\"):
        raise ConfigError(
            f"--log-dir {options.log_dir!r} has %, a quote or a backslash, which sbatch would expand"
        )
    exported = list(dict.fromkeys((*SHELL_VARIABLES, *job.references)))
    variables = {"requeue_code": REQUEUE, "exit_wait_s": EXIT_WAIT_S, "exported": exported}
    return render_template(options.template, "slurm.sh.j2", {"job": job, "slurm": options, **variables})
