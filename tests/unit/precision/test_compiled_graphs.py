"""Compiled blocks share their graphs: two for each kind of block and stage, in bf16 and in FP8, without breaks."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config as functorch_config
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch._dynamo.utils import counters

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.compile import RECOMPILE_LIMIT, compile_modules, drop_graphs, limit_recompiles
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
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend=self.graphs))
            compile_modules(self.model.transformer_blocks, fall_back=False)

    def __call__(self, batch: int, side: int, *, training: bool = True) -> None:
        patches = torch.randn(batch, side * side, self.model.cfg.patch_values)
        with torch.set_grad_enabled(training), autocast(PrecisionConfig(), CPU), fp8.fp8_context(self.plan):
            out = self.model(patches, torch.rand(batch), torch.randn(batch, 8, 16), grid=(side, side))
        if training:
            out.prediction_BNK.float().square().mean().backward()


@pytest.mark.parametrize("kind", ["bf16", "torchao", "te"])
def test_blocks_of_a_kind_share_two_graphs(kind: str, request: pytest.FixtureRequest) -> None:
    """Of text and of images, with and without gradients; each block's call is the call of a graph."""
    if kind == "te":
        request.getfixturevalue("stand_in")
    run = Run(kind, 4, 16)
    for _ in range(2):
        run(4, 4)
    assert (run.graphs.made, run.graphs.calls) == (2, 2 * 20)
    run(4, 4, training=False)
    assert (run.graphs.made, run.graphs.calls) == (4, 3 * 20)
    # A new stage: other shapes, as many graphs.
    drop_graphs()
    for training in (True, False, True):
        run(2, 8, training=training)
    assert (run.graphs.made, run.graphs.calls) == (8, 6 * 20)
    assert not counters["graph_break"]


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_checkpointed_blocks_share_their_graphs(recompute: ActivationCheckpointing) -> None:
    run = Run("bf16", 2, 4, recompute=recompute)
    run(4, 4)
    assert (run.graphs.made, run.graphs.calls) == (2, 6)


class Breaking(nn.Module):
    """Cannot be traced whole."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1


def test_what_cannot_be_compiled_is_an_error_or_runs_eagerly_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = Breaking()
    compile_modules([module], fall_back=False)
    with pytest.raises(Unsupported):
        module(torch.ones(2))
    modules = [Breaking(), Breaking()]
    compile_modules(modules, fall_back=True)
    for each in (*modules, *modules):
        assert torch.equal(each(torch.ones(2)), torch.full((2,), 2.0))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "compile=auto: blocks cannot be compiled here and run eagerly" in warnings[0]


def test_a_backward_pass_that_cannot_be_compiled_runs_eagerly_under_auto(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise ValueError("no compiler here")

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=broken)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    module = nn.Linear(2, 2)
    with functorch_config.patch(force_non_lazy_backward_lowering=False):
        compile_modules([module], fall_back=True)
        module(torch.ones(1, 2)).sum().backward()
    assert module.weight.grad is not None and "no compiler here" in caplog.text


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
