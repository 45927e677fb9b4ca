"""Model FLOPs of a training image, and what a device could do at best.

Counts multiply-adds of linears and attention twice, the backward pass as two forward passes; norms,
activations and frozen encoders are not counted. For the XXL model: 1.17 T at 256 px, 4.39 T at 512 px.
"""

from deco_scale.models import ModelConfig

PEAK_BF16_FLOPS = {"B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12, "A800": 312e12}
"""Dense bf16 FLOP/s of the datasheets, by a part of the device's name."""
FLOPS_PARTS = ("linears", "attention", "modulation", "embedding", "decoder")
"""``linears`` are those inside attention and MLP; ``decoder`` includes the projection of its condition."""


def forward_flops_by_part(cfg: ModelConfig, height: int, width: int) -> dict[str, float]:
    """FLOPs of one image through the denoiser, by :data:`FLOPS_PARTS`."""
    rows, cols = cfg.grid(height, width)
    tokens, dim, text = rows * cols, cfg.dim, cfg.text_tokens
    own = 4 * dim * dim + 3 * dim * cfg.mlp_hidden_dim
    linears = cfg.num_blocks * (tokens * own + text * 2 * dim * dim) + cfg.num_text_blocks * text * own
    attended = cfg.num_blocks * tokens * (tokens + text) + cfg.num_text_blocks * text * text
    modulation = (cfg.num_blocks + cfg.num_text_blocks) * 6 * dim * dim
    embedding = tokens * cfg.patch_values * dim + 256 * dim + dim * dim + text * cfg.text_dim * dim
    if cfg.decoder_width == 0:
        decoder = tokens * dim * cfg.patch_values + 2 * dim * dim
    else:
        wide = cfg.decoder_width
        pixel = (cfg.channels + 64) * wide + wide * wide + wide * cfg.channels
        pixel += cfg.decoder_blocks * 5 * wide * wide
        decoder = tokens * dim * cfg.patch_size**2 * wide + height * width * pixel
    parts = (linears, 2 * attended * dim, modulation, embedding, decoder)
    return {name: 2.0 * count for name, count in zip(FLOPS_PARTS, parts, strict=True)}


def forward_flops(cfg: ModelConfig, height: int, width: int) -> float:
    """FLOPs of one image through the denoiser."""
    return sum(forward_flops_by_part(cfg, height, width).values())


def training_flops(cfg: ModelConfig, height: int, width: int) -> float:
    """FLOPs of one training image: forward and twice that for backward."""
    return 3.0 * forward_flops(cfg, height, width)


def peak_flops(device_name: str) -> float | None:
    """Datasheet bf16 FLOP/s, or None for a device that is not in the table."""
    return next((v for k, v in PEAK_BF16_FLOPS.items() if k in device_name), None)
