"""A batch script for SLURM: one task per GPU, a signal before the time limit, requeue by exit code.

One task per GPU by ``srun``, not ``torchrun`` on each node: srun hands signals to the trainers themselves and
returns their exit code, where torchrun's own is 1 for any failure, so that the wish to be requeued is lost.
"""

import shlex
from dataclasses import dataclass

from deco_scale.errors import ConfigError
from deco_scale.watching.events import REQUEUE
from launcher.scheduling.job import Job, check_name, check_text

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
NAMES = r"[A-Za-z0-9_][A-Za-z0-9_.,-]{0,127}"
TIME = r"(\d+-)?\d{1,3}(:\d{2}){0,2}"
PATIENCE_S = 60
"""So long the other tasks may take after the first has ended: their own exit codes tell more than a kill's."""
SHELL_VARIABLES = ("PATH", "HOME", "USER", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV")
"""Exported to the job beside those asked for; no other variable of the submitter's shell is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmOptions:
    """``time`` as sbatch takes it; ``cpus`` of a task; ``log_dir`` gets the output, which restarts append to."""

    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    cpus: int | None = None
    requeue: bool = True
    log_dir: str = "."

    def __post_init__(self) -> None:
        allowed = "minutes, [hours:]minutes:seconds or days-hours[:minutes[:seconds]], as sbatch takes it"
        check_name(self.time, TIME, option="--time", allowed=allowed)
        for option, value in (("--partition", self.partition), ("--account", self.account)):
            if value is not None:
                check_name(value, NAMES, option=option, allowed="letters, digits and _ . - ,")
        if self.cpus is not None and self.cpus < 1:
            raise ConfigError(f"--cpus-per-task {self.cpus} must be at least 1")
        check_text(self.log_dir, what="--log-dir")
        # sbatch expands % in the names of output files, and its directives know no escape for quotes.
        if set(self.log_dir) & set("%'\"\\"):
            raise ConfigError(
                f"--log-dir {self.log_dir!r} has %, a quote or a backslash, which sbatch would expand"
            )


def render_slurm(job: Job, options: SlurmOptions) -> str:
    """The script, for ``sbatch``."""
    check_name(job.name, NAME, option="--name", allowed="letters, digits and _ . -, 64 at most")
    return "\n".join(["#!/bin/bash", *_directives(job, options), "", *_body(job, options), ""])


def _directives(job: Job, options: SlurmOptions) -> list[str]:
    settings = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.processes),
        "gpus-per-node": str(job.processes) if job.gpus else None,
        "cpus-per-task": str(options.cpus) if options.cpus else None,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        # B: the batch shell alone, which hands it on; sent up to a minute earlier than asked.
        "signal": f"B:USR1@{job.grace_s}",
        "open-mode": "append",
        "output": f'"{options.log_dir}/{job.name}-%j.log"',
        "export": ",".join(dict.fromkeys((*SHELL_VARIABLES, *job.references))),
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in settings.items() if value is not None]
    return [*lines, "#SBATCH --requeue" if options.requeue else "#SBATCH --no-requeue"]


def _body(job: Job, options: SlurmOptions) -> list[str]:
    literals = [f"export {name}={shlex.quote(value)}" for name, value in job.literals]
    cpus = f" --cpus-per-task={options.cpus}" if options.cpus else ""
    steps = ['run "$((port + 1))" ' + shlex.join(job.command("preflight"))] if job.preflight else []
    return [
        "set -u",
        *literals,
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_ADDR",
        "# Below the ports that kernels hand out, and apart for neighbouring jobs.",
        "port=$((20000 + 2 * (SLURM_JOB_ID % 5000)))",
        f'crashes={shlex.quote(f"{options.log_dir}/{job.name}-")}"$SLURM_JOB_ID".crashes',
        "child= interrupted= stopped= told=",
        "",
        "# Once: a second signal would end a trainer that is saving.",
        "tell() {",
        '    if [ -z "$child" ] || [ -n "$told" ]; then return; fi',
        '    told=1; kill -USR1 "$child" 2>/dev/null',
        "}",
        "hand_on() {",
        "    interrupted=1 stopped=1",
        "    tell",
        "}",
        "trap hand_on USR1",
        "",
        "finish() {",
        "    local code=$1 again=",
        f'    if [ "$code" -eq {REQUEUE} ]; then again=1; fi',
        "    # Killed by a signal: told to stop, out of memory, or a rank was lost.",
        '    if [ "$code" -gt 128 ] && [ -n "$stopped" ]; then again=1; fi',
        '    if [ "$code" -gt 128 ] && [ -z "$again" ]; then',
        '        echo "$code" >> "$crashes"',
        f'        if [ "$(wc -l < "$crashes")" -le {job.max_restarts} ]; then again=1; fi',
        "    fi",
        *_again(options),
        '    exit "$code"',
        "}",
        "",
        "run() {",
        "    export MASTER_PORT=$1",
        "    shift",
        '    if [ -n "$stopped" ]; then finish ' + str(REQUEUE) + "; fi",
        f'    srun --kill-on-bad-exit=0 --wait={PATIENCE_S} --export=ALL{cpus} "$@" &',
        "    child=$!",
        "    # It may have come before there was a child.",
        '    if [ -n "$stopped" ]; then tell; fi',
        '    wait "$child"',
        "    local code=$? last",
        "    # A trapped signal ends wait, not the step.",
        '    while [ -n "$interrupted" ]; do',
        "        interrupted=",
        '        wait "$child"',
        "        last=$?",
        '        if [ "$last" -ne 127 ]; then code=$last; fi',
        "    done",
        "    child=",
        '    if [ "$code" -ne 0 ]; then finish "$code"; fi',
        "}",
        "",
        *steps,
        'run "$port" ' + shlex.join(job.command("train")),
    ]


def _again(options: SlurmOptions) -> list[str]:
    if not options.requeue:
        return [
            '    if [ -n "$again" ]; then echo "wants to be started again, but --no-requeue was given" >&2; fi'
        ]
    return [
        '    if [ -n "$again" ]; then',
        '        echo "exit code $code: back into the queue" >&2',
        '        scontrol requeue "$SLURM_JOB_ID"',
        "    fi",
    ]
