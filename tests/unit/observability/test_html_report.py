"""``deco report``: one file that loads nothing, says what the run's files say, and keeps secrets."""

import base64
import hashlib
import html
import io
import json
import random
import re
import string
import struct
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from wandb.proto import wandb_internal_pb2

from deco_scale.observability.config import WandbConfig
from deco_scale.observability.curves import curves_svg
from deco_scale.observability.events import Event, append_event, is_number
from deco_scale.observability.goodput import compute_goodput
from deco_scale.observability.html_report import MAX_IMAGES, MAX_SIDE, gpu_hours, render_report
from deco_scale.observability.redact import REMOVED
from deco_scale.observability.run_dir import RunDir
from deco_scale.observability.run_logger import RunLogger
from deco_scale.observability.summary import summary_rows
from deco_scale.observability.wandb import run_id
from deco_scale.yaml import dump_yaml
from tests.support.commands import deco

BEGAN = 1_700_000_000.0
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
_random = random.Random(5)
_LETTERS = string.ascii_letters + string.digits


def _letters(count: int) -> str:
    return "aB3" + "".join(_random.choice(_LETTERS) for _ in range(count - 3))


SECRETS = {
    "aws_id": "AKIA" + "Q7RZ" * 4,
    "aws_key": _letters(40),
    "hub": "hf_" + _letters(34),
    "wandb": "".join(_random.choice("0123456789abcdef") for _ in range(40)),
    "jwt": f"eyJ{_letters(20)}.{_letters(30)}.{_letters(20)}",
    "signature": _letters(64),
    "password": "correct-horse-battery",
    "hook": _letters(24),
    "environment": "plain-but-known-value",
}


class Elements(HTMLParser):
    """All elements with their attributes, and the text of the style sheets."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.styles = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data


def write_run(folder: Path, *, images: int = 3) -> None:
    signed = f"https://bucket.example/shard.tar?X-Amz-Signature={SECRETS['signature']}&X-Amz-Credential=abc"
    config = {
        "run": {"dir": str(folder), "note": MARKUP},
        "data": {"url": f"s3://user:{SECRETS['password']}@bucket/prefix", "other": signed},
        "alerts": {"webhook": f"https://hooks.example/services/T0/B0/{SECRETS['hook']}"},
        "keys": {"api_key": SECRETS["hub"], "list": [f"id {SECRETS['aws_id']}", SECRETS["aws_key"]]},
        "model": {"text_tokens": 16, "dim": 192},
        "stages": [{"name": MARKUP, "steps": 40}, {"name": "second", "steps": 10}],
    }
    (folder / "config.yaml").write_text(dump_yaml(config))
    fields = {"world_size": 8, "layout": {"tp": 2, MARKUP: 1}, "hosts": [f"node{MARKUP}"], "attempt": 1}
    failed = {"step": 20, "stall_s": 1, "total_s": 2, "reason": f"PUT {signed} said {SECRETS['jwt']} {MARKUP}"}
    said = f"env {SECRETS['environment']} Authorization: Bearer {SECRETS['hub']} wandb {SECRETS['wandb']}"
    for event in (
        Event(BEGAN, "start", fields),
        Event(BEGAN + 10, "first_step", {"step": 1, "seconds": 4}),
        Event(BEGAN + 30, "checkpoint_failed", failed),
        Event(BEGAN + 31, "end", {"reason": said, "exit_code": 1}),
        Event(BEGAN + 40, "start", {**fields, "attempt": 2, "world_size": 4}),
        Event(BEGAN + 50, "first_step", {"step": 1, "seconds": 4}),
        Event(BEGAN + 76, "end", {"reason": "done", "exit_code": 0}),
    ):
        append_event(folder, event)
    with (folder / "metrics.jsonl").open("w") as file:
        for began in (10, 50):
            for step in range(2, 21):
                values = {"loss": 1 / step, "grad_norm": 1.0, "images_per_s": 10.0, "lr": 1e-4, "step_s": 1.0}
                line = {"time": BEGAN + began + step, "step": step, "stage": MARKUP, "data_wait_s": 0.1, **values}
                file.write(json.dumps(line) + "\n")
    (folder / "samples").mkdir()
    for i in range(images):
        pixels = np.full((600, 1000, 3), i, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "samples" / f"step_{i + 1:08d}.png")
    (folder / "samples" / "step_00000999.png").write_bytes(b"no image")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_API_KEY", SECRETS["environment"])
        write_run(folder, images=20)
        assert deco(["report", str(folder), "--usd-per-gpu-hour", "3"]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def test_no_secret_is_in_the_page(report: str) -> None:
    for name, secret in SECRETS.items():
        assert secret not in report, name
    assert REMOVED in report
    # What only sounds like a secret stays.
    assert "text_tokens: 16" in report


def test_nothing_is_loaded_from_outside_and_no_script_runs(report: str) -> None:
    made = Elements()
    made.feed(report)
    made.close()
    # Every element was closed, so no markup of the run's files has become part of the page.
    assert made.open == []
    tags = {tag for tag, _ in made.found}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "a", "base", "video", "audio", "use"}
    for tag, attributes in made.found:
        assert not any(name.startswith("on") or name in ("style", "srcset", "href") for name in attributes), tag
        if "src" in attributes:
            assert tag == "img" and attributes["src"].startswith(
                ("data:image/jpeg;base64,", "data:image/svg+xml;base64,")
            )
    assert "url(" not in made.styles and "@import" not in made.styles
    policies = [a["content"] for t, a in made.found if t == "meta" and a.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(made.styles.encode()).digest()).decode()
    style = f"style-src 'sha256-{digest}'"
    assert policies == [f"default-src 'none'; img-src data:; {style}; base-uri 'none'; form-action 'none'"]
    assert MARKUP not in report and html.escape("<script>alert(1)</script>") in report


def test_sample_images_are_few_small_and_spread_over_time(report: str) -> None:
    found = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", report)
    steps = [int(step) for step in re.findall(r"<figcaption>step (\d+)", report)]
    assert len(steps) == MAX_IMAGES and steps == sorted(steps) and steps[0] == 1 and steps[-1] == 999
    # One is no image, and is said to be none.
    assert len(found) == MAX_IMAGES - 1 and "cannot be read" in report
    for data in found:
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert max(image.size) <= MAX_SIDE


def svg_of(report: str) -> str:
    (data,) = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", report)
    return base64.b64decode(data).decode()


def test_curves_are_drawn_and_hold_no_secret(report: str) -> None:
    drawn = svg_of(report)
    for title in (
        "loss, logarithmic",
        "gradient norm",
        "images/s",
        "learning rate by stage",
        "nothing was logged",
    ):
        assert title in drawn
    assert not any(secret in drawn for secret in SECRETS.values())
    assert MARKUP not in drawn and "<script" not in drawn


def test_goodput_costs_and_attempts_are_reported(report: str) -> None:
    assert "Effective training time: " in report and "2 attempts" in report
    # 8 ranks for 30 s and 4 for 30 s; with 10 s of 8 ranks and 6 s of 4 down, at 3 a GPU-hour.
    assert "0.100 GPU-hours" in report and "0.30 USD" in report
    assert "0.129 GPU-hours" in report


def test_an_empty_folder_gives_a_page_and_wrong_use_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "page.html"
    assert deco(["report", str(tmp_path), "--out", str(out)]) == 0
    made = Elements()
    made.feed(out.read_text())
    assert made.open == [] and "has not started" in out.read_text()
    assert deco(["report", str(tmp_path / "none")]) == 2
    assert deco(["report", str(tmp_path), "--usd-per-gpu-hour", "nan"]) == 2
    assert deco(["report", str(tmp_path), "--out", str(out.parent)]) == 1
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert "no such folder" in capsys.readouterr().err


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_NAMES = ["step", "time", "stage", "loss", "grad_norm", "lr", "images_per_s", "mfu", "step_s", "data_wait_s"]
_LINES = st.fixed_dictionaries(
    {}, optional={n: _VALUES for n in [*_NAMES, "rank_step_s", "memory_bytes", "skipped"]}
)


@pytest.mark.slow
@given(st.lists(_LINES, max_size=6), st.lists(_VALUES, max_size=3), st.lists(_VALUES, max_size=3), _VALUES)
@settings(max_examples=25, deadline=None)
def test_a_page_is_made_of_whatever_stands_in_the_files(
    lines: list[object], hosts: list[object], stages: list[object], layout: object
) -> None:
    run = RunDir(Path("nowhere"))
    run.metrics = [line for line in lines if isinstance(line, dict) and is_number(line.get("step"))]
    fields = {"world_size": 2, "layout": {"x": layout}, "hosts": hosts, "attempt": 1}
    run.events = [Event(BEGAN, "start", fields), Event(BEGAN + 1, "first_step", {"step": 1, "seconds": 1})]
    run.config = {"stages": [{"name": 1, "steps": 5}, *stages], "x": layout}
    made = Elements()
    made.feed(render_report(run, now=BEGAN + 10, usd_per_gpu_hour=None))
    assert made.open == []
    assert summary_rows(run, now=BEGAN + 10)


def test_hours_follow_the_ranks_of_each_attempt() -> None:
    def start(time: float, world: int) -> Event:
        return Event(BEGAN + time, "start", {"world_size": world, "layout": {}, "hosts": [], "attempt": 1})

    found = compute_goodput([start(0, 8), start(3600, 4)], [], now=BEGAN + 3600 + 600)
    assert found is not None
    # The first attempt gave no sign of life, the second may still live.
    assert [hours for _, hours in gpu_hours(found)] == pytest.approx([4 / 6, 8 + 4 / 6])


def _records(path: Path) -> Iterator[Any]:
    """What a wandb file says: LevelDB's log format, whose pieces are put together, after 7 bytes of its own."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(whole)
            yield record
            whole = b""
        at += -at % 32768 if -at % 32768 < 7 else 0


@pytest.mark.slow
def test_both_attempts_are_one_run_in_wandb(tmp_path: Path) -> None:
    config = {"data": {"url": f"s3://user:{SECRETS['password']}@bucket/x"}, "model": {"dim": 192}}
    base = {"loss_flow": 1.0, "grad_norm": 1.0, "lr": 1e-4, "images_per_s": 1.0, "data_wait_s": 0.0, "step_s": 1.0}
    for steps in ((1, 2, 3), (2, 3, 4)):
        reporter = RunLogger(
            tmp_path, active=True, total_steps=4, wandb=WandbConfig(mode="offline"), config=config
        )
        for step in steps:
            reporter.metrics({"step": step, "loss": 1.0 / step, **base})
        reporter.evaluation(steps[-1], {"fid": 5.0})
        reporter.close()
        time.sleep(1.1)  # wandb names folders by the second
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    found = [list(_records(path)) for path in files]
    assert [{r.run.run_id for r in each if r.HasField("run")} for each in found] == [
        {(tmp_path / "wandb_id").read_text().strip()}
    ] * 2
    for each, steps in zip(found, ((1, 2, 3), (2, 3, 4)), strict=True):
        history = [{i.key or ".".join(i.nested_key): i.value_json for i in r.history.item}
                   for r in each if r.HasField("history")]  # fmt: skip
        # Steps that are done again are logged again, as values of their own.
        assert [int(h["step"]) for h in history] == [*steps, steps[-1]]
        assert history[-1]["eval.fid"] == "5.0" or json.loads(history[-1]["eval.fid"]) == 5
        metrics = [r.metric for r in each if r.HasField("metric")]
        assert any(m.step_metric == "step" for m in metrics)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and SECRETS["password"].encode() in p.read_bytes()]
    said = (tmp_path / "log.txt").read_text()
    assert "WARNING" not in said, said


def test_wandb_that_cannot_start_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["wandb"])
    monkeypatch.setenv("WANDB_BASE_URL", f"no-url-{SECRETS['environment']}")
    reporter = RunLogger(tmp_path, active=True, total_steps=4, wandb=WandbConfig(mode="online"), config={})
    base = {"loss_flow": 1.0, "grad_norm": 1.0, "lr": 1e-4, "images_per_s": 1.0, "data_wait_s": 0.0, "step_s": 1.0}
    reporter.metrics({"step": 1, "loss": 1.0, **base})
    reporter.close()
    said = (tmp_path / "log.txt").read_text()
    assert said.count("WARNING: no wandb from here on") == 1 and "step 1/4" in said
    assert SECRETS["wandb"] not in said


def test_a_broken_wandb_id_is_made_anew(tmp_path: Path) -> None:
    made = run_id(tmp_path)
    assert run_id(tmp_path) == made
    for broken in (b"", b"\xff\xfe", b"../../x"):
        (tmp_path / "wandb_id").write_bytes(broken)
        assert run_id(tmp_path) == run_id(tmp_path) != made
    assert [path.name for path in tmp_path.iterdir()] == ["wandb_id"]


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.floats(allow_nan=True, allow_infinity=True)), max_size=20),
    st.text(max_size=20) | st.sampled_from([MARKUP, "$x_{", "_hidden", "\\$"]),
)
@settings(max_examples=10, deadline=None)
def test_curves_are_well_formed_whatever_is_logged(points: list[tuple[int, float]], stage: str) -> None:
    steps = [
        {"step": step, "stage": name, "loss": value, "lr": value, "mfu": value}
        for step, value in sorted(points)
        for name in (stage, "other")
    ]
    drawn = curves_svg(steps, fault_steps=[1.0], stage_ends=[2.0])
    ElementTree.fromstring(drawn)
    assert MARKUP not in drawn.decode()


@pytest.mark.slow
def test_a_single_spike_among_many_steps_is_drawn() -> None:
    def height(spike: float) -> int:
        steps = [{"step": i, "loss": spike if i == 54_321 else 1.0} for i in range(100_000)]
        return len(curves_svg(steps, fault_steps=[], stage_ends=[]))

    # Few points are drawn of very many, and the spike is one of them.
    assert height(1.0) < height(1e3) < 200_000
