"""The training objective as one module: a denoiser, the REPA head, and their losses as named scalars.

Engines wrap this module, so that its ``forward`` is all that a training step runs.
Shape letters: B batch, C channels, Y X pixels, N patches, K values of a patch.
"""

from typing import Protocol

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


class Tokens(Protocol):
    """Which tokens of a sequence this process scores."""

    def own(self, x_BND: Tensor) -> Tensor:
        """Those tokens of a whole sequence."""

    def share(self, count: int) -> float:
        """Their share of ``count`` tokens."""


class AllTokens:
    """One process scores everything."""

    def own(self, x_BND: Tensor) -> Tensor:
        return x_BND

    def share(self, count: int) -> float:
        return 1.0


class Objective(nn.Module):
    """Total loss = flow + freq_weight * frequency + repa_weight * REPA, each also on its own."""

    kernels: Kernels = "torch"

    def __init__(self, denoiser: Denoiser, cfg: ObjectiveConfig, *, encoder_dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.denoiser = denoiser
        self.tokens: Tokens = AllTokens()
        self.repa_head: RepaHead | None = None
        if cfg.repa_weight > 0:
            if cfg.repa_layer > denoiser.cfg.num_blocks:
                raise ValueError(f"repa_layer={cfg.repa_layer} but the model has {denoiser.cfg.num_blocks} blocks")
            self.repa_head = RepaHead(denoiser.cfg.dim, encoder_dim)

    def forward(
        self,
        image_BCYX: Tensor,
        noise_BCYX: Tensor,
        t_B: Tensor,
        condition: Tensor,
        features_BNF: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of images in [-1, 1], all fp32 scalars; ``loss`` is what to differentiate.

        Where the denoiser answers for some tokens only (``self.tokens``), these are this process's parts of
        the losses: over the processes that share the sequence they sum to the whole.
        """
        model = self.denoiser.cfg
        grid = model.grid(*image_BCYX.shape[-2:])
        patches_BNK = patchify(noised(image_BCYX, noise_BCYX, t_B), model.patch_size)
        scored_BNK = self.tokens.own(patches_BNK)
        target_BNK = self._target(image_BCYX, noise_BCYX, scored_BNK, t_B)
        out = self.denoiser(
            patches_BNK,
            t_B,
            condition,
            grid=grid,
            hidden_after=self.cfg.repa_layer if self.repa_head is not None else 0,
        )
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
            # The mean of no token at all; backward still has to run for the other processes' sake.
            return {name: value.nan_to_num() * 0.0 for name, value in losses.items()}
        return {name: value * share for name, value in losses.items()} if share != 1.0 else losses

    def predict(self, patches_BNK: Tensor, t_B: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """The denoiser's own output, velocity or image; here so that engines need to know one module only."""
        return self.denoiser(patches_BNK, t_B, condition, grid=grid).prediction_BNK

    def _target(self, image_BCYX: Tensor, noise_BCYX: Tensor, scored_BNK: Tensor, t_B: Tensor) -> Tensor:
        """True velocity of the patches that this process scores, clamped as the predicted one is."""
        patch_size = self.denoiser.cfg.patch_size
        if self.cfg.prediction == "image":
            image_BNK = self.tokens.own(patchify(image_BCYX.float(), patch_size))
            return velocity_from_image(image_BNK, scored_BNK, t_B, self.cfg.t_eps)
        return self.tokens.own(patchify(image_BCYX.float() - noise_BCYX.float(), patch_size))

    def _pixel_losses(self, velocity_BNK: Tensor, target_BNK: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Flow loss, and the frequency loss where it is on.

        The Triton kernel computes both at once, of patches that are RGB and hold whole DCT blocks.
        """
        model, cfg = self.denoiser.cfg, self.cfg
        if cfg.freq_weight == 0:
            return {"loss_flow": flow_loss(velocity_BNK, target_BNK)}
        device = velocity_BNK.device
        weights = frequency_weights(cfg.freq_quality, gamma=cfg.freq_gamma, mode=cfg.freq_mode, device=device)
        # Blocks then lie inside patches: no pixel of another patch is needed, in whatever order they are.
        whole_blocks = model.patch_size % BLOCK == 0
        if self.kernels == "triton" and whole_blocks and model.channels == 3:
            from deco_scale.kernels.triton.losses import flow_and_frequency

            flow, frequency = flow_and_frequency(
                velocity_BNK,
                target_BNK,
                block_transform(device),
                colour_matrix(device),
                weights,
                model.patch_size,
            )
            return {"loss_flow": flow, "loss_freq": frequency}
        velocity_BNK = velocity_BNK.float()
        error_BNK = velocity_BNK - target_BNK
        if whole_blocks:
            error = error_BNK.flatten(0, 1).unflatten(-1, (model.channels, model.patch_size, -1))
        else:
            error = unpatchify(error_BNK, grid, model.patch_size)
        return {"loss_flow": flow_loss(velocity_BNK, target_BNK), "loss_freq": frequency_loss(error, weights)}


def drop_condition(condition: Tensor, null: Tensor, dropped_B: Tensor) -> Tensor:
    """Replace the condition of the samples marked in ``dropped_B`` (bool) by the null condition.

    ``null`` is one embedding (L, T) for text, or a 0-dim label.
    """
    mask = dropped_B.reshape(-1, *([1] * (condition.ndim - 1)))
    return torch.where(mask, null.to(condition.dtype), condition)
