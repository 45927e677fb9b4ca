"""Decorators for ``torch.compile`` that do not import its tracer, which would take 1.5 s of every process's start.

``torch.compiler.disable`` and ``assume_constant_result`` have the same effect on a traced call, but import the
tracer when they decorate.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

RECOMPILE_LIMIT = 64
"""Maximum of graphs per function. Over stages, buckets and sampling, FSDP2's blocks need 15 (counted on a CPU)."""

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """A graph break: ``function`` and everything it calls run untraced, as with ``torch.compiler.disable``."""
    # PyTorch decorates its optimizers and checkpointing with it.
    return torch._disable_dynamo(function)  # type: ignore[return-value]


def constant_in_graphs(function: F) -> F:
    """Call ``function`` once while tracing, as with ``torch.compiler.assume_constant_result``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def limit_recompiles() -> None:
    """Make more than :data:`RECOMPILE_LIMIT` graphs of a function an error, in this thread from now on.

    By default PyTorch compiles 8 and runs the rest eagerly with one warning. All blocks of a model share one
    ``forward``, and two kinds of block, with and without gradients, at two stages' shapes need more than 8.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
