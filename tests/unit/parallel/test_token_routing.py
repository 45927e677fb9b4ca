"""Tokens lie in memory sequence first under tensor parallelism: nothing is copied for collectives and linears."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.parallel.sequence_parallel import TokenShard
from deco_scale.parallel.token_routing import route_tokens

MODEL = ModelConfig(
    kind="t2i_deco", dim=32, num_heads=4, num_blocks=2, num_text_blocks=1, patch_size=8, decoder_width=8,
    decoder_blocks=1, text_dim=12, text_tokens=6,
)  # fmt: skip
COPIES = ("aten::clone", "aten::copy_", "aten::cat", "aten::constant_pad_nd", "aten::_to_copy")


class Copies(TorchDispatchMode):
    """Counts operations that only move data, but for concatenated keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in COPIES:
            self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def shard() -> Iterator[TokenShard]:
    """The first of two ranks; the other one is not there, and what it would send is arbitrary."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield TokenShard(dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture
def denoiser(shard: TokenShard) -> Denoiser:
    objective = Objective(Denoiser(MODEL), ObjectiveConfig(repa_weight=0.0), encoder_dim=0)
    route_tokens(objective, shard)
    return objective.denoiser


def test_tokens_stay_sequence_first_from_block_to_block(denoiser: Denoiser) -> None:
    found: list[Tensor] = []
    for block in denoiser.transformer_blocks:
        block.register_forward_hook(lambda m, args, output: found.append(output))
    denoiser(torch.randn(3, 16, MODEL.patch_values), torch.rand(3), torch.randn(3, 6, 12), grid=(4, 4))
    # The last text block's output is that of the gather.
    assert [tuple(x.shape) for x in found] == [(3, 6, 32), (3, 8, 32), (3, 8, 32)]
    assert all(x.transpose(0, 1).is_contiguous() for x in found)


def test_the_mlp_copies_nothing_for_collectives_and_linears(denoiser: Denoiser) -> None:
    block = denoiser.blocks[0]
    x = torch.randn(8, 3, 32).transpose(0, 1).requires_grad_()
    block.mlp.length.tokens = 16
    with Copies() as copies:
        out = block.mlp(x)
        assert out.shape == (3, 8, 32)
        out.backward(torch.randn(8, 3, 32).transpose(0, 1))
    # The gradients of gate and up become one tensor.
    assert copies.calls == {"aten::cat": 1}
