"""``deco-ckpt average``: plain and weighted averages, and EMAs of another width after the fact."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints_tools.average import fit_width, power_of
from checkpoints_tools.base import EMA, MODEL
from deco_scale.checkpoint.format import read_tensors
from deco_scale.errors import ConfigError
from tests.support.checkpoints import META, SMALL, run, save, tensors_of, trained_tensors


def test_averages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = trained_tensors()
    others = {n: t + 1 for n, t in tensors.items()}
    paths = [save(tmp_path / "a", tensors), save(tmp_path / "b", others)]
    assert run("average", tmp_path / "plain", *paths, "--dry-run") == 0
    assert not (tmp_path / "plain").exists()
    assert run("average", tmp_path / "plain", *paths) == 0
    assert run("average", tmp_path / "weighted", *paths, "--weights", "3,1") == 0
    for out, share in (("plain", 0.5), ("weighted", 0.25)):
        found = read_tensors(tmp_path / out, "")
        assert set(found) == {n for n in tensors if n.startswith((MODEL, EMA))}
        for name, tensor in found.items():
            wanted = ((1 - share) * tensors[name].double() + share * others[name].double()).float()
            assert torch.equal(tensor, wanted), name
        assert run("verify", tmp_path / out) == 0
    assert run("average", tmp_path / "no", *paths, "--weights", "1") == 2
    assert run("average", tmp_path / "no", *paths, "--weights", "1,-1") == 2
    assert run("average", tmp_path / "plain", *paths) == 2
    different = save(tmp_path / "c", tensors_of(dataclasses.replace(SMALL, num_classes=4), encoder_dim=0))
    capsys.readouterr()
    assert run("average", tmp_path / "no", paths[0], different) == 2
    assert "label_embed.table.weight" in capsys.readouterr().err


DECAY = 0.98


def _profile(step: int, at: int) -> float:
    return (1 - DECAY) * DECAY ** (at - step) if step <= at else 0.0


@pytest.mark.parametrize("sigma", [0.08, 0.12, 0.2])
def test_the_ema_has_the_requested_width(sigma: float) -> None:
    """The discrete profile that the coefficients make, against the moments of the power function."""
    steps = list(range(50, 1001, 50))
    fit = fit_width(sigma, steps, DECAY)
    assert sum(fit.coefficients) == pytest.approx(1)
    t = np.arange(1, 1001)
    stored = np.array([[_profile(int(s), at) for s in t] for at in steps])
    profile = np.array(fit.coefficients) @ stored
    mean = float((profile * t).sum())
    power = power_of(sigma)
    width = float((profile * (t - mean) ** 2).sum()) ** 0.5 / 1000
    assert fit.error < 0.02
    assert mean / 1000 == pytest.approx((power + 1) / (power + 2), abs=0.002)
    assert width == pytest.approx(sigma, abs=0.002)
    assert fit.mean == pytest.approx(mean / 1000, abs=0.002) and fit.width == pytest.approx(width, abs=0.002)
    # Kept ten times as often, the profile comes nearer still.
    assert fit_width(sigma, list(range(5, 1001, 5)), DECAY).error < 0.05 * fit.error


def test_width_that_the_checkpoints_do_not_allow() -> None:
    """Narrower than the stored EMA, or too few checkpoints: the error says so."""
    assert fit_width(0.005, list(range(50, 1001, 50)), DECAY).error > 0.5
    assert fit_width(0.2, [500, 1000], DECAY).error > 0.3
    for sigma, steps, decay in ((0.0, [1], 0.9), (0.3, [1], 0.9), (0.1, [5, 5], 0.9), (0.1, [1, 2], 0.0)):
        with pytest.raises(ConfigError):
            fit_width(sigma, steps, decay)


def test_width_of_a_real_course(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights on a known course, their EMA kept every 50 steps: the average after the fact is the direct one."""
    names = [n for n in tensors_of(SMALL, encoder_dim=0) if n.startswith(EMA)]
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(tensors_of(SMALL)[n].shape, generator=generator).double() for n in names}
    averaged = {n: t.clone() for n, t in state.items()}
    power = power_of(0.12)
    target = {n: torch.zeros_like(t) for n, t in state.items()}
    meta = dataclasses.replace(META, config={"optimizer": {"ema_decay": DECAY}})
    paths = []
    for step in range(1, 1001):
        for name in names:
            state[name] += 0.05 * torch.randn(state[name].shape, generator=generator)
            averaged[name].lerp_(state[name], 1 - DECAY)
            share = (step / 1000) ** (power + 1) - ((step - 1) / 1000) ** (power + 1)
            target[name] += share * state[name]
        if step % 50 == 0:
            weights = {n.replace("ema.", "model.", 1): t.float() for n, t in state.items()}
            kept = {n: t.float() for n, t in averaged.items()} | weights
            at = dataclasses.replace(meta, step=step, optimizer_steps=step)
            paths.append(save(tmp_path / f"step_{step:08d}", kept, meta=at))
    assert run("average", tmp_path / "out", *paths, "--ema-width", "0.12") == 0
    found = read_tensors(tmp_path / "out", "")
    assert all(torch.equal(found[n], t) for n, t in weights.items())

    def distance(others: dict[str, Tensor]) -> float:
        return sum(float((others[n].double() - target[n]).square().sum()) for n in names) ** 0.5

    # Far nearer to the wanted average than the EMA that the last checkpoint holds.
    assert distance(found) < 0.1 * distance(averaged)
    assert run("average", tmp_path / "no", *paths[-2:], "--ema-width", "0.12") == 2
    assert "give more of them" in capsys.readouterr().err
    for narrow in ("1e-6", "1e-200"):
        assert run("average", tmp_path / "no", *paths, "--ema-width", narrow) == 2
        assert "only with an error of" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
