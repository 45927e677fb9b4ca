"""The watchdog's shared page, messages between sidecars, and who is let in; without processes."""

import asyncio
import faulthandler
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deco_scale.errors import RunError
from deco_scale.watchdog.client import Watchdog
from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.coordinator import Coordinator
from deco_scale.watchdog.diagnosis import Fault, RankReport
from deco_scale.watchdog.heartbeat import HeartbeatPage
from deco_scale.watchdog.peer import Peer
from deco_scale.watchdog.process import DUMP_SIGNAL, ProcessIdentity, innermost_frames
from deco_scale.watchdog.protocol import (
    BROKEN,
    LOCALHOST,
    MAX_LINE,
    Member,
    TerminateOrder,
    open_port,
    parse,
    receive,
    send,
)

CFG = WatchdogConfig(timeout_s=300.0, slow_timeout_s=3600.0)


@given(
    st.integers(0, 2**40), st.sampled_from(["start", "step", "long_op"]), st.text(), st.integers(-(2**31), 2**31)
)
def test_the_heartbeat_page_carries_all_fields(step: int, phase: Any, reason: str, code: int) -> None:
    trainer = HeartbeatPage.create()
    sidecar = HeartbeatPage.map(os.dup(trainer.descriptor))
    try:
        assert sidecar.count == 0 and sidecar.state() == {"step": 0, "phase": "start"}
        trainer.beat(step, phase)
        trainer.beat(step, phase)
        assert sidecar.count == 2 and sidecar.state() == {"step": step, "phase": phase} and not sidecar.closing
        trainer.report_exit(reason, code)
        trainer.report_exit("too late", 7)
        shown = reason.encode(errors="replace").decode(errors="replace")
        exit_report = {"step": step, "phase": "end", "reason": shown, "code": code, "uncertain": False}
        assert sidecar.state() == exit_report
        trainer.uncertain = trainer.closing = 1
        assert sidecar.state()["uncertain"] and sidecar.closing
        sidecar.alive_count += 1
        assert trainer.alive_count == 1
    finally:
        os.close(trainer.descriptor)
        os.close(sidecar.descriptor)


def test_a_long_reason_is_cut() -> None:
    page = HeartbeatPage.create()
    page.report_exit("\N{SNOWMAN}" * 100_000, 1)
    assert len(page.state()["reason"]) == 2000
    os.close(page.descriptor)


async def received(data: bytes) -> list[Any]:
    """Messages that a reader has of the data before it gives up."""
    reader, found = asyncio.StreamReader(limit=MAX_LINE), []
    reader.feed_data(data)
    with suppress(*BROKEN):
        while True:
            found.append(await asyncio.wait_for(receive(reader), 2))
    return found


@pytest.mark.parametrize(
    "data", [b"x" * (MAX_LINE + 1), b"[1]\n", b"\xff\n", b"{" * 60_000 + b"\n", b"\n", b"1" * 9000 + b"\n"]
)
def test_what_is_no_message_closes_the_connection(data: bytes) -> None:
    async def said() -> list[Any]:
        async with a_coordinator("right") as (coordinator, port):
            reader, writer = await asyncio.open_connection(LOCALHOST, port)
            hello = json.dumps({"token": "right", "member": asdict(MEMBERS[1])}).encode()
            writer.write(hello + b"\n" + data + b"\n")
            with suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 5)
            assert coordinator.missing == []
            return await received(b'{"first": 1}\n' + data + b"\n")

    assert asyncio.run(said()) == [{"first": 1}]


def test_a_reader_that_stalls_blocks_no_other() -> None:
    async def send_much() -> bool:
        # Not a context: from Python 3.12 on its end waits for all connections.
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for _ in range(1000):
            send(writer, {"text": "x" * 60_000})
            if writer.transport.is_closing():
                return True
        return False

    assert asyncio.run(send_much())


ME = ProcessIdentity.of(os.getpid())
MEMBERS = [Member(rank, f"node{rank}", ME, ME) for rank in range(3)]


@asynccontextmanager
async def a_coordinator(token: str) -> AsyncIterator[tuple[Coordinator, int]]:
    """A coordinator that waits for rank 1, and its port."""
    coordinator = Coordinator(CFG, MEMBERS[0], world_size=2, token=token, clock=lambda: 0.0)
    server = open_port(LOCALHOST)
    port = server.getsockname()[1]
    listening = asyncio.create_task(coordinator.listen(server.detach(), 30.0))
    yield coordinator, port
    await listening
    await coordinator.close()


def test_only_the_token_lets_a_rank_in_and_only_once() -> None:
    async def try_all() -> int:
        entered = False
        async with a_coordinator("right") as (coordinator, port):
            for token, member, welcome in (
                ("wrong", MEMBERS[1], False),
                ("", MEMBERS[1], False),
                ("right", MEMBERS[0], False),
                ("right", MEMBERS[2], False),
                ("right", MEMBERS[1], True),
                ("right", MEMBERS[1], False),
            ):
                reader, writer = await asyncio.open_connection(LOCALHOST, port)
                writer.write(json.dumps({"token": token, "member": asdict(member)}).encode() + b"\n")
                said = await asyncio.wait_for(reader.readline(), 5)
                assert said.startswith(b'{"welcome": {"rank": 0, ') == welcome and (welcome or said == b"")
                entered = entered or welcome
                assert coordinator.missing == ([] if entered else [1])
                writer.close()
            return port

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOCALHOST, asyncio.run(try_all())))


def test_all_sidecars_can_connect_before_rank_0_s_accepts_any() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(open_port(LOCALHOST))
        for _ in range(300):
            stack.enter_context(socket.create_connection(server.getsockname(), timeout=5))


def test_a_peer_that_nobody_answers_says_so() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server((LOCALHOST, 0), backlog=0))
        stack.enter_context(socket.create_connection(server.getsockname()))  # the only place in the queue
        peer = Peer(CFG, MEMBERS[1], clock=lambda: 0.0)
        with pytest.raises(OSError, match="timed out"):
            asyncio.run(peer.connect(LOCALHOST, server.getsockname()[1], "token", 0.7))


def test_a_rank_without_a_sidecar_says_why_not_only_that_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RunError("the sidecar of rank 1: no route to host")

    monkeypatch.setattr(Watchdog, "_start_sidecar", fail)
    shared = iter(
        [("now", LOCALHOST, 1, "token"), "the sidecar of rank 0: the sidecars of ranks 1 did not connect"]
    )
    with pytest.raises(RunError, match="no route to host"):
        Watchdog.start(CFG, rank=1, world_size=2, run_dir=tmp_path, share=lambda _: next(shared))
    faulthandler.unregister(DUMP_SIGNAL)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_peer_decides_alone_once_the_coordinator_is_lost_or_has_left(leaves: bool) -> None:
    now = 0.0

    async def orders() -> list[TerminateOrder]:
        nonlocal now
        async with a_coordinator("right") as (coordinator, port):
            found: list[TerminateOrder] = []
            peer = Peer(CFG, MEMBERS[1], clock=lambda: now)
            await peer.connect(LOCALHOST, port, "right", 5.0)
            if leaves:
                await coordinator.close()
            else:
                coordinator._writers[1].transport.abort()
            for tick in range(400):
                now = float(tick)
                await asyncio.sleep(0.002)
                silent_s = 301.0 if tick > 300 else 0.0
                found += filter(None, [peer.tick(RankReport(rank=1, phase="step", step=3, silent_s=silent_s))])
        return found

    (order,) = asyncio.run(orders())
    assert order.report is not None and (order.fault.kind, order.member.rank) == (
        ("hang", 1) if leaves else ("lost", 0)
    )
    assert order.member.host == f"node{order.member.rank}" and bool(order.orphans) != leaves


def test_a_silent_coordinator_is_lost() -> None:
    now = 0.0

    async def order() -> TerminateOrder | None:
        nonlocal now
        async with a_coordinator("right") as (coordinator, port):
            peer = Peer(CFG, MEMBERS[1], clock=lambda: now)
            await peer.connect(LOCALHOST, port, "right", 5.0)
            report = RankReport(rank=1, phase="step", step=3)
            now = CFG.timeout_s - 1
            assert peer.tick(report) is None
            coordinator._send_all({"alive": True})
            await asyncio.sleep(0.05)
            now += CFG.timeout_s - 1
            assert peer.tick(report) is None
            now += 2
            assert peer.tick(report) is None
            now += 2
            return peer.tick(report)

    found = asyncio.run(order())
    assert found.fault.kind == "lost" and found.member.rank == 0 and "silent for 303.0 s" in found.text


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(), st.one_of(st.none(), st.integers(), st.text(), st.floats(), st.lists(st.integers()))
    )
)
def test_reports_and_orders_of_any_form_are_refused_in_one_way(raw: dict[str, Any]) -> None:
    for kind in (RankReport, TerminateOrder, Member):
        with pytest.raises(BROKEN):
            parse(kind, raw)


def test_reports_and_orders_survive_the_way() -> None:
    report = RankReport(
        rank=3, phase="long_op", step=9, silent_s=1.5, state="D", stopped_s=0.0, code=75, reason="x" * 2000
    )
    assert parse(RankReport, json.loads(json.dumps(asdict(report)))) == report
    me = ProcessIdentity.of(os.getpid())
    member = Member(3, "node", me, me)
    assert parse(Member, json.loads(json.dumps(asdict(member)))) == member and me.running
    worst = TerminateOrder(Fault("lost", 3, "\N{GRINNING FACE}" * 2100), member, (member,) * 32, report)
    line = json.dumps({"order": worst.message})
    assert len(line) < MAX_LINE
    assert parse(TerminateOrder, json.loads(line)["order"]).orphans == worst.orphans


def test_the_main_thread_is_shown() -> None:
    dump = (
        'Current thread 0x01 (most recent call first):\n  File "/a/poll.py", line 3 in waits\n\n'
        'Thread 0x02 (most recent call first):\n  File "/b/c.py", line 5 in inner\n'
        '  File "/b/d.py", line 7 in <module>\n'
    )
    assert innermost_frames(dump) == "inner (c.py:5) < <module> (d.py:7)"
    assert innermost_frames("no stacks") == ""
