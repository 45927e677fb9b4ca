"""The demo page's checks and its service: any values are an request within the limits or a plain error."""

import json
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from torch import Tensor

from deco_scale.cli import demo
from deco_scale.demo_app.limits import is_loopback
from deco_scale.demo_app.service import RETAINED_REQUESTS, DemoService
from deco_scale.demo_app.validation import FIELDS, MAX_SEED, SOLVERS, GenerationLimits, RequestError, check_request
from deco_scale.errors import RunError
from deco_scale.models import ModelConfig
from deco_scale.sampling import SamplerConfig
from deco_scale.sampling.generate import ImageGenerator
from tests.support.browser import GOOD, LIMITS

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(SOLVERS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(
    changed=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=3),
    numbers=st.dictionaries(st.sampled_from(["steps", "width", "height", "count"]), st.integers(-9, 90)),
    num_classes=st.sampled_from([0, 10]),
)
def test_any_values_give_a_request_within_the_limits_or_a_plain_error(
    changed: dict[str, Any], numbers: dict[str, int], num_classes: int
) -> None:
    raw = GOOD | ({"subject": 4} if num_classes else {}) | changed | numbers
    try:
        request = check_request(raw, LIMITS, patch_size=16, num_classes=num_classes)
    except RequestError as error:
        assert len(str(error)) < 200 and str(error).endswith(".")
        return
    assert request.height in (16, 32, 48, 64) and request.width in (16, 32, 48, 64)
    assert 1 <= request.count <= 4 and 1 <= request.num_steps <= 20 and 0 <= request.guidance <= 30
    assert request.seed is None or 0 <= request.seed <= MAX_SEED - request.count
    assert request.solver in SOLVERS and isinstance(request.condition, int if num_classes else str)
    assert type(request.count) is int and type(request.guidance) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 40}, "Width: 40 is not a multiple of the model's patch, 16 pixels."),
        ({"height": 80}, "Height: 80 is out of range, 16 to 64."),
        ({"steps": 2.5}, "Steps: 2.5 is not an integer."),
        ({"steps": True}, "Steps: True is not a number."),
        ({"guidance": math.nan}, "Guidance: nan is not a finite number."),
        ({"count": None}, "Images: nothing is not a number."),
        ({"seed": MAX_SEED}, "Seed: 2147483647 is out of range, 0 to 2.14748e+09."),
        ({"subject": " \n"}, "Prompt: it is empty."),
        ({"subject": "a" * 1001}, "Prompt: 1001 characters are too many, the maximum is 1000."),
        ({"subject": "\ud800"}, "Prompt: it has a lone surrogate."),
        ({"negative": ["a"]}, "Negative prompt: a list is not text."),
        ({"solver": "Euler"}, "Solver: 'Euler' is not one of euler, heun, adams."),
    ],
)
def test_messages_name_the_field_and_what_is_allowed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        check_request(GOOD | change, LIMITS, patch_size=16, num_classes=0)
    assert str(error.value) == message


def class_service(folder: Path, max_seconds: float = 60.0) -> DemoService:
    """A class model that moves towards a colour of its class."""
    model = ModelConfig(kind="c2i_baseline", dim=8, num_heads=1, num_blocks=1, patch_size=4, num_classes=5)

    def velocity(x: Tensor, t_B: Tensor, condition: Tensor) -> Tensor:
        return (condition / 5)[:, None, None, None] - x

    generator = ImageGenerator(
        velocity, model, encode=None, null=torch.tensor(5), device=torch.device("cpu"), digest="abc"
    )
    limits = GenerationLimits(max_side=8, max_images=2, max_steps=5)
    return DemoService(generator, SamplerConfig(), folder, limits=limits, batch=2, max_seconds=max_seconds)


def test_a_class_model_draws_again_what_its_settings_say_and_old_images_go(tmp_path: Path) -> None:
    service = class_service(tmp_path / "images")
    request = GOOD | {"subject": 4, "width": 8, "height": 4, "random": True, "seed": None}
    steps: list[tuple[int, int]] = []
    drawn = service.generate(request, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)] and len(drawn) == 2
    first = drawn[0].settings
    assert (
        first["class"] == 4
        and first["checkpoint_digest"] == "abc"
        and drawn[1].settings["seed"] == first["seed"] + 1
    )
    with Image.open(drawn[0].path) as image:
        assert image.size == (8, 4) and json.loads(image.info["deco"]) == first
        pixels = np.asarray(image)
    again = service.generate(
        request | {"random": False, "seed": first["seed"], "count": 1}, lambda done, total: None
    )
    with Image.open(again[0].path) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
    with pytest.raises(RequestError, match="not available for class models"):
        service.generate(request | {"negative": "red"}, lambda done, total: None)
    for _ in range(RETAINED_REQUESTS + 3):
        newest = service.generate(request, lambda done, total: None)
    files = [path for path in (tmp_path / "images").rglob("*") if path.is_file()]
    assert len(files) == 2 * RETAINED_REQUESTS and newest[0].path in files and not drawn[0].path.exists()


def test_a_request_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    service = class_service(tmp_path / "images", max_seconds=0.0)
    with pytest.raises(RequestError, match="longer than 0 seconds"):
        service.generate(GOOD | {"subject": 1, "width": 8, "height": 8}, lambda done, total: None)
    assert not list((tmp_path / "images").iterdir())


def test_what_is_loopback() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", "localhost.example.org", ""):
        assert not is_loopback(host)


def test_an_ipv6_address_without_ipv6_is_a_plain_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with pytest.raises(RunError, match="--host ::1 --port 0"):
        demo._serve(None, "[::1]", 0, Console())
