"""A whole training step on the host's side: nothing in it asks the device for a value."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deco_scale.kernels.select import Kernels
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.engines.base import EngineSettings
from deco_scale.parallel.engines.fsdp import FsdpEngine
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.precision.config import PrecisionConfig
from deco_scale.training.anomalies import AnomalyDetector
from deco_scale.training.config import FaultsConfig, RunSettings, StageConfig
from deco_scale.training.inputs import Batch, InputBuilder, pinned
from deco_scale.training.train_step import StepResult
from deco_scale.training.trainer import Stage, Trainer
from tests.support.device_check import reads_host

MODEL = ModelConfig(
    kind="t2i_deco", dim=32, num_heads=4, num_blocks=2, num_text_blocks=1, patch_size=8, decoder_width=8,
    decoder_blocks=1, text_dim=12, text_tokens=5,
)  # fmt: skip
CLASSES = ModelConfig(
    kind="c2i_deco", dim=32, num_heads=4, num_blocks=2, patch_size=8, decoder_width=8, decoder_blocks=1,
    num_classes=10,
)  # fmt: skip
SAMPLES, MICROS = 4, 2


class SmallRun:
    """Steps of a small model under fsdp on one rank, through the loop's own code; the process group is there."""

    def __init__(self, device: torch.device, *, model: ModelConfig, kernels: Kernels = "torch") -> None:
        is_text = model.kind == "t2i_deco"
        objective = ObjectiveConfig(repa_layer=1)
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(SAMPLES // MICROS, 9, 6, generator=generator).to(device)
        self.device, self.model = device, model
        self.engine = FsdpEngine(
            lambda: Objective(Denoiser(model), objective, encoder_dim=6),
            EngineSettings(
                dims=ParallelDims(1, 1, 1),
                device=device,
                optimizer=OptimizerConfig(),
                precision=PrecisionConfig(compute="fp32"),
                kernels=kernels,
            ),
        )
        build_inputs = InputBuilder(
            seed=0,
            device=device,
            objective=objective,
            null=torch.zeros(5, 12, device=device) if is_text else torch.tensor(10, device=device),
            num_classes=model.num_classes,
            encode_image=lambda image: features,
        )
        stage = StageConfig(
            name="a", resolution=24, steps=9, global_batch=SAMPLES, micro_batch=SAMPLES // MICROS, lr=1e-3
        )
        self.stage = Stage(cfg=stage, accumulation=MICROS, image_flops=1.0)
        self.anomalies = AnomalyDetector(
            FaultsConfig(spike="skip", spike_window=2), max_bad_steps=2, device=device
        )
        nothing = cast(Any, None)
        self.trainer = Trainer(
            settings=RunSettings(dir="x"), stages=[self.stage], engine=self.engine, build_inputs=build_inputs,
            open_data=nothing, checkpoints=nothing, device=device, config={},
        )  # fmt: skip

    def batch(self, step: int) -> Batch:
        """Images, and text embeddings of different lengths or labels; in page-locked memory for a GPU."""
        random = np.random.default_rng(step)
        states: Sequence[Any] | None = None
        if self.model.kind == "t2i_deco":
            states = [random.integers(0, 16_000, (2 + i % 3, 12)).astype(np.uint16) for i in range(SAMPLES)]
        images = random.integers(0, 256, (SAMPLES, 24, 24, 3), dtype=np.uint8)
        numbers = range(step * SAMPLES, (step + 1) * SAMPLES)
        made = Batch(images, [""] * SAMPLES, [3] * SAMPLES, numbers, states)
        return pinned(made, (5, 12)) if self.device.type == "cuda" else made

    def step(self, number: int, batch: Batch) -> StepResult:
        """What the loop does in a step that does not log."""
        result = self.trainer.step(self.stage, batch, anomalies=self.anomalies, lr=1e-3)
        self.anomalies.add(number, loss=result.losses["loss"], skipped=result.skipped)
        self.anomalies.apply_policy(self.anomalies.read(), number, number * SAMPLES)
        return result


class Synchronising(TorchDispatchMode):
    """Collects operations that would make the host wait for a GPU.

    Values read on the host and shapes that depend on values are seen. What a CPU cannot show: copies to or
    from pageable memory, which are the same operation as harmless ones; tests/gpu/test_step.py is for those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if reads_host(func, args):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    # Tensors this small gain nothing from threads, which wait for each other on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("model", "kernels"), [(MODEL, "torch"), (CLASSES, "torch"), (CLASSES, "triton")])
def test_no_operation_of_a_step_reads_a_value_on_the_host(
    model: ModelConfig, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "triton":
        # The interpreter itself reads values; what is around the launch is looked at.
        adamw_triton = pytest.importorskip("deco_scale.kernels.triton.adamw")
        launched: list[Any] = []
        monkeypatch.setattr(adamw_triton, "_averaged_adamw", {(n,): launch_into(launched) for n in range(1000)})
    run = SmallRun(torch.device("cpu"), model=model, kernels=kernels)
    # Constants may be made in the first step.
    run.step(1, run.batch(1))
    with Synchronising() as mode:
        results = [run.step(number, run.batch(number)) for number in (2, 3, 4)]
    assert mode.found == [] and mode.seen > 1000
    assert all(bool(torch.isfinite(result.losses["loss"])) for result in results)
    assert run.engine.optimizer_steps == 4
    assert kernels == "torch" or len(launched) == 4


def launch_into(launched: list[Any]) -> Any:
    return lambda *args, **kwargs: launched.append(args)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: x[x > 0], lambda x: x.nonzero(),
        lambda x: torch.equal(x, x), lambda x: float(x[0]), lambda x: x.masked_select(x > 0), lambda x: x.unique(),
    ],
)  # fmt: skip
def test_the_mode_detects_host_reads(read: Any) -> None:
    with Synchronising() as mode:
        read(torch.ones(3))
    assert len(mode.found) == 1


@pytest.mark.usefixtures("group")
def test_the_kernels_take_the_same_step() -> None:
    states: list[dict[str, Tensor]] = []
    kernels: tuple[Kernels, ...] = ("torch", "triton")
    for choice in kernels:
        run = SmallRun(torch.device("cpu"), model=CLASSES, kernels=choice)
        for number in (1, 2):
            run.step(number, run.batch(number))
        states.append({n: cast(Any, t).to_local() for n, t in run.engine.state().items()})
    assert states[0].keys() == states[1].keys()
    for name, wanted in states[0].items():
        # Two steps of 1e-3; the kernels differ by a few roundings, which small second moments lift.
        torch.testing.assert_close(states[1][name], wanted, rtol=1e-5, atol=1e-6)


def test_packed_states_are_the_bits_that_were_stored(tmp_path: Path) -> None:
    from deco_scale.errors import RunError
    from deco_scale.training.inputs import packed_text_embeddings

    exact = torch.randn(3, 4).bfloat16()
    bits = exact.view(torch.int16).numpy().view(np.uint16)
    packed = packed_text_embeddings([bits, bits[:1]], (5, 4))
    assert torch.equal(packed[0, :3], exact) and torch.equal(packed[1, :1], exact[:1])
    assert not packed[0, 3:].any() and not packed[1, 1:].any()
    for shape in ((2, 4), (5, 3)):
        with pytest.raises(RunError, match="the model takes"):
            packed_text_embeddings([bits], shape)
