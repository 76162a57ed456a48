"""The wire protocol without I/O: bytes in, events out; messages in, bytes out.

Each side opens with ``magic (8) | u32 length | msgpack map`` (:class:`Limits` and a version).
After that come frames, little-endian::

    u32 header length | u64 payload length | msgpack header | payload

Every length is checked against this side's limits before anything is allocated for it.  The
payload is never copied into a header: the handler of a message provides the buffer for the payload,
as a whole or in chunks (:meth:`ProtocolConnection.accept_payload`), and the socket is read directly
into that buffer, which :meth:`ProtocolConnection.buffer` returns.

The meaning of headers is defined elsewhere.
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
_TLS = (b"\x15", b"\x16")  # first bytes of a TLS alert and a handshake
_MAX_ITEMS = 1024  # most items of a msgpack array; bounds what a header makes the parser allocate
_BUFFER = 68 * 1024  # fits a header with a payload of 64 KiB

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Limits:
    """What one side accepts.

    Attributes:
        header: most bytes of a header.
        payload: most bytes of a payload; the sender splits larger transfers.
        requests: most pending requests on one connection.
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
        limits: the peer's limits.
        content: all its keys, known or not.
        raw: its bytes.
    """

    limits: Limits
    content: dict[str, Any]
    raw: bytes


@dataclass(slots=True)
class Message:
    """A header arrived; a buffer must be provided for the *payload* bytes that follow it."""

    header: Any
    payload: int


Event = Signal | OpeningReceived | Message


class _State(enum.Enum):
    OPENING = enum.auto()
    PREFIX = enum.auto()
    HEADER = enum.auto()
    PLACE = enum.auto()  # the next bytes are payload without a buffer
    PAYLOAD = enum.auto()
    FAILED = enum.auto()


# Module globals, since an attribute lookup of the class takes ten times as long.
_AT_OPENING, _AT_PREFIX, _AT_HEADER, _AT_PLACE, _AT_PAYLOAD, _FAILED = _State


class _Packers(threading.local):
    """One packer per thread: creating one takes longer than using it."""

    def __init__(self) -> None:
        self.pack = msgpack.Packer(use_bin_type=True, unicode_errors="surrogateescape").pack


_packers = _Packers()


def pack(header: Any) -> bytes:
    """Encode *header* as msgpack; undecodable bytes in file names are preserved.

    Raises:
        ProtocolError: it has a number of more than 64 bits, or invalid text.
    """
    try:
        packed: bytes = _packers.pack(header)
    except (OverflowError, UnicodeError) as error:
        raise ProtocolError(f"a value cannot be sent: {error}") from None
    return packed


def unpack(data: Buffer) -> Any:
    """Decode one msgpack object of bounded shape.

    Raises:
        ProtocolError: malformed, nested too deeply, or with too long an array.
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
    """Return the first bytes that a side sends; a peer ignores unknown keys of *more*."""
    body = pack({"version": VERSION, **asdict(limits), **(more or {})})
    return _OPENING.pack(MAGIC, len(body)) + body


def frame(header: Any, payload: int = 0, limits: Limits | None = None) -> bytes:
    """Return the bytes that precede a payload of *payload* bytes.

    Raises:
        ProtocolError: the header exceeds *limits*, the receiver's, or has an array that is longer
            than any receiver accepts.
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
    """The parser of the received bytes of one side.

    A loop around it is::

        event = connection.next_event()
        if event is NEED_DATA:
            connection.received(socket.recv_into(connection.buffer()))

    Args:
        limits: what this side accepts.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._state = _AT_OPENING
        self._store = bytearray(_BUFFER)
        self._view = memoryview(self._store)
        self._start = 0  # start of the received bytes that are not parsed yet
        self._end = 0
        self._need = 0  # remaining bytes of the opening or header
        self._left = 0  # remaining bytes of the payload
        self._place: memoryview | None = None
        self._direct = False

    def buffer(self) -> memoryview:
        """Return the buffer for the next bytes from the peer; never empty."""
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
        """Move the unparsed bytes to the front of *store*."""
        count = self._end - self._start
        store[:count] = self._store[self._start : self._end]
        self._store, self._view = store, memoryview(store)
        self._start, self._end = 0, count

    def vacant(self) -> memoryview | None:
        """The same as :meth:`buffer` if a message is about to begin, for :meth:`whole`; else
        None."""
        if self._start != self._end or self._state is not _AT_PREFIX:
            return None
        self._direct = False
        self._start = self._end = 0
        return self._view

    def whole(self, count: int) -> tuple[Any, memoryview] | None:
        """Parse *count* bytes at the front of :meth:`vacant` if they are exactly one message.

        Returns:
            its header and payload, which is valid until more is received; None otherwise.  Then
            call :meth:`received` and process the events: this is only a fast path for the common
            case.
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
        """Record that *count* bytes were stored at the front of the last :meth:`buffer`.

        Raises:
            ProtocolError: *count* is 0, the end of the stream, in the middle of a message.
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
        """Whether the stream may end here: no message is incomplete."""
        return self._state in (_AT_PREFIX, _AT_OPENING) and self._start == self._end

    def next_event(self) -> Event:
        """Return the next event from the received bytes.

        Raises:
            ProtocolError: the peer violated the protocol; every later call raises, too.
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
            raise RuntimeError("accept_payload() must be called before the next event")
        raise ProtocolError("the connection has already failed")

    def _take_opening(self) -> Event:
        have = self._end - self._start
        seen = bytes(self._view[self._start : self._start + min(have, len(MAGIC))])
        if not MAGIC.startswith(seen):
            hint = ", as TLS does" if seen[:1] in _TLS else ""
            raise ProtocolError(
                f"the peer uses another protocol (its first bytes are {seen!r}{hint})"
            )
        if have < _OPENING.size:
            return NEED_DATA
        length = _OPENING.unpack_from(self._store, self._start)[1]
        if length > _MAX_OPENING:
            raise ProtocolError(f"a handshake of {length} bytes, the limit is {_MAX_OPENING}")
        self._need = _OPENING.size + length
        if have < self._need:
            return NEED_DATA
        raw = bytes(self._view[self._start : self._start + self._need])
        content = unpack(raw[_OPENING.size :])
        self._start += self._need
        self._state = _AT_PREFIX
        if not isinstance(content, dict) or content.get("version") != VERSION:
            version = content.get("version") if isinstance(content, dict) else content
            raise ProtocolError(
                f"the peer uses protocol version {shown(version)}, this side {VERSION}"
            )
        values = {}
        for field in fields(Limits):
            value = content.get(field.name)
            if type(value) is not int or value < 1:
                raise ProtocolError(f"the peer's limit {field.name!r} is {shown(value)}")
            values[field.name] = value
        return OpeningReceived(Limits(**values), content, raw)

    def accept_payload(self, place: memoryview | None) -> None:
        """Provide a buffer for the last message's payload: a flat view, or None to discard it.

        A shorter view receives the next bytes of the payload; ``PLACE_FULL`` then requests the next
        one.
        """
        if self._state is not _AT_PLACE:
            raise RuntimeError("no payload is waiting for a buffer")
        if place is not None and not 0 < len(place) <= self._left:
            raise ValueError(f"a payload of {self._left} bytes, a buffer of {len(place)}")
        self._place = place
        self._state = _AT_PAYLOAD

    def arrived(self) -> memoryview:
        """Return the payload bytes that arrived with the header; valid until more is received."""
        if self._state is not _AT_PLACE:
            raise RuntimeError("no payload is waiting for a buffer")
        return self._view[self._start : min(self._end, self._start + self._left)]

    def skip(self, count: int) -> None:
        """Consume *count* bytes of :meth:`arrived`."""
        self._start += count
        self._left -= count
        if not self._left:
            self._state = _AT_PREFIX

    def take_back(self) -> int:
        """Withdraw the buffer of a payload that is arriving; the rest needs another one.

        Returns:
            how many of its bytes are still empty.
        """
        if self._state is not _AT_PAYLOAD or self._place is None:
            raise RuntimeError("no payload is arriving")
        empty = len(self._place)
        self._place = None
        self._direct = False
        self._state = _AT_PLACE
        return empty

    def drop_payload(self) -> None:
        """Discard the rest of the payload, whose buffer is no longer valid."""
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
