"""Compiled blocks share their graphs: 20 blocks have as many as 4, in bf16 and in FP8, and none runs eagerly."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.compile import RECOMPILE_LIMIT, limit_recompiles
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.parallel.activation_checkpoint import apply_activation_checkpointing
from deco_scale.precision import fp8
from deco_scale.precision.config import PrecisionConfig, autocast
from deco_scale.precision.fp8_plan import BatchShape, Fp8Plan, plan_fp8
from deco_scale.precision.recipe import Fp8Choice
from tests.unit.precision.test_transformer_engine import stand_in

pytestmark = pytest.mark.slow

__all__ = ["stand_in"]
CPU = torch.device("cpu")
CHOICES = {
    "bf16": None,
    "torchao": Fp8Choice("torchao", "current", emulate=True),
    "te": Fp8Choice("te", "current"),
}


class Graphs:
    """A backend of ``torch.compile`` that counts graphs and their calls, and runs them as they are."""

    def __init__(self) -> None:
        self.made = self.calls = 0

    def __call__(self, module: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        self.made += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return module.forward(*args)

        return run


@pytest.fixture(autouse=True)
def fresh_tracer() -> Iterator[None]:
    """No graphs of another test, and settings as they were."""
    torch._dynamo.reset()
    counters.clear()
    config: Any = torch._dynamo.config
    with config.patch(
        recompile_limit=config.recompile_limit, fail_on_recompile_limit_hit=config.fail_on_recompile_limit_hit
    ):
        limit_recompiles()
        yield
    torch._dynamo.reset()


class Run:
    """A denoiser whose blocks are compiled one by one, as the engines do it."""

    def __init__(
        self, kind: str, text_blocks: int, blocks: int, *, recompute: ActivationCheckpointing = "none"
    ) -> None:
        cfg = ModelConfig(
            kind="t2i_deco", dim=16, num_heads=2, num_blocks=blocks, num_text_blocks=text_blocks, patch_size=4,
            decoder_width=8, decoder_blocks=1, text_dim=16, text_tokens=8,
        )  # fmt: skip
        self.graphs = Graphs()
        self.model = Denoiser(cfg)
        self.plan: Fp8Plan | None = None
        choice = CHOICES[kind]
        if choice is not None:
            shapes = [BatchShape(batch=4, image_tokens=16, text_tokens=8)]
            settings = PrecisionConfig(compute="fp8")
            self.plan = plan_fp8(
                cfg, settings, choice, tp=1, batches=shapes, recompute=recompute, compile_blocks=True
            )
            assert len(self.plan.linears) == 4 * text_blocks + 5 * blocks
            fp8.apply_fp8(self.model, self.plan)
        apply_activation_checkpointing(
            self.model.transformer_blocks, recompute, function=fp8.checkpoint_function(self.plan)
        )
        for block in self.model.transformer_blocks:
            block.compile(backend=self.graphs)

    def __call__(self, batch: int, side: int, *, training: bool = True) -> None:
        patches = torch.randn(batch, side * side, self.model.cfg.patch_values)
        with torch.set_grad_enabled(training), autocast(PrecisionConfig(), CPU), fp8.fp8_context(self.plan):
            out = self.model(patches, torch.rand(batch), torch.randn(batch, 8, 16), grid=(side, side))
        if training:
            out.prediction_BNK.float().square().mean().backward()
        frames = counters["frames"]
        assert frames["ok"] == frames["total"], "a function is not compiled"


@pytest.mark.parametrize("kind", ["bf16", "torchao"])
def test_blocks_of_a_kind_share_one_graph(kind: str) -> None:
    """Of text and of images; each block's call is the call of a graph, also at another resolution."""
    run = Run(kind, 4, 16)
    for _ in range(2):
        run(4, 4)
    assert (run.graphs.made, run.graphs.calls) == (2, 2 * 20)
    assert not counters["graph_break"]
    # Another resolution: batch and tokens become symbols, tokens of text stay a number.
    run(2, 8)
    assert (run.graphs.made, run.graphs.calls) == (5, 3 * 20)
    # A third has no graph of its own.
    run(8, 6)
    assert (run.graphs.made, run.graphs.calls) == (5, 4 * 20)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_checkpointed_blocks_are_compiled(recompute: ActivationCheckpointing) -> None:
    few, many = (Run("bf16", *numbers, recompute=recompute) for numbers in ((2, 2), (4, 16)))
    for run in (few, many):
        torch._dynamo.reset()
        run(4, 4)
    assert few.graphs.made == many.graphs.made > 0
    assert many.graphs.calls >= 20


@pytest.mark.usefixtures("stand_in")
def test_blocks_with_transformer_engine_share_their_graphs() -> None:
    """Its linears are graph breaks: between them a block has several graphs, but no others than the next block."""
    few, many = (Run("te", *numbers) for numbers in ((2, 2), (4, 16)))
    for run in (few, many):
        torch._dynamo.reset()
        for _ in range(2):
            run(4, 4)
    assert few.graphs.made == many.graphs.made > 2
    assert many.graphs.calls > 2 * 20
    linears = [m for m in many.model.modules() if hasattr(m, "seen")]
    assert len(linears) == 4 * 4 + 5 * 16 and all(linear.seen == [True, True] for linear in linears)


@pytest.mark.long
def test_sampling_after_two_stages_stays_compiled() -> None:
    """PyTorch's own limit is 8 graphs of a function, and one warning; blocks share one ``forward``."""
    run = Run("bf16", 2, 2)
    for batch, side in ((4, 4), (2, 8)):
        run(batch, side)
    for batch, side in ((4, 4), (2, 8), (1, 8)):
        run(batch, side, training=False)
    assert run.graphs.made > 8
    assert run.graphs.calls == 5 * 4


class Outer(nn.Module):
    """Calls a module whose ``forward`` is another object in each instance, as that of the FP8 linears once was."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner.forward = functools.partial(nn.Identity.forward, self.inner)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


def test_too_many_graphs_are_an_error() -> None:
    graphs = Graphs()
    modules = [Outer() for _ in range(RECOMPILE_LIMIT + 1)]
    for module in modules:
        module.compile(backend=graphs)
    for module in modules[:-1]:
        module(torch.ones(2))
    with pytest.raises(FailOnRecompileLimitHit):
        modules[-1](torch.ones(2))
