"""Marks for ``torch.compile`` that leave its tracer unimported, which takes 1.5 s of every process that starts.

``torch.compiler.disable`` and ``assume_constant_result`` import it where they are written down. These do the same
to a traced call: a graph break, and a value that the graph holds.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

RECOMPILE_LIMIT = 64
"""Graphs of one function. Counted on a CPU over stages, buckets and sampling, FSDP2's blocks need 15."""

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """Run ``function`` and all that it calls untraced: ``torch.compiler.disable``, imported at the first call."""
    # PyTorch's own optimizers and checkpointing are marked with it, so the tracer knows it.
    return torch._disable_dynamo(function)  # type: ignore[return-value]


def constant_in_graphs(function: F) -> F:
    """Ask ``function`` once while tracing, as ``torch.compiler.assume_constant_result`` does."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def limit_recompiles() -> None:
    """Fail where a function would get more than :data:`RECOMPILE_LIMIT` graphs, in this thread from here on.

    By default PyTorch compiles 8 and runs the rest eagerly with one warning. All blocks of a model share one
    ``forward``, whose kinds of block, with and without gradients, at two stages' shapes, make more than 8.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
