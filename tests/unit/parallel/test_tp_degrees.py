"""Tensor parallelism: degrees and patch sizes that a model can have, and those that are refused."""

import dataclasses

import pytest

from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig
from deco_scale.models.tp_plan import check_tp
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.planning.layouts import tp_degrees
from deco_scale.planning.memory import layout_rows

TEXT = ModelConfig(
    kind="t2i_deco", dim=32, num_heads=4, num_blocks=1, patch_size=8, decoder_width=4, decoder_blocks=1,
    text_dim=4, text_tokens=2,
)  # fmt: skip


@pytest.mark.parametrize("patch_size", [1, 2, 4, 12, 20])
def test_blocks_of_the_frequency_loss_must_lie_inside_patches_with_tp(patch_size: int) -> None:
    model = dataclasses.replace(TEXT, patch_size=patch_size)
    check_tp(model, 1)
    assert layout_rows(model, ParallelDims(1, 2, 1))
    for tp in (2, 4):
        match = rf"parallel.tp={tp} needs model.patch_size={patch_size} to be a multiple of 8"
        with pytest.raises(ConfigError, match=match):
            check_tp(model, tp)
        with pytest.raises(ConfigError, match=match):
            layout_rows(model, ParallelDims(1, 1, tp))
    assert tp_degrees(model, 8) == [1]


@pytest.mark.parametrize("patch_size", [8, 16, 24])
def test_patches_of_whole_blocks_take_every_degree_that_divides_the_heads(patch_size: int) -> None:
    model = dataclasses.replace(TEXT, patch_size=patch_size)
    assert tp_degrees(model, 8) == [1, 2, 4]
    for tp in (3, 8):
        with pytest.raises(ConfigError, match=r"must divide model.num_heads=4.*possible: \[1, 2, 4\]"):
            check_tp(model, tp)


def test_heads_and_hidden_units_must_both_divide() -> None:
    """A class model of width 24 has 64 hidden units and six heads: 3 divides only those, 4 only the units."""
    model = ModelConfig(kind="c2i_baseline", dim=24, num_heads=6, num_blocks=1, patch_size=8, num_classes=2)
    assert model.mlp_hidden_dim == 64
    assert tp_degrees(model, 8) == [1, 2]
    for tp in (3, 4):
        with pytest.raises(ConfigError, match=r"64 hidden units; possible: \[1, 2\]"):
            check_tp(model, tp)
