"""The late marks for ``torch.compile`` do what PyTorch's own do, and leave its tracer unimported until then."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from deco_scale.models.compile import constant_in_graphs, outside_graphs
from tests.conftest import ROOT


def broken(mark: Callable[..., Any]) -> tuple[int, int, bool]:
    """Graphs of a call to a marked function, operations in them, and whether the function ran as it is."""
    traced = []

    def inner(x: Tensor) -> Tensor:
        traced.append(torch.compiler.is_compiling())
        return x.sin().cos()

    marked, counter = mark(inner), CompileCounter()
    torch._dynamo.reset()
    x = torch.randn(4)
    found = torch.compile(lambda x: marked(x + 1) * 2, backend=counter)(x)
    assert torch.equal(found, (x + 1).sin().cos() * 2)
    return counter.frame_count, counter.op_count, not any(traced)


def asked(mark: Callable[..., Any]) -> tuple[int, int]:
    """How often a marked function of a constant was asked by three calls of one graph, and the graphs."""
    times = []

    def answer(name: str) -> str:
        times.append(len(name))  # what a trace could not do
        return "negative"

    marked, counter = mark(answer), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: -x if marked("kernel") == "negative" else x, backend=counter, fullgraph=True
    )
    for _ in range(3):
        assert torch.equal(compiled(torch.ones(2)), -torch.ones(2))
    return len(times), counter.frame_count


def test_decorators_have_the_effect_of_pytorchs_own() -> None:
    assert broken(outside_graphs) == broken(torch.compiler.disable) == (2, 2, True)
    assert broken(lambda function: function)[0] == 1
    assert asked(constant_in_graphs) == asked(torch.compiler.assume_constant_result) == (1, 1)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(outside_graphs(lambda x: x + 1), backend="eager", fullgraph=True)(torch.ones(1))


def test_starting_the_trainer_imports_no_tracer() -> None:
    code = "import sys, launcher.train, deco_scale.cli.main; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
