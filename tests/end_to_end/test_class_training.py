"""A class model from a folder of images for each class to samples: digits, ``configs/c2i_tiny.yaml``."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.tools import cli as data_cli
from deco_scale.cli.main import main
from deco_scale.observability.run_dir import RunDir
from deco_scale.yaml import load_yaml
from tests.conftest import ROOT
from tests.support.process_groups import Job, run_jobs, trace, worst_difference

datasets = pytest.importorskip("sklearn.datasets")

STEPS, BREAK, SHORT = 400, 15, 30
SHOWN: dict[str, Any] = {
    "samples": {"every": 12, "classes": [3, 7], "sampler": {"solver": "euler", "num_steps": 2}},
    "evaluation": {"every": 10, "count": 12, "batch": 5, "grid": 6, "npz": True,
                   "sampler": {"solver": "heun", "num_steps": 2}},
}  # fmt: skip
"""Images while training, which must leave no trace in it."""
PROFILE = {"at_step": 12, "steps": 2}


def digit_folders(root: Path) -> Path:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, in a folder for each."""
    digits = datasets.load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(folder / f"{number:04d}.png")
    return root


def tiny(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The shipped configuration in a folder of its own, sections merged with ``changes``."""
    config: dict[str, Any] = load_yaml((ROOT / "configs" / "c2i_tiny.yaml").read_text(), "recipe")
    changes = {"run": {}, "data": {}, "checkpoint": {}, **changes}
    changes["run"] = {"dir": str(root / name), "log_every": 1, **changes["run"]}
    changes["data"] = {"url": str(root / "shards"), **changes["data"]}
    for section, values in changes.items():
        config.setdefault(section, {}).update(values)
    config["wandb"] = {"mode": "disabled"}
    return config


def short(config: dict[str, Any], **stage: Any) -> dict[str, Any]:
    config["stages"][0] |= {"steps": SHORT, **stage}
    return config


def image(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A run that predicts the image; tokens can be spread over ranks where patches hold whole DCT blocks."""
    config = tiny(root, name, objective={"prediction": "image"}, model={"patch_size": 8}, **changes)
    return short(config, resolution=16)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the shards and one run per name."""
    root = tmp_path_factory.mktemp("classes")
    folders = digit_folders(root / "digits")
    assert data_cli.main(["pack", "--class-folders", str(folders), str(root / "shards"), "--workers", "1"]) == 0
    at_16 = {
        "checkpoint": {"init_from": str(root / "whole/checkpoints" / f"step_{STEPS:08d}"), "init_weights": "ema"}
    }
    one = [
        Job("whole", tiny(root, "whole")),
        Job("broken", tiny(root, "broken", run={"stop_at_step": BREAK, "profile": PROFILE}, **SHOWN)),
        Job("again", tiny(root, "broken", run={"stop_at_step": SHORT}, **SHOWN), "auto"),
        Job("larger", short(tiny(root, "larger", **at_16), resolution=16, name="at_16")),
        Job("image", image(root, "image")),
    ]
    run_jobs(one, 1, root)
    return root


def losses(run: Path) -> np.ndarray[Any, Any]:
    return np.array([entry["loss_flow"] for entry in RunDir(run).refresh().steps()])


def test_loss_falls_and_a_break_leaves_no_trace(runs: Path) -> None:
    found = losses(runs / "whole")
    assert len(found) == STEPS and found[-30:].mean() < 0.3 * found[:3].mean()
    broken = trace(runs / "broken")
    assert sorted(broken) == list(range(1, SHORT + 1))
    assert worst_difference(broken, trace(runs / "whole")) < 1e-6
    for step in (10, 20, 30):
        with np.load(runs / "broken" / "evaluation" / f"step_{step:08d}.npz", allow_pickle=False) as kept:
            assert kept["arr_0"].shape == (12, 8, 8, 3) and kept["arr_0"].dtype == np.uint8
    sheets = sorted(str(p.relative_to(runs / "broken")) for p in (runs / "broken").glob("*/*.png"))
    assert sheets == [
        *(f"evaluation/step_{step:08d}.png" for step in (10, 20, 30)),
        *(f"samples/step_{step:08d}.png" for step in (12, 24)),
    ]
    text = (runs / "broken" / "log.txt").read_text()
    assert f"step {BREAK}, {BREAK * 32} samples seen" in text


def test_the_profiled_steps_are_in_a_trace(runs: Path) -> None:
    (path,) = (runs / "broken" / "profile").iterdir()
    assert path.name == "step_00000012_rank_00000.trace.json.gz"
    with gzip.open(path, "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert sum("_fused_adamw_" in name for name in names) == 2
    assert "profile of steps 12-13 of ranks 0" in (runs / "broken" / "log.txt").read_text()


def test_training_goes_on_at_another_resolution_from_the_average(runs: Path) -> None:
    """What ``configs/c2i_xl_512.yaml`` does."""
    assert "(ema)" in (runs / "larger" / "log.txt").read_text()
    # Trained at 8 px only, it starts far below where an untrained model does.
    assert losses(runs / "larger")[0] < 0.7 * losses(runs / "whole")[0]


def test_a_model_that_predicts_the_image_trains(runs: Path) -> None:
    found = losses(runs / "image")
    assert len(found) == SHORT and found[-10:].mean() < 0.6 * found[:3].mean()


@pytest.mark.long
def test_a_predicted_image_trains_alike_with_its_tokens_spread(runs: Path) -> None:
    run_jobs([Job("image_tp", image(runs, "image_tp", parallel={"tp": 2}))], 2, runs)
    assert worst_difference(trace(runs / "image_tp"), trace(runs / "image")) < 1e-5


def test_samples_show_the_requested_class(runs: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    out = runs / "out"
    command = ["sample", "--checkpoint", str(runs / "whole"), "--classes", "0-9", "--per-prompt", "10"]
    assert main([*command, "--batch", "100", "--out", str(out)]) == 0
    records = [json.loads(line) for line in (out / "pictures.jsonl").read_text().splitlines()]
    assert len(records) == 100
    images = [np.asarray(Image.open(out / record["file"]).convert("L").resize((8, 8), Image.Resampling.BOX))
                for record in records]  # fmt: skip
    labels = np.repeat(np.arange(10), 10)
    digits = datasets.load_digits()
    classifier = LogisticRegression(max_iter=200).fit(digits.data, digits.target)
    right = (classifier.predict(np.stack(images).reshape(100, 64) * (16 / 255)) == labels).mean()
    print(f"digits that the classifier takes for the class asked for: {right:.0%}")
    assert right > 0.8
