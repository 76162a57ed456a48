"""What blocking and Trio clients share: the state of one request, and reading its reply."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from warabi import errors
from warabi.protocol import handshake, wire
from warabi.protocol.forms import Malformed, shown
from warabi.protocol.operations import OPERATIONS, RESULTS, ChangeScope, Served
from warabi.protocol.wire import PAYLOAD_DONE, Limits, Message

EAGER_THRESHOLD = 2048
"""Default size in bytes up to which data travel inside the header message."""

_QUICK, _SLOW = 5, 60
"""Default deadlines of operations that only read, and of those that may wait for the medium or a
migration, in multiples of the time without a sign of life."""
_MOST_ERRNO = 4095  # as in Linux


class PendingRequest:
    """A request that was sent, or is about to be, and what came of it.

    Keeps the caller's buffers alive until it is done.

    Attributes:
        what: the operation that errors name.
        operation: the one that is sent, on behalf of *what* where these differ.
        connection: the client's connection that it was sent on, and *number* its ID there.
        into: where a read's bytes go; None when they are not wanted (any more).
        size: how many bytes a read asked for; its result is how many came.
        short: whether fewer may come, because the region ends.
        done: whether *result* or *error* is there.
        since: when it was sent, by a Trio client's clock.
        event: set by whatever finishes the request or wants its waiter to look again.
        late: called with the result when that comes after the request was given up.
        expires: by which time, by the client's clock, it has to be answered.
    """

    connection: Any = None
    number = 0
    since = 0.0
    done = False
    result: Any = None
    error: errors.Exception | None = None
    event: Any = None  # interrupts.Wakeup or trio.Event
    late: Callable[[Any], None] | None = None
    expires = math.inf

    def __init__(
        self,
        what: str,
        into: memoryview | None = None,
        buffers: Any = None,
        short: bool = False,
        *,
        operation: str = "",
    ) -> None:
        self.what = what
        self.operation = operation or what
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

    def _forked(self) -> None:
        """Of a request that a thread carries out, which is not in this process."""
        self.event = None  # its lock may be held by another thread
        self.finish(
            error=errors.ConnectionLost(
                f"{self.what}: it goes on in the process from which this one was forked"
            )
        )

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
            if header[1] is not None:
                return False
            self.into[:] = payload
            self.finish(self.size)
            return True
        try:
            result = RESULTS[self.operation](header[1])
        except Malformed:  # which take_reply() tells of
            return False
        self.finish(result)
        return True

    def take_reply(self, message: Message) -> None:
        """Finish with a reply whose payload, if any, has arrived.

        Raises:
            errors.ProtocolError: it is no reply.
        """
        reply = message.header
        if len(reply) == 4:
            self.finish(error=_failure(self.what, reply[3]))
            return
        try:
            result = RESULTS[self.operation](reply[1])
        except Malformed as error:
            raise errors.ProtocolError(f"{self.what}: the reply: {error}") from None
        if self.into is None:
            self.finish(result)
            return
        count = message.payload
        if len(reply) == 3:
            if type(reply[2]) is not bytes or count:
                raise errors.ProtocolError(f"{self.what}: the reply has no bytes where it says so")
            count = len(reply[2])
            self.place(count)[:] = reply[2]
        elif count == 0 and not self.short and self.size:
            raise errors.ProtocolError(f"{self.what}: a reply without bytes")
        self.finish(count)

    def take_late(self, message: Message) -> None:
        """A reply came to what was given up."""
        if self.late is not None and len(message.header) < 4:
            with contextlib.suppress(Malformed):
                self.late(RESULTS[self.operation](message.header[1]))


@dataclass(frozen=True)
class Patience:
    """For how long a client waits, in seconds.

    Attributes:
        silence: without a sign of life from the provider.
        deadline: for one reply, whatever signs of life come; None for what suits the operation.
    """

    silence: float
    deadline: float | None = None

    def of(self, name: str) -> float:
        """For how long the reply to the operation *name* is waited for."""
        operation = OPERATIONS.get(name)
        if name == "watch" or (operation and operation.served is Served.MIGRATION):
            return math.inf  # answered when something has happened
        if self.deadline is not None:
            return self.deadline
        if operation is None or operation.waits or operation.long:
            return self.silence * _SLOW
        if operation.changes is not ChangeScope.NOTHING:  # it may wait for a migration
            return self.silence * _SLOW
        return self.silence * _QUICK

    @property
    def shortest(self) -> float:
        """No reply is waited for less long."""
        return self.silence * _QUICK if self.deadline is None else self.deadline


def _failure(what: str, failure: Any) -> errors.Exception:
    """The exception that the fourth item of a reply stands for.

    Raises:
        errors.ProtocolError: it stands for none.
    """
    match failure:
        case [str() as code, str() as text, int() as number] if 0 <= number <= _MOST_ERRNO:
            return errors.from_wire(code, text, number)
    raise errors.ProtocolError(f"{what}: the reply: a failure without a code, a text and an errno")


def reply_id(message: Message) -> int:
    """Which request a message answers; 0 is none, but the connection's end.

    Raises:
        errors.ProtocolError: it is no reply.
        errors.Exception: why the provider ends the connection.
    """
    header = message.header
    if refusal := handshake.refused(header):
        raise refusal
    if not isinstance(header, list) or not 2 <= len(header) <= 4 or type(header[0]) is not int:
        raise errors.ProtocolError(f"not a reply: {shown(header)}")
    return header[0]


class Replies:
    """The receiving half of a client's connection: which reply belongs to which request.

    Whoever reads the connection gives each event to :meth:`_take`.
    """

    def __init__(self) -> None:
        self._wire = wire.ProtocolConnection(Limits())
        self._requests: dict[int, PendingRequest] = {}
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
        if request is None:
            return
        if request.done:
            request.take_late(message)
            return
        try:
            request.take_reply(message)
        except errors.Exception as error:  # it is no longer among those that will fail
            request.finish(error=error)
            raise

    def _pop(self, number: int) -> PendingRequest | None:
        return self._requests.pop(number, None)


def chunks(size: int, limit: int) -> Iterator[tuple[int, int]]:
    """Start and end of the pieces, of at most *limit* bytes, of a transfer of *size* bytes."""
    for start in range(0, size, limit):
        yield start, min(start + limit, size)


def check_append(size: int, limit: int) -> None:
    """Refuse to append what does not fit into one request, and so would not stay in one piece.

    Raises:
        InvalidBuffer: *size* exceeds the provider's *limit* on a payload.
    """
    if size > limit:
        raise errors.InvalidBuffer(
            f"append: data of {size} bytes, this provider takes {limit} bytes at once"
        )
