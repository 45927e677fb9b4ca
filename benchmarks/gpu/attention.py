"""The race of attention kernels at the XXL's shapes: run once in a call of the GPU suite, read by its other jobs.

No GPU has run it yet.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from benchmarks.gpu.sizes import TINY_SIDE, XXL, overrides_of
from benchmarks.jobs.runner import CheckFailed, Found, Where
from benchmarks.measure import gpu_lost
from deco_scale.config import load_config
from deco_scale.models.attention.autotune import (
    RACED,
    AttentionShape,
    BackendChoice,
    choose_backend,
    model_shapes,
    preferred,
)
from deco_scale.models.attention.backends import graph_break
from deco_scale.models.attention.dispatch import KERNELS, is_hopper, kernel_missing

OF_PYTORCH = ("sdpa", "cudnn", "flash_torch")
"""Attention kernels that need no other package."""


def attention(where: Where, *, sizes: Sequence[tuple[int, int]]) -> Found:
    """Every attention kernel that can run here against the formula, and its time, for (resolution, micro-batch).

    Later jobs take the fastest of each shape that keeps a compiled block's graph whole. PyTorch's own kernels come
    first, a package is imported when its turn comes, and each figure is on disk at once: a package may end the
    process. Raises :class:`CheckFailed` where a kernel is wrong or raises.
    """
    device, dtype = torch.device(where.device), torch.bfloat16 if where.device == "cuda" else torch.float32
    model = load_config(XXL, overrides_of(where)).model
    shapes: list[AttentionShape] = []
    for resolution, micro_batch in sizes:
        side, batch = (TINY_SIDE[resolution], 2) if where.quick else (resolution, micro_batch)
        shapes += model_shapes(model, resolution=side, batch=batch)
    times: dict[AttentionShape, dict[str, float]] = {}
    missing: dict[str, str] = {}
    wrong: list[str] = []
    for name in sorted(RACED, key=lambda name: name not in OF_PYTORCH):
        reason = kernel_missing(name, device, dtype, model.head_dim)  # type: ignore[arg-type]
        if reason is not None:
            missing[name] = reason
            where.write("missing", missing)
            continue
        for shape in shapes:
            try:
                choice = choose_backend(shape, device=device, dtype=dtype, candidates={name: KERNELS[name]})
            except ValueError as error:
                wrong.append(str(error))
                print(wrong[-1], flush=True)
                if lost := gpu_lost(device):
                    raise CheckFailed(f"{wrong[-1]}; the GPU answers no more ({lost})") from error
                continue
            times.setdefault(shape, {}).update(choice.times_ms)
            found = {
                "choices": [dataclasses.asdict(choice) for choice in _ranked(times, hopper=is_hopper(device))]
            }
            where.write("choices", found)
    lines = [choice.line() for choice in _ranked(times, hopper=is_hopper(device))]
    if wrong or not lines:
        raise CheckFailed("; ".join([*wrong, *lines]) or f"no attention kernel can run here: {missing}")
    return Found("; ".join(lines), {"missing": missing})


def _ranked(times: Mapping[AttentionShape, Mapping[str, float]], *, hopper: bool) -> list[BackendChoice]:
    """All times of each shape so far, and what a run with compiled blocks, as most jobs have, would select."""
    choices = []
    for shape, of in times.items():
        whole = {name: ms for name, ms in of.items() if graph_break(name) is None} or of
        ranked = tuple(sorted(of.items(), key=lambda item: item[1]))
        choices.append(BackendChoice(shape, preferred(whole, hopper=hopper), ranked))
    return choices


def raced_attention(where: Where) -> list[BackendChoice]:
    """What the attention job of this suite chose; empty where it did not, see :func:`attention_overrides`."""
    found = where.parts_of("attention").get("choices", {"choices": []})
    return [
        BackendChoice(AttentionShape(**choice["shape"]), choice["kernel"], tuple(map(tuple, choice["times_ms"])))
        for choice in found["choices"]
    ]


def attention_overrides(where: Where) -> list[str]:
    """Settings of attention: the configuration's, or ``sdpa`` where the race of this suite broke off.

    Each later job would run into the same otherwise. Where no race was run a job races by itself.
    """
    if raced_attention(where) or not (where.out.parent / "attention.log").exists():
        return []
    print("the race of attention kernels left no choice, see attention.log: this job takes sdpa", flush=True)
    return ["attention.backend=sdpa"]
