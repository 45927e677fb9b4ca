"""What importing asks for, and what DeepSpeed is told before it settles on a device; in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

# A node has these where a setting asks for them; the GPU machine at hand lacks several.
ON_DEMAND = (
    "boto3", "botocore", "s3transfer", "wandb", "deepspeed", "megatron", "torchao", "transformer_engine",
    "flash_attn", "triton", "transformers", "gradio", "matplotlib", "pyarrow", "webdataset", "apprise",
)  # fmt: skip
MODULES = (
    "launcher.train",
    "launcher.build.trainer",
    "deco_scale.cli.main",
    "data_pipeline.tools.cli",
    "checkpoints_tools.cli",
)


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_entry_points_import_no_package_before_it_is_needed() -> None:
    program = """
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)
sys.meta_path.insert(0, Absent())
for module in sys.argv[2:]:
    importlib.import_module(module)
"""
    done = run(program, ",".join(ON_DEMAND), *MODULES)
    assert done.returncode == 0, done.stderr
    missing = run(program, "torch", *MODULES)
    assert missing.returncode and "torch is not installed here" in missing.stderr


# PyTorch says that there is a GPU, as on a GPU machine; nothing of it is used.
SHOWS_A_GPU = """
import os, sys, torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
from deco_scale.parallel.engines.deepspeed_config import import_deepspeed
"""


def test_deepspeed_computes_on_the_cpu_of_a_gpu_machine_where_device_is_cpu(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    program = (
        SHOWS_A_GPU
        + """
deepspeed = import_deepspeed(torch.device("cpu"))
print(deepspeed.accelerator.get_accelerator().device_name(), os.environ.get("DS_ACCELERATOR"))
"""
    )
    done = run(program, str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "cpu None"


def test_an_accelerator_that_does_not_fit_the_device_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    program = SHOWS_A_GPU + 'import_deepspeed(torch.device("cuda"))'
    done = run(program, str(tmp_path / "store"), DS_ACCELERATOR="cpu")
    assert done.returncode
    assert "device=cuda, but DeepSpeed has settled on cpu" in done.stderr and "DS_ACCELERATOR=cuda" in done.stderr
