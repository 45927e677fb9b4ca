"""Bad input: one clear message, exit code 2 or 1 on every rank, no traceback, no hang."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.storage.dev_server import S3Server
from deco_scale.yaml import dump_yaml
from tests.conftest import ROOT
from tests.support.assets import tiny_config
from tests.support.ports import free_port


def launch(
    config: Path | str, *arguments: str, limit_bytes: int | None = None, **variables: str
) -> tuple[int, str]:
    """Exit code and output of ``python launcher/train.py``, whose files may have ``limit_bytes`` at most."""

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, str(ROOT / "launcher" / "train.py"), "--config", str(config), *arguments]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120, preexec_fn=limit)
    return done.returncode, done.stderr + done.stdout


@pytest.fixture
def config(tmp_path: Path, shards: Path, text_encoder: Path) -> Path:
    plain = tiny_config(tmp_path / "run", shards, text_encoder)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(plain))
    return path


CASES: dict[str, tuple[list[str], int, list[str]]] = {
    "unknown key": (["modle.dim=3"], 2, ["modle", "did you mean 'model'"]),
    "missing text encoder": (["text_encoder.path=/nowhere/x"], 2, ["/nowhere/x", "is not here", "fetch"]),
    "missing image encoder": (
        ["objective.repa_weight=0.5", "image_encoder.path=/nowhere/dino.pth"], 2, ["/nowhere/dino.pth", "dinov2"],
    ),
    "no permission": (["run.dir=/proc/nobody"], 2, ["cannot write to run.dir=/proc/nobody"]),
    "missing data": (["data.url=/nowhere/data"], 1, ["/nowhere/data: no such folder"]),
    "resolution too high": (["stages.small.resolution=64"], 1, ["none of the 100 samples has 64 pixels"]),
    "batch does not divide": (
        ["stages.small.global_batch=14", "stages.small.micro_batch=6"], 2,
        ["stages.small.micro_batch=6", "possible: [1, 2, 7, 14]"],
    ),
    "backend not here": (["attention.backend=cudnn"], 2, ["attention.backend=cudnn", "sdpa or math"]),
    "resume path missing": (["--resume", "/nowhere/c"], 2, ["--resume /nowhere/c", "no such checkpoint"]),
    "S3 without credentials": (
        ["checkpoint.url=s3://nowhere/run", "device=cpu"], 1, ["no credentials found"],
    ),
    "init_from missing": (
        ["checkpoint.init_from=/nowhere/c"], 2, ["/nowhere/c is not a complete checkpoint (no COMPLETE file)"],
    ),
    "no such metric": (
        ["checkpoint.keep_best.metric=fid"], 2, ["checkpoint.keep_best.metric='fid' is not logged", "'loss'"],
    ),
    "no GPU": (["device=cuda"], 2, ["device=cuda", "sees no GPU"]),
    "deepspeed key": (
        ["parallel.engine=deepspeed", "parallel.deepspeed.bf16={}"], 2, ["parallel.deepspeed.bf16", "owned by"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_clear_message(name: str, config: Path) -> None:
    arguments, code, said = CASES[name]
    found, output = launch(config, *arguments)
    assert found == code, output
    assert "Traceback" not in output
    assert output.count("error: ") == 1
    for part in said:
        assert part in output


def test_missing_config_file(tmp_path: Path) -> None:
    code, output = launch(tmp_path / "nowhere.yaml")
    assert (code, "Traceback" in output) == (2, False)
    assert "nowhere.yaml: No such file" in output


@pytest.mark.parametrize(
    ("url", "variables", "said"),
    [
        ("s3://empty/x", {}, "no shards and no index"),
        ("s3://absent/x", {}, "no such bucket"),
        ("s3://empty/x", {"AWS_SECRET_ACCESS_KEY": "planted-secret"}, "access denied"),
        ("s3://empty/x", {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    ],
    ids=["empty", "absent", "credentials", "endpoint"],
)
def test_s3(config: Path, s3_server: S3Server, url: str, variables: dict[str, str], said: str) -> None:
    s3_server.create_bucket("empty")
    code, output = launch(config, f"data.url={url}", **{**s3_server.environment, **variables})
    assert (code, "Traceback" in output) == (1, False), output
    assert said in output and "planted-secret" not in output


def test_every_rank_ends_with_the_same_code(config: Path) -> None:
    """Two ranks, started by hand so that each exit code is seen."""

    def ends(*arguments: str) -> tuple[list[int], str]:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = []
        for rank in (0, 1):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(ROOT / "launcher/train.py"), "--config", str(config), *arguments],
                    env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        outputs = [p.communicate(timeout=120)[0] for p in processes]
        return [p.returncode for p in processes], "".join(outputs)

    codes, output = ends("text_encoder.path=/nowhere/x")
    assert codes == [2, 2] and output.count("error: ") == 1 and "Traceback" not in output
    codes, output = ends("data.url=/nowhere/x")
    assert codes == [1, 1] and output.count("error: ") == 1 and "Traceback" not in output
    codes, output = ends("stages.small.global_batch=9")
    assert codes == [2, 2] and "possible numbers of ranks: [1, 3, 9]" in output


def test_checkpoint_of_another_model(config: Path, tmp_path: Path) -> None:
    code, output = launch(config, "run.stop_at_step=2", "stages.small.micro_batch=3")
    assert code == 0, output
    saved = (tmp_path / "run" / "config.yaml").read_text()
    # As configured, which is for any number of ranks, and not as it fits this one.
    assert "micro-batches of 2 samples, not 3" in output and "micro_batch: 3" in saved
    code, output = launch(config, "run.seed=4")
    assert code == 2 and "was trained with run.seed=3, not 4" in output
    code, output = launch(config, "model.decoder_width=16")
    assert (tmp_path / "run" / "config.yaml").read_text() == saved
    assert (code, "Traceback" in output) == (2, False)
    assert "does not fit the configured model" in output and "decoder" in output


def test_other_data_after_a_resume_are_reported(config: Path) -> None:
    assert launch(config, "run.stop_at_step=2")[0] == 0
    code, output = launch(config, "run.stop_at_step=3", "data.window=8")
    assert code == 0 and "WARNING: the data differ from those of the checkpoint" in output
    code, output = launch(config, "run.stop_at_step=4", "data.window=8")
    assert code == 0 and "WARNING" not in output


def test_a_failed_checkpoint_is_reported_and_only_the_last_one_ends_the_run(config: Path, tmp_path: Path) -> None:
    assert launch(config, "run.stop_at_step=2")[0] == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    # No file may grow beyond the limit, as on a full disk; logs and the index stay below it.
    code, output = launch(config, "run.stop_at_step=5", "checkpoint.every=4", limit_bytes=200_000)
    assert (code, "Traceback" in output) == (1, False), output
    assert output.count("WARNING: checkpoint at step 4 could not be written") == 1
    assert "error: checkpoint at step 5 could not be written" in output and "File too large" in output
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step_00000002"]
    assert launch(config, "run.stop_at_step=3")[0] == 0


def test_a_run_that_diverges_is_stopped(config: Path) -> None:
    # The first update makes the weights so large that losses overflow from then on.
    bad: list[Any] = ["run.max_bad_steps=3", "stages.small.lr=1e30", "optimizer.clip_norm=1e30"]
    code, output = launch(config, *bad)
    assert (code, "Traceback" in output) == (1, False), output
    assert "not finite in 3 steps in a row" in output
