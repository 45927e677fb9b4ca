"""What one forward pass of the objective takes.

Shape letters: B batch, C channels, Y X pixels, L text tokens, T text width, N patches, F encoder width.
"""

from typing import NamedTuple

from torch import Tensor


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
