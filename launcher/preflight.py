"""Runs ``python -m launcher.preflight`` by its path, also from a clone that is not installed."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
runpy.run_module("launcher.preflight", run_name="__main__", alter_sys=True)
