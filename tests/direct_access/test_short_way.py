"""Replies of every form to a blocking client, which decodes the usual ones by a fast path."""

from __future__ import annotations

import contextlib
import itertools
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

import warabi.aio
from tests.support.helpers import PATIENCE, RawPeer, Served, pattern
from warabi import errors
from warabi.client import Client, RegionID, TargetHandle
from warabi.engine import Engine, client
from warabi.protocol import wire

Answer = Callable[[Any], list[bytes]]
"""What is sent, piece by piece, for a request's header."""

DATA = pattern(4096)
REGION = RegionID(b"r" * 16)


def reply(header: list[Any], payload: bytes = b"") -> bytes:
    return wire.frame(header, len(payload)) + payload


class Provider:
    """Answers pings, and anything else as *answer* says; counts the connections."""

    def __init__(self, listener: socket.socket, answer: Answer) -> None:
        self.connections = 0
        self.address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        self._listener = listener
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                self.connections += 1
                with accepted, contextlib.suppress(EOFError, ConnectionError):
                    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    peer = RawPeer(accepted)
                    while True:
                        header = peer.reply()
                        if header[2] == "ping":
                            peer.send([header[0], None])
                            continue
                        for piece in self._answer(header):
                            accepted.sendall(piece)
                            time.sleep(0.01)  # so that it comes by itself

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)


@contextlib.contextmanager
def providing(answer: Answer) -> Iterator[Provider]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        provider = Provider(listener, answer)
        try:
            yield provider
        finally:
            provider.close()


@contextlib.contextmanager
def answering(answer: Answer, timeout: float = PATIENCE) -> Iterator[tuple[TargetHandle, Provider]]:
    with (
        providing(answer) as provider,
        Engine("tcp", client, config={"timeout": timeout}) as engine,
    ):
        yield Client(engine).make_target_handle(provider.address, 1), provider


def usual(header: Any) -> bytes:
    number, _, _, (_, _, size, eager, _), _ = header
    return reply([number, None, DATA[:size]]) if eager else reply([number, None], DATA[:size])


def in_pieces(cut: int) -> Answer:
    return lambda header: [usual(header)[:cut], usual(header)[cut:]]


@pytest.mark.parametrize("size", [0, 100, 4096])
@pytest.mark.parametrize(
    "answer",
    [
        lambda header: [usual(header)],
        in_pieces(3),
        in_pieces(14),
        in_pieces(-1),
        lambda header: [reply([99, None]) + usual(header)],
        lambda header: [reply([99, None], b"not for you") + usual(header)],
        lambda header: [usual(header) + reply([99, None], DATA)],
        lambda header: [usual(header) + reply([99, None], DATA)[:20], reply([99, None], DATA)[20:]],
    ],
)
def test_a_reply_is_read_however_it_is_split(answer: Answer, size: int) -> None:
    with answering(answer) as (target, provider):
        for _ in range(3):
            place = bytearray(size)
            target.read_into(REGION, 0, place)
            assert place == DATA[:size]
        assert provider.connections == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda n: reply([n, None, None, ["bounds", "beyond", 0]]), errors.OutOfBounds),
        (lambda n: reply([n, None], DATA[:-1]), errors.ProtocolError),
        (lambda n: reply([n, None], DATA + b"x"), errors.ProtocolError),
        (lambda n: reply([n, None]), errors.ProtocolError),
        (lambda n: reply([n, None, DATA + b"x"]), errors.ProtocolError),
        (lambda n: reply([n, None, None, None, None], DATA), errors.ProtocolError),
        (lambda n: reply([float(n), None], DATA), errors.ProtocolError),
        (lambda n: reply([[n], None], DATA), errors.ProtocolError),
        (lambda n: reply([n], DATA), errors.ProtocolError),
        (lambda n: b"\xff" * 5000, errors.ProtocolError),
    ],
)
def test_another_reply_leaves_the_buffer_alone(
    answer: Callable[[int], bytes], error: type[errors.Exception]
) -> None:
    place = bytearray(4096)
    with answering(lambda header: [answer(header[0])]) as (target, _):
        with pytest.raises(error):
            target.read_into(REGION, 0, place)
        assert place == bytes(4096)


async def test_a_trio_client_reports_an_invalid_reply() -> None:
    with (
        providing(lambda header: [reply([header[0], None])]) as provider,
        pytest.raises(errors.ProtocolError, match="without payload"),
    ):
        async with warabi.aio.connect(provider.address, 1) as target:
            await target.read_into(REGION, 0, bytearray(4096))


@pytest.mark.parametrize(
    ("value", "error"),
    [(b"r" * 16, None), (b"short", errors.ProtocolError), (None, errors.ProtocolError)],
)
def test_values_are_checked(value: Any, error: type[errors.Exception] | None) -> None:
    with answering(lambda header: [reply([header[0], value])]) as (target, _):
        if error is None:
            assert target.create(5) == REGION
        else:
            with pytest.raises(error):
                target.create(5)


def test_the_reply_to_a_withdrawn_request_is_discarded() -> None:
    """It comes in one piece with nothing else, while the next request waits."""
    kept: list[bytes] = []

    def late(header: Any) -> list[bytes]:
        kept.append(usual(header))
        return [] if len(kept) == 1 else kept[-2:]

    with answering(late, timeout=1.0) as (target, provider):
        given_up = bytearray(4096)
        with pytest.raises(errors.TimedOut):
            target.read_into(REGION, 0, given_up)
        place = bytearray(1000)
        target.read_into(REGION, 0, place)
        assert place == DATA[:1000]
        assert given_up == bytes(4096)
        assert provider.connections == 1


class Interrupted(BaseException):
    pass


def test_after_a_call_that_was_interrupted_the_next_one_succeeds() -> None:
    """Wherever: signals are handled where functions begin, and each of them is tried."""
    left = 0  # functions to begin before the interruption

    def interrupt(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        if event == "call" and "/warabi/" in frame.f_code.co_filename:
            left -= 1
            if left == 0:
                raise Interrupted

    with answering(lambda header: [usual(header)]) as (target, _):
        for step in itertools.count(1):
            left = step
            before = sys.gettrace()
            sys.settrace(interrupt)
            try:
                target.read_into(REGION, 0, bytearray(4096))
                break
            except Interrupted:
                pass
            finally:
                sys.settrace(before)
            place = bytearray(4096)
            target.read_into(REGION, 0, place)
            assert place == DATA
        assert step > 10


def test_threads_that_share_a_connection_get_their_own(tcp_process: Served) -> None:
    with Engine("tcp", client) as engine:
        target = Client(engine).make_target_handle(tcp_process.address, 1)
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                data = pattern(4096, number)
                region = target.create_and_write(data)
                for size in [4096, 100, 0, 3000] * 50:
                    place = bytearray(size)
                    target.read_into(region, 0, place)
                    assert place == data[:size]
                    target.write(region, 0, data[:size])
                    assert target.size(region) == 4096
                target.erase(region)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
