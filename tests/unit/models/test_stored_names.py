"""Gate and up of a SwiGLU: one parameter, two stored tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deco_scale.models.layers import SwiGLU
from deco_scale.models.stored_names import from_stored, part_of, stored_names, to_stored
from deco_scale.parallel.init_weights import initial_tensors
from deco_scale.parallel.tensor_parallel import tp_part
from deco_scale.seeding import derive_seed

DIM, HIDDEN, TP = 6, 8, 2


class Model(nn.Module):
    """An MLP at the path that it has in a denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": SwiGLU(DIM, HIDDEN)})])

    @property
    def mlp(self) -> nn.Module:
        return self.get_submodule("blocks.0.mlp")


def weights() -> dict[str, torch.Tensor]:
    shapes = {"gate": (HIDDEN, DIM), "up": (HIDDEN, DIM), "down": (DIM, HIDDEN)}
    return {f"blocks.0.mlp.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


def test_names() -> None:
    parts = stored_names("ema.blocks.1.mlp.gate_up.weight")
    assert parts == ("ema.blocks.1.mlp.gate.weight", "ema.blocks.1.mlp.up.weight")
    assert [part_of(part) for part in parts] == [("ema.blocks.1.mlp.gate_up.weight", i, 2) for i in range(2)]
    assert stored_names("blocks.1.mlp.down.weight") == ("blocks.1.mlp.down.weight",)
    assert part_of("blocks.1.mlp.down.weight") == ("blocks.1.mlp.down.weight", 0, 1)


@pytest.mark.parametrize("assign", [False, True])
def test_computes_with_the_stored_weights_and_returns_them(assign: bool) -> None:
    stored, x = weights(), torch.randn(3, DIM)
    gate, up, down = stored.values()
    model = Model()
    model.load_state_dict(stored, assign=assign)
    torch.testing.assert_close(model.mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    back = model.state_dict()
    assert list(back) == list(stored) and all(torch.equal(back[n], stored[n]) for n in stored)
    parameters = dict(model.named_parameters())
    assert to_stored(parameters).keys() == stored.keys()
    assert all(torch.equal(parameters[n], t) for n, t in from_stored(stored).items())


def test_a_missing_or_unknown_part_is_named() -> None:
    stored = weights()
    stored["blocks.0.mlp.other.weight"] = stored.pop("blocks.0.mlp.up.weight")
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*mlp.*Unexpected key.*mlp\.gate\.weight.*mlp\.other"):
        Model().load_state_dict(stored)


def test_initial_weights_are_drawn_by_stored_name() -> None:
    with torch.device("meta"):
        template = Model()
    drawn = to_stored(dict(initial_tensors(template, 5)))
    assert list(drawn) == list(weights())
    for name, found in drawn.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(5, *name.removesuffix(".weight").encode()) >> 1)
            wanted = nn.Linear(found.shape[1], found.shape[0], bias=False).weight
        assert torch.equal(found, wanted), name


def test_a_tensor_parallel_part_computes_its_units() -> None:
    stored, x = weights(), torch.randn(3, DIM)
    whole = from_stored(stored)
    total = torch.zeros(3, DIM)
    for rank in range(TP):
        own = SwiGLU(DIM, HIDDEN // TP)
        own.load_state_dict({n.rpartition("mlp.")[2]: tp_part(n, t, rank, TP) for n, t in whole.items()})
        slices = {n: tp_part(n, t, rank, TP) for n, t in stored.items()}
        assert all(torch.equal(own.state_dict()[n.rpartition("mlp.")[2]], t) for n, t in slices.items())
        total += own(x)
    model = Model()
    model.load_state_dict(stored)
    torch.testing.assert_close(total, model.mlp(x))
