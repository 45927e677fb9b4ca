"""A real SLURM on this machine: munged, slurmctld and slurmd of their own, in a temporary folder."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
START_S = 60


def why_not() -> str | None:
    """Why SLURM cannot be started here, None where it can."""
    missing = [program for program in PROGRAMS if _which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return None if os.geteuid() == 0 else "slurmd needs root"


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Slurm:
    """A cluster of one node with two processors."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host = folder, socket.gethostname().split(".")[0]
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir()
        # munged wants folders that others cannot write, up to the root, or to be forced.
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = [f"--{name}-file={self.folder}/munge/{name}" for name in ("pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self._socket}", *munge)
        self._wait(lambda: Path(self._socket).exists(), "munged's socket")
        (self.folder / "slurm.conf").write_text(self._configuration())
        self._daemon("slurmctld", "-D", "-i")
        self._daemon("slurmd", "-D", "-N", self.host)
        self._wait(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), "an idle node")

    def stop(self) -> None:
        with suppress(subprocess.SubprocessError):
            self.ask("scancel", "--user=root", "--signal=KILL")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def submit(self, script: Path, *options: str) -> int:
        """Number of the job."""
        told = subprocess.run(
            ["sbatch", "--parsable", *options, str(script)],
            env=self.environment,
            cwd=self.folder,
            text=True,
            capture_output=True,
            check=False,
        )
        assert told.returncode == 0, told.stderr
        return int(told.stdout.split(";")[0])

    def ask(self, *command: str) -> str:
        """Standard output of a client, empty where it failed."""
        told = subprocess.run(
            list(command), env=self.environment, text=True, capture_output=True, check=False, timeout=60
        )
        return told.stdout if told.returncode == 0 else ""

    def facts(self, job: int) -> dict[str, str]:
        """``scontrol show job`` by name."""
        words = self.ask("scontrol", "show", "job", str(job), "--oneliner").split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def hurry(self, job: int) -> None:
        """Begin a requeued job now, which would wait for two minutes."""
        # The node revokes what was issued for the job in the second of its requeue, and refuses such a start.
        time.sleep(3)
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait(self, job: int, state: str, timeout_s: float, *, restarts: int = 0) -> dict[str, str]:
        """Facts of a job in ``state`` after ``restarts``; fails with what is known after ``timeout_s``."""
        found: dict[str, str] = {}

        def come() -> bool:
            found.update(self.facts(job))
            return (found.get("JobState"), found.get("Restarts")) == (state, str(restarts))

        self._wait(come, f"job {job} {state}", timeout_s)
        return found

    @property
    def _socket(self) -> str:
        return f"{self.folder}/munge/socket"

    def _daemon(self, program: str, *arguments: str) -> None:
        path = _which(program)
        assert path is not None
        with (self.folder / f"{program}.out").open("wb") as out:
            self._daemons.append(
                subprocess.Popen([path, *arguments], env=self.environment, stdout=out, stderr=out)
            )

    def _wait(self, done: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                logs = [p.read_text(errors="replace")[-2000:] for p in sorted(self.folder.glob("*.out"))]
                raise AssertionError(f"no {what} after {timeout_s:.0f} s\n" + "\n".join(logs))
            time.sleep(0.3)

    def _configuration(self) -> str:
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{self.host}(127.0.0.1)",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "SlurmctldPort": free_port(),
            "SlurmdPort": free_port(),
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self._socket}",
            "CredType": "cred/munge",
            "StateSaveLocation": f"{self.folder}/state",
            "SlurmdSpoolDir": f"{self.folder}/spool",
            "SlurmctldPidFile": f"{self.folder}/slurmctld.pid",
            "SlurmdPidFile": f"{self.folder}/slurmd.pid",
            # No cgroups: a container may not have them.
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "MpiDefault": "none",
            "SchedulerType": "sched/builtin",
            "ReturnToService": 2,
            "KillWait": 5,
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines.append(f"NodeName={self.host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=512 State=UNKNOWN")
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        return "\n".join(lines) + "\n"


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """A cluster that ends with the context, with everything that it started."""
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
