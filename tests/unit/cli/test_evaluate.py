"""``deco evaluate``: from a checkpoint to the files that scorers read, broken off, resumed, on two processes."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints_tools.cli import main as deco_ckpt
from deco_scale.cli import evaluate
from deco_scale.cli import sample as sample_command
from deco_scale.evaluation.inception import WEIGHTS_NAME, Inception
from tests.support import FIXTURES, assets
from tests.support.commands import deco
from tests.support.evaluations import (
    BENCHMARKS,
    METADATA,
    OFFICIAL_DPG,
    STEPS,
    arguments,
    draw_on_each,
    images,
    official_geneval,
    small_inception,
)
from tests.support.process_groups import in_group


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints ``classes`` and ``text``, and prompt files of both benchmarks."""
    folder = tmp_path_factory.mktemp("material")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "TEXT_DIM", 40)
        (folder / "encoder").mkdir()
        assets.make_text_encoder(folder / "encoder")
    for name, file, more in (
        ("classes", "c2i_tiny", []),
        ("text", "t2i_tiny", ["--text-encoder", str(folder / "encoder")]),
    ):
        source = FIXTURES / f"{file}.safetensors"
        assert deco_ckpt(["import", str(source), str(folder / name), "--resolution", "16", *more]) == 0
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, METADATA)))
    (folder / "prompts").mkdir()
    for i, text in enumerate(("a red square", "a blue circle on white ground")):
        (folder / "prompts" / f"p{i}.txt").write_text(text)
    with tarfile.open(folder / "prompts.tar.gz", "w:gz") as tar:
        tar.add(folder / "prompts", "prompts")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three benchmarks, drawn at once by one process."""
    out = tmp_path_factory.mktemp("whole")
    for benchmark in BENCHMARKS:
        assert deco(arguments(benchmark, material, out)) == 0
    return out


@pytest.mark.slow
def test_imagenet_file_has_what_sample_draws(whole: Path, material: Path, tmp_path: Path) -> None:
    found = files_of(whole / "imagenet")
    assert found.keys() == {"samples_23x16x16x3.npz", "settings.json"}
    with np.load(whole / "imagenet" / "samples_23x16x16x3.npz", allow_pickle=False) as npz:
        drawn = npz["arr_0"]
    assert drawn.shape == (23, 16, 16, 3) and drawn.dtype == np.uint8
    # Image 13 is the second of class 3, its noise is seeded with 13.
    sample = ["sample", "--checkpoint", str(material / "classes"), "--classes", "3", "--first-seed", "13"]
    assert deco([*sample, "--out", str(tmp_path), *STEPS]) == 0
    alone = np.asarray(Image.open(tmp_path / "00003_0000.png"))
    assert np.abs(alone.astype(int) - drawn[13]).max() <= 1
    assert len({image.tobytes() for image in drawn}) == 23


def test_prompt_benchmarks_are_what_their_scorers_read(whole: Path, material: Path, tmp_path: Path) -> None:
    names = [f"{i:05d}.png" for i in range(4)]
    assert official_geneval(whole / "geneval") == {entry["prompt"]: names for entry in METADATA}
    grids = files_of(whole / "dpg" / "pictures")
    assert grids.keys() == {"p0.png", "p1.png"}
    sample = ["sample", "--checkpoint", str(material / "text"), "--prompt", "a red square", "--per-prompt", "4"]
    assert deco([*sample, "--out", str(tmp_path), *STEPS]) == 0
    grid = np.asarray(Image.open(whole / "dpg" / "pictures" / "p0.png")).astype(int)
    for i in range(4):
        corner = grid[16 * (i // 2) :][:16, 16 * (i % 2) :][:, :16]
        assert np.abs(corner - np.asarray(Image.open(tmp_path / f"00000_{i:04d}.png"))).max() <= 1


class Breaking:
    """A generator that is interrupted at its sixth image."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def images(self, jobs: Any, **options: Any) -> Iterator[Any]:
        for number, drawn in enumerate(self._generator.images(jobs, **options)):
            if number == 5:
                raise KeyboardInterrupt
            yield drawn


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_broken_off_command_goes_on(
    benchmark: str, whole: Path, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, drawn = sample_command.build_generator, []

    monkeypatch.setattr(sample_command, "build_generator", lambda *args, **more: Breaking(load(*args, **more)))
    assert deco(arguments(benchmark, material, tmp_path)) == 130
    before = files_of(tmp_path)
    assert len(before) > 1

    def counting(*args: Any, **options: Any) -> Any:
        generator = load(*args, **options)
        images = generator.images
        generator.images = lambda jobs, **more: drawn.extend(jobs) or images(jobs, **more)
        return generator

    monkeypatch.setattr(sample_command, "build_generator", counting)
    assert deco(arguments(benchmark, material, tmp_path)) == 0
    whole_set = {"imagenet": 23, "geneval": 8, "dpg": 8}[benchmark]
    assert 0 < len(drawn) < whole_set
    resumed, expected = files_of(tmp_path / benchmark), files_of(whole / benchmark)
    assert resumed.keys() == expected.keys() and resumed["settings.json"] == expected["settings.json"]
    for name in resumed:
        if name.endswith(".png"):
            assert_same_image(tmp_path / benchmark / name, whole / benchmark / name)
    # Nothing is left to do, and no model is loaded for it.
    monkeypatch.setattr(sample_command, "build_generator", None)
    assert deco(arguments(benchmark, material, tmp_path)) == 0


def assert_same_image(a: Path, b: Path) -> None:
    first, second = (np.asarray(Image.open(path)).astype(int) for path in (a, b))
    assert np.abs(first - second).max() <= 1


@pytest.mark.slow
def test_two_processes_draw_the_same(whole: Path, material: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    in_group(draw_on_each, 2, tmp_path, str(material), str(tmp_path / "out"))
    found, wanted = files_of(tmp_path / "out"), files_of(whole)
    assert found.keys() == wanted.keys()
    for name in found:
        if name.endswith(".png"):
            assert_same_image(tmp_path / "out" / name, whole / name)
    name = "imagenet/samples_23x16x16x3.npz"
    with np.load(tmp_path / "out" / name) as a, np.load(whole / name) as b:
        assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1


@pytest.mark.parametrize(
    ("benchmark", "more", "message"),
    [
        ("imagenet", ["--count", "24"], "has other settings: count=23, now 24"),
        ("imagenet", ["--guidance", "1.5"], "has other settings: guidance="),
        ("imagenet", ["--count", "0"], "--count: 0 is not at least 1"),
        ("imagenet", ["--first-seed", "-1"], "first_seed=-1"),
        ("imagenet", ["--size", "24"], "--size: size 24x24"),
        ("imagenet", ["--size", "cat"], "--size cat"),
        ("imagenet", ["--batch", "0"], "--batch: 0 is not at least 1"),
        ("imagenet", ["--checkpoint", "TEXT"], "needs classes"),
        ("geneval", ["--checkpoint", "CLASSES"], "needs prompts"),
        ("geneval", ["--per-prompt", "0"], "--per-prompt 0"),
        ("dpg", ["--size", "16x32"], "squares"),
        ("dpg", ["--prompts", "PROMPTS", "--solver", "heun"], "has other settings"),
        ("dpg", ["--checkpoint", "NOWHERE"], "neither a complete checkpoint"),
    ],
)
def test_usage_errors_are_reported(
    benchmark: str, more: list[str], message: str, whole: Path, material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"TEXT": "text", "CLASSES": "classes", "PROMPTS": "prompts", "NOWHERE": "nowhere"}
    more = [str(material / places[word]) if word in places else word for word in more]
    before = files_of(whole)
    assert deco(arguments(benchmark, material, whole, *more)) == 2
    assert message in capsys.readouterr().err
    assert files_of(whole) == before


def test_what_a_benchmark_needs_is_reported(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert deco(["evaluate", "geneval", "--out", "x"]) == 2
    assert "--checkpoint, --metadata (or --summary)" in capsys.readouterr().err
    assert deco(["evaluate", "dpg", "--checkpoint", "x", "--out", "x", "--prompts", str(material / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_scores_are_shown_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inception = small_inception(monkeypatch)
    monkeypatch.setattr(evaluate, "load_inception", lambda path, device: inception)
    np.savez(tmp_path / "x.npz", images(20, 1))
    np.savez(tmp_path / "y.npz", mu=np.zeros(12), sigma=np.eye(12))
    files = ["--samples", str(tmp_path / "x.npz"), "--reference", str(tmp_path / "y.npz")]
    weights = ["--inception-weights", str(tmp_path / "w.pth")]
    assert deco(["evaluate", "fid", *files, *weights, "--out", str(tmp_path / "scores.json")]) == 0
    shown = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"{scores['fid']:.4f}" in shown and scores["pictures"] == 20
    assert scores["precision"] is None and "not with this reference" in shown
    assert "do not compare" in shown and not scores["published_inception"]


def test_the_weight_file_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", images(5))
    files = ["--samples", str(tmp_path / "x.npz"), "--reference", str(tmp_path / "x.npz")]
    assert deco(["evaluate", "fid", *files, "--inception-weights", str(tmp_path / "w.pth")]) == 2
    error = capsys.readouterr().err
    assert WEIGHTS_NAME in error and "https://github.com/mseitzer/pytorch-fid" in error
    # Files are looked at before the network is loaded.
    assert deco(["evaluate", "fid", *files[:3], str(tmp_path / "no.npz"), "--inception-weights", "w.pth"]) == 1
    assert "no.npz" in capsys.readouterr().err


def test_summaries_are_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        json.dumps({"tag": m["tag"], "prompt": m["prompt"], "correct": bool(i % 2), "metadata": json.dumps(m)})
        for m in METADATA
        for i in range(4)
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    assert deco(["evaluate", "geneval", "--summary", str(tmp_path / "r.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "single_object" in shown and "50.00%" in shown and "0.50000" in shown
    (tmp_path / "r.txt").write_text(OFFICIAL_DPG)
    assert deco(["evaluate", "dpg", "--summary", str(tmp_path / "r.txt")]) == 0
    shown = capsys.readouterr().out
    assert "75.00" in shown and "81.25" in shown and "entity - whole" in shown
    for benchmark in ("geneval", "dpg"):
        assert deco(["evaluate", benchmark, "--summary", str(tmp_path / "none")]) == 2


@pytest.mark.long
def test_fid_with_the_network_of_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command with a real network: a set against itself is at distance 0, and inside itself."""
    torch.manual_seed(0)
    torch.save(Inception().state_dict(), tmp_path / "w.pth")
    np.savez(tmp_path / "x.npz", images(24, side=24))
    files = ["--samples", str(tmp_path / "x.npz"), "--reference", str(tmp_path / "x.npz")]
    weights = ["--inception-weights", str(tmp_path / "w.pth"), "--batch", "8"]
    assert deco(["evaluate", "fid", *files, *weights, "--out", str(tmp_path / "s.json")]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert abs(scores["fid"]) < 1e-3 and abs(scores["sfid"]) < 1e-3
    assert scores["precision"] == scores["recall"] == 1.0
