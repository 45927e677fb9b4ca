"""``deco-ckpt``: verify, inspect, diff; exit codes, and what leaves no trace."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints_tools.base import EMA, CheckpointReader, TensorSpec
from checkpoints_tools.formats.torch_zip import Archive
from checkpoints_tools.tensor_stats import tensor_facts
from deco_scale.checkpoint.format import COMPLETE, read_checksums, read_meta
from deco_scale.errors import Damaged
from tests.support.checkpoints import complete, release_state, run, save, trained_tensors


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return trained_tensors()


@pytest.fixture
def folder(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    return save(tmp_path / "step", tensors, files=2)


def _flips(path: Path, random: np.random.Generator) -> Iterator[int]:
    """Some positions of a file; all kinds of bytes are met over the files of a checkpoint."""
    yield from sorted({int(i) for i in random.integers(path.stat().st_size, size=12)})


@pytest.mark.parametrize("kind", ["canonical", "release", "safetensors", "diffusers"])
def test_a_flipped_bit_is_detected_and_its_file_named(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = folder
    if kind != "canonical":
        checked = tmp_path / ("out.ckpt" if kind == "release" else "out")
        assert run("export", folder, checked, "--format", kind) == 0
    assert run("verify", checked) == 0
    assert "every file matches its checksum" in capsys.readouterr().out
    files = (
        [p for p in checked.rglob("*") if p.is_file()] if checked.is_dir() else list(tmp_path.glob("out.ckpt*"))
    )
    assert len(files) > 1
    random = np.random.default_rng(0)
    for file in files:
        whole = file.read_bytes()
        for position in _flips(file, random):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << int(random.integers(8))
            file.write_bytes(flipped)
            assert run("verify", checked) == 1, (file, position)
            assert file.name in capsys.readouterr().err, (file, position)
        file.write_bytes(whole)
    assert run("verify", checked) == 0


def test_verify_finds_other_damage(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    missing = broken("missing")
    (missing / "__0_1.distcp").unlink()
    extra = broken("extra")
    (extra / "more").write_text("")
    digest = broken("digest")
    complete(digest, dataclasses.replace(read_meta(folder), parameter_digest="0" * 16))
    swapped = broken("swapped")
    one, two = (swapped / f"__0_{i}.distcp" for i in range(2))
    one.rename(swapped / "x"), two.rename(one), (swapped / "x").rename(two)
    complete(swapped, read_meta(folder))
    for path, message in (
        (missing, "__0_1.distcp is missing"),
        (extra, "more is not listed in COMPLETE"),
        (digest, "the weights' digest is"),
        (swapped, ".distcp"),
    ):
        assert run("verify", path) == 1
        assert message in capsys.readouterr().err
    (folder / "COMPLETE").unlink()
    assert run("verify", folder) == 1
    assert "not a complete checkpoint" in capsys.readouterr().err


def test_inspect_names_nan_and_zeros(
    tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zero, nan, inf = list(tensors)[:3]
    assert run("inspect", save(tmp_path / "good", tensors)) == 0
    out = capsys.readouterr().out
    assert "step" in out and "7 (stage a" in out and "NaN" not in out
    tensors[zero] = torch.zeros_like(tensors[zero])
    tensors[nan].view(-1)[0] = float("nan")
    tensors[inf].view(-1)[0] = float("inf")
    assert run("inspect", save(tmp_path / "bad", tensors), "--tensors") == 1
    said = capsys.readouterr().out
    assert f"{nan}: 1 NaN" in said and f"infinities:\n  {inf}\n" in said
    assert f"1 tensors are all zero (normal for zero-initialised ones at step 0):\n  {zero}\n" in said


def test_tensors_of_any_layout_are_read(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {
        "plain": whole,
        "turned": whole.T,
        "part": whole[1:, 2:],
        "none": torch.empty(0, 3),
        "one": whole[2, 3],
    }
    torch.save(tensors, tmp_path / "file")
    archive = Archive(tmp_path / "file")
    for name, tensor in tensors.items():
        stored = archive.stored(archive.content[name], name)
        assert torch.equal(stored.read(), tensor) and stored.read().is_contiguous()
        if tensor.ndim:
            assert torch.equal(stored.read((1, 2)), tensor[1:2]) and torch.equal(stored.read((0, 0)), tensor[:0])


def test_statistics_of_every_type_of_number() -> None:
    class Stored(CheckpointReader):
        """A tensor of eight bits each, which PyTorch hardly computes with."""

        specs = {"a": TensorSpec((4,), torch.float8_e4m3fn)}

        def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
            return torch.tensor([0.0, 1.0, 2.0, float("nan")]).to(torch.float8_e4m3fn)

    found = tensor_facts(Stored(), "a")
    assert (found.minimum, found.maximum, found.mean, found.nans) == (0, 2, 1, 1)
    assert found.std == pytest.approx((2 / 3) ** 0.5)


def test_a_list_of_checksums_is_not_read_without_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (folder / COMPLETE).stat().st_size
    monkeypatch.setattr("deco_scale.checkpoint.format._MAX_COMPLETE_BYTES", size)
    assert read_checksums(folder)
    with (folder / COMPLETE).open("ab") as file:
        file.truncate(2**40)
    with pytest.raises(Damaged, match="COMPLETE is damaged"):
        monkeypatch.setattr("deco_scale.checkpoint.format._MAX_COMPLETE_BYTES", size + 1)
        read_checksums(folder)


def test_diff_between_formats(folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    assert run("export", folder, tmp_path / "w.ckpt", "--format", "release") == 0
    assert run("export", folder, tmp_path / "pipe", "--format", "diffusers", "--dtype", "bf16") == 0
    assert run("diff", folder, folder) == 0
    assert run("diff", folder, tmp_path / "w.ckpt", "--only", "model") == 0
    # The release's file has no moments.
    assert run("diff", folder, tmp_path / "w.ckpt") == 1
    assert run("diff", tmp_path / "w.ckpt", tmp_path / "pipe", "--only", "ema") == 1
    assert run("diff", tmp_path / "w.ckpt", tmp_path / "pipe", "--only", "ema", "--tolerance", "0.05") == 0
    assert run("diff", folder, tmp_path / "nothing") == 2


def test_diff_says_how_much(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(n for n in tensors if n.startswith(EMA))
    largest = float(tensors[name].abs().max())
    tensors[name].view(-1)[0] += 0.25
    other = save(tmp_path / "other", tensors)
    assert run("diff", folder, other) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if name in line]
    numbers = [float(cell) for cell in line.strip("\u2502 ").split("\u2502")[1:]]
    assert numbers == pytest.approx([0.25, 0.25 / largest], rel=1e-5)
    assert run("diff", folder, other, "--tolerance", "0.3") == 0
    assert run("diff", folder, other, "--only", "model") == 0
    tensors[name].view(-1)[0] = float("nan")
    assert run("diff", other, save(tmp_path / "nan", tensors), "--tolerance", "1e9") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["inspect", "{tmp}/nothing"],
        ["verify", "{tmp}/nothing"],
        ["import", "{tmp}/nothing", "{tmp}/out"],
        ["export", "{step}", "{tmp}/out"],
        ["export", "{step}", "{tmp}/out", "--format", "diffusers", "--weights", "both"],
        ["export", "{step}", "{tmp}/o.ckpt", "--format", "release", "--max-shard-bytes", "9"],
        ["average", "{tmp}/out", "{step}", "--weights", "1", "--ema-width", "0.1"],
        ["diff", "{step}", "{step}", "--tolerance", "-1"],
    ],
)
def test_wrong_use_is_2(arguments: list[str], folder: Path, tmp_path: Path, capsys: Any) -> None:
    try:
        code: Any = run(*(a.format(tmp=tmp_path, step=folder) for a in arguments))
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("deco-ckpt: ") and "Traceback" not in error
    assert {p.name for p in tmp_path.iterdir()} == {"step"}


def test_a_damaged_checkpoint_is_not_copied(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit in the data, which a header cannot show: the checksum stops export and average."""
    path = folder / "__0_0.distcp"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    for arguments in (
        ["export", folder, tmp_path / "o", "--format", "safetensors"],
        ["average", tmp_path / "o", folder],
    ):
        assert run(*arguments) == 2
        assert "__0_0.distcp is damaged" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_dry_runs_write_nothing(folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": release_state()}, tmp_path / "w.ckpt")
    before = {p.name for p in tmp_path.iterdir()}
    assert run("export", folder, tmp_path / "out", "--format", "safetensors", "--dry-run") == 0
    assert run("import", tmp_path / "w.ckpt", tmp_path / "out", "--dry-run") == 0
    assert {p.name for p in tmp_path.iterdir()} == before
