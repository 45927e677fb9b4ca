"""What a fresh run starts from."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.checkpoint.manager import CheckpointManager
from deco_scale.errors import ConfigError
from deco_scale.parallel.engines.base import Engine
from tests.support import saving
from tests.support.checkpoints import CLASSES, run, save, tensors_of
from tests.support.crash import PlainEngine, content, meta_of
from tests.support.saving import alone, engine_of, make


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


class TestInitialise:
    """``init_from``: weights of another run, and nothing else of it."""

    @pytest.fixture(autouse=True)
    def _group(self) -> Iterator[None]:
        with alone():
            yield

    def initialise(self, folder: Path, state: dict[str, Tensor], **settings: Any) -> PlainEngine:
        source = CheckpointManager(folder / "source", CheckpointConfig())
        source.prepare()
        path = saving.save(source, engine_of(7), meta_of(7))
        target = PlainEngine(state)
        target.optimizer_steps = 99
        make(folder, init_from=str(path), **settings).initialise(cast(Engine, target))
        return target

    @pytest.mark.parametrize("weights", ["model", "ema"])
    def test_weights_or_their_average(
        self, tmp_path: Path, weights: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        state = {n: t for n, t in content(1).items() if n != "ema.projection.weight"}
        target = self.initialise(tmp_path, state, init_weights=weights)
        there, found = content(7), target.tensors
        for name in ("denoiser.blocks.weight", "denoiser.bias"):
            assert torch.equal(found[f"model.{name}"], there[f"{weights}.{name}"])
            assert torch.equal(found[f"ema.{name}"], there[f"{weights}.{name}"])
            assert not found[f"exp_avg.{name}"].any() and not found[f"exp_avg_sq.{name}"].any()
        # There is no average outside the denoiser.
        assert torch.equal(found["model.projection.weight"], there["model.projection.weight"])
        assert target.optimizer_steps == 0 and f"({weights})" in caplog.messages[0]
        assert "fresh optimizer" in caplog.messages[0]

    def test_patterns_leave_out_what_they_name_and_no_more(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        state = content(1)
        for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
            state[f"{kind}.denoiser.bias"] = torch.ones(5)
            state[f"{kind}.denoiser.new.weight"] = torch.full((3,), 2.0)
        with pytest.raises(
            ConfigError, match=r"missing model\.denoiser\.new\.weight; model\.denoiser\.bias has shape"
        ):
            self.initialise(tmp_path, state)
        skip = ("denoiser.b[i]as", "denoiser.new.*", "proj*")
        target = self.initialise(tmp_path, state, init_skip=skip)
        assert caplog.messages[1] == (
            "not loaded because of checkpoint.init_skip: denoiser.bias, denoiser.new.weight, projection.weight"
        )
        assert (
            target.tensors["model.denoiser.bias"].tolist()
            == target.tensors["ema.denoiser.bias"].tolist()
            == [1] * 5
        )
        assert torch.equal(target.tensors["model.projection.weight"], content(1)["model.projection.weight"])
        with pytest.raises(ConfigError, match=r"init_skip='typo\*' matches no parameter"):
            self.initialise(tmp_path, state, init_skip=(*skip, "typo*"))
        del state["model.projection.weight"]
        with pytest.raises(ConfigError, match=r"unexpected model\.projection\.weight"):
            self.initialise(tmp_path, state, init_skip=skip[:2])

    def test_a_release_import_has_weights_and_average_only(self, tmp_path: Path) -> None:
        bare = {n: t for n, t in content(7).items() if not n.startswith("exp_")}
        path = saving.save(make(tmp_path), cast(Engine, PlainEngine(bare)), meta_of(0))
        target = PlainEngine(content(1))
        checkpoints = make(tmp_path, init_from=str(path))
        checkpoints.initialise(cast(Engine, target))
        assert torch.equal(target.tensors["model.denoiser.bias"], bare["model.denoiser.bias"])
        with pytest.raises(ConfigError, match="missing exp_avg.denoiser.bias"):
            checkpoints.load(cast(Engine, target), path)

    def test_a_public_release_file_by_way_of_an_import(self, tmp_path: Path) -> None:
        """Weights only, as a release file or another fine-tuning has them: no moments, no place in the data."""
        theirs = tensors_of(CLASSES, encoder_dim=0)
        exported = tmp_path / "theirs.ckpt"
        assert run("export", save(tmp_path / "c", theirs), exported, "--format", "release") == 0
        assert run("import", exported, tmp_path / "imported") == 0
        kinds = ("model.", "ema.", "exp_avg.", "exp_avg_sq.")
        names = [n.removeprefix("model.") for n in theirs if n.startswith("model.")]
        state = {k + n: torch.ones_like(theirs["model." + n]) for k in kinds for n in names}
        target = PlainEngine(state)
        start = make(tmp_path, init_from=str(tmp_path / "imported"), init_weights="ema")
        start.initialise(cast(Engine, target))
        for name in names:
            assert torch.equal(target.tensors["model." + name], theirs["ema." + name]), name
            assert torch.equal(target.tensors["ema." + name], theirs["ema." + name]), name
            assert not target.tensors["exp_avg." + name].any()
