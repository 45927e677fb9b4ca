"""Tensor and sequence parallelism: same trace and weights as one process, and only the planned traffic.

The first stage has 9 image tokens, which no tp degree here divides.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from data_pipeline.index.build import build_index, save_index
from data_pipeline.storage.base import open_store
from deco_scale.checkpoint.format import read_tensors
from deco_scale.models import ModelConfig
from deco_scale.models.stored_names import to_stored
from deco_scale.models.tp_plan import check_tp, part_sizes
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.parallel.engines.base import Engine
from deco_scale.parallel.sequence_parallel import TokenShard, encode_shared
from deco_scale.planning.memory import layout_rows
from tests.support.assets import tiny_config
from tests.support.process_groups import Job, full_tensor, in_group, run_jobs, trace, worst_difference
from tests.support.sets import image_bytes, tar_of

TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 5e-5
"""As in test_traces: AdamW lifts rounding of gradients near zero."""


def class_shards(folder: Path) -> Path:
    """Images with class numbers."""
    members: dict[str, bytes] = {}
    for i in range(40):
        members |= {f"{i:03d}.png": image_bytes(i, size=(48, 48)), f"{i:03d}.cls": str(i % 4).encode()}
    folder.mkdir()
    (folder / "a.tar").write_bytes(tar_of(members))
    store = open_store(str(folder))
    index, _ = build_index(store)
    assert not index.problems and len(index) == 40
    save_index(store, index)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tp_runs")
    class_shards(folder / "labelled")
    return folder


@pytest.fixture(scope="module")
def job(root: Path, shards: Path, text_encoder: Path, image_encoder: Path) -> Callable[..., Job]:
    """Makes jobs of 10 steps with accumulation and REPA; the class models without text and images."""

    def make(name: str, resume: str = "none", *, kind: str = "t2i", **parallel: Any) -> Job:
        config = tiny_config(root / name, shards, text_encoder, image_encoder)
        config["parallel"] = parallel
        config["checkpoint"] = {"every": 5, "keep_last": 5}
        config["samples"] = {"every": 5, "prompts": ["red", "a blue", "green"], "sampler": {"num_steps": 2}}
        config["stages"][0] |= {"resolution": 48, "steps": 7}
        config["stages"][1] |= {"steps": 3}
        if kind != "t2i":
            config["data"] |= {"url": str(root / "labelled"), "target": "label"}
            config["text_encoder"], config["samples"] = None, {}
            model = {"kind": kind, "dim": 32, "num_heads": 4, "num_blocks": 2, "num_classes": 4}
            decoder = {"decoder_width": 8, "decoder_blocks": 1} if kind == "c2i_deco" else {}
            # 4D * 2/3 = 85 hidden units do not divide; 48 wide gives 128.
            config["model"] = model | decoder | {"dim": 48, "patch_size": 16}
        at_5 = str(root / resume / "checkpoints" / "step_00000005")
        return Job(name, config, resume if resume == "none" else at_5)

    return make


@pytest.fixture(scope="module")
def runs(root: Path, job: Callable[..., Job]) -> Path:
    classes = ("c2i_deco", "c2i_baseline")
    run_jobs([job("t2i_one"), *(job(f"{k}_one", kind=k) for k in classes)], 1, root)
    two = [
        job("t2i_1x2", tp=2),
        *(job(f"{k}_1x2", kind=k, tp=2) for k in classes),
        job("t2i_1x2_to_zero1_1x2", "t2i_1x2", tp=2, engine="deepspeed", zero_stage=1),
        # ZeRO-3 comes last: it replaces F.linear for the whole process.
        job("t2i_zero3_1x2", tp=2, engine="deepspeed"),
    ]
    run_jobs(two, 2, root)
    four = [
        job("t2i_2x2", tp=2),
        job("t2i_1x4", tp=4),
        job("t2i_zero2_2x2", tp=2, engine="deepspeed", zero_stage=2),
    ]
    run_jobs(four, 4, root)
    return root


@pytest.fixture(scope="module")
def long_runs(runs: Path, job: Callable[..., Job]) -> Path:
    """More combinations, after the short ones."""
    run_jobs([job("t2i_1x4_to_one", "t2i_1x4")], 1, runs)
    two = [
        job("t2i_one_to_1x2", "t2i_one", tp=2),
        job("t2i_1x2_full", tp=2, activation_checkpointing="full"),
        job("t2i_2x1_selective", activation_checkpointing="selective"),
        *(job(f"t2i_zero{stage}_1x2", tp=2, engine="deepspeed", zero_stage=stage) for stage in (1, 2)),
        job(
            "t2i_zero2_1x2_selective", tp=2, engine="deepspeed", zero_stage=2, activation_checkpointing="selective"
        ),
        job("c2i_deco_zero2_1x2", kind="c2i_deco", tp=2, engine="deepspeed", zero_stage=2),
        job("c2i_baseline_zero1_1x2", kind="c2i_baseline", tp=2, engine="deepspeed", zero_stage=1),
        job("t2i_zero1_1x2_to_2x1", "t2i_zero1_1x2"),
        job("t2i_1x2_to_zero3", "t2i_1x2", engine="deepspeed"),
        job("t2i_zero3_1x2_full", tp=2, engine="deepspeed", activation_checkpointing="full"),
    ]
    run_jobs(two, 2, runs)
    four = [
        job("t2i_2x1x2", tp=2, dp_replicate=2),
        job("t2i_1x2_to_1x4", "t2i_1x2", tp=4),
        job("c2i_deco_2x2", kind="c2i_deco", tp=2),
        job("t2i_zero3_2x2_full", tp=2, engine="deepspeed", activation_checkpointing="full"),
        job("t2i_zero1_2x2", tp=2, engine="deepspeed", zero_stage=1),
        job("t2i_zero3_2x2", tp=2, engine="deepspeed"),
        job("c2i_deco_zero3_2x2", kind="c2i_deco", tp=2, engine="deepspeed"),
        job("t2i_zero3_1x2_to_zero3_2x2", "t2i_zero3_1x2", tp=2, engine="deepspeed"),
    ]
    run_jobs(four, 4, runs)
    return runs


NAMES = (
    "t2i_1x2", "c2i_deco_1x2", "c2i_baseline_1x2", "t2i_1x2_to_zero1_1x2", "t2i_zero3_1x2", "t2i_2x2", "t2i_1x4",
    "t2i_zero2_2x2",
)  # fmt: skip
LONG_NAMES = (
    "t2i_one_to_1x2", "t2i_1x2_to_zero3", "t2i_1x2_to_1x4", "t2i_zero3_2x2_full", "t2i_1x2_full",
    "t2i_2x1_selective", "t2i_2x1x2", "c2i_deco_2x2", "t2i_1x4_to_one", "t2i_zero1_1x2", "t2i_zero2_1x2",
    "t2i_zero2_1x2_selective", "c2i_deco_zero2_1x2", "c2i_baseline_zero1_1x2", "t2i_zero1_1x2_to_2x1",
    "t2i_zero3_1x2_full", "t2i_zero1_2x2", "t2i_zero3_2x2", "c2i_deco_zero3_2x2", "t2i_zero3_1x2_to_zero3_2x2",
)  # fmt: skip


def check_against_one(runs: Path, name: str) -> None:
    one = next(f"{k}_one" for k in ("t2i", "c2i_deco", "c2i_baseline") if name.startswith(k))
    found = trace(runs / name)
    assert max(found) == 10 and len(found) == (5 if "_to_" in name else 10)
    assert worst_difference(found, trace(runs / one)) < TOLERANCE
    for kind in ("model.", "ema.", "exp_avg.", "exp_avg_sq."):
        state, wanted = (read_tensors(runs / n / "checkpoints/step_00000010", kind) for n in (name, one))
        assert state.keys() == wanted.keys()
        assert max((state[n] - wanted[n]).abs().max().item() for n in wanted) < WEIGHT_TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_trace_and_state_are_those_of_one_process(runs: Path, name: str) -> None:
    check_against_one(runs, name)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG_NAMES)
def test_trace_and_state_of_more_combinations(long_runs: Path, name: str) -> None:
    check_against_one(long_runs, name)


SMALL = ModelConfig(
    kind="t2i_deco", dim=32, num_heads=4, num_blocks=2, num_text_blocks=1, patch_size=8, decoder_width=8,
    decoder_blocks=1, text_dim=12, text_tokens=5,
)  # fmt: skip


def _collectives_and_gradients() -> None:
    """Everything that needs the group of four, in one spawn."""
    import deco_scale.parallel.sequence_parallel as sequence
    from deco_scale.models import Denoiser
    from deco_scale.optim.config import OptimizerConfig
    from deco_scale.parallel.engines.base import EngineSettings
    from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine
    from deco_scale.parallel.engines.fsdp import FsdpEngine
    from deco_scale.parallel.mesh import ParallelDims
    from deco_scale.precision.config import PrecisionConfig

    shard = TokenShard(dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 10, 3, generator=generator)
    own = shard.own(whole).clone().requires_grad_()
    gathered = shard.gather(own, 10)
    assert torch.equal(gathered, whole)
    # Each rank uses all tokens with its own weight: a token's gradient is the sum over ranks.
    (gathered * (shard.rank + 1)).sum().backward()
    assert own.grad is not None and torch.equal(own.grad, torch.full_like(own, 10.0))
    partial = torch.ones(2, 10, 3, requires_grad=True)
    summed = shard.scatter_sum(partial * (shard.rank + 1))
    assert torch.equal(summed, torch.full_like(summed, 10.0))
    encoded = encode_shared(lambda items: torch.tensor([[float(i)] for i in items]), [3, 1, 4, 1, 5, 9], shard)
    assert encoded.ravel().tolist() == [3, 1, 4, 1, 5, 9]
    other = shard.with_own_communicator()
    assert (other.rank, other.size) == (shard.rank, shard.size) and other.name != shard.name
    assert encode_shared(lambda items: torch.tensor([[float(i)] for i in items]), [7], other).tolist() == [[7]]

    calls: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(torch.ops._c10d_functional, name)

    sequence._COLLECTIVES = Counting()

    def build() -> Objective:
        return Objective(Denoiser(SMALL), ObjectiveConfig(repa_layer=1, freq_gamma=0.7), encoder_dim=6)

    settings = EngineSettings(
        dims=ParallelDims(1, 1, 4), device=torch.device("cpu"), optimizer=OptimizerConfig(clip_norm=1e9),
        precision=PrecisionConfig(compute="fp32"), micro_batch=2,
    )  # fmt: skip
    engine = FsdpEngine(build, settings)
    plain = build()
    step_calls = _check_named_gradients(engine, plain, calls)
    # Two gathers and two scatters a block, and one gather of the text; backward has their adjoints.
    blocks = 3
    assert step_calls.count("all_gather_into_tensor") >= 2 * blocks + 1
    calls.clear()
    token = torch.randn(2, len(shard.own(torch.zeros(1, 9, 1))[0]), 32)
    patches = torch.randn(2, 9, SMALL.patch_values)
    decoder = engine._objective.denoiser.decoder
    assert decoder is not None
    out: Tensor = decoder(patches, token)
    assert out.shape[1] == part_sizes(9, 4)[shard.rank]
    assert calls == [], "the decoder must not communicate"

    # One token for four ranks: three have nothing to score.
    _check_named_gradients(engine, plain, calls, side=8)

    for stage, dims in ((1, ParallelDims(1, 2, 2)), (3, ParallelDims(1, 1, 4))):
        zero = DeepSpeedEngine(build, dataclasses.replace(settings, dims=dims, zero_stage=stage))
        _check_named_gradients(zero, plain, calls)


def _check_named_gradients(engine: Engine, plain: Objective, calls: list[str], side: int = 24) -> list[str]:
    """Gradient of each parameter against one process, read as the first moment of a step with beta1 = 0.

    Same inputs on every rank of dp, so the mean over dp changes nothing. Returns the collectives of forward
    and backward.
    """
    generator = torch.Generator().manual_seed(1)
    state = {n: t for n, t in engine.state().items() if n.startswith("model.")}
    full = {}
    for key, value in state.items():
        assert isinstance(value, DTensor)
        name, whole = key.removeprefix("model."), full_tensor(value)
        # A zero output would leave most gradients zero.
        if "modulation" in name or "head.weight" in name:
            whole = torch.randn(whole.shape, generator=generator) * 0.2
            # The engine's own tensors, filled in place as a checkpoint would.
            parts = distribute_tensor(whole, value.device_mesh, value.placements)
            value.to_local().copy_(parts.to_local())
        full[name] = whole
    engine.load(state, 0)
    plain.load_state_dict(full)
    inputs = ObjectiveInputs(
        torch.randn(2, 3, side, side, generator=generator), torch.randn(2, 3, side, side, generator=generator),
        torch.rand(2, generator=generator), torch.randn(2, 5, 12, generator=generator),
        torch.randn(2, (side // 8) ** 2, 6, generator=generator),
    )  # fmt: skip
    calls.clear()
    losses = engine.forward_backward(inputs, scale=1.0, last=True)
    step_calls = list(calls)
    engine.update(lr=0.0, betas=(0.0, 0.9))
    plain.zero_grad()
    wanted = plain(*inputs)
    wanted["loss"].backward()
    total = losses["loss"].clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / 4, wanted["loss"].detach(), rtol=1e-6, atol=1e-6)
    moments = engine.state()
    grads = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    assert len(grads) == len(list(plain.parameters()))
    for name, grad in to_stored(grads).items():
        found = moments[f"exp_avg.{name}"]
        assert isinstance(found, DTensor)
        scale = grad.abs().max().clamp(min=1e-6)
        difference = (full_tensor(found) - grad).abs().max() / scale
        # q/k norms, decoder, text positions and all else that is summed over tp.
        assert difference < 1e-5, f"{type(engine).__name__}, {name}: {difference}"
    return step_calls


def test_collectives_gradients_and_a_silent_decoder(tmp_path: Path) -> None:
    in_group(_collectives_and_gradients, 4, tmp_path)


def test_parts_differ_by_at_most_one() -> None:
    for count in range(1, 40):
        for parts in range(1, 9):
            sizes = part_sizes(count, parts)
            assert sum(sizes) == count and max(sizes) - min(sizes) <= 1


def test_plan_adds_up() -> None:
    from deco_scale.parallel.mesh import ParallelDims

    whole = sum(row.local_bytes for row in layout_rows(SMALL, ParallelDims(1, 1, 1)))
    halves = list(layout_rows(SMALL, ParallelDims(1, 1, 2)))
    split = sum(r.local_bytes for r in halves if r.split != "replicated")
    replicated = sum(r.local_bytes for r in halves if r.split == "replicated")
    assert 2 * split + replicated == whole
    assert sum(r.local_bytes for r in layout_rows(SMALL, ParallelDims(1, 2, 1))) < 0.6 * whole


def test_impossible_degrees_are_refused_with_the_possible_ones() -> None:
    from deco_scale.errors import ConfigError

    with pytest.raises(ConfigError, match=r"tp=3 must divide model.num_heads=4.*possible: \[1, 2, 4\]"):
        check_tp(SMALL, 3)
    odd = ModelConfig(kind="c2i_baseline", dim=32, num_heads=4, num_blocks=1, patch_size=4, num_classes=2)
    with pytest.raises(ConfigError, match=r"85 hidden units; possible: \[1\]"):
        check_tp(odd, 2)
