"""The watchdog's shared page, messages between sidecars, and who is let in; without processes."""

import json
import os
import socket
import threading
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.coordinator import Coordinator
from deco_scale.watchdog.diagnosis import Fault, RankReport
from deco_scale.watchdog.heartbeat import PHASES, ExitReport, HeartbeatPage
from deco_scale.watchdog.peer import Peer
from deco_scale.watchdog.process import ProcessIdentity, innermost_frames
from deco_scale.watchdog.protocol import MALFORMED, MAX_LINE, Member, MessageSocket, TerminateOrder, parse

CFG = WatchdogConfig(timeout_s=300.0, slow_timeout_s=3600.0)
RANKS = 4
START = 1000.0


@given(
    st.integers(0, 2**40), st.sampled_from(["start", "step", "long_op"]), st.text(), st.integers(-(2**31), 2**31)
)
def test_the_heartbeat_page_carries_all_fields(step: int, phase: Any, reason: str, code: int) -> None:
    trainer = HeartbeatPage.create()
    sidecar = HeartbeatPage.map(os.dup(trainer.descriptor))
    try:
        assert (sidecar.count, sidecar.step, sidecar.phase) == (0, 0, 0) and sidecar.exit_report() is None
        trainer.beat(step, phase)
        trainer.beat(step, phase)
        assert (sidecar.count, sidecar.step, PHASES[sidecar.phase]) == (2, step, phase) and not sidecar.closing
        trainer.report_exit(reason, code)
        trainer.report_exit("too late", 7)
        shown = reason.encode(errors="replace").decode(errors="replace")
        assert sidecar.exit_report() == ExitReport(shown, code, False)
        trainer.uncertain = trainer.closing = 1
        assert sidecar.exit_report().uncertain and sidecar.closing
        sidecar.alive_count += 1
        assert trainer.alive_count == 1
    finally:
        os.close(trainer.descriptor)
        os.close(sidecar.descriptor)


def test_a_long_reason_is_cut() -> None:
    page = HeartbeatPage.create()
    page.report_exit("\N{SNOWMAN}" * 100_000, 1)
    assert 1000 < len(page.exit_report().reason) < 20_000
    os.close(page.descriptor)


def pair() -> tuple[MessageSocket, socket.socket]:
    server = socket.create_server(("127.0.0.1", 0))
    other = socket.create_connection(server.getsockname())
    mine, _ = server.accept()
    server.close()
    other.settimeout(2)
    return MessageSocket(mine), other


@pytest.mark.parametrize(
    "data", [b"x" * (MAX_LINE + 1), b"[1]\n", b"\xff\n", b"{" * 60_000 + b"\n", b"\n", b"1" * 9000 + b"\n"]
)
def test_what_is_no_message_closes_the_connection(data: bytes) -> None:
    line, other = pair()
    sender = threading.Thread(target=other.sendall, args=(b'{"first": 1}\n' + data,))
    sender.start()
    sender.join()
    found: list[Any] = []
    for _ in range(200):
        found += line.receive()
        if line.closed:
            break
    assert line.closed and found == [{"first": 1}]
    line.close()
    other.close()


def test_a_reader_that_stalls_blocks_no_other() -> None:
    line, other = pair()
    for _ in range(1000):
        line.send({"text": "x" * 60_000})
        if line.closed:
            break
    assert line.closed
    line.close()
    other.close()


def test_only_the_token_lets_a_rank_in_and_only_once() -> None:
    me = ProcessIdentity.of(os.getpid())
    members = [Member(rank, "node", me, me) for rank in range(3)]
    coordinator = Coordinator(CFG, members[0], world_size=2, token="right", local=True, now=0.0)
    entered = False
    for token, member, welcome in (
        ("wrong", members[1], False),
        ("", members[1], False),
        ("right", members[0], False),
        ("right", members[2], False),
        ("right", members[1], True),
        ("right", members[1], False),
    ):
        with socket.create_connection(("127.0.0.1", coordinator.port)) as other:
            other.sendall(json.dumps({"token": token, "member": asdict(member)}).encode() + b"\n")
            other.settimeout(0.01)
            said = None
            for _ in range(100):
                coordinator.wait(0.01, 0.0)
                with suppress(TimeoutError, ConnectionError):
                    said = other.recv(100)
                    break
            assert said is not None and (said == b'{"welcome": true}\n') == welcome
            entered = entered or welcome
            assert coordinator.missing == ([] if entered else [1])
    coordinator.close(0.0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", coordinator.port))


@pytest.mark.parametrize("leaves", [False, True])
def test_a_peer_decides_alone_once_the_coordinator_is_lost_or_has_left(leaves: bool) -> None:
    me = ProcessIdentity.of(os.getpid())
    members = [Member(rank, f"node{rank}", me, me) for rank in range(2)]
    coordinator = Coordinator(CFG, members[0], world_size=2, token="right", local=True, now=0.0)
    peer = Peer(CFG, members[1], members[0], now=0.0)
    joined = threading.Thread(target=peer.connect, args=("127.0.0.1", coordinator.port, "right", 5.0))
    joined.start()
    while coordinator.missing:
        coordinator.wait(0.01, 0.0)
    joined.join()
    if leaves:
        coordinator.close(0.0)
    else:
        for connection in list(coordinator._connections.values()):
            connection.messages.close()
    orders: list[TerminateOrder] = []
    for tick in range(400):
        peer.wait(0.002, tick)
        report = RankReport(rank=1, phase="step", step=3, silent_s=301.0 if tick > 300 else 0.0)
        orders += filter(None, [peer.tick(float(tick), report)])
    (order,) = orders
    assert order.report is not None and (order.fault.kind, order.member.rank) == (
        ("hang", 1) if leaves else ("lost", 0)
    )
    assert order.member.host == f"node{order.member.rank}" and bool(order.orphans) != leaves


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(), st.one_of(st.none(), st.integers(), st.text(), st.floats(), st.lists(st.integers()))
    )
)
def test_reports_and_orders_of_any_form_are_refused_in_one_way(raw: dict[str, Any]) -> None:
    for kind in (RankReport, TerminateOrder, Member):
        with pytest.raises(MALFORMED):
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
