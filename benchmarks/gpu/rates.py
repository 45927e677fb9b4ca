"""Rates on a GPU: the pixel decoder's kernels against bandwidth, saving a checkpoint, and sampling.

Each is a function job of ``benchmarks/gpu/second.py``. On a CPU, and with ``quick``, sizes are tiny and rates mean
nothing. No GPU has run them yet.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.checkpoint.save import RandomState, meta_of
from benchmarks.gpu.sizes import TINY_CEILINGS
from benchmarks.jobs.runner import CheckFailed, Found, Where
from benchmarks.kernels.cases import Setting, autocast, decoder_inputs, differentiated, make_decoder
from benchmarks.measure import captured, measure_ceilings, medians_s, synchronise
from benchmarks.train.eager_reference import ReferenceDecoder
from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.checkpoint.format import read_tensors
from deco_scale.checkpoint.manager import CheckpointManager
from deco_scale.config import load_config
from deco_scale.distributed.bootstrap import Environment, init_distributed
from deco_scale.kernels.select import Kernels, choose_kernels, use_kernels
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.pixel_decoder import PixelDecoder
from deco_scale.parallel.engines.base import Engine
from deco_scale.precision.config import PrecisionConfig
from deco_scale.precision.config import autocast as of_precision
from deco_scale.sampling import ImageGenerator, SamplerConfig, SampleRequest, VelocityFn
from deco_scale.sampling.cuda_graphs import CudaGraphedVelocity
from deco_scale.sampling.images import velocity_of

DECODER_BOUND, DECODER_ROUNDING = 2.0, 1e-6
"""How much further from the formula the fused decoder may be than PyTorch's operators in the same type: a factor,
and what comes on top. In bf16 both round a few times in a chain of products."""


def xxl_model(where: Where) -> ModelConfig:
    """The XXL model, or the demo's where sizes are small."""
    name = "t2i_tiny.yaml" if where.quick else "t2i_xxl.yaml"
    return load_config(record.ROOT / "configs" / name, []).model


def decoder(where: Where) -> Found:
    """Forward and backward of the pixel decoder behind its condition projection, in GB/s and of the copy.

    The fused kernels' results are held against the decoder written op by op in fp32 first, for two images.
    """
    device = torch.device(where.device)
    model = xxl_model(where)
    dtype = torch.bfloat16 if where.device == "cuda" else torch.float32
    kernels = choose_kernels("auto", device)
    setting = Setting(
        model=model, batch=2, side=2 if where.quick else 16, device=device, dtype=dtype, triton=kernels == "triton"
    )
    errors = _decoder_errors(setting, kernels)
    where.write("parity", errors)
    wrong = [
        f"{name} {error:.1e} (PyTorch's operators {errors['torch'][name]:.1e})"
        for name, error in errors["fused"].items()
        if not error <= DECODER_BOUND * errors["torch"][name] + DECODER_ROUNDING
    ]
    if wrong:
        raise CheckFailed(f"the decoder ({kernels}) is further from its formula than {dtype} explains: {wrong}")
    numbers: dict[str, Any] = {"kernels": kernels, "largest_difference": max(errors["fused"].values())}
    sizes = TINY_CEILINGS if where.quick else {}
    ceilings = measure_ceilings(device, dtype, **sizes)
    where.write("ceilings", dataclasses.asdict(ceilings))
    large, *small = (2,) if where.quick else (64, 3)
    for batch in (large, *small):
        found = _decoder_rates(dataclasses.replace(setting, batch=batch), kernels, where)
        # A small one comes from the GPU's cache and has no bandwidth to be held against.
        for part in ("forward", "backward") if batch == large else ():
            found[f"{part}_gb_per_s"] = found["least_bytes"][part] / found[f"{part}_s"] / 1e9
            found[f"{part}_of_copy"] = found[f"{part}_gb_per_s"] / ceilings.copy_gb_per_s
        numbers[f"batch_{batch}"] = found
        where.write(f"batch_{batch}", found)
    first = numbers[f"batch_{large}"]
    rates = ", ".join(
        f"{part} {first[f'{part}_gb_per_s']:.0f} GB/s ({first[f'{part}_of_copy']:.0%} of the copy)"
        for part in ("forward", "backward")
    )
    return Found(f"{kernels}: {rates}; differs by {numbers['largest_difference']:.1e}", numbers)


def _decoder_errors(setting: Setting, kernels: Kernels) -> dict[str, dict[str, float]]:
    """Relative difference (Euclidean) of output and gradients from the decoder written op by op, in fp32."""

    def results(kind: type[PixelDecoder], chosen: Kernels, dtype: torch.dtype) -> dict[str, Tensor]:
        module = make_decoder(setting, chosen, kind)
        patches, condition = decoder_inputs(setting)
        leaf = condition.detach().to(dtype).requires_grad_()
        out = autocast(module, dataclasses.replace(setting, dtype=dtype))(patches, leaf)
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        names = ["condition", *(name for name, _ in module.named_parameters())]
        grads = torch.autograd.grad(out, [leaf, *module.parameters()], seed)
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}

    formula = results(ReferenceDecoder, "torch", torch.float32)
    ways = {
        "fused": results(PixelDecoder, kernels, setting.dtype),
        "torch": results(PixelDecoder, "torch", setting.dtype),
    }
    return {
        way: {n: ((found[n].double() - t.double()).norm() / t.double().norm()).item() for n, t in formula.items()}
        for way, found in ways.items()
    }


def _decoder_rates(setting: Setting, kernels: Kernels, where: Where) -> dict[str, Any]:
    """Seconds of forward and of backward, by difference from both, and the least bytes that each has to move."""
    module, inputs = make_decoder(setting, kernels), decoder_inputs(setting)
    function = autocast(module, setting)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    both = differentiated(function, inputs, list(module.parameters()))
    actions: dict[str, Callable[[], object]] = {"forward": forward, "both": both}
    ready = {name: captured(action, setting.device) for name, action in actions.items()}
    seconds = medians_s(ready, repeats=2 if where.quick else 20, device=setting.device, launches=False)
    rows, wide = setting.batch * setting.tokens, setting.dtype.itemsize
    values = rows * setting.model.patch_values
    condition = rows * setting.model.patch_size**2 * setting.model.decoder_width * wide
    # Forward reads patches and condition and writes the output; backward reads these and its gradient, and writes
    # the gradient of the condition.
    least = {"forward": values * (4 + wide) + condition, "backward": values * (4 + wide) + 2 * condition}
    backward_s = seconds["both"] - seconds["forward"]
    return {"forward_s": seconds["forward"], "backward_s": backward_s, "least_bytes": least}


def saving(where: Where) -> Found:
    """Stall and total seconds of asynchronous saves to the local disk; what was written is read back.

    The state has 2 GiB, an eighth of the XXL model's, so that the disk is not what the call waits for.
    """
    device = torch.device(where.device)
    init_distributed(Environment(0, 1, 0), device)
    state = RandomState((64 << 20) if where.quick else (2 << 30), device)
    engine = cast(Engine, state)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoints"
        checkpoints = CheckpointManager(folder, CheckpointConfig(keep_last=1, asynchronous=True))
        checkpoints.prepare()
        began = time.perf_counter()
        checkpoints.reserve(engine)
        numbers: dict[str, Any] = {"bytes": state.nbytes, "reserve_s": time.perf_counter() - began}
        where.write("reserve", numbers)
        for step in (1, 2):
            synchronise(device)
            checkpoints.start(engine, meta_of(step))
            saved = checkpoints.finished(wait=True)
            assert saved is not None
            if saved.error is not None:
                raise CheckFailed(saved.error)
            numbers |= {f"stall_{step}_s": saved.stall_s, f"total_{step}_s": saved.total_s}
            where.write(f"save_{step}", numbers)
        where_saved = checkpoints.complete()[0][1]
        assert isinstance(where_saved, Path)
        stored = read_tensors(where_saved, "ema.")
        expected = {n.removeprefix("ema."): t.cpu() for n, t in state.tensors.items() if n.startswith("ema.")}
        wrong = [n for n in expected if n not in stored or not torch.equal(stored[n], expected[n])]
        if wrong or len(stored) != len(expected):
            raise CheckFailed(
                f"of {len(expected)} tensors of the average {len(wrong)} were read back wrong: {wrong}"
            )
    rate = state.nbytes / numbers["total_2_s"] / 1e9
    stalls = ", ".join(f"{1e3 * numbers[f'stall_{step}_s']:.0f} ms" for step in (1, 2))
    return Found(f"{state.nbytes / 2**30:.2f} GiB: held up {stalls}; {rate:.2f} GB/s to the disk", numbers)


def sampling(where: Where) -> Found:
    """Images/s at 256 px and 25 steps with guidance, for one image and many, eager and as CUDA graphs.

    Weights are random, text embeddings are there; both ways must draw the same images.
    """
    device = torch.device(where.device)
    model, steps, side = xxl_model(where), 3 if where.quick else 25, 16 if where.quick else 256
    torch.manual_seed(0)
    with device:
        denoiser = Denoiser(model).eval().requires_grad_(False)
    for parameter in denoiser.parameters():
        # Fresh weights put out zeros, which would make any two ways equal.
        nn.init.normal_(parameter, std=0.02)
    use_kernels(denoiser, choose_kernels("auto", device))
    precision = PrecisionConfig(compute="bf16" if where.device == "cuda" else "fp32")

    def predict(patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        with of_precision(precision, device):
            return denoiser(patches, t, condition, grid=grid).prediction_BNK

    velocity = velocity_of(predict, model.patch_size)
    ways: dict[str, VelocityFn] = {"eager": velocity}
    if where.device == "cuda":
        ways["graphs"] = CudaGraphedVelocity(velocity, device)
    sampler = SamplerConfig(num_steps=steps)
    numbers: dict[str, Any] = {}
    for batch in (1, 2) if where.quick else (1, 16):
        drawn = {}
        for name, way in ways.items():
            images, seconds = _draw(way, model, device, batch=batch, side=side, sampler=sampler)
            drawn[name] = images
            numbers[f"{name}_{batch}"] = {"seconds": seconds, "images_per_s": batch / seconds}
            where.write(f"{name}_{batch}", numbers[f"{name}_{batch}"])
        _require_same_images(drawn)
    rates = ", ".join(f"{name} {found['images_per_s']:.3g}" for name, found in numbers.items())
    without = "" if "graphs" in ways else "; CUDA graphs need a GPU"
    return Found(f"images/s by way and batch: {rates}{without}", numbers)


def _draw(
    velocity: VelocityFn,
    model: ModelConfig,
    device: torch.device,
    *,
    batch: int,
    side: int,
    sampler: SamplerConfig,
) -> tuple[Any, float]:
    """Images of one batch, and the seconds of the second time they are drawn: the first captures and tunes."""
    shape = (model.text_tokens, model.text_dim)
    states = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1)).to(device)
    generator = ImageGenerator(
        velocity, model, encode=lambda texts: states[: len(texts)], null=torch.zeros(shape), device=device
    )
    jobs = [SampleRequest(f"prompt {number}", 0, number) for number in range(batch)]
    draw = functools.partial(generator.images, jobs, size=(side, side), sampler=sampler, batch=batch)
    for _ in range(2):
        synchronise(device)
        began = time.perf_counter()
        images = np.stack([image for _, image in draw()])
        seconds = time.perf_counter() - began
    return images, seconds


def _require_same_images(drawn: dict[str, Any]) -> None:
    """All ways draw images that differ by no more than a rounding, and that are not all one colour."""
    first, *others = drawn.values()
    if first.std() < 1:
        raise CheckFailed("the images are all of one colour")
    for name, images in zip(list(drawn)[1:], others, strict=True):
        difference = np.abs(images.astype(int) - first.astype(int))
        # The same kernels, but a library may choose another algorithm for a graph: bf16 moves a few values.
        if difference.mean() > 0.5:
            raise CheckFailed(f"images by {name} differ by {difference.mean():.2f} of 255 on average")
