"""Damaged and hostile checkpoints: an error each, never a crash, executed code or unbounded memory.

Mutated files are read in a process of their own, whose peak memory is measured. 2,000 with ``-m long``.
"""

import dataclasses
import io
import json
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from checkpoints_tools import cli
from checkpoints_tools.formats.canonical import CanonicalReader
from checkpoints_tools.formats.tensor_files import CHECKSUMS, SETTINGS_CRC, as_json
from checkpoints_tools.formats.torch_zip import Archive
from checkpoints_tools.registry import open_checkpoint
from checkpoints_tools.verify import problems_of
from deco_scale.checkpoint.dcp_metadata import read_index
from deco_scale.checkpoint.format import stored_shapes
from deco_scale.errors import ConfigError
from tests.support.checkpoints import META, SMALL, save, tensors_of

COUNTS = [pytest.param(60, id="some"), pytest.param(2000, id="2000", marks=pytest.mark.long)]
MEMORY_BYTES = 128 * 2**20
"""Growth of the peak over all mutations. The checkpoints are below 0.2 MiB; the rest is Python and torch."""
SECONDS = 20.0
NUMBERS = (0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**64 - 1)


def mutated(whole: bytes, random: np.random.Generator) -> bytes:
    """Bits flipped, numbers set, pieces cut out, repeated or moved, ends cut off."""
    raw = bytearray(whole)
    for _ in range(int(random.integers(1, 5))):
        if not raw:
            break
        kind, at = int(random.integers(7)), int(random.integers(len(raw)))
        if random.integers(2):
            # Headers and tables lie at the ends.
            at = min(at, int(random.integers(2000))) if random.integers(2) else max(at, len(raw) - 1200)
        at %= len(raw)
        if kind == 0:
            raw[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            raw[at] = int(random.integers(256))
        elif kind == 2:
            number = NUMBERS[int(random.integers(len(NUMBERS)))]
            raw[at : at + 8] = struct.pack("<Q", number)
        elif kind == 3:
            del raw[at : at + int(random.integers(1, 3000))]
        elif kind == 4:
            raw[at:at] = raw[at : at + int(random.integers(1, 3000))]
        elif kind == 5:
            # A digit of a shape or an offset in a JSON header.
            digits = [i for i in range(at, min(at + 400, len(raw))) if chr(raw[i]).isdigit()]
            if digits:
                raw[digits[0] : digits[0] + 1] = b"9" * int(random.integers(1, 16))
        else:
            del raw[at:]
    return bytes(raw)


def trust(folder: Path) -> None:
    """Checksums that fit the files, as an attacker would write them."""
    if (folder / ".metadata").exists():
        files = [p for p in folder.iterdir() if p.name != "COMPLETE"]
        sums = {p.name: (p.stat().st_size, google_crc32c.value(p.read_bytes())) for p in files}
        (folder / "COMPLETE").write_text(json.dumps(sums, indent=1))


def read_all(path: Path) -> None:
    source = open_checkpoint(path)
    for name in source.specs:
        source.read(name)


def _fuzz(root: str, kind: str, count: int, results: Any) -> None:
    """Mutate and read; sends what happened and by how much the peak memory grew."""
    folder, outcomes = Path(root), Counter[str]()
    path, target = _whole(folder, kind), None
    files = sorted(p for p in (path.rglob("*") if path.is_dir() else folder.glob("w.*")) if p.is_file())
    wholes = {p: p.read_bytes() for p in files}
    random = np.random.default_rng(len(kind))
    assert not list(problems_of(path))
    read_all(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        target = files[number % len(files)]
        raw = mutated(wholes[target], random)
        target.write_bytes(raw)
        began = time.perf_counter()
        found = list(problems_of(path))
        assert bool(found) == (raw != wholes[target]), (number, target, found)
        assert all(folder.name in problem for problem in found)
        trust(path)
        try:
            read_all(path)
            outcomes["read"] += 1
        except ConfigError as error:
            assert folder.name in str(error), error
            outcomes["refused"] += 1
        assert time.perf_counter() - began < SECONDS
        for file, content in wholes.items():
            file.write_bytes(content)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    results.put((dict(outcomes), grown))


def _whole(folder: Path, kind: str) -> Path:
    canonical = save(folder / "step", tensors_of(SMALL, encoder_dim=0), files=2)
    if kind == "canonical":
        return canonical
    if kind == "release":
        target = folder / "w.ckpt"
        assert cli.main(["export", str(canonical), str(target), "--format", "release"]) == 0
        return target
    target = folder / "w"
    arguments = ["export", str(canonical), str(target), "--format", "safetensors", "--weights", "both"]
    assert cli.main([*arguments, "--max-shard-bytes", "4000"]) == 0
    return target


@pytest.mark.parametrize("kind", ["canonical", "release", "safetensors"])
@pytest.mark.parametrize("count", COUNTS)
def test_damaged_checkpoints(kind: str, count: int, tmp_path: Path) -> None:
    context = get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_fuzz, args=(str(tmp_path), kind, count, results))
    process.start()
    process.join(120 + count)
    assert process.exitcode == 0, "the reader died"
    outcomes, grown = results.get(timeout=10)
    print(outcomes, f"{grown / 2**20:.1f} MiB")
    assert outcomes["refused"] > count / 4
    assert grown < MEMORY_BYTES


class _Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def _global(module: str, name: str) -> bytes:
    """A function by module and (dotted) name, as protocol 4 writes it."""
    parts = (b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"".join(parts) + b"\x93"


def _text(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def _index_attacks(canary: Path, victim: Path) -> dict[str, bytes]:
    filesystem = "torch.distributed.checkpoint.filesystem"
    return {
        "a function": pickle.dumps(_Calls(os.mknod, str(canary))),
        "a method of a class of DCP's": b"\x80\x04"
        + _global(filesystem, "FileSystem.rm_file")
        + b"N"
        + _text(str(victim))
        + b"\x86R.",
        "builtins by way of a method": b"\x80\x04"
        + _global(filesystem, "FileSystem.mkdir.__builtins__.get")
        + _text("eval")
        + b"\x85R"
        + _text(f"open({str(canary)!r}, 'w')")
        + b"\x85R.",
        "a class that a module of DCP's imports": b"\x80\x04"
        + _global(filesystem, "Path.unlink")
        + _global("pathlib", "PosixPath")
        + _text(str(victim))
        + b"\x85R\x85R.",
        "a memo that reserves 32 GiB": b"\x80\x04Nr" + struct.pack("<I", 2**32 - 2) + b".",
        "bytes that reserve 1 TiB": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        "another object": pickle.dumps({"state_dict_metadata": {}}),
        "nothing": b"",
    }


@pytest.mark.parametrize("name", list(_index_attacks(Path("c"), Path("v"))))
def test_a_hostile_index_runs_nothing(name: str, tmp_path: Path) -> None:
    canary, victim = tmp_path / "ran", tmp_path / "victim"
    victim.write_text("still here")
    folder = save(tmp_path / "step", tensors_of(SMALL, encoder_dim=0))
    (folder / ".metadata").write_bytes(_index_attacks(canary, victim)[name])
    trust(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"\.metadata is damaged or not a checkpoint's"):
        CanonicalReader(folder)
    with pytest.raises(ConfigError, match=r"\.metadata is damaged or not a checkpoint's"):
        stored_shapes(folder)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY_BYTES
    assert not canary.exists() and victim.exists()


def test_a_hostile_piece_runs_nothing(tmp_path: Path) -> None:
    """The tensors of a canonical folder are archives with pickles of their own."""
    canary = tmp_path / "ran"
    folder = save(tmp_path / "step", tensors_of(SMALL, encoder_dim=0))
    name, entry = next(iter(read_index(folder / ".metadata").items()))
    piece = entry.pieces[0]
    evil = io.BytesIO()
    torch.save(_Calls(os.mknod, str(canary)), evil)
    whole = (folder / piece.file).read_bytes()
    padded = evil.getvalue()
    assert len(padded) <= piece.length
    padded = b"\0" * (piece.length - len(padded)) + padded
    # The archive's table is found from its end; what is before it is not looked at.
    (folder / piece.file).write_bytes(whole[: piece.start] + padded + whole[piece.start + piece.length :])
    trust(folder)
    with pytest.raises(ConfigError, match=r"__0_0.distcp"):
        CanonicalReader(folder).read(name)
    assert not canary.exists()


def _peak_growth(path: Path, message: str) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=message):
        read_all(path)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_claims_of_huge_tensors_are_refused_before_allocation(tmp_path: Path) -> None:
    """A view without strides, a storage that is not there, a header beyond the file, a compressed record."""
    view = torch.zeros(1).expand(2**34, 4)
    torch.save({"state_dict": {"denoiser.x": view}}, tmp_path / "view.ckpt")
    assert _peak_growth(tmp_path / "view.ckpt", "denoiser.x of shape .* needs") < MEMORY_BYTES

    torch.save({"state_dict": {"denoiser.x": torch.zeros(7)}}, tmp_path / "plain.ckpt")
    raw = (tmp_path / "plain.ckpt").read_bytes()
    # BININT1 7 is both the number of elements of the storage and the size of the tensor.
    assert raw.count(b"K\x07") >= 2
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        content = {i.filename: archive.read(i) for i in archive.infolist()}
    for compression, message in ((zipfile.ZIP_STORED, "denoiser.x"), (zipfile.ZIP_DEFLATED, "is compressed")):
        with zipfile.ZipFile(tmp_path / "claims.ckpt", "w", compression) as archive:
            for name, data in content.items():
                if name.endswith("data.pkl"):
                    data = data.replace(b"K\x07", b"\x8a\x06" + (2**40).to_bytes(6, "little"))
                archive.writestr(name, data)
        assert _peak_growth(tmp_path / "claims.ckpt", message) < MEMORY_BYTES

    save_file({"denoiser.x": torch.zeros(7)}, tmp_path / "w.safetensors")
    raw = (tmp_path / "w.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + size].replace(b"[7]", b"[1099511627776]").replace(b"[0,28]", b"[0,4398046511104]")
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + size :])
    assert _peak_growth(tmp_path / "w.safetensors", "w.safetensors is damaged") < MEMORY_BYTES
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{")
    assert _peak_growth(tmp_path / "w.safetensors", "w.safetensors is damaged") < MEMORY_BYTES


def test_a_canonical_index_cannot_claim_more_than_its_files_hold(tmp_path: Path) -> None:
    folder = save(tmp_path / "step", tensors_of(SMALL, encoder_dim=0))
    raw = (folder / ".metadata").read_bytes()
    # Every size of 8 becomes 2^40, in shapes and pieces alike.
    huge = raw.replace(b"K\x08", b"\x8a\x06" + (2**40).to_bytes(6, "little"))
    position = huge.index(b"\x95") + 1
    frame = struct.unpack("<Q", raw[raw.index(b"\x95") + 1 :][:8])[0]
    huge = huge[:position] + struct.pack("<Q", frame + len(huge) - len(raw)) + huge[position + 8 :]
    (folder / ".metadata").write_bytes(huge)
    trust(folder)
    assert _peak_growth(folder, "claims a piece of") < MEMORY_BYTES


def test_names_in_lists_do_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = save(tmp_path / "step", tensors_of(SMALL, encoder_dim=0))
    sums = json.loads((folder / "COMPLETE").read_text())
    (folder / "COMPLETE").write_text(json.dumps({**sums, "../secret": [1, 0]}, indent=1))
    assert any("../secret" in p and "COMPLETE is damaged" in p for p in problems_of(folder))
    out = tmp_path / "out"
    assert cli.main(["export", str(tmp_path / "nothing"), str(out), "--format", "safetensors"]) == 2
    folder = save(tmp_path / "good", tensors_of(SMALL, encoder_dim=0), meta=dataclasses.replace(META, step=1))
    arguments = ["export", str(folder), str(out), "--format", "safetensors", "--max-shard-bytes", "4000"]
    assert cli.main(arguments) == 0
    index = out / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"][next(iter(table["weight_map"]))] = "../secret"
    index.write_bytes(as_json(table))
    (out / CHECKSUMS).unlink()
    with pytest.raises(ConfigError, match="no file beside it"):
        open_checkpoint(out)


def test_the_settings_beside_a_release_file_are_summed(tmp_path: Path) -> None:
    folder = save(tmp_path / "step", tensors_of(SMALL, encoder_dim=0))
    assert cli.main(["export", str(folder), str(tmp_path / "w.ckpt"), "--format", "release"]) == 0
    beside = tmp_path / "w.ckpt.json"
    said = json.loads(beside.read_text())
    assert SETTINGS_CRC in said
    said["model"]["num_heads"] = 1
    beside.write_bytes(as_json(said))
    assert list(problems_of(tmp_path / "w.ckpt")) == [
        f"{beside} is damaged: its settings differ from their checksum"
    ]


def test_archives_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    for raw in (b"", b"PK\x03\x04", b"PK\x03\x04" + bytes(sys.maxsize % 977), b"PK\x05\x06" + bytes(18)):
        path.write_bytes(raw)
        with pytest.raises(ConfigError, match="x.ckpt"):
            Archive(path)
        with pytest.raises(ConfigError, match="x.ckpt"):
            open_checkpoint(path)
