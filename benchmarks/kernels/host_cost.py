"""What calling an operator costs the host, forward and backward, whose kernels do nothing.

The same launch code as a custom operator of torch, as an ``autograd.Function`` and as the product's operators
(:mod:`deco_scale.kernels.triton.operators`), in turn in one run on one CPU thread. Only ratios mean anything.
"""

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.measure import medians_s
from deco_scale.kernels.triton.operators import operator

CALLS, REPEATS = 20, 200
CUSTOM, FUNCTION, OURS = "torch.library.custom_op", "autograd.Function", "deco_scale operator"


def _launch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _launch_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _save(ctx, args, args[0])
        return _launch(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return *_launch_backward(grads[0], x, weight, ctx.eps), None


def _registered(register: Callable[[str], Callable[[Callable[..., Any]], Any]], name: str) -> Callable[..., Any]:
    """The launch code registered by torch's decorator or the product's."""
    forward = register(f"deco_scale_benchmark::{name}")(_launch)
    backward = register(f"deco_scale_benchmark::{name}_backward")(_launch_backward)

    def gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *backward(grad, *ctx.saved_tensors, ctx.eps), None

    forward.register_autograd(gradients, setup_context=_save)
    return forward  # type: ignore[no-any-return]


def measure() -> dict[str, float]:
    """Median microseconds of a forward and a backward pass."""
    by_torch = _registered(lambda name: torch.library.custom_op(name, mutates_args=()), "by_torch")
    functions = {CUSTOM: by_torch, FUNCTION: _Function.apply, OURS: _registered(operator, "by_product")}
    x, weight, seed = (
        torch.ones(2, 4, 8, requires_grad=True),
        torch.ones(8, requires_grad=True),
        torch.ones(2, 4, 8),
    )

    def many(function: Callable[..., Tensor]) -> Callable[[], None]:
        def action() -> None:
            for _ in range(CALLS):
                torch.autograd.grad(function(x, weight, 1e-6), (x, weight), seed)

        return action

    actions = {name: many(function) for name, function in functions.items()}
    found = medians_s(actions, repeats=REPEATS, device=torch.device("cpu"))
    return {name: 1e6 * seconds / CALLS for name, seconds in found.items()}


def main(console: Console) -> int:
    """Show microseconds of each, and how many times the cheapest that is."""
    found = measure()
    for name, microseconds in found.items():
        ratio = microseconds / found[FUNCTION]
        console.print(
            f"{name:24} {microseconds:7.1f} us forward and backward, {ratio:.2f} times {FUNCTION}", soft_wrap=True
        )
    return 0
