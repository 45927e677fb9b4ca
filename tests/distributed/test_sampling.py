"""``deco sample``: the same images from one process, two, tensor parallelism, any batch, and after a kill."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deco_scale.cli.main import main
from deco_scale.config import build_config
from deco_scale.models import Denoiser
from tests.conftest import ROOT
from tests.support.assets import tiny_config
from tests.support.checkpoints import META, save
from tests.support.ports import free_port
from tests.support.process_groups import in_group

PROMPTS = ["a red circle", "the blue square on white ground", "a small photo"]
PER_PROMPT = 5
Images = list[np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, text_encoder: Path) -> Path:
    """A folder with a text model of random weights and prompts."""
    folder = tmp_path_factory.mktemp("sampling")
    cfg = build_config(tiny_config(folder / "run", "unused", text_encoder), source="test")
    torch.manual_seed(0)
    weights = {name: _random(name, p.shape) for name, p in Denoiser(cfg.model).state_dict().items()}
    tensors = {f"{kind}.denoiser.{name}": w for kind in ("model", "ema") for name, w in weights.items()}
    config = json.loads(json.dumps(dataclasses.asdict(cfg)))
    save(folder / "step_00000007", tensors, meta=dataclasses.replace(META, config=config))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights that let text and time show in the image, which those of a fresh model do not."""
    if len(shape) < 2:
        return torch.randn(shape) * 0.2 + ("norm" in name and name.endswith("weight"))
    return torch.randn(shape) / shape[-1] ** 0.5


def command(root: Path, out: str, *more: str) -> list[str]:
    """Non-square, guided with rescale, with a negative prompt."""
    return [
        "sample", "--checkpoint", str(root / "step_00000007"), "--prompts", str(root / "prompts.txt"),
        "--out", str(root / out), "--per-prompt", str(PER_PROMPT), "--size", "32x48", "--num-steps", "12",
        "--guidance", "3", "--guidance-rescale", "0.5", "--negative", "black ground", *more,
    ]  # fmt: skip


def read(folder: Path) -> tuple[list[dict[str, Any]], Images]:
    records = [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]
    return records, [np.asarray(Image.open(folder / record["file"])).astype(int) for record in records]


def _on_two(root: str) -> None:
    """What two processes draw: half each, together, and what a killed process left."""
    assert main(command(Path(root), "two", "--batch", "4")) == 0
    assert main(command(Path(root), "tp", "--tp", "2", "--batch", "4")) == 0
    assert main(command(Path(root), "resumed_by_two", "--batch", "4")) == 0


def _kill_midway(arguments: list[str], out: Path) -> None:
    """Start a command and kill it when it has finished two images."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "deco_scale.cli", *arguments],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    lines = out / "pictures.part00000.jsonl"
    while process.poll() is None:
        if lines.exists() and lines.read_bytes().count(b"\n") >= 2:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def drawn(root: Path) -> Iterator[Path]:
    assert main(command(root, "one", "--batch", "15")) == 0
    assert main(command(root, "small_batches", "--batch", "2")) == 0
    _kill_midway(command(root, "killed", "--batch", "1"), root / "killed")
    # Half a line, as a process leaves that dies while it writes.
    with (root / "killed" / "pictures.part00000.jsonl").open("a") as lines:
        lines.write('{"file": "00002_')
    shutil.copytree(root / "killed", root / "resumed_by_two")
    shutil.copytree(root / "killed", root / "resumed")
    assert main(command(root, "resumed", "--batch", "7")) == 0
    in_group(_on_two, 2, root, str(root))
    yield root


@pytest.mark.parametrize("other", ["small_batches", "resumed", "two", "tp", "resumed_by_two"])
def test_images_are_the_same(drawn: Path, other: str) -> None:
    records, images = read(drawn / "one")
    assert [(r["prompt"], r["seed"]) for r in records] == [(p, i) for p in PROMPTS for i in range(PER_PROMPT)]
    assert images[0].shape == (32, 48, 3) and all(p.std() > 5 for p in images)
    assert len({p.tobytes() for p in images}) == len(images)
    assert np.abs(images[0] - images[PER_PROMPT]).max() > 5, "the prompt must matter"
    found, again = read(drawn / other)
    assert found == records
    assert max(np.abs(a - b).max() for a, b in zip(images, again, strict=True)) <= 1
    left = {p.name for p in (drawn / other).iterdir()} - {r["file"] for r in records}
    assert left - {".00000_0002.png.partial"} == {"pictures.jsonl", "grid.png", ".pictures.lock"}


@pytest.mark.parametrize("resumed", ["resumed", "resumed_by_two"])
def test_finished_images_are_not_drawn_again(drawn: Path, resumed: str) -> None:
    lines = (drawn / "killed" / "pictures.part00000.jsonl").read_text().splitlines()
    finished = [json.loads(line)["file"] for line in lines[:-1]]
    assert 2 <= len(finished) < len(PROMPTS) * PER_PROMPT
    for file in finished:
        before, after = (drawn / folder / file for folder in ("killed", resumed))
        assert before.stat().st_mtime_ns == after.stat().st_mtime_ns


@pytest.mark.long
@pytest.mark.parametrize(
    "launcher",
    [("torchrun", "--nproc_per_node", "2", "-m"), ("deepspeed", "--num_gpus", "2", "--module")],
    ids=lambda words: words[0],
)
def test_launchers_share_the_images(drawn: Path, launcher: tuple[str, ...]) -> None:
    program = str(Path(sys.executable).with_name(launcher[0]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    arguments = command(drawn, launcher[0], "--batch", "4")
    port = ["--master_port", str(free_port())]
    done = subprocess.run(
        [program, *port, *launcher[1:], "deco_scale.cli", *arguments],
        env=environment, cwd=ROOT, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records, images = read(drawn / "one")
    found, again = read(drawn / launcher[0])
    assert found == records
    assert max(np.abs(a - b).max() for a, b in zip(images, again, strict=True)) <= 1
