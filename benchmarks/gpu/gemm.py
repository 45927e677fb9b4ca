"""Rates of the matrix products of an XXL step at their real shapes: what share of the peak the step can reach.

Products of forward, of the gradient of the input (dX) and of the weight (dW), in bf16. No GPU has run it yet.
"""

import dataclasses
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.sizes import TINY_CEILINGS, XXL, overrides_of
from benchmarks.jobs.runner import Found, Where
from benchmarks.measure import Stopwatch, device_name, measure_ceilings, synchronise
from deco_scale.config import load_config
from deco_scale.models.attention.autotune import keep_busy
from deco_scale.planning.gemm import Product, products

MICRO_BATCH = 64
RESOLUTION = 256


def gemm(where: Where) -> Found:
    """TFLOP/s of every product, and what all of them together would take of a step."""
    device = torch.device(where.device)
    sizes = TINY_CEILINGS if where.quick else {}
    ceilings = measure_ceilings(device, torch.bfloat16, **sizes, repeats=5)
    where.write("ceilings", {**dataclasses.asdict(ceilings), "device": device_name(device)})
    model = load_config(XXL, overrides_of(where)).model
    batch, side = (2, 64) if where.quick else (MICRO_BATCH, RESOLUTION)
    # The modulation's are 0.1% of the work.
    every = [p for p in products(model, micro_batch=batch, resolution=side) if p.part != "modulation"]
    table = Table("product", "M", "K", "N", "a step", "forward TFLOP/s", "dX", "dW")
    kinds = {"forward": 0.0, "dX": 0.0, "dW": 0.0}
    flops = dict(kinds)
    for product in every:
        times = _times_s(product, device, repeats=3 if where.quick else 7)
        rates = {kind: product.flops / taken / 1e12 for kind, taken in times.items()}
        where.write(
            product.name.replace(" ", "_"),
            {**dataclasses.asdict(product), **{f"{kind}_tflops_per_s": rate for kind, rate in rates.items()}},
        )
        for kind, taken in times.items():
            kinds[kind] += product.count * taken
            flops[kind] += product.count * product.flops
        sizes_of = map(str, (product.rows, product.in_features, product.out_features, product.count))
        found = (f"{rates[kind]:.4g}" if kind in rates else "-" for kind in kinds)
        table.add_row(product.name, *sizes_of, *found)
    Console(width=120).print(table)
    seconds = sum(kinds.values())
    numbers = {
        "step_gemm_s": seconds,
        "step_gemm_tflops_per_s": sum(flops.values()) / seconds / 1e12,
        **{f"{kind}_tflops_per_s": flops[kind] / taken / 1e12 for kind, taken in kinds.items()},
        **dataclasses.asdict(ceilings),
    }
    return Found(
        f"square {ceilings.gemm_tflops_per_s:.4g} TFLOP/s, copy {ceilings.copy_gb_per_s:.4g} GB/s; products of "
        f"a micro-batch {1e3 * seconds:.4g} ms at {numbers['step_gemm_tflops_per_s']:.4g} TFLOP/s (forward "
        f"{numbers['forward_tflops_per_s']:.4g}, dX {numbers['dX_tflops_per_s']:.4g}, dW "
        f"{numbers['dW_tflops_per_s']:.4g})",
        numbers,
    )


def _times_s(product: Product, device: torch.device, *, repeats: int, calls: int = 4) -> dict[str, float]:
    """Median seconds of each product of a step. Weights come from the GPU's cache, as the ``calls`` share them."""
    x = torch.randn(product.rows, product.in_features, device=device, dtype=torch.bfloat16)
    weight = torch.randn(product.out_features, product.in_features, device=device, dtype=torch.bfloat16)
    grad = torch.randn(product.rows, product.out_features, device=device, dtype=torch.bfloat16)
    actions: dict[str, Callable[[], torch.Tensor]] = {
        "forward": lambda: F.linear(x, weight),
        "dX": lambda: grad @ weight,
        "dW": lambda: grad.t() @ x,
    }
    if product.data:
        del actions["dX"]
    clock, found = Stopwatch(device), {}
    for kind, action in actions.items():
        action()
        series = []
        for _ in range(repeats):
            synchronise(device)
            keep_busy(device)
            began = clock.mark()
            for _ in range(calls):
                action()
            series.append(clock.seconds(began, clock.mark()) / calls)
        found[kind] = statistics.median(series)
    return found
