"""Initial weights without the whole model in memory, the same for any number of ranks.

A template of the model on the meta device is walked unit by unit; a unit is the outermost module that
defines its own start (``reset_parameters``). Each is materialised alone on the CPU under a generator keyed
by (seed, name) and handed out tensor by tensor.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deco_scale.seeding import derive_seed


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if hasattr(child, "reset_parameters"):
            yield path, child
        else:
            yield from _units(child, f"{path}.")


def initial_tensors(template: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Name and full CPU tensor of every parameter; peak memory is that of the largest unit.

    Within a unit, children reset before their parents, so that a parent's rule for its children wins.
    """
    for path, unit in _units(template):
        real = copy.deepcopy(unit).to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(derive_seed(seed, *path.encode()) >> 1)
            for module in reversed(list(real.modules())):
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
        for name, parameter in real.named_parameters():
            yield f"{path}.{name}", parameter.detach()
