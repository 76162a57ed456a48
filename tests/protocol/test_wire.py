"""The protocol without I/O: every split, every limit, and garbage."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from warabi.errors import ProtocolError
from warabi.protocol import wire
from warabi.protocol.wire import (
    NEED_DATA,
    PAYLOAD_DONE,
    Limits,
    Message,
    OpeningReceived,
    ProtocolConnection,
)

OPENING = wire.opening(Limits())
PREFIX = struct.Struct("<IQ")
STREAM_MESSAGES: list[tuple[Any, bytes]] = [
    ([1, 2, "write", [b"x" * 16, 0], None], b"payload"),
    ([2], b""),
    ({"a": "ü\udcff"}, b"\x93WARABI\n" * 3),
    (None, b""),
    ([3, b"\0" * 100], b"z"),
]
STREAM = OPENING + b"".join(
    wire.frame(header, len(payload)) + payload for header, payload in STREAM_MESSAGES
)
SMALL = Limits(header=1000, payload=5000, requests=3)


class Receiver:
    """Feeds a connection and keeps what comes out; *place* says where each payload goes."""

    def __init__(self, limits: Limits | None = None, places: Iterator[str] | None = None) -> None:
        self.connection = ProtocolConnection(limits or Limits())
        self.places = places
        self.opened: list[Limits] = []
        self.messages: list[tuple[Any, bytes | None]] = []
        self._place: bytearray | None = None
        self._header: Any = None
        self._drop = False

    def feed(self, data: bytes) -> None:
        while data:
            self._take_events()
            buffer = self.connection.buffer()
            assert len(buffer) > 0
            count = min(len(buffer), len(data))
            buffer[:count] = data[:count]
            self.connection.received(count)
            data = data[count:]
            if self._drop:  # some of the payload is there, or all of it
                self.connection.drop_payload()
                self._drop, self._place = False, None
        self._take_events()

    def _take_events(self) -> None:
        while (event := self.connection.next_event()) is not NEED_DATA:
            if isinstance(event, OpeningReceived):
                self.opened.append(event.limits)
            elif isinstance(event, Message) and event.payload:
                self._start_payload(event)
            elif isinstance(event, Message):
                self.messages.append((event.header, b""))
            else:
                assert event is PAYLOAD_DONE
                place = None if self._place is None else bytes(self._place)
                self.messages.append((self._header, place))

    def _start_payload(self, message: Message) -> None:
        choice = next(self.places) if self.places else "take"
        self._header = message.header
        self._place = None if choice == "none" else bytearray(message.payload)
        self._drop = choice == "drop"
        self.connection.accept_payload(None if self._place is None else memoryview(self._place))


def test_byte_by_byte() -> None:
    receiver = Receiver()
    for i in range(len(STREAM)):
        receiver.feed(STREAM[i : i + 1])
    assert receiver.opened == [Limits()]
    assert receiver.messages == STREAM_MESSAGES
    assert receiver.connection.between_messages


def test_every_split() -> None:
    for first in range(len(STREAM) + 1):
        for second in range(first, len(STREAM) + 1, 7):
            receiver = Receiver()
            for part in (STREAM[:first], STREAM[first:second], STREAM[second:]):
                receiver.feed(part)
            assert receiver.messages == STREAM_MESSAGES


def test_end_is_legal_between_messages_only() -> None:
    ends = {0, len(OPENING)}
    position = len(OPENING)
    for header, payload in STREAM_MESSAGES:
        position += len(wire.frame(header, len(payload))) + len(payload)
        ends.add(position)
    for end in range(len(STREAM) + 1):
        receiver = Receiver()
        receiver.feed(STREAM[:end])
        assert receiver.connection.between_messages == (end in ends)
        with pytest.raises(ProtocolError, match="middle of a message"):
            receiver.connection.received(0)


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=10,
)


@given(
    messages=st.lists(st.tuples(HEADERS, st.binary(max_size=300)), max_size=8),
    places=st.lists(st.sampled_from(["take", "none", "drop"]), min_size=8, max_size=8),
    seed=st.integers(0, 1 << 32),
    largest=st.integers(1, 400),
)
def test_round_trip_with_any_chunks_and_places(
    messages: list[tuple[Any, bytes]], places: list[str], seed: int, largest: int
) -> None:
    stream = OPENING + b"".join(wire.frame(h, len(p)) + p for h, p in messages)
    chunks = random.Random(seed)
    receiver = Receiver(places=iter(places))
    while stream:
        count = chunks.randint(1, largest)
        receiver.feed(stream[:count])
        stream = stream[count:]
    assert [header for header, _ in receiver.messages] == [header for header, _ in messages]
    for (_, got), (_, sent) in zip(receiver.messages, messages, strict=True):
        assert got is None or got == sent
    taken = [got for _, got in receiver.messages if got is not None]
    assert len(taken) >= len(messages) - sum(place != "take" for place in places)


def test_payload_goes_straight_into_its_place() -> None:
    connection = ProtocolConnection(Limits())
    _feed(connection, OPENING)
    assert isinstance(connection.next_event(), OpeningReceived)
    _feed(connection, wire.frame(["x"], 1000) + b"ab")
    assert connection.next_event() == Message(["x"], 1000)
    place = bytearray(1000)
    connection.accept_payload(memoryview(place))
    assert connection.next_event() is NEED_DATA
    buffer = connection.buffer()
    assert len(buffer) == 998
    buffer[:] = b"c" * 998
    assert place == b"ab" + b"c" * 998
    connection.received(998)
    assert connection.next_event() is PAYLOAD_DONE


def test_wrong_use_is_refused() -> None:
    connection = ProtocolConnection(Limits())
    with pytest.raises(RuntimeError):
        connection.accept_payload(None)
    _feed(connection, OPENING + wire.frame(["x"], 10))
    connection.next_event()
    connection.next_event()
    with pytest.raises(RuntimeError):
        connection.next_event()
    with pytest.raises(ValueError, match="a buffer of 11"):
        connection.accept_payload(memoryview(bytearray(11)))


def _feed(connection: ProtocolConnection, data: bytes) -> None:
    while data:
        buffer = connection.buffer()
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        connection.received(count)
        data = data[count:]


def _opening(body: Any, *, magic: bytes = wire.MAGIC, length: int | None = None) -> bytes:
    packed = body if isinstance(body, bytes) else msgpack.packb(body)
    return magic + struct.pack("<I", len(packed) if length is None else length) + packed


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "another protocol"),
        (b"G", "another protocol"),
        (b"\x16\x03\x01\x02\x00\x01", "another protocol"),
        (b"\x93WARABX", "another protocol"),
        (b"\0" * 100, "another protocol"),
        (_opening({"version": 2, **asdict(Limits())}), "version 2"),
        (_opening({"version": "1", **asdict(Limits())}), "version '1'"),
        (_opening({**asdict(Limits())}), "version None"),
        (_opening([1, 2]), "version"),
        (_opening(None), "version"),
        (_opening({"version": 1}), "limit 'header'"),
        (_opening({"version": 1, **asdict(Limits()), "payload": -1}), "limit 'payload'"),
        (_opening({"version": 1, **asdict(Limits()), "payload": 0}), "limit 'payload'"),
        (_opening({"version": 1, **asdict(Limits()), "payload": 1.5}), "limit 'payload'"),
        (_opening({"version": 1, **asdict(Limits()), "requests": True}), "limit 'requests'"),
        (_opening(b"\xc1"), "malformed"),
        (_opening(b""), "malformed"),
        (_opening(b"\x80\x80"), "malformed"),
        (_opening({}, length=4097), "4097 bytes, the limit is 4096"),
        (_opening({}, length=(1 << 32) - 1), "4294967295 bytes"),
    ],
)
def test_wrong_openings(data: bytes, message: str) -> None:
    for step in (1, len(data)):
        receiver = Receiver()
        with pytest.raises(ProtocolError, match=message):
            for i in range(0, len(data), step):
                receiver.feed(data[i : i + step])
        with pytest.raises(ProtocolError):
            receiver.connection.next_event()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\xc0\xc0",
        b"\x91",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x00",
        b"\xdc\x20\x00" + b"\xc0" * 0x2000,
        b"\x81\xc0\xc0",
        b"\x81\x90\xc0",
        b"\xd4\x01\x00",
        b"\xd6\xff\x00\x00\x00\x00",
        b"\xc7\x00\xff",
        b"\x91" * 100_000,
        b"\x81\xa1a" * 100_000,
        b"\x91" * 1_000_000 + b"\xc0",
    ],
    ids=lambda body: f"{len(body)}-{body[:8].hex()}",
)
def test_malformed_headers(body: bytes) -> None:
    receiver = Receiver()
    receiver.feed(OPENING)
    with pytest.raises(ProtocolError, match="malformed"):
        receiver.feed(PREFIX.pack(len(body), 0) + body)
    assert receiver.messages == []


@pytest.mark.parametrize(
    ("header", "payload", "message"),
    [
        (1001, 0, "header of 1001 bytes, the limit is 1000"),
        ((1 << 32) - 1, 0, "header of 4294967295"),
        (1, 5001, "payload of 5001 bytes, the limit is 5000"),
        (1, 1 << 63, "payload of 9223372036854775808"),
        (1, (1 << 64) - 1, "payload of 18446744073709551615"),
    ],
)
def test_limits_hold_before_anything_is_allocated(header: int, payload: int, message: str) -> None:
    receiver = Receiver(SMALL)
    receiver.feed(OPENING)
    with _peak_below(100_000), pytest.raises(ProtocolError, match=message):
        receiver.feed(PREFIX.pack(header, payload))
    assert receiver.messages == []


@contextlib.contextmanager
def _peak_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def test_what_is_within_the_limits_passes() -> None:
    body = msgpack.packb(b"x" * (SMALL.header - 3))
    assert len(body) == SMALL.header
    receiver = Receiver(SMALL)
    receiver.feed(OPENING + PREFIX.pack(len(body), SMALL.payload) + body + bytes(SMALL.payload))
    assert receiver.messages == [(b"x" * (SMALL.header - 3), bytes(SMALL.payload))]


def test_a_small_header_cannot_claim_much_memory() -> None:
    """Nested arrays that claim to be long: the parser allocates for claims, not for content."""
    for claim in (b"\xdc\x10\x00", b"\xdd\x00\x00\x10\x00", b"\xde\x00\x40"):
        with _peak_below(16 << 20), pytest.raises(ProtocolError):
            wire.unpack(claim * 1000)


def test_buffer_stays_bounded() -> None:
    """However much arrives, and in whatever pieces, no more than a message's header is kept."""
    receiver = Receiver(places=iter(lambda: "none", ""))
    stream = b"".join(wire.frame(["x" * 10_000], 3000) + bytes(3000) for _ in range(20))
    with _peak_below(4 << 20):
        receiver.feed(OPENING)
        for _ in range(30):
            receiver.feed(stream)
            receiver.messages.clear()


def test_frame_refuses_what_the_peer_would() -> None:
    with pytest.raises(ProtocolError, match="the limit is 1000"):
        wire.frame(["x" * 1000], 0, SMALL)
    assert wire.frame(["x" * 900], 0, SMALL)


@given(data=st.binary(max_size=2000), opened=st.booleans(), step=st.integers(1, 500))
@example(data=b"\xff" * 100, opened=True, step=1)
def test_garbage_gives_protocol_errors_only(data: bytes, opened: bool, step: int) -> None:
    receiver = Receiver(SMALL)
    if opened:
        receiver.feed(OPENING)
    with contextlib.suppress(ProtocolError):
        for i in range(0, len(data), step):
            receiver.feed(data[i : i + step])


@given(
    changes=st.lists(st.tuples(st.integers(0, len(STREAM) - 1), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, len(STREAM)),
    inserted=st.binary(max_size=20),
    step=st.integers(1, 100),
)
def test_mutated_streams_give_protocol_errors_only(
    changes: list[tuple[int, int]], cut: int, inserted: bytes, step: int
) -> None:
    stream = bytearray(STREAM)
    for position, value in changes:
        stream[position] = value
    stream[cut:cut] = inserted
    receiver = Receiver()
    with contextlib.suppress(ProtocolError):
        for i in range(0, len(stream), step):
            receiver.feed(bytes(stream[i : i + step]))


@given(body=st.binary(max_size=300))
def test_unpack_gives_protocol_errors_only(body: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        wire.unpack(body)


def test_a_payload_may_be_used_where_it_came_and_its_place_taken_back() -> None:
    connection = ProtocolConnection(Limits())
    payload = bytes(range(200)) * 10
    stream = OPENING + wire.frame([1], len(payload)) + payload + wire.frame([2])

    def feed(count: int) -> None:
        nonlocal stream
        buffer = connection.buffer()
        count = min(count, len(buffer), len(stream))
        buffer[:count] = stream[:count]
        connection.received(count)
        stream = stream[count:]

    feed(len(OPENING))
    assert isinstance(connection.next_event(), OpeningReceived)
    feed(len(wire.frame([1], len(payload))) + 500)
    assert connection.next_event() == Message([1], len(payload))
    found = bytearray(connection.arrived())
    assert found == payload[:500]
    connection.skip(500)
    assert len(connection.arrived()) == 0
    place = memoryview(bytearray(1000))
    connection.accept_payload(place)
    assert connection.next_event() is NEED_DATA
    feed(300)
    assert connection.next_event() is NEED_DATA
    assert connection.take_back() == 700
    found += place[:300]
    with pytest.raises(RuntimeError):
        connection.take_back()
    feed(10)  # as long as there is no place, to where headers go
    assert connection.arrived() == payload[800:810]
    rest = memoryview(bytearray(1200))
    connection.accept_payload(rest)
    while (event := connection.next_event()) is NEED_DATA:
        feed(400)
    assert event is PAYLOAD_DONE
    assert found + rest == payload
    while (event := connection.next_event()) is NEED_DATA:
        feed(400)
    assert event == Message([2], 0)


def test_a_payload_that_came_whole_with_its_header() -> None:
    connection = ProtocolConnection(Limits())
    data = OPENING + wire.frame([1], 300) + b"p" * 300 + wire.frame([2])
    connection.buffer()[: len(data)] = data
    connection.received(len(data))
    assert isinstance(connection.next_event(), OpeningReceived)
    assert connection.next_event() == Message([1], 300)
    assert connection.arrived() == b"p" * 300
    connection.skip(300)
    assert connection.next_event() == Message([2], 0)
    with pytest.raises(RuntimeError):
        connection.arrived()


def _expecting(limits: Limits) -> ProtocolConnection:
    """A connection between two messages."""
    connection = ProtocolConnection(limits)
    _feed(connection, OPENING)
    assert isinstance(connection.next_event(), OpeningReceived)
    return connection


@given(
    messages=st.lists(
        st.tuples(
            st.one_of(st.none(), st.lists(st.one_of(st.integers(0, 1 << 40), st.binary()))),
            st.binary(max_size=100),
        ),
        min_size=1,
        max_size=2,
    ),
    cut=st.one_of(st.just(0), st.integers(0, 300)),
    change=st.one_of(st.none(), st.tuples(st.integers(0, 40), st.integers(0, 255))),
    limits=st.sampled_from([Limits(), Limits(header=20), Limits(payload=50)]),
)
def test_the_short_way_takes_what_the_long_one_would(
    messages: list[tuple[Any, bytes]],
    cut: int,
    change: tuple[int, int] | None,
    limits: Limits,
) -> None:
    """Whatever comes: a message as a whole is found, or nothing is and the long way goes on."""
    data = bytearray()
    for header, payload in messages:
        data += wire.frame(header, len(payload)) + payload
    del data[len(data) - cut :]
    if change is not None and change[0] < len(data):
        data[change[0]] = change[1]

    expected: tuple[Any, bytes] | None = None
    connection = _expecting(limits)
    _feed(connection, bytes(data))
    with contextlib.suppress(ProtocolError):
        event = connection.next_event()
        if isinstance(event, Message):
            place = bytearray(event.payload)
            whole = not event.payload
            if event.payload:
                connection.accept_payload(memoryview(place))
                whole = connection.next_event() is PAYLOAD_DONE
            if whole and connection.between_messages:
                expected = event.header, bytes(place)

    connection = _expecting(limits)
    place_of_message = connection.vacant()
    assert place_of_message is not None
    place_of_message[: len(data)] = data
    found = connection.whole(len(data))
    assert (found and (found[0], bytes(found[1]))) == expected
    if found is None and data:
        connection.received(len(data))
        assert connection.vacant() is None or not data


def test_the_short_way_begins_between_messages_only() -> None:
    connection = ProtocolConnection(Limits())
    assert connection.vacant() is None
    connection = _expecting(Limits())
    _feed(connection, STREAM[len(OPENING) :][:5])
    assert connection.next_event() is NEED_DATA
    assert connection.vacant() is None
