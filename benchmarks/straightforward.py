"""What the pixel decoder's way of computing gains over its formula written op by op, in one run on the CPU.

    python -m benchmarks.straightforward

Forward and backward of the decoder (256 px, width 32, 3 blocks, batch 8) and of a whole objective around it (4
blocks of width 512); interleaved, medians. Saved activations are counted by autograd's own hooks.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import record
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.objectives import Objective, ObjectiveConfig
from tests.straightforward import StraightforwardDecoder, saved_bytes

MODEL = ModelConfig(
    kind="t2i_deco", dim=512, num_heads=8, num_blocks=4, num_text_blocks=1, patch_size=16, decoder_width=32,
    decoder_blocks=3, text_dim=256, text_tokens=32,
)  # fmt: skip
SIDE, BATCH = 256, 8


def objective(straightforward: bool) -> Objective:
    torch.manual_seed(0)
    built = Objective(Denoiser(MODEL), ObjectiveConfig(repa_weight=0.0), encoder_dim=0)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.02)
    if straightforward:
        assert built.denoiser.decoder is not None
        built.denoiser.decoder.__class__ = StraightforwardDecoder
    return built


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    tokens = (SIDE // MODEL.patch_size) ** 2
    patches, token = torch.randn(BATCH, tokens, MODEL.patch_values), torch.randn(BATCH, tokens, MODEL.dim)
    image, noise = torch.randn(BATCH, 3, SIDE, SIDE), torch.randn(BATCH, 3, SIDE, SIDE)
    t, text = torch.rand(BATCH), torch.randn(BATCH, MODEL.text_tokens, MODEL.text_dim)
    results: dict[str, Any] = {}
    console = Console()
    built = {"straightforward": objective(True), "ours": objective(False)}

    def decoder(module: Objective) -> Tensor:
        assert module.denoiser.decoder is not None
        out: Tensor = module.denoiser.decoder(patches, token.clone().requires_grad_())
        return out.square().mean()

    def step(module: Objective) -> Tensor:
        return module(image, noise, t, text, None)["loss"]  # type: ignore[no-any-return]

    table = Table("what", "straightforward", "ours", "ratio", title=f"{SIDE} px, batch {BATCH}, fp32")
    for what, work in (("decoder", decoder), ("step", step)):
        seconds: dict[str, list[float]] = {name: [] for name in built}
        losses: dict[str, float] = {}
        for number in range(args.rounds + 1):
            for name, module in built.items():
                began = time.perf_counter()
                loss = work(module)
                loss.backward()
                if number:
                    seconds[name].append(time.perf_counter() - began)
                losses[name] = loss.item()
                module.zero_grad()
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        kept = {name: saved_bytes(module, lambda m=module, w=work: w(m)) for name, module in built.items()}
        results[what] = {"seconds": medians, "saved_bytes": kept, "losses": losses}
        difference = abs(losses["ours"] / losses["straightforward"] - 1)
        rows = {
            "s, forward and backward": (medians, "{:.3f}"),
            "MiB kept": ({n: k / 2**20 for n, k in kept.items()}, "{:.0f}"),
        }
        for label, (values, form) in rows.items():
            ratio = values["straightforward"] / values["ours"]
            table.add_row(f"{what}, {label}", *(form.format(values[n]) for n in built), f"{ratio:.2f}")
        console.print(f"{what}: losses differ by {difference:.1e}")
    console.print(table)
    results |= {**record.origin(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    record.write(results, args.out, "straightforward", console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
