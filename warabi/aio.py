"""The client for Trio programs: the API of ``warabi.client``, every wait a checkpoint.

    async with warabi.aio.connect(address, provider_id) as target:
        region = await target.create_and_write(b"...")

One connection, one reader task.  A request that is cancelled has taken effect or not, and its
late reply touches nobody's buffer; a cancelled write's data must not change until the
connection ends or another request on it has been answered.

Sending is synchronous as far as the socket takes it, and goes on in a task of its own where it
does not, so that no cancelled caller leaves half a frame behind.
"""

from __future__ import annotations

import itertools
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any, Protocol

import trio

from warabi import address as _address
from warabi import arrays, dispatch, errors, wire
from warabi.buffers import checked_path, checked_size, readable, writable
from warabi.connection import TIMEOUT
from warabi.errors import ConnectionLost, ProtocolError, TimedOut
from warabi.extents import EXTENTS, Extent, check_total, checked_extents, groups, pack, total
from warabi.operations import OPERATIONS, PAGE
from warabi.region import RegionID
from warabi.request import EAGER_THRESHOLD, Request, chunks, reply_id
from warabi.target import RegionStat
from warabi.target import Target as LocalTarget
from warabi.wire import NEED_DATA, PAYLOAD_DONE, Limits, Message, Opened

if TYPE_CHECKING:
    from numpy.typing import NDArray  # an extra, and slow to import

_CONNECT_TIMEOUT = 10.0
_IN_FLIGHT = 64  # requests of one connection that wait for their replies


class Link(Protocol):
    """One way to a target."""

    async def call(self, name: str, arguments: Sequence[Any]) -> Any: ...
    async def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None: ...
    async def read_into(self, region: RegionID, offset: int, place: memoryview) -> None: ...
    async def read_some(self, region: RegionID, offset: int, place: memoryview) -> int: ...
    async def create_and_write(self, data: memoryview, persist: bool) -> RegionID: ...
    async def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None: ...
    async def read_vector(
        self, region: RegionID, extents: list[Extent], place: memoryview
    ) -> None: ...


class DirectLink:
    """A target in this process."""

    def __init__(self, target: LocalTarget) -> None:
        self._target = target

    async def call(self, name: str, arguments: Sequence[Any]) -> Any:
        return await dispatch.execute(self._target, OPERATIONS[name], tuple(arguments))

    async def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        await dispatch.write(self._target, region, offset, data, persist, extend)

    async def read_into(self, region: RegionID, offset: int, place: memoryview) -> None:
        await dispatch.read_into(self._target, region, offset, place)

    async def read_some(self, region: RegionID, offset: int, place: memoryview) -> int:
        return await dispatch.read_into(self._target, region, offset, place, short=True)

    async def create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        return await dispatch.create_and_write(self._target, data, persist)

    async def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None:
        await self.call("write_vector", (region, pack(extents), persist, data))

    async def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None:
        await self.call("read_vector", (region, pack(extents), place))


class Connection:
    """A connection to an engine, used by tasks of one Trio loop.

    Args:
        sock: connected and non-blocking.
        name: of the peer, for messages.
        timeout: seconds without a sign of life from the provider after which a request gives up.
    """

    def __init__(self, sock: trio.socket.SocketType, name: str, timeout: float) -> None:
        self._socket = sock
        self._name = name
        self._timeout = timeout
        self._wire = wire.Connection(Limits())
        self._heard = 0.0  # when something last came, by Trio's clock
        self._asked = False  # a sign of life was asked for since then
        self.limits = Limits()
        self._ids = itertools.count(1)
        self._requests: dict[int, Request] = {}
        self._slots = trio.Semaphore(_IN_FLIGHT)
        self._unsent: deque[memoryview] = deque()
        self._has_unsent = trio.Event()
        self._message: Message | None = None  # whose payload is arriving
        self._lost: tuple[type[errors.Exception], str] | None = None

    async def open(self) -> None:
        """Exchange openings.

        Raises:
            ProtocolError, TimedOut, ConnectionLost: it is no engine.
        """
        try:
            with trio.fail_after(min(self._timeout, _CONNECT_TIMEOUT)):
                await self._socket.send(wire.opening(self._wire.limits))
                event = await self._next_event()
        except trio.TooSlowError:
            raise TimedOut(f"{self._name}: connected, but nothing answers") from None
        except OSError as error:
            raise ConnectionLost(f"{self._name}: {error.strerror} while connecting") from error
        except ProtocolError as error:
            raise ProtocolError(f"{self._name}: {error}") from None
        if not isinstance(event, Opened):
            raise ProtocolError(f"{self._name}: no opening")
        self.limits = event.limits

    async def run(self) -> None:
        """Take replies until the connection ends; every request on it then fails."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_unsent)
                while True:
                    self._take(await self._next_event())
        except* ProtocolError as group:
            self._fail(ProtocolError, str(_first(group)))
        except* OSError as group:
            self._fail(ConnectionLost, str(_first(group)))
        finally:
            self._fail(ConnectionLost, "the connection was closed")
            self._socket.close()

    async def _next_event(self) -> wire.Event:
        while (event := self._wire.next_event()) is NEED_DATA:
            count = await self._socket.recv_into(self._wire.buffer())
            if count == 0 and self._wire.between_messages:
                raise ConnectionResetError("the provider closed the connection")
            self._wire.received(count)
            self._heard = trio.current_time()
            self._asked = False
        return event

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
        request = self._requests.pop(message.header[0], None)
        if request is not None:
            request.take_reply(message)

    def _fail(self, kind: type[errors.Exception], reason: str) -> None:
        if self._lost is None:
            self._lost = (kind, f"{self._name}: {reason}")
        failed, self._requests = list(self._requests.values()), {}
        for request in failed:
            request.finish(error=self._lost_error(request.what))

    def _lost_error(self, what: str) -> errors.Exception:
        """A fresh error each time: one that is raised again gathers tracebacks without end."""
        assert self._lost is not None
        kind, reason = self._lost
        return kind(f"{what}: {reason}")

    async def request(
        self, request: Request, header: Sequence[Any], payload: memoryview | None = None
    ) -> Any:
        """Send *request* and return its result, or raise its error."""
        async with self._slots:
            if self._lost is not None:
                raise self._lost_error(request.what)
            request_id = next(self._ids)
            size = 0 if payload is None else len(payload)
            frame = wire.frame([request_id, *header], size, self.limits)
            request.event = trio.Event()
            self._requests[request_id] = request
            self._send([frame, payload])
            try:
                await self._wait(request)
            finally:
                if not request.done:
                    self._abandon(request_id, request)
            if not request.done:
                raise TimedOut(
                    f"{request.what}: no answer from {self._name} in {self._timeout:g} s"
                )
            return request.outcome()

    async def _wait(self, request: Request) -> None:
        """Until the request is done or the provider has been silent for too long.

        After half of that a sign of life is asked for, which a provider that is busy with the
        request gives, and one that is stopped or unreachable does not.
        """
        since = trio.current_time()
        while not request.done:
            silent = trio.current_time() - max(since, self._heard)
            if silent >= self._timeout:
                return
            if silent >= self._timeout / 2 and not self._asked:
                self._asked = True
                self._send([wire.frame([next(self._ids), 0, "ping", [], None])])
            with trio.move_on_after(self._timeout / 2 - silent % (self._timeout / 2)):
                await request.event.wait()

    def _abandon(self, request_id: int, request: Request) -> None:
        request.into = None
        if self._message is not None and self._message.header[0] == request_id:
            self._wire.drop_payload()

    def _send(self, parts: list[Any]) -> None:
        views = [memoryview(part) for part in parts if part is not None]
        if not self._unsent:
            try:
                sent = self._socket._sock.sendmsg(views, (), socket.MSG_NOSIGNAL)  # type: ignore[attr-defined]
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._fail(ConnectionLost, error.strerror or str(error))
                return
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if views:
                views[0] = views[0][sent:]
        if views:
            self._unsent.extend(views)
            self._has_unsent.set()

    async def _send_unsent(self) -> None:
        while True:
            await self._has_unsent.wait()
            while self._unsent:
                sent = await self._socket.send(self._unsent[0])
                if sent == len(self._unsent[0]):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = self._unsent[0][sent:]
            self._has_unsent = trio.Event()


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@asynccontextmanager
async def _pieces() -> AsyncIterator[Callable[..., None]]:
    """Run calls side by side; all end before the first of their errors is raised."""
    failures: list[errors.Exception] = []

    async def guarded(call: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        try:
            await call(*arguments)
        except errors.Exception as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        yield lambda call, *arguments: nursery.start_soon(guarded, call, *arguments)
    if failures:
        raise failures[0]


class WireLink:
    """A target behind a connection; what exceeds the provider's limits is split."""

    def __init__(self, connection: Connection, provider_id: int) -> None:
        self._connection = connection
        self._provider_id = provider_id
        self.eager_write = EAGER_THRESHOLD
        self.eager_read = EAGER_THRESHOLD

    async def _request(
        self, request: Request, arguments: Sequence[Any], data: memoryview | None = None
    ) -> Any:
        eager = None
        if data is not None and len(data) <= self.eager_write:
            eager, data = bytes(data), None
        header = (self._provider_id, request.what, arguments, eager)
        return await self._connection.request(request, header, data)

    async def call(self, name: str, arguments: Sequence[Any]) -> Any:
        operation = OPERATIONS.get(name)
        return await self._request(
            Request(name, operation.decode if operation else None), arguments
        )

    async def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        limit = self._connection.limits.payload
        if len(data) <= limit:
            await self._request(Request("write"), (region, offset, persist, extend), data)
            return
        if not extend:
            await self._check_end(region, offset, len(data), "write")
        async with _pieces() as start_soon:
            for start, end in chunks(len(data), limit):
                arguments = (region, offset + start, persist, extend)
                start_soon(self._request, Request("write"), arguments, data[start:end])

    async def _check_end(self, region: RegionID, offset: int, size: int, what: str) -> None:
        have = await self.call("size", (region,))
        if offset + size > have:
            raise errors.OutOfBounds(
                f"{what} {region!r}: {size} bytes at offset {offset} end beyond its {have} bytes"
            )

    async def read_into(self, region: RegionID, offset: int, place: memoryview) -> None:
        limit = self._connection.limits.payload
        if len(place) <= limit:
            await self._read_piece(region, offset, place, False)
            return
        await self._check_end(region, offset, len(place), "read")
        async with _pieces() as start_soon:
            for start, end in chunks(len(place), limit):
                start_soon(self._read_piece, region, offset + start, place[start:end], False)

    async def read_some(self, region: RegionID, offset: int, place: memoryview) -> int:
        return await self._read_piece(region, offset, place, True)

    async def _read_piece(
        self, region: RegionID, offset: int, place: memoryview, short: bool
    ) -> int:
        eager = len(place) <= self.eager_read
        request = Request("read", into=place, short=short)
        count: int = await self._request(request, (region, offset, len(place), eager, short))
        return count

    async def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None:
        start = 0
        async with _pieces() as start_soon:
            for group in await self._groups(region, extents, "write_vector"):
                end = start + total(group)
                arguments = (region, pack(group), persist)
                start_soon(self._request, Request("write_vector"), arguments, data[start:end])
                start = end

    async def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None:
        start = 0
        async with _pieces() as start_soon:
            for group in await self._groups(region, extents, "read_vector"):
                end = start + total(group)
                request = Request("read_vector", into=place[start:end])
                start_soon(self._request, request, (region, pack(group)))
                start = end

    async def _groups(
        self, region: RegionID, extents: list[Extent], what: str
    ) -> list[list[Extent]]:
        """What goes into one message each; when it takes several, all extents are checked first."""
        found = list(groups(extents, self._connection.limits.payload, EXTENTS))
        if len(found) > 1:
            for offset, size in extents:
                await self._check_end(region, offset, size, what)
        return found or [[]]

    async def create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        if len(data) <= self._connection.limits.payload:
            request = Request("create_and_write", RegionID)
            created: RegionID = await self._request(request, (persist,), data)
            return created
        region: RegionID = await self.call("create", (len(data),))
        try:
            await self.write(region, 0, data, persist, False)
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CONNECT_TIMEOUT):
                await self.call("erase", (region,))
            raise
        return region


def _id(region: Any) -> RegionID:
    """*region*, or ``InvalidRegion`` for what can be none."""
    return region if type(region) is RegionID else RegionID(region)


class Target:
    """A target, as :class:`warabi.client.TargetHandle`, whose methods, arguments, results and
    errors these are.

    Every method is a coroutine; a cancelled one has taken effect or not.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    async def call(self, name: str, *arguments: Any) -> Any:
        """Carry out an operation of :data:`warabi.operations.OPERATIONS`."""
        return await self._link.call(name, arguments)

    async def create(self, size: int) -> RegionID:
        region: RegionID = await self.call("create", checked_size(size, "create: size"))
        return region

    async def write(
        self,
        region: RegionID,
        offset: int,
        data: Any,
        persist: bool = False,
        *,
        extend: bool = False,
    ) -> None:
        """Store *data*; with *extend* a write beyond the region's end makes it grow."""
        view = readable(data, "write: data")
        offset = checked_size(offset, "write: offset")
        await self._link.write(_id(region), offset, view, bool(persist), extend)

    async def read(self, region: RegionID, offset: int, size: int) -> bytes:
        size = checked_size(size, "read: size")
        have = await self.size(region)
        if checked_size(offset, "read: offset") + size > have:
            raise errors.OutOfBounds(
                f"read {region!r}: {size} bytes at offset {offset} end beyond its {have} bytes"
            )
        owner = BytesIO(bytes(size))  # see filled_bytes: its buffer becomes the result
        with owner.getbuffer() as view:
            await self._link.read_into(_id(region), offset, view)
        return owner.getvalue()

    async def read_into(self, region: RegionID, offset: int, buffer: Any) -> None:
        view = writable(buffer, "read_into: buffer")
        await self._link.read_into(_id(region), checked_size(offset, "read_into: offset"), view)

    async def read_some(self, region: RegionID, offset: int, buffer: Any) -> int:
        """As :meth:`read_into`, but the region may end earlier: returns how many bytes there were.

        *buffer* is at most as large as the provider's limit on a payload.
        """
        view = writable(buffer, "read_some: buffer")
        return await self._link.read_some(
            _id(region), checked_size(offset, "read_some: offset"), view
        )

    async def persist(self, region: RegionID, offset: int, size: int) -> None:
        offset = checked_size(offset, "persist: offset")
        await self.call("persist", _id(region), offset, checked_size(size, "persist: size"))

    async def fsync(self, region: RegionID, *, times: bool = True) -> None:
        """Make the whole region durable; with *times* its timestamps too."""
        await self.call("fsync", _id(region), times)

    async def write_vector(
        self,
        region: RegionID,
        extents: Iterable[tuple[int, int]],
        data: Any,
        persist: bool = False,
    ) -> None:
        view = readable(data, "write_vector: data")
        checked = checked_extents(extents, "write_vector")
        check_total(checked, len(view), "write_vector")
        await self._link.write_vector(_id(region), checked, view, bool(persist))

    async def read_vector(
        self, region: RegionID, extents: Iterable[tuple[int, int]], buffer: Any
    ) -> None:
        view = writable(buffer, "read_vector: buffer")
        checked = checked_extents(extents, "read_vector")
        check_total(checked, len(view), "read_vector")
        await self._link.read_vector(_id(region), checked, view)

    async def persist_vector(self, region: RegionID, extents: Iterable[tuple[int, int]]) -> None:
        checked = checked_extents(extents, "persist_vector")
        for start in range(0, max(1, len(checked)), EXTENTS):
            await self.call("persist_vector", _id(region), pack(checked[start : start + EXTENTS]))

    async def erase(self, region: RegionID) -> None:
        await self.call("erase", _id(region))

    async def create_and_write(self, data: Any, persist: bool = False) -> RegionID:
        view = readable(data, "create_and_write: data")
        return await self._link.create_and_write(view, bool(persist))

    async def size(self, region: RegionID) -> int:
        size: int = await self.call("size", _id(region))
        return size

    async def stat(self, region: RegionID) -> RegionStat:
        found: RegionStat = await self.call("stat", _id(region))
        return found

    async def list(self, page_size: int = PAGE) -> AsyncIterator[RegionID]:
        last = RegionID()
        while page := await self.call("list", last, max(1, page_size)):
            for region in page:
                yield region
            last = page[-1]

    async def resize(self, region: RegionID, size: int) -> None:
        await self.call("resize", _id(region), checked_size(size, "resize: size"))

    async def put_array(self, array: NDArray[Any], persist: bool = False) -> RegionID:
        size, pieces = arrays.encode(array)
        if size <= arrays.PREFIX:
            return await self.create_and_write(b"".join(piece for _, piece in pieces), persist)
        region = await self.create(size)
        try:
            for offset, piece in pieces:
                await self.write(region, offset, piece)
            if persist:
                await self.persist(region, 0, size)
        except BaseException:
            with trio.move_on_after(_CONNECT_TIMEOUT, shield=True), suppress(errors.Exception):
                await self.erase(region)
            raise
        return region

    async def get_array(self, region: RegionID) -> NDArray[Any]:
        size = await self.size(region)
        prefix = await self.read(region, 0, min(size, arrays.PREFIX))
        start = arrays.data_offset(region, size, prefix)
        if start > len(prefix):
            prefix = await self.read(region, 0, start)
        array, place = arrays.decode(region, size, prefix[:start])
        if start + len(place) <= len(prefix):
            place[:] = prefix[start : start + len(place)]
        else:
            await self.read_into(region, start, place)
        return array

    async def open_name(self, path: str) -> RegionID:
        region: RegionID = await self.call("open_name", checked_path(path, "open_name"))
        return region

    async def link_name(self, region: RegionID, path: str) -> None:
        await self.call("link_name", _id(region), checked_path(path, "link_name"))

    async def unlink_name(self, path: str) -> None:
        await self.call("unlink_name", checked_path(path, "unlink_name"))


@asynccontextmanager
async def connect(
    address: str, provider_id: int, *, timeout: float = TIMEOUT
) -> AsyncIterator[Target]:
    """A target behind the engine at *address*, while the block runs.

    Args:
        address: as ``str(engine.addr())`` gives it.
        provider_id: 0 to 65535.
        timeout: seconds without a sign of life from the provider after which a call raises
            ``TimedOut``.

    Raises:
        ConfigError: a malformed address.
        ConnectionFailed, ProtocolError, TimedOut: no engine answers there.
        ProviderNotFound: that engine has no such provider.
    """
    endpoint = _address.parse(str(address))
    limit = min(timeout, _CONNECT_TIMEOUT)
    plain = await trio.to_thread.run_sync(_address.connect, endpoint, limit, abandon_on_cancel=True)
    plain.setblocking(False)
    connection = Connection(trio.socket.from_stdlib_socket(plain), str(endpoint), timeout)
    try:
        await connection.open()
    except BaseException:
        plain.close()
        raise
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        try:
            target = Target(WireLink(connection, provider_id))
            await target.call("ping")
            yield target
        except Exception as error:  # kept out of the nursery, which would wrap it in a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def attach(target: LocalTarget) -> Target:
    """The Trio API on a target of this process; what may wait for its medium goes to threads."""
    return Target(DirectLink(target))


__all__ = ["RegionID", "RegionStat", "Target", "attach", "connect"]
