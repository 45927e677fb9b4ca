"""What a checkpoint names is a file of its own folder: no index or list of files leads anywhere else."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoints_tools.formats.canonical import CanonicalReader
from checkpoints_tools.registry import open_checkpoint
from deco_scale.checkpoint.dcp_metadata import read_index
from deco_scale.checkpoint.format import read_tensors, verify
from deco_scale.errors import ConfigError
from tests.support.checkpoints import complete

NAME = "model.x"
OUTSIDE = (
    "../x", "../../x", "..//x", "./x", "./../x", "sub/x", "sub/../../x", "x/", "/x", "//x", "/etc/passwd", "~/x",
    "", ".", "..", "/", "../", "\u2215/x",
)  # fmt: skip
"""Names that are none of a file in the folder."""
ODD: tuple[Any, ...] = (None, 5, b"x", ("x",), ["x"], Path("x"))


def index_of(file: Any, *, offset: Any = 0, length: Any = 100, sizes: Any = (4,), **info: Any) -> bytes:
    """An index of one tensor of four numbers that lies in ``file``."""
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size(sizes))
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([4]), [chunk])
    stored = _StorageInfo(file, offset, length, **info)
    storage = {MetadataIndex(NAME, torch.Size([0])): stored}
    return pickle.dumps(Metadata(state_dict_metadata={NAME: entry}, storage_data=storage))


def folder_of(root: Path, file: Any) -> Path:
    """A complete checkpoint whose index names ``file``, with a good piece wherever that may lead."""
    folder = root / "run" / "step"
    (folder / "sub").mkdir(parents=True)
    for place in (folder, folder / "sub", root / "run", root):
        torch.save(torch.arange(4.0), place / "x")
    length = (folder / "x").stat().st_size
    (folder / "sub" / "x").rename(root / "sub_x")
    (folder / "sub").rmdir()
    (folder / ".metadata").write_bytes(index_of(file, length=length))
    complete(folder)
    return folder


def test_a_file_of_the_folder_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "x")
    assert torch.equal(CanonicalReader(folder).read(NAME), torch.arange(4.0))
    assert torch.equal(read_tensors(folder, "")[NAME], torch.arange(4.0))


@pytest.mark.parametrize("good", ["x", "__0_0.distcp", "a.b", "...", "..x", "x..", "-", "a b", "\u00e4"])
def test_any_plain_name_is_taken(good: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(index_of(good))
    assert read_index(tmp_path / ".metadata")[NAME].pieces[0].file == good


@pytest.mark.parametrize("bad", [*OUTSIDE, *ODD], ids=repr)
def test_a_name_that_is_no_file_of_the_folder_is_refused(bad: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, bad)
    told = "lies in .*no file of the folder" if isinstance(bad, str) else "is damaged"
    for read in (lambda: read_index(folder / ".metadata"), lambda: CanonicalReader(folder)):
        with pytest.raises(ConfigError, match=rf"\.metadata.*{told}"):
            read()
    with pytest.raises(ConfigError):
        read_tensors(folder, "")


def test_an_absolute_name_is_refused_though_its_file_is_a_good_piece(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, str(tmp_path / "x"))
    assert (tmp_path / "x").is_file()
    with pytest.raises(ConfigError, match="no file of the folder"):
        read_index(folder / ".metadata")


@pytest.mark.parametrize("absent", ["y", "x\0", "x\\..\\x", "X"])
def test_a_name_of_no_file_is_refused_by_the_reader(absent: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is missing"):
        CanonicalReader(folder_of(tmp_path, absent))


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": -1}, {"length": -1}, {"offset": 0.5}, {"offset": True}, {"length": 2**63}, {"offset": "0"},
        {"length": None}, {"transform_descriptors": ["zstd"]},
    ],
    ids=repr,
)  # fmt: skip
def test_a_place_that_is_none_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(index_of("x"))
    read_index(tmp_path / ".metadata")
    (tmp_path / ".metadata").write_bytes(index_of("x", **wrong))
    with pytest.raises(ConfigError, match=r"\.metadata is damaged"):
        read_index(tmp_path / ".metadata")


@pytest.mark.parametrize("bad", [name for name in OUTSIDE if "/" in name])
def test_a_list_of_checksums_with_another_folder_s_file_is_refused(bad: str, tmp_path: Path) -> None:
    """With the right sum of a file that is there, so that only the name is wrong."""
    folder = folder_of(tmp_path, "x")
    verify(folder)
    sums = json.loads((folder / "COMPLETE").read_text())
    (folder / "COMPLETE").write_text(json.dumps(sums | {bad: sums["x"]}, indent=1))
    with pytest.raises(ConfigError, match="COMPLETE is damaged"):
        verify(folder)


@pytest.mark.parametrize("bad", OUTSIDE)
def test_a_table_of_safetensors_files_stays_in_its_folder(bad: str, tmp_path: Path) -> None:
    table = tmp_path / "model.safetensors.index.json"
    table.write_text(json.dumps({"weight_map": {"a": bad}}))
    with pytest.raises(ConfigError, match="no file beside it"):
        open_checkpoint(table)


@pytest.mark.parametrize("pointer", ["latest", "latest_universal"])
@pytest.mark.parametrize("bad", OUTSIDE)
def test_a_pointer_to_the_latest_folder_stays_beside_it(bad: str, pointer: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "run" / pointer).write_text(bad)
    with pytest.raises(ConfigError, match="no folder beside it"):
        open_checkpoint(tmp_path / "run")
