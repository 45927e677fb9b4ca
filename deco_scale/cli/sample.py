"""``deco sample``: pictures from a checkpoint's EMA weights, on one process or many, resumable."""

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
from rich.progress import Progress
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from deco_scale.checkpoint.manager import CheckpointMeta
from deco_scale.cli.model_loading import Compute, load_generator, read_checkpoint, sampling_compute
from deco_scale.config import RunConfig
from deco_scale.distributed.bootstrap import Environment, choose_device, init_distributed, read_environment
from deco_scale.distributed.collectives import broadcast_object, raise_together
from deco_scale.errors import ConfigError
from deco_scale.models.tp_plan import check_tp
from deco_scale.sampling import SamplerConfig
from deco_scale.sampling.config import Solver
from deco_scale.sampling.generate import Generator, SampleRequest, check_requests, check_size
from deco_scale.sampling.images import save_grid
from deco_scale.sampling.output_dir import PictureFolder, Record
from deco_scale.sampling.prompts import read_prompts

SHEET_PICTURES = 400
"""Up to so many pictures are shown on one sheet as well."""
_MAX_SEED = 2**63 - 1


class _Picture(NamedTuple):
    job: SampleRequest
    record: Record


class _Place(NamedTuple):
    """This process among those that draw: its share of the jobs, and the tp group that draws with it."""

    env: Environment
    device: torch.device
    tp: DeviceMesh | None

    @property
    def share(self) -> tuple[int, int]:
        """Number of this process's share, and of all shares."""
        degree = self.tp.size() if self.tp is not None else 1
        return self.env.rank // degree, self.env.world_size // degree

    @property
    def writes(self) -> bool:
        return self.tp is None or self.tp.get_local_rank() == 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draws pictures, each a PNG and a JSON line in pictures.jsonl. The same command run again goes on after a "
        "break. Run it under torchrun or deepspeed to share the pictures between processes."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="step folder, or a run's folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="may be given several times")
    source.add_argument("--prompts", type=Path, help="a file with one prompt per line")
    source.add_argument("--classes", help="class numbers, such as 0-9,17")
    parser.add_argument("--negative", default="", help="what not to show, in place of the empty prompt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-prompt", type=int, default=1, help="pictures of each prompt or class")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--seeds",
        choices=("prompt", "picture"),
        default="prompt",
        help="count seeds up within each prompt (as evaluations do), or over all pictures",
    )
    parser.add_argument("--size", help="side in pixels, or HEIGHTxWIDTH; default: the last stage's")
    parser.add_argument("--batch", type=int, default=32, help="pictures at a time in each process")
    parser.add_argument("--text-encoder", help="folder, where it has moved since training")
    add_sampler_arguments(parser)
    parser.add_argument("--tp", type=int, default=1, help="processes that share the model (tensor parallelism)")
    parser.add_argument("--compute", choices=get_args(Compute), help="default: a GPU as in training, a CPU fp32")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay the model as CUDA graphs; needs a GPU")


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for each field of :class:`SamplerConfig`; :func:`sampler_of` reads them."""
    text = "default: the run's samples.sampler"
    parser.add_argument("--solver", choices=get_args(Solver), help=text)
    for field in dataclasses.fields(SamplerConfig):
        if field.name != "solver":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), help=text)


def sampler_of(default: SamplerConfig, args: argparse.Namespace) -> SamplerConfig:
    """``default`` with what the command line sets; raises :class:`ConfigError` for impossible values."""
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
    """Class numbers of a list such as ``0-9,17``, each once."""
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
    if args.per_prompt < 1 or args.batch < 1:
        raise ConfigError("--per-prompt and --batch must be at least 1")
    if args.tp < 1 or env.world_size % args.tp:
        raise ConfigError(f"--tp {args.tp} must divide the number of processes, {env.world_size}")
    path, cfg, meta = read_checkpoint(args.checkpoint)
    check_tp(cfg.model, args.tp)
    size = parse_size(args.size) if args.size else (cfg.stages[-1].resolution,) * 2
    device = choose_device("auto", env.local_rank)
    settings = _settings(args, cfg, meta, size, device)
    pictures = _pictures(args, cfg, settings)
    try:
        check_size(size, cfg.model.patch_size)
        check_requests((picture.job for picture in pictures), cfg.model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    joins = env.world_size > 1 and not dist.is_initialized()
    if env.world_size > 1:
        init_distributed(env, device)
    mesh = None
    if args.tp > 1:
        shape = (env.world_size // args.tp, args.tp)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "tp"))["tp"]
    _run_in_place(args, path, pictures, settings, _Place(env, device, mesh), console)
    if joins:
        dist.destroy_process_group()
    return 0


def _run_in_place(
    args: argparse.Namespace,
    checkpoint: Path,
    pictures: Sequence[_Picture],
    settings: Record,
    place: _Place,
    console: Console,
) -> None:
    folder = PictureFolder(args.out, rank=place.env.rank)
    first = place.env.rank == 0
    records = [picture.record for picture in pictures]
    with ExitStack() as held:

        def begin() -> set[str]:
            if not first:
                return set()
            held.enter_context(folder.locked())
            return folder.open(records, settings)

        done = broadcast_object(raise_together(begin))
        left = [picture for picture in pictures if picture.record["file"] not in done]
        if done and first:
            console.print(f"{len(done)} of {len(pictures)} pictures are in {args.out} already")
        if left:
            generator, _, _ = raise_together(
                lambda: load_generator(
                    checkpoint,
                    text_encoder=args.text_encoder,
                    device=place.device,
                    compile=args.compile,
                    cuda_graphs=args.cuda_graphs,
                    tp=place.tp,
                    compute=settings["compute"],
                )
            )

            def draw() -> None:
                _draw(args, generator, left, settings, place, folder, console)

            if place.tp is None:
                raise_together(draw)
            else:
                # The others of a tp group would wait for one that cannot write: the launcher has to end them.
                draw()
        if dist.is_initialized():
            dist.barrier()
        raise_together(lambda: folder.finish(records) if first else None)
    if first:
        _show(args, pictures, (settings["height"], settings["width"]), console)


def _draw(
    args: argparse.Namespace,
    generator: Generator,
    left: Sequence[_Picture],
    settings: Record,
    place: _Place,
    folder: PictureFolder,
    console: Console,
) -> None:
    """This process's share of what is left, each picture saved as it is done."""
    number, shares = place.share
    mine = left[number::shares]
    with Progress(console=console, disable=place.env.rank > 0) as progress:
        task = progress.add_task(f"sampling {len(left)} pictures", total=None)
        drawn = generator.images(
            [picture.job for picture in mine],
            size=(settings["height"], settings["width"]),
            sampler=SamplerConfig(**settings["sampler"]),
            batch=args.batch,
            on_step=lambda done, total: progress.update(task, completed=done, total=total),
        )
        for picture, (_, pixels) in zip(mine, drawn, strict=True):
            if place.writes:
                folder.save(picture.record, pixels)


def _settings(
    args: argparse.Namespace, cfg: RunConfig, meta: CheckpointMeta, size: tuple[int, int], device: torch.device
) -> Record:
    """What all pictures of a folder share; with the job it determines a picture."""
    return {
        "height": size[0],
        "width": size[1],
        "sampler": dataclasses.asdict(sampler_of(cfg.samples.sampler, args)),
        "compute": args.compute or sampling_compute(cfg, device),
        "checkpoint_step": meta.step,
        "checkpoint_digest": meta.parameter_digest,
    }


def _pictures(args: argparse.Namespace, cfg: RunConfig, settings: Record) -> list[_Picture]:
    """All pictures that the command line asks for, with what their lines will say."""
    conditions: list[tuple[int, str | int]]
    if args.classes is not None:
        if cfg.model.kind == "t2i_deco":
            raise ConfigError(f"--classes: a {cfg.model.kind} model draws prompts; give --prompt or --prompts")
        conditions = [(number, number) for number in parse_classes(args.classes, cfg.model.num_classes)]
    else:
        if cfg.model.kind != "t2i_deco":
            raise ConfigError(f"--prompt: a {cfg.model.kind} model draws classes; give --classes")
        conditions = list(enumerate(args.prompt or read_prompts(args.prompts)))
    count = len(conditions) * args.per_prompt
    if not 0 <= args.first_seed <= _MAX_SEED - count:
        raise ConfigError(f"--first-seed {args.first_seed} must not be negative, nor too large for 64 bits")
    pictures = []
    for place, (number, condition) in enumerate(conditions):
        for index in range(args.per_prompt):
            offset = index if args.seeds == "prompt" else place * args.per_prompt + index
            job = SampleRequest(condition, index, args.first_seed + offset, args.negative)
            record = {
                "file": f"{number:05d}_{index:04d}.png",
                "class" if isinstance(condition, int) else "prompt": condition,
                "negative": job.negative,
                "index": index,
                "seed": job.seed,
                **settings,
            }
            pictures.append(_Picture(job, record))
    return pictures


def _show(args: argparse.Namespace, pictures: Sequence[_Picture], size: tuple[int, int], console: Console) -> None:
    """Say where the pictures are, and put them on one sheet where they are few enough."""
    where = f"{len(pictures)} pictures in {args.out}"
    if len(pictures) > SHEET_PICTURES:
        console.print(where, soft_wrap=True)
        return
    drawn: list[Any] = []
    for picture in pictures:
        with Image.open(args.out / picture.record["file"]) as image:
            drawn.append(np.asarray(image.convert("RGB")))
    sheet = args.out / "grid.png"
    labels = [str(picture.job.condition) for picture in pictures]
    save_grid(np.stack(drawn), sheet, columns=min(8, len(drawn)), labels=labels, scale=max(1, 96 // max(size)))
    console.print(f"{where}, all on one sheet: {sheet}", soft_wrap=True)
