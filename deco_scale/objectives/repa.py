"""REPA: aligning a block's tokens with those of a frozen image encoder (Yu et al. 2024, arXiv 2410.06940).

Shape letters: B batch, N tokens, D model width, F encoder width.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class RepaHead(nn.Module):
    """Three-layer SiLU MLP from model tokens to encoder tokens."""

    def __init__(self, dim: int, encoder_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, encoder_dim)
        )

    def forward(self, hidden_BND: Tensor) -> Tensor:
        return self.layers(hidden_BND)


def repa_loss(projected_BNF: Tensor, features_BNF: Tensor) -> Tensor:
    """Mean of one minus the cosine similarity, token by token, in fp32.

    Raises ``ValueError`` when the encoder's tokens do not lie on the model's patch grid.
    """
    if projected_BNF.shape != features_BNF.shape:
        raise ValueError(
            f"encoder tokens {tuple(features_BNF.shape)} do not match the model's "
            f"{tuple(projected_BNF.shape)}: the encoder must see one of its patches per model patch"
        )
    similarity = F.cosine_similarity(projected_BNF.float(), features_BNF.float(), dim=-1)
    return (1.0 - similarity).mean()
