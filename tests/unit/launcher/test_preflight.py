"""Preflight finds what was planted, names the node, and finds nothing where nothing is wrong."""

import dataclasses
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.storage.base import open_store
from data_pipeline.storage.dev_server import S3Server
from deco_scale.config import build_config
from deco_scale.distributed.bootstrap import Environment, init_distributed
from deco_scale.errors import ConfigError, RunError
from deco_scale.models import Denoiser
from deco_scale.yaml import dump_yaml
from launcher.preflight import __main__ as preflight
from launcher.preflight.__main__ import check_all
from launcher.preflight.checks import check_config, check_versions, products_are_exact
from launcher.preflight.network import SIZES, check_clocks, check_collectives, estimate_offset, join_process_group
from launcher.preflight.report import Check, RankInfo, all_problems, check_same
from launcher.preflight.storage import check_data, check_storage, checkpoint_bytes, max_checkpoints
from tests.support.assets import tiny_config
from tests.support.ports import free_port
from tests.support.process_groups import in_group

pytestmark = pytest.mark.slow

RANKS = [RankInfo(0, 0, "node0"), RankInfo(1, 0, "node1")]
HALF_A_MINUTE = 30.5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Any]:
    # Preflight looks only whether the encoder is there.
    encoder = tmp_path_factory.mktemp("encoder")
    config = tiny_config(tmp_path_factory.mktemp("run") / "run", shards, encoder)
    config["device"] = "cpu"
    return config


# --- two processes that stand for two nodes ---


def two_nodes(raw: dict[str, Any], scratch: str) -> None:
    """All scenarios in one process group; rank 0 writes the problems of each."""
    rank = dist.get_rank()
    cfg, me = build_config(raw, source="two_nodes"), RANKS[rank]
    versions = {"torch": "2.13.0", "source": "abc"}
    found: dict[str, Sequence[Check]] = {}
    good = check_all(cfg, Environment(rank, 2, 0), host=me.host, versions=versions)
    other = versions if rank == 0 else {**versions, "torch": "2.12.1"}
    found["versions"] = check_versions(other, RANKS)
    differs = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, seed=4 + rank))
    found["config"] = check_config(differs, RANKS)
    odd = check_all(differs, Environment(rank, 2, 0), host=me.host, versions=other)
    now, late = time.time, HALF_A_MINUTE if rank == 1 else 0.0
    with mock.patch("time.time", lambda: now() + late):
        found["clock"] = check_clocks(RANKS, max_skew_s=1.0)
    with mock.patch.dict(SIZES, cpu=(4096,)):
        found["links"] = check_collectives(CPU, None, RANKS, min_gbps=1e6)
    with mock.patch("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000)):
        found["full"] = check_storage(cfg, RANKS)
    own = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dir=f"{scratch}/own{rank}"))
    with mock.patch("launcher.preflight.storage.SHARED_WAIT_S", 0.1):
        found["own folders"] = check_storage(own, RANKS)
    gone = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, url=f"{scratch}/nothing"))
    found["data"] = check_data(cfg if rank == 0 else gone, RANKS)
    same = f"{scratch}/file"
    Path(same).write_text("")
    blocked = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dir=f"{same}/run"))
    found["not a folder"] = check_storage(blocked, RANKS)
    problems = {name: all_problems({name: checks}) for name, checks in found.items()}
    problems |= {"good": all_problems(good), "config in all": all_problems(odd)}
    Path(scratch, f"rank{rank}.json").write_text(json.dumps({"problems": problems, "titles": list(good)}))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, raw: dict[str, Any]) -> dict[str, Any]:
    scratch = tmp_path_factory.mktemp("two_nodes")
    in_group(two_nodes, 2, scratch, raw, str(scratch))
    told = [json.loads((scratch / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    # Every rank knows the verdict: none would start to train alone.
    judged = [{name: bool(problems) for name, problems in each["problems"].items()} for each in told]
    assert judged[0] == judged[1]
    assert told[0]["problems"]["config in all"] == told[1]["problems"]["config in all"]
    return told[0]


def test_a_healthy_cluster_has_no_findings(found: dict[str, Any]) -> None:
    assert found["problems"]["good"] == []
    assert found["titles"] == [
        "versions", "configuration", "devices", "collectives", "clocks", "storage", "data",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "parts"),
    [
        ("versions", ["rank 1 on node1", "torch is 2.12.1", "elsewhere 2.13.0", "install"]),
        ("config", ["rank 1 on node1", "digest", "same --config"]),
        ("clock", ["rank 1 on node1", "+30.", "rank 0's on node0", "time service"]),
        ("links", ["rank 0 on node0 to rank 1 on node1", "--min-gbps"]),
        ("full", ["rank 0 on node0", "0.000 GiB are free", "make room"]),
        ("own folders", ["rank 1 on node1", "shared file system"]),
    ],
)
def test_a_planted_fault_is_detected_and_its_node_named(
    found: dict[str, Any], planted: str, parts: list[str]
) -> None:
    (problem,) = found["problems"][planted]
    for part in parts:
        assert part in problem


def test_data_that_one_node_does_not_see(found: dict[str, Any]) -> None:
    problems = found["problems"]["data"]
    assert problems and all("rank 1 on node1" in p or "missing" in p for p in problems)
    assert any("nothing" in p for p in problems)


def test_a_run_folder_that_cannot_be_made_is_named_for_each_node(found: dict[str, Any]) -> None:
    problems = found["problems"]["not a folder"]
    for rank in RANKS:
        assert any(str(rank) in p and "run.dir" in p for p in problems)


def test_several_faults_are_reported_at_once(found: dict[str, Any]) -> None:
    problems = found["problems"]["config in all"]
    assert any("torch is 2.12.1" in p for p in problems) and any("digest" in p for p in problems)


# --- one process ---


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def command(tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """``launcher/preflight.py`` in this process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # Set first, so that what start_processes sets is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_yaml(raw))

    def run(*arguments: str) -> int:
        try:
            return preflight.main(["--config", str(path), f"run.dir={tmp_path}/run", *arguments])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    yield run


def test_the_command_prints_logs_and_leaves_nothing_behind(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command() == 0
    log = (tmp_path / "run" / "preflight.log").read_text()
    for title in ("versions", "configuration", "devices", "collectives", "clocks", "storage", "data"):
        assert f" {title}: " in log and title in capsys.readouterr().out + log
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preflight.log"]


def test_exit_codes(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"data.url={tmp_path}/none") == 1
    told = capsys.readouterr().err
    assert f"rank 0 on {socket.gethostname()}" in told and f"{tmp_path}/none" in told
    assert "refused" in (tmp_path / "run" / "preflight.log").read_text()
    assert command("no.such=1") == 2
    assert socket.gethostname() in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command("--max-skew-s", "0")
    assert "--max-skew-s" in capsys.readouterr().err


def test_checkpoints_in_an_object_store_are_tried(
    alone: None, raw: dict[str, Any], s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_environment.create_bucket("preflight")
    me, url = [RankInfo(0, 0, "node0")], "s3://preflight/runs"
    cfg = build_config({**raw, "checkpoint": {**raw["checkpoint"], "url": url}}, source="s3")
    assert all_problems({"storage": check_storage(cfg, me)}) == []
    assert list(open_store(url).list()) == []
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    (problem,) = all_problems({"storage": check_storage(cfg, me)})
    assert "rank 0 on node0" in problem and "preflight" in problem and "AWS settings" in problem
    assert s3_environment.environment["AWS_SECRET_ACCESS_KEY"] not in problem


def test_ranks_that_do_not_join_are_named() -> None:
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.raises(RunError, match="2 of 3 ranks did not join within 0 s: 1, 2; joined: 1 on node0"):
        join_process_group(Environment(0, 3, 0), variables, timeout_s=0.3, host="node0")
    assert not dist.is_initialized()


# --- the formulas ---


def test_the_state_of_a_checkpoint_is_counted_right(raw: dict[str, Any]) -> None:
    cfg = build_config(raw, source="tiny")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Denoiser(cfg.model).parameters())
    assert checkpoint_bytes(cfg)[0] == 16 * parameters


def test_how_many_checkpoints_may_lie_there(raw: dict[str, Any]) -> None:
    def most(**settings: Any) -> tuple[int, int]:
        return max_checkpoints(build_config({**raw, "checkpoint": {"every": 1, **settings}}, source="tiny"))

    # 12 steps; beside what is kept the one that is written and the one that the run went on from.
    assert most(keep_last=2) == (4, 0)
    assert most(keep_last=2, keep_every=4, keep_best={"count": 2}) == (9, 0)
    assert most(keep_last=100) == (12, 0)
    assert most(keep_last=2, url="s3://b/x", ema_every=5, ema_steps=(1,)) == (1, 3)


@given(
    offset=st.floats(-1e3, 1e3),
    ways=st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=9),
)
def test_the_estimate_of_a_clock_is_within_its_uncertainty(offset: float, ways: list[tuple[float, float]]) -> None:
    pings = [(t := 10.0 * i, t + there + offset, t + there + back) for i, (there, back) in enumerate(ways)]
    found = estimate_offset(pings)
    assert abs(found.seconds - offset) <= found.uncertainty + 1e-9
    assert found.uncertainty <= min(there + back for there, back in ways) / 2 + 1e-9


def test_the_mismatching_ranks_are_named_not_the_majority() -> None:
    ranks = [RankInfo(rank, 0, f"n{rank}") for rank in range(4)]
    facts = [{"a": "2"}, {"a": "1"}, {"a": "1"}, {"a": "1"}]
    (check,) = check_same(facts, ranks, advice="mend it")
    assert check.value == "1"
    assert check.problems == ["rank 0 on n0: a is 2, elsewhere 1; mend it"]
    (check,) = check_same([*facts[1:], {}], ranks, advice="mend it")
    assert "rank 3 on n3: a is missing" in check.problems[0]


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products_are_exact(CPU)
    right = torch.Tensor.__matmul__

    def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        result = right(a, b)
        if a.dtype == torch.float32:
            result[3, 5] += 1
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert not products_are_exact(CPU)


def test_torchrun_with_restarts_and_one_store_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps what earlier attempts wrote into it."""
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        init_distributed(Environment(0, 1, 0), torch.device("cpu"))
