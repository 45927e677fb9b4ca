"""Operators: the same results called at once and as registered operators, seen by whatever looks at operators."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deco_scale.kernels.triton.operators import operator


@operator("deco_scale_test::scaled")
def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


@scaled.register_fake
def _(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


@operator("deco_scale_test::scaled_backward")
def scaled_backward(grad: Tensor, factor: float) -> Tensor:
    return grad * factor


@scaled_backward.register_fake
def _(grad: Tensor, factor: float) -> Tensor:
    return torch.empty_like(grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.factor = inputs[1]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return scaled_backward(grad, ctx.factor), None


scaled.register_autograd(_gradients, setup_context=_save)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operator_and_an_eager_call_does_not_go_through_it() -> None:
    x = torch.ones(3, requires_grad=True)
    out = scaled(x, 2.0)
    assert type(out.grad_fn).__name__ == "LaunchBackward"
    out.sum().backward()
    with Seen() as seen:
        watched = scaled(x, 2.0)
        watched.sum().backward()
    assert torch.equal(out, watched) and torch.equal(x.grad, torch.full((3,), 4.0))
    ours = [name for name in seen.names if name.startswith("deco_scale_test::")]
    assert ours == ["deco_scale_test::scaled", "deco_scale_test::scaled_backward"]


def test_tensors_without_values_follow_the_shape_rule() -> None:
    assert scaled(torch.ones(3, device="meta"), 2.0).is_meta
    with FakeTensorMode():
        fake = torch.ones(3)
    assert type(scaled(fake, 2.0)) is type(fake)


def test_compiled_graphs_hold_the_operator() -> None:
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x = torch.ones(3)
    assert torch.equal(torch.compile(scaled, backend=backend, fullgraph=True)(x, 3.0), scaled(x, 3.0))
    assert names == ["deco_scale_test.scaled.default"]


def test_a_second_derivative_is_an_error_and_not_zero() -> None:
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad(scaled(x, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="scaled_backward"):
        grad.sum().backward()
