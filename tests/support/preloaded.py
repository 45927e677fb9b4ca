"""What the processes of a group import, for the server that they are forked from.

Starting a process anew would import all of it again: 7 s of a CPU, for each of dozens of processes.
"""

# ruff: noqa: F401
import os

# A server of one thread is safe to fork from.
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed.runtime.zero.muon.muon_optimizer
import matplotlib.figure
import torch._dynamo
import torch.distributed.fsdp
from transformers import Dinov2Model, PreTrainedTokenizerFast, Qwen3Model

import deco_scale.parallel.engines.deepspeed
import deco_scale.parallel.engines.fsdp
import launcher.train
import tests.support.crash
