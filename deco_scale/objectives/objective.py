"""The training objective as one module: a denoiser, the REPA head, and their losses as named scalars.

Engines wrap this module, so that its ``forward`` is all that a training step runs.
Shape letters: B batch, C channels, Y X pixels, L text tokens, T text width, N patches, K values of a patch,
F encoder width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from deco_scale.kernels.select import Kernels
from deco_scale.models import Denoiser, patchify, unpatchify
from deco_scale.objectives.config import ObjectiveConfig
from deco_scale.objectives.flow_matching import flow_loss, noised, velocity_from_image
from deco_scale.objectives.frequency import (
    BLOCK,
    block_transform,
    colour_matrix,
    frequency_loss,
    frequency_weights,
)
from deco_scale.objectives.repa import RepaHead, repa_loss

LOSS_NAMES = ("loss", "loss_flow", "loss_freq", "loss_repa")


class ObjectiveInputs(NamedTuple):
    """Arguments of :meth:`Objective.forward`, on the device.

    ``image`` and ``noise`` (B, C, Y, X), times ``t`` (B,), ``condition`` (B, L, T) of text or labels (B,),
    ``features`` (B, N, F) of the image encoder where REPA is on.
    """

    image: Tensor
    noise: Tensor
    t: Tensor
    condition: Tensor
    features: Tensor | None


class Tokens:
    """The tokens for which this process computes losses: all, unless tensor parallelism spreads them."""

    def own(self, x_BND: Tensor) -> Tensor:
        """Those tokens of a full sequence."""
        return x_BND

    def share(self, count: int) -> float:
        """Their share of ``count`` tokens."""
        return 1.0


class Objective(nn.Module):
    """Total loss = flow + freq_weight * frequency + repa_weight * REPA, and each of them."""

    kernels: Kernels = "torch"

    def __init__(self, denoiser: Denoiser, cfg: ObjectiveConfig, *, encoder_dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.denoiser = denoiser
        self.tokens = Tokens()
        self.repa_head: RepaHead | None = None
        if cfg.repa_weight > 0:
            self.repa_head = RepaHead(denoiser.cfg.dim, encoder_dim)

    def forward(
        self,
        image_BCYX: Tensor,
        noise_BCYX: Tensor,
        t_B: Tensor,
        condition: Tensor,
        features_BNF: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of images in [-1, 1] as fp32 scalars; ``loss`` is the total.

        If this process computes some tokens only (``self.tokens``), these are its parts of the losses, whose sum
        over the processes that share the sequence is the loss.
        """
        model = self.denoiser.cfg
        grid = model.grid(*image_BCYX.shape[-2:])
        patches_BNK = patchify(noised(image_BCYX, noise_BCYX, t_B), model.patch_size)
        scored_BNK = self.tokens.own(patches_BNK)
        target_BNK = self._target(image_BCYX, noise_BCYX, scored_BNK, t_B)
        hidden_after = self.cfg.repa_layer if self.repa_head is not None else 0
        out = self.denoiser(patches_BNK, t_B, condition, grid=grid, hidden_after=hidden_after)
        velocity_BNK = out.prediction_BNK
        if self.cfg.prediction == "image":
            velocity_BNK = velocity_from_image(velocity_BNK, scored_BNK, t_B, self.cfg.t_eps)
        losses = self._pixel_losses(velocity_BNK, target_BNK, grid)
        total = losses["loss_flow"]
        if self.cfg.freq_weight > 0:
            total = total + self.cfg.freq_weight * losses["loss_freq"]
        if self.repa_head is not None:
            if features_BNF is None or out.hidden_BND is None:
                raise ValueError("REPA is on, but no encoder features were given")
            losses["loss_repa"] = repa_loss(self.repa_head(out.hidden_BND), self.tokens.own(features_BNF))
            total = total + self.cfg.repa_weight * losses["loss_repa"]
        losses["loss"] = total
        share = self.tokens.share(patches_BNK.shape[1])
        if share == 0.0:
            # The mean over no token is NaN; backward must run, because it joins collectives.
            return {name: value.nan_to_num() * 0.0 for name, value in losses.items()}
        return {name: value * share for name, value in losses.items()} if share != 1.0 else losses

    def predict(self, patches_BNK: Tensor, t_B: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """The denoiser's output (B, N, K), velocity or image."""
        return self.denoiser(patches_BNK, t_B, condition, grid=grid).prediction_BNK

    def _target(self, image_BCYX: Tensor, noise_BCYX: Tensor, scored_BNK: Tensor, t_B: Tensor) -> Tensor:
        """Target velocity of this process's patches; with image prediction clamped as the predicted one is."""
        patch_size = self.denoiser.cfg.patch_size
        if self.cfg.prediction == "image":
            image_BNK = self.tokens.own(patchify(image_BCYX.float(), patch_size))
            return velocity_from_image(image_BNK, scored_BNK, t_B, self.cfg.t_eps)
        return self.tokens.own(patchify(image_BCYX.float() - noise_BCYX.float(), patch_size))

    def _pixel_losses(self, velocity_BNK: Tensor, target_BNK: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Flow loss, and the frequency loss if its weight is not 0.

        The Triton kernel computes both at once, for RGB patches that hold whole DCT blocks.
        """
        model, cfg = self.denoiser.cfg, self.cfg
        if cfg.freq_weight == 0:
            return {"loss_flow": flow_loss(velocity_BNK, target_BNK)}
        device = velocity_BNK.device
        weights = frequency_weights(cfg.freq_quality, gamma=cfg.freq_gamma, mode=cfg.freq_mode, device=device)
        # Blocks then lie inside patches and need no pixel of another patch.
        whole_blocks = model.patch_size % BLOCK == 0
        if self.kernels == "triton" and whole_blocks and model.channels == 3:
            from deco_scale.kernels.triton.losses import flow_and_frequency

            tables = block_transform(device), colour_matrix(device), weights
            losses = flow_and_frequency(velocity_BNK, target_BNK, *tables, model.patch_size)
            return dict(zip(("loss_flow", "loss_freq"), losses, strict=True))
        velocity_BNK = velocity_BNK.float()
        error_BNK = velocity_BNK - target_BNK
        if whole_blocks:
            error = error_BNK.flatten(0, 1).unflatten(-1, (model.channels, model.patch_size, -1))
        else:
            error = unpatchify(error_BNK, grid, model.patch_size)
        return {"loss_flow": flow_loss(velocity_BNK, target_BNK), "loss_freq": frequency_loss(error, weights)}


def drop_condition(condition: Tensor, null: Tensor, dropped_B: Tensor) -> Tensor:
    """Replace the condition of the samples in ``dropped_B`` (bool) by ``null``: text (L, T), or a 0-dim label."""
    mask = dropped_B.reshape(-1, *([1] * (condition.ndim - 1)))
    return torch.where(mask, null.to(condition.dtype), condition)
