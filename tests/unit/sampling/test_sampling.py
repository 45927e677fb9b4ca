"""Solvers: order of convergence, guidance, grids."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.sampling import (
    ImageGenerator,
    SamplerConfig,
    SampleRequest,
    sample,
    time_grid,
)
from deco_scale.sampling.cuda_graphs import CudaGraphedVelocity
from deco_scale.sampling.generate import check_size
from deco_scale.sampling.guidance import guidance_at, guided_velocity, rescaled
from deco_scale.sampling.images import save_grid, to_uint8, velocity_of
from deco_scale.sampling.samplers import adams_weights

SOLVERS: list[dict[str, Any]] = [
    {"solver": "euler"}, {"solver": "heun"}, *({"solver": "adams", "order": order} for order in (1, 2, 3, 4)),
]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_error_falls_with_the_solver_order(solver: dict[str, Any]) -> None:
    """Slope of the error of x' = x * 2 t^4 over the number of steps, both logarithmic, on a shifted grid.

    The field is flat where it begins: Adams takes its first steps with lower orders, whose error would otherwise
    be all that a slope shows.
    """

    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return x * (2 * t**4).view(-1, 1)

    counts, errors = [160, 320, 640], []
    for count in counts:
        cfg = SamplerConfig(num_steps=count, guidance=1.0, timestep_shift=2.0, **solver)
        found = sample(velocity, torch.ones(1, 1, dtype=torch.float64), torch.zeros(1), torch.zeros(1), cfg)
        errors.append(abs(found.item() - math.exp(2 / 5)))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-{"euler": 1, "heun": 2}.get(solver["solver"], solver.get("order")), abs=0.2)


def reference(cfg: SamplerConfig, x: np.ndarray, condition: float, null: float) -> np.ndarray:
    """The sampler in float64, written from its formulas; the field is that of the test below."""
    uniform = np.append(np.arange(cfg.num_steps) / cfg.num_steps, 1.0)
    times = uniform / (uniform + (1 - uniform) * cfg.timestep_shift)

    def guided(x: np.ndarray, t: float) -> np.ndarray:
        v_cond, v_null = (
            condition * np.cos(3 * t) - 0.3 * x**2 * a for a, condition in ((1, condition), (2, null))
        )
        inside = cfg.guidance_min < t and (
            t < cfg.guidance_max or (cfg.solver != "adams" and t == cfg.guidance_max)
        )
        if not inside or cfg.guidance == 1:
            return v_cond
        v = v_null + cfg.guidance * (v_cond - v_null)
        image, plain = x + (1 - t) * v, x + (1 - t) * v_cond
        ratio = [np.std(p, ddof=1) / np.std(i, ddof=1) for p, i in zip(plain, image, strict=True)]
        factor = cfg.guidance_rescale * np.asarray(ratio) + 1 - cfg.guidance_rescale
        return (factor[:, None, None, None] * image - x) / (1 - t)

    past: list[np.ndarray] = []
    for step, (t, end) in enumerate(itertools.pairwise(times)):
        v = guided(x, t)
        past = [*past, v][-(cfg.order if cfg.solver == "adams" else 1) :]
        nodes = times[step + 1 - len(past) : step + 1] - t
        powers = np.arange(len(past))
        # Weights that are exact for every power up to the number of nodes.
        weights = np.linalg.solve(nodes[None, :] ** powers[:, None], (end - t) ** (powers + 1) / (powers + 1))
        ahead = x + sum(w * p for w, p in zip(weights, past, strict=True))
        last = step == cfg.num_steps - 1
        x = x + (end - t) / 2 * (v + guided(ahead, end)) if cfg.solver == "heun" and not last else ahead
    return x


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_samplers_equal_a_float64_reference(solver: dict[str, Any], rescale: float) -> None:
    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        c, t = condition.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
        return c * torch.cos(3 * t) - 0.3 * x**2 * torch.where(c == 0.25, 2.0, 1.0)

    cfg = SamplerConfig(
        num_steps=11, guidance=2.5, guidance_min=0.15, guidance_max=0.8, guidance_rescale=rescale,
        timestep_shift=2.0, **solver,
    )  # fmt: skip
    noise = torch.randn(3, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    found = sample(velocity, noise, torch.full((3,), 0.75), torch.full((3,), 0.25), cfg)
    wanted = reference(cfg, noise.double().numpy(), 0.75, 0.25)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - wanted).max() < 5e-6 * np.abs(wanted).max()


def test_rescaled_guidance_has_the_deviation_of_the_prediction_without() -> None:
    draw = torch.Generator().manual_seed(0)
    x, v_cond, v_null = (torch.randn(2, 3, 4, 4, generator=draw) for _ in range(3))
    t, guided = torch.tensor(0.3), v_null + 5 * (v_cond - v_null)
    image = x + 0.7 * rescaled(guided, v_cond, x, t, 1.0)
    assert torch.allclose(image.flatten(1).std(1), (x + 0.7 * v_cond).flatten(1).std(1), rtol=1e-5)
    assert torch.allclose(rescaled(guided, v_cond, x, t, 0.0), guided, atol=1e-5)
    # Of one colour: nothing to match, and nothing that is no number.
    flat = torch.ones(1, 3, 4, 4)
    assert torch.allclose(rescaled(flat, flat, flat, t, 0.7), flat, atol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_integrate_polynomials_exactly(order: int) -> None:
    # The whole solver cannot show orders 3 and 4, since its first steps are of lower order.
    times = time_grid(12, 3.0).double()
    for step in (0, 2, 9):
        weights = adams_weights(times, step, order)
        nodes = times[step + 1 - len(weights) : step + 1]
        start, end = times[step], times[step + 1]
        for power in range(len(weights)):
            found = (torch.tensor(weights, dtype=torch.float64) * nodes**power).sum() * (end - start)
            wanted = (end ** (power + 1) - start ** (power + 1)) / (power + 1)
            assert found.item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)


def test_second_order_weights_are_the_published_ones() -> None:
    times = time_grid(10, 3.0)
    steps = times.diff().double()
    r = (steps[4] / (2 * steps[3])).item()
    assert adams_weights(times, 4, 2) == pytest.approx([-r, 1 + r], rel=1e-6)
    for order in (1, 2, 3, 4):
        assert sum(adams_weights(times, 7, order)) == pytest.approx(1.0)
        assert len(adams_weights(times, 1, order)) == min(order, 2)


def test_interval_is_compared_in_fp32() -> None:
    # The shifted grid can hold exactly fp32(0.1), which as a Python float is greater than 0.1.
    cfg = SamplerConfig(solver="euler", guidance=4.0, guidance_min=0.1)
    assert guidance_at(cfg, torch.tensor(0.1, dtype=torch.float32)) == 1.0
    assert guidance_at(cfg, torch.tensor(0.11)) == 4.0
    assert guidance_at(cfg, torch.tensor(1.0)) == 4.0
    assert guidance_at(SamplerConfig(solver="adams", guidance=4.0), torch.tensor(1.0)) == 1.0


def test_guidance_extrapolates_from_the_null_condition() -> None:
    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return condition.expand_as(x)

    x, one, zero = torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(2, 1)
    assert guided_velocity(velocity, x, torch.tensor(0.5), one, zero, 3.0).tolist() == [[3.0], [3.0]]
    assert guided_velocity(velocity, x, torch.tensor(0.5), one, zero, 1.0).tolist() == [[1.0], [1.0]]


def test_images_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    generator, cfg = generator_of(Words()), SamplerConfig(num_steps=4)
    requests = [SampleRequest(text, seed=seed) for text, seed in (("a", 5), ("bc", 6), ("def", 7))]
    made = [
        np.stack([pixels for _, pixels in generator.images(requests, size=(8, 8), sampler=cfg, batch=batch)])
        for batch in (1, 3)
    ]
    assert np.array_equal(*made)
    save_grid(made[0], tmp_path / "grid.png", columns=2, labels=["a", "b", "c"])
    # Enlarged 12 times, with a border of 2 pixels and a label of 14 pixels each.
    assert Image.open(tmp_path / "grid.png").size == (2 * 98, 2 * 112)


def test_graphs_without_a_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="need a GPU, this process computes on cpu"):
        CudaGraphedVelocity(lambda x, t, condition: x, torch.device("cpu"))


def test_rounding_to_bytes() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    "bad",
    [
        {"num_steps": 0}, {"order": 5}, {"timestep_shift": 0.0}, {"timestep_shift": math.inf}, {"solver": "rk4"},
        {"guidance_max": 2.0}, {"guidance": math.nan}, {"guidance_rescale": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)).split("_")[0]):
        SamplerConfig(**bad)


TEXT_MODEL = ModelConfig(
    kind="t2i_deco", dim=16, num_heads=2, num_blocks=1, patch_size=4, decoder_width=4, decoder_blocks=1,
    text_dim=2, text_tokens=1,
)  # fmt: skip
CLASS_MODEL = ModelConfig(kind="c2i_baseline", dim=8, num_heads=2, num_blocks=1, patch_size=4, num_classes=3)


class Words:
    """A text encoder of one token (length, first letter) that counts how often it sees each text."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.seen += texts
        return torch.tensor([[[len(t) / 10, ord(t[:1] or "@") / 200]] for t in texts])


def generator_of(words: Words) -> ImageGenerator:
    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return condition.sum((1, 2)).view(-1, 1, 1, 1) - 0.3 * x

    return ImageGenerator(velocity, TEXT_MODEL, encode=words, null=words([""])[0], device=torch.device("cpu"))


def test_each_text_is_encoded_once_and_an_image_depends_on_its_job_alone() -> None:
    words, cfg = Words(), SamplerConfig(num_steps=3)
    generator = generator_of(words)
    jobs = [SampleRequest(prompt, index, index, negative) for prompt in ("cat", "bird") for index in range(3)
            for negative in ("", "blur")]  # fmt: skip
    steps: list[tuple[int, int]] = []

    def on_step(done: int, total: int) -> None:
        steps.append((done, total))

    drawn = list(generator.images(jobs, size=(8, 4), sampler=cfg, batch=5, on_step=on_step))
    assert [job for job, _ in drawn] == jobs and drawn[0][1].shape == (8, 4, 3)
    assert sorted(words.seen) == ["", "bird", "blur", "cat"]
    assert steps == [(i, 9) for i in range(1, 10)]
    backwards = dict(generator.images(jobs[::-1], size=(8, 4), sampler=cfg, batch=2))
    assert all(np.array_equal(backwards[job], pixels) for job, pixels in drawn)
    assert len({pixels.tobytes() for _, pixels in drawn}) == len(jobs)


def test_a_negative_prompt_leaves_no_trace() -> None:
    generator, cfg = generator_of(Words()), SamplerConfig(num_steps=3)
    plain = [SampleRequest("cat"), SampleRequest("dog", 1, 1)]

    def draw(jobs: list[SampleRequest]) -> list[bytes]:
        return [p.tobytes() for _, p in generator.images(jobs, size=(4, 4), sampler=cfg, batch=4)]

    before, null = draw(plain), generator.null
    mixed = draw([plain[0], plain[0]._replace(negative="x"), plain[1]])
    assert [mixed[0], mixed[2]] == before and mixed[1] != before[0]
    assert draw(plain) == before and torch.equal(generator.null, null)
    generator.null.zero_()
    assert torch.equal(generator.null, null)


@pytest.mark.parametrize(
    ("job", "size", "batch", "message"),
    [
        (SampleRequest(3), (4, 4), 1, "classes from 0 to 2, not 3"),
        (SampleRequest("cat"), (4, 4), 1, "classes from 0 to 2, not 'cat'"),
        (SampleRequest(1, negative="x"), (4, 4), 1, "no negative prompt"),
        (SampleRequest(1), (4, 6), 1, "4x6: both sides must be positive multiples of 4"),
        (SampleRequest(1), (0, 4), 1, "0x4"),
        (SampleRequest(1), (4000, 4000), 1, "1000000 patches of 4, the maximum is 16384"),
        (SampleRequest(1), (4, 4), 0, "batch=0"),
    ],
    ids=str,
)
def test_impossible_images_are_refused_before_any_is_drawn(
    job: SampleRequest, size: tuple[int, int], batch: int, message: str
) -> None:
    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        raise AssertionError("nothing may be drawn")

    generator = ImageGenerator(
        velocity, CLASS_MODEL, encode=None, null=torch.tensor(3), device=torch.device("cpu")
    )
    with pytest.raises(ValueError, match=message):
        generator.images([SampleRequest(0), job], size=size, sampler=SamplerConfig(), batch=batch)


def test_sizes_that_fit_are_taken() -> None:
    for size in ((4, 4), (8, 64), (512, 512)):
        check_size(size, 4)


def transposed(denoiser: Denoiser) -> Denoiser:
    """The model that sees rows as columns: every weight that knows the axes of a patch, a grid or a pixel."""
    cfg, state = denoiser.cfg, {n: t.clone() for n, t in denoiser.state_dict().items()}
    side, channels = cfg.patch_size, cfg.channels

    def swap(tensor: Tensor, dim: int, first: int) -> Tensor:
        """Transpose the pixels (side, side) of dimension ``dim``, with ``first`` parts outside of them."""
        parts = tensor.unflatten(dim, (first, side, side, -1))
        return parts.transpose(dim + 1, dim + 2).flatten(dim, dim + 3)

    def pairs(tensor: Tensor, dim: int) -> Tensor:
        """Exchange the column and row angles of heads: pairs of two values, x and y in turn."""
        return tensor.unflatten(dim, (-1, 2, 2)).flip(dim + 1).flatten(dim, dim + 2)

    for name, tensor in state.items():
        if name == "patch_embed.weight":
            state[name] = swap(tensor, 1, channels)
        elif name.startswith("final.head"):
            state[name] = swap(tensor, 0, channels)
        elif name.startswith("decoder.cond_proj"):
            state[name] = swap(tensor, 0, 1)
        elif name == "decoder.pixel_embed.weight":
            pixels, features = tensor.split([channels, 64], 1)
            shape = (32, 2) if cfg.kind == "t2i_deco" else (8, 8)
            grid = features.unflatten(1, shape)
            features = grid.flip(2) if cfg.kind == "t2i_deco" else grid.transpose(1, 2)
            state[name] = torch.cat([pixels, features.flatten(1)], 1)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            state[name] = pairs(tensor, 0)
        elif name.endswith(("attn.qkv.weight", "attn.context_kv.weight")):
            count = 3 if name.endswith("qkv.weight") else 2
            heads = tensor.unflatten(0, (cfg.num_heads, count, cfg.head_dim))
            parts = [pairs(part, 1) if i < count - 1 else part for i, part in enumerate(heads.unbind(1))]
            state[name] = torch.stack(parts, 1).flatten(0, 2)
    other = Denoiser(cfg)
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("kind", ["t2i_deco", "c2i_deco", "c2i_baseline"])
@pytest.mark.parametrize("size", [(8, 8), (8, 20), (12, 4)], ids=str)
def test_transposing_input_and_weights_transposes_the_image(kind: str, size: tuple[int, int]) -> None:
    decoder = {} if kind == "c2i_baseline" else {"decoder_width": 6, "decoder_blocks": 2}
    condition = (
        {"text_dim": 5, "text_tokens": 3, "num_text_blocks": 1} if kind == "t2i_deco" else {"num_classes": 4}
    )
    cfg = ModelConfig(kind=kind, dim=32, num_heads=2, num_blocks=2, patch_size=4, **decoder, **condition)  # type: ignore[arg-type]
    torch.manual_seed(0)
    denoiser = Denoiser(cfg)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sampler = SamplerConfig(num_steps=4, guidance=2.0)
    noise = torch.randn(2, 3, *size)
    given = torch.randn(2, 3, 5) if kind == "t2i_deco" else torch.tensor([1, 3])
    null = torch.zeros(2, 3, 5) if kind == "t2i_deco" else torch.tensor([4, 4])

    @torch.no_grad()
    def draw(model: Denoiser, noise: Tensor) -> Tensor:
        velocity = velocity_of(lambda p, t, c, g: model(p, t, c, grid=g).prediction_BNK, 4)
        return sample(velocity, noise, given, null, sampler)

    wanted = draw(denoiser, noise)
    found = draw(transposed(denoiser), noise.transpose(-1, -2).contiguous()).transpose(-1, -2)
    scale = wanted.abs().max().item()
    assert (found - wanted).abs().max().item() < 1e-4 * scale
    # Not what the same weights make of the transposed noise.
    assert (draw(denoiser, noise.transpose(-1, -2)).transpose(-1, -2) - wanted).abs().max().item() > 0.01 * scale
