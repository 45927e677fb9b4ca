"""``deco spectrum``: DCT energy of the DiT's tokens and of the velocity, of one or several checkpoints.

    deco spectrum --checkpoint runs/deco --checkpoint runs/baseline --label DeCo --label baseline --out spectrum

:mod:`deco_scale.evaluation.spectrum` has the definitions and their source. The paper uses 10,000 images.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from data_pipeline.config import DataConfig
from data_pipeline.console import RenamedOption, positive_int, print_line, progress_bar
from data_pipeline.decode import DecodeError, decode
from data_pipeline.errors import Reject
from data_pipeline.pack.readers import read_source
from data_pipeline.stream.loader import Loader
from deco_scale.cli.model_loading import build_generator, load_denoiser, read_checkpoint
from deco_scale.config import RunConfig
from deco_scale.distributed.bootstrap import choose_device
from deco_scale.errors import ConfigError, as_config_error
from deco_scale.evaluation.spectrum import (
    BLOCK,
    SIGNALS,
    Spectrum,
    SpectrumProbe,
    draw,
    normalised,
    probe_images,
    probe_samples,
    write_csv,
)
from deco_scale.sampling import SamplerConfig, time_grid
from deco_scale.sampling.images import seeded_noise
from deco_scale.sampling.prompts import read_prompts

DATA_TIMES = tuple((i + 0.5) / 10 for i in range(10))
_HIGH = 32
"""Zig-zag index of the first high frequency in the printed share: the upper half."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes spectrum.csv and spectrum.png. Without --data or --folder each model samples its own images "
        "(Euler, no guidance) and all steps are measured, as in the paper; otherwise the images are noised to "
        "--times. It uses EMA weights, and the same noise for every checkpoint."
    )
    parser.add_argument("--checkpoint", type=Path, action="append", required=True, help="may be repeated")
    parser.add_argument("--label", action="append", help="one per checkpoint; default: its folder's name")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", help="URL of packed and indexed shards; a shuffled subset is used")
    source.add_argument("--folder", help="images with .txt, .json or .cls beside them; the first ones are used")
    parser.add_argument("--prompts", type=Path, help="file with one prompt per line, for sampling by text models")
    parser.add_argument("--images", type=positive_int, default=64)
    parser.add_argument(
        "--pictures", dest="images", type=positive_int, action=RenamedOption, help=argparse.SUPPRESS
    )
    parser.add_argument("--batch", type=positive_int, default=16)
    parser.add_argument("--size", type=int, help="side in pixels; default: the last stage's")
    parser.add_argument("--num-steps", type=int, default=100, help="Euler steps, while sampling")
    parser.add_argument("--timestep-shift", type=float, default=1.0, help="of the time grid, while sampling")
    parser.add_argument("--times", type=float, nargs="+", help="between 0 and 1, with --data or --folder")
    parser.add_argument("--seed", type=int, default=0, help="of the first image's noise")
    parser.add_argument("--text-encoder", help="its folder, if it has moved since training")


def run(args: argparse.Namespace, console: Console) -> int:
    """One spectrum per checkpoint, then one table of curves and one figure of all."""
    labels = _labels(args)
    with as_config_error("--num-steps and --timestep-shift: "):
        shift = args.timestep_shift
        sampler = SamplerConfig(solver="euler", num_steps=args.num_steps, guidance=1.0, timestep_shift=shift)
    times = _times(args, sampler)
    spectra: dict[str, Spectrum] = {}
    device = choose_device("auto", 0)
    for label, checkpoint in zip(labels, args.checkpoint, strict=True):
        path, cfg, meta = read_checkpoint(checkpoint)
        is_text, size = cfg.model.kind == "t2i_deco", _size(args, cfg)
        images, conditions = _inputs(args, cfg, size)
        denoiser = load_denoiser(cfg, path, device)
        generator = build_generator(denoiser, cfg, meta, text_encoder=args.text_encoder if is_text else None)
        probe = SpectrumProbe(denoiser, generator.velocity, times=times)
        with progress_bar(console, label, len(conditions)) as update:
            for start in range(0, len(conditions), args.batch):
                part = conditions[start : start + args.batch]
                end = start + len(part)
                noise = seeded_noise(range(args.seed + start, args.seed + end), (cfg.model.channels, size, size))
                noise = noise.to(device)
                condition = generator.encode(part) if is_text else torch.tensor(part, device=device)
                if images is None:
                    probe_samples(probe, noise, condition, generator.null, sampler=sampler)
                else:
                    pixels = torch.from_numpy(images[start:end]).to(device).permute(0, 3, 1, 2)
                    probe_images(probe, pixels.float() / 127.5 - 1, noise, condition, times=times)
                update(completed=end)
        spectra[label] = probe.spectrum()
        _print_summary(label, spectra[label], console)
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "spectrum.csv", spectra)
    draw(args.out / "spectrum.png", spectra)
    print_line(console, f"curves in {args.out / 'spectrum.csv'}, figure in {args.out / 'spectrum.png'}")
    return 0


def _inputs(args: argparse.Namespace, cfg: RunConfig, size: int) -> tuple[Any, list[Any]]:
    """Uint8 images ``(P, Y, X, 3)``, None if the model samples its own, and P prompts or classes."""
    is_text = cfg.model.kind == "t2i_deco"
    if not args.data and not args.folder:
        choices: Sequence[str | int] = range(cfg.model.num_classes)
        if is_text:
            choices = read_prompts(args.prompts) if args.prompts else cfg.samples.prompts
        if not choices:
            raise ConfigError("the run has no samples.prompts: give --prompts FILE, --data or --folder")
        return None, [choices[i % len(choices)] for i in range(args.images)]
    if args.data:
        target: Literal["caption", "label"] = "caption" if is_text else "label"
        data = DataConfig(url=args.data, target=target, workers=0, prefix_probability=0.0)
        loader = Loader(data, resolution=size, seed=args.seed, global_batch=args.images, rank=0, world=1, start=0)
        with closing(loader):
            batch = next(iter(loader))
        images = batch.images
        conditions: list[Any] = batch.captions if is_text else batch.labels
    else:
        images, conditions = _read_folder(args, is_text, size)
    unknown = [] if is_text else [label for label in conditions if not 0 <= label < cfg.model.num_classes]
    if unknown:
        last = cfg.model.num_classes - 1
        raise ConfigError(f"{args.data or args.folder} has class {unknown[0]}, the model has 0 to {last}")
    return images, conditions


def _read_folder(args: argparse.Namespace, is_text: bool, size: int) -> tuple[Any, list[Any]]:
    rejects: list[Reject] = []
    images: list[Any] = []
    conditions: list[Any] = []
    for sample in read_source(args.folder, rejects):
        if len(images) == args.images:
            break
        condition = next(iter(sample.captions), None) if is_text else sample.label
        if condition is None:
            rejects.append(Reject(sample.name, f"no {'caption' if is_text else 'class number'}"))
            continue
        try:
            pixels = decode(sample.image, (size, size), mode="exact", max_pixels=DataConfig(url="-").max_pixels)
        except DecodeError as error:
            rejects.append(Reject(sample.name, str(error)))
            continue
        images.append(pixels)
        conditions.append(condition)
    if len(images) < args.images:
        why = f"; {len(rejects)} were rejected, the first: {rejects[0]}" if rejects else ""
        raise ConfigError(f"--folder {args.folder} gives {len(images)} of --images {args.images}{why}")
    return np.stack(images), conditions


def _labels(args: argparse.Namespace) -> list[str]:
    labels = args.label or [path.resolve().name for path in args.checkpoint]
    if len(labels) != len(args.checkpoint):
        raise ConfigError(f"{len(labels)} --label for {len(args.checkpoint)} --checkpoint")
    if len(set(labels)) < len(labels):
        raise ConfigError(f"labels must differ, got {labels}: give one --label per --checkpoint")
    return labels


def _times(args: argparse.Namespace, sampler: SamplerConfig) -> Tensor:
    """The measured times in ascending order: the given ones, or the solver's."""
    if not args.data and not args.folder:
        if args.times:
            raise ConfigError("--times goes with --data or --folder; a sampler uses its own")
        return time_grid(sampler.num_steps, sampler.timestep_shift)[:-1]
    times = sorted(set(args.times or DATA_TIMES))
    if not all(0 <= t < 1 for t in times):
        raise ConfigError(f"--times must lie in [0, 1), got {times}")
    return torch.tensor(times)


def _size(args: argparse.Namespace, cfg: RunConfig) -> int:
    side = args.size or cfg.stages[-1].resolution
    minimum = BLOCK * cfg.model.patch_size
    if side < minimum or side % cfg.model.patch_size:
        raise ConfigError(
            f"--size {side}: a block of {BLOCK} x {BLOCK} tokens needs at least {minimum} pixels, and a multiple "
            f"of the patch, {cfg.model.patch_size}"
        )
    return int(side)


def _print_summary(label: str, spectrum: Spectrum, console: Console) -> None:
    for signal in SIGNALS:
        energy = spectrum.overall(signal)
        high = float(energy[_HIGH:].sum() / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny))
        level = float(normalised(energy)[_HIGH:].mean())
        print_line(
            console,
            f"{label}, {signal}, {spectrum.num_images} images at {len(spectrum.times)} times: the upper half of "
            f"the frequencies has {high:.2%} of the energy and a mean normalised log energy of {level:.3f}",
        )
