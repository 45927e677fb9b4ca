"""Emulated FP8 against bf16, in the only unit that says something: the noise between two seeds.

Three runs see the same images, captions, noise and times: bf16 from initial weights A, FP8 from the same A,
bf16 from other initial weights B. Losses are smoothed, since a single step's is mostly that of its times.
"""

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.parallel.init_weights import initial_tensors
from deco_scale.precision.config import PrecisionConfig, autocast
from deco_scale.precision.fp8 import apply_fp8
from deco_scale.precision.fp8_plan import BatchShape, plan_fp8
from deco_scale.precision.recipe import choose_fp8

MODEL = ModelConfig(
    kind="t2i_deco", dim=32, num_heads=4, num_blocks=2, num_text_blocks=1, patch_size=16, decoder_width=8,
    decoder_blocks=1, text_dim=24, text_tokens=8,
)  # fmt: skip
STEPS, BATCH, SIDE, IMAGES, WINDOW = 200, 4, 32, 16, 10
CPU = torch.device("cpu")


def built(init_seed: int, compute: Literal["bf16", "fp8"]) -> Objective:
    """Objective with the initial weights of a seed, all of its block linears in FP8 where asked for."""

    def plain() -> Objective:
        return Objective(Denoiser(MODEL), ObjectiveConfig(repa_weight=0.0), encoder_dim=0)

    objective = plain()
    with torch.device("meta"):
        template = plain()
    objective.load_state_dict(dict(initial_tensors(template, init_seed)))
    if compute == "fp8":
        cfg = PrecisionConfig(compute="fp8", fp8_emulate=True)
        shape = BatchShape(BATCH, (SIDE // MODEL.patch_size) ** 2, MODEL.text_tokens)
        plan = plan_fp8(
            MODEL, cfg, choose_fp8(cfg, CPU), tp=1, batches=[shape], recompute="none", compile_blocks=False
        )
        assert len(plan.linears) == 4 + 2 * 5 and not plan.rejected
        apply_fp8(objective.denoiser, plan)
    return objective


def batches() -> list[ObjectiveInputs]:
    """Smooth images that their captions tell apart, with noise and times of their own at every step."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(IMAGES, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear").clamp(-1, 1)
    captions = torch.randn(IMAGES, MODEL.text_tokens, MODEL.text_dim, generator=generator)
    made = []
    for _ in range(STEPS):
        chosen = torch.randint(IMAGES, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
        times = torch.randn(BATCH, generator=generator).sigmoid()
        made.append(ObjectiveInputs(images[chosen], noise, times, captions[chosen], None))
    return made


def losses(objective: Objective, data: list[ObjectiveInputs]) -> Tensor:
    """Loss of each step of AdamW, smoothed over ``WINDOW`` steps."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    found = []
    for inputs in data:
        # Under FP8 the same context: everything else is bf16.
        with autocast(PrecisionConfig(compute="bf16"), CPU):
            loss = objective(*inputs)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found).unfold(0, WINDOW, 1).mean(-1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Operations this small only wait for one another's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_fp8_tracks_bf16_within_the_noise_between_two_seeds() -> None:
    data = batches()
    bf16, fp8 = losses(built(1, "bf16"), data), losses(built(1, "fp8"), data)
    other = losses(built(2, "bf16"), data)
    by_fp8, by_seed = ((run - bf16).abs().mean().item() for run in (fp8, other))
    print(
        f"\n{STEPS} steps, loss {bf16[0]:.4f} to {bf16[-1]:.4f}: "
        f"mean |fp8 - bf16| = {by_fp8:.5f}, mean |bf16 seed A - seed B| = {by_seed:.5f}"
    )
    assert bf16[-1] < bf16[0], "nothing was learnt, so nothing could differ"
    assert 0 < by_fp8 < by_seed
