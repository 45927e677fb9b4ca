"""``deco-ckpt``: reading and writing tensor by tensor, verify, inspect, diff, average; exit codes."""

import dataclasses
import json
import pickle
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
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

from checkpoints_tools import cli
from checkpoints_tools.averaging import fit_width, power_of
from checkpoints_tools.canonical import CanonicalReader, write_canonical
from checkpoints_tools.source import EMA, MODEL, TensorSpec
from deco_scale.errors import ConfigError, RunError
from deco_scale.models import ModelConfig
from deco_scale.training.checkpoint import CheckpointMeta, read_meta, read_tensors
from tests.unit.test_import_export import META, assert_same_bits, release_state, save, tensors_of

SMALL = ModelConfig(kind="c2i_baseline", dim=8, num_heads=2, num_blocks=1, patch_size=2, num_classes=3)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """With moments, as training writes them."""
    found = tensors_of(SMALL, encoder_dim=0)
    for kind in ("exp_avg", "exp_avg_sq"):
        found |= {n.replace("model.", f"{kind}.", 1): t * 0.1 for n, t in found.items() if n.startswith("model.")}
    return found


@pytest.fixture
def folder(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    return save(tmp_path / "step", tensors, files=2)


def run(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def complete(folder: Path, meta: CheckpointMeta = META) -> None:
    """``meta.json`` and ``COMPLETE`` for what lies in the folder."""
    (folder / "meta.json").write_text(json.dumps(dataclasses.asdict(meta), indent=1))
    files = [p for p in folder.iterdir() if p.name != "COMPLETE"]
    sums = {p.name: (p.stat().st_size, google_crc32c.value(p.read_bytes())) for p in files}
    (folder / "COMPLETE").write_text(json.dumps(sums, indent=1))


def test_trainings_reader_reads_what_the_tools_write(folder: Path, tensors: dict[str, Tensor]) -> None:
    assert_same_bits(read_tensors(folder, ""), tensors)
    assert not list(folder.parent.glob(".saving_*"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_tools_read_what_training_writes(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """The official writer's files; its transposed tensors keep their strides."""
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


def _flips(path: Path, random: np.random.Generator) -> Iterator[int]:
    """Some positions of a file; all kinds of bytes are met over the files of a checkpoint."""
    yield from sorted({int(i) for i in random.integers(path.stat().st_size, size=12)})


@pytest.mark.parametrize("kind", ["canonical", "release", "safetensors", "diffusers"])
def test_a_flipped_bit_is_found_by_file_name(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = folder
    if kind != "canonical":
        checked = tmp_path / ("out.ckpt" if kind == "release" else "out")
        assert run("export", folder, checked, "--format", kind) == 0
    assert run("verify", checked) == 0
    assert "every file is as its checksum says" in capsys.readouterr().out
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


def test_averages(tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = {n: t + 1 for n, t in tensors.items()}
    paths = [save(tmp_path / "a", tensors), save(tmp_path / "b", others)]
    assert run("average", tmp_path / "plain", *paths, "--dry-run") == 0
    assert not (tmp_path / "plain").exists()
    assert run("average", tmp_path / "plain", *paths) == 0
    assert run("average", tmp_path / "weighted", *paths, "--weights", "3,1") == 0
    for out, share in (("plain", 0.5), ("weighted", 0.25)):
        found = read_tensors(tmp_path / out, "")
        assert set(found) == {n for n in tensors if n.startswith((MODEL, EMA))}
        for name, tensor in found.items():
            wanted = ((1 - share) * tensors[name].double() + share * others[name].double()).float()
            assert torch.equal(tensor, wanted), name
        assert run("verify", tmp_path / out) == 0
    assert run("average", tmp_path / "no", *paths, "--weights", "1") == 2
    assert run("average", tmp_path / "no", *paths, "--weights", "1,-1") == 2
    assert run("average", tmp_path / "plain", *paths) == 2
    different = save(tmp_path / "c", tensors_of(dataclasses.replace(SMALL, num_classes=4), encoder_dim=0))
    capsys.readouterr()
    assert run("average", tmp_path / "no", paths[0], different) == 2
    assert "label_embed.table.weight" in capsys.readouterr().err


DECAY = 0.98


def _profile(step: int, at: int) -> float:
    return (1 - DECAY) * DECAY ** (at - step) if step <= at else 0.0


@pytest.mark.parametrize("sigma", [0.08, 0.12, 0.2])
def test_width_has_the_width_that_was_asked_for(sigma: float) -> None:
    """The discrete profile that the coefficients make, against the moments of the power function."""
    steps = list(range(50, 1001, 50))
    fit = fit_width(sigma, steps, DECAY)
    assert sum(fit.coefficients) == pytest.approx(1)
    t = np.arange(1, 1001)
    stored = np.array([[_profile(int(s), at) for s in t] for at in steps])
    profile = np.array(fit.coefficients) @ stored
    mean = float((profile * t).sum())
    power = power_of(sigma)
    width = float((profile * (t - mean) ** 2).sum()) ** 0.5 / 1000
    assert fit.error < 0.02
    assert mean / 1000 == pytest.approx((power + 1) / (power + 2), abs=0.002)
    assert width == pytest.approx(sigma, abs=0.002)
    assert fit.mean == pytest.approx(mean / 1000, abs=0.002) and fit.width == pytest.approx(width, abs=0.002)
    # Kept ten times as often, the profile comes nearer still.
    assert fit_width(sigma, list(range(5, 1001, 5)), DECAY).error < 0.05 * fit.error


def test_width_that_the_checkpoints_do_not_allow() -> None:
    """Narrower than the stored EMA, or too few checkpoints: the error says so."""
    assert fit_width(0.005, list(range(50, 1001, 50)), DECAY).error > 0.5
    assert fit_width(0.2, [500, 1000], DECAY).error > 0.3
    for sigma, steps, decay in ((0.0, [1], 0.9), (0.3, [1], 0.9), (0.1, [5, 5], 0.9), (0.1, [1, 2], 0.0)):
        with pytest.raises(ConfigError):
            fit_width(sigma, steps, decay)


def test_width_of_a_real_course(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights on a known course, their EMA kept every 50 steps: the average after the fact is the direct one."""
    names = [n for n in tensors_of(SMALL, encoder_dim=0) if n.startswith(EMA)]
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(tensors_of(SMALL)[n].shape, generator=generator).double() for n in names}
    averaged = {n: t.clone() for n, t in state.items()}
    power = power_of(0.12)
    target = {n: torch.zeros_like(t) for n, t in state.items()}
    meta = dataclasses.replace(META, config={"optimizer": {"ema_decay": DECAY}})
    paths = []
    for step in range(1, 1001):
        for name in names:
            state[name] += 0.05 * torch.randn(state[name].shape, generator=generator)
            averaged[name].lerp_(state[name], 1 - DECAY)
            share = (step / 1000) ** (power + 1) - ((step - 1) / 1000) ** (power + 1)
            target[name] += share * state[name]
        if step % 50 == 0:
            weights = {n.replace("ema.", "model.", 1): t.float() for n, t in state.items()}
            kept = {n: t.float() for n, t in averaged.items()} | weights
            at = dataclasses.replace(meta, step=step, optimizer_steps=step)
            paths.append(save(tmp_path / f"step_{step:08d}", kept, meta=at))
    assert run("average", tmp_path / "out", *paths, "--ema-width", "0.12") == 0
    found = read_tensors(tmp_path / "out", "")
    assert all(torch.equal(found[n], t) for n, t in weights.items())

    def distance(others: dict[str, Tensor]) -> float:
        return sum(float((others[n].double() - target[n]).square().sum()) for n in names) ** 0.5

    # Far nearer to the wanted average than the EMA that the last checkpoint holds.
    assert distance(found) < 0.1 * distance(averaged)
    assert run("average", tmp_path / "no", *paths[-2:], "--ema-width", "0.12") == 2
    assert "give more of them" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


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
    except SystemExit as error:
        code = error.code
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
