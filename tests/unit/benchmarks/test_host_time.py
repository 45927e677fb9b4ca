"""Host time of the engines: the command, and what it writes."""

import json
from pathlib import Path

import pytest

from benchmarks import host_time


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        host_time.main(["--against", str(tmp_path)])
    assert "is no checkout" in capsys.readouterr().err


@pytest.mark.long
def test_engines_take_turns_and_one_process_needs_no_wrapper(tmp_path: Path) -> None:
    small = ["model.num_blocks=1", "model.num_text_blocks=1", "objective.repa_layer=1"]
    options = ["--engines", "plain", "fsdp", "--rounds", "1", "--steps", "1", "--out", str(tmp_path)]
    assert host_time.main([*small, *options]) == 0
    found = json.loads(next(tmp_path.glob("host_time_1_*.json")).read_text())
    assert set(found["medians"]) == {"plain", "fsdp"}
    assert all(value > 0 for figures in found["medians"].values() for value in figures.values())
