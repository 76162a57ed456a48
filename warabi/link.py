"""The two ways in which a blocking handle reaches its target: directly, or over a connection."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from warabi import errors, interrupts
from warabi.buffers import checked_size
from warabi.connection import Connection
from warabi.errors import WouldBlock
from warabi.extents import EXTENTS, Extent, groups, pack, total
from warabi.guest import NO_ACCESS, Access
from warabi.operations import OPERATIONS, READING
from warabi.region import RegionID
from warabi.request import EAGER_THRESHOLD, Request, check_append, chunks
from warabi.side_channel import SideChannel

if TYPE_CHECKING:
    from warabi.provider import ProviderCore  # imports Trio, which a client does not need


class Link(Protocol):
    """One way to a target.  The ``start`` methods return requests to wait for, in any order.

    Attributes:
        writing, reading: direct access, to be tried before :meth:`write` and :meth:`read_into`.
        eager_write, eager_read: up to how many bytes go inside a header.
    """

    writing: Access
    reading: Access
    eager_write: int
    eager_read: int

    def call(self, name: str, *arguments: Any) -> Any:
        """Carry out an operation of the table and return its result."""

    def size(self, region: RegionID) -> int:
        """Bytes of a region."""

    def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None: ...
    def read_into(self, region: RegionID, offset: int, place: memoryview) -> None: ...
    def persist(self, region: RegionID, offset: int, size: int) -> None: ...
    def create_and_write(self, data: memoryview, persist: bool) -> RegionID: ...
    def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None: ...
    def append(self, region: RegionID, data: memoryview, persist: bool) -> int: ...
    def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None: ...

    def start(self, name: str, *arguments: Any) -> list[Request]: ...
    def start_write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool
    ) -> list[Request]: ...
    def start_read(self, region: RegionID, offset: int, place: memoryview) -> list[Request]: ...
    def start_create_and_write(self, data: memoryview, persist: bool) -> list[Request]: ...

    def wait(self, request: Request) -> Any:
        """The result of a request, or its error."""

    def poll(self, request: Request) -> None:
        """Notice whether a request is done, without waiting."""

    def withdraw(self, requests: Sequence[Request]) -> None:
        """Have nothing touch the buffers of reads any more."""

    def undo(self, requests: Sequence[Request]) -> None:
        """Give up requests whose caller was interrupted, and erase the regions that they make."""


def wait_all(link: Link, requests: Sequence[Request]) -> Any:
    """The last result, or the first error once all have ended: none may touch a buffer later."""
    failure: errors.Exception | None = None
    result = None
    for request in requests:
        if request.late is None:  # else the reply is waited for a little, to undo what it made
            interrupts.check()
        try:
            result = link.wait(request)
        except errors.Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return result


def _withdraw(requests: Sequence[Request]) -> None:
    """Have nothing touch the buffers of requests any more whose caller was interrupted."""
    for request in requests:
        if request.connection is not None and not request.done:
            request.connection.withdraw(request)


_CREATE = ("create", "create_and_write")


class DirectLink:
    """A target in this process: calls, not messages.

    What is not a plain access to a region runs under ``interrupts.uninterrupted``.
    """

    eager_write = EAGER_THRESHOLD
    eager_read = EAGER_THRESHOLD

    def __init__(self, core: ProviderCore) -> None:
        from warabi.calls import CALLS  # which the clients of others do not need

        self._calls = CALLS
        self._core = core
        self.writing: Access = core.direct
        self.reading: Access = self.writing

    def call(self, name: str, *arguments: Any) -> Any:
        if name in _CREATE:
            return interrupts.creating(lambda: self._call(name, *arguments), self._erase)
        return interrupts.uninterrupted(self._call, name, *arguments)

    def _erase(self, region: RegionID) -> None:
        self._call("erase", region)

    def _call(self, name: str, *arguments: Any) -> Any:
        call = self._calls[name]
        if name in READING:
            return call(self._core.target, *arguments)
        with self._core.changes:
            return call(self._core.target, *arguments)

    def size(self, region: RegionID) -> int:
        size = self.reading.size(region)
        return size if size >= 0 else interrupts.uninterrupted(self._core.target.size, region)

    def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        if self.writing.write(region, offset, data):
            if persist:
                self.persist(region, offset, len(data))
            return
        interrupts.uninterrupted(self._write, region, offset, data, persist, extend)

    def _write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        with self._core.changes:
            self._core.target.write(region, offset, data, persist, extend=extend)

    def read_into(self, region: RegionID, offset: int, place: memoryview) -> None:
        if not self.reading.read_into(region, offset, place):
            interrupts.uninterrupted(self._core.target.read_into, region, offset, place)

    def persist(self, region: RegionID, offset: int, size: int) -> None:
        if not self.writing.persist(region, offset, size):
            interrupts.uninterrupted(self._core.target.persist, region, offset, size)

    def create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        return interrupts.creating(lambda: self._create_and_write(data, persist), self._erase)

    def _create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        with self._core.changes:
            return self._core.target.create_and_write(data, persist)

    def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None:
        interrupts.uninterrupted(self._call, "write_vector", region, pack(extents), persist, data)

    def append(self, region: RegionID, data: memoryview, persist: bool) -> int:
        return interrupts.uninterrupted(self._append, region, data, persist)

    def _append(self, region: RegionID, data: memoryview, persist: bool) -> int:
        with self._core.changes:
            return self._core.target.append(region, data, persist)

    def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None:
        interrupts.uninterrupted(self._core.target.read_vector, region, extents, place)

    def start(self, name: str, *arguments: Any) -> list[Request]:
        return self._interruptible(self._start_call, name, *arguments)

    def _interruptible(self, start: Callable[..., list[Request]], *arguments: Any) -> list[Request]:
        return interrupts.creating(lambda: start(*arguments), self.undo)

    def undo(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.done:
                request.event.wait()  # a thread is at it, which cannot be stopped, but soon ends
            if isinstance(request.result, RegionID):
                self._erase(request.result)

    def _start_call(self, name: str, *arguments: Any) -> list[Request]:
        operation = OPERATIONS[name]
        waits = operation.long or (operation.waits and self._core.target.blocking)
        waits = waits or (self._core.changes.frozen and name not in READING)
        return self._start(name, waits, self._call, name, *arguments)

    def start_write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool
    ) -> list[Request]:
        return self._interruptible(self._start_write, region, offset, data, persist)

    def _start_write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool
    ) -> list[Request]:
        target = self._core.target
        waits = target.write_waits or (persist and target.blocking) or self._core.changes.frozen
        return self._start("write", waits, self.write, region, offset, data, persist, False)

    def start_read(self, region: RegionID, offset: int, place: memoryview) -> list[Request]:
        return self._interruptible(self._start_read, region, offset, place)

    def _start_read(self, region: RegionID, offset: int, place: memoryview) -> list[Request]:
        try:
            if self.reading.read_into(region, offset, place, wait=False):
                return [_finished("read")]
            target = self._core.target
            target.read_into(region, offset, place, wait=not target.blocking)
        except WouldBlock:
            return self._start("read", True, self.read_into, region, offset, place)
        except errors.Exception as error:
            return [_finished("read", error=error)]
        return [_finished("read")]

    def start_create_and_write(self, data: memoryview, persist: bool) -> list[Request]:
        return self._interruptible(self._start_create_and_write, data, persist)

    def _start_create_and_write(self, data: memoryview, persist: bool) -> list[Request]:
        target = self._core.target
        waits = target.write_waits or (persist and target.blocking) or self._core.changes.frozen
        return self._start("create_and_write", waits, self._create_and_write, data, persist)

    def _start(
        self, what: str, waits: bool, call: Callable[..., Any], *arguments: Any
    ) -> list[Request]:
        """Carry out *call*: at once, or beside the caller if it *waits* for the medium."""
        if waits:
            request = Request(what, buffers=arguments)
            request.event = interrupts.Wakeup()
            self._core.run_beside(lambda: self._finish(request, call, arguments))
            return [request]
        try:
            return [_finished(what, call(*arguments))]
        except errors.Exception as error:
            return [_finished(what, error=error)]

    @staticmethod
    def _finish(request: Request, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            request.finish(call(*arguments))
        except errors.Exception as error:
            request.finish(error=error)
        except BaseException as error:
            request.finish(error=errors.ProviderFailed(f"{request.what}: {error!r}"))
            raise

    def wait(self, request: Request) -> Any:
        if not request.done:
            request.event.wait()
            request.event.set()  # for another thread that waits for the same request
        return request.outcome()

    def poll(self, request: Request) -> None:
        """Requests here are finished by the threads that carry them out."""

    def withdraw(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.what == "read":  # a thread is at it, which cannot be stopped, but soon ends
                with contextlib.suppress(errors.Exception):
                    interrupts.uninterrupted(self.wait, request)


def _finished(what: str, result: Any = None, error: errors.Exception | None = None) -> Request:
    request = Request(what)
    request.finish(result, error)
    return request


class WireLink:
    """A target behind a connection; what exceeds the provider's limits is split.

    Args:
        connect: gives the connection to use for the next request.
        provider_id: which provider of that engine.
        side: reaches regions past the provider, where that can be.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        provider_id: int,
        side: SideChannel | None = None,
    ) -> None:
        self._connect = connect
        self._side = side
        self.writing: Access = NO_ACCESS if side is None else side
        self.reading: Access = self.writing
        self._provider_id = provider_id
        self.eager_write = EAGER_THRESHOLD
        self.eager_read = EAGER_THRESHOLD

    def _submit(
        self,
        connection: Connection,
        request: Request,
        arguments: Sequence[Any],
        data: memoryview | None = None,
    ) -> None:
        payload = eager = None
        if data is not None and len(data) <= min(self.eager_write, connection.limits.header // 2):
            eager = bytes(data)
        elif data is not None:
            payload = data
        header = [self._provider_id, request.what, arguments, eager]
        connection.submit(request, header, payload)

    def _run(self, begin: Callable[..., None], *arguments: Any) -> Any:
        """Do what *begin* adds to its first argument, a list of requests, as it sends them.

        A caller that is interrupted, here or where it waits, leaves none behind that touches its
        buffers: each is in the list before it is sent.
        """
        requests: list[Request] = []
        try:
            begin(requests, *arguments)
            return wait_all(self, requests)
        except BaseException:
            _withdraw(requests)
            raise

    def _begun(self, begin: Callable[..., None], *arguments: Any) -> list[Request]:
        """As :meth:`_run`, without waiting."""
        requests: list[Request] = []
        try:
            begin(requests, *arguments)
            return requests
        except BaseException:
            _withdraw(requests)
            raise

    def _erase(self, region: RegionID) -> None:
        self._run(self._request, "erase", region)

    def _request(self, requests: list[Request], name: str, *arguments: Any) -> None:
        connection = self._connect()
        request = self._new(requests, name)
        self._submit(connection, request, arguments)

    def _new(self, requests: list[Request], name: str, **settings: Any) -> Request:
        request = Request(name, **settings)
        if name in _CREATE:  # what it makes after it was given up is erased
            request.late = self._erase
        requests.append(request)
        return request

    def call(self, name: str, *arguments: Any) -> Any:
        if name in _CREATE:
            return interrupts.creating(
                lambda: self._run(self._request, name, *arguments), self._erase
            )
        return self._run(self._request, name, *arguments)

    def start(self, name: str, *arguments: Any) -> list[Request]:
        if name in _CREATE:
            return interrupts.creating(
                lambda: self._begun(self._request, name, *arguments), self.undo
            )
        return self._begun(self._request, name, *arguments)

    def size(self, region: RegionID) -> int:
        size = self.reading.size(region)
        return size if size >= 0 else self.call("size", region)

    def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        if self.writing.write(region, offset, data):
            if persist:
                self.persist(region, offset, len(data))
            return
        self._run(self._write, region, offset, data, persist, extend)

    def start_write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool
    ) -> list[Request]:
        if self._side is not None:
            try:
                done = self._side.write(region, offset, data, wait=False)
            except errors.Exception as error:
                return [_finished("write", error=error)]
            if done and persist:
                return self.start("persist", region, offset, len(data))
            if done:
                return [_finished("write")]
        return self._begun(self._write, region, offset, data, persist, False)

    def _write(
        self,
        requests: list[Request],
        region: RegionID,
        offset: int,
        data: memoryview,
        persist: bool,
        extend: bool,
    ) -> None:
        connection = self._connect()
        limit = connection.limits.payload
        if len(data) > limit and not extend:
            self._check_end(region, checked_size(offset, "write: offset"), len(data), "write")
        for start, end in list(chunks(len(data), limit)) or [(0, 0)]:
            interrupts.check()
            piece = data[start:end]
            request = self._new(requests, "write", buffers=piece)
            self._submit(connection, request, (region, offset + start, persist, extend), piece)

    def _check_end(self, region: RegionID, offset: int, size: int, what: str) -> None:
        """Refuse a transfer in pieces as a whole, before its first piece."""
        have = self.size(region)
        if offset + size > have:
            raise errors.OutOfBounds(
                f"{what} {region!r}: {size} bytes at offset {offset} end beyond its {have} bytes"
            )

    def read_into(self, region: RegionID, offset: int, place: memoryview) -> None:
        if not self.reading.read_into(region, offset, place):
            self._run(self._read, region, offset, place)

    def persist(self, region: RegionID, offset: int, size: int) -> None:
        if not self.writing.persist(region, offset, size):
            self.call("persist", region, offset, size)

    def start_read(self, region: RegionID, offset: int, place: memoryview) -> list[Request]:
        if self._side is not None:
            try:
                if self._side.read_into(region, offset, place, wait=False):
                    return [_finished("read")]
            except errors.Exception as error:
                return [_finished("read", error=error)]
        return self._begun(self._read, region, offset, place)

    def _read(
        self, requests: list[Request], region: RegionID, offset: int, place: memoryview
    ) -> None:
        connection = self._connect()
        limit = connection.limits.payload
        if len(place) > limit:
            self._check_end(region, checked_size(offset, "read: offset"), len(place), "read")
        for start, end in list(chunks(len(place), limit)) or [(0, 0)]:
            piece = place[start:end]
            size = len(piece)
            eager = size <= self.eager_read and size <= connection.own_limits.header // 2
            request = self._new(requests, "read", into=piece)
            arguments = (region, offset + start, size, eager, False)
            connection.submit(request, [self._provider_id, "read", arguments, None])

    def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None:
        self._run(self._write_vector, region, extents, data, persist)

    def _write_vector(
        self,
        requests: list[Request],
        region: RegionID,
        extents: list[Extent],
        data: memoryview,
        persist: bool,
    ) -> None:
        connection = self._connect()
        start = 0
        for group in self._groups(connection, region, extents, "write_vector"):
            end = start + total(group)
            piece = data[start:end]
            request = self._new(requests, "write_vector", buffers=piece)
            self._submit(connection, request, (region, pack(group), persist), piece)
            start = end

    def append(self, region: RegionID, data: memoryview, persist: bool) -> int:
        return self._run(self._append, region, data, persist)  # type: ignore[no-any-return]

    def _append(
        self, requests: list[Request], region: RegionID, data: memoryview, persist: bool
    ) -> None:
        connection = self._connect()
        check_append(len(data), connection.limits.payload)
        request = self._new(requests, "append", buffers=data)
        self._submit(connection, request, (region, persist), data)

    def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None:
        self._run(self._read_vector, region, extents, place)

    def _read_vector(
        self, requests: list[Request], region: RegionID, extents: list[Extent], place: memoryview
    ) -> None:
        connection = self._connect()
        start = 0
        for group in self._groups(connection, region, extents, "read_vector"):
            end = start + total(group)
            request = self._new(requests, "read_vector", into=place[start:end])
            self._submit(connection, request, (region, pack(group)))
            start = end

    def _groups(
        self, connection: Connection, region: RegionID, extents: list[Extent], what: str
    ) -> list[list[Extent]]:
        """What goes into one message each; when it takes several, all extents are checked first."""
        found = list(groups(extents, connection.limits.payload, EXTENTS))
        if len(found) > 1:
            for offset, size in extents:
                self._check_end(region, offset, size, what)
        return found or [[]]

    def create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        return interrupts.creating(lambda: self._create_and_write(data, persist), self._erase)

    def _create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        made = None if self._side is None else self._side.make(len(data))
        if made is not None:
            region, fill = made
            self._fill(region, data, persist, fill)
            return region
        if len(data) <= self._connect().limits.payload:
            return self._run(self._begin_create, data, persist)  # type: ignore[no-any-return]
        return self._create_large(data, persist)

    def _begin_create(self, requests: list[Request], data: memoryview, persist: bool) -> None:
        connection = self._connect()
        request = self._new(requests, "create_and_write", buffers=data)
        self._submit(connection, request, (persist,), data)

    def _create_large(self, data: memoryview, persist: bool) -> RegionID:
        region: RegionID = self._run(self._request, "create", len(data))
        self._fill(region, data, persist, lambda data: self.writing.write(region, 0, data))
        return region

    def _fill(
        self,
        region: RegionID,
        data: memoryview,
        persist: bool,
        fill: Callable[[memoryview], bool],
    ) -> None:
        """Write *data* to a region that was just made; it is erased when that fails."""
        try:
            if not fill(data):
                self._run(self._write, region, 0, data, persist, False)
            elif persist:
                self.persist(region, 0, len(data))
        except BaseException:
            with contextlib.suppress(errors.Exception):
                self._erase(region)
            raise

    def start_create_and_write(self, data: memoryview, persist: bool) -> list[Request]:
        if len(data) <= self._connect().limits.payload:
            return interrupts.creating(
                lambda: self._begun(self._begin_create, data, persist), self.undo
            )
        region = interrupts.creating(lambda: self._create_large(data, persist), self._erase)
        return [_finished("create_and_write", region)]

    def wait(self, request: Request) -> Any:
        return request.connection.wait(request) if not request.done else request.outcome()

    def poll(self, request: Request) -> None:
        request.connection.poll()

    def withdraw(self, requests: Sequence[Request]) -> None:
        _withdraw([request for request in requests if request.into is not None])

    def undo(self, requests: Sequence[Request]) -> None:
        _withdraw(requests)
        for request in requests:
            if isinstance(request.result, RegionID):
                self._erase(request.result)
