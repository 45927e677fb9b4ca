"""The XXL at its real sizes on a GPU that is not there: a step, attention, encoders, sampling, the optimizer.

Every operator of the planned device and type, and no value read on the host; tests/support/fake_cuda.py stands
in for a driver. What a GPU computes is for tests/gpu.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from deco_scale.config import load_config
from deco_scale.kernels.select import Kernels
from deco_scale.models import ModelConfig
from deco_scale.models.attention.dispatch import attention
from deco_scale.training.anomalies import AnomalyDetector
from deco_scale.training.config import FaultsConfig, StageConfig
from deco_scale.training.inputs import Batch, InputBuilder, pinned
from deco_scale.training.train_step import train_step
from tests.support import CONFIGS
from tests.support.device_check import Call, DeviceCheck
from tests.support.fake_cuda import fake_cuda, meta_device
from tests.support.plain_engine import PlainEngine, make_objective

pytestmark = pytest.mark.slow

CONFIG = load_config(CONFIGS / "t2i_xxl.yaml")
BF16, FP32 = torch.bfloat16, torch.float32
ENCODER_DIM = 768
KERNELS: tuple[Kernels, ...] = get_args(Kernels)

CONSTANTS = {
    f"objectives/frequency.py:{name}": ("compute", "send_pageable")
    for name in ("dct_matrix", "colour_matrix", "block_transform", "frequency_weights")
}
"""Made and copied once per process, in the first step."""
STEP = {
    "training/inputs.py:pinned": ("compute",),
    "training/inputs.py:packed_text_embeddings": ("compute",),
    "training/inputs.py:InputBuilder._image": ("compute", "send"),
    "training/inputs.py:InputBuilder._embeddings": ("send",),
    "training/anomalies.py:AnomalyDetector.add": ("compute", "fetch"),
}
"""Where the host's tensors are planned in every step."""
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "convolution")}
WIDENED = {
    "training/inputs.py:InputBuilder._embeddings",
    "kernels/norm.py:_accurate",
    "objectives/repa.py:repa_loss",
    "objectives/objective.py:Objective._pixel_losses",
}
"""Where a tensor of 16 bits is written anew in 32, forward: norms, rotary position and losses."""
RMS_NORM = "kernels/norm.py:rms_norm"
IN_FP32 = (
    "models/embeddings.py",
    "objectives/flow_matching.py",
    "objectives/frequency.py",
    "objectives/repa.py:repa_loss",
    "kernels/adamw.py",
    "optim/adamw_ema.py",
    "training/anomalies.py",
    "training/noise.py:draw",
    "training/train_step.py:train_step",
    "training/train_step.py:_mean_over_ranks",
)
"""Files or functions whose results are fp32, forward and in the update."""


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    """A group of eight ranks, of which the others do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def place_of(device: str) -> Any:
    return fake_cuda() if device == "cuda" else meta_device()


def warm(device: str, kernels: Kernels) -> None:
    """What a run's first step makes, by a model of two tiny blocks with the same losses."""
    cfg = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(
            CONFIG.model, dim=8, num_heads=1, num_blocks=1, num_text_blocks=0, decoder_blocks=1
        ),
        objective=dataclasses.replace(CONFIG.objective, repa_weight=0.0),
    )
    objective = make_objective(cfg, torch.device(device), kernels=kernels)
    with DeviceCheck(device, allowed=CONSTANTS) as check, torch.autocast(device, dtype=BF16):
        image = torch.empty(1, 3, 16, 16, device=device)
        objective(image, image, image[:, 0, 0, 0], torch.empty(1, 128, 2048, device=device))
    assert check.host_calls <= CONSTANTS.keys() and len(check.host_calls) >= 3


def batch_of(stage: StageConfig, device: str) -> Batch:
    """Images and text embeddings as the data's workers give them."""
    size, side = stage.micro_batch, stage.resolution
    states = [np.zeros((3 + i % 90, CONFIG.model.text_dim), np.uint16) for i in range(size)]
    made = Batch(np.zeros((size, side, side, 3), np.uint8), [""] * size, [0] * size, range(size), states)
    shape = (CONFIG.model.text_tokens, CONFIG.model.text_dim)
    return pinned(made, shape) if device == "cuda" else made


def step(device: str, stage: StageConfig, kernels: Kernels) -> tuple[list[Call], dict[str, Tensor]]:
    """One training step that does not log, after the first: from a batch to the update and its anomaly check."""
    place = torch.device(device)
    warm(device, kernels)
    objective = make_objective(CONFIG, place, kernels=kernels, encoder_dim=ENCODER_DIM)
    engine = PlainEngine(objective, CONFIG.optimizer, CONFIG.precision, place, kernels="torch")
    tokens = (stage.resolution // CONFIG.model.patch_size) ** 2
    features = torch.empty(stage.micro_batch, tokens, ENCODER_DIM, dtype=BF16, device=device)
    prepare = InputBuilder(
        seed=0, device=place, objective=CONFIG.objective, encode_image=lambda image: features,
        null=torch.empty(CONFIG.model.text_tokens, CONFIG.model.text_dim, device=device),
    )  # fmt: skip
    detector = AnomalyDetector(FaultsConfig(spike="skip"), max_bad_steps=2, device=place)
    with DeviceCheck(device, allowed=STEP) as check:
        inputs = prepare(batch_of(stage, device), stage.timestep_shift)
        result = train_step(
            engine, [inputs], num_micro_batches=1, lr=stage.lr, betas=stage.betas, should_skip=detector.should_skip
        )
        detector.add(1, loss=result.losses["loss"], skipped=result.skipped)
    assert check.host_calls == STEP.keys() - ({"training/inputs.py:pinned"} if device == "meta" else set())
    state = {n: t for kind in ("ema", "exp_avg", "exp_avg_sq") for n, t in engine.optimizer.tensors(kind).items()}
    assert len(state) == len(list(objective.parameters()))
    for tensor in (*state.values(), *objective.parameters(), *result.losses.values(), *result[1:]):
        assert tensor.dtype == FP32 and tensor.device.type == device
    return check.calls, result.losses


def check_types(calls: Sequence[Call], cfg: ModelConfig, *, extra: Sequence[str] = ()) -> None:
    """bf16 in every product but those of the losses; fp32 where it is planned, and nowhere by accident."""
    mixed: Counter[str] = Counter()
    for call in calls:
        key, short = call.place.key, call.name.partition("::")[2]
        forward = not call.node
        made = {x.dtype for x in call.outputs if x.dtype.is_floating_point}
        if call.name in PRODUCTS and call.floats != {BF16}:
            # Of the colour transform and the DCT, whose backward has no place of its own.
            small = any(x.shape[-2:] in ((3, 3), (8, 8)) for x in call.inputs)
            assert call.floats == {FP32} and small, f"not in bf16: {call}"
        elif "scaled_dot_product" in call.name and forward:
            assert call.floats == {BF16}, f"not in bf16: {call}"
        elif short in ("_fused_rms_norm", "native_layer_norm", "mse_loss"):
            assert call.floats == {FP32}, f"not in fp32: {call}"
        if forward and key.startswith(IN_FP32):
            assert made <= {FP32}, f"not in fp32: {call}"
        if call.name == "aten::_to_copy" and forward:
            widened = call.inputs[0].dtype == BF16 and FP32 in made
            assert not widened or key in WIDENED or key in extra, f"from bf16 to fp32: {call}"
        elif forward and call.name.startswith("aten::") and len(call.floats) > 1:
            mixed[key] += 1
    # The position of text tokens is an fp32 parameter, and so is what the text blocks add to.
    text = 2 * cfg.num_text_blocks
    residual = [c for c in calls if c.name in ("deco_scale::gated_residual", "deco_scale::residual_norm_modulate")]
    by_kernels = {"kernels/norm.py:modulate": 2 * text, "kernels/norm.py:gated_residual": text}
    if residual:
        # One copy of the decoder's weights, in which the folded ones are bf16.
        by_kernels = {"kernels/triton/pixel_decoder.py:render_patches": 1}
    planned = {"models/layers.py:TextEmbedder.forward": 1} | by_kernels
    # Of each chunk of the torch decoder: the residual stream's start, and in each block its input and its output.
    of_chunks = mixed.pop("kernels/pixel_decoder.py:_Chunk.forward", 0)
    assert of_chunks % (2 * cfg.decoder_blocks + 1) == 0 and bool(of_chunks) == (not residual)
    assert mixed == planned, f"operators of fp32 and bf16: {mixed}, planned {planned}"
    assert sum(c.outputs[0].dtype == FP32 for c in residual) == (text if residual else 0)


def custom(calls: Sequence[Call]) -> Counter[str]:
    return Counter(c.name.partition("::")[2] for c in calls if c.name.startswith("deco_scale::"))


def expected_custom(cfg: ModelConfig, kernels: Kernels, *, backward: bool) -> dict[str, int]:
    """Custom operators of a forward pass with losses, and of its backward."""
    if kernels == "torch":
        return {}
    blocks = cfg.num_blocks + cfg.num_text_blocks
    # A block's first norm and that of the text; its second, with the first residual; its second residual.
    forward = {"norm_modulate": blocks + 1, "residual_norm_modulate": blocks, "gated_residual": blocks}
    forward |= {"qk_norm_rope": blocks, "swiglu": blocks}
    forward |= {"render_pixels": 1}
    if not backward:
        return forward | {"squared_error_sums": 1}
    both = forward | {f"{name}_backward": count for name, count in forward.items()}
    return both | {"squared_error_sums": 1, "squared_error_gradient": 1}


def forward_of(calls: Sequence[Call]) -> list[tuple[Any, ...]]:
    """What can be compared between devices: forward, without casts, whose number depends on autocast's cache."""
    seen: list[tuple[Any, ...]] = []
    for call in calls:
        # PyTorch 2.11 fuses the norm on cuda alone.
        if call.node or call.name in ("aten::_to_copy", "aten::detach") or call.place.key == RMS_NORM:
            continue
        if not call.place.file.startswith(("models/", "objectives/", "kernels/")) or "adamw" in call.place.file:
            continue
        is_attention = "scaled_dot_product" in call.name
        seen.append(
            ("attention", call.inputs[:3], call.outputs[:1], call.place.key)
            if is_attention
            else (call.name, call.inputs, call.outputs, call.place.key)
        )
    return seen


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("stage", CONFIG.stages, ids=lambda stage: stage.name)
def test_step_stays_on_the_device_and_in_its_types(stage: StageConfig, kernels: Kernels) -> None:
    assert CONFIG.precision.compute == "bf16"
    forwards = []
    for device in ("cuda", "meta"):
        with place_of(device):
            calls, losses = step(device, stage, kernels)
        assert set(losses) == {"loss", "loss_flow", "loss_freq", "loss_repa"}
        assert custom(calls) == expected_custom(CONFIG.model, kernels, backward=device == "meta")
        check_types(calls, CONFIG.model)
        forwards.append(forward_of(calls))
    # What autocast does on meta is an imitation, so that it has to be the same.
    for one, other in zip(*forwards, strict=True):
        assert one == other


def test_a_tensor_widened_in_a_block_is_detected() -> None:
    cfg = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, num_blocks=2, num_text_blocks=1),
        objective=dataclasses.replace(CONFIG.objective, repa_weight=0.0),
    )

    def calls() -> list[Call]:
        with DeviceCheck("cuda", allowed=CONSTANTS) as check, torch.autocast("cuda", dtype=BF16):
            objective(image, image, image[:, 0, 0, 0], torch.empty(2, 128, 2048, device="cuda"))
        return check.calls

    with fake_cuda():
        objective = make_objective(cfg, torch.device("cuda"), kernels="torch")
        image = torch.empty(2, 3, 64, 64, device="cuda")
        check_types(calls(), cfg.model)
        objective.denoiser.blocks[1].register_forward_pre_hook(lambda block, args: (args[0].float(), *args[1:]))
        with pytest.raises(AssertionError, match=r"from bf16 to fp32: aten::_to_copy.* at models/denoiser.py:"):
            check_types(calls(), cfg.model)


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "math", "flash_torch", "cudnn"])
def test_attention_backends_that_need_no_package(backend: Any, device: str) -> None:
    model = CONFIG.model
    kinds = {"math": {"aten::bmm"}, "cudnn": {"aten::_scaled_dot_product_cudnn_attention"}}
    wanted = kinds.get(backend, {"aten::_scaled_dot_product_flash_attention"})
    with place_of(device):
        for stage in CONFIG.stages:
            patches = (stage.resolution // model.patch_size) ** 2
            for queries, keys in ((patches, patches + model.text_tokens), (model.text_tokens, model.text_tokens)):
                shape = stage.micro_batch, -1, model.num_heads, model.head_dim
                q, k, v = (
                    torch.empty(stage.micro_batch, n, model.dim, dtype=BF16, device=device, requires_grad=True)
                    for n in (queries, keys, keys)
                )
                with DeviceCheck(device) as check, torch.autocast(device, dtype=BF16):
                    out = attention(q.view(shape), k.view(shape), v.view(shape), backend)
                    if device == "meta":
                        out.sum().backward()
                assert out.dtype == BF16 and out.shape == (stage.micro_batch, queries, *shape[2:])
                used = {
                    c.name for c in check.calls if not c.node and (c.name == "aten::bmm" or "scaled" in c.name)
                }
                # A GPU's own choice may be another fused kernel.
                assert used == wanted or (torch.cuda.is_available() and backend in ("auto", "sdpa") and used)
                products = [c for c in check.calls if c.name == "aten::bmm"]
                assert all(c.floats == {FP32} for c in products)
                assert device == "cuda" or (q.grad is not None and q.grad.dtype == BF16)


def test_fused_optimizer_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is around the launch, whose arguments are looked at; the kernel itself takes addresses."""
    from deco_scale.kernels.triton import adamw

    launched: list[tuple[Any, ...]] = []

    class Launch:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *args, **kwargs: launched.append((grid, *args))

    monkeypatch.setattr(adamw, "_averaged_adamw", Launch())
    addresses = {
        "kernels/triton/adamw.py:adamw_ema_triton": ("compute", "send"),
        "kernels/triton/adamw.py:adamw_ema_triton.<locals>.<listcomp>": ("compute",),
    }
    with fake_cuda():
        monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 16)
        device = torch.device("cuda")
        objective = make_objective(CONFIG, device, kernels="triton")
        engine = PlainEngine(objective, CONFIG.optimizer, CONFIG.precision, device, kernels="triton")
        for allowed in ({"kernels/triton/adamw.py:_chunks": ("compute", "send_pageable")}, {}):
            for parameter in objective.parameters():
                parameter.grad = torch.empty_like(parameter)
            with DeviceCheck("cuda", allowed=addresses | allowed) as check:
                engine.update(lr=1e-4, betas=(0.9, 0.95))
    parameters = len(list(objective.parameters()))
    for (chunks,), *arguments in launched:
        tensors = [(a.device.type, a.dtype, tuple(a.shape)) for a in arguments if isinstance(a, Tensor)]
        assert tensors == [
            ("cuda", torch.int64, (parameters, 5)), ("cuda", torch.int64, (parameters,)),
            ("cuda", torch.int32, (chunks,)), ("cuda", torch.int32, (chunks,)), ("cuda", FP32, (4,)),
        ]  # fmt: skip
        assert sum(isinstance(a, float) for a in arguments) == 7
    assert len(launched) == 2
    assert all(
        made.dtype in (FP32, torch.float64, torch.bool, torch.int64) for c in check.calls for made in c.outputs
    )
