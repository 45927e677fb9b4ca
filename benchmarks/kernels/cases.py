"""The computations that ``benchmarks/kernels/run.py`` times: inputs, variants and the bytes each must move.

Forward and backward together. ``min_bytes`` counts each input that must be read and each result that must be
written once per pass; what a variant moves beyond that is its own loss.

Shape letters: B batch, N patches, M keys, D model width, H heads, K head width, P pixels of a patch, C channels,
W decoder width.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.train.eager_reference import ReferenceDecoder, block_dct
from deco_scale.kernels.adamw import AdamWStep, AdamWTensors, adamw_ema
from deco_scale.kernels.norm import gated_residual, norm_modulate, qk_norm_rope, residual_norm_modulate
from deco_scale.kernels.select import Kernels, use_kernels
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.attention.dispatch import KERNELS, kernel_missing
from deco_scale.models.embeddings import PositionScale, rope_angles
from deco_scale.models.layers import NORM_EPS
from deco_scale.models.pixel_decoder import PixelDecoder
from deco_scale.objectives.flow_matching import flow_loss
from deco_scale.objectives.frequency import (
    block_transform,
    colour_matrix,
    frequency_loss,
    frequency_weights,
)

Function = Callable[..., Any]
"""Returns a tensor or several."""
EAGER, COMPILED, TRITON, BY_OP, BY_OP_COMPILED = "eager", "compiled", "triton", "op by op", "op by op, compiled"


@dataclasses.dataclass
class Case:
    """A computation: ``variants`` are actions by name, ``missing`` says why others are not there.

    Not ``capturable``: it cannot become a CUDA graph.
    """

    name: str
    variants: dict[str, Callable[[], object]]
    min_bytes: float = 0.0
    flops: float = 0.0
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    capturable: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and on what: micro-batch, sides in patches, ``dtype`` of activations, with or without Triton."""

    model: ModelConfig
    batch: int
    side: int
    device: torch.device
    dtype: torch.dtype
    triton: bool

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def width_bytes(self) -> int:
        """Bytes of an activation's value."""
        return self.dtype.itemsize

    def random(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        values = torch.randn(*shape, generator=generator).to(self.device, dtype or self.dtype)
        return values.requires_grad_(grad)


def all_cases(setting: Setting) -> Iterator[Case]:
    """Every case that the model has, made one at a time."""
    if setting.model.decoder_width:
        yield pixel_decoder(setting)
    yield norm_and_modulation(setting)
    yield residual(setting)
    yield residual_and_norm(setting)
    yield rotary(setting)
    yield losses(setting)
    yield optimizer(setting)
    yield attention_backends(setting)
    yield adaln(setting)


def pixel_decoder(setting: Setting) -> Case:
    """The decoder behind its condition projection: the promise of the fused kernel is about this."""
    model, rows = setting.model, setting.batch * setting.tokens
    pixels, wide = model.patch_size**2, model.decoder_width

    inputs = decoder_inputs(setting)

    def made(kind: type[PixelDecoder], kernels: Kernels, *, compiled: bool = False) -> Callable[[], object]:
        decoder = make_decoder(setting, kernels, kind)
        function = autocast(torch.compile(decoder) if compiled else decoder, setting)
        return differentiated(function, inputs, list(decoder.parameters()))

    actions = {
        EAGER: made(PixelDecoder, "torch"),
        COMPILED: made(PixelDecoder, "torch", compiled=True),
        BY_OP: made(ReferenceDecoder, "torch"),
        BY_OP_COMPILED: made(ReferenceDecoder, "torch", compiled=True),
    }
    if setting.triton:
        actions[TRITON] = made(PixelDecoder, "triton")
    # Forward: pixels, condition, output. Backward: pixels, condition, gradient; gradient of the condition.
    pixel_values = rows * model.patch_values
    moved = pixel_values * (4 + 4 + 2 * setting.width_bytes) + 3 * rows * pixels * wide * setting.width_bytes
    products = model.channels * wide * 2 + 5 * model.decoder_blocks * wide * wide
    flops = 6.0 * rows * pixels * products
    return Case("pixel decoder", actions, min_bytes=moved, flops=flops, missing=without_triton(setting))


def make_decoder(setting: Setting, kernels: Kernels, kind: type[PixelDecoder] = PixelDecoder) -> PixelDecoder:
    """The model's decoder without its condition projection, every weight random."""
    model = setting.model
    decoder = kind(
        dim=1,
        width=model.decoder_width,
        num_blocks=model.decoder_blocks,
        patch_size=model.patch_size,
        channels=model.channels,
        features="rotary" if model.kind == "t2i_deco" else "cosine",
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        # Some layers start at zero, which would hide the others' gradients.
        nn.init.normal_(parameter, std=0.2, generator=generator)
    decoder.cond_proj = nn.Identity()  # type: ignore[assignment]
    use_kernels(decoder, kernels)
    return decoder.to(setting.device)


def decoder_inputs(setting: Setting) -> list[Tensor]:
    """Patches in fp32 and conditions in the computing type; only the latter need a gradient, as in a step."""
    model, shape = setting.model, (setting.batch, setting.tokens)
    patches = setting.random(*shape, model.patch_values, dtype=torch.float32, grad=False)
    return [patches, setting.random(*shape, model.patch_size**2 * model.decoder_width)]


def norm_and_modulation(setting: Setting) -> Case:
    """RMSNorm, then shift and scale; x itself goes on to the residual connection."""
    dim = setting.model.dim
    cast_first = setting.model.kind != "t2i_deco"
    inputs = [
        setting.random(setting.batch, setting.tokens, dim),
        setting.random(dim, dtype=torch.float32),
        *(setting.random(setting.batch, 1, dim) for _ in range(2)),
    ]
    plain = functools.partial(norm_modulate, eps=NORM_EPS, cast_first=cast_first, kernels="torch")
    fused = functools.partial(norm_modulate, eps=NORM_EPS, cast_first=cast_first, kernels="triton")
    # Forward: x, output. Backward: x, both gradients; gradient of x.
    moved = 6 * inputs[0].numel() * setting.width_bytes
    return case("RMSNorm + modulation", variants(plain, fused, setting), inputs, setting, min_bytes=moved)


def residual(setting: Setting) -> Case:
    """x + gate * y."""
    shape = (setting.batch, setting.tokens, setting.model.dim)
    inputs = [setting.random(*shape), setting.random(setting.batch, 1, shape[-1]), setting.random(*shape)]
    plain = functools.partial(gated_residual, kernels="torch")
    fused = functools.partial(gated_residual, kernels="triton")
    # Forward: x, y, output. Backward: gradient (that of x as it is), y; gradient of y.
    moved = 6 * inputs[0].numel() * setting.width_bytes
    return case("gate + residual", variants(plain, fused, setting), inputs, setting, min_bytes=moved)


def residual_and_norm(setting: Setting) -> Case:
    """x + gate * y, and its RMSNorm with shift and scale."""
    shape, cast_first = (setting.batch, setting.tokens, setting.model.dim), setting.model.kind != "t2i_deco"
    part = (setting.batch, 1, shape[-1])
    inputs = [
        setting.random(*shape), setting.random(*part), setting.random(*shape),
        setting.random(shape[-1], dtype=torch.float32), setting.random(*part), setting.random(*part),
    ]  # fmt: skip
    plain = functools.partial(residual_norm_modulate, eps=NORM_EPS, cast_first=cast_first, kernels="torch")
    fused = functools.partial(residual_norm_modulate, eps=NORM_EPS, cast_first=cast_first, kernels="triton")
    # Forward: x, y, sum, output. Backward: both gradients, sum, y; gradients of x and y.
    moved = 10 * inputs[0].numel() * setting.width_bytes
    return case(
        "residual + RMSNorm + modulation", variants(plain, fused, setting), inputs, setting, min_bytes=moved
    )


def rotary(setting: Setting) -> Case:
    """From the fused projections of an image block's tokens and text to q, k and v of attention."""
    model = setting.model
    cast_first = model.kind != "t2i_deco"
    side = setting.side
    scale: PositionScale = "fixed" if cast_first else "grid"
    angles = rope_angles(side, side, head_dim=model.head_dim, scale=scale, device=setting.device)  # type: ignore[arg-type]
    qkv = setting.random(setting.batch, setting.tokens, model.num_heads, 3, model.head_dim)
    weights = [setting.random(model.head_dim, dtype=torch.float32) for _ in range(2)]
    inputs = [qkv, *weights]
    # Forward: projections, q, k, v. Backward: the gradients of these, q and k, the gradients of the projections.
    moved = (4 + 2 / 3) * qkv.numel() * setting.width_bytes
    if model.text_tokens:
        context = setting.random(setting.batch, model.text_tokens, model.num_heads, 2, model.head_dim)
        inputs.append(context)
        moved += (4 + 1 / 2) * context.numel() * setting.width_bytes

    def made(kernels: Kernels) -> Function:
        return lambda qkv, q_weight, k_weight, context=None: qk_norm_rope(
            qkv, context, q_weight, k_weight, angles, eps=NORM_EPS, cast_first=cast_first, kernels=kernels
        )

    return case(
        "q/k norm + RoPE", variants(made("torch"), made("triton"), setting), inputs, setting, min_bytes=moved
    )


def losses(setting: Setting) -> Case:
    """Flow and frequency loss of the velocity; fp32 in the model's own code."""
    model = setting.model
    shape = (setting.batch * setting.tokens, model.channels, model.patch_size, model.patch_size)
    weights = frequency_weights(85, gamma=1.0, mode="inv_gamma", device=setting.device)

    def plain(prediction: Tensor, target: Tensor) -> Tensor:
        return flow_loss(prediction, target) + frequency_loss(prediction - target, weights)

    def by_op(prediction: Tensor, target: Tensor) -> Tensor:
        squared = (block_dct(prediction) - block_dct(target)).square()
        return (prediction - target).square().mean() + (weights[None, :, None, None] * squared).mean()

    inputs = [setting.random(*shape, dtype=torch.float32), setting.random(*shape, dtype=torch.float32, grad=False)]

    def fused(prediction: Tensor, target: Tensor) -> Tensor:
        # Triton is imported where it runs.
        from deco_scale.kernels.triton.losses import flow_and_frequency

        transform, colours = block_transform(setting.device), colour_matrix(setting.device)
        found = flow_and_frequency(
            prediction.flatten(1), target.flatten(1), transform, colours, weights, model.patch_size
        )
        return found[0] + found[1]

    functions = {**variants(plain, fused, setting), BY_OP: by_op}
    # Forward: prediction, target. Backward: prediction, target; gradient.
    return case("flow + frequency loss", functions, inputs, setting, min_bytes=5 * 4 * inputs[0].numel())


def optimizer(setting: Setting) -> Case:
    """AdamW and EMA over the parameters of one transformer block."""
    one = dataclasses.replace(setting.model, num_blocks=1)
    with torch.device("meta"):
        shapes = [p.shape for p in Denoiser(one).blocks.parameters()]
    count = sum(shape.numel() for shape in shapes)

    def made(kernels: Kernels) -> Callable[[], object]:
        fresh = [[torch.rand(shape, device=setting.device) for shape in shapes] for _ in range(5)]
        names = ("parameters", "grads", "exp_avgs", "exp_avg_sqs", "emas")
        tensors = AdamWTensors(**dict(zip(names, fresh, strict=True)))
        step = AdamWStep(
            lr=1e-4,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.0,
            ema_decay=0.9999,
            count=torch.ones((), device=setting.device),
            factor=torch.ones((), device=setting.device),
            skipped=torch.zeros((), device=setting.device),
        )
        return lambda: adamw_ema(tensors, step, kernels=kernels)

    actions = {EAGER: made("torch")}
    if setting.triton:
        actions[TRITON] = made("triton")
    # Five read, four written: parameter, two moments, average.
    missing = {COMPILED: "the twin is PyTorch's fused kernel", **without_triton(setting)}
    # The kernel's addresses come from page-locked memory of the call, which a replay could read after its end.
    return Case("AdamW + EMA", actions, min_bytes=9 * 4 * count, missing=missing, capturable=False)


def attention_backends(setting: Setting) -> Case:
    """Every kernel that can run here, on the shape of an image block; FLOPs count backward twice."""
    model, device = setting.model, setting.device
    keys = setting.tokens + model.text_tokens
    shape = (model.num_heads, model.head_dim)
    lengths = (setting.tokens, keys, keys)
    inputs = [setting.random(setting.batch, length, *shape) for length in lengths]
    functions: dict[str, Function] = {}
    missing: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        reason = kernel_missing(name, device, setting.dtype, model.head_dim)  # type: ignore[arg-type]
        if reason is None:
            functions[name] = kernel
        else:
            missing[name] = reason
    flops = 3.0 * 4 * setting.batch * setting.tokens * keys * model.dim
    found = case("attention", functions, inputs, setting, flops=flops)
    return dataclasses.replace(found, missing=missing)


def adaln(setting: Setting) -> Case:
    """AdaLN modulations of all blocks: a product each, or one for all. Weights are 6D x D a block."""
    model = setting.model
    blocks = model.num_blocks + model.num_text_blocks
    condition = setting.random(setting.batch, model.dim)
    weights = [setting.random(6 * model.dim, model.dim) for _ in range(blocks)]
    together = torch.cat([w.detach() for w in weights]).requires_grad_()

    def one_by_one(condition: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat([F.linear(condition, weight) for weight in weights], dim=-1)

    def gathered(condition: Tensor, *weights: Tensor) -> Tensor:
        return F.linear(condition, torch.cat(weights))

    actions = {
        "one by one": differentiated(one_by_one, [condition, *weights]),
        "one GEMM, weights put together each step": differentiated(gathered, [condition, *weights]),
        "one GEMM, weights stored together": differentiated(F.linear, [condition, together]),
    }
    # Forward reads the weights, backward reads them and writes their gradients.
    return Case(
        f"AdaLN of {blocks} blocks",
        actions,
        min_bytes=3 * together.numel() * setting.width_bytes,
        flops=6.0 * setting.batch * together.numel(),
    )


def variants(plain: Function, fused: Function, setting: Setting) -> dict[str, Function]:
    """The twin eager and compiled, and the Triton kernel."""
    functions = {EAGER: plain, COMPILED: torch.compile(plain)}
    if setting.triton:
        functions[TRITON] = fused
    return functions


def autocast(function: Function, setting: Setting) -> Function:
    """Under autocast where activations are not fp32, as in a training step."""
    if setting.dtype == torch.float32:
        return function

    def inside(*inputs: Tensor) -> Tensor:
        with torch.autocast(setting.device.type, dtype=setting.dtype):
            return function(*inputs)

    return inside


def differentiated(
    function: Function, inputs: list[Tensor], parameters: list[nn.Parameter] | None = None
) -> Callable[[], object]:
    """Forward, and gradients of all inputs that want one and of the ``parameters`` of a module."""
    leaves = [*(x for x in inputs if x.requires_grad), *(parameters or ())]
    seeds: list[Tensor] = []

    def action() -> tuple[Tensor, ...]:
        out = function(*inputs)
        outs = (out,) if isinstance(out, Tensor) else out
        if not seeds:
            seeds.extend(torch.ones_like(one) for one in outs)
        return torch.autograd.grad(outs, leaves, seeds)

    return action


def case(
    name: str,
    functions: dict[str, Function],
    inputs: list[Tensor],
    setting: Setting,
    *,
    min_bytes: float = 0.0,
    flops: float = 0.0,
) -> Case:
    """A case whose variants take the same inputs."""
    actions = {variant: differentiated(function, inputs) for variant, function in functions.items()}
    return Case(name, actions, min_bytes=min_bytes, flops=flops, missing=without_triton(setting))


def without_triton(setting: Setting) -> dict[str, str]:
    """Why there is no Triton row, if there is none."""
    return {} if setting.triton else {TRITON: "needs a GPU; the interpreter is never timed"}
