"""Replies with results of every form: what is not the operation's fails with ``ProtocolError``."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from tests.protocol.test_hostile_requests import WRONG
from tests.support.helpers import PATIENCE, RawPeer
from warabi import aio, errors
from warabi.protocol import address, wire
from warabi.protocol.operations import OPERATIONS, Operation, Payload
from warabi.protocol.pending import Patience, PendingRequest
from warabi.region import RegionID
from warabi.remote.connection import BlockingConnection
from warabi.remote.link import WireLink

_PLACE = 4
FAILURES: list[Any] = [
    [], ["region"], ["region", "x"], [1, "x", 0], ["path", 5, 0], ["path", "", float("nan")],
    ["path", "", float("inf")], ["path", "", -1], ["path", "", 1 << 62], ["path", "", None], 5,
    "region", None, {"a": 1}, [["path"], "x", 0],
]  # fmt: skip


def _request(name: str) -> PendingRequest:
    reads = OPERATIONS[name].payload is Payload.DOWNLOAD
    request = PendingRequest(name, into=memoryview(bytearray(_PLACE)) if reads else None)
    request.number = 1
    return request


def _outcome(name: str, header: list[Any]) -> PendingRequest:
    """A request that a client has given a reply, as it does."""
    request = _request(name)
    if not request.take_whole(header, b""):
        try:
            request.take_reply(wire.Message(header, 0))
        except errors.ProtocolError as error:
            request.finish(error=error)
    assert request.done
    if isinstance(request.error, errors.ProtocolError):
        assert re.fullmatch(rf"{name}: .{{,280}}", str(request.error))
    return request


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_of_every_form(name: str) -> None:
    form = OPERATIONS[name].result
    reads = OPERATIONS[name].payload is Payload.DOWNLOAD
    for value in [*WRONG, [1, 2, 3], [True] * 11, [-1] * 11, [1.0] * 11, [None] * 8, [[], [], 1]]:
        request = _outcome(name, [1, value])
        if type(value) not in form.types or reads:  # bytes should have come with it
            assert isinstance(request.error, errors.ProtocolError), value
        elif request.error is None:
            form.decode(value)
        if reads:
            request = _outcome(name, [1, None, value])
            if value != bytes(_PLACE):
                assert isinstance(request.error, errors.ProtocolError), value


@pytest.mark.parametrize("name", ["size", "read", "getattr", "rename"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failures_of_every_form(name: str, failure: Any) -> None:
    request = _outcome(name, [1, None, None, failure])
    assert isinstance(request.error, errors.ProtocolError)


def test_failures_that_have_the_form() -> None:
    assert isinstance(
        _outcome("size", [1, None, None, ["region", "x", 0]]).error, errors.InvalidRegion
    )
    error = _outcome("size", [1, None, None, ["path", "x", 2]]).error
    assert isinstance(error, errors.PathError)
    assert error.errno == 2


class Liar:
    """A provider that answers pings, and everything else with ``header``."""

    def __init__(self, listener: socket.socket) -> None:
        self.header: list[Any] = []
        self._listener = listener
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(accepted,))
                thread.start()
                self._threads.append(thread)

    def _serve(self, accepted: socket.socket) -> None:
        with accepted, contextlib.suppress(EOFError, ConnectionError):
            peer = RawPeer(accepted)
            while True:
                number, _, name, *_ = peer.reply()
                peer.send([number, *([None] if name == "ping" else self.header)])

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(PATIENCE)
        for thread in self._threads:
            thread.join(PATIENCE)


@pytest.fixture
def liar() -> Iterator[tuple[str, Liar]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        provider = Liar(listener)
        try:
            yield f"tcp://127.0.0.1:{listener.getsockname()[1]}", provider
        finally:
            provider.close()


def _arguments(operation: Operation) -> list[Any]:
    values = {"region": RegionID(), "listing": RegionID(), "after": RegionID()}
    return [values.get(name, 1) for name in operation.arguments]


CALLED = [
    name for name, one in OPERATIONS.items() if one.payload is Payload.NONE and name != "ping"
]


def _wrong(name: str) -> list[Any]:
    """Results that are none of the operation's, and what is no reply at all."""
    form = OPERATIONS[name].result
    return [value for value in ("text", 1.5, b"xyz", {"a": 1}) if type(value) not in form.types]


def test_blocking_client(liar: tuple[str, Liar]) -> None:
    where, provider = liar
    for name in CALLED:
        for value in _wrong(name):
            provider.header = [value]
            connection = BlockingConnection(address.parse(where), Patience(10))
            try:
                link = WireLink(lambda one=connection: one, 1)  # type: ignore[misc]
                with pytest.raises(errors.ProtocolError, match=f"{name}: the reply: expected "):
                    link.call(name, *_arguments(OPERATIONS[name]))
            finally:
                connection.close(0)


def test_trio_client(liar: tuple[str, Liar]) -> None:
    where, provider = liar

    async def main() -> None:
        for name in CALLED:
            for value in _wrong(name):
                provider.header = [value]
                async with aio.connect(where, 1, timeout=10, share=False) as target:
                    with pytest.raises(errors.ProtocolError, match=f"{name}: the reply: expected "):
                        await target.call(name, *_arguments(OPERATIONS[name]))

    trio.run(main)


@pytest.mark.parametrize(
    "header", [[], [5], ["text"], [None, 5], [None, None], [None, b"too long"]]
)
def test_reads(liar: tuple[str, Liar], header: list[Any]) -> None:
    where, provider = liar
    provider.header = header
    connection = BlockingConnection(address.parse(where), Patience(10))
    place = bytearray(_PLACE)
    try:
        link = WireLink(lambda: connection, 1)
        with pytest.raises(errors.ProtocolError):
            link.read_into(RegionID(), 0, memoryview(place))
    finally:
        connection.close(0)

    async def main() -> None:
        async with aio.connect(where, 1, timeout=10, share=False) as target:
            with pytest.raises(errors.ProtocolError):
                await target.read_into(RegionID(), 0, place)

    trio.run(main)
    assert place == bytes(_PLACE)
