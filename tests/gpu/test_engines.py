"""Both engines train on one GPU as FSDP2 does on the CPU. Not yet run on a GPU.

Each run is a process of its own, and joins the process group that a run joins: NCCL beside gloo on a GPU. The run
on the CPU is FSDP2's for both: DeepSpeed would take the GPU there.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.assets import tiny_config
from tests.support.process_groups import trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU on this machine"),
]

GPU = "cuda"


def _train(rank: int, config: dict[str, Any]) -> None:
    from deco_scale.config import build_config
    from deco_scale.distributed.bootstrap import Environment
    from launcher.train import run

    run(build_config(config, source="test"), Environment(rank, 1, 0), resume="none")
    dist.destroy_process_group()


def losses(folder: Path, shards: Path, text_encoder: Path, **sections: Any) -> dict[int, float]:
    """Losses by step of a run with these settings."""
    config = tiny_config(folder, shards, text_encoder) | sections
    mp.start_processes(_train, args=(config,), nprocs=1, start_method="spawn")
    return {step: loss for step, (loss, _) in trace(folder).items()}


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory, shards: Path, text_encoder: Path) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("cpu") / "run"
    return losses(folder, shards, text_encoder, device="cpu", parallel={"engine": "fsdp"})


@pytest.mark.parametrize(
    "parallel", [{"engine": "fsdp"}, {"engine": "deepspeed", "zero_stage": 3}], ids=["fsdp", "zero3"]
)
def test_bf16_on_a_gpu_learns_as_fp32_does_on_the_cpu(
    parallel: dict[str, Any], tmp_path: Path, shards: Path, text_encoder: Path, on_the_cpu: dict[int, float]
) -> None:
    sections = {"device": GPU, "parallel": parallel, "precision": {"compute": "bf16"}}
    on_the_gpu = losses(tmp_path / "run", shards, text_encoder, **sections)
    assert on_the_gpu.keys() == on_the_cpu.keys()
    # Noise differs between devices: four seeds on a CPU are within 0.5 %, and bf16 rounds by 0.4 %.
    assert sum(on_the_gpu.values()) == pytest.approx(sum(on_the_cpu.values()), rel=0.03)
