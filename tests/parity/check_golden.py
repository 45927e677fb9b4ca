"""Check the model, its losses, gradients and samplers against recorded tensors of the public release.

    python tests/parity/check_golden.py FILE...

Builds the model from each file's metadata, imports the weights through the release table, and prints one
line per quantity (name, max abs error, max relative error, ok/FAIL) and a last line
``N checks, M failed``; exits 1 on a failure and 2 on a file that cannot be read. All in fp32 on the CPU.

The relative error is the largest absolute error over the largest absolute value of the recorded tensor.
``out.loss`` of a file without some loss setting takes that loss as absent.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from checkpoints_tools.formats import release
from deco_scale.models import Denoiser, ModelConfig, patchify, unpatchify
from deco_scale.models.stored_names import to_stored
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.objectives.flow_matching import base_time, flow_loss, noised, shift_time
from deco_scale.objectives.frequency import (
    dct_matrix,
    frequency_loss,
    frequency_weights,
)
from deco_scale.objectives.repa import RepaHead, repa_loss
from deco_scale.sampling import SamplerConfig, sample, time_grid
from tests.support.release import (
    denoiser_from_release,
    model_config_from_release,
    repa_from_release,
    repa_to_release,
)

TOLERANCE = 1e-5
"""fp32 rounding through a few dozen layers; correct code reaches about 1e-6, a wrong eps shows at 2e-5."""

Check = tuple[str, Tensor, Tensor]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        meta = json.loads((file.metadata() or {})["golden"])
        return meta, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def load_denoiser(cfg: ModelConfig, tensors: dict[str, Tensor]) -> Denoiser:
    model = Denoiser(cfg)
    state = denoiser_from_release(under(tensors, release.DENOISER), cfg)
    model.load_state_dict(state, strict=True)
    return model


def gradient_checks(
    tensors: dict[str, Tensor], denoiser: Denoiser, repa: torch.nn.Module | None
) -> Iterator[Check]:
    """Compare what the file holds; a parameter the loss does not reach has a zero gradient."""

    def grads(module: torch.nn.Module) -> dict[str, Tensor]:
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
        return to_stored(found)

    found = release.denoiser_to_release(grads(denoiser), denoiser.cfg)
    found = {release.DENOISER + name: grad for name, grad in found.items()}
    if repa is not None:
        head = repa_to_release(grads(repa))
        found |= {release.REPA + name: grad for name, grad in head.items()}
    for name, recorded in under(tensors, "gradnorm.").items():
        grad = found[name] if repa is not None or not name.startswith(release.REPA) else None
        yield f"gradnorm.{name}", torch.zeros(()) if grad is None else grad.norm(), recorded
    for name, recorded in under(tensors, "grad.").items():
        yield f"grad.{name}", found[name], recorded


def sampler_checks(meta: dict[str, Any], tensors: dict[str, Tensor], denoiser: Denoiser) -> Iterator[Check]:
    is_text = denoiser.cfg.kind == "t2i_deco"
    noise = tensors["in.noise" if is_text else "in.x_t"]
    grid = denoiser.cfg.grid(*noise.shape[-2:])
    patch_size = denoiser.cfg.patch_size

    @torch.no_grad()
    def velocity(x: Tensor, t_B: Tensor, condition: Tensor) -> Tensor:
        out = denoiser(patchify(x, patch_size), t_B, condition, grid=grid)
        return unpatchify(out.prediction_BNK, grid, patch_size)

    if is_text:
        condition = tensors["in.text"]
        null = tensors["in.null_text"].expand_as(condition)
    else:
        condition = tensors["in.label"]
        null = torch.full_like(condition, denoiser.cfg.num_classes)
    for settings in meta.get("samplers", []):
        name = settings["name"]
        cfg = SamplerConfig(
            solver="adams" if "order" in settings or name.startswith("adam") else "euler",
            num_steps=settings["num_steps"],
            order=settings.get("order", 2),
            guidance=settings["guidance"],
            guidance_min=settings.get("guidance_interval_min", 0.0),
            guidance_max=settings.get("guidance_interval_max", 1.0),
            timestep_shift=settings.get("timeshift", 1.0),
        )
        if f"out.timesteps.{name}" in tensors:
            times = time_grid(cfg.num_steps, cfg.timestep_shift)
            yield f"out.timesteps.{name}", times, tensors[f"out.timesteps.{name}"]
        if f"out.sample.{name}" in tensors:
            result = sample(velocity, noise, condition, null, cfg)
            yield f"out.sample.{name}", result, tensors[f"out.sample.{name}"]


def recorded_time(draw: Tensor, loss: dict[str, Any]) -> Tensor:
    """Times before the shift: the sigmoid of ``in.logit``, or a uniform draw recorded as it is.

    A file of the uniform law (``logit_normal`` false) may hold either; a value outside [0, 1] is a logit.
    """
    uniform = not loss.get("logit_normal", True) and bool(((draw >= 0) & (draw <= 1)).all())
    return base_time(draw, "uniform" if uniform else "logit_normal")


def text_checks(meta: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[Check]:
    cfg = model_config_from_release(meta["kind"], meta["model"])
    denoiser = load_denoiser(cfg, tensors)
    loss = meta.get("loss", {})
    repa_state = repa_from_release(under(tensors, release.REPA))
    objective = Objective(
        denoiser,
        ObjectiveConfig(
            freq_weight=loss.get("freq_weight", 0.0),
            freq_quality=int(loss.get("freq_quality", 85)),
            freq_gamma=loss.get("freq_gamma", 1.0),
            freq_mode=loss.get("freq_mode", "inv_gamma"),
            repa_weight=loss.get("repa_weight", 0.0) if repa_state else 0.0,
            repa_layer=loss.get("align_layer", 1),
        ),
        encoder_dim=tensors["in.encoder_features"].shape[-1] if repa_state else 0,
    )
    if objective.repa_head is not None:
        objective.repa_head.load_state_dict(repa_state, strict=True)
    image, noise, text = tensors["in.image"], tensors["in.noise"], tensors["in.text"]
    t = shift_time(recorded_time(tensors["in.logit"], loss), loss.get("time_shift", 1.0))
    x_t = noised(image, noise, t)
    grid = cfg.grid(*image.shape[-2:])
    with torch.no_grad():
        out = denoiser(
            patchify(x_t, cfg.patch_size),
            t,
            text,
            grid=grid,
            hidden_after=objective.cfg.repa_layer,
        )
    assert out.hidden_BND is not None
    losses = objective(image, noise, t, text, tensors.get("in.encoder_features"))
    losses["loss"].backward()
    # A loss of weight 0 is left out of the step, but a file may hold its value.
    with torch.no_grad():
        weights = frequency_weights(
            objective.cfg.freq_quality, gamma=objective.cfg.freq_gamma, mode=objective.cfg.freq_mode
        )
        velocity = unpatchify(out.prediction_BNK, grid, cfg.patch_size)
        losses.setdefault("loss_freq", frequency_loss(velocity - (image - noise), weights))
        if "loss_repa" not in losses and repa_state:
            head = RepaHead(cfg.dim, tensors["in.encoder_features"].shape[-1])
            head.load_state_dict(repa_state, strict=True)
            losses["loss_repa"] = repa_loss(head(out.hidden_BND), tensors["in.encoder_features"])
    found = {
        "out.t": t,
        "out.x_t": x_t,
        "out.v_target": image - noise,
        "out.velocity": velocity,
        "out.hidden": out.hidden_BND,
        "out.loss": losses["loss"],
        "out.loss_fm": losses["loss_flow"],
        "out.loss_freq": losses["loss_freq"],
        "out.loss_repa": losses.get("loss_repa"),
        "out.dct_matrix": dct_matrix(),
        "out.freq_weight": weights,
    }
    for name, value in found.items():
        if name in tensors and value is not None:
            yield name, value.detach(), tensors[name]
    yield from gradient_checks(tensors, denoiser, objective.repa_head)
    yield from sampler_checks(meta, tensors, denoiser)


def class_checks(meta: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[Check]:
    cfg = model_config_from_release(meta["kind"], meta["model"])
    denoiser = load_denoiser(cfg, tensors)
    x_t = tensors["in.x_t"]
    grid = cfg.grid(*x_t.shape[-2:])
    out = denoiser(patchify(x_t, cfg.patch_size), tensors["in.t"], tensors["in.label"], grid=grid)
    velocity = unpatchify(out.prediction_BNK, grid, cfg.patch_size)
    loss = flow_loss(velocity, tensors["in.v_target"])
    loss.backward()
    yield "out.velocity", velocity.detach(), tensors["out.velocity"]
    yield "out.loss_fm", loss.detach(), tensors["out.loss_fm"]
    yield from gradient_checks(tensors, denoiser, None)
    yield from sampler_checks(meta, tensors, denoiser)


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    count = failed = 0
    for path in map(Path, paths):
        try:
            meta, tensors = read(path)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            print(f"{path}: not a golden file: {error}", file=sys.stderr)
            return 2
        checks = text_checks if meta["kind"] == "t2i_deco" else class_checks
        print(f"# {path}")
        unchecked = {n for n in tensors if n.startswith("out.")}
        for name, found, recorded in checks(meta, tensors):
            unchecked.discard(name)
            difference = (found.float() - recorded.float()).abs().max().item()
            largest = recorded.float().abs().max().item()
            relative = difference / largest if largest > 0 else difference
            ok = found.shape == recorded.shape and relative <= TOLERANCE
            count, failed = count + 1, failed + (not ok)
            print(f"{name}  {difference:.3e}  {relative:.3e}  {'ok' if ok else 'FAIL'}")
        for name in sorted(unchecked):
            count, failed = count + 1, failed + 1
            print(f"{name}  nan  nan  FAIL (nothing computes it)")
    print(f"{count} checks, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
