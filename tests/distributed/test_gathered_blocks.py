"""fsdp over two ranks: blocks that are gathered together give the gradients of blocks gathered one by one."""

import itertools
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.engines.base import EngineSettings
from deco_scale.parallel.engines.fsdp import FsdpEngine, shard_units
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.precision.config import PrecisionConfig
from tests.support.process_groups import in_group

CPU = torch.device("cpu")
MODEL = ModelConfig(
    kind="t2i_deco", dim=32, num_heads=4, num_blocks=6, num_text_blocks=2, patch_size=16, decoder_width=8,
    decoder_blocks=1, text_dim=24, text_tokens=8,
)  # fmt: skip


def build() -> Objective:
    return Objective(Denoiser(MODEL), ObjectiveConfig(repa_layer=2), encoder_dim=8)


def inputs(micro_batch: int) -> ObjectiveInputs:
    """Other samples on each rank and in each micro-batch."""
    generator = torch.Generator().manual_seed(2 * micro_batch + torch.distributed.get_rank())
    image, noise = (torch.randn(2, 3, 32, 32, generator=generator) for _ in range(2))
    text, features = (torch.randn(2, *shape, generator=generator) for shape in ((8, 24), (4, 8)))
    return ObjectiveInputs(image, noise, torch.rand(2, generator=generator), text, features)


def gradients(mode: ActivationCheckpointing, *, reshard_after_forward: bool) -> dict[str, Tensor]:
    """This rank's shards of the first moment after two steps, each of two micro-batches and followed by sampling
    with the average."""
    settings = EngineSettings(
        dims=ParallelDims(1, 2), device=CPU, optimizer=OptimizerConfig(clip_norm=1e9),
        precision=PrecisionConfig(compute="fp32"), activation_checkpointing=mode,
        reshard_after_forward=reshard_after_forward, micro_batch=2,
    )  # fmt: skip
    engine = FsdpEngine(build, settings)
    units = shard_units(engine._objective.denoiser, reshard_after_forward=reshard_after_forward)
    assert len(units) == (9 if reshard_after_forward else 4)
    assert all(isinstance(module, FSDPModule) for unit in units for module in unit)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for local in engine._shards.values():
            local.copy_(0.1 * torch.randn(local.shape, generator=generator))
    for _ in range(2):
        for micro_batch in range(2):
            engine.forward_backward(inputs(micro_batch), scale=0.5, last=micro_batch == 1)
        engine.update(lr=1e-3, betas=(0.5, 0.9))
        with engine.ema_weights():
            engine.predict(torch.ones(1, 4, 768), torch.ones(1), torch.ones(1, 8, 24), (2, 2))
    return {name: moment.clone() for name, moment in engine._optimizer.tensors("exp_avg").items()}


def _compare() -> None:
    wanted = gradients("none", reshard_after_forward=True)
    assert all(tensor.any() for tensor in wanted.values() if tensor.numel())
    for mode, reshard_after_forward in itertools.product(get_args(ActivationCheckpointing), (True, False)):
        found = gradients(mode, reshard_after_forward=reshard_after_forward)
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-8, msg=f"{mode}: {name}")


def test_gradients_do_not_depend_on_what_is_gathered_together(tmp_path: Path) -> None:
    in_group(_compare, 2, tmp_path)
