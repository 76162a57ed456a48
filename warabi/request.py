"""What blocking and Trio clients share: the state of one request, and reading its reply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from warabi import errors
from warabi.wire import Message

EAGER_THRESHOLD = 2048
"""Default size in bytes up to which data travel inside the header message."""


class Request:
    """A request that was sent, or is about to be, and what came of it.

    Keeps the caller's buffers alive until it is done.

    Attributes:
        connection: the client's connection that it was sent on.
        into: where a read's bytes go; None when they are not wanted (any more).
        size: how many bytes a read asked for; its result is how many came.
        short: whether fewer may come, because the region ends.
        done: whether *result* or *error* is there.
        event: set by whoever finishes the request or wants its waiter to look again.
    """

    __slots__ = (
        "buffers", "connection", "decode", "done", "error", "event", "into", "result",
        "short", "size",
        "what",
    )  # fmt: skip

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
        self.connection: Any = None
        self.done = False
        self.result: Any = None
        self.error: errors.Exception | None = None
        self.event: Any = None  # threading.Event or trio.Event

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
        errors.ProtocolError: it is no reply, or the provider refused the connection.
    """
    header = message.header
    if not isinstance(header, list) or not 2 <= len(header) <= 4 or type(header[0]) is not int:
        raise errors.ProtocolError(f"not a reply: {header!r:.100}")
    if header[0] == 0:
        raise errors.ProtocolError(f"the provider refused the connection: {header[-1]!r:.200}")
    return header[0]


def chunks(size: int, limit: int) -> Iterator[tuple[int, int]]:
    """Start and end of the pieces, of at most *limit* bytes, of a transfer of *size* bytes."""
    for start in range(0, size, limit):
        yield start, min(start + limit, size)
