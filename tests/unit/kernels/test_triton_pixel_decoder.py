"""The Triton kernels of the pixel decoder against the formula, on a GPU, or by Triton's interpreter without one.

Sizes are small, since the interpreter takes one tile at a time, and chosen around the tiles: in fp32 of 32 pixels
forward and 16 backward, in bf16 of 128. Not yet run on a GPU.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.train.eager_reference import ReferenceDecoder, saved_bytes
from deco_scale.kernels.pixel_decoder import BlockWeights, DecoderWeights, render_pixels
from deco_scale.kernels.select import use_kernels
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.pixel_decoder import PixelDecoder

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="the package triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM = 12
SIZES = [
    # patch, width, blocks, channels, tokens
    (2, 7, 1, 3, 1),  # the narrowest; 8 pixels do not fill a tile
    (3, 16, 2, 1, 5),  # 9 pixels share no factor with a tile: nine programs, some without a tile
    (8, 32, 3, 3, 1),  # a patch of several tiles; more tiles than programs, so a program adds up several
    (5, 40, 2, 4, 2),  # odd everywhere, padded columns and rows
    (4, 64, 2, 3, 1),  # the widest
]


def made(
    kind: type[PixelDecoder], patch: int, width: int, blocks: int, channels: int, dtype: torch.dtype
) -> PixelDecoder:
    """A decoder whose every weight is random, on the device under test."""
    torch.manual_seed(0)
    decoder = kind(dim=DIM, width=width, num_blocks=blocks, patch_size=patch, channels=channels, features="rotary")
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if kind is PixelDecoder:
        use_kernels(decoder, "triton")
    return decoder.to(DEVICE, dtype)


def run(decoder: PixelDecoder, tokens: int, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output, and gradients of inputs and parameters, in float64."""
    generator = torch.Generator().manual_seed(1)
    parameters = dict(decoder.named_parameters())
    dtype = parameters["head.weight"].dtype
    values = decoder.channels * decoder.patch_size**2
    patches, token = (
        torch.randn(2, tokens, size, generator=generator).to(DEVICE, dtype).requires_grad_()
        for size in (values, DIM)
    )
    with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
        out = decoder(patches, token)
    weight = torch.randn(out.shape, generator=generator).to(DEVICE, out.dtype)
    (out * weight).sum().backward()
    leaves = {"patches": patches, "token": token, **parameters}
    found = {name: leaf.grad for name, leaf in leaves.items()} | {"out": out.detach()}
    assert all(tensor is not None for tensor in found.values())
    return {name: tensor.double() for name, tensor in found.items() if tensor is not None}


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor, relative to its largest entry."""
    assert found.keys() == wanted.keys()
    return {n: ((found[n] - wanted[n]).abs().max() / wanted[n].abs().max()).item() for n in wanted}


@pytest.mark.parametrize(("patch", "width", "blocks", "channels", "tokens"), SIZES)
def test_output_and_every_gradient_equal_the_formula(
    patch: int, width: int, blocks: int, channels: int, tokens: int
) -> None:
    size = (patch, width, blocks, channels)
    wanted = run(made(ReferenceDecoder, *size, torch.float64), tokens)
    found = run(made(PixelDecoder, *size, torch.float32), tokens)
    for name, error in errors(found, wanted).items():
        # Sums of up to 128 pixels and 64 columns: a few rounding errors (6e-8) of the largest entry.
        assert error < 3e-6, name


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_is_as_close_to_the_formula_as_torch(autocast: bool) -> None:
    """With fp32 weights under autocast, and with everything in bf16."""
    size, tokens = (8, 16, 2, 3), 3
    dtype, mode = (torch.float32, torch.bfloat16) if autocast else (torch.bfloat16, None)
    given = made(PixelDecoder, *size, dtype)
    formula = made(ReferenceDecoder, *size, torch.float64)
    # The same rounded weights in all three.
    formula.load_state_dict(given.state_dict())
    wanted = run(formula, tokens)
    found = errors(run(given, tokens, mode), wanted)
    given.zero_grad()
    use_kernels(given, "torch")
    twin = errors(run(given, tokens, mode), wanted)
    for name, error in found.items():
        # bf16 rounds by 2^-9, here in a chain of products, forward and backward.
        assert error < 2**-9 * 16, name
    # The kernel rounds less often than the twin does.
    assert sum(found.values()) < sum(twin.values())


def test_autocast_dtype_is_used() -> None:
    size = (4, 16, 2, 3)
    wanted = run(made(ReferenceDecoder, *size, torch.float64), 2)
    for name, error in errors(run(made(PixelDecoder, *size, torch.float32), 2, torch.float16), wanted).items():
        # fp16 rounds by 2^-11.
        assert error < 2**-11 * 16, name


def arguments(
    patches: int = 3, pixels: int = 10, width: int = 9, channels: int = 2, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, DecoderWeights]:
    """Random arguments of ``render_pixels`` for one block, each of which wants a gradient."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    square, line = (width, width), (width,)
    shapes = (line, line, square, line, square, line, (3 * width, width), (3 * width,))
    block = BlockWeights(*(drawn(*shape) for shape in shapes))
    folded = drawn(width, channels), drawn(pixels, width)
    head = drawn(channels, width), drawn(channels)
    return (
        drawn(patches, channels * pixels),
        drawn(patches, pixels, width),
        DecoderWeights(*folded, [block], *head),
    )


def test_gradients_of_pixels_are_computed_only_if_required() -> None:
    patches, condition, weights = arguments()
    render_pixels(patches, condition, weights, eps=1e-6, kernels="triton").sum().backward()
    wanted, condition.grad = condition.grad, None
    fixed = patches.detach()
    render_pixels(fixed, condition, weights, eps=1e-6, kernels="triton").sum().backward()
    assert patches.grad is not None and fixed.grad is None
    assert wanted is not None and torch.equal(wanted, condition.grad)


def test_no_patches_give_no_output_and_zero_gradients() -> None:
    given = arguments(patches=0)
    out = render_pixels(*given, eps=1e-6, kernels="triton")
    out.sum().backward()
    assert out.shape == given[0].shape
    for tensor in (given[2].head_bias, given[2].folded_constant):
        assert tensor.grad is not None and tensor.grad.abs().max() == 0


def test_only_inputs_are_saved_for_backward() -> None:
    decoder = made(PixelDecoder, 4, 16, 2, 3, torch.float32)
    patches, token = torch.randn(2, 3, 48, device=DEVICE), torch.randn(2, 3, DIM, device=DEVICE)
    kept = saved_bytes(decoder, lambda: decoder(patches, token))
    condition = 2 * 3 * 16 * 16
    # The blocks' weights lie one behind the other for the kernel; the folded embedding keeps two small products.
    weights = sum(p.numel() for p in decoder.blocks.parameters()) + 16 * (16 + 16 + 64) + 16 * 3 * 4 + 200
    assert 4 * (patches.numel() + condition) <= kept
    assert kept <= 4 * (patches.numel() + token.numel() + condition + weights)
    with torch.no_grad():
        without = decoder(patches, token)
    assert not without.requires_grad and torch.equal(without, decoder(patches, token))


def test_operator_passes_opcheck() -> None:
    from deco_scale.kernels.triton import pixel_decoder

    assert pixel_decoder
    patches, condition, (folded, constant, (block,), *head) = arguments(patches=2, pixels=4, width=7)
    names = (
        "modulation_weight",
        "first_weight",
        "last_weight",
        "norm_weight",
        "norm_bias",
        "first_bias",
        "last_bias",
    )
    parts = [getattr(block, n) for n in (*names, "modulation_bias")]
    weights = torch.cat([p.detach().flatten() for p in (*parts, folded.t(), *head)]).requires_grad_()
    render = torch.ops.deco_scale.render_pixels.default
    torch.library.opcheck(render, (patches, condition, constant, weights, 1, 1e-6, torch.float32))


def test_compile_and_checkpointing_change_nothing() -> None:
    decoder = made(PixelDecoder, 4, 16, 1, 3, torch.float32)
    patches, token = torch.randn(1, 3, 48, device=DEVICE), torch.randn(1, 3, DIM, device=DEVICE)

    def gradients(out: Tensor) -> list[Tensor]:
        decoder.zero_grad()
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in decoder.parameters() if p.grad is not None)]

    plain = gradients(decoder(patches, token))
    # fullgraph: a graph break is an error.
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    ways = compiled(patches, token), checkpoint(decoder, patches, token, use_reentrant=False)
    for out in ways:
        for one, other in zip(gradients(out), plain, strict=True):
            assert torch.equal(one, other)


def test_denoiser_is_the_same_with_triton_and_torch() -> None:
    cfg = ModelConfig(
        kind="t2i_deco", dim=32, num_heads=2, num_blocks=1, num_text_blocks=1, patch_size=4, decoder_width=8,
        decoder_blocks=2, text_dim=12, text_tokens=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Denoiser(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.to(DEVICE)
    inputs = torch.randn(2, 2, 48), torch.rand(2), torch.randn(2, 3, 12)
    results = []
    for kernels in ("torch", "triton"):
        use_kernels(model, kernels)  # type: ignore[arg-type]
        model.zero_grad()
        out = model(*(i.to(DEVICE) for i in inputs), grid=(1, 2)).prediction_BNK
        out.square().mean().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"out": out.detach(), **grads})
    for name, error in errors(results[1], results[0]).items():
        # Both in fp32: each is off by its own rounding errors, which the transformer below carries on.
        assert error < 1e-5, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"width": 65}, "width 65 is above 64"),
    ],
)
def test_unsupported_inputs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_pixels(*arguments(**change), eps=1e-6, kernels="triton")  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
def test_a_gpu_with_too_little_shared_memory_is_refused(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton finds that out when it launches; here a stand-in of a kernel does."""
    from triton.runtime.errors import OutOfResources

    from deco_scale.kernels.triton import pixel_decoder

    class TooLarge:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return self.launch

        def launch(self, *args: object, **kwargs: object) -> None:
            raise OutOfResources(110592, 101376, "shared memory")

    monkeypatch.setattr(pixel_decoder, kernel, TooLarge())
    message = (
        "width 64 in torch.float32 .* shared memory, 110592 needed, 101376 there; use bf16, .* 32, or kernels"
    )
    with pytest.raises(ValueError, match=message):
        render_pixels(*arguments(patches=1, width=64), eps=1e-6, kernels="triton").sum().backward()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_shapes_that_do_not_fit_are_refused(kernels: str) -> None:
    patches, condition, weights = arguments()
    cases = {
        "patches": (patches[:, 1:], weights),
        "folded constant": (patches, weights._replace(folded_constant=weights.folded_constant[1:])),
        "at least one block": (patches, weights._replace(blocks=[])),
    }
    for message, (given, changed) in cases.items():
        with pytest.raises(ValueError, match=message):
            render_pixels(given, condition, changed, eps=1e-6, kernels=kernels)  # type: ignore[arg-type]


def test_types_that_differ_are_refused_without_autocast() -> None:
    patches, *rest = arguments()
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        render_pixels(patches.bfloat16(), *rest, eps=1e-6, kernels="triton")


def test_triton_is_imported_only_if_selected_and_never_interpreted_by_accident() -> None:
    """In a process of its own: without triton the twin computes and the choice fails; a CPU is refused."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from deco_scale.models.pixel_decoder import PixelDecoder
decoder = PixelDecoder(dim=4, width=8, num_blocks=1, patch_size=2, channels=3, features="rotary")
inputs = torch.randn(1, 2, 12), torch.randn(1, 2, 4)
decoder(*inputs)
decoder.kernels = "triton"
for error in (ModuleNotFoundError, ValueError):
    try:
        decoder(*inputs)
    except error as e:
        print(e)
    sys.modules.pop("triton", None)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    first, second = ran.stdout.splitlines()
    assert "triton" in first
    assert second == "Triton computes on a GPU, the pixels are on cpu; use kernels=torch"
