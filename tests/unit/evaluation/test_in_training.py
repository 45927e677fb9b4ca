"""Evaluation during training: shares add up to one process, models are loaded safely, CLIP is transformers'."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deco_scale.errors import ConfigError, RunError
from deco_scale.evaluation import in_training
from deco_scale.evaluation.clip_score import ClipScorer
from deco_scale.evaluation.config import EvaluationConfig
from deco_scale.sampling.generate import SampleRequest
from tests.support.evaluations import (
    SmallInception,
    expected_scores,
    gaussian_of,
    generator,
    images,
    in_threads,
    make_clip,
    small_inception,
)

# During training.


def test_impossible_settings_are_refused() -> None:
    EvaluationConfig(every=5, prompts_file="p", clip_folder="c", inception_weights="w", reference="r")
    for wrong in (
        {"every": -1},
        {"count": 0},
        {"batch": 0},
        {"grid": 0},
        {"classes": (-1,)},
        {"classes": (1,), "prompts_file": "p"},
        {"inception_weights": "w"},
        {"reference": "r"},
        {"inception_weights": "w", "reference": "r", "count": 1},
        {"clip_folder": "c"},
    ):
        with pytest.raises(ValueError):
            EvaluationConfig(**wrong)  # type: ignore[arg-type]


def test_requests_take_turns(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n a dog \n")
    cfg = EvaluationConfig(count=5, prompts_file=str(tmp_path / "p.txt"))
    requests = in_training.evaluation_requests(cfg, num_classes=0)
    assert [(j.condition, j.seed) for j in requests] == [
        ("a cat", 0),
        ("a dog", 0),
        ("a cat", 1),
        ("a dog", 1),
        ("a cat", 2),
    ]
    cfg = EvaluationConfig(count=5, classes=(7, 2))
    assert [j.condition for j in in_training.evaluation_requests(cfg, num_classes=8)] == [7, 2, 7, 2, 7]
    assert [j.condition for j in in_training.evaluation_requests(EvaluationConfig(count=4), num_classes=3)] == [
        0,
        1,
        2,
        0,
    ]
    for wrong, classes, message in (
        (EvaluationConfig(classes=(8,)), 8, "classes 0 to 7"),
        (EvaluationConfig(prompts_file="p"), 8, "text models"),
        (EvaluationConfig(), 0, "prompts_file is missing"),
        (EvaluationConfig(prompts_file=str(tmp_path / "none")), 0, "none"),
    ):
        with pytest.raises(ConfigError, match=message):
            in_training.evaluation_requests(wrong, num_classes=classes)


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch) -> SmallInception:
    return small_inception(monkeypatch)


@pytest.mark.parametrize("world", [1, 2, 3, 11])
def test_shares_add_up_to_one_process(
    world: int, inception: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = images(40, 3)
    found = inception(torch.from_numpy(reference))
    pool, spatial = gaussian_of(found.pool_BF), gaussian_of(found.spatial_BF)
    np.savez(
        tmp_path / "r.npz",
        mu=pool.mean_F.numpy(),
        sigma=pool.covariance_FF.numpy(),
        mu_s=spatial.mean_F.numpy(),
        sigma_s=spatial.covariance_FF.numpy(),
    )
    monkeypatch.setattr(in_training, "load_inception", lambda path, device: inception)
    cfg = EvaluationConfig(
        count=10, batch=3, grid=5, npz=True, inception_weights="w", reference=str(tmp_path / "r.npz")
    )
    requests = in_training.evaluation_requests(cfg, num_classes=4)
    scorer = in_training.Scorer(cfg, torch.device("cpu"))
    drawn: list[int] = []

    def share(rank: int, gather: Callable[[Any], list[Any]]) -> in_training.EvaluationResult:
        def generate(requests: Sequence[SampleRequest]) -> Iterator[tuple[SampleRequest, Any]]:
            drawn.append(len(requests))
            return generator()(requests)

        return in_training.evaluate_share(
            cfg,
            in_training.generate_share(generate, requests, rank=rank, world=world),
            scorer,
            rank=rank,
            folder=tmp_path / "out",
            step=40,
            all_reduce=lambda sums: torch.stack(gather(sums)).sum(dim=0),
            gather=gather,
        )

    first, *others = in_threads(world, share)
    # Sharded weights need every rank in every forward pass.
    assert len(set(drawn)) == 1
    x = np.stack([pixels for _, pixels in generator()(requests)])
    expected = expected_scores(inception, x, reference)
    for result in (first, *others):
        assert result.scalars.keys() == {"fid", "sfid", "inception_score"}
        for name, value in result.scalars.items():
            assert value == pytest.approx(expected[name], rel=1e-4), name
    assert all(result.grid is None and result.npz is None for result in others)
    with np.load(first.npz) as npz:
        assert np.array_equal(npz["arr_0"], x)
    grid = Image.open(first.grid)
    assert first.grid == tmp_path / "out" / "step_00000040.png" and grid.width > 5 * 8
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["step_00000040.npz", "step_00000040.png"]


def test_images_missing_on_this_disk_are_named(tmp_path: Path) -> None:
    share = in_training.generate_share(generator(), [SampleRequest(0, 0, i) for i in range(4)], rank=0, world=2)
    in_training.save_share(share, tmp_path, 3)
    with pytest.raises(RunError, match="a disk that all ranks share"):
        in_training.join_images(4, tmp_path, 3)


@pytest.mark.parametrize("refused", [0, 2])
def test_all_shares_raise_the_write_error_of_one(refused: int, tmp_path: Path) -> None:
    """Each rank has a disk of its own here; that of one is a file, where no folder can be."""
    (tmp_path / f"disk_{refused}").write_text("not a folder")
    cfg = EvaluationConfig(count=7, batch=2, grid=1, npz=True)
    requests = in_training.evaluation_requests(cfg, num_classes=4)
    scorer = in_training.Scorer(cfg, torch.device("cpu"))

    def share(rank: int, gather: Callable[[Any], list[Any]]) -> str:
        folder = tmp_path / f"disk_{rank}"
        drawn = in_training.generate_share(generator(), requests, rank=rank, world=3)
        with pytest.raises(RunError) as raised:
            in_training.evaluate_share(
                cfg, drawn, scorer, rank=rank, folder=folder, step=3, all_reduce=lambda sums: sums, gather=gather
            )
        return str(raised.value)

    found = in_threads(3, share)
    assert len(set(found)) == 1 and str(tmp_path / f"disk_{refused}") in found[0]


def test_a_sheet_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    cfg = EvaluationConfig(count=1)
    drawn = in_training.generate_share(generator(), [SampleRequest(0)], rank=0, world=1)
    with pytest.raises(RunError, match="step_00000003.png: Not a directory"):
        in_training.evaluate_share(
            cfg,
            drawn,
            in_training.Scorer(cfg, torch.device("cpu")),
            rank=0,
            folder=tmp_path / "file" / "below",
            step=3,
            all_reduce=lambda sums: sums,
            gather=lambda value: [value],
        )


@pytest.mark.slow
def test_missing_scoring_models_are_named(tmp_path: Path) -> None:
    device = torch.device("cpu")
    (tmp_path / "clip").mkdir()
    for cfg, message in (
        (EvaluationConfig(inception_weights=str(tmp_path / "w.pth"), reference="r"), "w.pth"),
        (EvaluationConfig(prompts_file="p", clip_folder=str(tmp_path / "none")), "none"),
        (EvaluationConfig(prompts_file="p", clip_folder=str(tmp_path / "clip")), "config.json"),
    ):
        with pytest.raises(ConfigError, match=message):
            in_training.Scorer(cfg, device)


def test_a_reference_without_statistics_is_named(
    inception: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_training, "load_inception", lambda path, device: inception)
    for name, arrays, message in (("a", {"arr_0": images(3)}, "no mu"), ("b", {"mu": 1, "sigma": 2}, "mu is")):
        np.savez(tmp_path / name, **arrays)
        cfg = EvaluationConfig(inception_weights="w", reference=str(tmp_path / f"{name}.npz"))
        with pytest.raises(ConfigError, match=message):
            in_training.Scorer(cfg, torch.device("cpu"))


# CLIP.


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


PROMPTS = ["a red square", "a blue circle", "a"]


@pytest.mark.parametrize("size", [(28, 28), (60, 41), (20, 33)])
def test_clip_score_is_that_of_transformers_own_processing(clip_folder: Path, size: tuple[int, int]) -> None:
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    x = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    found = ClipScorer(clip_folder).scores(x, PROMPTS)
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(clip_folder)
    process = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for image, prompt, score in zip(x, PROMPTS, found, strict=True):
        pixels = process(images=[Image.fromarray(image)], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            out = model(pixel_values=pixels, **tokenizer([prompt], return_tensors="pt"))
        expected = 100 * torch.cosine_similarity(out.image_embeds, out.text_embeds).item()
        assert score.item() == pytest.approx(expected, abs=1e-3)


def test_clip_score_over_shares(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n" + "red " * 50)
    cfg = EvaluationConfig(count=7, batch=2, prompts_file=str(tmp_path / "p.txt"), clip_folder=str(clip_folder))
    requests = in_training.evaluation_requests(cfg, num_classes=0)
    scorer = in_training.Scorer(cfg, torch.device("cpu"))

    def share(rank: int, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        mine = in_training.generate_share(generator((30, 28)), requests, rank=rank, world=2)
        return scorer.scalars(mine, lambda sums: torch.stack(gather(sums)).sum(dim=0))

    drawn = list(generator((30, 28))(requests))
    alone = ClipScorer(clip_folder)
    expected = np.mean([alone.scores([x], [str(request.condition)]).item() for request, x in drawn])
    for scalars in in_threads(2, share):
        assert scalars == {"clip_score": pytest.approx(expected, abs=1e-3)}


def test_clip_normalises_as_its_folder_says(clip_folder: Path, tmp_path: Path) -> None:
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    x = images(3, side=28)
    before = ClipScorer(tmp_path).scores(x, PROMPTS)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    assert (ClipScorer(tmp_path).scores(x, PROMPTS) - before).abs().min() > 1e-3
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="CLIP folder"):
        ClipScorer(tmp_path)


@pytest.mark.parametrize("damage", ["kind", "weights", "fewer weights", "pickle only", "no tokenizer"])
def test_bad_clip_folders_are_named(damage: str, clip_folder: Path, tmp_path: Path) -> None:
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if damage == "kind":
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    elif damage == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    elif damage == "fewer weights":
        weights = load_file(tmp_path / "model.safetensors")
        del weights["text_projection.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    elif damage == "pickle only":
        (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    else:
        for file in tmp_path.glob("token*"):
            file.unlink()
    with pytest.raises(ConfigError, match=re.escape(f"CLIP folder {tmp_path}")):
        ClipScorer(tmp_path)
