"""Names of FP8's scaling state in a checkpoint, which only delayed scaling has."""

from collections.abc import Mapping
from typing import Any

STATE_PREFIX = "fp8."


def unmatched_scaling(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[set[str], list[str]]:
    """Names of scaling state that only the checkpoint or only the run has, and log lines about them.

    A checkpoint fits a run without it, because scaling is not part of the model.
    """
    only_run = {n for n in expected if n.startswith(STATE_PREFIX)} - set(stored)
    only_checkpoint = {n for n in stored if n.startswith(STATE_PREFIX)} - set(expected)
    lines = []
    if only_run:
        lines.append(
            f"FP8: {_linears_of(only_run)} linears start with fresh scaling; the checkpoint has none of theirs"
        )
    if only_checkpoint:
        lines.append(f"FP8: the checkpoint's scaling of {_linears_of(only_checkpoint)} linears is not used")
    return only_run | only_checkpoint, lines


def _linears_of(names: set[str]) -> int:
    return len({name.rpartition(".")[0] for name in names})
