"""The ``deco`` command. Exit codes: 0 done, 1 failed, 2 wrong use or configuration."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor

from data_pipeline.embed import embed
from data_pipeline.errors import DataError
from data_pipeline.index import load_index
from data_pipeline.loader import access_of, states_identity
from data_pipeline.store import open_store
from deco_scale import plan_command
from deco_scale.config import RunConfig, build_config, load_config
from deco_scale.errors import ConfigError, RunError
from deco_scale.models import Denoiser
from deco_scale.models.encoders import EncoderError, TextEncoder, text_identity
from deco_scale.sampling import SamplerConfig
from deco_scale.sampling.graphs import Graphed
from deco_scale.sampling.pictures import make_pictures, save_grid, velocity_of
from deco_scale.training.checkpoint import CheckpointMeta, read_meta, read_tensors


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deco", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_sample(commands.add_parser("sample", help="pictures from a checkpoint's EMA weights"))
    plan_command.add_arguments(commands.add_parser("plan", help="layout, memory, time and cost on N GPUs"))
    _add_embed(commands.add_parser("embed", help="compute the captions' text states before training"))
    args = parser.parse_args(argv)
    try:
        return {"sample": _sample, "plan": plan_command.run, "embed": _embed}[args.command](args, _console())
    except (ConfigError, EncoderError) as error:
        print(f"deco: {error}", file=sys.stderr)
        return 2
    except (RunError, DataError) as error:
        print(f"deco: {error}", file=sys.stderr)
        return 1


def _console() -> Console:
    """A terminal's own width; elsewhere wide enough for tables."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="step folder, or a run's folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="may be given several times")
    source.add_argument("--prompts", type=Path, help="a file with one prompt per line")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-prompt", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--seeds",
        choices=("prompt", "picture"),
        default="prompt",
        help="count seeds up within each prompt (as evaluations do), or over all pictures",
    )
    parser.add_argument("--size", type=int, help="side in pixels; default: the last stage's")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--text-encoder", help="folder, where it has moved since training")
    for name, kind in (
        ("solver", str),
        ("num-steps", int),
        ("order", int),
        ("guidance", float),
        ("timestep-shift", float),
    ):
        parser.add_argument(f"--{name}", type=kind, help="default: the run's samples.sampler")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay the model as CUDA graphs; needs a GPU")


def _sample(args: argparse.Namespace, console: Console) -> int:
    if args.per_prompt < 1 or args.batch < 1:
        raise ConfigError("--per-prompt and --batch must be at least 1")
    prompts = args.prompt or _read_prompts(args.prompts)
    path = find_checkpoint(args.checkpoint)
    meta = read_meta(path)
    cfg = build_config(meta.config, source=str(path / "meta.json"))
    if cfg.model.kind != "t2i_deco" or cfg.text_encoder is None:
        raise ConfigError(f"{path} is a {cfg.model.kind} model; prompts need t2i_deco")
    sampler = _sampler(cfg.samples.sampler, args)
    side = args.size or cfg.stages[-1].resolution
    try:
        cfg.model.grid(side, side)
    except ValueError as error:
        raise ConfigError(f"--size: {error}") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = dataclasses.replace(cfg.text_encoder, path=args.text_encoder or cfg.text_encoder.path)
    text = TextEncoder.load(encoder, device)
    denoiser = load_denoiser(cfg, path).to(device)

    def predict(patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        return denoiser(patches, t, condition, grid=grid).prediction_BNK

    velocity = velocity_of(predict, cfg.model.patch_size)
    if args.cuda_graphs:
        try:
            velocity = Graphed(velocity, device)
        except ValueError as error:
            raise ConfigError(f"--cuda-graphs: {error}") from error
    work = [(i, n) for i in range(len(prompts)) for n in range(args.per_prompt)]
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = []
    with (
        Progress(console=console) as progress,
        (args.out / "pictures.jsonl").open("w", encoding="utf-8") as log,
    ):
        task = progress.add_task("sampling", total=len(work))
        for start in range(0, len(work), args.batch):
            part = work[start : start + args.batch]
            seeds = [
                args.first_seed + (n if args.seeds == "prompt" else start + k) for k, (_, n) in enumerate(part)
            ]
            drawn = make_pictures(
                velocity,
                text.encode([prompts[i] for i, _ in part]).float(),
                text.null.float(),
                seeds,
                size=(side, side),
                cfg=sampler,
                batch=args.batch,
            )
            for (i, n), seed, pixels in zip(part, seeds, drawn, strict=True):
                file = f"{i:05d}_{n:04d}.png"
                Image.fromarray(pixels).save(args.out / file)
                log.write(json.dumps(_record(file, prompts[i], seed, meta, sampler)) + "\n")
                pictures.append(pixels)
            progress.advance(task, len(part))
    labels = [prompts[i] for i, _ in work]
    grid = args.out / "grid.png"
    save_grid(np.stack(pictures), grid, columns=min(8, len(work)), labels=labels, scale=max(1, 96 // side))
    console.print(f"{len(work)} pictures in {args.out}, all on one sheet: {grid}")
    return 0


def _add_embed(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes the states of every caption of data.url (or of each data set of data.mixture) to its text_states. "
        "Run it under torchrun to share the shards between GPUs; run it again to go on after a break."
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument(
        "--batch", type=int, help="texts encoded at a time (default: the first stage's micro_batch)"
    )


class _Shown:
    """A progress bar as a function of (shard, done, total)."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def __call__(self, key: str, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total, description=f"embedding {key}")


def _embed(args: argparse.Namespace, console: Console) -> int:
    cfg = load_config(args.config, args.overrides)
    if cfg.text_encoder is None or not cfg.data.has_text_states:
        raise ConfigError(
            "deco embed needs text_encoder, and data.text_states (or mixture[].text_states) to write to"
        )
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
    settings = dataclasses.replace(cfg.text_encoder, cache_captions=0)
    encoder = TextEncoder.load(settings, device or torch.device("cpu"))

    def encode(texts: Sequence[str]) -> list[Any]:
        states = encoder.encode_ragged(texts)
        return [s.bfloat16().view(torch.int16).cpu().numpy().view(np.uint16) for s in states]

    identity = states_identity(cfg.data, text_identity(settings, encoder.width))
    batch = args.batch or cfg.stages[0].micro_batch
    with Progress(console=console, transient=True, disable=rank > 0) as progress:
        for source in cfg.data.sources:
            data, target = (open_store(url, access_of(cfg.data)) for url in (source.url, source.text_states))
            index = load_index(data)
            shown = _Shown(progress, progress.add_task(source.url, total=len(index.shards)))
            embed(data, index, target, encode, identity, rank=rank, world=world, batch=batch, progress=shown)
            if rank == 0:
                console.print(f"text states of {len(index)} samples in {source.text_states}", soft_wrap=True)
    return 0


def _read_prompts(path: Path) -> list[str]:
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: {error}") from error
    prompts = [p for p in prompts if p]
    if not prompts:
        raise ConfigError(f"--prompts {path}: no prompt in it")
    return prompts


def _sampler(default: SamplerConfig, args: argparse.Namespace) -> SamplerConfig:
    names = [f.name for f in dataclasses.fields(SamplerConfig)]
    given = {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}
    if given.get("solver", "euler") not in ("euler", "adams"):
        raise ConfigError(f"--solver {given['solver']}: possible are euler and adams")
    try:
        return dataclasses.replace(default, **given)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def find_checkpoint(path: Path) -> Path:
    """A step folder itself, or the newest complete one of a run's folder."""
    if (path / "COMPLETE").is_file():
        return path
    complete = sorted(p.parent for p in path.glob("checkpoints/step_*/COMPLETE"))
    if not complete:
        raise ConfigError(f"{path}: neither a complete checkpoint nor a run with one")
    return complete[-1]


def load_denoiser(cfg: RunConfig, path: Path) -> Denoiser:
    """Plain denoiser with a checkpoint's EMA weights, on the CPU, ready for inference."""
    with torch.device("meta"):
        denoiser = Denoiser(cfg.model)
    tensors = read_tensors(path, "ema.denoiser.")
    try:
        denoiser.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"{path} does not fit its own configuration: {error}") from error
    return denoiser.eval().requires_grad_(False)


def _record(file: str, prompt: str, seed: int, meta: CheckpointMeta, sampler: SamplerConfig) -> dict[str, object]:
    return {
        "file": file,
        "prompt": prompt,
        "seed": seed,
        "checkpoint_step": meta.step,
        "checkpoint_digest": meta.parameter_digest,
        "sampler": dataclasses.asdict(sampler),
    }


if __name__ == "__main__":
    sys.exit(main())
