"""The canonical checkpoint, read and written tensor by tensor; training reads it and the tools read training's."""

import pickle
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoints_tools.base import TensorSpec
from checkpoints_tools.formats.canonical import CanonicalReader, write_canonical
from deco_scale.checkpoint.format import read_tensors
from deco_scale.errors import ConfigError, RunError
from tests.support.checkpoints import META, SMALL, assert_same_bits, complete, save, trained_tensors


def test_trainings_reader_reads_what_the_tools_write(tmp_path: Path) -> None:
    tensors = trained_tensors()
    folder = save(tmp_path / "step", tensors, files=2)
    assert_same_bits(read_tensors(folder, ""), tensors)
    assert not list(folder.parent.glob(".saving_*"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_tools_read_what_training_writes(tmp_path: Path) -> None:
    """The official writer's files; its transposed tensors keep their strides."""
    tensors = trained_tensors()
    name = next(n for n, t in tensors.items() if t.ndim == 2 and t.shape[0] != t.shape[1])
    stored = {**tensors, name: tensors[name].t().contiguous().t()}
    dcp.save(stored, storage_writer=dcp.FileSystemWriter(tmp_path / "s"), no_dist=True)
    complete(tmp_path / "s")
    reader = CanonicalReader(tmp_path / "s")
    assert reader.model == SMALL
    assert_same_bits({n: reader.read(n) for n in reader.specs}, tensors)
    assert torch.equal(reader.read(name, (1, 3)), tensors[name][1:3])


def in_pieces(folder: Path, name: str, tensor: Tensor, cuts: list[tuple[slice, ...]]) -> None:
    """A tensor as a sharded run writes it: a box each in a file each."""
    folder.mkdir()
    chunks, storage = [], {}
    for i, cut in enumerate(cuts):
        part = tensor[cut].clone()
        offsets = torch.Size([s.start or 0 for s in cut])
        torch.save(part, folder / f"__{i}_0.distcp")
        chunks.append(ChunkStorageMetadata(offsets, part.shape))
        length = (folder / f"__{i}_0.distcp").stat().st_size
        storage[MetadataIndex(name, offsets)] = _StorageInfo(f"__{i}_0.distcp", 0, length)
    entry = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
    index = Metadata(state_dict_metadata={name: entry}, storage_data=storage)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    complete(folder)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_rows_of_a_tensor_in_pieces(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cut over both dimensions, as by sharding and tensor parallelism."""
    rows, cols = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))
    tensor = torch.randn(rows, cols)
    row_cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=2))})
    col_cuts = sorted({0, cols, *data.draw(st.lists(st.integers(0, cols), max_size=2))})
    cuts = [
        (slice(a, b), slice(c, d))
        for a, b in zip(row_cuts, row_cuts[1:], strict=False)
        for c, d in zip(col_cuts, col_cuts[1:], strict=False)
    ]
    folder = tmp_path_factory.mktemp("pieces") / "step"
    in_pieces(folder, "model.x", tensor, cuts)
    reader = CanonicalReader(folder)
    assert torch.equal(reader.read("model.x"), tensor)
    start = data.draw(st.integers(0, rows))
    end = data.draw(st.integers(start, rows))
    assert torch.equal(reader.read("model.x", (start, end)), tensor[start:end])


def test_pieces_that_do_not_fill_a_tensor_are_refused(tmp_path: Path) -> None:
    tensor = torch.arange(8.0).reshape(4, 2)
    whole = (slice(0, 2), slice(0, 2))
    bad = {"gap": [whole], "overlap": [whole, (slice(1, 3), slice(0, 2))]}
    for what, cuts in bad.items():
        in_pieces(tmp_path / what, "model.x", tensor, cuts)
        with pytest.raises(ConfigError, match=r"model.x: its pieces do not fill its shape \(4, 2\)"):
            CanonicalReader(tmp_path / what)


@pytest.mark.parametrize("workers", [1, 2])
def test_one_tensor_a_worker_is_in_memory(workers: int, tmp_path: Path) -> None:
    """Those read before are gone when the next one is asked for; PyTorch's own writer keeps a file's."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = torch.full((1000,), float(name.rsplit(".", 1)[1]))
        alive.append(weakref.ref(tensor))
        return tensor

    specs = {f"model.{i}": TensorSpec((1000,)) for i in range(20)}
    write_canonical(tmp_path / "out", specs, read, META, files=2, workers=workers)
    assert most <= workers - 1
    found = read_tensors(tmp_path / "out", "")
    assert all(bool((found[f"model.{i}"] == i).all()) for i in range(20))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def read(name: str) -> Tensor:
        if name == "model.b":
            raise OSError(28, "No space left on device")
        return torch.zeros(4)

    specs = {"model.a": TensorSpec((4,)), "model.b": TensorSpec((4,))}
    with pytest.raises(RunError, match="cannot write .*out: No space left on device"):
        write_canonical(tmp_path / "out", specs, read, META)
    with pytest.raises(ConfigError, match=r"model.b has shape \(3,\), expected \(4,\)"):
        write_canonical(tmp_path / "out", specs, lambda n: torch.zeros(3 + (n == "model.a")), META)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        write_canonical(tmp_path / "file" / "out", specs, lambda n: torch.zeros(4), META)
