"""A batch script for SLURM, from ``templates/slurm.sh.j2``."""

from dataclasses import dataclass
from pathlib import Path

from deco_scale.errors import ConfigError
from deco_scale.observability.events import REQUEUE
from launcher.schedulers.base import ClusterJob, check_names, check_text, render_template

EXIT_WAIT_S = 60
"""How long the remaining tasks may run after the first one exits, so that they report their own exit codes."""
SHELL_VARIABLES = ("PATH", "HOME", "USER", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV")
"""Exported to the job, with those of ``--env``; no other variable of the submitting shell is."""
_NAMES = r"[A-Za-z0-9_][A-Za-z0-9_.,-]{0,127}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmOptions:
    """Options of ``submit.py slurm``, in templates ``slurm``; restarts append to the log in ``log_dir``."""

    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    cpus_per_task: int | None = None
    requeue: bool = True
    log_dir: str = "."

    def __post_init__(self) -> None:
        times = "minutes, [hours:]minutes:seconds or days-hours[:minutes[:seconds]], as sbatch takes it"
        names = "letters, digits and _ . - ,"
        check_names(
            [
                ("--time", self.time, r"(\d+-)?\d{1,3}(:\d{2}){0,2}", times),
                ("--partition", self.partition, _NAMES, names),
                ("--account", self.account, _NAMES, names),
            ]
        )
        check_text(self.log_dir, option="--log-dir")
        # sbatch expands % in the names of output files, and its directives know no escape for quotes.
        if set(self.log_dir) & set("%'\"\\"):
            raise ConfigError(
                f"--log-dir {self.log_dir!r} has %, a quote or a backslash, which sbatch would expand"
            )


def render_slurm(job: ClusterJob, options: SlurmOptions, template: Path | None = None) -> str:
    """The script for ``sbatch``. Raises :class:`ConfigError`."""
    check_names(
        [("--name", job.name, r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", "letters, digits and _ . -, 64 at most")]
    )
    exported = list(dict.fromkeys((*SHELL_VARIABLES, *job.references)))
    variables = {"requeue_code": REQUEUE, "exit_wait_s": EXIT_WAIT_S, "exported": exported}
    return render_template(template, "slurm.sh.j2", {"job": job, "slurm": options, **variables})
