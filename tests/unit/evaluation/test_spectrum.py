"""DCT spectra: what a frequency's energy is, where it is listed, and the command on the recorded tiny models."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from checkpoints_tools.base import TensorSpec
from checkpoints_tools.cli import main as deco_ckpt
from checkpoints_tools.formats.canonical import write_canonical
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.cli.spectrum import DATA_TIMES
from deco_scale.config import build_config
from deco_scale.evaluation.spectrum import (
    SpectrumProbe,
    block_energies,
    normalised,
    probe_images,
    probe_samples,
    zigzag,
)
from deco_scale.models import Denoiser, ModelConfig, patchify
from deco_scale.objectives.frequency import frequency_weights
from deco_scale.sampling import SamplerConfig, time_grid
from deco_scale.sampling.images import velocity_of
from tests.support import FIXTURES, assets
from tests.support.commands import deco

# ITU-T T.81, figure A.6: the place of each coefficient in the zig-zag sequence.
JPEG_ORDER = """
0 1 5 6 14 15 27 28
2 4 7 13 16 26 29 42
3 8 12 17 25 30 41 43
9 11 18 24 31 40 44 53
10 19 23 32 39 45 52 54
20 22 33 38 46 51 55 60
21 34 37 47 50 56 59 61
35 36 48 49 57 58 62 63
"""


def test_the_order_is_that_of_jpeg() -> None:
    table = np.array([int(word) for word in JPEG_ORDER.split()]).reshape(8, 8)
    assert [int(table[u, v]) for u, v in zigzag()] == list(range(64))


def test_energies_average_to_the_mean_square() -> None:
    image = torch.randn(3, 5, 24, 16, generator=torch.Generator().manual_seed(0))
    assert block_energies(image).mean().item() == pytest.approx(image.double().square().mean().item(), rel=1e-6)
    # What no whole block covers does not count.
    wide = torch.cat([image, torch.full((3, 5, 24, 7), 100.0)], dim=-1)
    torch.testing.assert_close(block_energies(wide), block_energies(image))
    with pytest.raises(ValueError, match="no full 8 x 8 block in 7 x 16"):
        block_energies(image[..., :7, :])


@pytest.mark.parametrize("index", [0, 1, 2, 10, 37, 63])
def test_a_cosine_has_one_frequency(index: int) -> None:
    u, v = zigzag()[index]
    n = torch.arange(16, dtype=torch.float64)

    def wave(frequency: int) -> Tensor:
        return torch.cos(math.pi * (2 * (n % 8) + 1) * frequency / 16)

    energies = block_energies((wave(u)[:, None] * wave(v)[None, :])[None, None])
    assert energies.argmax().item() == index
    assert (energies.sum() - energies[index]).abs().item() < 1e-9 * energies[index].item()


def test_white_noise_is_flat() -> None:
    energies = block_energies(torch.randn(16, 3, 128, 128, generator=torch.Generator().manual_seed(1)))
    # Each is a mean of 12,288 squares of a standard normal, whose spread is sqrt(2 / 12,288) = 0.013.
    assert energies.min().item() > 0.93 and energies.max().item() < 1.07


def test_normalised_curves_keep_the_order_and_end_at_one() -> None:
    energy = torch.rand(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 9
    shown = normalised(energy)
    assert torch.equal(shown.argsort(dim=-1), energy.argsort(dim=-1))
    assert torch.equal(shown.amax(dim=-1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(normalised(torch.zeros(64, dtype=torch.float64)), torch.zeros(64, dtype=torch.float64))


def tiny_denoiser() -> Denoiser:
    torch.manual_seed(0)
    model = ModelConfig(kind="c2i_baseline", dim=16, num_heads=2, num_blocks=2, patch_size=2, num_classes=3)
    denoiser = Denoiser(model).eval().requires_grad_(False)
    assert denoiser.final is not None
    torch.nn.init.normal_(denoiser.final.head.weight, std=0.1)
    return denoiser


def test_the_probe_sees_the_last_blocks_tokens_and_the_velocity() -> None:
    """Against the model's own output of hidden tokens, put together by hand; and the hook goes away."""
    denoiser = tiny_denoiser()

    def predict(patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        return denoiser(patches, t, condition, grid=grid).prediction_BNK

    velocity = velocity_of(predict, 2)
    times = torch.tensor([0.25, 0.75])
    image, noise = torch.randn(2, 4, 3, 16, 32, generator=torch.Generator().manual_seed(0)).unbind()
    labels = torch.tensor([0, 1, 2, 3])
    probe = SpectrumProbe(denoiser, velocity, times=times)
    for part in (slice(0, 3), slice(3, 4)):
        probe_images(probe, image[part], noise[part], labels[part], times=times)
    seen = probe.spectrum()
    assert seen.num_images == 4 and not denoiser.blocks[-1]._forward_hooks
    for i, t in enumerate(times):
        x = t * image + (1 - t) * noise
        out = denoiser(patchify(x, 2), t.expand(4), labels, grid=(8, 16), hidden_after=2)
        assert out.hidden_BND is not None
        tokens = out.hidden_BND.transpose(1, 2).reshape(4, 16, 8, 16)
        torch.testing.assert_close(seen.energies["dit_output"][i], block_energies(tokens))
        torch.testing.assert_close(
            seen.energies["velocity"][i], block_energies(velocity(x, t.expand(4), labels)), rtol=1e-5, atol=1e-9
        )


def test_sampling_measures_every_step_and_guidance_is_refused() -> None:
    denoiser = tiny_denoiser()

    def predict(patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        return denoiser(patches, t, condition, grid=grid).prediction_BNK

    sampler = SamplerConfig(solver="euler", num_steps=3, guidance=1.0, timestep_shift=2.0)
    times = time_grid(3, 2.0)[:-1]
    noise, null = torch.randn(2, 3, 16, 16), torch.tensor(3)
    probe = SpectrumProbe(denoiser, velocity_of(predict, 2), times=times)
    with pytest.raises(ValueError, match="0 images"):
        probe.spectrum()
    probe_samples(probe, noise, torch.tensor([0, 1]), null, sampler=sampler)
    with pytest.raises(ValueError, match="without guidance"):
        probe_samples(probe, noise, torch.tensor([0, 1]), null, sampler=SamplerConfig())
    seen = probe.spectrum()
    assert seen.times == pytest.approx(times.tolist()) and seen.num_images == 2
    # At t = 0 every model sees the same white noise; later states differ from it, and so do their spectra.
    assert not torch.allclose(seen.energies["velocity"][0], seen.energies["velocity"][2], rtol=1e-3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three recorded models as checkpoints; the text model's encoder is as wide as it needs."""
    folder = tmp_path_factory.mktemp("spectra")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "TEXT_DIM", 40)
        (folder / "encoder").mkdir()
        encoder = assets.make_text_encoder(folder / "encoder")
    made = {}
    for name in ("t2i_tiny", "c2i_tiny", "c2i_baseline_tiny"):
        made[name] = folder / name
        text = ["--text-encoder", str(encoder)] if name == "t2i_tiny" else []
        source = FIXTURES / f"{name}.safetensors"
        assert deco_ckpt(["import", str(source), str(made[name]), "--resolution", "128", *text]) == 0
    return made


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "spectrum.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_two_class_models_that_sample(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["spectrum", "--out", str(tmp_path), "--pictures", "3", "--batch", "2", "--num-steps", "2"]
    for name, label in (("c2i_tiny", "DeCo"), ("c2i_baseline_tiny", "baseline")):
        arguments += ["--checkpoint", str(checkpoints[name]), "--label", label]
    assert deco(arguments) == 0
    assert "--pictures is now called --images" in capsys.readouterr().err
    rows = rows_of(tmp_path)
    # Two labels, two signals, two times and their mean.
    assert len(rows) == 2 * 2 * 3 * 64
    assert {(r["label"], r["signal"]) for r in rows} == {
        (a, b) for a in ("DeCo", "baseline") for b in ("dit_output", "velocity")
    }
    assert [(int(r["row"]), int(r["column"])) for r in rows[:64]] == zigzag()
    assert {r["time"] for r in rows} == {"", "0", "0.5"}
    assert all(0 <= float(r["normalised"]) <= 1 and float(r["energy"]) >= 0 for r in rows)
    assert max(float(r["normalised"]) for r in rows[:64]) == 1
    with Image.open(tmp_path / "spectrum.png") as figure:
        assert min(figure.size) > 500 and len(figure.convert("RGB").getcolors(2**24)) > 50


@pytest.mark.slow
def test_a_text_model_on_images(
    checkpoints: dict[str, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a folder; the curves do not depend on the batch, up to rounding."""
    folder = tmp_path / "pictures"
    assets.make_images_folder(folder, 3, side=128)
    common = [
        "spectrum",
        "--checkpoint",
        str(checkpoints["t2i_tiny"]),
        "--folder",
        str(folder),
        "--times",
        "0.2",
        "0.7",
    ]
    energies = []
    for batch in ("1", "3"):
        out = tmp_path / batch
        assert deco([*common, "--images", "3", "--batch", batch, "--out", str(out)]) == 0
        energies.append([float(row["energy"]) for row in rows_of(out)])
    assert len(energies[0]) == 2 * 3 * 64
    np.testing.assert_allclose(energies[0], energies[1], rtol=1e-4, atol=1e-9)
    capsys.readouterr()
    assert deco([*common, "--images", "9", "--out", str(tmp_path / "no")]) == 2
    assert "gives 3 of --images 9" in capsys.readouterr().err


@pytest.mark.slow
def test_indexed_shards_are_read_by_the_loader(shards: Path, text_encoder: Path, tmp_path: Path) -> None:
    """A text model of patch 4, whose blocks of tokens fit small images; every model sees the same."""
    run = assets.tiny_config(tmp_path / "run", shards, text_encoder)
    run["model"]["patch_size"] = 4
    cfg = build_config(run, source="test")
    arguments = ["spectrum", "--data", str(shards), "--out", str(tmp_path), "--images", "5", "--batch", "2"]
    for name in ("a", "b"):
        weights = {n: torch.full(p.shape, 0.02) for n, p in Denoiser(cfg.model).state_dict().items()}
        tensors = {f"{s}.denoiser.{n}": w for s in ("model", "ema") for n, w in weights.items()}
        meta = CheckpointMeta(
            step=1, stage="large", samples=8, seed=0, optimizer_steps=1, data_state={}, parameter_digest="",
            config=json.loads(json.dumps(dataclasses.asdict(cfg))),
        )  # fmt: skip
        specs = {n: TensorSpec(tuple(w.shape)) for n, w in tensors.items()}
        write_canonical(tmp_path / name, specs, tensors.__getitem__, meta)
        arguments += ["--checkpoint", str(tmp_path / name)]
    assert deco(arguments) == 0
    rows = rows_of(tmp_path)
    assert len(rows) == 2 * 2 * (1 + len(DATA_TIMES)) * 64
    half = len(rows) // 2
    assert {r["label"] for r in rows[:half]} == {"a"}
    assert [r["energy"] for r in rows[:half]] == [r["energy"] for r in rows[half:]]


def test_wrong_use_says_what_to_do(
    checkpoints: dict[str, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--checkpoint", str(checkpoints["c2i_tiny"])]
    (tmp_path / "empty.txt").write_text(" \n\n")
    no_prompt = ["--checkpoint", str(checkpoints["t2i_tiny"]), "--prompts", str(tmp_path / "empty.txt")]
    for arguments, message in (
        ([*one, "--size", "64"], "needs at least 128 pixels"),
        ([*one, *one], "labels must differ"),
        ([*one, "--label", "a", "--label", "b"], "2 --label for 1 --checkpoint"),
        ([*one, "--times", "0.5"], "goes with --data or --folder"),
        ([*one, "--folder", str(tmp_path), "--times", "1.5"], r"lie in [0, 1)"),
        ([*one, "--num-steps", "0"], "num_steps=0"),
        (["--checkpoint", str(checkpoints["t2i_tiny"])], "give --prompts FILE"),
        (no_prompt, "empty.txt: no prompt in it"),
        (["--checkpoint", str(tmp_path)], "neither a complete checkpoint"),
    ):
        assert deco(["spectrum", "--out", str(tmp_path / "out"), *arguments]) == 2, arguments
        assert message in capsys.readouterr().err
    # Shards of captions have no class numbers.
    assert deco(["spectrum", "--out", str(tmp_path / "out"), *one, "--data", str(shards)]) == 1
    assert str(shards) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_of_the_loss_fall_along_the_order() -> None:
    """JPEG's tables and this order agree on what is low: the loss's weights fall from start to end."""
    weights = frequency_weights(85, gamma=1.0, mode="inv_gamma")[0]
    along = torch.stack([weights[u, v] for u, v in zigzag()])
    assert along[:16].mean() > along[16:32].mean() > along[32:].mean()
