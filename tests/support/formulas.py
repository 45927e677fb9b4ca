"""DeCo's training step in float64, written from the formulas of the paper and of its public release.

Nothing here calls the product: what it computes is held against this. Only the names of parameters and the order
of rows in fused projections (head, part, head width) are the product's.

Sources: DeCo, arXiv 2511.19365; AdamW, arXiv 1711.05101; REPA, arXiv 2410.06940; JPEG tables from libjpeg itself.
Shape letters: B batch, N patches, L text tokens, D model width, H heads, K head width, P pixels of a patch,
W decoder width.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

Weights = Mapping[str, Tensor]
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """What the parameters alone do not say."""

    rows: int
    cols: int
    patch_size: int
    num_heads: int
    is_text: bool
    repa_layer: int


# Draws of a sample, from a generator of its own.


def sample_key(seed: int, number: int) -> int:
    """splitmix64's finaliser over the seed and the number of the sample."""
    state = 0
    for part in (seed, number):
        state = ((state ^ part) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


def sample_draws(seed: int, number: int, shape: Sequence[int]) -> tuple[float, float, float, Tensor]:
    """Normal and uniform draw for the time, uniform draw for the dropout, and the noise."""
    generator = torch.Generator().manual_seed(sample_key(seed, number))
    uniform = torch.rand(2, generator=generator)
    normal = torch.randn(1, generator=generator)
    noise = torch.empty(tuple(shape)).normal_(generator=generator)
    return normal.item(), uniform[0].item(), uniform[1].item(), noise.double()


def logit_normal_time(normal: float, shift: float) -> float:
    """t = sigmoid(z), then t / (t + (1 - t) * shift)."""
    t = 1 / (1 + math.exp(-normal))
    return t / (t + (1 - t) * shift)


# Layers.


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()


def timestep_embedding(w: Weights, t_B: Tensor) -> Tensor:
    angles = t_B[:, None] * torch.tensor([10 ** (-i / 128) for i in range(128)], dtype=t_B.dtype)
    hidden = silu(linear(w, "timestep_embed.hidden", torch.cat([angles.cos(), angles.sin()], dim=-1)))
    return linear(w, "timestep_embed.out", hidden)


def axis_positions(count: int, end: float) -> list[float]:
    """linspace(0, end, count)."""
    return [end * i / (count - 1) for i in range(count)]


def rope_angle_table(shape: Shape, head_dim: int) -> Tensor:
    """Angles (N, K / 2): pairs alternate between the column and the row of the patch."""
    columns = axis_positions(shape.cols, shape.cols if shape.is_text else 16)
    rows = axis_positions(shape.rows, shape.rows if shape.is_text else 16)
    frequencies = [10_000 ** (-i / head_dim) for i in range(0, head_dim, 4)]
    angles = [[z * f for f in frequencies for z in (x, y)] for y in rows for x in columns]
    return torch.tensor(angles, dtype=torch.float64)


def rotate(x_BNHK: Tensor, angles_NE: Tensor) -> Tensor:
    cos, sin = angles_NE.cos()[:, None], angles_NE.sin()[:, None]
    real, imaginary = x_BNHK[..., 0::2], x_BNHK[..., 1::2]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2)


def attention(
    w: Weights, name: str, x: Tensor, heads: int, angles: Tensor | None, context: Tensor | None
) -> Tensor:
    batch, tokens, dim = x.shape
    q, k, v = linear(w, f"{name}.qkv", x).view(batch, tokens, heads, 3, dim // heads).unbind(3)
    q, k = rms_norm(q, w[f"{name}.q_norm.weight"]), rms_norm(k, w[f"{name}.k_norm.weight"])
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    if context is not None:
        of_text = linear(w, f"{name}.context_kv", context).view(batch, -1, heads, 2, dim // heads)
        k = torch.cat([k, rms_norm(of_text[:, :, :, 0], w[f"{name}.k_norm.weight"])], dim=1)
        v = torch.cat([v, of_text[:, :, :, 1]], dim=1)
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) / math.sqrt(dim // heads)
    mixed = torch.einsum("bhnm,bmhk->bnhk", scores.softmax(-1), v)
    return linear(w, f"{name}.proj", mixed.reshape(batch, tokens, dim))


def block(
    w: Weights, name: str, x: Tensor, condition: Tensor, heads: int, angles: Tensor | None, context: Tensor | None
) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = linear(w, f"{name}.modulation", condition).chunk(6, dim=-1)
    hidden = rms_norm(x, w[f"{name}.norm1.weight"]) * (1 + scale1) + shift1
    x = x + gate1 * attention(w, f"{name}.attn", hidden, heads, angles, context)
    hidden = rms_norm(x, w[f"{name}.norm2.weight"]) * (1 + scale2) + shift2
    gated = silu(linear(w, f"{name}.mlp.gate", hidden)) * linear(w, f"{name}.mlp.up", hidden)
    return x + gate2 * linear(w, f"{name}.mlp.down", gated)


def pixel_features(patch_size: int, *, is_text: bool) -> Tensor:
    """Position features (P, 64), pixel by pixel, rows of the patch one after another."""
    table = []
    for y in range(patch_size):
        for x in range(patch_size):
            if is_text:
                ends = [patch_size * z / (patch_size - 1) for z in (x, y)]
                waves = [10_000 ** (-i / 128) for i in range(0, 128, 4)]
                table.append([math.cos(z * f) for f in waves for z in ends])
            else:
                px, py = x / (patch_size - 1), y / (patch_size - 1)
                waves = [8 * i / 7 for i in range(8)]
                table.append([
                    math.cos(px * fx * math.pi) * math.cos(py * fy * math.pi) / (1 + fx * fy)
                    for fx in waves for fy in waves
                ])  # fmt: skip
    return torch.tensor(table, dtype=torch.float64)


def pixel_decoder(w: Weights, patches_BNK: Tensor, token_BND: Tensor, shape: Shape) -> Tensor:
    num_pixels = shape.patch_size**2
    pixels = patches_BNK.unflatten(-1, (-1, num_pixels)).transpose(-1, -2)
    features = pixel_features(shape.patch_size, is_text=shape.is_text).expand(*pixels.shape[:2], -1, -1)
    x = linear(w, "decoder.input_proj", linear(w, "decoder.pixel_embed", torch.cat([pixels, features], dim=-1)))
    condition = linear(w, "decoder.cond_proj", token_BND).unflatten(-1, (num_pixels, -1))
    for index in range(number_of(w, "decoder.blocks")):
        name = f"decoder.blocks.{index}"
        shift, scale, gate = linear(w, f"{name}.modulation.1", silu(condition)).chunk(3, dim=-1)
        hidden = layer_norm(x) * w[f"{name}.norm.weight"] + w[f"{name}.norm.bias"]
        hidden = hidden * (1 + scale) + shift
        x = x + gate * linear(w, f"{name}.mlp.2", silu(linear(w, f"{name}.mlp.0", hidden)))
    return linear(w, "decoder.head", layer_norm(x)).transpose(-1, -2).flatten(-2)


def number_of(w: Weights, name: str) -> int:
    return len({key[len(name) + 1 :].split(".")[0] for key in w if key.startswith(f"{name}.")})


def denoise(w: Weights, patches: Tensor, t_B: Tensor, condition: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Velocity of the patches, and the tokens that REPA aligns."""
    time = timestep_embedding(w, t_B)[:, None]
    context: Tensor | None = None
    if shape.is_text:
        adaln = silu(time)
        context = rms_norm(linear(w, "text_embed.proj", condition), w["text_embed.norm.weight"])
        context = context + w["text_embed.position"]
        for index in range(number_of(w, "text_blocks")):
            context = block(w, f"text_blocks.{index}", context, adaln, shape.num_heads, None, None)
    else:
        adaln = silu(time + w["label_embed.table.weight"][condition][:, None])
    tokens = linear(w, "patch_embed", patches)
    angles = rope_angle_table(shape, tokens.shape[-1] // shape.num_heads)
    for index in range(number_of(w, "blocks")):
        tokens = block(w, f"blocks.{index}", tokens, adaln, shape.num_heads, angles, context)
        if index + 1 == shape.repa_layer:
            aligned = tokens
    return pixel_decoder(w, patches, silu(time + tokens), shape), aligned


# Losses.


def to_patches(image: Tensor, shape: Shape) -> Tensor:
    """(B, N, C * P), channel-major, row by row of the image."""
    size, found = shape.patch_size, []
    for row in range(shape.rows):
        for col in range(shape.cols):
            cut = image[:, :, row * size : (row + 1) * size, col * size : (col + 1) * size]
            found.append(cut.reshape(len(image), -1))
    return torch.stack(found, dim=1)


def jpeg_weights(quality: int) -> Tensor:
    """mean(Q) / Q of Y, Cb and Cr, each divided by its mean, with the tables that libjpeg writes for a quality."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
    written = Image.open(file).quantization  # type: ignore[attr-defined]
    tables = []
    for steps in (written[0], written[1], written[1]):
        table = torch.tensor(steps, dtype=torch.float64).view(8, 8)
        weight = table.mean() / table
        tables.append(weight / weight.mean())
    return torch.stack(tables)


def dct_coefficients(patches_BNK: Tensor, patch_size: int) -> Tensor:
    """YCbCr and the orthonormal DCT-II of 8 x 8 blocks: (..., 3, blocks, blocks, 8, 8)."""
    r, g, b = patches_BNK.unflatten(-1, (3, patch_size, patch_size)).unbind(-3)
    ycbcr = torch.stack(
        [
            0.299 * r + 0.587 * g + 0.114 * b,
            -0.168736 * r - 0.331264 * g + 0.5 * b,
            0.5 * r - 0.418688 * g - 0.081312 * b,
        ],
        dim=-3,
    )
    basis = torch.tensor(
        [
            [math.sqrt((2 if k else 1) / 8) * math.cos(math.pi * (2 * n + 1) * k / 16) for n in range(8)]
            for k in range(8)
        ],
        dtype=torch.float64,
    )
    blocks = ycbcr.unfold(-2, 8, 8).unfold(-2, 8, 8)
    return torch.einsum("un,...nm,vm->...uv", basis, blocks, basis)


def losses_of(
    parameters: Weights,
    image: Tensor,
    noise: Tensor,
    t_B: Tensor,
    condition: Tensor,
    features: Tensor,
    shape: Shape,
) -> dict[str, Tensor]:
    """Flow, frequency and REPA loss, and flow + 1.0 * frequency + 0.5 * REPA."""
    w = {name.removeprefix("denoiser."): p for name, p in parameters.items() if name.startswith("denoiser.")}
    t = t_B[:, None, None, None]
    patches = to_patches(t * image + (1 - t) * noise, shape)
    predicted, aligned = denoise(w, patches, t_B, condition, shape)
    target = to_patches(image - noise, shape)
    size = shape.patch_size
    squared = (dct_coefficients(predicted, size) - dct_coefficients(target, size)).square()
    for layer in (0, 2, 4):
        aligned = linear(parameters, f"repa_head.layers.{layer}", aligned)
        aligned = silu(aligned) if layer < 4 else aligned
    cosine = (aligned * features).sum(-1) / (aligned.norm(dim=-1) * features.norm(dim=-1))
    losses = {
        "loss_flow": (predicted - target).square().mean(),
        "loss_freq": (jpeg_weights(85)[:, None, None] * squared).mean(),
        "loss_repa": (1 - cosine).mean(),
    }
    return {"loss": losses["loss_flow"] + losses["loss_freq"] + 0.5 * losses["loss_repa"], **losses}


# The update.


class AdamWWithAverage:
    """Clipping by the global norm, AdamW, and the exponential moving average of the denoiser, in float64."""

    def __init__(self, parameters: Weights, averages: Weights, *, eps: float, weight_decay: float) -> None:
        self.parameters = {name: p.double().clone() for name, p in parameters.items()}
        self.averages = {name: p.double().clone() for name, p in averages.items()}
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.eps, self.weight_decay, self.count = eps, weight_decay, 0

    def update(
        self, grads: Weights, *, lr: float, betas: tuple[float, float], clip_norm: float, ema_decay: float
    ) -> float:
        """One update; returns the norm of the whole gradient before clipping."""
        norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
        self.count += 1
        for name, p in self.parameters.items():
            g = grads[name] * min(1.0, clip_norm / (norm + 1e-6))
            m = self.exp_avg[name] = betas[0] * self.exp_avg[name] + (1 - betas[0]) * g
            v = self.exp_avg_sq[name] = betas[1] * self.exp_avg_sq[name] + (1 - betas[1]) * g.square()
            m_hat, v_hat = m / (1 - betas[0] ** self.count), v / (1 - betas[1] ** self.count)
            self.parameters[name] = p * (1 - lr * self.weight_decay) - lr * m_hat / (v_hat.sqrt() + self.eps)
            if name in self.averages:
                average = ema_decay * self.averages[name] + (1 - ema_decay) * self.parameters[name]
                self.averages[name] = average
        return norm
