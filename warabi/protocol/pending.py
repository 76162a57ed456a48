"""Client requests: state of a pending request, and parsing of replies, for all clients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from warabi import errors
from warabi._core.tuning import CHANGE_DEADLINE, READ_DEADLINE
from warabi.protocol import handshake, wire
from warabi.protocol.forms import Malformed, shown
from warabi.protocol.operations import OPERATIONS, RESULTS, ChangeScope, Served
from warabi.protocol.wire import PAYLOAD_DONE, Limits, Message

EAGER_THRESHOLD = 2048
"""Default for the most bytes of data that are sent inside the header message."""

_MOST_ERRNO = 4095  # as in Linux


class PendingRequest:
    """A request that was sent, or is about to be, and its result.

    Keeps the caller's buffers alive until it is done.

    Attributes:
        what: the operation that error messages name.
        operation: the operation that is sent, on behalf of *what* if they differ.
        connection: the client's connection that it was sent on; *number* is its ID there.
        into: the buffer of a read; None if the data are not needed (any more).
        size: bytes that a read requested; its result is the number of bytes received.
        short: whether fewer bytes are allowed, because the region ends.
        done: whether *result* or *error* is set.
        since: when it was sent, by a Trio client's clock.
        event: set when the request is finished, or its waiter should check again.
        waiters: the number of threads that wait for *event*.
        undone: a thread waits for the result, to undo what the request makes.
        late: called with the result if that arrives after the request was abandoned.
        expires: the time, by the client's clock, by which a reply must arrive.
    """

    connection: Any = None
    number = 0
    since = 0.0
    done = False
    result: Any = None
    error: errors.Exception | None = None
    event: Any = None  # interrupts.Wakeup or trio.Event
    waiters = 0
    undone = False
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
        """After a fork: fail a request whose thread is not in this process."""
        self.event = None  # its lock may be held by another thread
        self.finish(
            error=errors.ConnectionLost(
                f"{self.what}: the request continues in the parent process, not in this fork"
            )
        )

    def outcome(self) -> Any:
        """Return the result, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.result

    def place(self, count: int) -> memoryview:
        """Return the buffer for *count* bytes of a read; a scratch buffer if it was abandoned.

        Raises:
            errors.ProtocolError: more or fewer bytes than requested.
        """
        if self.into is None:
            return memoryview(bytearray(count))
        if count > self.size or (count < self.size and not self.short):
            raise errors.ProtocolError(f"{self.what}: {count} bytes arrived instead of {self.size}")
        return self.into[:count]

    def take_whole(self, header: Any, payload: memoryview | bytes) -> bool:
        """Finish with a message that has arrived as a whole, if it is the usual reply: no failure,
        and all requested bytes.  If it returns False, call :meth:`take_reply` instead.
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
        except Malformed:  # take_reply() reports it
            return False
        self.finish(result)
        return True

    def take_reply(self, message: Message) -> None:
        """Finish with a reply whose payload, if any, has arrived.

        Raises:
            errors.ProtocolError: it is not a valid reply.
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
                raise errors.ProtocolError(
                    f"{self.what}: the reply announces a payload but has none"
                )
            count = len(reply[2])
            self.place(count)[:] = reply[2]
        elif count == 0 and not self.short and self.size:
            raise errors.ProtocolError(f"{self.what}: a reply without payload")
        self.finish(count)

    def take_late(self, message: Message) -> None:
        """Process the reply to an abandoned request."""
        if self.late is not None and len(message.header) < 4:
            with contextlib.suppress(Malformed):
                self.late(RESULTS[self.operation](message.header[1]))


@dataclass(frozen=True)
class Patience:
    """The timeouts of a client, in seconds.

    Attributes:
        silence: most time without a sign of life from the provider.
        deadline: most time for one reply, even with signs of life; None: depends on the operation.
    """

    silence: float
    deadline: float | None = None

    def of(self, name: str) -> float:
        """Return the deadline for a reply to the operation *name*."""
        operation = OPERATIONS.get(name)
        if operation and (operation.indefinite or operation.served is Served.MIGRATION):
            return math.inf  # has a reply only when something has happened
        if self.deadline is not None:
            return self.deadline
        if operation is None or operation.waits or operation.long:
            return self.silence * CHANGE_DEADLINE
        if operation.changes is not ChangeScope.NOTHING:  # it may wait for a migration
            return self.silence * CHANGE_DEADLINE
        return self.silence * READ_DEADLINE


def _failure(what: str, failure: Any) -> errors.Exception:
    """Convert the fourth item of a reply to an exception.

    Raises:
        errors.ProtocolError: it is malformed.
    """
    match failure:
        case [str() as code, str() as text, int() as number] if 0 <= number <= _MOST_ERRNO:
            return errors.from_wire(code, text, number)
    raise errors.ProtocolError(f"{what}: malformed error reply")


def reply_id(message: Message) -> int:
    """Return the ID of the request that a message replies to; 0 closes the connection.

    Raises:
        errors.ProtocolError: it is not a reply.
        errors.Exception: why the provider closes the connection.
    """
    header = message.header
    if refusal := handshake.refused(header):
        raise refusal
    if not isinstance(header, list) or not 2 <= len(header) <= 4 or type(header[0]) is not int:
        raise errors.ProtocolError(f"not a reply: {shown(header)}")
    return header[0]


class Replies:
    """The receiving half of a client's connection: matches replies to requests.

    The reader of the connection passes each event to :meth:`_take`.
    """

    def __init__(self) -> None:
        self._wire = wire.ProtocolConnection(Limits())
        self._requests: dict[int, PendingRequest] = {}
        self._message: Message | None = None  # the message whose payload is arriving
        self._descriptors: list[int] = []

    def take_descriptors(self) -> list[int]:
        """Return the descriptors received so far, in order; the caller must close them."""
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
        except errors.Exception as error:  # already removed from _requests
            request.finish(error=error)
            raise

    def _pop(self, number: int) -> PendingRequest | None:
        return self._requests.pop(number, None)


def chunks(size: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of the chunks, of at most *limit* bytes, of a transfer of *size*
    bytes."""
    for start in range(0, size, limit):
        yield start, min(start + limit, size)


def check_append(size: int, limit: int) -> None:
    """Check that an append fits into one request, as it must be atomic.

    Raises:
        InvalidBuffer: *size* exceeds the provider's *limit* on a payload.
    """
    if size > limit:
        raise errors.InvalidBuffer(
            f"append: data of {size} bytes, this provider accepts at most {limit} bytes at once"
        )
