"""What machine a call of the GPU suite ran on; on one without a GPU everything after it is not available."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from benchmarks.jobs.runner import Found, Where
from benchmarks.measure import device_name

PACKAGES = ("triton", "transformers", "transformer_engine", "torchao", "deepspeed", "megatron-core", "numpy")


def machine(where: Where) -> Found:
    """Name and memory of the device, and the versions of what the jobs use."""
    device = torch.device(where.device)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    numbers: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": versions,
    }
    line = f"{numbers['device']}, torch {torch.__version__}, Python {numbers['python']}, {numbers['cores']} cores"
    if where.device == "cuda":
        properties = torch.cuda.get_device_properties(device)
        numbers["memory_bytes"], numbers["free_bytes"] = properties.total_memory, torch.cuda.mem_get_info()[0]
        numbers["capability"] = list(torch.cuda.get_device_capability(device))
        line += f", {properties.total_memory / 2**30:.0f} GiB"
        # The first product loads cuBLAS, and shows that a forked process can use the GPU.
        side = torch.ones(256, 256, device=device, dtype=torch.bfloat16)
        numbers["product"] = (side @ side).float().mean().item()
    return Found(line, numbers)
