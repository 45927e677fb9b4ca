"""The planner against the model: FLOPs, state, activations and traffic of memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.train.eager_reference import saved_bytes
from deco_scale.config import load_config
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.models.embeddings import rope_angles
from deco_scale.models.layers import Block
from deco_scale.models.pixel_decoder import PixelDecoder
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.parallel.activation_checkpoint import apply_activation_checkpointing
from deco_scale.parallel.config import ParallelConfig
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.planning.flops import TrainStep, Workload, forward_flops_by_part, training_flops
from deco_scale.planning.gemm import gemm_share, products
from deco_scale.planning.memory import activation_bytes, layout_rows, state_by_part, state_bytes, state_copies
from deco_scale.planning.step_time import block_moved, decoder_moved
from tests.support import CONFIGS

XXL = CONFIGS / "t2i_xxl.yaml"
SMALL = ModelConfig(
    kind="t2i_deco", dim=128, num_heads=4, num_blocks=3, num_text_blocks=2, patch_size=16, decoder_width=32,
    decoder_blocks=3, text_dim=96, text_tokens=32,
)  # fmt: skip
CLASSES = ModelConfig(
    kind="c2i_deco", dim=128, num_heads=4, num_blocks=3, patch_size=16, decoder_width=16, decoder_blocks=2,
    num_classes=10,
)  # fmt: skip
BASELINE = ModelConfig(kind="c2i_baseline", dim=128, num_heads=4, num_blocks=3, num_classes=10)
REPA_DIM = 48


@pytest.mark.parametrize(("side", "anchor"), [(256, 1.17e12), (512, 4.39e12)])
def test_flops_of_a_training_image_are_the_anchors(side: int, anchor: float) -> None:
    # The anchors have three digits and count norms as well: within 1%.
    assert training_flops(load_config(XXL).model, side, side) == pytest.approx(anchor, rel=0.01)


@pytest.mark.parametrize("model", [SMALL, CLASSES, BASELINE], ids=lambda m: m.kind)
def test_flops_are_those_that_pytorch_counts(model: ModelConfig) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    denoiser, grid = Denoiser(model), model.grid(128, 128)
    condition = torch.zeros(1, dtype=torch.int64)
    if model.kind == "t2i_deco":
        condition = torch.randn(1, model.text_tokens, model.text_dim)
    # Attention as plain products, which the counter knows on any device.
    for module in denoiser.modules():
        if hasattr(module, "backend"):
            module.backend = "math"
    patches = torch.randn(1, grid[0] * grid[1], model.patch_values)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(patches, torch.rand(1), condition, grid=grid)
    expected = counter.get_total_flops()
    if model.decoder_width:
        # The model's formula embeds the position of every pixel; the decoder does it once for a patch.
        wide, pixels, channels = model.decoder_width, 128**2, model.channels
        position = 2 * (64 * wide + wide * wide)
        expected += (pixels - model.patch_size**2) * position - 2 * wide * wide * channels
    assert training_flops(model, 128, 128) == pytest.approx(3 * expected, rel=1e-4)


@pytest.mark.parametrize(("model", "tp"), [(SMALL, 1), (SMALL, 2), (CLASSES, 1), (BASELINE, 1)])
def test_products_of_all_ranks_are_the_flops(model: ModelConfig, tp: int) -> None:
    """As one list of shapes and as a formula; the embedding of times and the decoder's pixels are not products."""
    found: dict[str, float] = {}
    for product in products(model, micro_batch=3, resolution=128, tp=tp):
        ranks = 1 if product.part == "modulation" else tp
        found[product.part] = found.get(product.part, 0.0) + ranks * product.count * product.flops
    expected = forward_flops_by_part(model, 128, 128)
    for part in ("linears", "modulation"):
        assert found[part] == pytest.approx(3 * expected[part]), part
    times = 2.0 * (256 * model.dim + model.dim**2)
    assert found["embedding"] == pytest.approx(3 * (expected["embedding"] - times))
    assert 0.1 * 3 * expected["decoder"] < found["decoder"] <= 3 * expected["decoder"]


def test_large_products_are_fast_and_narrow_ones_slow() -> None:
    large = gemm_share(8192, 8192, 8192, sms=132)
    assert 0.9 < large <= 1
    # The XXL model's at micro-batch 64 and 3: K = 1536, and tiles that do not fill the GPU.
    assert 0.7 * large < gemm_share(16384, 4608, 1536, sms=132) < 0.9 * large
    assert gemm_share(768, 1536, 1536, sms=132) < 0.6 * large
    # A whole wave more costs at the edge of one.
    assert gemm_share(128 * 132, 256, 4096, sms=132) > 1.5 * gemm_share(
        128 * 133, 256, 4096, sms=132, loop_k=10**6
    )


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("mesh", [(1, 1), (4, 1), (2, 2)])
def test_state_is_as_often_as_held(engine: Any, stage: Any, mesh: tuple[int, int]) -> None:
    if stage == 0 and (engine == "deepspeed" and mesh[1] > 1):
        pytest.skip("ZeRO-0 has no tensor parallelism")
    dims = ParallelDims(1, *mesh)
    parallel = ParallelConfig(engine=engine, zero_stage=stage, dp_shard=mesh[0], tp=mesh[1])
    rows = layout_rows(SMALL, dims)
    cut, whole = sum(row.local_bytes for row in rows), sum(4 * row.tp_numel for row in rows)
    cuts, wholes = state_copies(engine, stage)
    found = state_bytes(Workload(model=SMALL, compute="fp32"), parallel, dims)
    assert sum(found.values()) == cuts * cut + wholes * whole
    assert set(found) == set(state_by_part(engine, stage))
    if mesh == (1, 1):
        # One rank holds whole copies, as tests/distributed/test_memory.py measures: 4 and 6 of them, and fsdp's
        # gradients.
        whole_bytes = 4 * sum(p.numel() for p in Denoiser(SMALL).parameters())
        expected = 5 if engine == "fsdp" or stage == 0 else 6
        assert sum(found.values()) == expected * whole_bytes


def test_the_repa_head_has_state_but_no_average() -> None:
    parallel, dims = ParallelConfig(dp_shard=1), ParallelDims(1, 1)
    without = state_bytes(Workload(model=SMALL, compute="fp32"), parallel, dims)
    work = Workload(model=SMALL, compute="fp32", repa_dim=REPA_DIM)
    head = Objective(Denoiser(SMALL), ObjectiveConfig(repa_layer=1), encoder_dim=REPA_DIM).repa_head
    assert head is not None
    count = sum(p.numel() for p in head.parameters())
    assert work.repa_parameters == count
    more = {part: size - without[part] for part, size in state_bytes(work, parallel, dims).items()}
    assert more == {"weights": 4 * count, "gradients": 4 * count, "moments": 8 * count, "average": 0}


def _objective(model: ModelConfig, mode: ActivationCheckpointing) -> tuple[Objective, Callable[[], Tensor]]:
    torch.manual_seed(0)
    objective = Objective(Denoiser(model), ObjectiveConfig(repa_layer=2), encoder_dim=REPA_DIM)
    apply_activation_checkpointing(objective.denoiser.transformer_blocks, mode)
    images, tokens = 1, 64
    condition = torch.zeros(images, dtype=torch.int64)
    if model.kind == "t2i_deco":
        condition = torch.randn(images, model.text_tokens, model.text_dim)
    image, noise = torch.rand(2, images, 3, 128, 128).unbind()
    features = torch.randn(images, tokens, REPA_DIM)
    return objective, lambda: objective(image, noise, torch.rand(images), condition, features)["loss"]


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("model", [SMALL, CLASSES, BASELINE], ids=lambda m: m.kind)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(
    model: ModelConfig, compute: Any, mode: ActivationCheckpointing
) -> None:
    objective, forward = _objective(model, mode)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bf16"):
        kept = saved_bytes(objective, forward)
    if compute == "bf16":
        # Autocast's copies of weights belong to the working weights; all linears but the head's small ones.
        kept -= _cast_weights(objective, forward)
    work = Workload(model=model, compute=compute, repa_dim=REPA_DIM)
    parallel = ParallelConfig(dp_shard=1, activation_checkpointing=mode)
    step = TrainStep(
        work=work, parallel=parallel, dims=ParallelDims(1, 1), micro_batch=1, accumulation=1, resolution=128
    )
    planned = activation_bytes(step, kind="cpu")
    # Image and noise are inputs that no operation keeps; what is held for a moment comes in backward.
    total = sum(planned.values()) - planned["held for a moment"] - 2 * 4 * 3 * 128**2
    print(model.kind, compute, mode, f"{total / 2**20:.2f} MiB planned, {kept / 2**20:.2f} kept")
    # Left out: times, modulations, statistics of norms, rotary angles.
    assert total == pytest.approx(kept, rel=0.04)


def _cast_weights(objective: Objective, forward: Callable[[], Tensor]) -> int:
    """Bytes of the bf16 copies that autocast keeps of weights in one forward pass."""
    shapes = {tuple(p.shape) for p in objective.parameters() if p.ndim == 2}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage, shape = tensor.untyped_storage(), tuple(tensor.shape)
        is_weight = tensor.dtype == torch.bfloat16 and shape[::-1] in shapes and not tensor.is_contiguous()
        if is_weight and storage.nbytes() == 2 * tensor.numel():
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        out = forward()
    assert out.requires_grad
    return sum(sizes.values())


class _Moved(TorchDispatchMode):
    """Adds up what operations read and write, matrix products and attention apart."""

    PRODUCTS = ("mm", "addmm", "bmm", "_scaled_dot_product")
    NOTHING = ("empty_like", "empty", "detach", "new_empty_strided", "empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.product_bytes = self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {a.name for a in func._schema.arguments if a.is_out}
        inputs = {name: x for name, x in (kwargs or {}).items() if name not in given}
        read = [x for x in tree_leaves((args, inputs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        name = func._schema.name.split("::")[1]
        own = {x.untyped_storage().data_ptr() for x in read}
        in_place = name.endswith("_") or bool(given)
        is_view = all(x.untyped_storage().data_ptr() in own for x in written) and not in_place
        if is_view or name in self.NOTHING:
            return out
        self.count += 1
        size = sum(x.numel() * x.element_size() for x in (*read, *written))
        if name.startswith(self.PRODUCTS):
            self.product_bytes += size
        else:
            self.bytes += size
        return out


def _both_passes(forward: Callable[[], Tensor]) -> tuple[_Moved, _Moved]:
    with _Moved() as first:
        out = forward()
    with _Moved() as second:
        out.backward(torch.ones_like(out))
    return first, second


@pytest.mark.parametrize("context", [0, 32])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_bytes_that_a_block_moves(compute: Any, context: int) -> None:
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    model = dataclasses.replace(SMALL, text_tokens=32)
    block = Block(
        model.dim, model.num_heads, mlp_hidden_dim=model.mlp_hidden_dim, with_context=context > 0, cast_first=False
    ).to(dtype)  # fmt: skip
    sizes = (256, 1, 32)
    x, condition, text = (torch.randn(2, n, model.dim, dtype=dtype, requires_grad=True) for n in sizes)
    angles = rope_angles(16, 16, head_dim=model.head_dim, scale="grid", device=torch.device("cpu"))
    extra = (angles, text) if context else ()
    passes = _both_passes(lambda: block(x, condition, *extra))
    work = Workload(model=model, compute=compute)
    planned = block_moved(work, tokens=256, context=context, rotary=context > 0, tp=1, kind="cpu")
    for counted, expected in zip(passes, planned, strict=True):
        print(compute, context, counted.bytes, 2 * expected, counted.count)
        # Statistics, angles and modulations are left out.
        assert 2 * expected == pytest.approx(counted.bytes, rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 3])
def test_bytes_that_the_torch_decoder_moves(blocks: int) -> None:
    decoder = PixelDecoder(dim=16, width=32, num_blocks=blocks, patch_size=16, channels=3, features="rotary")
    patches, token = torch.randn(1, 256, 768), torch.randn(1, 256, 16, requires_grad=True)
    passes = _both_passes(lambda: decoder(patches, token))
    work = Workload(model=dataclasses.replace(SMALL, decoder_blocks=blocks), compute="fp32")
    planned = decoder_moved(work, resolution=256, tp=1)
    for counted, expected in zip(passes, planned, strict=True):
        # Pixels and the condition's projection come on top.
        assert expected == pytest.approx(counted.bytes + counted.product_bytes, rel=0.06)
