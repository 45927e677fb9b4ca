"""Saving beside the training, what is kept, EMA exports, and what a fresh run starts from."""

import fcntl
import json
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from data_pipeline.serve import S3Server
from deco_scale.config import build_config
from deco_scale.errors import ConfigError, RunError
from deco_scale.training import checkpoint
from deco_scale.training.checkpoint import Checkpoints, read_meta, read_tensors, reading, verify
from deco_scale.training.engine import Engine
from deco_scale.training.settings import CheckpointConfig, KeepBest
from launcher.objects import open_objects
from tests.distributed.harness import in_group
from tests.faults.crash import PlainEngine, content, join_alone, meta_of


@pytest.fixture
def group() -> Iterator[None]:
    join_alone()
    yield
    dist.destroy_process_group()


def engine_of(step: int) -> Engine:
    made = PlainEngine(content(step))
    made.optimizer_steps = step
    return cast(Engine, made)


def steps_of(run: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in run.iterdir())


def make(folder: Path, **settings: Any) -> Checkpoints:
    made = Checkpoints(folder / "run", CheckpointConfig(**{"every": 1, **settings}), open_objects=open_objects)
    made.prepare()
    return made


@pytest.mark.usefixtures("group")
class TestSaving:
    def test_what_changes_after_staging_is_not_saved(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoints, engine, written = make(tmp_path), engine_of(1), threading.Event()
        whole = checkpoint.write_snapshot

        def slow(*arguments: Any) -> Any:
            assert written.wait(60)
            return whole(*arguments)

        monkeypatch.setattr(checkpoint, "write_snapshot", slow)
        assert checkpoints.start(engine, meta_of(1)) is None
        assert checkpoints.finished() is None
        for tensor in engine.state().values():
            tensor.zero_()
        written.set()
        saved = checkpoints.finished(wait=True)
        assert saved is not None and saved.error is None and "step_00000001 in" in saved.said
        path = tmp_path / "run" / "step_00000001"
        found = read_tensors(path, "")
        assert all(torch.equal(found[n], t) for n, t in content(1).items())
        assert read_meta(path).optimizer_steps == 1

    def test_one_save_at_a_time_and_buffers_are_used_again(self, tmp_path: Path) -> None:
        checkpoints = make(tmp_path, keep_last=5)
        assert checkpoints.start(engine_of(1), meta_of(1)) is None
        held = {n: t.data_ptr() for n, t in checkpoints._staging._buffers.items()}
        for step in (2, 3):
            before = checkpoints.start(engine_of(step), meta_of(step))
            assert before is not None and f"step_0000000{step - 1} in" in before.said
        checkpoints.finished(wait=True)
        assert checkpoints.finished(wait=True) is None
        assert {n: t.data_ptr() for n, t in checkpoints._staging._buffers.items()} == held
        for step in (1, 2, 3):
            found = read_tensors(tmp_path / "run" / f"step_{step:08d}", "")
            assert all(torch.equal(found[n], t) for n, t in content(step).items())

    def test_another_shape_is_planned_anew(self, tmp_path: Path) -> None:
        checkpoints = make(tmp_path)
        checkpoints.save(engine_of(1), meta_of(1))
        state = {name: torch.cat([tensor, tensor]) for name, tensor in content(2).items()}
        path = checkpoints.save(cast(Engine, PlainEngine(state)), meta_of(2))
        assert all(torch.equal(t, state[n]) for n, t in read_tensors(path, "").items())

    def test_an_error_is_told_with_its_file_and_the_last_good_one_stays(self, tmp_path: Path) -> None:
        checkpoints = make(tmp_path)
        checkpoints.save(engine_of(1), meta_of(1))
        in_the_way = tmp_path / "run" / ".saving_step_00000002"
        in_the_way.write_text("")
        checkpoints.start(engine_of(2), meta_of(2))
        saved = checkpoints.finished(wait=True)
        assert saved is not None and saved.error is not None
        assert "step 2 could not be written" in saved.error and str(in_the_way) in saved.error
        assert "Not a directory" in saved.error
        in_the_way.unlink()
        with pytest.raises(RunError, match="No space left on device"):
            limited(lambda: checkpoints.save(engine_of(3), meta_of(3)), "/dev/full", tmp_path)
        assert steps_of(tmp_path / "run") == [1]
        checkpoints.save(engine_of(4), meta_of(4))
        assert steps_of(tmp_path / "run") == [1, 4]
        verify(tmp_path / "run" / "step_00000001")

    def test_a_bug_is_not_taken_for_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoints = make(tmp_path)
        monkeypatch.setattr(checkpoint, "snapshot_digest", lambda *a: 1 / 0)
        checkpoints.start(engine_of(1), meta_of(1))
        with pytest.raises(ZeroDivisionError):
            checkpoints.finished(wait=True)

    @pytest.mark.parametrize("asynchronous", [True, False])
    def test_best_are_kept_and_remembered(self, tmp_path: Path, asynchronous: bool) -> None:
        losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 0.5, 5: 3.0, 6: float("nan"), 7: 9.0}
        settings = {"keep_last": 1, "keep_best": KeepBest(count=2), "asynchronous": asynchronous}
        for steps in ((1, 2, 3), (4, 5, 6, 7)):
            # A second run knows the values of the first from its checkpoints.
            checkpoints = make(tmp_path, **settings)
            for step in steps:
                checkpoints.observe({"step": step, "loss": losses[step]})
                checkpoints.start(engine_of(step), meta_of(step))
            checkpoints.finished(wait=True)
        assert steps_of(tmp_path / "run") == [2, 4, 7]
        with pytest.raises(ConfigError, match=r"keep_best.metric='los' is not logged; possible: \['loss'\]"):
            make(tmp_path, keep_best=KeepBest(metric="los")).observe({"loss": 1.0, "stage": "a"})

    def test_what_is_read_or_resumed_from_is_not_retired(self, tmp_path: Path) -> None:
        first = make(tmp_path, keep_last=1)
        path = first.save(engine_of(1), meta_of(1))
        checkpoints = make(tmp_path, keep_last=1)
        assert checkpoints.load(engine_of(0), path).step == 1
        for step in (2, 3, 4):
            checkpoints.save(engine_of(step), meta_of(step))
        assert steps_of(tmp_path / "run") == [1, 4]
        with reading(tmp_path / "run" / "step_00000004"):
            checkpoints.save(engine_of(5), meta_of(5))
            assert steps_of(tmp_path / "run") == [1, 4, 5]
            with (tmp_path / "run" / "step_00000004" / "COMPLETE").open() as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        checkpoints.save(engine_of(6), meta_of(6))
        assert steps_of(tmp_path / "run") == [1, 6]

    def test_a_step_that_is_saved_again_replaces_the_first(self, tmp_path: Path) -> None:
        checkpoints = make(tmp_path)
        for seed in (1, 2):
            path = checkpoints.save(engine_of(seed), meta_of(1))
            assert torch.equal(read_tensors(path, "model.")["denoiser.bias"], content(seed)["model.denoiser.bias"])
        # A kill between the two renames leaves the first one aside.
        path.rename(path.with_name(".replaced_step_00000001"))
        assert checkpoints.latest() is None
        checkpoints.prepare()
        assert checkpoints.latest() == path

    def test_any_flipped_byte_of_the_listing_is_found(self, tmp_path: Path) -> None:
        checkpoints = make(tmp_path)
        path = checkpoints.save(engine_of(1), meta_of(1))
        original = (path / "COMPLETE").read_bytes()
        for place in range(len(original)):
            damaged = bytearray(original)
            damaged[place] ^= 4
            (path / "COMPLETE").write_bytes(bytes(damaged))
            with pytest.raises(ConfigError, match="COMPLETE"):
                verify(path)

    def test_s3_round_trip_finds_every_flipped_byte(self, tmp_path: Path, s3_environment: S3Server) -> None:
        s3_environment.create_bucket("saving")
        checkpoints = make(tmp_path, url="s3://saving/a/b", keep_last=2)
        for step in (1, 2, 3):
            checkpoints.start(engine_of(step), meta_of(step))
        checkpoints.finished(wait=True)
        assert list((tmp_path / "run").iterdir()) == []
        where = checkpoints.find("auto")
        assert where == "s3://saving/a/b/step_00000003"
        engine = engine_of(0)
        assert checkpoints.load(engine, where).step == 3
        assert all(torch.equal(engine.state()[n], t) for n, t in content(3).items())
        objects = open_objects("s3://saving/a/b/step_00000003")
        names = sorted(objects.sizes())
        assert len(names) == 4 and not any(key.startswith("step_00000001") for key in objects.sizes())
        damaged = tmp_path / "damaged"
        for name in names:
            size = objects.sizes()[name]
            whole = objects.read(name, 0, size)
            for data in (whole[: size // 2] + bytes([whole[size // 2] ^ 1]) + whole[size // 2 + 1 :], whole):
                damaged.write_bytes(data)
                objects.put_file(name, damaged, 0)
                if data is not whole:
                    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
                        checkpoints.load(engine_of(0), where)
        assert checkpoints.load(engine_of(0), where).step == 3
        assert list((tmp_path / "run").iterdir()) == []

    def test_s3_that_refuses_is_told_and_nothing_is_left(self, tmp_path: Path, s3_environment: S3Server) -> None:
        s3_environment.create_bucket("refusing")
        checkpoints = make(tmp_path, url="s3://refusing/x")
        checkpoints.save(engine_of(1), meta_of(1))
        other = make(tmp_path, url="s3://refusing/x")
        other._cfg = CheckpointConfig(every=1, url="s3://absent/x")
        other._target = None
        other.start(engine_of(2), meta_of(2))
        saved = other.finished(wait=True)
        assert saved is not None and saved.error is not None and "absent" in saved.error
        assert "no such bucket" in saved.error and list((tmp_path / "run").iterdir()) == []
        assert checkpoints.find("auto") == "s3://refusing/x/step_00000001"


class TestInitialise:
    """``init_from``: weights of another run, and nothing else of it."""

    @pytest.fixture(autouse=True)
    def _group(self, group: None) -> None: ...

    def initialise(self, folder: Path, state: dict[str, Tensor], **settings: Any) -> tuple[PlainEngine, list[str]]:
        source = Checkpoints(folder / "source", CheckpointConfig())
        source.prepare()
        path = source.save(engine_of(7), meta_of(7))
        said: list[str] = []
        target = PlainEngine(state)
        target.optimizer_steps = 99
        make(folder, init_from=str(path), **settings).initialise(cast(Engine, target), said.append)
        return target, said

    @pytest.mark.parametrize("weights", ["model", "ema"])
    def test_weights_or_their_average(self, tmp_path: Path, weights: str) -> None:
        state = {n: t for n, t in content(1).items() if n != "ema.projection.weight"}
        target, said = self.initialise(tmp_path, state, init_weights=weights)
        there, found = content(7), target.tensors
        for name in ("denoiser.blocks.weight", "denoiser.bias"):
            assert torch.equal(found[f"model.{name}"], there[f"{weights}.{name}"])
            assert torch.equal(found[f"ema.{name}"], there[f"{weights}.{name}"])
            assert not found[f"exp_avg.{name}"].any() and not found[f"exp_avg_sq.{name}"].any()
        # There is no average outside the denoiser.
        assert torch.equal(found["model.projection.weight"], there["model.projection.weight"])
        assert target.optimizer_steps == 0 and f"({weights})" in said[0] and "fresh optimizer" in said[0]

    def test_patterns_leave_out_what_they_name_and_no_more(self, tmp_path: Path) -> None:
        state = content(1)
        for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
            state[f"{kind}.denoiser.bias"] = torch.ones(5)
            state[f"{kind}.denoiser.new.weight"] = torch.full((3,), 2.0)
        with pytest.raises(
            ConfigError, match=r"missing model\.denoiser\.new\.weight; model\.denoiser\.bias has shape"
        ):
            self.initialise(tmp_path, state)
        skip = ("denoiser.b[i]as", "denoiser.new.*", "proj*")
        target, said = self.initialise(tmp_path, state, init_skip=skip)
        assert said[1] == (
            "not taken over by checkpoint.init_skip: denoiser.bias, denoiser.new.weight, projection.weight"
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
        path = make(tmp_path).save(cast(Engine, PlainEngine(bare)), meta_of(0))
        target = PlainEngine(content(1))
        checkpoints = make(tmp_path, init_from=str(path))
        checkpoints.initialise(cast(Engine, target), lambda line: None)
        assert torch.equal(target.tensors["model.denoiser.bias"], bare["model.denoiser.bias"])
        with pytest.raises(ConfigError, match="missing exp_avg.denoiser.bias"):
            checkpoints.load(cast(Engine, target), path)


def limited(action: Any, device: str, folder: Path) -> None:
    """Run ``action`` with every file of a save being ``device``."""
    from deco_scale.training import writing

    whole = writing.SummedFile.__init__

    def redirected(self: Any, path: Path) -> None:
        whole(self, Path(device))

    writing.SummedFile.__init__ = redirected  # type: ignore[method-assign]
    try:
        action()
    finally:
        writing.SummedFile.__init__ = whole  # type: ignore[method-assign]


SHARDED = {"a": (7, 6), "b": (5, 8), "c": (3,), "d": (2, 4)}


def _sharded(seed: int) -> dict[str, Tensor]:
    """A state over 2 x 2 ranks: rows, columns, rows of both axes, and copies."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    places = {"a": (Shard(0), Shard(1)), "b": (Replicate(), Shard(0)), "c": (Shard(0), Replicate())}
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
        for name, shape in SHARDED.items():
            whole = torch.randn(shape, generator=generator)
            state[f"{kind}.denoiser.{name}"] = (
                distribute_tensor(whole, mesh, places[name]) if name in places else whole
            )
    return state


def _export(root: str) -> None:
    checkpoints = Checkpoints(Path(root) / "run", CheckpointConfig(ema_every=2, ema_steps=(3,)))
    if dist.get_rank() == 0:
        checkpoints.prepare()
    dist.barrier()
    assert [checkpoints.export_due(s) for s in (1, 2, 3, 4, 5)] == [False, True, True, True, False]
    meta = meta_of(2, config={"model": {"dim": 3}})
    state = _sharded(0)
    checkpoints.start(cast(Engine, PlainEngine(state)), meta, checkpoint=False, export=True)
    both = checkpoints.start(cast(Engine, PlainEngine(_sharded(1))), meta_of(3), checkpoint=True, export=True)
    assert both is not None and both.error is None and "EMA export" in both.said, both
    saved = checkpoints.finished(wait=True)
    assert saved is not None and saved.error is None and "checkpoint" in saved.said, saved
    for step in (2, 3):
        found = load_file(Path(root) / "exports" / f"ema_step_{step:08d}" / "model.safetensors")
        wanted = _sharded(step - 2)
        for name in SHARDED:
            tensor = wanted[f"ema.denoiser.{name}"]
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(found[name], whole), name
        assert found.keys() == SHARDED.keys()
    # The digest that was taken of the staged parts is that of the live ones.
    assert read_meta(Path(root) / "run" / "step_00000003").parameter_digest == checkpoint.parameter_digest(
        _sharded(1)
    )
    target = {name: torch.zeros_like(tensor) for name, tensor in _sharded(0).items()}
    checkpoints.load(cast(Engine, PlainEngine(target)), Path(root) / "run" / "step_00000003")
    for name, tensor in _sharded(1).items():
        assert (
            torch.equal(target[name], tensor)
            if not isinstance(tensor, DTensor)
            else torch.equal(cast(DTensor, target[name]).to_local(), tensor.to_local())
        ), name
    settings = json.loads((Path(root) / "exports" / "ema_step_00000002" / "config.json").read_text())
    assert settings["model"] == {"dim": 3} and settings["provenance"]["step"] == 2


def test_exports_and_checkpoints_of_sharded_tensors_from_a_thread(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    in_group(_export, 4, tmp_path, str(tmp_path / "files"))


ROWS, TENSORS = 1024, 24
"""24 tensors of 4 MiB in each of four sets: 384 MiB in all."""


def _big(fill: float) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    local = torch.full((ROWS // 2, 1024), fill)
    kinds = ("model", "ema", "exp_avg", "exp_avg_sq")
    names = [f"{kind}.denoiser.{i}" for kind in kinds for i in range(TENSORS)]
    return {name: DTensor.from_local(local.clone(), mesh, [Shard(0)], run_check=False) for name in names}


def _load_big(root: str, limit: int) -> None:
    checkpoints = Checkpoints(Path(root) / "run", CheckpointConfig())
    if dist.get_rank() == 0:
        checkpoints.prepare()
    dist.barrier()
    held = _big(0.0)
    path = Path(root) / "run" / "step_00000001"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    checkpoints.load(cast(Engine, PlainEngine(held)), path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert all(bool((cast(DTensor, t).to_local() == 3.0).all()) for t in held.values())
    assert grown < limit, f"loading took {grown / 2**20:.0f} MiB beyond the rank's own part"


def _save_whole(folder: Path) -> None:
    """One file with whole tensors, as a single process saves them."""
    kinds = ("model", "ema", "exp_avg", "exp_avg_sq")
    state = {f"{kind}.denoiser.{i}": torch.full((ROWS, 1024), 3.0) for kind in kinds for i in range(TENSORS)}
    make(folder).save(cast(Engine, PlainEngine(state)), meta_of(1))


@pytest.mark.usefixtures("group")
def test_loading_takes_no_more_than_a_rank_s_part(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    _save_whole(tmp_path / "files")
    # Half is 192 MiB, which is there before; the bound is for one stored tensor and pieces being checked.
    in_group(_load_big, 2, tmp_path, str(tmp_path / "files"), 80 * 2**20)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "/local"}, "s3://bucket/prefix"),
        ({"init_skip": ["a"]}, "init_weights and init_skip need init_from"),
        ({"keep_best": {"count": 0}}, "count=0 must be at least 1"),
        ({"keep_best": {"mode": "most"}}, "mode"),
        ({"ema_steps": [0]}, "ema_steps"),
        ({"asynchron": True}, "did you mean 'asynchronous'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_config({"checkpoint": settings}, source="test")
