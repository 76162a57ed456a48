"""What blocking and Trio clients share: the state of one request, and reading its reply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from warabi import errors, greeting, wire
from warabi.wire import PAYLOAD_DONE, Limits, Message

EAGER_THRESHOLD = 2048
"""Default size in bytes up to which data travel inside the header message."""


class Request:
    """A request that was sent, or is about to be, and what came of it.

    Keeps the caller's buffers alive until it is done.

    Attributes:
        connection: the client's connection that it was sent on, and *number* its ID there.
        into: where a read's bytes go; None when they are not wanted (any more).
        size: how many bytes a read asked for; its result is how many came.
        short: whether fewer may come, because the region ends.
        done: whether *result* or *error* is there.
        since: when it was sent, by a Trio client's clock.
        event: set by whoever finishes the request or wants its waiter to look again.
    """

    connection: Any = None
    number = 0
    since = 0.0
    done = False
    result: Any = None
    error: errors.Exception | None = None
    event: Any = None  # threading.Event or trio.Event

    def __init__(
        self,
        what: str,
        decode: Callable[[Any], Any] | None = None,
        into: memoryview | None = None,
        buffers: Any = None,
        short: bool = False,
    ) -> None:
        self.what = what
        self.decode = decode
        self.into = into
        self.size = 0 if into is None else len(into)
        self.buffers = buffers
        self.short = short

    def finish(self, result: Any = None, error: errors.Exception | None = None) -> None:
        if self.done:
            return
        self.result = result
        self.error = error
        self.into = self.buffers = None
        self.done = True
        if self.event is not None:
            self.event.set()

    def outcome(self) -> Any:
        """The result; raises the error."""
        if self.error is not None:
            raise self.error
        return self.result

    def place(self, count: int) -> memoryview:
        """Where *count* bytes of a read go; nowhere when it was given up.

        Raises:
            errors.ProtocolError: more or fewer bytes than asked for.
        """
        if self.into is None:
            return memoryview(bytearray(count))
        if count > self.size or (count < self.size and not self.short):
            raise errors.ProtocolError(f"{self.what}: {count} bytes came, not {self.size}")
        return self.into[:count]

    def take_whole(self, header: Any, payload: memoryview | bytes) -> bool:
        """Finish with a message that has arrived as a whole, if it is the usual reply: no failure,
        and all the bytes that were asked for, if any were.  Any other is for :meth:`take_reply`.
        """
        if type(header) is not list or not 2 <= len(header) <= 3:
            return False
        if header[0] != self.number or type(header[0]) is not int:
            return False
        if len(header) == 3:
            if payload or type(header[2]) is not bytes:
                return False
            payload = header[2]
        if len(payload) != self.size:
            return False
        if self.into is not None:
            self.into[:] = payload
            self.finish(self.size)
            return True
        try:
            result = self.decode(header[1]) if self.decode else header[1]
        except Exception:  # which take_reply() tells of
            return False
        self.finish(result)
        return True

    def take_reply(self, message: Message) -> None:
        """Finish with a reply whose payload, if any, has arrived.

        Raises:
            errors.ProtocolError: it is no reply.
        """
        reply = message.header
        try:
            if len(reply) == 4:
                code, text, number = reply[3]
                self.finish(error=errors.from_wire(str(code), str(text), int(number)))
                return
            if self.into is None:
                self.finish(self.decode(reply[1]) if self.decode else reply[1])
                return
            count = message.payload
            if len(reply) == 3:
                count = len(reply[2])
                self.place(count)[:] = reply[2]
            elif count == 0 and not self.short and self.size:
                raise errors.ProtocolError(f"{self.what}: a reply without bytes")
            self.finish(count)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, errors.Exception) and not isinstance(error, errors.InvalidRegion):
                raise
            raise errors.ProtocolError(f"{self.what}: a reply of an unknown form") from error


def reply_id(message: Message) -> int:
    """Which request a message answers; 0 is none, but the connection's end.

    Raises:
        errors.ProtocolError: it is no reply.
        errors.Exception: why the provider ends the connection.
    """
    header = message.header
    if refusal := greeting.refused(header):
        raise refusal
    if not isinstance(header, list) or not 2 <= len(header) <= 4 or type(header[0]) is not int:
        raise errors.ProtocolError(f"not a reply: {header!r:.100}")
    return header[0]


class Replies:
    """The receiving half of a client's connection: which reply belongs to which request.

    Whoever reads the connection gives each event to :meth:`_take`.
    """

    def __init__(self) -> None:
        self._wire = wire.Connection(Limits())
        self._requests: dict[int, Request] = {}
        self._message: Message | None = None  # whose payload is arriving
        self._descriptors: list[int] = []

    def take_descriptors(self) -> list[int]:
        """The descriptors that have come, in their order; closing them is the caller's."""
        found = self._descriptors.copy()
        self._descriptors.clear()
        return found

    def _take(self, event: wire.Event) -> None:
        if isinstance(event, Message):
            request = self._requests.get(reply_id(event))
            if event.payload:
                wanted = request is not None and request.into is not None
                place = request.place(event.payload) if request and wanted else None
                self._wire.accept_payload(place)
                self._message = event
            else:
                self._finish(event)
        elif event is PAYLOAD_DONE and self._message is not None:
            message, self._message = self._message, None
            self._finish(message)

    def _finish(self, message: Message) -> None:
        request = self._pop(message.header[0])
        if request is not None:
            try:
                request.take_reply(message)
            except errors.Exception as error:  # it is no longer among those that will fail
                request.finish(error=error)
                raise

    def _pop(self, number: int) -> Request | None:
        return self._requests.pop(number, None)


def chunks(size: int, limit: int) -> Iterator[tuple[int, int]]:
    """Start and end of the pieces, of at most *limit* bytes, of a transfer of *size* bytes."""
    for start in range(0, size, limit):
        yield start, min(start + limit, size)
