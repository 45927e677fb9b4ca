"""Initial weights that are the same for any number of ranks, without the full model in memory.

A template of the model on the meta device is walked unit by unit; a unit is an outermost module with
``reset_parameters``. Each unit is materialised alone, on the CPU, with random numbers seeded by (seed, name).
Stored tensors that share a parameter are drawn each by its own name.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deco_scale.models.stored_names import stored_names
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

    Within a unit, parents reset after their children and so may override them.
    """
    for path, unit in _units(template):
        names = stored_names(f"{path}.weight")
        if len(names) == 1:
            yield from _draw(unit, path, seed)
            continue
        assert isinstance(unit, nn.Linear) and unit.bias is None
        part = nn.Linear(unit.in_features, unit.out_features // len(names), bias=False, device="meta")
        drawn = [t for name in names for _, t in _draw(part, name.removesuffix(".weight"), seed)]
        yield f"{path}.weight", torch.cat(drawn)


def _draw(unit: nn.Module, path: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    real = copy.deepcopy(unit).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(derive_seed(seed, *path.encode()) >> 1)
        for module in reversed(list(real.modules())):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    for name, parameter in real.named_parameters():
        yield f"{path}.{name}", parameter.detach()
