"""What fsdp gathers together: every unit of the denoiser once, in the order of a forward pass."""

import pytest
import torch

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.parallel.config import BLOCKS_GATHERED
from deco_scale.parallel.engines.fsdp import shard_units


@pytest.mark.parametrize("reshard_after_forward", [True, False])
@pytest.mark.parametrize(("blocks", "text_blocks"), [(6, 2), (1, 5), (4, 1)])
def test_units_are_all_modules_in_order(blocks: int, text_blocks: int, reshard_after_forward: bool) -> None:
    model = ModelConfig(
        kind="t2i_deco", dim=16, num_heads=2, num_blocks=blocks, num_text_blocks=text_blocks, patch_size=8,
        decoder_width=8, decoder_blocks=1, text_dim=16, text_tokens=8,
    )  # fmt: skip
    with torch.device("meta"):
        denoiser = Denoiser(model)
    units = shard_units(denoiser, reshard_after_forward=reshard_after_forward)
    assert [module for unit in units for module in unit] == list(denoiser.units)
    most = 1 if reshard_after_forward else BLOCKS_GATHERED
    assert len(units) == -(-text_blocks // most) + -(-blocks // most) + 1
    assert all(len({type(module) for module in unit}) == 1 and len(unit) <= most for unit in units)
