"""The link of a blocking handle to a target behind a connection."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from warabi import errors
from warabi._core import interrupts
from warabi._core.attributes import FETCHED, Attributes
from warabi._core.buffers import checked_size
from warabi._core.extents import EXTENTS, Extent, beyond_end, groups, pack, total
from warabi.in_process.link import finished, give_back, wait_all
from warabi.protocol.operations import CREATE, UNDONE
from warabi.protocol.pending import EAGER_THRESHOLD, PendingRequest, check_append, chunks
from warabi.region import RegionID
from warabi.remote.connection import BlockingConnection
from warabi.remote.direct import DirectAccessChannel
from warabi.shm.client import NO_ACCESS, DirectAccess


class WireLink:
    """A link to a target over a connection; splits transfers that exceed the provider's limits.

    Args:
        connect: returns the connection for the next request.
        provider_id: of the target's provider.
        side: direct access, where that is possible.
    """

    def __init__(
        self,
        connect: Callable[[], BlockingConnection],
        provider_id: int,
        side: DirectAccessChannel | None = None,
    ) -> None:
        self._connect = connect
        self._side = side
        self.writing: DirectAccess = NO_ACCESS if side is None else side
        self.reading: DirectAccess = self.writing
        self._provider_id = provider_id
        self.eager_write = EAGER_THRESHOLD
        self.eager_read = EAGER_THRESHOLD

    def _submit(
        self,
        connection: BlockingConnection,
        request: PendingRequest,
        arguments: Sequence[Any],
        data: memoryview | None = None,
        eager_size: int | None = None,
    ) -> None:
        payload = eager = None
        if eager_size is None:
            eager_size = self.eager_write
        if data is not None and len(data) <= min(eager_size, connection.limits.header // 2):
            eager = bytes(data)
        elif data is not None:
            payload = data
        header = [self._provider_id, request.what, arguments, eager]
        connection.submit(request, header, payload)

    def _run(self, begin: Callable[..., None], *arguments: Any) -> Any:
        """Run the requests that *begin* sends and adds to its first argument, a list.

        If the caller is interrupted, here or while waiting, no request that accesses its buffers is
        left behind: each is in the list before it is sent.
        """
        requests: list[PendingRequest] = []
        connection = self._connect()
        return connection.guarded(
            requests, self._complete, (requests, connection, begin, arguments)
        )

    def _complete(
        self,
        requests: list[PendingRequest],
        connection: BlockingConnection,
        begin: Callable[..., None],
        arguments: tuple[Any, ...],
    ) -> Any:
        begin(requests, connection, *arguments)
        return wait_all(connection.wait, requests)

    def _begun(self, begin: Callable[..., None], *arguments: Any) -> list[PendingRequest]:
        """The same as :meth:`_run`, without waiting."""
        requests: list[PendingRequest] = []
        connection = self._connect()
        connection.guarded(requests, begin, (requests, connection, *arguments))
        return requests

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._run(self._request, name, *arguments)

    def _erase(self, region: RegionID) -> None:
        self._call("erase", region)

    def _request(
        self,
        requests: list[PendingRequest],
        connection: BlockingConnection,
        name: str,
        *arguments: Any,
    ) -> None:
        request = self._new(requests, name, arguments)
        self._submit(connection, request, arguments)

    def _new(
        self,
        requests: list[PendingRequest],
        name: str,
        arguments: Sequence[Any] = (),
        **settings: Any,
    ) -> PendingRequest:
        request = PendingRequest(name, **settings)
        if name in UNDONE:
            request.late = partial(give_back, self._call, name, arguments)
        requests.append(request)
        return request

    def call(self, name: str, *arguments: Any) -> Any:
        if name in UNDONE:
            return interrupts.creating(
                lambda: self._call(name, *arguments),
                partial(give_back, self._call, name, arguments),
            )
        return self._call(name, *arguments)

    def start(self, name: str, *arguments: Any) -> list[PendingRequest]:
        if name in CREATE:
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
    ) -> list[PendingRequest]:
        if self._side is not None:
            try:
                done = self._side.write(region, offset, data, wait=False)
            except errors.Exception as error:
                return [finished("write", error=error)]
            if done and persist:
                return self.start("persist", region, offset, len(data))
            if done:
                return [finished("write")]
        return self._begun(self._write, region, offset, data, persist, False)

    def _write(
        self,
        requests: list[PendingRequest],
        connection: BlockingConnection,
        region: RegionID,
        offset: int,
        data: memoryview,
        persist: bool,
        extend: bool,
    ) -> None:
        limit = connection.limits.payload
        if len(data) > limit and not extend:
            self._check_end(region, checked_size(offset, "write: offset"), len(data), "write")
        for start, end in list(chunks(len(data), limit)) or [(0, 0)]:
            interrupts.check()
            piece = data[start:end]
            request = self._new(requests, "write", buffers=piece)
            self._submit(connection, request, (region, offset + start, persist, extend), piece)

    def _check_end(self, region: RegionID, offset: int, size: int, what: str) -> None:
        """Check the bounds of a transfer in chunks before its first chunk."""
        have = self.size(region)
        if offset + size > have:
            raise beyond_end(what, region, offset, size, have)

    def read_into(self, region: RegionID, offset: int, place: memoryview) -> None:
        if not self.reading.read_into(region, offset, place):
            self._run(self._read, region, offset, place)

    def persist(self, region: RegionID, offset: int, size: int) -> None:
        if not self.writing.persist(region, offset, size):
            self.call("persist", region, offset, size)

    def start_read(self, region: RegionID, offset: int, place: memoryview) -> list[PendingRequest]:
        if self._side is not None:
            try:
                if self._side.read_into(region, offset, place, wait=False):
                    return [finished("read")]
            except errors.Exception as error:
                return [finished("read", error=error)]
        return self._begun(self._read, region, offset, place)

    def _read(
        self,
        requests: list[PendingRequest],
        connection: BlockingConnection,
        region: RegionID,
        offset: int,
        place: memoryview,
    ) -> None:
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
        requests: list[PendingRequest],
        connection: BlockingConnection,
        region: RegionID,
        extents: list[Extent],
        data: memoryview,
        persist: bool,
    ) -> None:
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
        self,
        requests: list[PendingRequest],
        connection: BlockingConnection,
        region: RegionID,
        data: memoryview,
        persist: bool,
    ) -> None:
        check_append(len(data), connection.limits.payload)
        request = self._new(requests, "append", buffers=data)
        self._submit(connection, request, (region, persist), data)

    def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None:
        self._run(self._read_vector, region, extents, place)

    def _read_vector(
        self,
        requests: list[PendingRequest],
        connection: BlockingConnection,
        region: RegionID,
        extents: list[Extent],
        place: memoryview,
    ) -> None:
        start = 0
        for group in self._groups(connection, region, extents, "read_vector"):
            end = start + total(group)
            request = self._new(requests, "read_vector", into=place[start:end])
            self._submit(connection, request, (region, pack(group)))
            start = end

    def _groups(
        self, connection: BlockingConnection, region: RegionID, extents: list[Extent], what: str
    ) -> list[list[Extent]]:
        """Yield the extents for each message; if there are several, all are checked first."""
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

    def _begin_create(
        self,
        requests: list[PendingRequest],
        connection: BlockingConnection,
        data: memoryview,
        persist: bool,
    ) -> None:
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
        """Write *data* to a new region; on failure it is erased."""
        try:
            if not fill(data):
                self._run(self._write, region, 0, data, persist, False)
            elif persist:
                self.persist(region, 0, len(data))
        except BaseException:
            with contextlib.suppress(errors.Exception):
                self._erase(region)
            raise

    def store(self, arguments: Sequence[Any], data: memoryview) -> Attributes | None:
        if self._side is not None:
            made = self._side.make(len(data), unnamed=True)
            if made is not None:
                return self._publish(*made, arguments, data)
        if len(data) > self._connect().limits.payload:
            return None
        stored: Attributes = self._run(self._store, arguments, data)
        return stored

    def _publish(
        self,
        region: RegionID,
        fill: Callable[[memoryview], bool],
        arguments: Sequence[Any],
        data: memoryview,
    ) -> Attributes:
        """Write *data* to a new region by direct access, and give it its name."""
        path, mode, uid, gid, exclusive, persist = arguments
        self._fill(region, data, persist, fill)
        try:
            stored: Attributes = self.call("publish", region, path, exclusive, mode, uid, gid)
        except BaseException:
            with contextlib.suppress(errors.Exception):
                self._erase(region)
            raise
        if persist:
            self.call("commit")
        return stored

    def _store(
        self,
        requests: list[PendingRequest],
        connection: BlockingConnection,
        arguments: Sequence[Any],
        data: memoryview,
    ) -> None:
        request = self._new(requests, "store", buffers=data)
        self._submit(connection, request, arguments, data, max(self.eager_write, FETCHED))

    def start_create_and_write(self, data: memoryview, persist: bool) -> list[PendingRequest]:
        if len(data) <= self._connect().limits.payload:
            return interrupts.creating(
                lambda: self._begun(self._begin_create, data, persist), self.undo
            )
        region = interrupts.creating(lambda: self._create_large(data, persist), self._erase)
        return [finished("create_and_write", region)]

    def start_store(self, arguments: Sequence[Any], data: memoryview) -> list[PendingRequest]:
        if len(data) > self._connect().limits.payload:
            return []
        if self._side is not None and self._side.makes(len(data)):
            return []
        return self._begun(self._store, arguments, data)

    def poll(self, request: PendingRequest) -> None:
        request.connection.guarded((), request.connection.poll)

    def finish(self, requests: Sequence[PendingRequest]) -> Any:
        for request in requests:
            if not request.done:
                connection = request.connection
                reads = [request for request in requests if request.into is not None]
                return connection.guarded(reads, wait_all, (connection.wait, requests))
        return wait_all(PendingRequest.outcome, requests)

    def undo(self, requests: Sequence[PendingRequest]) -> None:
        for request in requests:
            if request.connection is not None:
                request.connection.withdraw_all([request])
            if isinstance(request.result, RegionID):
                self._erase(request.result)
