"""What the fork server of the GPU suite loads once for all jobs: torch and the product. Must not touch a GPU.

Only modules whose import creates no tensors, starts no threads or processes and asks no driver belong here;
Transformer Engine and torch's compiler (it starts workers) do not.
"""

import importlib

import torch

for _module in ("benchmarks.steps", "deco_scale.parallel.fsdp", "deco_scale.training.optimizer"):
    importlib.import_module(_module)

assert not torch.cuda.is_initialized(), "loading the product initialised CUDA: forked jobs could not use the GPU"
