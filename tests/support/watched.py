"""A trainer without a network for the watchdog's tests: beats, and does what its rank is told at step 5.

    python -m tests.support.watched RANK WORLD_SIZE RUN_DIR TIMEOUT_S SLOW_TIMEOUT_S ACTION

Training is done once the file ``enough`` stands beside the run; a ``peer`` takes the file ``broken`` for a broken
connection.
"""

import ctypes
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deco_scale.errors import RunError
from deco_scale.watchdog.client import Watchdog
from deco_scale.watchdog.config import WatchdogConfig

STEP_S = 0.05


class Shared:
    """Objects of rank 0 for all, through files."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank, self.count = folder, rank, 0

    def __call__(self, value: Any) -> Any:
        self.count += 1
        path = self.folder / f"shared_{self.count}.pickle"
        if self.rank == 0:
            path.with_suffix(".part").write_bytes(pickle.dumps(value))
            path.with_suffix(".part").rename(path)
            return value
        while not path.exists():
            time.sleep(0.01)
        return pickle.loads(path.read_bytes())  # noqa: S301  # written above


def sleeps_in_the_lock() -> None:
    """A C call that does not give the interpreter's lock back."""
    while True:
        ctypes.PyDLL(None).sleep(1000)


def waits_for_ever() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    while True:
        time.sleep(1000)


def main(rank: int, world_size: int, run_dir: Path, timeout_s: float, slow_timeout_s: float, action: str) -> int:
    cfg = WatchdogConfig(timeout_s=timeout_s, slow_timeout_s=slow_timeout_s)
    share = Shared(run_dir.parent, rank)
    try:
        dog = Watchdog.start(cfg, rank=rank, world_size=world_size, run_dir=run_dir, share=share)
    except RunError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    (run_dir.parent / f"ready_{rank}").touch()
    # As text: a Path has so many frames of its own that a stack would be cut before this function.
    broken, enough = str(run_dir.parent / "broken"), str(run_dir.parent / "enough")
    code, reason = 0, "done"
    for step in itertools.count(1):
        dog.beat(step, "step")
        time.sleep(STEP_S)
        if action == "peer" and os.path.exists(broken):
            dog.report_exit("ConnectionError: closed by peer", 1)
            dog.wait_for_verdict(20)
        if os.path.exists(enough) and step > 5:
            break
        if step != 5:
            continue
        if action == "slow":
            dog.beat(step, "long_op")
            time.sleep(2 * timeout_s)
        elif action == "slower":
            dog.beat(step, "long_op")
            waits_for_ever()
        elif action == "hang":
            waits_for_ever()
        elif action == "lock":
            sleeps_in_the_lock()
        elif action == "children":
            subprocess.Popen([sys.executable, "-c", "import os, time; os.fork(); time.sleep(1000)"])
        elif action == "error":
            Path(broken).touch()
            code, reason = 2, "the cat bit through the cable"
            break
        elif action == "exit":
            dog.report_exit("done", 0)
            waits_for_ever()
    if action == "late":
        time.sleep(1)
    dog.report_exit(reason, 75 if action == "stop" else code)
    dog.close()
    return 75 if action == "stop" else code


if __name__ == "__main__":
    # Some launchers leave signals blocked or ignored.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    words = sys.argv[1:]
    code = main(int(words[0]), int(words[1]), Path(words[2]), float(words[3]), float(words[4]), words[5])
    sys.stderr.flush()
    os._exit(code)
