"""The Inception network of FID: names and sizes of the published file, its computation, its loading.

The published weights are not here: what their file holds is taken from public code that reads or writes it, the
computation is compared with a second reading of the published graph, on random weights.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deco_scale.errors import ConfigError
from deco_scale.evaluation.inception import (
    POOL_DIM,
    SPATIAL_DIM,
    WEIGHTS_NAME,
    WEIGHTS_URL,
    Inception,
    load_inception,
    resize_tf1,
)

# Blocks as chains of units, in the order in which their results are joined; "/2" is a stride of 2.
STEM = {"1a_3x3": 2, "2a_3x3": 1, "2b_3x3": 1, "3b_1x1": 1, "4a_3x3": 1}
UNPADDED = {"Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_4a_3x3"}
A = [["1x1"], ["5x5_1", "5x5_2"], ["3x3dbl_1", "3x3dbl_2", "3x3dbl_3"], ["mean", "_pool"]]
B = [["3x3/2"], ["3x3dbl_1", "3x3dbl_2", "3x3dbl_3/2"], ["max/2"]]
C = [
    ["1x1"],
    ["7x7_1", "7x7_2", "7x7_3"],
    ["7x7dbl_1", "7x7dbl_2", "7x7dbl_3", "7x7dbl_4", "7x7dbl_5"],
    ["mean", "_pool"],
]
D = [["3x3_1", "3x3_2/2"], ["7x7x3_1", "7x7x3_2", "7x7x3_3", "7x7x3_4/2"], ["max/2"]]
E = [
    ["1x1"],
    ["3x3_1", "3x3_2a"],
    ["3x3_1", "3x3_2b"],
    ["3x3dbl_1", "3x3dbl_2", "3x3dbl_3a"],
    ["3x3dbl_1", "3x3dbl_2", "3x3dbl_3b"],
    ["mean", "_pool"],
]
LAST = [*E[:-1], ["max", "_pool"]]
BLOCKS = {
    **{f"Mixed_5{i}": A for i in "bcd"},
    "Mixed_6a": B,
    **{f"Mixed_6{i}": C for i in "bcde"},
    "Mixed_7a": D,
    "Mixed_7b": E,
    "Mixed_7c": LAST,
}


def units() -> set[str]:
    """Names of all convolutions, as the conversion tables of public code list them."""
    names = {f"Conv2d_{name}" for name in STEM}
    for block, chains in BLOCKS.items():
        for chain in chains:
            names |= {f"{block}.branch{u.removesuffix('/2')}" for u in chain if u not in ("mean", "max", "max/2")}
    return names


def keys() -> set[str]:
    parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    return {f"{unit}.{part}" for unit in units() for part in parts} | {"fc.weight", "fc.bias"}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights that keep the size of activations, with batch statistics that matter."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in Inception().state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("conv.weight"):
            found[name] = noise * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            found[name] = 1 + 0.1 * noise.abs()
        else:
            found[name] = 0.02 * noise
    return found


@pytest.fixture(scope="module")
def network(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Inception:
    path = tmp_path_factory.mktemp("inception") / WEIGHTS_NAME
    # The published file is from before torch's zip format.
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return load_inception(path, torch.device("cpu"))


def test_names_and_sizes_are_the_published_files() -> None:
    """Sizes against an independent count: Keras' InceptionV3 of 1000 classes has 23,851,784 numbers.

    It has no batch norm scale (17,216 channels), and 8 classes less.
    """
    found = {n: t for n, t in Inception().state_dict().items() if not n.endswith("num_batches_tracked")}
    assert found.keys() == keys() and len(found) == 94 * 5 + 2
    assert sum(t.numel() for n, t in found.items() if n.endswith("bn.weight")) == 17_216
    assert sum(t.numel() for t in found.values()) == 23_851_784 + 17_216 + 8 * (POOL_DIM + 1)
    assert found["fc.weight"].shape == (1008, 2048)


def unit(state: dict[str, Tensor], name: str, x: Tensor, stride: int) -> Tensor:
    weight = state[f"{name}.conv.weight"]
    padded = stride == 1 and name not in UNPADDED
    x = F.conv2d(x, weight, stride=stride, padding=(weight.shape[2] // 2, weight.shape[3] // 2) if padded else 0)
    mean, var = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
    scale = state[f"{name}.bn.weight"] / (var + 0.001).sqrt()
    shift = state[f"{name}.bn.bias"] - mean * scale
    return (x * scale[:, None, None] + shift[:, None, None]).clamp(min=0)


def mean_of_existing(x: Tensor) -> Tensor:
    """3 x 3 sums divided by the number of pixels that are there."""
    ones = torch.ones(1, 1, *x.shape[2:])
    kernel = torch.ones(1, 1, 3, 3)
    sums = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).view_as(x)
    return sums / F.conv2d(ones, kernel, padding=1)


def second_reading(state: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Pool and spatial features from the tables above."""
    x = resize_tf1(images.permute(0, 3, 1, 2).float(), (299, 299)) / 128 - 1
    for name, stride in STEM.items():
        x = unit(state, f"Conv2d_{name}", x, stride)
        if name in ("2b_3x3", "4a_3x3"):
            x = F.max_pool2d(x, 3, 2)
    for block, chains in BLOCKS.items():
        if block == "Mixed_6d":
            # sFID's: the graph's mixed_6/conv, channels last, the first seven.
            spatial = unit(state, "Mixed_6d.branch1x1", x, 1).permute(0, 2, 3, 1)[..., :7]
        joined = []
        for chain in chains:
            y = x
            for step in chain:
                if step in ("mean", "max", "max/2"):
                    y = {
                        "mean": mean_of_existing,
                        "max": lambda z: F.max_pool2d(z, 3, 1, 1),
                        "max/2": lambda z: F.max_pool2d(z, 3, 2),
                    }[step](y)
                else:
                    y = unit(state, f"{block}.branch{step.removesuffix('/2')}", y, 2 if step.endswith("/2") else 1)
            joined.append(y)
        x = torch.cat(joined, dim=1)
    return x.mean(dim=(2, 3)), spatial.flatten(1)


def test_computes_what_the_published_graph_says(network: Inception, state: dict[str, Tensor]) -> None:
    images = torch.randint(0, 256, (2, 40, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pool, spatial = second_reading(state, images)
    found = network(images)
    assert found.pool_BF.shape == (2, POOL_DIM) and found.spatial_BF.shape == (2, SPATIAL_DIM)
    assert pool.std() > 1e-3 and (pool[0] - pool[1]).abs().max() > 1e-3
    torch.testing.assert_close(found.pool_BF, pool, rtol=1e-4, atol=1e-5 * pool.abs().max().item())
    torch.testing.assert_close(found.spatial_BF, spatial, rtol=1e-4, atol=1e-5 * spatial.abs().max().item())
    logits = pool @ state["fc.weight"].T
    torch.testing.assert_close(network.class_scores(pool), logits)


def test_an_image_is_scored_alone(network: Inception) -> None:
    images = torch.randint(0, 256, (3, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    together, alone = network(images), network(images[1:2])
    torch.testing.assert_close(together.pool_BF[1:2], alone.pool_BF, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in network.parameters()) and not network.training


def tf1_by_hand(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One channel, pixel by pixel, in float64."""
    out = np.empty(size)
    for i in range(size[0]):
        for j in range(size[1]):
            y, z = i * x.shape[0] / size[0], j * x.shape[1] / size[1]
            top, left = int(y), int(z)
            bottom, right = min(top + 1, x.shape[0] - 1), min(left + 1, x.shape[1] - 1)
            upper = x[top, left] * (1 - z + left) + x[top, right] * (z - left)
            lower = x[bottom, left] * (1 - z + left) + x[bottom, right] * (z - left)
            out[i, j] = upper * (1 - y + top) + lower * (y - top)
    return out


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.integers(1, 23)] * 4))
def test_resize_is_tensorflow_1s(sides: tuple[int, int, int, int]) -> None:
    source, target = sides[:2], sides[2:]
    x = np.random.default_rng(sum(sides)).random(source)
    found = resize_tf1(torch.from_numpy(x)[None, None], target)[0, 0].numpy()
    np.testing.assert_allclose(found, tf1_by_hand(x, target), rtol=1e-9, atol=1e-9)


def test_resize_keeps_the_first_pixel_and_is_not_pytorchs() -> None:
    x = torch.rand(1, 1, 4, 6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(resize_tf1(x, (4, 6)), x)
    doubled = resize_tf1(x, (8, 12))
    assert torch.equal(doubled[:, :, ::2, ::2], x)
    assert not torch.allclose(doubled, F.interpolate(x, size=(8, 12), mode="bilinear"), atol=1e-2)


def test_training_counters_and_both_file_formats_are_taken(
    network: Inception, state: dict[str, Tensor], tmp_path: Path
) -> None:
    counted = {n.replace("bn.bias", "bn.num_batches_tracked"): torch.tensor(0) for n in state if "bn.bias" in n}
    torch.save(state | counted, tmp_path / "w.pth")
    again = load_inception(tmp_path / "w.pth", torch.device("cpu"))
    for name, tensor in again.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(tensor, network.state_dict()[name])
    assert len(again.digest) == 64 and again.digest != network.digest and not again.published


def test_the_published_file_is_known_by_its_sum() -> None:
    network = Inception()
    assert not network.published
    network.digest = WEIGHTS_NAME.rsplit("-", 1)[1].removesuffix(".pth") + "0" * 56
    assert network.published


class Command:
    """Unpickled by a careless reader, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_what_is_no_weight_file_is_refused_with_the_files_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    renamed = {n.replace("Mixed_7c", "Mixed_7d"): t for n, t in state.items()}
    other_classes = state | {"fc.weight": torch.zeros(1000, 2048)}
    for case, content in {
        "missing": None,
        "text": b"no weights",
        "empty": b"",
        "names": renamed,
        "classes": other_classes,
        "list": [1, 2],
        "table": {"a": 1},
        "none": {},
        "hostile": {"a": Command(tmp_path / "executed")},
    }.items():
        path = tmp_path / f"{case}.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(ConfigError) as error:
            load_inception(path, torch.device("cpu"))
        for part in (str(path), WEIGHTS_NAME, WEIGHTS_URL):
            assert part in str(error.value), case
    assert not (tmp_path / "executed").exists()


@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_damaged_files_end_in_an_error_with_a_name(random: Any, new: bool, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.pth"
        torch.save({"fc.weight": torch.zeros(3, 4)}, path, _use_new_zipfile_serialization=new)
        data = bytearray(path.read_bytes())
        for _ in range(random.choice([1, 3, 20])):
            data[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(data[: random.randrange(len(data))] if cut else data)
        with pytest.raises(ConfigError):
            load_inception(path, torch.device("cpu"))
