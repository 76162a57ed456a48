"""Every operation with every kind of wrong or extreme argument is answered, or its connection ends.

Over real sockets.  A second client goes on working, no defect is logged, and the provider's event
loop is not held.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.protocol.test_provider_protocol import Bystander
from tests.support.helpers import MEMORY, RawPeer, file_config, raw_connection
from tests.support.loops import Hold, check_not_held, watched_loops
from warabi.engine import Engine
from warabi.protocol import forms, wire
from warabi.protocol.operations import OPERATIONS, Operation, Payload
from warabi.server import Provider

_NESTED: Any = []
for _ in range(500):
    _NESTED = [_NESTED]
LARGE = 900_000  # near the largest header
WRONG: list[Any] = [
    None, True, False, 0, 1, -1, 2, 4096, 1 << 31, 1 << 32, (1 << 62) - 1, (1 << 63) - 1,
    -(1 << 63), (1 << 64) - 1, 0.0, 1.5, float("nan"), float("inf"), -float("inf"),
    b"", b"x", b"\0", bytes(16), b"\xff" * 16, bytes(17), b".", b"..", b"/", b"a/b", bytes(LARGE),
    "", "x", "\0", "/", "..", "/" * LARGE, "x" * LARGE, "\udcff", [], [0], [b""] * 1000, _NESTED,
    {}, {"a": 1}, {"a": _NESTED},
]  # fmt: skip


def valid_arguments(operation: Operation, region: bytes) -> list[Any]:
    """Arguments that the operation takes."""
    values = {
        forms.REGION: region, forms.INTEGER: 1, forms.OPTIONAL_INTEGER: None, forms.FLAG: False,
        forms.BYTES: b"", forms.TEXT: "x",
    }  # fmt: skip
    return [values[form] for form in operation.forms]


def _requests(operation: Operation, region: bytes) -> Iterator[Any]:
    yield from ([], None, {}, 5, b"", _NESTED, [_NESTED] * 3)
    valid = valid_arguments(operation, region)
    yield valid
    yield [*valid, None]
    for place in range(len(valid)):
        for value in WRONG:
            yield [*valid[:place], value, *valid[place + 1 :]]


class Place(NamedTuple):
    """Where a provider is, and what has held its loop."""

    address: str
    held: list[Hold]


@pytest.fixture(params=["na+sm memory", "tcp memory", "na+sm file"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[Place]:
    """A provider whose loop is watched and that somebody else uses, too."""
    transport, backend = request.param.split()
    config = MEMORY if backend == "memory" else file_config(tmp_path / "t")
    with watched_loops() as held, Engine(transport) as engine, Provider(engine, 1, config):
        bystander = Bystander(str(engine.addr()), 1)
        try:
            yield Place(str(engine.addr()), held)
            bystander.goes_on()
        finally:
            bystander.close()
    assert [one for one in caplog.records if one.levelno >= logging.ERROR] == []


def test_every_operation_with_every_kind_of_argument(place: Place) -> None:
    with raw_connection(place.address) as connection:
        peer = RawPeer(connection)
        region = peer.call([1, 1, "create", [100], None])[1]
        for name, operation in OPERATIONS.items():
            requests = [one for one in _requests(operation, region) if not _waits(name, one)]
            for batch in (requests[i : i + 32] for i in range(0, len(requests), 32)):
                upload = operation.payload is Payload.UPLOAD
                check_not_held(place.held, partial(_check, peer, name, batch, upload))
        assert peer.call([0, 1, "ping", [], None]) == [0, None]


def _waits(name: str, arguments: Any) -> bool:
    """Whether it is answered when something happens."""
    if name == "lock" and isinstance(arguments, list) and arguments and arguments[-1]:
        return True  # for another owner
    match arguments:
        case [int() as number, bool()]:
            return name == "watch" and -(1 << 63) <= number < 1 << 63
    return False


def _check(peer: RawPeer, name: str, batch: list[Any], upload: bool) -> None:
    for number, arguments in enumerate(batch):
        peer.send([number, 1, name, arguments, b"data" if upload and number % 2 else None])
    replies = [peer.reply() for _ in batch]
    assert sorted(reply[0] for reply in replies) == list(range(len(batch)))
    for reply in replies:
        assert len(reply) in (2, 3, 4)
        if len(reply) == 4:
            code, text, _ = reply[3]
            assert code != "failed", (text, forms.shown(batch[reply[0]]))


@pytest.mark.parametrize("begin", [b"\x91", b"\x81\xa1a", b"\x95\x01\x01\xa4size\x91"])
def test_headers_nested_to_any_depth(
    place: Place, begin: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for depth in (10, 300, 600, 1000, 5000, 200_000):
        header = begin + b"\x91" * depth + b"\xc0" + b"\xc0" * (begin[0] == 0x95)
        check_not_held(place.held, partial(_check_refused, place.address, header, caplog))


def _check_refused(address: str, header: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """It ends the connection, with one line in the log, or fails the request."""
    with raw_connection(address) as connection:
        peer = RawPeer(connection)
        caplog.clear()
        connection.sendall(wire._PREFIX.pack(len(header), 0) + header)
        reply = peer.reply()
        assert reply[3][0] == "protocol"
        assert len(reply[3][1]) < 200
        if reply[0] == 0:
            assert peer.closed()
            assert len(caplog.records) == 1
