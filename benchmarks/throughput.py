"""Where the time of a training step goes, for any configuration, on one device.

    python -m benchmarks.throughput --config configs/t2i_tiny.yaml --batch 32

Times the plain objective (forward and backward) whole and by part, medians of several repetitions, and
prints images/s, TFLOP/s and the share of each part; writes a JSON file with commit, versions and hardware.
Encoders, optimizer and communication are not in it.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import record
from deco_scale.config import load_config
from deco_scale.models import Denoiser
from deco_scale.objectives import Objective
from deco_scale.parallel.initial import initial_tensors
from deco_scale.planning.flops import training_flops
from deco_scale.precision import autocast


def median_s(action: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Median seconds of ``action`` after two warm-up calls."""
    times = []
    for i in range(repeats + 2):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(config: Path, batch: int, repeats: int, device: torch.device) -> dict[str, object]:
    """Seconds by part and what follows from them."""
    cfg = load_config(config)
    model, side = cfg.model, cfg.stages[0].resolution
    encoder_dim = 768 if cfg.objective.repa_weight else 0
    with torch.device("meta"):
        template = Objective(Denoiser(model), cfg.objective, encoder_dim=encoder_dim)
    objective = Objective(Denoiser(model), cfg.objective, encoder_dim=encoder_dim)
    objective.load_state_dict(dict(initial_tensors(template, 0)))
    objective.to(device)
    rows, cols = model.grid(side, side)
    image = torch.rand(batch, model.channels, side, side, device=device) * 2 - 1
    noise, t = torch.randn_like(image), torch.rand(batch, device=device)
    if model.kind == "t2i_deco":
        condition = torch.randn(batch, model.text_tokens, model.text_dim, device=device)
    else:
        condition = torch.zeros(batch, dtype=torch.int64, device=device)
    features = torch.randn(batch, rows * cols, encoder_dim, device=device) if encoder_dim else None
    patches = torch.randn(batch, rows * cols, model.patch_values, device=device)
    token = torch.randn(batch, rows * cols, model.dim, device=device, requires_grad=True)

    def step() -> None:
        with autocast(cfg.precision, device):
            loss = objective(image, noise, t, condition, features)["loss"]
        loss.backward()
        objective.zero_grad()

    def forward() -> None:
        with torch.no_grad(), autocast(cfg.precision, device):
            objective(image, noise, t, condition, features)

    def decoder() -> None:
        assert objective.denoiser.decoder is not None
        with autocast(cfg.precision, device):
            out = objective.denoiser.decoder(patches, token)
        out.float().square().mean().backward()
        objective.zero_grad()

    whole = median_s(step, repeats, device)
    parts = {"step": whole, "forward": median_s(forward, repeats, device)}
    if objective.denoiser.decoder is not None:
        parts["decoder, forward and backward"] = median_s(decoder, repeats, device)
    flops = training_flops(model, side, side) * batch / whole
    return {
        "config": config.name,
        "batch": batch,
        "resolution": side,
        "seconds": parts,
        "images_per_s": batch / whole,
        "tflops_per_s": flops / 1e12,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **record.origin(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=record.ROOT / "configs" / "t2i_tiny.yaml")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="folder for a JSON file")
    args = parser.parse_args()
    gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    result = measure(args.config, args.batch, args.repeats, torch.device("cuda" if gpu else "cpu"))
    console = Console()
    table = Table("part", "seconds", "share of the step", title=f"{args.config.name}, batch {args.batch}")
    seconds = result["seconds"]
    assert isinstance(seconds, dict)
    for name, value in seconds.items():
        table.add_row(name, f"{value:.4f}", f"{100 * value / seconds['step']:.0f}%")
    console.print(table)
    console.print(f"{result['images_per_s']:.1f} images/s, {result['tflops_per_s']:.3f} TFLOP/s")
    if args.out:
        record.write(result, args.out, f"throughput_{args.config.stem}", console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
