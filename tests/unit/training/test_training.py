"""Pieces of training: randomness, checkpoints, reports, FLOPs."""

import json
import math
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.checkpoint.format import CheckpointMeta, read_tensors, stored_shapes
from deco_scale.checkpoint.manager import CheckpointManager
from deco_scale.checkpoint.staging import Stager, parameter_digest
from deco_scale.config import load_config
from deco_scale.errors import ConfigError
from deco_scale.observability.config import WandbConfig
from deco_scale.observability.run_dir import RunDir
from deco_scale.observability.run_logger import RunLogger
from deco_scale.parallel.engines.base import Engine
from deco_scale.planning.flops import training_flops
from deco_scale.seeding import derive_seed
from deco_scale.training.inputs import Batch, EncoderOutputs
from deco_scale.training.noise import draw
from deco_scale.training.prefetch import EncoderPrefetcher, HostPrefetcher
from tests.support import CONFIGS
from tests.support.saving import newest, save

CPU = torch.device("cpu")


def test_draws_belong_to_the_sample_not_to_the_batch() -> None:
    whole = draw(1, [10, 11, 12], (3, 4, 4), CPU)
    part = draw(1, [12, 10], (3, 4, 4), CPU)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[[2, 0]], b)
    assert not torch.equal(draw(2, [10], (3, 4, 4), CPU).noise, part.noise[1:])
    keys = {derive_seed(seed, n) for seed in range(50) for n in range(200)}
    assert len(keys) == 10_000
    draws = draw(0, list(range(4000)), (1, 1, 1), CPU)
    assert abs(draws.normal.mean().item()) < 0.06 and abs(draws.normal.std().item() - 1) < 0.05
    assert abs((draws.dropout < 0.1).float().mean().item() - 0.1) < 0.02


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class PlainEngine:
    """The checkpoint's view of an engine: named tensors and a counter."""

    def __init__(self, width: int = 3) -> None:
        generator = torch.Generator().manual_seed(width)
        self.tensors = {
            f"{kind}.denoiser.w": torch.randn(4, width, generator=generator)
            for kind in ("model", "ema", "exp_avg", "exp_avg_sq")
        }
        self.optimizer_steps = 5

    def state(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def load(self, state: dict[str, torch.Tensor], optimizer_steps: int) -> None:
        self.optimizer_steps = optimizer_steps


def meta(step: int) -> CheckpointMeta:
    return CheckpointMeta(
        step=step, stage="s", samples=step * 8, seed=0, optimizer_steps=0, data_state={"samples": step * 8},
        parameter_digest="", config={},
    )  # fmt: skip


def engine(width: int = 3) -> Engine:
    return PlainEngine(width)  # type: ignore[return-value]


@pytest.mark.usefixtures("group")
class TestCheckpoint:
    def checkpoints(self, folder: Path, **settings: int) -> CheckpointManager:
        made = CheckpointManager(folder / "c", CheckpointConfig(every=1, **settings))
        made.prepare()
        return made

    def test_round_trip_is_bit_exact_and_retention_keeps_what_it_says(self, tmp_path: Path) -> None:
        checkpoints = self.checkpoints(tmp_path, keep_last=2, keep_every=3)
        source = engine()
        for step in range(1, 8):
            save(checkpoints, source, meta(step))
        kept = [p.name for p in sorted((tmp_path / "c").iterdir())]
        assert kept == ["step_00000003", "step_00000006", "step_00000007"]
        target = engine()
        for tensor in target.state().values():
            tensor.zero_()
        target.optimizer_steps = 99  # type: ignore[misc]
        path = newest(checkpoints)
        assert path is not None and path.name == "step_00000007"
        loaded = checkpoints.load(target, path)
        assert (loaded.step, loaded.samples, loaded.optimizer_steps) == (7, 56, 5)
        assert target.optimizer_steps == 5
        assert loaded.parameter_digest == parameter_digest(Stager().stage(target.state()))
        assert all(torch.equal(a, source.state()[n]) for n, a in target.state().items())
        assert read_tensors(path, "ema.").keys() == {"denoiser.w"}

    def test_any_flipped_byte_is_detected_and_its_file_named(self, tmp_path: Path) -> None:
        checkpoints = self.checkpoints(tmp_path)
        path = save(checkpoints, engine(), meta(1))
        files = sorted(p for p in path.iterdir() if p.name != "COMPLETE")
        assert len(files) == 3
        for file in files:
            original = file.read_bytes()
            damaged = bytearray(original)
            damaged[len(damaged) // 2] ^= 1
            file.write_bytes(bytes(damaged))
            with pytest.raises(ConfigError, match=file.name.replace(".", r"\.")):
                checkpoints.load(engine(), path)
            file.write_bytes(original)
        checkpoints.load(engine(), path)

    def test_half_written_folders_are_never_taken(self, tmp_path: Path) -> None:
        checkpoints = self.checkpoints(tmp_path)
        save(checkpoints, engine(), meta(1))
        path = save(checkpoints, engine(), meta(2))
        (path / "COMPLETE").unlink()
        (tmp_path / "c" / ".saving_step_00000003").mkdir()
        found = newest(checkpoints)
        assert found is not None and found.name == "step_00000001"
        with pytest.raises(ConfigError, match="not a complete checkpoint"):
            checkpoints.resolve(str(path))
        with pytest.raises(ConfigError, match="no such checkpoint"):
            checkpoints.resolve(str(tmp_path / "nowhere"))
        assert checkpoints.resolve("none") is None
        checkpoints.prepare()
        assert not (tmp_path / "c" / ".saving_step_00000003").exists()

    def test_another_model_is_refused_by_tensor_name(self, tmp_path: Path) -> None:
        checkpoints = self.checkpoints(tmp_path)
        path = save(checkpoints, engine(), meta(1))
        with pytest.raises(ConfigError, match=r"denoiser.w has shape \(4, 3\), expected \(4, 2\)"):
            checkpoints.load(engine(2), path)

    def test_an_index_with_code_in_it_is_refused_unread(self, tmp_path: Path) -> None:
        checkpoints = self.checkpoints(tmp_path)
        path = save(checkpoints, engine(), meta(1))
        witness = tmp_path / "executed"

        class Evil:
            def __reduce__(self):  # type: ignore[no-untyped-def]
                return os.mkdir, (str(witness),)

        (path / ".metadata").write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ConfigError, match="mkdir does not belong"):
            stored_shapes(path)
        assert not witness.exists()

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="cannot write to"):
            CheckpointManager(tmp_path / "file" / "c", CheckpointConfig()).prepare()


def test_metrics_survive_a_cut_line_and_count_the_last_doing(tmp_path: Path) -> None:
    reporter = RunLogger(tmp_path, active=True, total_steps=4, wandb=WandbConfig(mode="disabled"), config={})
    base = {"loss_flow": 1.0, "grad_norm": 1.0, "lr": 1e-4, "images_per_s": 1.0, "data_wait_s": 0.0, "step_s": 1.0}
    for step, loss in ((1, 4.0), (2, 3.0), (2, 2.5), (3, 2.0)):
        reporter.metrics({"step": step, "loss": loss, **base})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [e["loss"] for e in RunDir(tmp_path).refresh().steps()] == [4.0, 2.5, 2.0]
    reporter.close()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


@pytest.mark.parametrize(("side", "teraflops"), [(256, 1.17), (512, 4.39)])
def test_flops_of_the_published_model(side: int, teraflops: float) -> None:
    model = load_config(CONFIGS / "t2i_xxl.yaml").model
    assert math.isclose(training_flops(model, side, side) / 1e12, teraflops, rel_tol=0.01)


def test_encoders_are_one_batch_ahead() -> None:
    events: list[str] = []

    def batch_of(captions: list[str]) -> Batch:
        return Batch(np.zeros((2, 1, 1, 3), np.uint8), captions, (0, 0), (0, 1), None)

    def encode(part: Batch) -> EncoderOutputs:
        events.append("encode " + ",".join(part.captions))
        return EncoderOutputs(text=torch.tensor([[float(c)] for c in part.captions]))

    # Three batches and no more: a fourth would be fetched in vain.
    source = iter([batch_of([f"{i}", f"{i}.5"]) for i in range(3)])
    for batch, encoded in EncoderPrefetcher(encode, torch.device("cpu")).iterate(source, accumulation=2, count=3):
        events.append("step " + batch.captions[0])
        texts = [part.text for part in encoded]
        assert [t.tolist() for t in texts if t is not None] == [[[float(c)]] for c in batch.captions]
    assert events == [
        "encode 0", "encode 0.5", "encode 1", "encode 1.5", "step 0",
        "encode 2", "encode 2.5", "step 1", "step 2",
    ]  # fmt: skip


def test_prefetcher_keeps_order_is_bounded_passes_errors_on_and_ends() -> None:
    pulled: list[int] = []

    def source(fail_at: int) -> Iterator[Any]:
        for i in range(100):
            if i == fail_at:
                raise ValueError("broken shard")
            pulled.append(i)
            yield i

    feed = HostPrefetcher(source(5), depth=2)
    found = []
    with pytest.raises(ValueError, match="broken shard"):
        for batch in feed:
            found.append(batch)
            time.sleep(0.01)
            # Two ready, and one in the thread's hand.
            assert len(pulled) <= len(found) + 3
    assert found == [0, 1, 2, 3, 4] and list(feed) == []  # type: ignore[comparison-overlap]
    feed.close()
    endless = HostPrefetcher(source(1000), depth=1)
    assert next(endless) == 0  # type: ignore[comparison-overlap]
    endless.close()
    assert list(endless) == [] and not any(t.name == "host_prefetch" for t in threading.enumerate())
