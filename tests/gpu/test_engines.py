"""Both engines on one GPU against the CPU. Not yet run on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.assets import tiny_config
from tests.distributed.harness import Job, run_jobs, trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU on this machine"),
]


@pytest.mark.parametrize(
    "parallel", [{"engine": "fsdp"}, {"engine": "deepspeed", "zero_stage": 3}], ids=["fsdp", "zero3"]
)
def test_bf16_on_a_gpu_learns_as_fp32_does_on_the_cpu(
    parallel: dict[str, Any], tmp_path: Path, shards: Path, text_encoder: Path
) -> None:
    def job(name: str, device: str, compute: str) -> Job:
        config = tiny_config(tmp_path / name, shards, text_encoder)
        config |= {"device": device, "parallel": parallel, "precision": {"compute": compute}}
        return Job(name, config)

    run_jobs([job("gpu", "cuda", "bf16")], 1, tmp_path)
    run_jobs([job("cpu", "cpu", "fp32")], 1, tmp_path)
    # Noise differs between devices, so traces agree in size only.
    means = [sum(loss for loss, _ in trace(tmp_path / n).values()) for n in ("gpu", "cpu")]
    assert means[0] == pytest.approx(means[1], rel=0.1)
