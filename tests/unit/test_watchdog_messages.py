"""The watchdog's shared page, messages between companions, and who is let in; without processes."""

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

from deco_scale.watchdog.board import Beat, Board, End
from deco_scale.watchdog.decision import Report, Verdict
from deco_scale.watchdog.hub import Hub
from deco_scale.watchdog.lines import MAX_LINE, LineSocket
from deco_scale.watchdog.link import Link
from deco_scale.watchdog.orders import Member, Order
from deco_scale.watchdog.settings import WatchdogConfig
from deco_scale.watchdog.trainer_process import Identity, innermost

CFG = WatchdogConfig(timeout_s=300.0, slow_timeout_s=3600.0)
RANKS = 4
START = 1000.0


@given(st.integers(0, 2**40), st.sampled_from(["start", "step", "slow"]), st.text(), st.integers(-(2**31), 2**31))
def test_the_page_carries_what_is_said(step: int, phase: Any, reason: str, code: int) -> None:
    trainer = Board.create()
    companion = Board(os.dup(trainer.descriptor))
    try:
        assert companion.last_beat() == Beat(0, 0, "start") and companion.ended() is None
        trainer.beat(step, phase)
        trainer.beat(step, phase)
        assert companion.last_beat() == Beat(2, step, phase) and not companion.leaving
        trainer.end(reason, code)
        trainer.end("too late", 7)
        shown = reason.encode(errors="replace").decode(errors="replace")
        assert companion.ended() == End(shown, code, False)
        trainer.doubt()
        trainer.ask_to_leave()
        assert companion.ended().unsure and companion.leaving
        companion.look()
        assert trainer.looks == 1
    finally:
        os.close(trainer.descriptor)
        os.close(companion.descriptor)


def test_a_long_reason_is_cut() -> None:
    board = Board.create()
    board.end("\N{SNOWMAN}" * 100_000, 1)
    assert 1000 < len(board.ended().reason) < 20_000
    os.close(board.descriptor)


def pair() -> tuple[LineSocket, socket.socket]:
    server = socket.create_server(("127.0.0.1", 0))
    other = socket.create_connection(server.getsockname())
    mine, _ = server.accept()
    server.close()
    other.settimeout(2)
    return LineSocket(mine), other


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


def test_a_reader_that_does_not_read_holds_up_nobody() -> None:
    line, other = pair()
    for _ in range(1000):
        line.send({"text": "x" * 60_000})
        if line.closed:
            break
    assert line.closed
    line.close()
    other.close()


def test_only_the_token_lets_a_rank_in_and_only_once() -> None:
    me = Identity.of(os.getpid())
    members = [Member(rank, "node", me, me) for rank in range(3)]
    hub = Hub(CFG, members[0], world_size=2, token="right", local=True, now=0.0)
    entered = False
    for token, member, welcome in (
        ("wrong", members[1], False),
        ("", members[1], False),
        ("right", members[0], False),
        ("right", members[2], False),
        ("right", members[1], True),
        ("right", members[1], False),
    ):
        with socket.create_connection(("127.0.0.1", hub.port)) as other:
            other.sendall(json.dumps({"token": token, "member": member.message()}).encode() + b"\n")
            other.settimeout(0.01)
            said = None
            for _ in range(100):
                hub.wait(0.01, 0.0)
                with suppress(TimeoutError, ConnectionError):
                    said = other.recv(100)
                    break
            assert said is not None and (said == b'{"welcome": true}\n') == welcome
            entered = entered or welcome
            assert hub.missing == ([] if entered else [1])
    hub.close(0.0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", hub.port))


@pytest.mark.parametrize("leaves", [False, True])
def test_a_link_decides_alone_once_the_hub_is_lost_or_has_left(leaves: bool) -> None:
    me = Identity.of(os.getpid())
    members = [Member(rank, f"node{rank}", me, me) for rank in range(2)]
    hub = Hub(CFG, members[0], world_size=2, token="right", local=True, now=0.0)
    link = Link(CFG, members[1], members[0], now=0.0)
    joined = threading.Thread(target=link.connect, args=("127.0.0.1", hub.port, "right", 5.0))
    joined.start()
    while hub.missing:
        hub.wait(0.01, 0.0)
    joined.join()
    if leaves:
        hub.close(0.0)
    else:
        for peer in list(hub._peers.values()):
            peer.line.close()
    orders = []
    for tick in range(400):
        link.wait(0.002, tick)
        report = Report(rank=1, phase="step", step=3, silent_s=301.0 if tick > 300 else 0.0)
        orders += filter(None, [link.tick(float(tick), report)])
    (order,) = orders
    assert order.tell and (order.kind, order.rank) == (("hang", 1) if leaves else ("lost", 0))
    assert order.host == f"node{order.rank}" and bool(order.orphans) != leaves


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(), st.one_of(st.none(), st.integers(), st.text(), st.floats(), st.lists(st.integers()))
    )
)
def test_reports_and_orders_of_any_form_are_refused_in_one_way(raw: dict[str, Any]) -> None:
    for parse in (lambda: Report.parse(1, raw), lambda: Order.parse(raw), lambda: Member.parse(raw)):
        with pytest.raises((KeyError, TypeError, ValueError, OverflowError)):
            parse()


def test_reports_and_orders_survive_the_way() -> None:
    report = Report(
        rank=3, phase="slow", step=9, silent_s=1.5, state="D", stopped_s=0.0, code=75, reason="x" * 2000
    )
    assert Report.parse(3, json.loads(json.dumps(asdict(report)))) == report
    me = Identity.of(os.getpid())
    member = Member(3, "node", me, me)
    assert Member.parse(json.loads(json.dumps(member.message()))) == member and me.here
    worst = Order.of(Verdict("lost", 3, "\N{GRINNING FACE}" * 9000), member, report, [member] * 500)
    line = json.dumps({"order": worst.message()})
    assert len(line) < MAX_LINE
    assert Order.parse(json.loads(line)["order"]).orphans == worst.orphans


def test_the_main_thread_is_shown() -> None:
    dump = (
        'Current thread 0x01 (most recent call first):\n  File "/a/poll.py", line 3 in waits\n\n'
        'Thread 0x02 (most recent call first):\n  File "/b/c.py", line 5 in inner\n'
        '  File "/b/d.py", line 7 in <module>\n'
    )
    assert innermost(dump) == "inner (c.py:5) < <module> (d.py:7)"
    assert innermost("no stacks") == ""
