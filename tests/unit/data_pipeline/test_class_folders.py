"""A folder for each class becomes shards with class numbers; small images are upscaled if that is asked for."""

import io
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.decode import DecodeMode, cover_and_crop, decode
from data_pipeline.errors import Reject
from data_pipeline.index.format import load_index
from data_pipeline.pack.readers import class_names, image_files, read_class_folders
from data_pipeline.storage.base import open_store
from data_pipeline.stream.loader import Loader
from data_pipeline.tools import cli
from tests.support.sets import image_bytes, kind_of, samples_of

NAMES = ["n01440764", "n01443537", "n09835506"]
PLENTY = 10**8


def class_folders(root: Path, per_class: int = 40) -> Path:
    """As ImageNet is unpacked; an image's seed tells its class."""
    for number, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{name}_{i}.JPEG").write_bytes(image_bytes(1000 * number + i, "jpg"))
    return root


def test_folders_become_shards_with_class_numbers(tmp_path: Path) -> None:
    root, out = class_folders(tmp_path / "train"), tmp_path / "out"
    assert cli.main(["pack", "--class-folders", str(root), str(out), "--shard-mb", "0.1", "--workers", "2"]) == 0
    assert (out / "classes.txt").read_text().splitlines() == NAMES
    samples = samples_of(out)
    assert len(samples) == 120 and len(list(out.glob("*.tar"))) > 1
    numbers = {image_bytes(1000 * c + i, "jpg"): c for c in range(3) for i in range(40)}
    # webdataset reads .cls as a number; every image is there once, under its own class.
    assert all(int(sample["cls"]) == numbers.pop(sample["jpg"]) for sample in samples) and not numbers
    assert len(load_index(open_store(str(out)))) == 120
    # Neighbours are read together, so they hold several classes; the order is the same every time.
    labels = [int(sample["cls"]) for sample in samples]
    assert all(len(set(labels[start : start + 20])) == 3 for start in range(0, 120, 20))
    again = [s.label for s in read_class_folders(root, NAMES, [], workers=1)]
    assert again == labels


def test_packing_without_classes_takes_their_names_away(tmp_path: Path) -> None:
    root, out = class_folders(tmp_path / "train", 2), tmp_path / "out"
    assert cli.main(["pack", "--class-folders", str(root), str(out)]) == 0
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.png").write_bytes(image_bytes(0))
    (tmp_path / "plain" / "a.txt").write_text("an image")
    assert cli.main(["pack", str(tmp_path / "plain"), str(out), "--overwrite"]) == 0
    assert not (out / "classes.txt").exists() and len(json.loads((out / "shards.json").read_text())) == 1


def test_files_are_listed_without_asking_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question for each of a million files takes long on a network file system."""
    root = class_folders(tmp_path / "train", 2)
    (root / "loop").symlink_to(root)
    wanted = sorted(path for name in NAMES for path in (root / name).iterdir())
    monkeypatch.setattr(Path, "stat", lambda *a, **k: pytest.fail("asked for a file"))
    assert list(image_files(root)) == wanted


def test_what_would_shift_class_numbers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = class_folders(tmp_path / "train", 1)
    (root / ".cache").mkdir()
    (root / "README").write_text("x")
    (root / NAMES[0] / "broken.jpg").write_bytes(b"no image")
    rejects: list[Reject] = []
    assert class_names(root, rejects) == NAMES
    assert [Path(reject.name).name for reject in rejects] == [".cache", "README"]
    assert len(list(read_class_folders(root, NAMES, rejects))) == 3 and "broken.jpg: Unidentified" in str(
        rejects[-1]
    )
    (root / "n00000000").mkdir()
    pack = ["pack", "--class-folders"]
    assert cli.main([*pack, str(root), str(tmp_path / "out")]) == 1
    assert "n00000000: has no images; remove it" in capsys.readouterr().err
    for source in ("s3://bucket/set", str(tmp_path / "nowhere"), str(root / NAMES[0])):
        assert cli.main([*pack, source, str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("side", [(40, 48), (500, 20), (64, 63)])
def test_small_images_are_upscaled(mode: DecodeMode, side: tuple[int, int]) -> None:
    """Against Pillow's own BICUBIC to the covering size, as ADM's preprocessing enlarges."""
    ramp = np.linspace(0, 255, side[0])[:, None, None] * np.ones((1, side[1], 3))
    image = Image.fromarray(ramp.astype(np.uint8))
    encoded = _png(image)
    assert kind_of(lambda: decode(encoded, (64, 64), mode=mode, max_pixels=PLENTY)) == "too_small"
    found = decode(encoded, (64, 64), mode=mode, max_pixels=PLENTY, upscale=True)
    assert found.shape == (64, 64, 3)
    assert np.abs(found.astype(int) - np.asarray(cover_and_crop(image, (64, 64))).astype(int)).max() <= 1


def test_enlarging_has_a_bound() -> None:
    """An image of one row would cover 512 pixels with 33 million columns."""
    line = _png(Image.new("RGB", (65_000, 1)))
    assert (
        kind_of(lambda: decode(line, (512, 512), mode="exact", max_pixels=64 * 2**20, upscale=True)) == "too_large"
    )


def test_a_run_sees_small_images_only_if_they_are_upscaled(tmp_path: Path) -> None:
    root, out = class_folders(tmp_path / "train", 4), tmp_path / "out"
    (root / NAMES[1] / "large.png").write_bytes(image_bytes(5, size=(96, 96)))
    assert cli.main(["pack", "--class-folders", str(root), str(out)]) == 0
    seen = {}
    for small in ("drop", "upscale"):
        cfg = DataConfig(url=str(out), target="label", small=small, streams=1, workers=0)  # type: ignore[arg-type]
        loader = Loader(cfg, resolution=64, seed=0, global_batch=13, rank=0, world=1, start=0)
        batch = next(iter(loader))
        loader.close()
        assert batch.images.shape == (13, 64, 64, 3)
        seen[small] = sorted(batch.labels)
    assert seen == {"drop": [1] * 13, "upscale": [0] * 4 + [1] * 5 + [2] * 4}
    with pytest.raises(ValueError, match="small=upscale is for squares"):
        DataConfig(url="x", small="upscale", bucket_aspect=2.0)


@pytest.mark.parametrize(("old", "new"), [("leave_out", "drop"), ("enlarge", "upscale")])
def test_the_older_names_of_small_work_with_a_notice(
    old: Literal["leave_out", "enlarge"], new: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert DataConfig(url="x", small=old).small == new and f"now called {new}" in caplog.text


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
