"""The protocol without I/O: bytes in, events out; messages in, bytes out.

Each side opens with ``magic (8) | u32 length | msgpack map`` (:class:`Limits` and a version).
After that come frames, little-endian::

    u32 header length | u64 payload length | msgpack header | payload

Every length is checked against this side's limits before anything is allocated for it.  The
payload is never copied into a header: whoever handles a message says where its payload goes, as a
whole or piece by piece (:meth:`ProtocolConnection.accept_payload`), and the socket is read straight
into that place, which :meth:`ProtocolConnection.buffer` gives out.

What a header means is not known here.
"""

from __future__ import annotations

import enum
import struct
import threading
from dataclasses import asdict, dataclass, fields
from typing import Any

import msgpack

from warabi.errors import ProtocolError
from warabi.protocol.forms import shown

MAGIC = b"\x93WARABI\n"
VERSION = 1
_OPENING = struct.Struct("<8sI")
_PREFIX = struct.Struct("<IQ")
_MAX_OPENING = 4096
_TLS = (b"\x15", b"\x16")  # how an alert and a handshake begin
_MAX_ITEMS = 1024  # in one msgpack array: bounds what a header can make the parser allocate
_BUFFER = 68 * 1024  # a payload of 64 KiB comes whole with its header

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Limits:
    """What one side is ready to receive.

    Attributes:
        header: bytes of a header.
        payload: bytes of a payload; larger transfers are split by the sender.
        requests: requests on one connection that are not answered yet.
    """

    header: int = 1024 * 1024
    payload: int = 4 * 1024 * 1024
    requests: int = 256


class Signal(enum.Enum):
    """Events without content."""

    NEED_DATA = enum.auto()
    PLACE_FULL = enum.auto()
    PAYLOAD_DONE = enum.auto()


NEED_DATA = Signal.NEED_DATA
PLACE_FULL = Signal.PLACE_FULL
PAYLOAD_DONE = Signal.PAYLOAD_DONE


@dataclass(frozen=True, slots=True)
class OpeningReceived:
    """The peer's opening arrived.

    Attributes:
        limits: the peer's.
        content: all that it says, known here or not.
        raw: its bytes.
    """

    limits: Limits
    content: dict[str, Any]
    raw: bytes


@dataclass(slots=True)
class Message:
    """A header arrived; *payload* bytes follow it, for which a place must be given."""

    header: Any
    payload: int


Event = Signal | OpeningReceived | Message


class _State(enum.Enum):
    OPENING = enum.auto()
    PREFIX = enum.auto()
    HEADER = enum.auto()
    PLACE = enum.auto()  # the next bytes are a payload's, whose place is not known
    PAYLOAD = enum.auto()
    FAILED = enum.auto()


# To name them so costs a tenth of what it does by their class.
_AT_OPENING, _AT_PREFIX, _AT_HEADER, _AT_PLACE, _AT_PAYLOAD, _FAILED = _State


class _Packers(threading.local):
    """One for each thread: to make one takes longer than to use it."""

    def __init__(self) -> None:
        self.pack = msgpack.Packer(use_bin_type=True, unicode_errors="surrogateescape").pack


_packers = _Packers()


def pack(header: Any) -> bytes:
    """*header* as msgpack; text that came from file names keeps its undecodable bytes.

    Raises:
        ProtocolError: it has a number of more than 64 bits, or text that is none.
    """
    try:
        packed: bytes = _packers.pack(header)
    except (OverflowError, UnicodeError) as error:
        raise ProtocolError(f"a value cannot be sent: {error}") from None
    return packed


def unpack(data: Buffer) -> Any:
    """One msgpack object, of bounded shape.

    Raises:
        ProtocolError: malformed, nested too deeply, or arrays too long.
    """
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            unicode_errors="surrogateescape",
            max_array_len=_MAX_ITEMS,
            max_map_len=64,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"malformed header: {error or type(error).__name__}") from None


def opening(limits: Limits, more: dict[str, Any] | None = None) -> bytes:
    """The first bytes that a side sends; a peer that does not know what is in *more* skips it."""
    body = pack({"version": VERSION, **asdict(limits), **(more or {})})
    return _OPENING.pack(MAGIC, len(body)) + body


def frame(header: Any, payload: int = 0, limits: Limits | None = None) -> bytes:
    """The bytes that go before a payload of *payload* bytes.

    Raises:
        ProtocolError: the header is larger than *limits*, the receiver's, allow, or an array
            in it longer than any receiver takes.
    """
    body = pack(header)
    if limits is not None:
        if len(body) > limits.header:
            raise ProtocolError(f"a header of {len(body)} bytes, the limit is {limits.header}")
        if len(body) > _MAX_ITEMS:  # each item takes a byte at least
            for item in header:
                if isinstance(item, list) and len(item) > _MAX_ITEMS:
                    raise ProtocolError(f"an array of {len(item)} items, the limit is {_MAX_ITEMS}")
    return _PREFIX.pack(len(body), payload) + body


class ProtocolConnection:
    """What one side has received so far.

    A loop around it is::

        event = connection.next_event()
        if event is NEED_DATA:
            connection.received(socket.recv_into(connection.buffer()))

    Args:
        limits: what this side is ready to receive.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._state = _AT_OPENING
        self._store = bytearray(_BUFFER)
        self._view = memoryview(self._store)
        self._start = 0  # of the bytes received and not used yet
        self._end = 0
        self._need = 0  # bytes of the opening or header to come
        self._left = 0  # bytes of the payload to come
        self._place: memoryview | None = None
        self._direct = False

    def buffer(self) -> memoryview:
        """Where the next bytes from the peer belong; never empty."""
        self._direct = False
        if self._state is _AT_PAYLOAD and self._start == self._end and self._place is not None:
            self._direct = True
            return self._place
        if self._start == self._end:
            self._start = self._end = 0
        need = self._need if self._state in (_AT_OPENING, _AT_HEADER) else _PREFIX.size
        if self._start and self._start + need > len(self._store):
            self._move(self._store)
        if need > len(self._store):
            self._move(bytearray(need))
        if self._end == len(self._store):
            self._move(bytearray(2 * len(self._store)) if not self._start else self._store)
        return self._view[self._end :]

    def _move(self, store: bytearray) -> None:
        """Bring the unused bytes to the front of *store*."""
        count = self._end - self._start
        store[:count] = self._store[self._start : self._end]
        self._store, self._view = store, memoryview(store)
        self._start, self._end = 0, count

    def vacant(self) -> memoryview | None:
        """As :meth:`buffer`, if a message is about to begin there, for :meth:`whole`; else None."""
        if self._start != self._end or self._state is not _AT_PREFIX:
            return None
        self._direct = False
        self._start = self._end = 0
        return self._view

    def whole(self, count: int) -> tuple[Any, memoryview] | None:
        """The header and the payload of the message that *count* bytes are, which were put at the
        front of :meth:`vacant`; None when they are not just one message.

        It stands for :meth:`received` and the events that follow: a short way for what is most
        likely, which leaves everything else to them.  The payload is valid until more is received.
        """
        if count < _PREFIX.size:
            return None
        need, left = _PREFIX.unpack_from(self._store)
        start = _PREFIX.size + need
        if start + left != count or need > self.limits.header or left > self.limits.payload:
            return None
        try:
            return unpack(self._view[_PREFIX.size : start]), self._view[start:count]
        except ProtocolError:
            return None

    def received(self, count: int) -> None:
        """*count* bytes were put at the front of the last :meth:`buffer`.

        Raises:
            ProtocolError: *count* is 0, the peer's end, in the middle of something.
        """
        if count == 0:
            raise ProtocolError("the peer closed the connection in the middle of a message")
        if self._direct and self._place is not None:
            self._place = self._place[count:]
            self._left -= count
        else:
            self._end += count

    @property
    def between_messages(self) -> bool:
        """Whether the peer may close now without leaving something half said."""
        return self._state in (_AT_PREFIX, _AT_OPENING) and self._start == self._end

    def next_event(self) -> Event:
        """The next event in what was received.

        Raises:
            ProtocolError: the peer broke a rule; so does every later call.
        """
        if self._start == self._end and self._state is _AT_PREFIX:
            return NEED_DATA
        try:
            return self._next_event()
        except ProtocolError:
            self._state = _FAILED
            raise

    def _next_event(self) -> Event:
        if self._state is _AT_PREFIX:
            if self._end - self._start < _PREFIX.size:
                return NEED_DATA
            self._need, self._left = _PREFIX.unpack_from(self._store, self._start)
            self._start += _PREFIX.size
            if self._need > self.limits.header:
                raise ProtocolError(
                    f"a header of {self._need} bytes, the limit is {self.limits.header}"
                )
            if self._left > self.limits.payload:
                raise ProtocolError(
                    f"a payload of {self._left} bytes, the limit is {self.limits.payload}"
                )
            self._state = _AT_HEADER
        if self._state is _AT_HEADER:
            if self._end - self._start < self._need:
                return NEED_DATA
            header = unpack(self._view[self._start : self._start + self._need])
            self._start += self._need
            self._state = _AT_PLACE if self._left else _AT_PREFIX
            return Message(header, self._left)
        if self._state is _AT_PAYLOAD:
            return self._take_payload()
        if self._state is _AT_OPENING:
            return self._take_opening()
        if self._state is _AT_PLACE:
            raise RuntimeError("accept_payload() has to be called before the next event")
        raise ProtocolError("the connection failed before")

    def _take_opening(self) -> Event:
        have = self._end - self._start
        seen = bytes(self._view[self._start : self._start + min(have, len(MAGIC))])
        if not MAGIC.startswith(seen):
            hint = ", as TLS does" if seen[:1] in _TLS else ""
            raise ProtocolError(f"the peer speaks another protocol (it began with {seen!r}{hint})")
        if have < _OPENING.size:
            return NEED_DATA
        length = _OPENING.unpack_from(self._store, self._start)[1]
        if length > _MAX_OPENING:
            raise ProtocolError(f"an opening of {length} bytes, the limit is {_MAX_OPENING}")
        self._need = _OPENING.size + length
        if have < self._need:
            return NEED_DATA
        raw = bytes(self._view[self._start : self._start + self._need])
        content = unpack(raw[_OPENING.size :])
        self._start += self._need
        self._state = _AT_PREFIX
        if not isinstance(content, dict) or content.get("version") != VERSION:
            version = content.get("version") if isinstance(content, dict) else content
            raise ProtocolError(f"the peer speaks version {shown(version)}, this side {VERSION}")
        values = {}
        for field in fields(Limits):
            value = content.get(field.name)
            if type(value) is not int or value < 1:
                raise ProtocolError(f"the peer's limit {field.name!r} is {shown(value)}")
            values[field.name] = value
        return OpeningReceived(Limits(**values), content, raw)

    def accept_payload(self, place: memoryview | None) -> None:
        """Give the last message's payload a place: a flat view, or None to drop it.

        A view that is smaller takes the next bytes of the payload; ``PLACE_FULL`` then asks for
        the next one.
        """
        if self._state is not _AT_PLACE:
            raise RuntimeError("no payload waits for a place")
        if place is not None and not 0 < len(place) <= self._left:
            raise ValueError(f"a payload of {self._left} bytes, a place of {len(place)}")
        self._place = place
        self._state = _AT_PAYLOAD

    def arrived(self) -> memoryview:
        """The bytes of the payload that came with its header; valid until more is received."""
        if self._state is not _AT_PLACE:
            raise RuntimeError("no payload waits for a place")
        return self._view[self._start : min(self._end, self._start + self._left)]

    def skip(self, count: int) -> None:
        """*count* bytes of :meth:`arrived` need no place any more."""
        self._start += count
        self._left -= count
        if not self._left:
            self._state = _AT_PREFIX

    def take_back(self) -> int:
        """The place of a payload that is arriving is no longer valid, and the rest needs another.

        Returns how many bytes of it are still empty.
        """
        if self._state is not _AT_PAYLOAD or self._place is None:
            raise RuntimeError("no payload is arriving")
        empty = len(self._place)
        self._place = None
        self._direct = False
        self._state = _AT_PLACE
        return empty

    def drop_payload(self) -> None:
        """Let what is still to come of the payload go nowhere: its place is no longer valid."""
        self._place = None
        self._direct = False

    def _take_payload(self) -> Event:
        count = min(self._end - self._start, self._left)
        if self._place is not None:
            count = min(count, len(self._place))
        if count:
            if self._place is not None:
                self._place[:count] = self._view[self._start : self._start + count]
                self._place = self._place[count:]
            self._start += count
            self._left -= count
        if self._left:
            if self._place is None or self._place:
                return NEED_DATA
            self._state = _AT_PLACE
            return PLACE_FULL
        self._place = None
        self._state = _AT_PREFIX
        return PAYLOAD_DONE
