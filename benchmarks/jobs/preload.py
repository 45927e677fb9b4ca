"""What the fork server of the GPU suite loads once for all jobs: torch, its compiler and the product.

Nothing here may initialise CUDA, create tensors, or start threads or processes; Transformer Engine therefore does
not belong here. torch's compiler starts its workers with the first compilation, in the job.
"""

import importlib

import torch

MODULES = (
    "benchmarks.gpu.steps",
    "benchmarks.train.steps",
    "deco_scale.parallel.engines.fsdp",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.profiler",
)


def load() -> None:
    """Import :data:`MODULES`. Some ask at import whether there is a GPU: NVML answers, and never CUDA itself."""
    ask = torch.cuda.is_available
    # Where NVML has no answer, PyTorch's own function would ask CUDA, whatever the environment wants.
    torch.cuda.is_available = lambda: torch.cuda._device_count_nvml() > 0
    try:
        for module in MODULES:
            importlib.import_module(module)
    finally:
        torch.cuda.is_available = ask


load()
