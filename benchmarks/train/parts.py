"""Time of a training step by part of the model: marks on the device's timeline, set by hooks.

A mark says "from here on, time belongs to this part". In forward the hooks of a module set it; in backward the
gradients of its output and of its input do, so that recomputed activations count for the part they belong to.
Work of a GPU is timed by events in its stream; host time that the GPU does not wait for is in no part.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Stopwatch, synchronise
from deco_scale.objectives import Objective

PARTS = (
    "inputs",
    "patch embed",
    "text",
    "attention",
    "MLP",
    "modulation",
    "norms and gates",
    "decoder",
    "losses",
    "optimizer",
    "other",
)
"""``text`` is text embedder and text blocks; ``other`` is time embedding, noising and what lies between parts."""
COMPILED = "blocks"
"""Attention, MLP, modulation, norms and gates of the image blocks together, where they are compiled."""


class Timeline:
    """Marks of one step after another, and how long each part took."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._watch = device, Stopwatch(device)
        self._marks: list[tuple[str, Any]] = []
        self._steps: list[dict[str, float]] = []

    def mark(self, part: str) -> None:
        """From here on, time belongs to ``part``."""
        self._marks.append((part, self._watch.mark()))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step; what is not marked otherwise is ``other``."""
        synchronise(self._device)
        self._marks.clear()
        self.mark("other")
        yield
        self.mark("")
        synchronise(self._device)
        parts: dict[str, float] = {}
        for (part, began), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            parts[part] = parts.get(part, 0.0) + self._watch.seconds(began, ended)
        self._steps.append(parts)

    def medians(self) -> dict[str, float]:
        """Median seconds of each part over the steps so far; parts without time are left out."""
        names = [n for n in (*PARTS, COMPILED) if any(n in step for step in self._steps)]
        return {n: statistics.median(step.get(n, 0.0) for step in self._steps) for n in names}


class _Boundary(torch.autograd.Function):
    """The identity; when its gradient comes by, a mark is set."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, passed: Callable[[], None]) -> Tensor:
        ctx.passed = passed
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.passed()
        return grads[0], None


def watch(objective: Objective, timeline: Timeline) -> None:
    """Hook a plain or sharded objective's parts into ``timeline``; hooks stay for the objective's life."""
    denoiser = objective.denoiser
    _watch(denoiser, timeline, "other", outside="losses")
    _watch(denoiser.patch_embed, timeline, "patch embed", outside="other")
    if denoiser.text_embed is not None:
        _watch(denoiser.text_embed, timeline, "text", outside="other")
    for block in denoiser.text_blocks:
        _watch(block, timeline, "text", outside="other")
    for block in denoiser.blocks:
        if getattr(block, "_compiled_call_impl", None) is not None or _compiled_inside(block):
            _watch(block, timeline, COMPILED, outside="other")
            continue
        _watch(block, timeline, "norms and gates", outside="other")
        for name, part in (("attn", "attention"), ("mlp", "MLP"), ("modulation", "modulation")):
            _watch(getattr(block, name), timeline, part, outside="norms and gates")
    output = denoiser.decoder if denoiser.decoder is not None else denoiser.final
    assert output is not None
    _watch(output, timeline, "decoder", outside="other")


def _compiled_inside(block: nn.Module) -> bool:
    """Whether tensor parallelism compiled the block's own forward behind its outer one."""
    forward = getattr(block.forward, "args", ())
    return any(hasattr(argument, "_torchdynamo_orig_callable") for argument in forward)


def _watch(module: nn.Module, timeline: Timeline, part: str, *, outside: str) -> None:
    """Time inside ``module`` is ``part``, right outside of it ``outside``, in forward and in backward."""

    def enter(args: Sequence[Any]) -> tuple[Any, ...]:
        timeline.mark(part)
        inputs = list(args)
        for index, value in enumerate(inputs):
            # One is enough: the decoder's is the tokens, everywhere else it is the first.
            if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                inputs[index] = _Boundary.apply(value, lambda: timeline.mark(outside))
                break
        return tuple(inputs)

    def leave(output: Any) -> Any:
        timeline.mark(outside)
        if isinstance(output, Tensor) and output.requires_grad:
            return _Boundary.apply(output, lambda: timeline.mark(part))
        if isinstance(output, tuple) and isinstance(output[0], Tensor) and output[0].requires_grad:
            first = _Boundary.apply(output[0], lambda: timeline.mark(part))
            return output._replace(prediction_BNK=first) if hasattr(output, "_replace") else (first, *output[1:])
        return output

    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:
        # Its hooks would be compiled with it.
        module._compiled_call_impl = lambda *args, **options: leave(compiled(*enter(args), **options))
        return
    # Before an engine's own hooks: gathering a module's weights is the module's time.
    module.register_forward_pre_hook(lambda m, args: enter(args), prepend=True)
    module.register_forward_hook(lambda m, args, output: leave(output))
