"""Line files: appending through a full disk, and following one that grows."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deco_scale.observability.jsonl import MAX_PENDING_BYTES, JsonlTailer, JsonlWriter


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_objects_come_once_each_in_order_wherever_the_writes_are_cut(cuts: list[int], junk: int) -> None:
    whole = "".join(f'{{"step": {i}, "text": "{chr(228) * i}"}}\n' for i in range(8)) + "[1\n" * junk
    data, at, found = whole.encode(), 0, []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        follower = JsonlTailer(path)
        assert follower.read() == []
        for cut in [*cuts, len(data)]:
            with path.open("ab") as file:
                file.write(data[at : at + cut])
            at += cut
            found += follower.read()
    assert [entry["step"] for entry in found] == list(range(8))
    assert follower.bad == junk and follower.items == found


def test_only_new_bytes_are_read_and_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    follower = JsonlTailer(path)
    assert len(follower.read()) == 1
    # What was read is not looked at again: an overwritten byte of it goes unseen.
    with path.open("r+b") as file:
        file.write(b"#")
        file.seek(0, 2)
        file.write(b'{"step": 2}\n{"st')
    assert follower.read() == [{"step": 2}] and follower.bad == 0
    other = tmp_path / "other"
    other.write_text('{"step": 7}\n{"step": 8}\n{"step": 9}\n{"step": 10}\n')
    other.replace(path)
    assert [entry["step"] for entry in follower.read()] == [7, 8, 9, 10] and len(follower.items) == 4
    path.write_text('{"step": 1}\n')
    assert follower.read() == [{"step": 1}] == follower.items


def test_a_full_disk_stops_no_training_and_loses_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """/dev/full takes nothing; when there is room, all lines arrive in order."""
    path = tmp_path / "log.txt"
    lines = JsonlWriter(path)
    full, usable = os.open("/dev/full", os.O_WRONLY), os.dup(lines._file)
    lines.write("one\n")
    os.dup2(full, lines._file)
    for word in ("two", "three"):
        lines.write(f"{word}\n")
    assert len(caplog.messages) == 1 and "No space left" in caplog.messages[0] and path.read_text() == "one\n"
    os.dup2(usable, lines._file)
    lines.write("four\n")
    assert path.read_text() == "one\ntwo\nthree\nfour\n"
    os.dup2(full, lines._file)
    for number in range(6000):
        lines.write(f"{number:01000}\n")
    os.dup2(usable, lines._file)
    lines.close()
    rest = path.read_text().splitlines()[4:]
    kept = [int(line) for line in rest if line]
    # Whole lines, the newest, without a gap.
    assert (
        kept == list(range(kept[0], 6000))
        and MAX_PENDING_BYTES // 2 <= 1001 * len(kept) + 1001 <= MAX_PENDING_BYTES + 1001
    )
    os.dup2(full, usable)
    assert len(caplog.messages) == 2
    other = JsonlWriter(tmp_path / "other.txt")
    os.dup2(full, other._file)
    other.write("lost\n")
    other.close()
    assert "5 bytes are lost" in caplog.messages[-1]
    os.close(full)
    os.close(usable)
