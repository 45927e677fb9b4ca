"""The recorded release: every quantity, and proof that the checker can fail."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoints_tools.formats import release
from deco_scale.models import Denoiser
from tests.parity import check_golden
from tests.support import FIXTURES
from tests.support.release import denoiser_from_release, model_config_from_release

GOLDENS = sorted(FIXTURES.glob("*.safetensors"))


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_matches_the_release(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_golden.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = int(lines[-1].split()[0])
    assert lines[-1] == f"{count} checks, 0 failed"
    assert count > 45
    worst = max(float(line.split()[2]) for line in lines[1:-1])
    assert worst < 1e-6, "looser than rounding: some formula differs"


@pytest.mark.parametrize("name", ["out.velocity", "out.sample.euler"])
def test_a_wrong_value_fails(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with safe_open(GOLDENS[0], framework="pt") as file:
        metadata = file.metadata()
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    largest = tensors[name].abs().max()
    tensors[name].view(-1)[0] += 2 * check_golden.TOLERANCE * largest
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    assert check_golden.main([str(tmp_path / "bad.safetensors")]) == 1
    assert ", 1 failed" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_weights_return_to_the_release_unchanged(path: Path) -> None:
    meta, tensors = check_golden.read(path)
    cfg = model_config_from_release(meta["kind"], meta["model"])
    original = check_golden.under(tensors, release.DENOISER)
    ours = denoiser_from_release(original, cfg)
    assert set(ours) == set(Denoiser(cfg).state_dict())
    back = release.denoiser_to_release(ours, cfg)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[n], original[n]) for n in original)


def test_missing_weights_are_named() -> None:
    meta, tensors = check_golden.read(GOLDENS[0])
    cfg = model_config_from_release(meta["kind"], meta["model"])
    state = check_golden.under(tensors, release.DENOISER)
    state["extra"] = state.pop("blocks.0.norm1.weight")
    with pytest.raises(ValueError, match=r"missing \['blocks.0.norm1.weight'\].*\['extra'\]"):
        denoiser_from_release(state, cfg)


def test_not_a_golden_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.safetensors").write_bytes(json.dumps({}).encode())
    assert check_golden.main([str(tmp_path / "x.safetensors")]) == 2
    assert "not a golden file" in capsys.readouterr().err
