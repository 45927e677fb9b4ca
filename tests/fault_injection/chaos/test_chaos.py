"""Faults of every kind, and the job goes on as if nothing had been."""

from pathlib import Path
from typing import Any

import pytest

from tests.fault_injection.chaos import checks
from tests.fault_injection.chaos.run import NAN, chaos
from tests.fault_injection.chaos.scenario import LONG, SHORT, Scenario


def survives(scenario: Scenario, seed: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Runs it, prints what happened also where the test passes, and fails with everything that was wrong."""
    with capsys.disabled():
        print()
        found = chaos(scenario, seed, folder, lambda line: print(f"  {line}", flush=True))
        for line in checks.summary(found):
            print(f"  {line}")
    assert not found["problems"], "\n".join(found["problems"])
    left_out = sum(len(scenario.faults.get(kind, ())) for kind in found["left_out"])
    assert found["faults"] == scenario.count - left_out
    return found


def test_a_few_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = survives(SHORT, 0, tmp_path, capsys)
    assert found["samples"]["replayed"] > 0


@pytest.mark.long
def test_twenty_five_faults_in_four_hundred_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert LONG.count == 25 and LONG.total_steps == 400 and LONG.nans
    found = survives(LONG, 1, tmp_path, capsys)
    struck = {fault["kind"] for fault in found["struck"]}
    assert struck | set(found["left_out"]) == set(LONG.faults), f"{NAN} aside"
