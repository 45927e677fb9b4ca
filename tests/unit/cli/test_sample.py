"""``deco sample`` in one process: names, seeds, resuming, refusals; classes and prompts."""

import dataclasses
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from checkpoints_tools import cli as checkpoint_cli
from deco_scale.cli.sample import parse_classes, parse_size
from deco_scale.config import build_config
from deco_scale.errors import ConfigError, RunError
from deco_scale.sampling.output_dir import ImageFolder
from tests.conftest import ROOT
from tests.support.assets import tiny_config
from tests.support.checkpoints import META, save, tensors_of
from tests.support.commands import deco


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class model with the weights of a recorded one, whose images show the class."""
    folder = tmp_path_factory.mktemp("classes") / "step"
    fixture = ROOT / "tests" / "fixtures" / "c2i_tiny.safetensors"
    assert checkpoint_cli.main(["import", str(fixture), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, text_encoder: Path) -> Path:
    """A run with two complete steps of a text model, the newer one of other weights, and a broken one."""
    folder = tmp_path_factory.mktemp("run")
    cfg = build_config(tiny_config(folder, "unused", text_encoder), source="test")
    config = json.loads(json.dumps(dataclasses.asdict(cfg)))
    for step in (3, 7):
        tensors = {n: t * 0.1 for n, t in tensors_of(cfg.model, seed=step, encoder_dim=0).items()}
        save(folder / "checkpoints" / f"step_{step:08d}", tensors,
             meta=dataclasses.replace(META, step=step, config=config))  # fmt: skip
    (folder / "checkpoints" / "step_00000009").mkdir()
    return folder


def sample(checkpoint: Path, out: Path, *more: str) -> int:
    quick = ["--num-steps", "2", "--size", "32"]
    return deco(["sample", "--checkpoint", str(checkpoint), "--out", str(out), *quick, *more])


def read(out: Path) -> dict[str, tuple[dict[str, Any], np.ndarray[Any, Any]]]:
    records = [json.loads(line) for line in (out / "pictures.jsonl").read_text().splitlines()]
    return {r["file"]: (r, np.asarray(Image.open(out / r["file"]))) for r in records}


def test_a_run_is_drawn_from_its_newest_complete_step(run_folder: Path, tmp_path: Path) -> None:
    assert sample(run_folder, tmp_path / "a", "--prompt", "red circle", "--size", "16x48") == 0
    ((record, pixels),) = read(tmp_path / "a").values()
    digest = json.loads((run_folder / "checkpoints" / "step_00000007" / "meta.json").read_text())[
        "parameter_digest"
    ]
    assert record["checkpoint_step"] == 7 and record["checkpoint_digest"] == digest and digest
    assert pixels.shape == (16, 48, 3) and (record["height"], record["width"]) == (16, 48)
    assert record["prompt"] == "red circle" and record["seed"] == 0 and record["compute"] == "fp32"
    assert record["sampler"]["num_steps"] == 2 and record["sampler"]["guidance"] == 4.0


def test_images_of_classes_depend_on_class_and_seed_alone(classes: Path, tmp_path: Path) -> None:
    assert sample(classes, tmp_path / "all", "--classes", "0-3,2,7", "--per-prompt", "2") == 0
    every = read(tmp_path / "all")
    assert [(r["class"], r["index"], r["seed"]) for r, _ in every.values()] == [
        (number, index, index) for number in (0, 1, 2, 3, 7) for index in (0, 1)
    ]
    assert len({pixels.tobytes() for _, pixels in every.values()}) == 10
    assert sample(classes, tmp_path / "two", "--classes", "7,2", "--first-seed", "1", "--batch", "1") == 0
    for file in ("00007_0000.png", "00002_0000.png"):
        found, wanted = read(tmp_path / "two")[file][1], every[file.replace("_0000", "_0001")][1]
        assert np.abs(found.astype(int) - wanted).max() <= 1
    assert sample(classes, tmp_path / "seeds", "--classes", "1-2", "--per-prompt", "2", "--seeds", "picture") == 0
    assert [r["seed"] for r, _ in read(tmp_path / "seeds").values()] == [0, 1, 2, 3]


def test_only_what_is_missing_is_drawn(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(classes, tmp_path, "--classes", "0-3") == 0
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("0*.png")}
    (tmp_path / "00002_0000.png").unlink()
    # An image whose line was lost counts as not drawn.
    lines = (tmp_path / "pictures.jsonl").read_text().splitlines()
    (tmp_path / "pictures.jsonl").write_text("\n".join(lines[1:]) + "\n")
    assert sample(classes, tmp_path, "--classes", "0-5") == 0
    assert "2 of 6 images exist in" in capsys.readouterr().out
    assert [r["class"] for r, _ in read(tmp_path).values()] == list(range(6))
    for name in ("00001_0000.png", "00003_0000.png"):
        assert (tmp_path / name).stat().st_mtime_ns == before[name][0]
    for name in ("00000_0000.png", "00002_0000.png"):
        assert (tmp_path / name).stat().st_mtime_ns > before[name][0]
        assert np.abs(np.asarray(Image.open(tmp_path / name)).astype(int)
                      - read(tmp_path)[name][1]).max() <= 1  # fmt: skip
    # With everything there not even the model is loaded.
    hidden = classes.with_name("hidden")
    (classes / "__0_0.distcp").rename(hidden)
    try:
        assert sample(classes, tmp_path, "--classes", "1") == 0
    finally:
        hidden.rename(classes / "__0_0.distcp")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-steps", "3"], "num_steps=2, now 3: choose another --out"),
        (["--guidance", "1.5", "--solver", "heun"], r'solver="euler", now "heun"; guidance=3.2, now 1.5'),
        (["--size", "16"], "height=32, now 16; width=32, now 16"),
        (["--first-seed", "4"], "seed=0, now 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_other_settings_in_a_folder_are_an_error_that_says_which(
    classes: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(classes, tmp_path, "--classes", "1") == 0
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sample(classes, tmp_path, "--classes", "1", *more) == 2
    assert re.search(message, capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content


def test_another_prompt_under_the_same_name_is_an_error(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(run_folder, tmp_path, "--prompt", "red", "--prompt", "blue") == 0
    assert sample(run_folder, tmp_path, "--prompt", "red", "--prompt", "green") == 2
    assert '00001_0000.png with prompt="blue", now "green"' in capsys.readouterr().err
    older = run_folder / "checkpoints" / "step_00000003"
    assert sample(older, tmp_path, "--prompt", "red", "--prompt", "blue") == 2
    assert "checkpoint_step=7, now 3; checkpoint_digest=" in capsys.readouterr().err


def test_damaged_lines_and_two_commands_at_once_are_refused(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(classes, tmp_path, "--classes", "1") == 0
    with (tmp_path / ".pictures.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sample(classes, tmp_path, "--classes", "1") == 2
        assert "another command is writing there" in capsys.readouterr().err
    for line in ("{}", '{"file": "../x.png"}', "not json", '["file"]'):
        (tmp_path / "pictures.part00003.jsonl").write_text(line + "\n")
        assert sample(classes, tmp_path, "--classes", "1") == 2
        assert "pictures.part00003.jsonl, line 1: not an image's record" in capsys.readouterr().err
    (tmp_path / "pictures.part00003.jsonl").unlink()
    (tmp_path / "file").write_text("")
    assert sample(classes, tmp_path / "file", "--classes", "1") == 2


REFUSED = [
    (["--classes", "1", "--size", "20"], "20x20: both sides must be positive multiples of"),
    (["--classes", "1", "--size", "16x16x16"], "--size 16x16x16: give a side"),
    (["--classes", "1", "--size", "ax16"], "--size ax16: give a side in pixels, or HEIGHTxWIDTH"),
    (["--classes", "1", "--size", "-32"], "-32x-32"),
    (["--classes", "1", "--size", "1000000000"], "patches of"),
    (["--classes", "8-999999999999"], "the model has classes 0 to"),
    (["--classes", "5-2"], "'5-2' is neither a number nor a range"),
    (["--classes", "1,,2"], "'' is neither a number nor a range"),
    (["--classes", "1", "--per-prompt", "0"], "--per-prompt: 0 is not at least 1"),
    (["--classes", "1", "--batch", "-1"], "--batch: -1 is not at least 1"),
    (["--classes", "1", "--num-steps", "0"], "num_steps=0 must be at least 1"),
    (["--classes", "1", "--guidance", "nan"], "guidance=nan must be a finite number"),
    (["--classes", "1", "--first-seed", "-1"], "--first-seed -1 must not be negative"),
    (["--classes", "1", "--first-seed", str(2**64)], "too large for 64 bits"),
    (["--classes", "1", "--negative", "blur"], "takes no negative prompt"),
    (["--classes", "1", "--text-encoder", "x"], "takes classes and no text encoder"),
    (["--classes", "1", "--tp", "2"], "--tp 2 must divide the number of processes, 1"),
    (["--classes", "1", "--cuda-graphs"], "CUDA graphs need a GPU, this process computes on cpu"),
    (["--prompt", "a cat"], "a c2i_deco model takes classes; give --classes"),
    (["--prompts", "/nowhere/prompts.txt"], "takes classes"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_wrong_use_is_refused(
    classes: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(classes, tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_text_models_refuse_classes_and_missing_prompts(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    for arguments, message in (
        (["--classes", "1"], "a t2i_deco model takes prompts"),
        (["--prompts", str(tmp_path / "empty.txt")], "no prompt in it"),
        (["--prompts", str(tmp_path / "none.txt")], "No such file"),
        (["--prompt", "x", "--text-encoder", str(tmp_path / "none")], "text encoder"),
    ):
        assert sample(run_folder, tmp_path / "out", *arguments) == 2
        assert message in capsys.readouterr().err


def test_sizes_and_classes_are_read() -> None:
    assert parse_size("64") == (64, 64) and parse_size("32X48") == (32, 48)
    assert parse_classes("3, 1-2,2", 4) == [3, 1, 2] and parse_classes("0-999", 1000) == list(range(1000))
    with pytest.raises(ConfigError):
        parse_size("1x2x3")


def test_an_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = ImageFolder(tmp_path / "file", rank=0)
    with pytest.raises(RunError, match="0.png could not be written"):
        folder.save({"file": "0.png"}, np.zeros((4, 4, 3), np.uint8))


def test_help_of_one_command_needs_no_other_commands_packages() -> None:
    code = "import sys; from deco_scale.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'gradio' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "sample" in done.stdout, done.stderr
