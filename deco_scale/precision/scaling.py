"""Names of FP8's scaling state in a checkpoint; delayed scaling alone has any."""

from collections.abc import Mapping
from typing import Any

STATE_PREFIX = "fp8."
"""Names of scaling state in a checkpoint begin with it."""


def unmatched_scaling(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[set[str], list[str]]:
    """Names of scaling state that only a checkpoint or only a run has, and a line on each of the two kinds.

    Scaling is no part of the model: either may go without it, aloud.
    """
    only_run = {n for n in wanted if n.startswith(STATE_PREFIX)} - set(found)
    only_checkpoint = {n for n in found if n.startswith(STATE_PREFIX)} - set(wanted)
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
