"""What the rehearsal of the GPU machine's versions would let through."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import rehearsal
from benchmarks.jobs.runner import CheckFailed, Where

HERE = Where("cpu", True, Path())


def test_another_version_than_the_gpu_machine_s_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rehearsal.expected_versions()
    assert expected["torch"] == "2.11.0" and expected["triton"] == "3.6.0" and len(expected) > 20
    monkeypatch.setattr(rehearsal.platform, "python_version_tuple", lambda: ("3", "12", "1"))
    monkeypatch.setattr(rehearsal, "installed_versions", lambda: dict(expected))
    assert "without transformer-engine" in rehearsal.versions(HERE).line
    monkeypatch.setattr(rehearsal, "installed_versions", lambda: {**expected, "triton": "3.9.0"})
    with pytest.raises(CheckFailed, match=r"^triton 3\.9\.0 in place of 3\.6\.0$"):
        rehearsal.versions(HERE)


def test_every_module_of_the_project_is_listed() -> None:
    names = set(rehearsal.modules())
    assert {
        "launcher.train",
        "launcher.schedulers.slurm",
        "deco_scale.kernels.triton.pixel_decoder_device",
    } <= names
    assert {"benchmarks.gpu_suite", "data_pipeline.storage.s3", "checkpoints_tools.cli"} <= names


def test_neither_git_nor_boto3_is_there_and_the_rest_is(tmp_path: Path) -> None:
    environment = rehearsal.without_git_and_boto3(tmp_path)
    assert shutil.which("git", path=environment["PATH"]) is None
    for program in ("bash", "env"):
        assert shutil.which(program, path=environment["PATH"])
    code = "import json\ntry:\n    import boto3\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "boto3"


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("12 passed in 83.21s (0:01:23)", "12 passed"),
        ("first call: 8 pass; results in /somewhere/first.json", "first call: 8 pass"),
    ],
)
def test_a_summary_has_no_times_of_tests_no_logs_and_no_folders(line: str, kept: str) -> None:
    summary = rehearsal.summary({"unit": {"status": "pass", "line": line, "seconds": 84.2, "parts": {"a": {}}}})
    assert summary["checks"] == {"unit": {"status": "pass", "line": kept, "seconds": 84}}
