"""``compile`` beside attention kernels that compiled blocks break at."""

import pytest
import torch

from deco_scale.config import RunConfig, load_config
from deco_scale.errors import ConfigError
from launcher.build import model
from launcher.build.model import check_compile, choose_compile
from tests.support import CONFIGS


def config(*overrides: str) -> RunConfig:
    return load_config(CONFIGS / "t2i_tiny.yaml", overrides)


def test_a_named_kernel_that_breaks_graphs_is_refused_with_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "graph_break", lambda name: "it breaks" if name == "te" else None)
    with pytest.raises(ConfigError, match=r"compile=true does not work with attention\.backend=te: it breaks"):
        check_compile(config("compile=true", "attention.backend=te"))
    for overrides in (["compile=true"], ["compile=false", "attention.backend=te"], ["attention.backend=te"]):
        check_compile(config(*overrides))
    assert not choose_compile(config("attention.backend=te"), torch.device("cuda"))[0]
