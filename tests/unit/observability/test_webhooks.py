"""AlertSender and Prometheus: what is told arrives, nothing waits for it, and the webhook's URL stays a secret."""

import io
import json
import logging
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from deco_scale.errors import ConfigError, RunError
from deco_scale.observability import webhooks
from deco_scale.observability.config import MonitorConfig, WandbConfig
from deco_scale.observability.events import Event
from deco_scale.observability.prometheus import PrometheusExporter
from deco_scale.observability.redact import REMOVED, scrub
from deco_scale.observability.run_logger import RunLogger
from deco_scale.observability.webhooks import AlertSender, check_webhook, send_alert
from tests.support.ports import free_port

PATH = "/x/b8TqPlantedPath"
STEP = {
    "loss": 2.5, "loss_flow": 2.0, "grad_norm": 1.5, "lr": 1e-4, "images_per_s": 8.0, "mfu": None, "step_s": 0.5,
    "data_wait_s": 0.25, "memory_bytes": 2**30, "skipped": 1, "samples": 24, "time": 1e9,
    "rank_step_s": [0.5, 0.75], "data.retries": 7, "checkpoint_stall_s": 0.125,
}  # fmt: skip


class Hook(ThreadingHTTPServer):
    """Keeps what is posted; ``answer`` is its status, ``stall_s`` what it waits before that."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.got: list[tuple[str, Any]] = []
        self.answer, self.stall_s = 200, 0.0
        self.headers: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{PATH}"

    @property
    def texts(self) -> list[str]:
        return [body["text"] for _, body in self.got]


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.server.stall_s)
        self.server.got.append((self.path, json.loads(body)))
        self.send_response(self.server.answer)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Hook]:
    hook = Hook()
    threading.Thread(target=hook.serve_forever, args=(0.01,), daemon=True).start()
    yield hook
    hook.shutdown()
    hook.server_close()


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    with serving() as server:
        monkeypatch.setenv("THE_HOOK", server.url)
        yield server


def test_a_line_arrives_without_secrets(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "planted-in-the-environment")
    assert send_alert("THE_HOOK", f"it said\nplanted-in-the-environment at {hook.url}") is None
    assert send_alert(None, "nobody is told") is None
    ((path, body),) = hook.got
    assert path == PATH and body == {"text": f"it said {REMOVED} at {REMOVED}"}


@pytest.mark.parametrize(
    "url",
    ["", "http://198.51.100.7/planted", "http://localhost.example/planted", "ftp://127.0.0.1/planted", "planted",
     "https://me:planted@h/x", "https://[planted/", "https://h:planted/", "https:///planted",
     "https://h/pla nted", "file:///planted"],
)  # fmt: skip
def test_other_addresses_are_refused_and_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_HOOK", url)
    problem = send_alert("THE_HOOK", "x")
    assert problem is not None and "THE_HOOK" in problem and "planted" not in problem
    with pytest.raises(ConfigError, match="monitor.webhook_env: .*THE_HOOK") as caught:
        check_webhook(MonitorConfig(webhook_env="THE_HOOK"))
    assert "planted" not in str(caught.value)


def test_a_missing_variable_is_reported_before_the_run(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    check_webhook(MonitorConfig())
    check_webhook(MonitorConfig(webhook_env="THE_HOOK"))
    monkeypatch.delenv("THE_HOOK")
    with pytest.raises(ConfigError, match="THE_HOOK is not set"):
        check_webhook(MonitorConfig(webhook_env="THE_HOOK"))


@given(
    st.text(max_size=40).map(lambda text: text.replace("\0", "")),
    st.sampled_from(["", "http://127.0.0.1:1/", "https:"]),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_variable_holds_nothing_is_raised_or_shown(text: str, start: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THE_HOOK", f"{start}{text}")
        problem = send_alert("THE_HOOK", text, timeout_s=1)
    assert problem is not None
    assert len(text) < 8 or text not in problem


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(hook: Hook, status: int) -> None:
    with serving() as other:
        hook.answer, hook.headers = status, {"Location": other.url}
        assert send_alert("THE_HOOK", "x") == f"the server answered {status}"
        assert len(hook.got) == 1 and other.got == []


def test_a_query_arrives_and_a_proxy_does_not_get_what_is_for_this_machine(
    hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_HOOK", f"{hook.url}/%2F?key=a%20b&key=c")
    assert send_alert("THE_HOOK", "x") is None
    assert hook.got == [(f"{PATH}/%2F?key=a%20b&key=c", {"text": "x"})]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    problem = send_alert("THE_HOOK", "x")
    assert problem is not None and "add 127.0.0.1 to no_proxy" in problem and PATH not in problem
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert send_alert("THE_HOOK", "x") is None


def test_any_url_of_apprise_is_taken_and_not_repeated(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    logged = io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(logged)])
    monkeypatch.setenv("THE_HOOK", f"json://user:planted-word@127.0.0.1:{hook.server_port}{PATH}")
    check_webhook(MonitorConfig(webhook_env="THE_HOOK"))
    assert send_alert("THE_HOOK", "a line") is None
    ((path, body),) = hook.got
    assert path == PATH and body["message"] == "a line"
    hook.answer = 401
    assert send_alert("THE_HOOK", "a line") == "the server answered 401"
    for url in ("tgram://planted-token/1", "nosuchservice://planted-token/x"):
        monkeypatch.setenv("THE_HOOK", url)
        with pytest.raises(ConfigError, match="nor one of apprise") as caught:
            check_webhook(MonitorConfig(webhook_env="THE_HOOK"))
        assert "planted" not in str(caught.value)
    written = capfd.readouterr()
    assert "planted" not in written.out + written.err + logged.getvalue()


@pytest.mark.parametrize(
    ("url", "service"),
    [
        ("https://hooks.slack.com/services/T00000000/B00000000/" + "a1" * 12, "NotifySlack"),
        ("https://discord.com/api/webhooks/123456789012345678/" + "b2" * 34, "NotifyDiscord"),
        ("https://discord.com/api/webhooks/123456789012345678/" + "b2" * 34 + "/slack", "NotifyJSON"),
        ("https://mattermost.example/hooks/abc", "NotifyJSON"),
        ("tgram://123456789:abcdefg_hijklmnop/1234", "NotifyTelegram"),
    ],
)
def test_services_are_known_by_their_urls(url: str, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_HOOK", url)
    (target,) = webhooks._service("THE_HOOK")
    assert type(target).__name__ == service and target.redirects is False
    for token in ("a1" * 12, "b2" * 34, "abcdefg_hijklmnop"):
        assert token not in url or token not in scrub(f"error: {url} {url.partition('://')[2]} {url}/x")


def test_a_token_of_an_apprise_url_is_redacted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_HOOK", "tgram://123456789:abcdefg_hijklmnop/1234")
    check_webhook(MonitorConfig(webhook_env="THE_HOOK"))
    assert scrub("bot abcdefg_hijklmnop failed") == f"bot {REMOVED} failed"


def test_without_apprise_the_run_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_HOOK", "https://h/x")
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(ConfigError, match="pip install apprise"):
        check_webhook(MonitorConfig(webhook_env="THE_HOOK"))
    assert "pip install apprise" in str(send_alert("THE_HOOK", "x"))


def test_a_server_that_stalls_is_not_waited_for(hook: Hook) -> None:
    hook.stall_s = 3
    began = time.monotonic()
    assert send_alert("THE_HOOK", "x", timeout_s=0.3) is not None
    assert time.monotonic() - began < 1.5


def test_answers_in_drops_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("THE_HOOK", f"http://127.0.0.1:{server.getsockname()[1]}/x")

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                for _ in range(20):
                    connection.sendall(b"H")
                    time.sleep(0.1)

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        assert send_alert("THE_HOOK", "x", timeout_s=0.5) == "no answer within 0.5 s"
        assert time.monotonic() - began < 1.5


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without what apprise logs, which no handler but pytest's own sees."""
    return [record.getMessage() for record in caplog.records if record.name == webhooks.logger.name]


def straggler(rank: int) -> Event:
    return Event(1.0, "straggler", {"rank": rank, "host": f"node{rank}", "factor": 2.0})


def test_the_same_kind_is_logged_once_a_minute_and_the_rest_is_counted(
    hook: Hook, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(webhooks.time, "monotonic", lambda: now)
    alerts = AlertSender("THE_HOOK", run="the-run")
    for second in range(0, 125, 5):
        now = second
        alerts.event(straggler(second), 7)
    alerts.event(Event(1.0, "checkpoint", {"step": 3, "stall_s": 0, "total_s": 0}), 7)
    alerts.event(Event(1.0, "skip", {"step": 9}), 8)
    alerts.event(Event(1.0, "end", {"reason": "done", "exit_code": 0}), None)
    alerts.close()
    assert logged(caplog) == []
    here = socket.gethostname()
    assert hook.texts == [
        "the-run on node0, step 7: straggler, rank 0, factor 2.0",
        "the-run on node60, step 7: straggler, rank 60, factor 2.0 (11 more of this kind since the last alert)",
        "the-run on node120, step 7: straggler, rank 120, factor 2.0 (11 more of this kind since the last alert)",
        f"the-run on {here}, step 9: skip",
        f"the-run on {here}: end, reason done, exit_code 0",
    ]


def test_samples_dropped_at_the_end_are_reported(hook: Hook) -> None:
    alerts = AlertSender("THE_HOOK", run="the-run")
    for rank in range(3):
        alerts.event(straggler(rank), None)
    alerts.close()
    assert len(hook.texts) == 2 and hook.texts[-1].endswith("without an alert of their own: 2 straggler")


def test_training_does_not_wait_and_what_does_not_fit_is_counted(
    hook: Hook, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook.stall_s = 30
    for name, value in (("CAPACITY", 4), ("TIMEOUT_S", 0.2), ("MIN_INTERVAL_S", 0.0), ("CLOSE_S", 3.0)):
        monkeypatch.setattr(webhooks, name, value)
    alerts = AlertSender("THE_HOOK", run="r")
    began = time.monotonic()
    for _ in range(50):
        alerts.event(straggler(1), 1)
    assert time.monotonic() - began < 0.2
    alerts.close()
    assert time.monotonic() - began < 4
    # Fifty failures, one line of the reason.
    assert logged(caplog) == ["an alert was not sent: no answer within 0.2 s", "50 of 50 alerts were not sent"]


# --- Prometheus ---


def scraped(port: int) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_are_served_and_the_port_is_free_afterwards() -> None:
    port = free_port()
    for _ in range(2):
        served = PrometheusExporter(host="127.0.0.1", port=port, total_steps=100)
        try:
            before = scraped(port)
            assert before["deco_events_total", "skip"] == 0 and ("deco_last_checkpoint_step",) not in before
            served.log_metrics({"step": 3, **STEP})
            served.log_metrics({"step": 3, "eval.fid": 12.5})
            served.log_metrics({"goodput.step_s": 40.0, "goodput.effective": 0.5, "note": "text"})
            served.log_event(Event(1700.0, "checkpoint", {"step": 2, "stall_s": 0.1, "total_s": 1.0}))
            for _ in range(2):
                served.log_event(Event(1.0, "skip", {"step": 3}))
            found = scraped(port)
        finally:
            served.close()
        wanted = {
            ("deco_step",): 3, ("deco_samples",): 24, ("deco_skipped_steps",): 1, ("deco_loss", "total"): 2.5,
            ("deco_loss", "flow"): 2.0, ("deco_gradient_norm",): 1.5, ("deco_learning_rate",): 1e-4,
            ("deco_images_per_second",): 8, ("deco_step_duration_seconds",): 0.5,
            ("deco_data_wait_seconds",): 0.25, ("deco_memory_bytes",): 2**30,
            ("deco_rank_step_duration_seconds", "1"): 0.75, ("deco_data", "retries"): 7,
            ("deco_checkpoint_stall_seconds",): 0.125, ("deco_evaluation", "fid"): 12.5,
            ("deco_goodput_seconds", "step"): 40, ("deco_goodput_ratio",): 0.5, ("deco_events_total", "skip"): 2,
            ("deco_events_total", "checkpoint"): 1, ("deco_last_checkpoint_step",): 2,
            ("deco_last_checkpoint_timestamp_seconds",): 1700, ("deco_total_steps",): 100,
        }  # fmt: skip
        assert {name: found.get(name) for name in wanted} == wanted
        # What is not known has no value, rather than zero.
        assert ("deco_model_flops_utilization_ratio",) not in found
        with pytest.raises(OSError):
            scraped(port)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_an_address_that_cannot_be_used_has_a_name(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"no Prometheus metrics on {host}:{port}: "):
            PrometheusExporter(host=host, port=port, total_steps=1)


# --- The reporter ---


def a_reporter(folder: Path, monitor: MonitorConfig) -> RunLogger:
    return RunLogger(
        folder, active=True, total_steps=4, wandb=WandbConfig(mode="disabled"), config={}, monitor=monitor,
        console=Console(width=200),
    )  # fmt: skip


def test_a_run_tells_of_itself(hook: Hook, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    reporter = a_reporter(tmp_path, MonitorConfig(prometheus_port=port, webhook_env="THE_HOOK"))
    reporter.start(world_size=1, layout={}, hosts=["here"])
    reporter.event("first_step", step=1, seconds=1.0)
    reporter.metrics({"step": 2, **STEP})
    reporter.event("hang", rank=1, host="node1")
    found = scraped(port)
    assert found["deco_step",] == 2 and found["deco_events_total", "hang"] == 1
    reporter.event("end", reason=f"gave up on {hook.url}", exit_code=1)
    reporter.close()
    assert [text.partition(": ")[2] for text in hook.texts] == [
        "hang, rank 1", f"end, reason gave up on {REMOVED}, exit_code 1",
    ]  # fmt: skip
    assert hook.texts[0].startswith(f"{tmp_path.name} on node1, step 2")
    with pytest.raises(OSError):
        scraped(port)
    written = "".join(path.read_text() for path in tmp_path.iterdir() if path.suffix != ".png")
    told = capsys.readouterr()
    assert PATH not in written + told.out + told.err


@pytest.mark.parametrize("secret", ["world_size", "images_per_s"])
def test_a_secret_that_is_the_name_of_a_field_stops_no_run(
    secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_PASSWORD", secret)
    reporter = a_reporter(tmp_path, MonitorConfig())
    reporter.start(world_size=1, layout={}, hosts=[f"node-{secret}"])
    reporter.metrics({"step": 1, **STEP})
    reporter.close()
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert event["world_size"] == 1 and event["hosts"] == [f"node-{REMOVED}"]
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["images_per_s"] == STEP["images_per_s"]


def test_neither_a_taken_port_nor_a_dead_webhook_stops_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("THE_HOOK", f"http://127.0.0.1:{free_port()}{PATH}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monitor = MonitorConfig(prometheus_port=taken.getsockname()[1], webhook_env="THE_HOOK")
        reporter = a_reporter(tmp_path, monitor)
        reporter.start(world_size=1, layout={}, hosts=["here"])
        reporter.metrics({"step": 1, **STEP})
        reporter.event("end", reason="done", exit_code=0)
        reporter.close()
    said = (tmp_path / "log.txt").read_text()
    assert "WARNING: no Prometheus metrics on 127.0.0.1:" in said and "already in use" in said
    assert "an alert was not sent: the server was not reached: NewConnectionError" in said
    assert "1 of 1 alerts were not sent" in said and PATH not in said + capsys.readouterr().out
