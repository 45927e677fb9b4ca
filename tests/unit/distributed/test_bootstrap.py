"""Defaults that CUDA and NCCL read when they start."""

import pytest

from deco_scale.distributed.bootstrap import set_cuda_defaults


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"PYTORCH_ALLOC_CONF": "backend:native"},
        {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "TORCH_NCCL_HIGH_PRIORITY": "0"},
    ],
)
def test_what_the_user_has_set_stays(given: dict[str, str]) -> None:
    variables = dict(given)
    set_cuda_defaults(variables)
    defaults = {"TORCH_NCCL_HIGH_PRIORITY": "1"}
    if not any("ALLOC_CONF" in name for name in given):
        defaults["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    assert variables == {**defaults, **given}
