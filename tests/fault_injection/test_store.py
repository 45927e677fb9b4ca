"""S3 reads and writes stay exact through what servers and networks do; what was refused fails at once."""

import pickle
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import StoreError
from data_pipeline.storage.base import Access, Store, open_store
from data_pipeline.storage.dev_server import S3Server, running_server
from data_pipeline.storage.retry import FLOOR_BYTES_PER_S, Backoff, RetryBudget
from data_pipeline.storage.s3 import PART_BYTES
from tests.support.proxy import FaultProxy

DATA = np.random.default_rng(0).bytes(4_000_000)
RANGES = [(int(o), 200_000) for o in np.random.default_rng(1).integers(0, len(DATA) - 200_000, 60)]
QUICK = Access(read_timeout_s=1.0, deadline_s=60.0)
URL = "s3://faults/some/prefix"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_server(tmp_path_factory.mktemp("s3")) as started:
        started.create_bucket("faults")
        client = started._client()
        client.put_object(Bucket="faults", Key="some/prefix/object", Body=DATA)
        yield started
        # Stopping it in order takes ten seconds.
        started.kill()


@pytest.fixture
def connect(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Store]:
    def connect(endpoint: str, access: Access = QUICK, url: str = URL, **variables: str) -> Store:
        for name, value in (server.environment | {"AWS_ENDPOINT_URL_S3": endpoint} | variables).items():
            monkeypatch.setenv(name, value)
        return open_store(url, access)

    return connect


def proxy(server: S3Server, faults: dict[str, float], **options: Any) -> FaultProxy:
    return FaultProxy(("127.0.0.1", server.port), faults, seed=7, **options)


def reopened(store: Store) -> Store:
    """The store as another process receives it."""
    return pickle.loads(pickle.dumps(store))  # noqa: S301 - made here


def read_all_ranges(store: Store, threads: int = 8) -> list[bool]:
    """Whether each range was read exactly."""
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(lambda r: store.read("object", *r), RANGES)
        return [part == DATA[o : o + n] for part, (o, n) in zip(parts, RANGES, strict=True)]


@pytest.mark.parametrize(
    ("kind", "counter"),
    [("503", "fault_503"), ("reset", "fault_reset"), ("stall", "fault_stall"), ("truncate", "fault_truncated")],
)
def test_each_fault_alone(server: S3Server, connect: Callable[..., Store], kind: str, counter: str) -> None:
    began = time.monotonic()
    with proxy(server, {kind: 0.3}) as between:
        store = connect(between.endpoint, QUICK if kind == "stall" else Access())
        assert all(read_all_ranges(store))
    assert between.injected[kind] >= 10
    # A busy machine may stall beyond the short timeout of its own accord.
    assert store.counters["retries"] == store.counters[counter] >= between.injected[kind]
    assert kind == "stall" or store.counters[counter] == between.injected[kind]
    assert store.counters["requests"] == len(RANGES) + store.counters["retries"]
    # A break is continued at the very byte: nothing is received twice, in whatever pieces it came.
    if kind in ("stall", "truncate"):
        assert store.counters["bytes"] == sum(n for _, n in RANGES)
    assert time.monotonic() - began < 20


def test_all_faults_together_with_latency(server: S3Server, connect: Callable[..., Store]) -> None:
    faults = {"503": 0.08, "reset": 0.08, "stall": 0.04, "truncate": 0.08, "latency": 0.1}
    began = time.monotonic()
    with proxy(server, faults) as between:
        store = connect(between.endpoint)
        assert all(read_all_ranges(store))
        copy = reopened(store)
        assert copy.read("object", 5, 10) == DATA[5:15]
    assert set(between.injected) == set(faults)
    counted = store.counters + copy.counters
    assert counted["retries"] >= sum(between.injected.values()) - between.injected["latency"]
    assert time.monotonic() - began < 20


def test_flipped_bits_pass_unseen_and_connections_are_kept(
    server: S3Server, connect: Callable[..., Store]
) -> None:
    """Only checksums above the store can see a flip. Sound answers are all read over one connection."""
    with proxy(server, {"flip": 0.3}) as between:
        store = connect(between.endpoint, Access())
        exact = read_all_ranges(store, threads=1)
    assert exact.count(False) == between.injected["flip"] >= 10
    assert store.counters["retries"] == 0 and between.connections == 1


def test_decisions_follow_the_seed(server: S3Server) -> None:
    def decisions(seed: int) -> list[tuple[str | None, float]]:
        one = FaultProxy(("127.0.0.1", server.port), {"503": 0.3, "flip": 0.3}, seed)
        with one:
            return [one._decide("GET", {"range": "bytes=0-1"}) for _ in range(50)]

    assert decisions(1) == decisions(1) != decisions(2)


def test_server_killed_and_restarted_during_reads(server: S3Server, connect: Callable[..., Store]) -> None:
    store = connect(server.endpoint)
    with ThreadPoolExecutor(1) as pool:
        reads = pool.submit(lambda: [all(read_all_ranges(store, threads=4)) for _ in range(3)])
        while store.counters["requests"] < 20:
            time.sleep(0.005)
        server.kill()
        time.sleep(0.5)
        assert not reads.done()
        server.start()
        assert reads.result(60) == [True] * 3
    assert store.counters["retries"] >= 1


def test_writes_through_faults(server: S3Server, connect: Callable[..., Store], tmp_path: Path) -> None:
    """Small and multipart uploads, pages of a list: each request is retried by itself."""
    data = np.random.default_rng(2).bytes(2 * PART_BYTES + 12345)
    (tmp_path / "file").write_bytes(data)
    with proxy(server, {"503": 0.15, "reset": 0.15}, affects=lambda method, headers: True) as between:
        store = connect(between.endpoint, url="s3://faults/written")
        store.write_file("large", tmp_path / "file")
        for number in range(8):
            store.write(f"small{number}", data[: 1000 * number])
        listed = {info.key: info for info in store.list()}
        assert {k: i.size for k, i in listed.items()} == {f"small{n}": 1000 * n for n in range(8)} | {
            "large": len(data)
        }
        assert listed["large"].etag.endswith("-3")
        assert store.read_all("large") == data and store.read_all("small0") == b""
        assert store.read("large", 10, 20, listed["large"].etag) == data[10:30]
    assert sum(between.injected.values()) >= 5


def test_a_failed_upload_leaves_nothing(server: S3Server, connect: Callable[..., Store], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(2 * PART_BYTES))
    puts: Counter[str] = Counter()

    def second_put(method: str, headers: dict[str, str]) -> bool:
        puts[method] += 1
        return method == "PUT" and puts["PUT"] > 1

    with proxy(server, {"503": 1.0}, affects=second_put) as between:
        store = connect(between.endpoint, Access(deadline_s=1.0), url="s3://faults/failed")
        with pytest.raises(StoreError, match=r"s3://faults/failed/large: gave up .* SlowDown"):
            store.write_file("large", tmp_path / "file")
        assert list(store.list()) == [] and store.read_all("large") is None
    assert "Uploads" not in server._client().list_multipart_uploads(Bucket="faults")


def test_refusals_fail_at_once_without_credentials(server: S3Server, connect: Callable[..., Store]) -> None:
    anonymous = Access(anonymous=True)
    wrong = {"AWS_SECRET_ACCESS_KEY": "0123456789" * 4}
    unknown = {"AWS_ACCESS_KEY_ID": "ABCDEFGHIJ0123456789"}
    secrets = [v for k, v in (*server.environment.items(), *wrong.items(), *unknown.items()) if "KEY" in k]
    assert len(secrets) == 4
    cases: list[tuple[dict[str, str], str, Access, str, tuple[Any, ...], str]] = [
        ({}, URL, QUICK, "nothing", (0, 1), "no such object"),
        ({}, "s3://nowhere/p", QUICK, "x", (0, 1), "no such bucket"),
        ({}, URL, QUICK, "object", (0, 1, "0" * 32), "changed since it was indexed"),
        ({}, URL, QUICK, "object", (len(DATA) - 10, 20), "expected 4000010: changed since"),
        ({}, URL, QUICK, "object", (len(DATA), 20), "shorter than in the index"),
        ({}, URL, anonymous, "object", (0, 1), "access denied to an anonymous reader"),
        (wrong, URL, QUICK, "object", (0, 1), "the secret key is wrong"),
        (unknown, URL, QUICK, "object", (0, 1), "the access key is not known"),
    ]
    for changed, url, access, key, arguments, said in cases:
        store = connect(server.endpoint, access, url, **changed)
        began = time.monotonic()
        with pytest.raises(StoreError) as caught:
            store.read(key, *arguments)
        assert time.monotonic() - began < 2
        assert str(caught.value).startswith(f"{url}/{key}: ") and said in str(caught.value)
        assert "\n" not in str(caught.value) and store.counters["retries"] == 0
        shown = repr(caught.value) + "".join(traceback.format_exception(caught.value)) + repr(store)
        assert not [secret for secret in secrets if secret in shown]


def test_deadline_names_the_object_and_the_last_fault(server: S3Server, connect: Callable[..., Store]) -> None:
    with proxy(server, {"503": 1.0}) as between:
        store = connect(between.endpoint, Access(deadline_s=2.0))
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"s3://faults/some/prefix/object: gave up after 2\.\d s and \d+ att"):
            store.read("object", 0, 100)
        assert 2 <= time.monotonic() - began < 3.5
    assert store.counters["fault_503"] == between.injected["503"] == store.counters["retries"] + 1


def test_a_read_never_mixes_two_objects(server: S3Server, connect: Callable[..., Store]) -> None:
    """The object is replaced between a cut answer and the request that continues it."""
    gets = 0

    def cut_first_replace_before_second(method: str, headers: dict[str, str]) -> bool:
        nonlocal gets
        gets += 1
        if gets == 2:
            server._client().put_object(Bucket="faults", Key="mixed/x", Body=bytes(len(DATA)))
        return gets == 1

    server._client().put_object(Bucket="faults", Key="mixed/x", Body=DATA)
    with proxy(server, {"truncate": 1.0}, affects=cut_first_replace_before_second) as between:
        store = connect(between.endpoint, Access(), "s3://faults/mixed")
        with pytest.raises(StoreError, match="s3://faults/mixed/x: changed since"):
            store.read("x", 0, len(DATA))
    assert gets == 2 and 0 < store.counters["bytes"] < len(DATA)


def test_a_server_that_ignores_ranges_is_refused(connect: Callable[..., Store]) -> None:
    class Whole(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.send_header("ETag", '"whole"')
            self.end_headers()
            self.wfile.write(DATA[:1000])

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Whole) as whole, ThreadPoolExecutor(1) as pool:
        pool.submit(whole.serve_forever)
        try:
            store = connect(f"http://127.0.0.1:{whole.server_port}", Access(anonymous=True))
            for offset, length in ((10, 20), (0, 999)):
                with pytest.raises(StoreError, match="some/prefix/x: the server ignores ranges"):
                    store.read("x", offset, length)
            assert store.read("x", 0, 1000) == DATA[:1000]
        finally:
            whole.shutdown()


def test_requester_pays_is_sent_with_every_request(
    server: S3Server, connect: Callable[..., Store], tmp_path: Path
) -> None:
    seen: Counter[tuple[str, str | None]] = Counter()

    def note(method: str, headers: dict[str, str]) -> bool:
        seen[method, headers.get("x-amz-request-payer")] += 1
        return False

    (tmp_path / "file").write_bytes(bytes(PART_BYTES + 1))
    with proxy(server, {}, affects=note) as between:
        store = connect(between.endpoint, Access(requester_pays=True), url="s3://faults/paid")
        store.write("a", b"data")
        store.write_file("large", tmp_path / "file")
        assert store.read_all("a") == b"data" and len(list(store.list())) == 2
    assert {payer for _, payer in seen} == {"requester"}
    assert {method for method, _ in seen} == {"PUT", "POST", "GET"}


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time_(monkeypatch: pytest.MonkeyPatch) -> Time:
    replaced = Time()
    monkeypatch.setattr("data_pipeline.storage.retry.time", replaced)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    return replaced


def test_budget_carries_three_faults_in_ten_and_slows_an_outage(time_: Time) -> None:
    draw, budget = np.random.default_rng(3), RetryBudget()
    waited = 0.0
    for fails in draw.random(100_000) < 0.3:
        if fails:
            waited += budget.spend()
        else:
            budget.succeed()
    assert waited == 0
    outage = [budget.spend() for _ in range(200)]
    assert outage[-1] > 20 and sorted(outage) == outage
    time_.now += 60
    assert budget.spend() == 0


def test_backoff_is_bounded_by_deadline_and_progress(time_: Time) -> None:
    def attempts(bytes_each: int) -> tuple[int, float]:
        time_.now = 0.0
        backoff = Backoff("s3://b/k", 100, RetryBudget())
        for count in range(100_000):
            time_.now += 1
            backoff.progress(bytes_each) if bytes_each else None
            try:
                backoff.wait(f"fault {count}")
            except StoreError as error:
                assert f"and {count + 1} attempts" in str(error) and f"fault {count};" in str(error)
                return count, time_.now
        raise AssertionError("no end")

    tried, ended = attempts(0)
    assert 10 <= tried <= 20 and 100 <= ended <= 101
    # A drip of bytes resets the waits and moves the deadline by next to nothing.
    _, dripped = attempts(1)
    assert 100 <= dripped <= 102
    # At the floor, time stands still but for the waits.
    _, steady = attempts(FLOOR_BYTES_PER_S)
    assert 400 <= steady <= 700


def test_local_store_counts_and_replaces_whole(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    store.write("a/b", b"0123456789")
    assert store.read("a/b", 2, 3) == b"234" and reopened(store).read_all("a/b")
    assert store.counters == Counter(requests=2, bytes=3)
    with pytest.raises(StoreError, match="No such file"):
        store.write_file("a/b", tmp_path / "nothing")
    assert [(info.key, info.size) for info in store.list()] == [("a/b", 10)]
    assert sorted(p.name for p in (tmp_path / "store" / "a").iterdir()) == ["b"]
