"""``deco sample``: images from a checkpoint's EMA weights, on one or more processes, resumable."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from data_pipeline.console import positive_int, print_line, progress_bar
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.cli.model_loading import Compute, load_generator, read_checkpoint, sampling_compute
from deco_scale.config import RunConfig
from deco_scale.distributed.bootstrap import Environment, choose_device, init_distributed, read_environment
from deco_scale.distributed.collectives import broadcast_object, raise_together
from deco_scale.errors import ConfigError
from deco_scale.models.tp_plan import check_tp
from deco_scale.sampling import SamplerConfig
from deco_scale.sampling.config import Solver
from deco_scale.sampling.generate import ImageGenerator, SampleRequest, check_requests, check_size
from deco_scale.sampling.images import save_grid
from deco_scale.sampling.output_dir import LINES, ImageFolder, Record
from deco_scale.sampling.prompts import read_prompts

MAX_GRID_IMAGES = 400
"""Up to this number of images are also saved as one grid."""
_MAX_SEED = 2**63 - 1


class _PlannedImage(NamedTuple):
    request: SampleRequest
    record: Record


class _Worker(NamedTuple):
    """This process: its device, its share of the requests, and the tp group that generates with it."""

    env: Environment
    device: torch.device
    tp: DeviceMesh | None

    @property
    def share(self) -> tuple[int, int]:
        """Index of this process's share, and the number of shares."""
        degree = self.tp.size() if self.tp is not None else 1
        return self.env.rank // degree, self.env.world_size // degree

    @property
    def writes(self) -> bool:
        return self.tp is None or self.tp.get_local_rank() == 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"Writes images as PNG, each with a JSON line in {LINES}. Run the same command again to resume. "
        "Run it under torchrun or deepspeed to share the images between processes."
    )
    add_generation_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="may be given several times")
    source.add_argument("--prompts", type=Path, help="a file with one prompt per line")
    source.add_argument("--classes", help="class numbers, such as 0-9,17")
    parser.add_argument("--negative", default="", help="negative prompt, in place of the empty prompt")
    parser.add_argument("--per-prompt", type=positive_int, default=1, help="images of each prompt or class")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--seeds",
        choices=("prompt", "image"),
        type=lambda text: "image" if text == "picture" else text,  # its old name
        default="prompt",
        help="count seeds within each prompt (as evaluations do), or over all images",
    )
    parser.add_argument(
        "--tp", type=positive_int, default=1, help="processes that share the model (tensor parallelism)"
    )


def add_generation_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Options for generating a folder of images from a checkpoint; :func:`generation_settings` reads them."""
    parser.add_argument("--checkpoint", type=Path, required=required, help="step folder, or a run's folder")
    parser.add_argument("--out", type=Path, required=required, help="folder for the images")
    parser.add_argument("--size", help="side in pixels, or HEIGHTxWIDTH; default: the last stage's")
    parser.add_argument("--batch", type=positive_int, default=32, help="images per batch in each process")
    parser.add_argument("--text-encoder", help="its folder, if it has moved since training")
    parser.add_argument("--compute", choices=get_args(Compute), help="default: a GPU as in training, a CPU fp32")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay the model as CUDA graphs; needs a GPU")
    text = "default: the run's samples.sampler"
    parser.add_argument("--solver", choices=get_args(Solver), help=text)
    for field in dataclasses.fields(SamplerConfig):
        if field.name != "solver":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), help=text)


def sampler_of(default: SamplerConfig, args: argparse.Namespace) -> SamplerConfig:
    """``default`` with the command line's values; raises :class:`ConfigError` for impossible ones."""
    names = [field.name for field in dataclasses.fields(SamplerConfig)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        return dataclasses.replace(default, **given)
    except ValueError as error:
        raise ConfigError(f"sampler: {error}") from error


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of ``N`` or ``HEIGHTxWIDTH``."""
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise ConfigError(f"--size {text}: give a side in pixels, or HEIGHTxWIDTH such as 256x384") from None


def parse_classes(text: str, num_classes: int) -> list[int]:
    """Class numbers of a list such as ``0-9,17``, without duplicates."""
    numbers: dict[int, None] = {}
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or int(last or first) < int(first):
            raise ConfigError(f"--classes {text}: {part!r} is neither a number nor a range such as 0-9")
        if int(last or first) >= num_classes:
            raise ConfigError(f"--classes {text}: the model has classes 0 to {num_classes - 1}")
        numbers.update(dict.fromkeys(range(int(first), int(last or first) + 1)))
    return list(numbers)


def run(args: argparse.Namespace, console: Console) -> int:
    env = read_environment(os.environ)
    if env.world_size % args.tp:
        raise ConfigError(f"--tp {args.tp} must divide the number of processes, {env.world_size}")
    path, cfg, meta = read_checkpoint(args.checkpoint)
    check_tp(cfg.model, args.tp)
    device = choose_device("auto", env.local_rank)
    settings = generation_settings(args, cfg, meta, device)
    images = _images(args, cfg, settings)
    try:
        check_requests((image.request for image in images), cfg.model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    joins = env.world_size > 1 and not dist.is_initialized()
    if env.world_size > 1:
        init_distributed(env, device)
    mesh = None
    if args.tp > 1:
        shape = (env.world_size // args.tp, args.tp)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "tp"))["tp"]
    _sample(args, path, images, settings, _Worker(env, device, mesh), console)
    if joins:
        dist.destroy_process_group()
    return 0


def _sample(
    args: argparse.Namespace,
    checkpoint: Path,
    images: Sequence[_PlannedImage],
    settings: Record,
    worker: _Worker,
    console: Console,
) -> None:
    folder = ImageFolder(args.out, rank=worker.env.rank)
    first = worker.env.rank == 0
    records = [image.record for image in images]
    with ExitStack() as stack:

        def begin() -> set[str]:
            if not first:
                return set()
            stack.enter_context(folder.locked())
            return folder.open(records, settings)

        done = broadcast_object(raise_together(begin))
        pending = [image for image in images if image.record["file"] not in done]
        if done and first:
            print_line(console, f"{len(done)} of {len(images)} images exist in {args.out}: skipping them")
        if pending:
            generator = raise_together(
                lambda: generator_of(args, checkpoint, settings, worker.device, tp=worker.tp)
            )

            def generate() -> None:
                _generate(args, generator, pending, settings, worker, folder, console)

            if worker.tp is None:
                raise_together(generate)
            else:
                # If one rank of a tp group cannot write, the others wait: the launcher has to terminate them.
                generate()
        if dist.is_initialized():
            dist.barrier()
        raise_together(lambda: folder.finish(records) if first else None)
    if first:
        _save_grid(args, images, console)


def _generate(
    args: argparse.Namespace,
    generator: ImageGenerator,
    pending: Sequence[_PlannedImage],
    settings: Record,
    worker: _Worker,
    folder: ImageFolder,
    console: Console,
) -> None:
    """Generate this process's share of the pending images; each is saved at once."""
    number, shares = worker.share
    mine = pending[number::shares]
    title = f"sampling {len(pending)} images"
    with progress_bar(console, title, enabled=worker.env.rank == 0) as update:
        generated = generator.images(
            [image.request for image in mine],
            size=(settings["height"], settings["width"]),
            sampler=SamplerConfig(**settings["sampler"]),
            batch=args.batch,
            on_step=lambda done, total: update(completed=done, total=total),
        )
        for image, (_, pixels) in zip(mine, generated, strict=True):
            if worker.writes:
                folder.save(image.record, pixels)


def generator_of(
    args: argparse.Namespace,
    checkpoint: Path,
    settings: Record,
    device: torch.device,
    tp: DeviceMesh | None = None,
) -> ImageGenerator:
    """The checkpoint's generator with the command line's options."""
    generator, _, _ = load_generator(
        checkpoint,
        text_encoder=args.text_encoder,
        device=device,
        compile=args.compile,
        cuda_graphs=args.cuda_graphs,
        tp=tp,
        compute=settings["compute"],
    )
    return generator


def generation_settings(
    args: argparse.Namespace, cfg: RunConfig, meta: CheckpointMeta, device: torch.device
) -> Record:
    """Settings that all images of a folder share; with the request they determine an image.

    Raises :class:`ConfigError` for an impossible size or sampler.
    """
    height, width = parse_size(args.size) if args.size else (cfg.stages[-1].resolution,) * 2
    try:
        check_size((height, width), cfg.model.patch_size)
    except ValueError as error:
        raise ConfigError(f"--size: {error}") from error
    return {
        "height": height,
        "width": width,
        "sampler": dataclasses.asdict(sampler_of(cfg.samples.sampler, args)),
        "compute": args.compute or sampling_compute(cfg, device),
        "checkpoint_step": meta.step,
        "checkpoint_digest": meta.parameter_digest,
    }


def _images(args: argparse.Namespace, cfg: RunConfig, settings: Record) -> list[_PlannedImage]:
    """All images that the command line asks for, with their records."""
    conditions: list[tuple[int, str | int]]
    if args.classes is not None:
        if cfg.model.kind == "t2i_deco":
            raise ConfigError(f"--classes: a {cfg.model.kind} model takes prompts; give --prompt or --prompts")
        conditions = [(number, number) for number in parse_classes(args.classes, cfg.model.num_classes)]
    else:
        if cfg.model.kind != "t2i_deco":
            raise ConfigError(f"--prompt: a {cfg.model.kind} model takes classes; give --classes")
        conditions = list(enumerate(args.prompt or read_prompts(args.prompts)))
    count = len(conditions) * args.per_prompt
    if not 0 <= args.first_seed <= _MAX_SEED - count:
        raise ConfigError(f"--first-seed {args.first_seed} must not be negative, nor too large for 64 bits")
    images = []
    for position, (number, condition) in enumerate(conditions):
        for index in range(args.per_prompt):
            offset = index if args.seeds == "prompt" else position * args.per_prompt + index
            request = SampleRequest(condition, index, args.first_seed + offset, args.negative)
            record = {
                "file": f"{number:05d}_{index:04d}.png",
                "class" if isinstance(condition, int) else "prompt": condition,
                "negative": request.negative,
                "index": index,
                "seed": request.seed,
                **settings,
            }
            images.append(_PlannedImage(request, record))
    return images


def _save_grid(args: argparse.Namespace, images: Sequence[_PlannedImage], console: Console) -> None:
    """Put the images into one grid if they are few enough, and print where they are."""
    message = f"{len(images)} images in {args.out}"
    if len(images) <= MAX_GRID_IMAGES:
        pixels: list[Any] = []
        for image in images:
            with Image.open(args.out / image.record["file"]) as file:
                pixels.append(np.asarray(file.convert("RGB")))
        grid = args.out / "grid.png"
        labels = [str(image.request.condition) for image in images]
        save_grid(pixels, grid, labels=labels)
        message += f", all in one grid: {grid}"
    print_line(console, message)
