"""SwiGLU: the torch twin against the formula, the Triton kernel against the twin."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deco_scale.kernels.select import Kernels
from deco_scale.kernels.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of each number: torch rounds twice, the kernel once; the interpreter cuts bf16 instead of rounding.
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def outputs(gate_up: Tensor, kernels: Kernels) -> list[Tensor]:
    leaf = gate_up.detach().requires_grad_()
    out = swiglu(leaf, kernels=kernels)
    seed = torch.arange(out.numel(), device=DEVICE).remainder(5).sub(2).reshape(out.shape).to(out.dtype)
    out.backward(seed)
    assert leaf.grad is not None and out.dtype == leaf.grad.dtype == gate_up.dtype
    return [out.detach(), leaf.grad]


def test_halves_are_gate_and_up() -> None:
    gate_up = random(2, 3, 10).double().requires_grad_()
    wanted = F.silu(gate_up[..., :5]) * gate_up[..., 5:]
    torch.testing.assert_close(swiglu(gate_up, kernels="torch"), wanted, rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match=r"\(2, 7\) is odd"):
        swiglu(torch.ones(2, 7), kernels="torch")


@pytest.mark.parametrize("dtype", BOUNDS)
def test_triton_is_the_same_as_torch(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    # More than one program a row, a part of one, a strided input, no tokens.
    for gate_up in (
        random(3, 2074, dtype=dtype), random(7, 6, dtype=dtype), random(4, 3, 8, dtype=dtype).transpose(0, 1),
        random(0, 6, dtype=dtype),
    ):  # fmt: skip
        for found, wanted in zip(outputs(gate_up, "triton"), outputs(gate_up, "torch"), strict=True):
            size = wanted.float().abs() + 1e-2
            assert found.shape == wanted.shape
            assert ((found.float() - wanted.float()).abs() <= BOUNDS[dtype] * size).all()


def test_triton_operator_is_sound() -> None:
    pytest.importorskip("triton")
    from deco_scale.kernels.triton import swiglu as triton_swiglu  # noqa: F401  (registers the operator)

    torch.library.opcheck(torch.ops.deco_scale.swiglu.default, (random(2, 3, 8).requires_grad_(),))


def test_other_types_are_refused() -> None:
    pytest.importorskip("triton")
    from deco_scale.kernels.triton import swiglu as triton_swiglu

    with pytest.raises(ValueError, match="float64"):
        triton_swiglu.swiglu(random(2, 4).double())
