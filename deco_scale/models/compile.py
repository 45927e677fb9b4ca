"""Per-block ``torch.compile``: static shapes, no graph breaks. Also two decorators that do not import its tracer.

``torch.compiler.disable`` and ``assume_constant_result`` have the same effect on a traced call, but import the
tracer when they decorate, which would take 1.5 s of every process's start.
"""

import functools
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

logger = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Maximum of graphs per function: two kinds of block, with and without gradients, for each shape of a stage."""
STATIC_GRAPHS: dict[str, Any] = {"fullgraph": True, "dynamic": False}
"""Options of ``torch.compile``: a graph break is an error, and every shape has its own graph."""

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """A graph break: ``function`` and everything it calls run untraced, as with ``torch.compiler.disable``."""
    # PyTorch decorates its optimizers and checkpointing with it.
    return torch._disable_dynamo(function)  # type: ignore[return-value]


def constant_in_graphs(function: F) -> F:
    """Call ``function`` once while tracing, as with ``torch.compiler.assume_constant_result``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def compile_modules(modules: Iterable[nn.Module], *, fall_back: bool) -> None:
    """Compile the ``forward`` of each module, beneath the hooks that engines put on the module.

    Modules of one class share their graphs: one with gradients and one without for each shape. With ``fall_back``
    a function that cannot be compiled is logged, and all modules run eagerly from then on; else it is an error.
    """
    limit_recompiles()
    group = None
    if fall_back:
        import torch._functorch.config as functorch

        # A backward pass that cannot be compiled shows in forward, where eager code can still take its place.
        functorch.force_non_lazy_backward_lowering = True
        group = _Eager()
    for module in modules:
        compiled = torch.compile(module.forward, **STATIC_GRAPHS)
        if group is not None:
            compiled = group.unless_failed(compiled, module.forward)
        module.forward = compiled  # type: ignore[method-assign]


class _Eager:
    """Whether a group of compiled functions runs eagerly, because one of them could not be compiled."""

    failed = False

    def unless_failed(self, compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        errors = compile_errors()

        @functools.wraps(eager)
        def call(*args: Any) -> Any:
            if not self.failed:
                try:
                    return compiled(*args)
                except errors as error:
                    self.failed = True
                    logger.warning(
                        "compile=auto: blocks cannot be compiled here and run eagerly (%s); compile=true shows "
                        "the whole error, compile=false avoids the attempt",
                        short_reason(error),
                    )
            return eager(*args)

        return call


def compile_errors() -> tuple[type[Exception], ...]:
    """What a call of a compiled function raises where it cannot be compiled."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


def short_reason(error: Exception) -> str:
    """One of :func:`compile_errors` in a line, without the compiler's advice for debugging itself."""
    first, _, _ = str(error).partition("\n\n")
    return f"{type(error).__name__}: {' '.join(first.split())[:300]}"


def drop_graphs() -> None:
    """Forget all graphs, so that the shapes of a new stage start with fresh ones; free if nothing is compiled."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def limit_recompiles() -> None:
    """Make more than :data:`RECOMPILE_LIMIT` graphs of a function an error, in this thread from now on.

    By default PyTorch compiles 8 and runs the rest eagerly with one warning.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
