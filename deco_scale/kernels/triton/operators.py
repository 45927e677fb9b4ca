"""Operators for torch: a registered custom operator for tracers, an ``autograd.Function`` for eager calls.

A call through PyTorch's dispatcher to a custom operator costs the host about twice what an ``autograd.Function``
does (``python -m benchmarks.kernels --host``). The dispatcher is needed only where something looks at operators:
under ``torch.compile``, within a dispatch mode (``FakeTensorMode``, selective checkpointing, a counter), and for
tensors that have no values or are of another class. Everywhere else the launch code is called at once.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

R = TypeVar("R")
Gradients = Callable[..., tuple[Tensor | None, ...]]
SetupContext = Callable[[Any, tuple[Any, ...], Any], None]


class Operator(Generic[R]):
    """A function of tensors with launch code, a shape rule and, by :meth:`register_autograd`, a derivative.

    Arguments are positional and at least one is a tensor. Results are new tensors. Made by :func:`operator`.
    """

    def __init__(self, name: str, launch: Callable[..., R]) -> None:
        self._custom = torch.library.custom_op(name, launch, mutates_args=())
        namespace, _, short = name.partition("::")
        self._registered = getattr(getattr(torch.ops, namespace), short).default
        self._launch = launch
        # Without a derivative of its own it refuses to be differentiated, as a backward pass does twice.
        self._differentiable: Callable[..., R] = self._registered
        self.register_fake = self._custom.register_fake
        self.__doc__ = launch.__doc__

    def __call__(self, *args: Any) -> R:
        function = self._launch
        if is_dynamo_compiling() or _observed(args):
            function = self._registered
        elif torch.is_grad_enabled():
            function = self._differentiable
        return function(*args)

    def register_autograd(self, gradients: Gradients, *, setup_context: SetupContext) -> None:
        """Differentiate by ``gradients(ctx, *grads)``, as ``torch.library.register_autograd`` takes it; once."""
        self._custom.register_autograd(gradients, setup_context=setup_context)
        launch = self._launch

        class Launch(torch.autograd.Function):
            # With a setup_context of its own, apply() would bind arguments by their signature at every call.
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                result = launch(*args)
                setup_context(ctx, args, result)
                return result

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return gradients(ctx, *grads)

        self._differentiable = Launch.apply


def operator(name: str) -> Callable[[Callable[..., R]], Operator[R]]:
    """Register a function's launch code as the operator ``name``, as ``torch.library.custom_op`` does."""
    return lambda launch: Operator(name, launch)


def _observed(args: tuple[Any, ...]) -> bool:
    """Whether the call must be seen as an operator: a dispatch mode is on, or a tensor is not a plain one."""
    if torch._C._len_torch_dispatch_stack():
        return True
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is nn.Parameter:
            if x.is_meta:
                return True
        elif isinstance(x, Tensor):
            return True
    return False
