"""``deco sample``: images from a checkpoint's EMA weights, on one or more processes, resumable."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from data_pipeline.console import positive_int, print_line, progress_bar
from deco_scale.cli.model_loading import Compute, build_generator, load_denoiser, read_checkpoint, sampling_compute
from deco_scale.distributed.bootstrap import choose_device, init_distributed, read_environment
from deco_scale.distributed.collectives import raise_together, run_on_rank_zero
from deco_scale.errors import ConfigError, as_config_error
from deco_scale.models.tp_plan import check_tp
from deco_scale.sampling import SamplerConfig
from deco_scale.sampling.config import Solver
from deco_scale.sampling.generate import SampleRequest, check_requests, check_size
from deco_scale.sampling.images import save_grid
from deco_scale.sampling.output_dir import LINES, ImageFolder, Record
from deco_scale.sampling.prompts import read_prompts

MAX_GRID_IMAGES = 400
"""Up to this number of images are also saved as one grid."""
_MAX_SEED = 2**63 - 1


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
    """Options for generating a folder of images from a checkpoint; :class:`Generation` reads them."""
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


class Generation:
    """A command's options for generating, its checkpoint and process, and the settings that all images share.

    With its request, ``settings`` determine an image. Raises :class:`ConfigError` for an impossible checkpoint,
    size or sampler, before any process group or model is created.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.env = args, read_environment(os.environ)
        self.path, self.cfg, self.meta = read_checkpoint(args.checkpoint)
        self.device = choose_device("auto", self.env.local_rank)
        self.size = parse_size(args.size) if args.size else (self.cfg.stages[-1].resolution,) * 2
        with as_config_error("--size: "):
            check_size(self.size, self.cfg.model.patch_size)
        options = {field.name: getattr(args, field.name) for field in dataclasses.fields(SamplerConfig)}
        given = {name: value for name, value in options.items() if value is not None}
        with as_config_error("sampler: "):
            self.sampler = dataclasses.replace(self.cfg.samples.sampler, **given)
        self.settings: Record = {
            "height": self.size[0],
            "width": self.size[1],
            "sampler": dataclasses.asdict(self.sampler),
            "compute": args.compute or sampling_compute(self.cfg, self.device),
            "checkpoint_step": self.meta.step,
            "checkpoint_digest": self.meta.parameter_digest,
        }

    @contextmanager
    def process_group(self) -> Iterator[None]:
        """The group of all processes, if there are several; one that exists already stays."""
        joins = self.env.world_size > 1 and not dist.is_initialized()
        if self.env.world_size > 1:
            init_distributed(self.env, self.device)
        yield
        if joins:
            dist.destroy_process_group()

    def load(self, tp: DeviceMesh | None = None) -> Callable[..., Iterator[tuple[SampleRequest, Any]]]:
        """The checkpoint's :meth:`ImageGenerator.images` with all options set; ``tp`` shares the model."""
        generator = build_generator(
            load_denoiser(self.cfg, self.path, self.device),
            self.cfg,
            self.meta,
            text_encoder=self.args.text_encoder,
            compile=self.args.compile,
            cuda_graphs=self.args.cuda_graphs,
            tp=tp,
            compute=self.settings["compute"],
        )
        return partial(generator.images, size=self.size, sampler=self.sampler, batch=self.args.batch)


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
    made = Generation(args)
    world = made.env.world_size
    if world % args.tp:
        raise ConfigError(f"--tp {args.tp} must divide the number of processes, {world}")
    check_tp(made.cfg.model, args.tp)
    images = _images(args, made)
    with as_config_error():
        check_requests((request for request, _ in images), made.cfg.model)
    with made.process_group():
        tp = None
        if args.tp > 1:
            tp = init_device_mesh(made.device.type, (world // args.tp, args.tp), mesh_dim_names=("dp", "tp"))["tp"]
        _sample(images, made, tp, console)
    if made.env.rank == 0:
        _save_grid(args, images, console)
    return 0


def _sample(
    images: Sequence[tuple[SampleRequest, Record]], made: Generation, tp: DeviceMesh | None, console: Console
) -> None:
    """Generate this process's share of the missing images; each is saved at once."""
    args, rank, degree = made.args, made.env.rank, made.args.tp
    folder, records = ImageFolder(args.out, rank=rank), [record for _, record in images]
    with ExitStack() as stack:

        def begin() -> set[str]:
            stack.enter_context(folder.locked())
            return folder.open(records, made.settings)

        done = run_on_rank_zero(begin)
        pending = [(request, record) for request, record in images if record["file"] not in done]
        if done and rank == 0:
            print_line(console, f"{len(done)} of {len(images)} images exist in {args.out}: skipping them")
        if pending:
            generator = raise_together(lambda: made.load(tp))
            mine = pending[rank // degree :: made.env.world_size // degree]

            def generate() -> None:
                title = f"sampling {len(pending)} images"
                with progress_bar(console, title, enabled=rank == 0) as update:
                    generated = generator(
                        [request for request, _ in mine],
                        on_step=lambda done, total: update(completed=done, total=total),
                    )
                    for (_, record), (_, pixels) in zip(mine, generated, strict=True):
                        if rank % degree == 0:
                            folder.save(record, pixels)

            if tp is None:
                raise_together(generate)
            else:
                # If one rank of a tp group cannot write, the others wait: the launcher has to terminate them.
                generate()
        if dist.is_initialized():
            dist.barrier()
        run_on_rank_zero(lambda: folder.finish(records))


def _images(args: argparse.Namespace, made: Generation) -> list[tuple[SampleRequest, Record]]:
    """All images that the command line asks for, with their records."""
    model = made.cfg.model
    conditions: list[tuple[int, str | int]]
    if args.classes is not None:
        if model.kind == "t2i_deco":
            raise ConfigError(f"--classes: a {model.kind} model takes prompts; give --prompt or --prompts")
        conditions = [(number, number) for number in parse_classes(args.classes, model.num_classes)]
    else:
        if model.kind != "t2i_deco":
            raise ConfigError(f"--prompt: a {model.kind} model takes classes; give --classes")
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
                **made.settings,
            }
            images.append((request, record))
    return images


def _save_grid(args: argparse.Namespace, images: Sequence[tuple[SampleRequest, Record]], console: Console) -> None:
    """Put the images into one grid if they are few enough, and print where they are."""
    message = f"{len(images)} images in {args.out}"
    if len(images) <= MAX_GRID_IMAGES:
        pixels: list[Any] = []
        for _, record in images:
            with Image.open(args.out / record["file"]) as file:
                pixels.append(np.asarray(file.convert("RGB")))
        grid = args.out / "grid.png"
        save_grid(pixels, grid, labels=[str(request.condition) for request, _ in images])
        message += f", all in one grid: {grid}"
    print_line(console, message)
