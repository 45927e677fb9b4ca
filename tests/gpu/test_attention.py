"""Every attention kernel of this machine against the formula, at the sizes of 256 and 512 px.

Not yet run on a GPU.
"""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deco_scale.models.attention.autotune import RACED, AttentionShape, choose_backend, error_bound, table_of
from deco_scale.models.attention.dispatch import KERNELS, AttentionTable, attention, check_backend, kernel_missing
from deco_scale.models.layers import Attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU on this machine"),
]

# Image blocks at 256 and 512 px and text blocks of the 1.1B model: 24 heads of 64, 128 text tokens.
SHAPES = [(256, 384), (1024, 1152), (128, 128)]
BF16 = torch.bfloat16


def here(kernel: str) -> torch.device:
    """The GPU; skips the test with the reason where it cannot run the kernel."""
    device = torch.device("cuda", torch.cuda.current_device())
    reason = kernel_missing(kernel, device, BF16, 64)  # type: ignore[arg-type]
    if reason is not None:
        pytest.skip(f"{kernel}: {reason}")
    return device


def results(kernel: str, given: list[Tensor]) -> list[Tensor]:
    q, k, v = leaves = [x.clone().requires_grad_() for x in given[:3]]
    out = attention(q, k, v, kernel)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", RACED)
def test_kernel_is_the_formula(kernel: str, shape: tuple[int, int]) -> None:
    device = here(kernel)
    generator = torch.Generator(device).manual_seed(0)
    lengths = (shape[0], shape[1], shape[1], shape[0])
    sizes = [(2, length, 24, 64) for length in lengths]
    given = [torch.randn(size, generator=generator, device=device).to(BF16) for size in sizes]
    wanted = results("math", [x.double() for x in given])
    for one, other in zip(results(kernel, given), wanted, strict=True):
        assert one.dtype == BF16
        assert ((one.double() - other).abs().max() / other.abs().max()).item() < error_bound(BF16)


def test_choice_is_one_of_the_measured() -> None:
    device = here("sdpa")
    choices = [
        choose_backend(AttentionShape(8, queries, keys, 24, 64), device=device, dtype=BF16)
        for queries, keys in SHAPES
    ]
    for choice in choices:
        print(choice.line())
        names = [name for name, _ in choice.times_ms]
        assert choice.kernel == names[0] and "sdpa" in names
        assert {*names, *(name for name, _ in choice.left_out)} == set(RACED)
        assert set(names) <= set(KERNELS) and all(ms > 0 for _, ms in choice.times_ms)
    table = table_of(choices)
    assert [table.kernel(*shape) for shape in SHAPES] == [choice.kernel for choice in choices]


def test_flash_by_name() -> None:
    """Where a flash kernel runs, the name does; where none does, the refusal is the one of the check."""
    device = here("sdpa")
    q, k, v = (torch.randn(1, 128, 2, 64, device=device, dtype=BF16) for _ in range(3))
    try:
        check_backend("flash", device, dtype=BF16, head_dim=64)
    except ValueError as refused:
        with pytest.raises(ValueError) as error:
            attention(q, k, v, "flash")
        assert str(error.value) == str(refused)
    else:
        assert attention(q, k, v, "flash").shape == (1, 128, 2, 64)


@pytest.mark.parametrize("kernel", RACED)
def test_kernel_in_a_compiled_and_recomputed_block(kernel: str) -> None:
    """Graph breaks are allowed; the gradients are those of the eager module. Last: compiling takes the most."""
    device = here(kernel)
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Attention(1536, 24, with_context=True, cast_first=False).to(device)
    module.backend = AttentionTable("math", ((256, 384, kernel),))  # type: ignore[arg-type]
    x, context = torch.randn(2, 256, 1536, device=device), torch.randn(2, 128, 1536, device=device)

    def gradients(*, compiled: bool, recomputed: bool) -> list[Tensor]:
        module.zero_grad()
        call = torch.compile(module.forward) if compiled else module.forward
        with torch.autocast("cuda", dtype=BF16):
            out = checkpoint(call, x, None, context, use_reentrant=False) if recomputed else call(x, None, context)
        out.float().square().mean().backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    wanted = gradients(compiled=False, recomputed=False)
    for compiled, recomputed in ((True, False), (False, True), (True, True)):
        found = gradients(compiled=compiled, recomputed=recomputed)
        for one, other in zip(found, wanted, strict=True):
            # Compiled code joins bf16 casts; both are a few rounding errors from the exact gradient.
            assert ((one - other).abs().max() / other.abs().max()).item() < 2 * error_bound(BF16)
