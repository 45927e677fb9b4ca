"""GenEval and DPG-Bench: the layouts that their scorers read, their results, and hostile prompt files."""

import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deco_scale.errors import ConfigError
from deco_scale.evaluation import dpg, geneval
from deco_scale.evaluation.geneval import read_json_lines
from deco_scale.sampling.generate import SampleRequest
from deco_scale.sampling.prompts import MAX_PROMPT_BYTES, NamedPrompt, read_named_prompts
from tests.support.evaluations import (
    METADATA,
    OFFICIAL_DPG,
    generator,
    nothing,
    official_geneval,
)

# GenEval.


def test_geneval_layout_is_what_its_scorer_reads(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, METADATA)) + "\n\n")
    tasks = geneval.read_tasks(tmp_path / "m.jsonl")
    out = tmp_path / "out"
    geneval.write_metadata(tasks, out)
    work = geneval.missing_images(tasks, out, 4)
    assert len(work) == 8
    with pytest.raises(KeyboardInterrupt):
        geneval.generate_images(generator(fail_at=3), work, out, on_image=nothing)
    left = geneval.missing_images(tasks, out, 4)
    assert left == work[3:]
    geneval.generate_images(generator(), left, out, on_image=nothing)
    names = [f"{i:05d}.png" for i in range(4)]
    assert official_geneval(out) == {entry["prompt"]: names for entry in METADATA}
    assert sorted(p.name for p in out.iterdir()) == ["00000", "00001"]
    for task, i in work:
        _, wanted = next(generator()([SampleRequest(task.prompt, i, seed=i)]))
        found = np.asarray(Image.open(out / task.folder / "samples" / f"{i:05d}.png"))
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompt"),
        ('{"tag": "a"}', "object 1 has no prompt"),
        ('{"tag": "a", "prompt": 3}', "no prompt"),
        ('{"tag": "a", "prompt": "x"}\n[1]', "line 2"),
        ("{", "line 1"),
        ("[" * 100_000, "line 1"),
        (b"\xff", "m.jsonl"),
    ],
)
def test_bad_metadata_is_named(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        geneval.read_tasks(path)


def test_lines_end_where_json_lines_do(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "one\u2028two"}\n{"a": "b"}\n', encoding="utf-8")
    assert [entry["a"] for entry in read_json_lines(tmp_path / "x.jsonl")] == ["one\u2028two", "b"]


def test_geneval_summary_is_its_scorers(tmp_path: Path) -> None:
    """Two of four benches and one of two cows: tasks count alike, however many images they have."""
    results = [("single_object", METADATA[0], c) for c in (True, False, True, False)]
    results += [("counting", METADATA[1], c) for c in (False, False, True)]
    results.append(("counting", METADATA[1] | {"prompt": "other"}, False))
    lines = [
        json.dumps({"filename": "f", "tag": t, "prompt": m["prompt"], "correct": c, "metadata": json.dumps(m)})
        for t, m, c in results
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    found = geneval.summarise(tmp_path / "r.jsonl")
    assert found.tasks == {"single_object": (2, 4), "counting": (1, 4)}
    assert found.overall == pytest.approx((0.5 + 0.25) / 2)
    assert found.images == (3, 8) and found.prompts == (2, 3)
    (tmp_path / "r.jsonl").write_text('{"tag": "a", "correct": "yes", "metadata": "x"}')
    with pytest.raises(ConfigError, match="lacks"):
        geneval.summarise(tmp_path / "r.jsonl")


def test_overall_score_weights_every_task_equally_however_many_images_it_has(tmp_path: Path) -> None:
    """9 of 10 and 1 of 2 and 0 of 1: the mean of the shares is 7/15, the share of all images 10/13."""
    correct = {"single_object": [True] * 9 + [False], "counting": [True, False], "position": [False]}
    lines = [
        json.dumps({"tag": tag, "correct": value, "metadata": f"{tag} {index}"})
        for tag, values in correct.items()
        for index, value in enumerate(values)
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(lines))
    summary = geneval.summarise(path)
    assert summary.overall == pytest.approx((0.9 + 0.5 + 0.0) / 3)


# DPG-Bench.


def tar_bytes(members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, data: bytes = b"a cat\n", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data if info.isreg() else b""


def test_prompts_of_folder_and_tar(tmp_path: Path) -> None:
    texts = {"132": "a bridge at dawn\nsecond line", "midjourney17": " a fish ", "whoops-3": "caf\u00e9"}
    (tmp_path / "prompts").mkdir()
    members = [member("prompts/", b"", type=tarfile.DIRTYPE), member("prompts/._132.txt", b"\xff")]
    members.append(member("prompts/README.md"))
    for key, text in texts.items():
        (tmp_path / "prompts" / f"{key}.txt").write_text(text, encoding="utf-8")
        members.append(member(f"prompts/{key}.txt", text.encode()))
    wanted = [("132", "a bridge at dawn"), ("midjourney17", "a fish"), ("whoops-3", "caf\u00e9")]
    (tmp_path / "p.tar").write_bytes(tar_bytes(members))
    (tmp_path / "p.tar.gz").write_bytes(gzip.compress(tar_bytes(members)))
    for source in ("prompts", "p.tar", "p.tar.gz"):
        assert read_named_prompts(tmp_path / source) == wanted


def header(name: str, **fields: Any) -> bytes:
    """A tar header alone, whatever follows it."""
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "absolute": lambda: tar_bytes([member("/etc/1.txt")]),
    "climbing": lambda: tar_bytes([member("a/../../1.txt")]),
    "backslash": lambda: tar_bytes([member("..\\1.txt")]),
    "symlink": lambda: tar_bytes([member("1.txt", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")]),
    "hard link": lambda: tar_bytes([member("1.txt", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd")]),
    "device": lambda: tar_bytes([member("1.txt", b"", type=tarfile.CHRTYPE)]),
    "huge": lambda: tar_bytes([member("1.txt", bytes(MAX_PROMPT_BYTES + 1))]),
    "huge neighbour": lambda: tar_bytes([member("x.bin", bytes(MAX_PROMPT_BYTES + 1)), member("1.txt")]),
    "promises": lambda: header("1.txt", size=1 << 33),
    "promises little": lambda: header("1.txt", size=5000) + bytes(1024),
    "negative": lambda: header("1.txt", size=-512) + bytes(1024),
    "twice": lambda: tar_bytes([member("a/1.txt"), member("b/1.txt")]),
    "dot in id": lambda: tar_bytes([member("1.5.txt")]),
    "space in id": lambda: tar_bytes([member("a b.txt")]),
    "empty text": lambda: tar_bytes([member("1.txt", b" \n")]),
    "not text": lambda: tar_bytes([member("1.txt", b"\xff\xfe")]),
    "nothing": lambda: tar_bytes([]),
    "no tar": lambda: b"no tar at all" * 100,
    "empty": lambda: b"",
    "cut": lambda: tar_bytes([member("1.txt")])[:515],
    "cut gzip": lambda: gzip.compress(tar_bytes([member("1.txt")]))[:-20],
    "bomb": lambda: gzip.compress(header("d/", type=tarfile.DIRTYPE) + header("1.bin", size=1 << 20) * 140_000, 1),
    "bomb in a header": lambda: gzip.compress(header("x", type=tarfile.XHDTYPE, size=1 << 33) + bytes(1 << 27), 1),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tars_are_refused_and_leave_nothing(case: str, tmp_path: Path) -> None:
    path = tmp_path / "p.tar"
    path.write_bytes(HOSTILE[case]())
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        read_named_prompts(path)
    assert list(tmp_path.iterdir()) == [path]


def test_dpg_grids_are_what_its_scorer_cuts(tmp_path: Path) -> None:
    prompts = [NamedPrompt(f"p{i}", f"text {i}") for i in range(3)]
    folder = tmp_path / "out" / "pictures"
    with pytest.raises(KeyboardInterrupt):
        dpg.generate_images(generator((8, 8), fail_at=6), prompts, folder, on_image=nothing)
    left = dpg.missing_prompts(prompts, folder)
    assert left == prompts[1:] and [p.name for p in folder.iterdir()] == ["p0.png"]
    dpg.generate_images(generator((8, 8)), left, folder, on_image=nothing)
    assert sorted(p.name for p in folder.iterdir()) == ["p0.png", "p1.png", "p2.png"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["pictures"]
    corners = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    for prompt in prompts:
        grid = Image.open(folder / f"{prompt.id}.png")
        for i, corner in enumerate(corners):
            _, wanted = next(generator((8, 8))([SampleRequest(prompt.text, i, seed=i)]))
            assert np.array_equal(np.asarray(grid.crop(corner)), wanted)


def test_dpg_summary_is_its_scorers(tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_text(OFFICIAL_DPG)
    found = dpg.summarise(path)
    assert found.overall == 75.000125 and found.grids == 2
    assert found.broad == {"entity": 81.25, "attribute": 70.0}
    assert found.detailed == {"attribute - color": 70.0, "entity - part": 75.0, "entity - whole": 87.5}
    for text, message in (
        (OFFICIAL_DPG.split("DPG-Bench")[0], "did not finish"),
        (OFFICIAL_DPG.replace("75.000125", "high"), "high"),
        (OFFICIAL_DPG.replace("81.25", "nought"), "nought"),
        ("", "did not finish"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            dpg.summarise(path)
