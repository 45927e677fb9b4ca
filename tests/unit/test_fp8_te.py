"""The wiring of Transformer Engine by a stand-in: what is asked of it, not what it computes."""

import pickle
import sys
import types
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deco_scale.errors import ConfigError
from deco_scale.precision import fp8
from deco_scale.precision.choice import Fp8Choice
from deco_scale.precision.scaling import unmatched_scaling
from tests.unit.test_fp8 import denoiser, inputs, plan_of


class _Recipe:
    """Of the stand-in; pickled with the state, as the real ones are."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.fp8_format = types.SimpleNamespace(value=types.SimpleNamespace(max_fwd=448.0, max_bwd=57344.0))


class _Linear(nn.Module):
    """A plain linear with the constructor and the extra state of ``te.Linear``."""

    active: list[Any] = []

    def __init__(self, inputs: int, outputs: int, *, bias: bool, params_dtype: torch.dtype, device: str) -> None:
        super().__init__()
        assert device == "meta" and params_dtype == torch.float32
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device))
        # Without a bias the real one has an empty tensor, not None.
        self.bias = nn.Parameter(torch.empty(outputs, device=device)) if bias else torch.empty(0)
        self.scaling: dict[str, Any] = {}
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(bool(self.active))
        return nn.functional.linear(x, self.weight, self.bias if self.bias.numel() else None)

    def get_extra_state(self) -> Tensor:
        if not self.scaling:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps(self.scaling)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.scaling = pickle.loads(state.numpy().tobytes())  # noqa: S301 - made by this process


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module tree called ``transformer_engine``."""

    @contextmanager
    def context(*, enabled: bool, recipe: Any) -> Any:
        assert enabled
        _Linear.active.append(recipe)
        yield
        _Linear.active.pop()

    package, te, common, recipes = (
        types.ModuleType(n) for n in ("transformer_engine", "pytorch", "common", "recipe")
    )
    te.Linear, te.autocast, te.checkpoint = _Linear, context, object()  # type: ignore[attr-defined]
    for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"):
        setattr(recipes, name, _Recipe)
    package.pytorch, package.common, common.recipe = te, common, recipes  # type: ignore[attr-defined]
    for path, module in (("", package), (".pytorch", te), (".common", common), (".common.recipe", recipes)):
        monkeypatch.setitem(sys.modules, f"transformer_engine{path}", module)
    return te


def test_transformer_engine_linears_take_over_the_parameters(stand_in: types.ModuleType) -> None:
    model, plain = denoiser(), denoiser()
    before = dict(model.named_parameters())
    plan = plan_of(Fp8Choice("te", "current"))
    fp8.apply_fp8(model, plan)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[n] is before[n] for n in before)
    assert fp8.recompute_function(plan) is stand_in.checkpoint  # type: ignore[attr-defined]
    assert fp8.scaling_state(model, plan) == {}
    with fp8.fp8_context(plan):
        found = model(*inputs(), grid=(2, 2)).prediction_BNK
    assert torch.equal(found, plain(*inputs(), grid=(2, 2)).prediction_BNK)
    with torch.no_grad():
        model(*inputs(), grid=(2, 2))
    linears = [m for m in model.modules() if isinstance(m, _Linear)]
    assert len(linears) == 17 and all(m.seen == [True] for m in linears)


def test_delayed_scaling_is_part_of_a_checkpoint(stand_in: types.ModuleType) -> None:
    plan = plan_of(Fp8Choice("te", "delayed"))
    model, resumed = denoiser(), denoiser()
    for m in (model, resumed):
        fp8.apply_fp8(m, plan)
    fresh = fp8.scaling_state(model, plan)
    assert len(fresh) == 4 * 17 and {t.dtype for t in fresh.values()} == {torch.float32}
    assert fresh["fp8.denoiser.blocks.0.attn.qkv.amax_history_fwd"].shape == (1024, 3)
    generator = torch.Generator().manual_seed(4)
    state = {n: torch.rand(t.shape, generator=generator) for n, t in fresh.items()}
    fp8.load_scaling_state(resumed, plan, state)
    found = fp8.scaling_state(resumed, plan)
    assert found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)
    # One linear's tensors are missing: it alone starts afresh.
    part = {n: t for n, t in state.items() if "blocks.1.mlp.up" not in n}
    fp8.load_scaling_state(model, plan, part)
    again = fp8.scaling_state(model, plan)
    assert all(torch.equal(again[n], part.get(n, fresh[n])) for n in state)


def test_scaling_that_only_one_side_has_is_passed_over_aloud() -> None:
    model = {"model.denoiser.blocks.0.attn.qkv.weight": (96, 32)}
    scaling = {f"fp8.denoiser.blocks.0.attn.qkv.{kind}": (3,) for kind in ("scale_fwd", "scale_bwd")}
    assert unmatched_scaling(model | scaling, model | scaling) == (set(), [])
    names, lines = unmatched_scaling(model, model | scaling)
    assert names == set(scaling) and "1 linears start with fresh scaling" in lines[0]
    names, lines = unmatched_scaling(model | scaling, {})
    assert names == set(scaling) and "of 1 linears is not used" in lines[0]


def test_what_transformer_engine_cannot_be_combined_with() -> None:
    te = Fp8Choice("te", "current")
    with pytest.raises(ConfigError, match="selective does not see.*possible: none, full"):
        plan_of(te, recompute="selective")
    with pytest.raises(ConfigError, match="compile=true.*possible: compile=false"):
        plan_of(te, recompute="full", compiled=True)
    assert plan_of(te, recompute="full").linears and plan_of(te, compiled=True).linears


def test_a_broken_transformer_engine_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ConfigError, match=r"cannot be imported.*pip install"):
        fp8.apply_fp8(denoiser(), plan_of(Fp8Choice("te", "current")))
