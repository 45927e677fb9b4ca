"""Saving beside the training, what is kept, told and refused."""

import fcntl
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from data_pipeline.storage.dev_server import S3Server
from deco_scale.checkpoint import manager
from deco_scale.checkpoint.config import CheckpointConfig, KeepBest
from deco_scale.checkpoint.format import read_meta, read_tensors, shared_lock, verify
from deco_scale.checkpoint.storage import open_objects
from deco_scale.config import build_config
from deco_scale.errors import ConfigError, RunError
from deco_scale.parallel.engines.base import Engine
from tests.support.crash import PlainEngine, content, meta_of
from tests.support.saving import alone, engine_of, make, newest, save


@pytest.fixture
def group() -> Iterator[None]:
    with alone():
        yield


def steps_of(run: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in run.iterdir())


@pytest.mark.usefixtures("group")
class TestSaving:
    def test_what_changes_after_staging_is_not_saved(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoints, engine, written = make(tmp_path), engine_of(1), threading.Event()
        whole = manager.write_snapshot

        def slow(*arguments: Any) -> Any:
            assert written.wait(60)
            return whole(*arguments)

        monkeypatch.setattr(manager, "write_snapshot", slow)
        assert checkpoints.start(engine, meta_of(1)) is None
        assert checkpoints.finished() is None
        for tensor in engine.state().values():
            tensor.zero_()
        written.set()
        saved = checkpoints.finished(wait=True)
        assert saved is not None and saved.error is None and "step_00000001 in" in saved.message
        path = tmp_path / "run" / "step_00000001"
        found = read_tensors(path, "")
        assert all(torch.equal(found[n], t) for n, t in content(1).items())
        assert read_meta(path).optimizer_steps == 1

    def test_one_save_at_a_time_and_buffers_are_used_again(self, tmp_path: Path) -> None:
        checkpoints = make(tmp_path, keep_last=5)
        assert checkpoints.start(engine_of(1), meta_of(1)) is None
        held = {n: t.data_ptr() for n, t in checkpoints._stager._buffers.items()}
        for step in (2, 3):
            before = checkpoints.start(engine_of(step), meta_of(step))
            assert before is not None and f"step_0000000{step - 1} in" in before.message
        checkpoints.finished(wait=True)
        assert checkpoints.finished(wait=True) is None
        assert {n: t.data_ptr() for n, t in checkpoints._stager._buffers.items()} == held
        for step in (1, 2, 3):
            found = read_tensors(tmp_path / "run" / f"step_{step:08d}", "")
            assert all(torch.equal(found[n], t) for n, t in content(step).items())

    def test_an_interrupted_wait_does_not_lose_the_save(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoints, written, whole = make(tmp_path), threading.Event(), manager.write_snapshot
        interrupted = threading.Event()

        def interrupt_once(*_: object) -> None:
            if not interrupted.is_set():
                interrupted.set()
                raise KeyboardInterrupt

        def slow(*arguments: Any) -> Any:
            # Again and again: Python loses a signal that arrives just before its main thread begins to wait.
            while not interrupted.wait(0.05):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert written.wait(60)
            return whole(*arguments)

        monkeypatch.setattr(manager, "write_snapshot", slow)
        before = signal.signal(signal.SIGINT, interrupt_once)
        try:
            with pytest.raises(KeyboardInterrupt):
                checkpoints.start(engine_of(1), meta_of(1))
                checkpoints.finished(wait=True)
        finally:
            signal.signal(signal.SIGINT, before)
        written.set()
        saved = checkpoints.finished(wait=True)
        assert saved is not None and saved.error is None and steps_of(tmp_path / "run") == [1]

    def test_another_shape_is_planned_anew(self, tmp_path: Path) -> None:
        checkpoints = make(tmp_path)
        save(checkpoints, engine_of(1), meta_of(1))
        state = {name: torch.cat([tensor, tensor]) for name, tensor in content(2).items()}
        path = save(checkpoints, cast(Engine, PlainEngine(state)), meta_of(2))
        assert all(torch.equal(t, state[n]) for n, t in read_tensors(path, "").items())

    def test_an_error_names_its_file_and_keeps_the_last_checkpoint(self, tmp_path: Path) -> None:
        checkpoints = make(tmp_path)
        save(checkpoints, engine_of(1), meta_of(1))
        in_the_way = tmp_path / "run" / ".saving_step_00000002"
        in_the_way.write_text("")
        checkpoints.start(engine_of(2), meta_of(2))
        saved = checkpoints.finished(wait=True)
        assert saved is not None and saved.error is not None
        assert "step 2 could not be written" in saved.error and str(in_the_way) in saved.error
        assert "Not a directory" in saved.error
        in_the_way.unlink()
        with pytest.raises(RunError, match="No space left on device"):
            limited(lambda: save(checkpoints, engine_of(3), meta_of(3)), "/dev/full", tmp_path)
        assert steps_of(tmp_path / "run") == [1]
        save(checkpoints, engine_of(4), meta_of(4))
        assert steps_of(tmp_path / "run") == [1, 4]
        verify(tmp_path / "run" / "step_00000001")

    def test_a_bug_is_not_taken_for_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoints = make(tmp_path)
        monkeypatch.setattr(manager, "parameter_digest", lambda *a: 1 / 0)
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
        path = save(first, engine_of(1), meta_of(1))
        checkpoints = make(tmp_path, keep_last=1)
        assert checkpoints.load(engine_of(0), path).step == 1
        for step in (2, 3, 4):
            save(checkpoints, engine_of(step), meta_of(step))
        assert steps_of(tmp_path / "run") == [1, 4]
        with shared_lock(tmp_path / "run" / "step_00000004"):
            save(checkpoints, engine_of(5), meta_of(5))
            assert steps_of(tmp_path / "run") == [1, 4, 5]
            with (tmp_path / "run" / "step_00000004" / "COMPLETE").open() as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        save(checkpoints, engine_of(6), meta_of(6))
        assert steps_of(tmp_path / "run") == [1, 6]

    def test_a_step_that_is_saved_again_replaces_the_first(self, tmp_path: Path) -> None:
        checkpoints = make(tmp_path)
        for seed in (1, 2):
            path = save(checkpoints, engine_of(seed), meta_of(1))
            assert torch.equal(read_tensors(path, "model.")["denoiser.bias"], content(seed)["model.denoiser.bias"])
        # A kill between the two renames leaves the first one aside.
        path.rename(path.with_name(".replaced_step_00000001"))
        assert newest(checkpoints) is None
        checkpoints.prepare()
        assert newest(checkpoints) == path

    def test_any_flipped_byte_of_the_listing_is_detected(self, tmp_path: Path) -> None:
        checkpoints = make(tmp_path)
        path = save(checkpoints, engine_of(1), meta_of(1))
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
        where = newest(checkpoints)
        assert where == "s3://saving/a/b/step_00000003"
        engine = engine_of(0)
        assert checkpoints.load(engine, where).step == 3
        assert all(torch.equal(engine.state()[n], t) for n, t in content(3).items())
        objects = open_objects("s3://saving/a/b/step_00000003")
        sizes = {entry.key: entry.size for entry in objects.list()}
        names = sorted(sizes)
        assert len(names) == 4 and not any(key.startswith("step_00000001") for key in names)
        damaged = tmp_path / "damaged"
        for name in names:
            size = sizes[name]
            whole = objects.read(name, 0, size)
            for data in (whole[: size // 2] + bytes([whole[size // 2] ^ 1]) + whole[size // 2 + 1 :], whole):
                damaged.write_bytes(data)
                objects.write_file(name, damaged)
                if data is not whole:
                    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
                        checkpoints.load(engine_of(0), where)
        assert checkpoints.load(engine_of(0), where).step == 3
        assert list((tmp_path / "run").iterdir()) == []

    def test_a_refusing_s3_is_reported_and_leaves_nothing_behind(
        self, tmp_path: Path, s3_environment: S3Server
    ) -> None:
        s3_environment.create_bucket("refusing")
        checkpoints = make(tmp_path, url="s3://refusing/x")
        save(checkpoints, engine_of(1), meta_of(1))
        other = make(tmp_path, url="s3://refusing/x")
        other._cfg = CheckpointConfig(every=1, url="s3://absent/x")
        other._remote = None
        other.start(engine_of(2), meta_of(2))
        saved = other.finished(wait=True)
        assert saved is not None and saved.error is not None and "absent" in saved.error
        assert "no such bucket" in saved.error and list((tmp_path / "run").iterdir()) == []
        assert newest(checkpoints) == "s3://refusing/x/step_00000001"


def limited(action: Any, device: str, folder: Path) -> None:
    """Run ``action`` with every file of a save being ``device``."""
    from deco_scale.checkpoint.integrity import ChecksummedFile

    whole = ChecksummedFile.__init__

    def redirected(self: Any, path: Path) -> None:
        whole(self, Path(device))

    ChecksummedFile.__init__ = redirected  # type: ignore[method-assign]
    try:
        action()
    finally:
        ChecksummedFile.__init__ = whole  # type: ignore[method-assign]


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
