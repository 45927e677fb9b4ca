"""The step and the sampler on one GPU: no waiting for the device, and CUDA graphs. Not yet run on a GPU."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deco_scale.kernels.select import Kernels
from deco_scale.models import Denoiser
from deco_scale.sampling import ImageGenerator, SamplerConfig, SampleRequest, VelocityFn
from deco_scale.sampling.cuda_graphs import CudaGraphedVelocity
from deco_scale.sampling.images import velocity_of
from tests.unit.training.test_host_reads import CLASSES, MODEL, SmallRun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU on this machine"),
]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.device]:
    """The GPU, in a process group of one rank over NCCL."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1, device_id=device)
    yield device
    dist.destroy_process_group()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("is_text", [True, False], ids=["text", "classes"])
def test_a_step_that_does_not_log_never_waits_for_the_device(
    is_text: bool, kernels: Kernels, group: torch.device
) -> None:
    run = SmallRun(group, model=MODEL if is_text else CLASSES, kernels=kernels)
    batches = [run.batch(number) for number in range(1, 6)]
    # Kernels are compiled and constants made in the first steps.
    for number in (1, 2):
        run.step(number, batches[number - 1])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [run.step(number, batches[number - 1]) for number in (3, 4, 5)]
        # The mode is on: the same read that logging does is an error.
        with pytest.raises(RuntimeError, match="synchronizing"):
            results[0].losses["loss"].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(torch.isfinite(result.losses["loss"])) for result in results)
    assert run.engine.optimizer_steps == 5


def test_images_from_graphs_are_those_of_the_eager_model() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = Denoiser(CLASSES).to(device).eval()
    for parameter in model.parameters():
        # Some layers start at zero, which would hide the condition.
        torch.nn.init.normal_(parameter, std=0.05)
    calls: list[int] = []

    def predict(patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        calls.append(len(patches))
        return model(patches, t, condition, grid=grid).prediction_BNK

    # Guidance is off at the start and the end, and the last batch is smaller: batches of 2, 4, 1 and again 2.
    cfg = SamplerConfig(num_steps=8, guidance=3.0, guidance_min=0.3, guidance_max=0.8, timestep_shift=1.0)
    drawn: list[Any] = []
    for cuda_graphs in (False, True):
        calls.clear()
        velocity: VelocityFn = velocity_of(predict, CLASSES.patch_size)
        generator = ImageGenerator(
            CudaGraphedVelocity(velocity, device) if cuda_graphs else velocity,
            CLASSES,
            encode=None,
            null=torch.tensor(10),
            device=device,
        )
        requests = [SampleRequest(label, seed=seed) for label, seed in ((1, 5), (2, 6), (3, 7))]
        images = generator.images(requests, size=(24, 24), sampler=cfg, batch=2)
        drawn.append(np.stack([pixels for _, pixels in images]))
    # Three warm-ups and the capture of each shape, of which there are three.
    assert sorted(calls) == [1] * 4 + [2] * 4 + [4] * 4
    # The same kernels; a library may choose another algorithm, which moves a rounding to bytes by one.
    assert abs(drawn[0].astype(int) - drawn[1].astype(int)).max() <= 1


def test_a_graph_sees_new_weights_and_keeps_old_outputs() -> None:
    device = torch.device("cuda")
    weight = torch.ones(4, device=device)
    graphed = CudaGraphedVelocity(lambda x, t: x * weight + t, device)
    first = graphed(torch.full((4,), 2.0, device=device), torch.zeros((), device=device).expand(4))
    weight.fill_(5.0)
    second = graphed(torch.full((4,), 3.0, device=device), torch.ones((), device=device).expand(4))
    assert cast(Any, first).tolist() == [2.0] * 4
    assert cast(Any, second).tolist() == [16.0] * 4
