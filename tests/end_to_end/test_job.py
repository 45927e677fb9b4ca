"""The whole job with real parts: S3, the deepspeed launcher, two stages, images, wandb, sampling."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import StoreError
from data_pipeline.storage.base import open_store
from data_pipeline.storage.dev_server import S3Server
from data_pipeline.tools import cli as data_cli
from deco_scale.cli.main import main
from deco_scale.observability.run_dir import RunDir
from deco_scale.yaml import dump_yaml, load_yaml
from tests.conftest import ROOT
from tests.support.assets import make_images_folder, tiny_config
from tests.support.evaluations import make_clip
from tests.support.ports import free_port


def test_store_over_s3(s3_environment: S3Server, tmp_path: Path) -> None:
    s3_environment.create_bucket("store")
    store = open_store("s3://store/some/prefix")
    data = np.random.default_rng(0).bytes(3_000_000)
    store.write("a/b.bin", data)
    (tmp_path / "file").write_bytes(data[:1000])
    store.write_file("c.bin", tmp_path / "file")
    store.write("empty", b"")
    listed = {info.key: info for info in store.list()}
    assert {k: i.size for k, i in listed.items()} == {"a/b.bin": 3_000_000, "c.bin": 1000, "empty": 0}
    assert store.read("a/b.bin", 1_234_567, 1_000_000) == data[1_234_567:2_234_567]
    assert store.read_all("a/b.bin") == data and store.read_all("empty") == b""
    assert store.read_all("nothing") is None
    etag = listed["c.bin"].etag
    assert store.read("c.bin", 10, 20, etag) == data[10:30]
    store.write("c.bin", data[:2000])
    with pytest.raises(StoreError, match=r"s3://store/some/prefix/c.bin: changed since it was indexed"):
        store.read("c.bin", 10, 20, etag)
    with pytest.raises(StoreError, match="no such object"):
        store.read("nothing", 0, 1)


def test_server_keeps_its_data_over_a_kill(tmp_path: Path) -> None:
    server = S3Server(tmp_path / "s3")
    try:
        server.start()
        server.create_bucket("kept")
        client = server._client()
        client.put_object(Bucket="kept", Key="x", Body=b"data")
        server.kill()
        server.start()
        assert server._client().get_object(Bucket="kept", Key="x")["Body"].read() == b"data"
        assert (tmp_path / "s3" / "credentials").stat().st_mode & 0o777 == 0o600
    finally:
        server.stop()


def test_deepspeed_job_from_s3_to_images(
    s3_environment: S3Server, tmp_path: Path, text_encoder: Path, image_encoder: Path
) -> None:
    s3_environment.create_bucket("job")
    images = make_images_folder(tmp_path / "images", 40)
    assert data_cli.main(["pack", str(images), "s3://job/train", "--shard-mb", "0.1"]) == 0
    run = tmp_path / "run"
    config = tiny_config(run, "s3://job/train", text_encoder, image_encoder)
    config["parallel"] = {"engine": "deepspeed", "zero_stage": 3}
    config["precision"] = {"compute": "bf16"}
    config["wandb"] = {"mode": "auto"}
    config["samples"] = {
        "every": 6, "prompts": ["a red circle", "a blue square", "white ground"],
        "sampler": {"num_steps": 3, "guidance": 2.0},
    }  # fmt: skip
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    config["evaluation"] = {
        "every": 8, "count": 5, "batch": 2, "prompts_file": str(prompts),
        "clip_folder": str(make_clip(tmp_path / "clip")), "sampler": {"num_steps": 2, "guidance": 2.0},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port()),
        str(ROOT / "launcher" / "train.py"), "--config", str(path),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    first = subprocess.run(
        [*command, "run.stop_at_step=6"], env=environment, text=True, capture_output=True, timeout=300
    )
    assert first.returncode == 0, first.stdout + first.stderr
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout and "step 6, 48 samples seen" in done.stdout

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    entries = [e for e in lines if "loss" in e]
    scores = [e for e in lines if "eval.clip_score" in e]
    assert len([e for e in lines if "goodput.effective" in e]) == 2 and "effective training time" in done.stdout
    assert [list(e) for e in scores] == [["step", "eval.clip_score"]] and scores[0]["step"] == 8
    assert np.isfinite(scores[0]["eval.clip_score"]) and (run / "evaluation" / "step_00000008.png").exists()
    assert [e["step"] for e in entries] == list(range(1, 13))
    assert [e["stage"] for e in entries] == ["small"] * 8 + ["large"] * 4
    wanted = {
        "step", "stage", "samples", "loss", "loss_flow", "loss_freq", "loss_repa", "grad_norm", "lr",
        "images_per_s", "mfu", "step_s", "data_wait_s", "memory_bytes", "skipped",
    }  # fmt: skip
    assert wanted <= entries[-1].keys() and entries[-1]["samples"] == 96
    assert all(np.isfinite(e["loss"]) and e["loss_repa"] is not None for e in entries)
    for step, side in ((6, 16), (12, 32)):
        with Image.open(run / "samples" / f"step_{step:08d}.png") as grid:
            scale = 96 // side
            assert grid.size == (3 * (side * scale + 2), side * scale + 14 + 2)
    for name in ("config.yaml", "log.txt", "curves.png", "wandb"):
        assert (run / name).exists()
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    # The last two, and what the run resumed from.
    assert kept == ["step_00000006", "step_00000008", "step_00000012"]
    written = "".join(p.read_text() for p in run.glob("*.*") if p.suffix in (".txt", ".yaml", ".jsonl"))
    assert s3_environment.environment["AWS_SECRET_ACCESS_KEY"] not in written + done.stdout + done.stderr

    made = []
    for batch in ("1", "3"):
        out = tmp_path / f"out{batch}"
        arguments = ["sample", "--checkpoint", str(run), "--prompt", "a red circle", "--prompt", "a"]
        assert main([*arguments, "--out", str(out), "--per-prompt", "2", "--batch", batch]) == 0
        records = [json.loads(line) for line in (out / "pictures.jsonl").read_text().splitlines()]
        assert [r["seed"] for r in records] == [0, 1, 0, 1] and (out / "grid.png").exists()
        made.append([np.asarray(Image.open(out / r["file"])).astype(int) for r in records])
    assert made[0][0].shape == (32, 32, 3)
    assert max(np.abs(a - b).max() for a, b in zip(*made, strict=True)) <= 1


def test_sampling_refuses_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["sample", "--checkpoint", str(tmp_path), "--prompt", "x", *out]) == 2
    assert "neither a complete checkpoint nor a run" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["python", "slurm"])
def test_other_launchers(launcher: str, tmp_path: Path, shards: Path, text_encoder: Path) -> None:
    config = tiny_config(tmp_path / "run", shards, text_encoder)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launcher" / "train.py"), "--config", str(path)]
    if launcher == "python":
        dry = subprocess.run([*command, "--dry-run"], env=environment, text=True, capture_output=True)
        assert dry.returncode == 0 and "rank 0: " in dry.stdout and "GiB" in dry.stdout, dry.stderr
        shown = subprocess.run([*command, "--print-config"], env=environment, text=True, capture_output=True)
        assert load_yaml(shown.stdout, "stdout")["model"]["dim"] == 32
        return
    # What srun sets for two tasks on one node.
    processes, port = [], str(free_port())
    for rank in ("0", "1"):
        slurm = {"SLURM_PROCID": rank, "SLURM_NTASKS": "2", "SLURM_LOCALID": rank}
        slurm |= {"SLURM_JOB_NODELIST": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen([*command, "stages.small.steps=100000"], env={**environment, **slurm}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )  # fmt: skip
    # What a scheduler sends to one of them before the time is up.
    metrics, run = tmp_path / "run" / "metrics.jsonl", tmp_path / "run"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGUSR1)
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [75, 75], outputs
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kinds = [e["kind"] for e in events]
    assert kinds[:2] == ["start", "first_step"] and kinds.count("stop_signal") == 1 and kinds[-1] == "end"
    # A checkpoint that was due in the steps until all ranks know may lie before the one of the stop.
    assert set(kinds[kinds.index("stop_signal") + 1 : -1]) == {"checkpoint"}
    assert events[0]["world_size"] == 2 and events[-1]["exit_code"] == 75
    last = RunDir(run).refresh().steps()[-1]["step"]
    assert events[-2]["step"] == last and (run / "checkpoints" / f"step_{last:08d}" / "COMPLETE").exists()
    assert main(["watch", str(run), "--once"]) == 0 and main(["report", str(run)]) == 0
    assert "stopped by SIGUSR1" in (run / "report.html").read_text()
