"""The weights' digest counts every element once, however the weights are cut, copied and stored."""

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.testing._internal.distributed.fake_pg import FakeStore

from checkpoints_tools.formats.canonical import CanonicalReader
from deco_scale.checkpoint.integrity import digest_of_sums, word_sum
from deco_scale.checkpoint.staging import Stager, parameter_digest
from tests.support.checkpoints import assert_same_bits, complete, save

RANKS = 4
Cut = tuple[Placement, ...] | None
"""Placements over a mesh of 2 x 2 ranks; None for a plain tensor that every rank has."""
CUTS: dict[str, Cut] = {
    "plain": None,
    "copies": (Replicate(), Replicate()),
    "rows and copies": (Shard(0), Replicate()),
    "copies and rows": (Replicate(), Shard(0)),
    "copies and columns": (Replicate(), Shard(1)),
    "rows and columns": (Shard(0), Shard(1)),
}


def whole_state(seed: int = 0) -> dict[str, Tensor]:
    """Rows that do not divide evenly, a scalar's vector, and sets that are no weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 6), "b": (5, 3), "c": (3, 1), "d": (1, 8)}
    return {
        f"{kind}.denoiser.{name}": torch.randn(shape, generator=generator)
        for kind in ("model", "ema", "exp_avg") for name, shape in shapes.items()
    }  # fmt: skip


def expected(state: Mapping[str, Tensor]) -> str:
    """Of whole tensors, by the format's definition: each word as a signed number, summed without a limit."""
    lines = []
    for name in sorted(n for n in state if n.startswith("model.")):
        raw = state[name].float().contiguous().numpy().tobytes()
        words = [int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4)]
        lines.append(f"{name}:{sum(words)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """A rank of four, of which the others do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    try:
        yield
    finally:
        dist.destroy_process_group()


def cut_for_this_rank(whole: Tensor, cut: Cut) -> Tensor:
    if cut is None:
        return whole
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    local = whole
    for at, placement in zip(mesh.get_coordinate() or (), cut, strict=True):
        if isinstance(placement, Shard):
            parts = local.chunk(2, dim=placement.dim)
            empty = local.narrow(placement.dim, 0, 0)
            local = parts[at] if at < len(parts) else empty
    return DTensor.from_local(
        local.contiguous(), mesh, cut, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def digests_of_ranks(
    state: Mapping[str, Tensor],
    cuts: Mapping[str, Cut],
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """What each rank makes of its parts; the one exchange of sums is done here, by going through them twice."""
    sums: dict[int, Tensor] = {}

    def note(tensor: Tensor, *args: object, **kwargs: object) -> None:
        sums[dist.get_rank()] = tensor.clone()

    def exchange(tensor: Tensor, *args: object, **kwargs: object) -> None:
        tensor.copy_(torch.stack(list(sums.values())).sum(0))

    found: list[str] = []
    for all_reduce in (note, exchange):
        found = []
        for rank in range(RANKS):
            with as_rank(rank), monkeypatch.context() as patch:
                local = {name: cut_for_this_rank(tensor, cuts[name]) for name, tensor in state.items()}
                patch.setattr(dist, "all_reduce", all_reduce)
                found.append(parameter_digest(Stager().stage(local)))
    assert len(sums) == RANKS
    return found


@pytest.mark.parametrize("cut", CUTS)
def test_however_weights_are_cut_and_copied_each_element_counts_once(
    cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = whole_state()
    cuts = dict.fromkeys(state, CUTS[cut])
    assert digests_of_ranks(state, cuts, monkeypatch) == [expected(state)] * RANKS


def test_tensors_of_one_state_may_be_cut_each_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    state = whole_state(1)
    cuts = {name: list(CUTS.values())[i % len(CUTS)] for i, name in enumerate(state)}
    assert digests_of_ranks(state, cuts, monkeypatch) == [expected(state)] * RANKS


def test_live_weights_and_stored_ones_have_one_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = whole_state(2)
    sums = {name: word_sum(tensor) for name, tensor in state.items() if name.startswith("model.")}
    reader = CanonicalReader(save(tmp_path / "step", state, files=2))
    assert digest_of_sums(sums) == reader.meta.parameter_digest == expected(state)
    live = digests_of_ranks(state, dict.fromkeys(state, CUTS["copies"]), monkeypatch)
    assert set(live) == {reader.meta.parameter_digest}


def test_stored_pieces_count_once_each(tmp_path: Path) -> None:
    """As sharded ranks with copies save: a piece for each box, and none for its copies."""
    whole = whole_state()["model.denoiser.a"]
    boxes = [(slice(0, 4), slice(0, 3)), (slice(0, 4), slice(3, 6)), (slice(4, 7), slice(0, 6))]
    chunks, storage = [], {}
    for i, box in enumerate(boxes):
        part = whole[box].clone()
        torch.save(part, tmp_path / f"__{i}_0.distcp")
        offsets = torch.Size([side.start for side in box])
        chunks.append(ChunkStorageMetadata(offsets, part.shape))
        length = (tmp_path / f"__{i}_0.distcp").stat().st_size
        storage[MetadataIndex("model.a", offsets)] = _StorageInfo(f"__{i}_0.distcp", 0, length)
    entry = TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, chunks)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"model.a": entry}, storage_data=storage)))
    complete(tmp_path)
    reader = CanonicalReader(tmp_path)
    assert_same_bits({"model.a": reader.read("model.a")}, {"model.a": whole})
    assert word_sum(reader.read("model.a")) == word_sum(whole) == sum(word_sum(whole[box]) for box in boxes)


@pytest.mark.parametrize("name", [name for name in whole_state() if name.startswith("model.")])
def test_any_bit_of_any_weight_changes_the_digest(name: str) -> None:
    state = whole_state()
    first = digest_of_sums({n: word_sum(t) for n, t in state.items()})
    for bit in (0, 15, 23, 31):
        flipped = state[name].clone()
        flipped.view(torch.int32).reshape(-1)[-1] ^= -(2**31) if bit == 31 else 1 << bit
        sums = {n: word_sum(flipped if n == name else t) for n, t in state.items()}
        assert digest_of_sums(sums) != first


def test_names_are_part_of_the_digest_and_their_order_is_not() -> None:
    sums = {"model.a": 1, "model.b": 2}
    assert digest_of_sums(dict(reversed(sums.items()))) == digest_of_sums(sums)
    others = [{"model.a": 2, "model.b": 1}, {"model.a": 1, "model.c": 2}, {"model.a": 1}, {"model.a": 1, "b": 2}]
    assert len({digest_of_sums(each) for each in (sums, *others)}) == 5


def test_only_weights_count(monkeypatch: pytest.MonkeyPatch) -> None:
    state, other = whole_state(), whole_state(3)
    mixed = {name: (state if name.startswith("model.") else other)[name] for name in state}
    cuts = dict.fromkeys(state, CUTS["rows and copies"])
    assert digests_of_ranks(mixed, cuts, monkeypatch) == [expected(state)] * RANKS


def test_words_are_those_of_fp32_whatever_the_strides_and_the_type() -> None:
    tensor = whole_state()["model.denoiser.a"]
    assert word_sum(tensor.t()) == word_sum(tensor) == word_sum(tensor[:4]) + word_sum(tensor[4:])
    half = tensor.bfloat16()
    assert word_sum(half) == word_sum(half.float()) != word_sum(tensor)
    assert word_sum(torch.zeros(0, 3)) == 0 and word_sum(torch.tensor(1.0)) == 0x3F800000
    # Signed, and beyond 32 bits.
    assert word_sum(torch.full((8,), -0.0)) == -8 * 2**31 and word_sum(torch.ones(64)) == 64 * 0x3F800000
