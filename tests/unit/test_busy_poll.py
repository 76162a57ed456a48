"""Busy polling: when and for how long, and that it does not delay other tasks."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.helpers import (
    MEMORY,
    RawPeer,
    file_config,
    pattern,
    provider_process,
    raw_connection,
)
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.eventloop.busy_poll import Attention, BusyPoll
from warabi.protocol import wire
from warabi.server import Provider


class Receiver:
    """One end of a connection, which counts how often it is looked at."""

    def __init__(self) -> None:
        self.here, self.peer = socket.socketpair()
        self.looks = 0
        self.place = memoryview(bytearray(100))

    def __call__(self, place: memoryview, size: int, flags: int) -> int:
        self.looks += 1
        return self.here.recv_into(place, size, flags)

    def send_soon(self, seconds: float) -> None:
        threading.Timer(seconds, self.peer.send, [b"late"]).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.here.close()
    receiver.peer.close()


@pytest.fixture
def core_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, a yielded core does not come back late."""
    monkeypatch.setattr("warabi.eventloop.busy_poll.POLL_LATE", 1 << 60)


def _expecting(receiver: Receiver) -> BusyPoll:
    """Busy polling, to which the last message came at once."""
    busy_poll = BusyPoll()
    busy_poll.came(time.perf_counter_ns())
    assert busy_poll.look(receiver, receiver.place, time.perf_counter_ns()) == -1
    assert receiver.looks > 1
    receiver.looks = 0
    return busy_poll


def test_available_messages_are_taken_at_once(receiver: Receiver) -> None:
    receiver.peer.send(b"here")
    assert BusyPoll().look(receiver, receiver.place, time.perf_counter_ns()) == 4
    receiver.peer.send(b"here")
    assert BusyPoll().receive(receiver, receiver.place) == 4
    assert bytes(receiver.place[:4]) == b"here"


def test_no_polling_before_the_first_message(receiver: Receiver) -> None:
    assert BusyPoll().look(receiver, receiver.place, time.perf_counter_ns()) == -1
    assert receiver.looks == 1
    receiver.peer.send(b"here")
    BusyPoll().receive(receiver, receiver.place)
    assert receiver.looks == 2


@pytest.mark.usefixtures("core_of_our_own")
def test_after_a_late_message_the_loop_blocks(receiver: Receiver) -> None:
    busy_poll = _expecting(receiver)
    receiver.send_soon(0.02)
    assert busy_poll.receive(receiver, receiver.place) == 4
    assert receiver.looks > 1
    receiver.looks = 0
    receiver.send_soon(0.0)
    assert busy_poll.receive(receiver, receiver.place) == 4
    assert receiver.looks == 1


@pytest.mark.usefixtures("core_of_our_own")
def test_the_end_of_a_connection_is_seen_awake(receiver: Receiver) -> None:
    busy_poll = _expecting(receiver)
    receiver.peer.close()
    assert busy_poll.receive(receiver, receiver.place) == 0
    assert receiver.looks == 1


def test_polling_yields_a_contended_core(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy_poll = _expecting(receiver)
    monkeypatch.setattr("os.sched_yield", lambda: time.sleep(0.002))
    assert busy_poll.look(receiver, receiver.place, time.perf_counter_ns()) == -1
    receiver.looks = 0
    assert busy_poll.look(receiver, receiver.place, time.perf_counter_ns()) == -1
    assert receiver.looks == 1


def test_polling_lasts_longer_after_large_messages(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0, 10_000)  # ten microseconds from one look to the next
    monkeypatch.setattr("warabi.eventloop.busy_poll.perf_counter_ns", lambda: next(clock))
    busy_poll = BusyPoll()
    busy_poll.came(next(clock))

    def looks() -> int:
        receiver.looks = 0
        assert busy_poll.look(receiver, receiver.place, next(clock)) == -1
        return receiver.looks

    assert looks() == pytest.approx(10, abs=2)
    busy_poll.moved(300_000)
    busy_poll.moved(200_000)
    assert looks() == pytest.approx(60, abs=2)
    busy_poll.moved(100_000_000)
    assert looks() == pytest.approx(110, abs=2)
    receiver.peer.send(b"here")
    assert busy_poll.look(receiver, receiver.place, next(clock)) == 4
    assert looks() == pytest.approx(10, abs=2)

    busy_poll.moved(500_000)
    began = next(clock)
    for _ in range(50):  # it slept, and would have been awake
        next(clock)
    busy_poll.came(began)
    assert looks() == pytest.approx(10, abs=2)


def test_polling_continues_within_a_message(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether messages come soon or not, until a piece was late."""
    clock = itertools.count(0, 10_000)  # ten microseconds from one look to the next
    monkeypatch.setattr("warabi.eventloop.busy_poll.perf_counter_ns", lambda: next(clock))
    busy_poll = BusyPoll()

    def looks(wait: bool = True) -> int:
        receiver.looks = 0
        assert busy_poll.piece(receiver, receiver.place, next(clock), wait=wait) == -1
        return receiver.looks

    assert looks() == pytest.approx(10, abs=2)
    assert looks(wait=False) == 1
    receiver.peer.send(b"here")
    assert busy_poll.piece(receiver, receiver.place, next(clock)) == 4
    began = next(clock)
    for _ in range(50):
        next(clock)
    busy_poll.piece_came(began)
    assert looks() == 1
    busy_poll.piece_came(next(clock))
    assert looks() == pytest.approx(10, abs=2)


@pytest.mark.parametrize("backend", ["memory", "file"])
def test_an_endless_payload_does_not_starve_other_connections(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it goes to its place or through a buffer, and however long pieces are looked for."""
    for name in ("POLL_MOMENT", "POLL_LATE"):
        monkeypatch.setattr(f"warabi.eventloop.busy_poll.{name}", 1 << 60)
    monkeypatch.setattr(BusyPoll, "came", lambda self, began: None)  # for messages it sleeps
    monkeypatch.setattr(Attention, "alone", lambda self, connection, now: True)
    config = MEMORY if backend == "memory" else file_config(tmp_path / "target")
    with (
        Engine("tcp") as own,
        Provider(own, 1, config),
        Engine("tcp", client) as engine,
        raw_connection(str(own.addr())) as connection,
    ):
        handle = Client(engine).make_target_handle(str(own.addr()), 1)
        data = pattern(4 << 20)
        region = handle.create_and_write(bytes(len(data)))
        peer = RawPeer(connection)
        header = [7, 1, "write", [bytes(region), 0, False, False], None]
        peer.socket.sendall(wire.frame(header, len(data)) + data[:100_000])
        answered = threading.Event()

        def send() -> None:
            sent = 100_000
            while not answered.is_set():
                peer.socket.sendall(data[sent : sent + 1])
                sent += 1
            peer.socket.sendall(data[sent:])

        sending = threading.Thread(target=send)
        sending.start()
        try:
            for _ in range(10):
                assert handle.size(region) == len(data)
        finally:
            answered.set()
            sending.join()
        assert peer.reply() == [7, None]
        assert handle.read(region, 0, len(data)) == data


def test_a_connection_is_alone_after_a_while_without_others() -> None:
    attention = Attention()
    now = 10 * Attention.ALONE
    attention.give("a", now)
    assert not attention.alone("a", now)
    assert attention.alone("a", now + 2 * Attention.ALONE)
    assert not attention.alone("b", now + 2 * Attention.ALONE)
    attention.give("b", now + 2 * Attention.ALONE)
    attention.give("a", now + 2 * Attention.ALONE)
    assert not attention.alone("a", now + 2 * Attention.ALONE)


def test_a_client_that_polls_without_pause_does_not_starve_others() -> None:
    """Neither one that waits for each answer nor one that sends without end."""
    with provider_process("na+sm", MEMORY) as served:
        over = threading.Event()
        asked = [0, 0]

        def ask() -> None:
            with Engine("na+sm", client) as engine:
                handle = Client(engine).make_target_handle(served.address, 1)
                while not over.is_set():
                    handle.erase(handle.create(10))
                    asked[0] += 1

        def pour() -> None:
            with raw_connection(served.address) as connection:
                peer = RawPeer(connection)
                while not over.is_set():
                    connection.sendall(wire.frame([1, 1, "ping", [], None]) * 1000)
                    for _ in range(1000):
                        assert peer.reply() == [1, None]
                    asked[1] += 1

        threads = [threading.Thread(target=ask), threading.Thread(target=pour)]
        for thread in threads:
            thread.start()
        try:
            with Engine("na+sm", client) as engine:
                handle = Client(engine).make_target_handle(served.address, 1)
                while min(asked) < 10:
                    handle.erase(handle.create_and_write(b"mine"))
        finally:
            over.set()
            for thread in threads:
                thread.join()


@pytest.mark.parametrize("transport", ["na+sm", "tcp"])
def test_an_idle_loop_blocks_in_the_kernel(transport: str) -> None:
    """Also right after many calls one after another, and many bytes."""
    with (
        provider_process(transport, MEMORY) as served,
        Engine(transport, client) as engine,
    ):
        handle = Client(engine).make_target_handle(served.address, 1)
        for _ in range(500):
            handle.erase(handle.create(10))
        data = bytes(1 << 20)
        region = handle.create_and_write(data)
        for _ in range(20):
            handle.write(region, 0, data)

        def used() -> int:
            """Its processor time, in ticks of 10 ms."""
            text = Path(f"/proc/{served.process.pid}/stat").read_text()
            return sum(map(int, text.rpartition(")")[2].split()[11:13]))

        before = used()
        time.sleep(0.4)
        assert used() - before < 20
