"""Jobs for the tests of the GPU suite's runner; they import nothing that takes time."""

import os
import signal
import subprocess
import sys
import time

from benchmarks.jobs.runner import CheckFailed, Found, NotAvailable, Where

ENDLESS = [sys.executable, "-c", "import time; time.sleep(1000)"]
# Prints the number of its child, which keeps no pipe open, and ends.
ORPHAN = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=-3, stderr=-3).pid)"


def passes(where: Where, number: int = 1) -> Found:
    where.write("first", {"device": where.device})
    return Found("fine", {"number": number})


def threads(where: Where) -> Found:
    import torch

    return Found("", {"threads": torch.get_num_threads()})


def fails(where: Where) -> Found:
    raise CheckFailed("7 is not 8")


def lacks(where: Where) -> Found:
    raise NotAvailable("no such card")


def breaks(where: Where) -> Found:
    raise KeyError("x")


def dies(where: Where) -> Found:
    where.write("first", {})
    os._exit(3)


def hangs(where: Where) -> Found:
    """Never ends, ignores SIGTERM, and has three children."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    where.write("one", {"value": 1})
    own = subprocess.Popen(ENDLESS)
    away = subprocess.Popen(ENDLESS, start_new_session=True)
    orphan = subprocess.run([sys.executable, "-c", ORPHAN, *ENDLESS], capture_output=True, text=True, check=True)
    (where.out / "pids").write_text(f"{own.pid} {away.pid} {orphan.stdout}")
    where.write("two", {"value": 2})
    print("two is measured")
    time.sleep(1000)
    raise AssertionError
