"""``deco evaluate``: images in the layouts of the published benchmarks, and scores."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table

from data_pipeline.console import positive_int, print_line, progress_bar
from deco_scale.cli.sample import Generation, add_generation_arguments
from deco_scale.distributed.bootstrap import choose_device, read_environment
from deco_scale.distributed.collectives import raise_together, run_on_rank_zero
from deco_scale.errors import ConfigError, as_config_error
from deco_scale.evaluation import dpg, geneval
from deco_scale.evaluation.fid import check_files, score_files
from deco_scale.evaluation.imagenet import ImageSet, generate_parts, join_pieces, missing_pieces
from deco_scale.evaluation.inception import WEIGHTS_NAME, WEIGHTS_URL, load_inception
from deco_scale.sampling.generate import GenerateFn
from deco_scale.sampling.output_dir import claim_folder, write_file
from deco_scale.sampling.prompts import read_named_prompts

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run it under torchrun to share the images between processes; run the same command again to resume."
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    imagenet = commands.add_parser("imagenet", help="class-balanced images as .npz for the ADM suite")
    add_generation_arguments(imagenet)
    imagenet.add_argument("--count", type=positive_int, default=50_000)
    imagenet.add_argument("--first-seed", type=int, default=0, help="image i has seed FIRST_SEED + i")
    imagenet.add_argument("--piece", type=positive_int, default=256, help="images per temporary file")

    fid = commands.add_parser("fid", help="FID, sFID, Inception score, precision and recall of an .npz")
    fid.add_argument("--samples", type=Path, required=True, help=".npz with arr_0")
    fid.add_argument("--reference", type=Path, required=True, help=".npz with arr_0, or mu, sigma, mu_s, sigma_s")
    fid.add_argument("--inception-weights", type=Path, required=True, help=f"{WEIGHTS_NAME} from {WEIGHTS_URL}")
    fid.add_argument("--batch", type=positive_int, default=64)
    fid.add_argument("--out", type=Path, help="file for the scores as JSON")

    tasks = commands.add_parser("geneval", help="images for GenEval's scorer, and a table of its results")
    add_generation_arguments(tasks, required=False)
    tasks.add_argument("--metadata", type=Path, help="the official evaluation_metadata.jsonl")
    tasks.add_argument("--per-prompt", type=int, default=geneval.PER_PROMPT)
    tasks.add_argument("--summary", type=Path, help="the scorer's results.jsonl; prints the table only")

    prompts = commands.add_parser("dpg", help="images for DPG-Bench's scorer, and a table of its results")
    add_generation_arguments(prompts, required=False)
    prompts.add_argument("--prompts", type=Path, help="the official prompts: a folder or tar of .txt files")
    prompts.add_argument("--summary", type=Path, help="the scorer's result file; prints the table only")


def run(args: argparse.Namespace, console: Console) -> int:
    """Run one benchmark; raises :class:`ConfigError` or :class:`RunError`."""
    {"imagenet": _imagenet, "fid": _fid, "geneval": _geneval, "dpg": _dpg}[args.benchmark](args, console)
    return 0


def _generation(args: argparse.Namespace, conditions: Literal["classes", "prompts"]) -> Generation:
    """The command line checked against the checkpoint."""
    made = Generation(args)
    kind = made.cfg.model.kind
    if (kind == "t2i_deco") != (conditions == "prompts"):
        raise ConfigError(f"--checkpoint {args.checkpoint}: {args.benchmark} needs {conditions}, not {kind}")
    made.settings = {"benchmark": args.benchmark, **made.settings}
    return made


def _generate_missing(
    made: Generation,
    console: Console,
    *,
    list_missing: Callable[[], list[T]],
    images_of: Callable[[Sequence[T]], int],
    generate: Callable[[GenerateFn, Sequence[T], Callable[[], None]], None],
    finish: Callable[[], str],
) -> None:
    """Generate the missing images of ``--out``, shared over processes.

    Only rank 0 runs ``list_missing`` and, at the end, ``finish``, which says what there is.
    """
    rank, world = made.env.rank, made.env.world_size

    def missing() -> list[T]:
        claim_folder(made.args.out, made.settings)
        return list_missing()

    with made.process_group():
        pending = run_on_rank_zero(missing)
        if pending:
            generator = raise_together(made.load)
            # Consecutive parts, since images of one prompt share its embedding.
            mine = pending[len(pending) * rank // world : len(pending) * (rank + 1) // world]
            title = f"sampling {images_of(pending)} images"
            with progress_bar(console, title, images_of(mine), enabled=rank == 0) as update:
                raise_together(lambda: generate(generator, mine, update))
        elif rank == 0:
            print_line(console, f"all images exist in {made.args.out}")
        message = run_on_rank_zero(finish)
        if rank == 0:
            print_line(console, message)


def _imagenet(args: argparse.Namespace, console: Console) -> None:
    made = _generation(args, "classes")
    classes = made.cfg.model.num_classes
    options = {"count": args.count, "first_seed": args.first_seed, "piece": args.piece}
    with as_config_error():
        image_set = ImageSet(num_classes=classes, size=made.size, **options)
    made.settings.update(options)
    if args.count % classes and made.env.rank == 0:
        print_line(console, f"{args.count} is not a multiple of {classes}: some classes get one more image")
    _generate_missing(
        made,
        console,
        list_missing=lambda: missing_pieces(image_set, args.out),
        images_of=lambda pieces: sum(len(image_set.requests(piece)) for piece in pieces),
        generate=lambda make, mine, update: generate_parts(make, image_set, args.out, mine, on_image=update),
        finish=lambda: f"{args.count} images in {join_pieces(image_set, args.out)}",
    )


def _geneval(args: argparse.Namespace, console: Console) -> None:
    if args.summary is not None:
        return _print_geneval(geneval.summarise(args.summary), console)
    _require(args, "checkpoint", "metadata", "out")
    if not 1 <= args.per_prompt <= 99_999:
        raise ConfigError(f"--per-prompt {args.per_prompt} must be 1 to 99999")
    tasks = geneval.read_tasks(args.metadata)
    made = _generation(args, "prompts")
    made.settings.update(prompts=_digest([task.metadata for task in tasks]))

    def list_missing() -> list[tuple[geneval.Task, int]]:
        geneval.write_metadata(tasks, args.out)
        return geneval.missing_images(tasks, args.out, args.per_prompt)

    _generate_missing(
        made,
        console,
        list_missing=list_missing,
        images_of=len,
        generate=lambda make, mine, update: geneval.generate_images(make, mine, args.out, on_image=update),
        finish=lambda: (
            f"{args.per_prompt} images of each of {len(tasks)} prompts in {args.out}, the folder for "
            "evaluate_images.py"
        ),
    )


def _dpg(args: argparse.Namespace, console: Console) -> None:
    if args.summary is not None:
        return _print_dpg(dpg.summarise(args.summary), console)
    _require(args, "checkpoint", "prompts", "out")
    prompts = read_named_prompts(args.prompts)
    made = _generation(args, "prompts")
    height, width = made.size
    if height != width:
        raise ConfigError(f"--size {height}x{width}: DPG-Bench's scorer cuts grids into squares")
    made.settings.update(prompts=_digest(prompts))
    folder = args.out / "pictures"
    _generate_missing(
        made,
        console,
        list_missing=lambda: dpg.missing_prompts(prompts, folder),
        images_of=lambda part: dpg.PER_PROMPT * len(part),
        generate=lambda make, mine, update: dpg.generate_images(make, mine, folder, on_image=update),
        finish=lambda: (
            f"{len(prompts)} grids in {folder}; for compute_dpg_bench.py: --image-root-path {folder} "
            f"--resolution {height} --pic-num {dpg.PER_PROMPT}"
        ),
    )


def _digest(items: Sequence[Any]) -> str:
    """SHA-256 of the prompts, so that a folder never mixes two prompt files."""
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
        print_line(
            console,
            f"WARNING: {args.inception_weights} is not the published {WEIGHTS_NAME} (SHA-256 {inception.digest}): "
            "do not compare these scores with published ones",
        )
    done = itertools.count(args.batch, args.batch)
    with progress_bar(console, "features", total) as update:
        scores = score_files(
            inception,
            args.samples,
            args.reference,
            batch=args.batch,
            on_batch=lambda size: update(completed=min(next(done), total)),
        )
    values = dataclasses.asdict(scores)
    count = values.pop("num_images")
    labels = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception score"}
    table = Table("score", "value", title=f"{count} images")
    for name, value in values.items():
        table.add_row(labels.get(name, name), "not with this reference" if value is None else f"{value:.4f}")
    console.print(table)
    if args.out is not None:
        result = {
            "pictures": count,
            **values,
            "samples": str(args.samples),
            "reference": str(args.reference),
            "inception_sha256": inception.digest,
            "published_inception": inception.published,
        }
        write_file(args.out, json.dumps(result, indent=1).encode())


def _print_geneval(summary: geneval.GenEvalSummary, console: Console) -> None:
    """Correct images by task, and the overall score."""
    table = Table("task", "correct", "images", "score", title="GenEval")
    for name, (correct, count) in summary.tasks.items():
        table.add_row(name, str(correct), str(count), f"{correct / count:.2%}")
    table.add_section()
    for name, (correct, count) in (("all images", summary.images), ("prompts, any image", summary.prompts)):
        table.add_row(name, str(correct), str(count), f"{correct / count:.2%}")
    table.add_row("overall, mean of tasks", "", "", f"{summary.overall:.5f}")
    console.print(table)


def _print_dpg(summary: dpg.DpgSummary, console: Console) -> None:
    """Scores of broad categories, each followed by its detailed ones, and the overall score."""
    table = Table("category", "score", title=f"DPG-Bench, {summary.grids} prompts")
    for name, score in summary.broad.items():
        table.add_row(name, f"{score:.2f}")
        for detail, value in summary.detailed.items():
            if detail.partition("-")[0].strip() == name:
                table.add_row(f"  {detail}", f"{value:.2f}")
    table.add_section()
    table.add_row("overall", f"{summary.overall:.2f}")
    console.print(table)
