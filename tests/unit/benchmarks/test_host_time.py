"""Host time of the engines: the command, and what it writes."""

from pathlib import Path

import pytest

from benchmarks import host_time
from deco_scale.planning.host import read_host_times


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        host_time.main(["--against", str(tmp_path)])
    assert "is no checkout" in capsys.readouterr().err


@pytest.mark.long
def test_engines_take_turns_and_the_plan_reads_their_times(tmp_path: Path) -> None:
    small = ["model.num_blocks=1", "model.num_text_blocks=1", "objective.repa_layer=1"]
    options = ["--world", "2", "--rounds", "1", "--steps", "1", "--out", str(tmp_path)]
    assert host_time.main([*small, *options]) == 0
    found = read_host_times(tmp_path).engines
    assert set(found) == {"plain", "fsdp", "zero3"}
    assert all(seconds > 0 for times in found.values() for seconds in times)
