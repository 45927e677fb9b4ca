"""CUDA graphs for functions of tensors without gradients: one launch instead of thousands. Not yet run on a GPU.

A sampler calls the model again and again with the same one or two shapes (with and without guidance), and a small
batch may compute faster than the host can launch its kernels. ``CudaGraphedVelocity(velocity_of(...), device)``
replaces a velocity; the model must be unsharded.

Not for training steps: FSDP gathers weights into newly allocated memory each time, but a graph needs fixed
addresses, and gradients accumulated in a graph's memory are overwritten by its next replay.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UPS = 3
"""Calls before the capture: libraries choose algorithms and allocate workspaces in the first ones."""


class _Capture(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class CudaGraphedVelocity:
    """Captures ``function`` once for each set of input shapes and types, then replays.

    The function must not read values on the host, and its weights must keep their addresses (their values may
    change). Graphs share one memory pool, so they must not run at the same time. Outputs are copies that later
    calls do not change. Raises ``ValueError`` if ``device`` is not a GPU.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, this process computes on {device.type}")
        self._function, self._device = function, device
        self._captures: dict[tuple[tuple[torch.Size, torch.dtype], ...], _Capture] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((value.shape, value.dtype) for value in inputs)
        capture = self._captures.get(key)
        if capture is None:
            capture = self._captures[key] = self._capture(inputs)
        for static, value in zip(capture.inputs, inputs, strict=True):
            static.copy_(value)
        capture.graph.replay()
        return capture.output.clone()

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Capture:
        static = [value.to(self._device).clone(memory_format=torch.contiguous_format) for value in inputs]
        here, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._function(*static)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._function(*static)
        return _Capture(graph, static, output)
