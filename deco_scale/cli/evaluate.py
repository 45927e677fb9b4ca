"""``deco evaluate``: pictures in the layouts of the published benchmarks, and scores computed here."""

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from deco_scale.cli.evaluate_tables import print_dpg, print_geneval, print_scores
from deco_scale.cli.model_loading import Compute, load_generator, read_checkpoint, sampling_compute
from deco_scale.cli.sample import add_sampler_arguments, parse_size, sampler_of
from deco_scale.distributed.bootstrap import choose_device, init_distributed, read_environment
from deco_scale.distributed.collectives import broadcast_object, raise_together
from deco_scale.errors import ConfigError
from deco_scale.evaluation import dpg, geneval
from deco_scale.evaluation.fid import check_files, score_files
from deco_scale.evaluation.files import claim_folder, write_whole
from deco_scale.evaluation.imagenet import ImageSet, PicturesFn, generate_parts, join_pieces, missing_pieces
from deco_scale.evaluation.inception import WEIGHTS_NAME, WEIGHTS_URL, load_inception
from deco_scale.sampling import SamplerConfig
from deco_scale.sampling.generate import check_size

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run it under torchrun to share the pictures between processes; the same command run again goes on after "
        "a break."
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    imagenet = commands.add_parser("imagenet", help="class-balanced pictures as .npz for the ADM suite")
    _add_drawing(imagenet, required=True)
    imagenet.add_argument("--count", type=int, default=50_000)
    imagenet.add_argument("--first-seed", type=int, default=0, help="picture i has the seed FIRST_SEED + i")
    imagenet.add_argument("--piece", type=int, default=256, help="pictures of one file on the way to the .npz")

    fid = commands.add_parser("fid", help="FID, sFID, Inception score, precision and recall of an .npz")
    fid.add_argument("--samples", type=Path, required=True, help=".npz with arr_0")
    fid.add_argument("--reference", type=Path, required=True, help=".npz with arr_0, or mu, sigma, mu_s, sigma_s")
    fid.add_argument("--inception-weights", type=Path, required=True, help=f"{WEIGHTS_NAME} from {WEIGHTS_URL}")
    fid.add_argument("--batch", type=int, default=64)
    fid.add_argument("--out", type=Path, help="file for the scores as JSON")

    tasks = commands.add_parser("geneval", help="pictures for GenEval's scorer, and a table of what it found")
    _add_drawing(tasks, required=False)
    tasks.add_argument("--metadata", type=Path, help="the official evaluation_metadata.jsonl")
    tasks.add_argument("--per-prompt", type=int, default=geneval.PER_PROMPT)
    tasks.add_argument("--summary", type=Path, help="the scorer's results.jsonl; nothing is drawn then")

    prompts = commands.add_parser("dpg", help="pictures for DPG-Bench's scorer, and a table of what it found")
    _add_drawing(prompts, required=False)
    prompts.add_argument("--prompts", type=Path, help="the official prompts: a folder or tar of .txt files")
    prompts.add_argument("--summary", type=Path, help="the scorer's result file; nothing is drawn then")


def _add_drawing(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--checkpoint", type=Path, required=required, help="step folder, or a run's folder")
    parser.add_argument("--out", type=Path, required=required)
    parser.add_argument("--size", help="side in pixels, or HEIGHTxWIDTH; default: the last stage's")
    parser.add_argument("--batch", type=int, default=32, help="pictures at a time in each process")
    parser.add_argument("--text-encoder", help="folder, where it has moved since training")
    add_sampler_arguments(parser)
    parser.add_argument("--compute", choices=get_args(Compute), help="default: a GPU as in training, a CPU fp32")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay the model as CUDA graphs; needs a GPU")


def run(args: argparse.Namespace, console: Console) -> int:
    """Run one benchmark's part; raises :class:`ConfigError` or :class:`RunError`."""
    if args.batch < 1:
        raise ConfigError(f"--batch {args.batch} must be at least 1")
    {"imagenet": _imagenet, "fid": _fid, "geneval": _geneval, "dpg": _dpg}[args.benchmark](args, console)
    return 0


class _Drawing(NamedTuple):
    """What a benchmark draws with: the settings that decide the pictures, and this process's device."""

    args: argparse.Namespace
    settings: dict[str, Any]
    num_classes: int
    first: bool
    device: torch.device

    @property
    def size(self) -> tuple[int, int]:
        return self.settings["height"], self.settings["width"]

    def load(self) -> PicturesFn:
        """The checkpoint's generator with all options set."""
        generator, _, _ = load_generator(
            self.args.checkpoint,
            text_encoder=self.args.text_encoder,
            device=self.device,
            compile=self.args.compile,
            cuda_graphs=self.args.cuda_graphs,
            compute=self.settings["compute"],
        )
        sampler = SamplerConfig(**self.settings["sampler"])
        return partial(generator.images, size=self.size, sampler=sampler, batch=self.args.batch)


def _drawing(args: argparse.Namespace, wanted: Literal["classes", "prompts"]) -> _Drawing:
    """Check what the command line says against the checkpoint, before any process group or model is made."""
    _, cfg, meta = read_checkpoint(args.checkpoint)
    if (cfg.model.kind == "t2i_deco") != (wanted == "prompts"):
        raise ConfigError(f"--checkpoint {args.checkpoint}: {args.benchmark} needs {wanted}, not {cfg.model.kind}")
    side = cfg.stages[-1].resolution
    height, width = parse_size(args.size) if args.size else (side, side)
    try:
        check_size((height, width), cfg.model.patch_size)
    except ValueError as error:
        raise ConfigError(f"--size: {error}") from error
    env = read_environment(os.environ)
    device = choose_device("auto", env.local_rank)
    settings = {
        "benchmark": args.benchmark,
        "height": height,
        "width": width,
        "sampler": dataclasses.asdict(sampler_of(cfg.samples.sampler, args)),
        "compute": args.compute or sampling_compute(cfg, device),
        "checkpoint_step": meta.step,
        "checkpoint_digest": meta.parameter_digest,
    }
    return _Drawing(args, settings, cfg.model.num_classes, env.rank == 0, device)


def _draw_missing(
    drawing: _Drawing,
    console: Console,
    *,
    begin: Callable[[], list[T]],
    pictures_of: Callable[[Sequence[T]], int],
    draw: Callable[[PicturesFn, Sequence[T], Callable[[], None]], None],
    finish: Callable[[], None],
) -> None:
    """Draw what is missing in ``--out``, shared over processes.

    The first process alone runs ``begin``, which lists the work, and in the end ``finish``.
    """
    env = read_environment(os.environ)
    joins = env.world_size > 1 and not dist.is_initialized()
    if joins:
        init_distributed(env, drawing.device)
    first = env.rank == 0

    def listed() -> list[T]:
        claim_folder(drawing.args.out, drawing.settings)
        return begin()

    left = broadcast_object(raise_together(listed if first else list))
    if left:
        make = raise_together(drawing.load)
        # Neighbours stay together: pictures of one prompt share its encoding.
        start, end = (len(left) * r // env.world_size for r in (env.rank, env.rank + 1))
        mine = left[start:end]
        with Progress(console=console, disable=not first) as progress:
            task = progress.add_task(f"sampling {pictures_of(left)} pictures", total=pictures_of(mine))
            raise_together(lambda: draw(make, mine, lambda: progress.advance(task)))
    elif first:
        console.print(f"all pictures are in {drawing.args.out} already", soft_wrap=True)
    raise_together(finish if first else lambda: None)
    if joins:
        dist.destroy_process_group()


def _imagenet(args: argparse.Namespace, console: Console) -> None:
    drawing = _drawing(args, "classes")
    try:
        pictures = ImageSet(
            count=args.count,
            num_classes=drawing.num_classes,
            size=drawing.size,
            first_seed=args.first_seed,
            piece=args.piece,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    drawing.settings.update(count=args.count, first_seed=args.first_seed, piece=args.piece)
    if args.count % drawing.num_classes and drawing.first:
        console.print(f"{args.count} is no multiple of {drawing.num_classes}: some classes have one picture more")

    def finish() -> None:
        path = join_pieces(pictures, args.out)
        console.print(f"{args.count} pictures in {path}", soft_wrap=True)

    _draw_missing(
        drawing,
        console,
        begin=lambda: missing_pieces(pictures, args.out),
        pictures_of=lambda pieces: sum(len(pictures.jobs(piece)) for piece in pieces),
        draw=lambda make, mine, tick: generate_parts(make, pictures, args.out, mine, on_picture=tick),
        finish=finish,
    )


def _geneval(args: argparse.Namespace, console: Console) -> None:
    if args.summary is not None:
        return print_geneval(geneval.summarise(args.summary), console)
    _require(args, "checkpoint", "metadata", "out")
    if not 1 <= args.per_prompt <= 99_999:
        raise ConfigError(f"--per-prompt {args.per_prompt} must be 1 to 99999, which five digits hold")
    tasks = geneval.read_tasks(args.metadata)
    drawing = _drawing(args, "prompts")
    drawing.settings.update(prompts=_digest([task.metadata for task in tasks]))

    def begin() -> list[tuple[geneval.Task, int]]:
        geneval.write_metadata(tasks, args.out)
        return geneval.missing_images(tasks, args.out, args.per_prompt)

    _draw_missing(
        drawing,
        console,
        begin=begin,
        pictures_of=len,
        draw=lambda make, mine, tick: geneval.generate_images(make, mine, args.out, on_picture=tick),
        finish=lambda: console.print(
            f"{args.per_prompt} pictures of each of {len(tasks)} prompts in {args.out}, the folder that "
            "evaluate_images.py reads",
            soft_wrap=True,
        ),
    )


def _dpg(args: argparse.Namespace, console: Console) -> None:
    if args.summary is not None:
        return print_dpg(dpg.summarise(args.summary), console)
    _require(args, "checkpoint", "prompts", "out")
    prompts = dpg.read_prompts(args.prompts)
    drawing = _drawing(args, "prompts")
    height, width = drawing.size
    if height != width:
        raise ConfigError(f"--size {height}x{width}: DPG-Bench's scorer cuts grids into squares")
    drawing.settings.update(prompts=_digest(prompts))
    folder = args.out / "pictures"
    _draw_missing(
        drawing,
        console,
        begin=lambda: dpg.missing_prompts(prompts, folder),
        pictures_of=lambda part: dpg.PER_PROMPT * len(part),
        draw=lambda make, mine, tick: dpg.generate_images(make, mine, folder, on_picture=tick),
        finish=lambda: console.print(
            f"{len(prompts)} grids in {folder}; for compute_dpg_bench.py: --image-root-path {folder} "
            f"--resolution {height} --pic-num {dpg.PER_PROMPT}",
            soft_wrap=True,
        ),
    )


def _digest(items: Sequence[Any]) -> str:
    """SHA-256 of what was asked for, so that a folder never mixes two prompt files."""
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


def _require(args: argparse.Namespace, *names: str) -> None:
    missing = [f"--{name}" for name in names if getattr(args, name) is None]
    if missing:
        raise ConfigError(f"deco evaluate {args.benchmark} needs {', '.join(missing)} (or --summary)")


def _fid(args: argparse.Namespace, console: Console) -> None:
    env = read_environment(os.environ)
    if env.world_size > 1:
        raise ConfigError("deco evaluate fid runs in one process: start it without a launcher")
    total = check_files(args.samples, args.reference)
    inception = load_inception(args.inception_weights, choose_device("auto", env.local_rank))
    if not inception.published:
        console.print(
            f"[yellow]{args.inception_weights} is not the published {WEIGHTS_NAME} (SHA-256 {inception.digest}): "
            "do not compare these scores with published ones[/yellow]"
        )
    with Progress(console=console) as progress:
        task = progress.add_task("features", total=total)
        scores = score_files(
            inception,
            args.samples,
            args.reference,
            batch=args.batch,
            on_batch=lambda size: progress.advance(task, size),
        )
    print_scores(scores, console)
    if args.out is not None:
        found = {
            **dataclasses.asdict(scores),
            "samples": str(args.samples),
            "reference": str(args.reference),
            "inception_sha256": inception.digest,
            "published_inception": inception.published,
        }
        write_whole(args.out, json.dumps(found, indent=1).encode(), scratch=args.out.parent)
