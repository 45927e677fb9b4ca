"""What the fork server of the GPU suite loads once for all jobs: torch, its compiler and the product.

Nothing here may touch a GPU, create tensors, or start threads or processes; Transformer Engine therefore does
not belong here. torch's compiler starts its workers with the first compilation, in the job.
"""

import importlib

import torch

for _module in (
    "benchmarks.gpu_steps",
    "benchmarks.steps",
    "deco_scale.parallel.fsdp",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.profiler",
):
    importlib.import_module(_module)

assert not torch.cuda.is_initialized(), "loading the product initialised CUDA: forked jobs could not use the GPU"
