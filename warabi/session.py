"""What a provider does with its clients' requests: target operations, and replies.

This is the only place where an exception becomes a failure reply.  One task reads a
connection; what can be answered at once is answered by that task, what has to wait for a
medium runs beside it, so replies may come in any order.  A peer that does not read its
replies, or that breaks the protocol, stops only its own connection.

Requests are ``[id, provider id, operation, arguments, eager data or None]``, replies ``[id,
result]`` with an optional third item, eager data, or ``[id, None, None, failure]``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from warabi import dispatch, errors, extents, wire
from warabi.channel import Channel
from warabi.extents import Extent
from warabi.operations import OPERATIONS, checked_arguments
from warabi.provider import ProviderCore
from warabi.region import RegionID
from warabi.request import chunks
from warabi.target import Target
from warabi.transfer import load, part, store
from warabi.wire import Limits, Message

log = logging.getLogger(__name__)

_WEIGHT = 256 * 1024  # bytes of payload that count as one more request beside the others
_UPLOADS = {"write": "ri??", "create_and_write": "?", "write_vector": "rb?"}
_DOWNLOADS = {"read": "rii??", "read_vector": "rb"}


@dataclass(slots=True)
class _Request:
    """A request with checked arguments, for a target that exists."""

    number: int
    name: str
    arguments: list[Any]
    core: ProviderCore
    target: Target
    eager: bytes | None
    payload: int  # bytes that follow


@dataclass(slots=True)
class _Plan:
    """Which bytes of which region a transfer is about."""

    region: RegionID
    extents: list[Extent]
    persist: bool = False
    extend: bool = False
    short: bool = False
    created: bool = False


class Session:
    """One connection of one client.

    Args:
        sock: the connected socket; closed at the end.
        find: the provider of an ID; raises ``ProviderNotFound``.
        shutdown: what a request to shut the engine down calls; raises ``PermissionDenied``.
    """

    def __init__(
        self,
        sock: trio.socket.SocketType,
        find: Callable[[int], ProviderCore],
        shutdown: Callable[[], None],
    ) -> None:
        self._channel = Channel(sock)
        self._find = find
        self._shutdown = shutdown
        self._reading = trio.CancelScope()
        self._handling = False  # a request, not waiting for one
        self._running = trio.Semaphore(Limits().requests)
        self._pins: defaultdict[tuple[int, int], int] = defaultdict(int)

    async def run(self) -> None:
        """Serve until the peer goes, then give back what it held."""
        try:
            async with trio.open_nursery() as nursery:
                await self._serve(nursery)
        finally:
            self._channel.close()
            self._unpin_all()

    def drain(self) -> None:
        """Answer the requests that have come in, and end."""
        self._channel.drain()
        if not self._handling:
            self._reading.cancel()

    async def _serve(self, nursery: trio.Nursery) -> None:
        try:
            with self._reading:
                await self._read_requests(nursery)
        except errors.ProtocolError as error:
            log.warning("connection refused: %s", error)
            await self._fail(0, error)
        except (OSError, trio.TooSlowError, trio.ClosedResourceError) as error:
            log.info("connection ended: %s", error or type(error).__name__)

    async def _read_requests(self, nursery: trio.Nursery) -> None:
        if not await self._channel.open():
            return
        while (event := await self._channel.next_event()) is not None:
            if isinstance(event, Message):
                self._handling = True
                await self._handle(event, nursery)
                self._handling = False

    async def _handle(self, message: Message, nursery: trio.Nursery) -> None:
        header = message.header
        if (
            not isinstance(header, list)
            or len(header) != 5
            or not all(type(item) is int for item in header[:2])
            or not isinstance(header[2], str)
            or not isinstance(header[4], bytes | None)
        ):
            raise errors.ProtocolError(f"not a request: {header!r:.100}")
        number, provider_id, name, arguments, eager = header
        try:
            if name in ("ping", "shutdown"):
                await self._control(number, provider_id, name)
                return
            request = self._checked(
                number, self._find(provider_id), name, arguments, eager, message.payload
            )
        except errors.Exception as error:
            if message.payload:
                await self._channel.drop_payload()
            await self._fail(number, error)
            return
        if name in _UPLOADS:
            await self._upload(request, nursery)
        elif name in _DOWNLOADS:
            await self._start(request, request.target.blocking, nursery, self._download)
        else:
            waits = OPERATIONS[name].waits and request.target.blocking
            await self._start(request, waits, nursery, self._operate)

    async def _control(self, number: int, provider_id: int, name: str) -> None:
        if name == "ping":
            self._find(provider_id)
            await self._reply(number, None)
            return
        self._shutdown()
        with trio.move_on_after(1.0, shield=True):  # the loop may be cancelled by now
            await self._reply(number, None)

    @staticmethod
    def _checked(
        number: int, core: ProviderCore, name: str, arguments: Any, eager: Any, payload: int
    ) -> _Request:
        letters = _UPLOADS.get(name) or _DOWNLOADS.get(name)
        if letters is None:
            operation = OPERATIONS.get(name)
            if operation is None:
                raise errors.ProtocolError(f"unknown operation {name!r:.60}")
            letters = operation.arguments
        if name not in _UPLOADS and (payload or eager is not None):
            raise errors.ProtocolError(f"{name}: takes no data")
        checked = checked_arguments(name, letters, arguments)
        return _Request(number, name, checked, core, core.target, eager, payload)

    async def _start(
        self,
        request: _Request,
        beside: bool,
        nursery: trio.Nursery,
        work: Callable[[_Request], Awaitable[None]],
    ) -> None:
        """Answer a request, *beside* the ones that follow if that may take a while."""
        if not beside:
            await self._answer(request, work)
            return
        weight = self._weight(request)
        for _ in range(weight):  # only this task acquires, so it cannot deadlock
            await self._running.acquire()
        nursery.start_soon(self._answer_beside, request, work, weight)

    async def _answer_beside(
        self, request: _Request, work: Callable[[_Request], Awaitable[None]], weight: int
    ) -> None:
        try:
            await self._answer(request, work)
        finally:
            for _ in range(weight):
                self._running.release()

    def _weight(self, request: _Request) -> int:
        """How many requests a request beside others counts for: large ones fill memory, all the
        more when the peer does not read its replies."""
        limit = self._channel.limits.payload
        size = request.payload
        if request.name == "read":
            size = request.arguments[2]
        elif request.name == "read_vector":
            size = limit
        return 1 + min(max(size, 0), limit) // _WEIGHT

    async def _answer(self, request: _Request, work: Callable[[_Request], Awaitable[None]]) -> None:
        """Do *work*, which replies, and turn what it raises into a failure."""
        try:
            await work(request)
        except errors.Exception as error:
            await self._fail(request.number, error)
        except trio.TooSlowError:
            log.info("connection ended: its peer takes no data")
            self._channel.close()
        except OSError as error:
            await self._fail(request.number, errors.from_os(error, request.name))
        except Exception as error:
            log.exception("a defect in operation %s", request.name)
            reason = f"{request.name}: {type(error).__name__} in the provider, see its log"
            await self._fail(request.number, errors.ProviderFailed(reason))

    async def _operate(self, request: _Request) -> None:
        operation = OPERATIONS[request.name]
        result = await dispatch.execute(request.target, operation, request.arguments)
        if operation.pins and (pinned := operation.pins(request.arguments, result)):
            self._pins[request.core.provider_id, pinned[0]] += pinned[1]
        await self._reply(request.number, result)

    # Uploads: the payload has to be received before the next request is looked at

    async def _upload(self, request: _Request, nursery: trio.Nursery) -> None:
        transfers = request.core.transfers
        if not request.payload:
            data = request.eager or b""
            beside = request.target.blocking
            await self._start(request, beside, nursery, lambda r: self._store(r, data))
        elif request.payload <= transfers.chunk:
            view = await transfers.acquire(request.payload)
            try:
                await self._channel.fill(view, transfers.patience)
            except BaseException:
                transfers.release(view)
                raise
            beside = request.target.blocking
            await self._start(request, beside, nursery, lambda r: self._store_and_release(r, view))
        else:
            await self._answer(request, self._upload_in_chunks)

    async def _store_and_release(self, request: _Request, view: memoryview) -> None:
        try:
            await self._store(request, view)
        finally:
            request.core.transfers.release(view)

    async def _store(self, request: _Request, data: bytes | memoryview) -> None:
        target = request.target
        if request.name == "write":
            region, offset, persist, extend = request.arguments
            await dispatch.write(target, region, offset, data, persist, extend)
            await self._reply(request.number, None)
        elif request.name == "create_and_write":
            region = await dispatch.create_and_write(target, data, request.arguments[0])
            await self._reply(request.number, region)
        else:
            operation = OPERATIONS[request.name]
            await dispatch.execute(target, operation, [*request.arguments, data])
            await self._reply(request.number, None)

    async def _upload_in_chunks(self, request: _Request) -> None:
        """Receive a chunk while those before it are being stored."""
        transfers = request.core.transfers
        failures: list[Exception] = []
        plan: _Plan | None = None
        try:
            plan = self._plan_upload(request)
        except errors.Exception as error:
            failures.append(error)
        if plan is None:
            await self._channel.drop_payload()
            raise failures[0]
        broken: Exception | None = None
        async with trio.open_nursery() as stores:
            try:
                for start, end in chunks(request.payload, transfers.chunk):
                    view = await transfers.acquire(end - start)
                    try:
                        await self._channel.fill(view, transfers.patience)
                    except BaseException:
                        transfers.release(view)
                        raise
                    stores.start_soon(self._store_chunk, request, plan, start, end, view, failures)
            except Exception as error:  # kept out of the nursery, which would wrap it in a group
                broken = error
        if plan.created and (broken or failures):
            request.target.erase(plan.region)
        if broken or failures:
            raise broken or failures[0]
        if plan.persist:
            await dispatch.execute(
                request.target,
                OPERATIONS["persist_vector"],
                [plan.region, extents.pack(plan.extents)],
            )
        await self._reply(request.number, plan.region if plan.created else None)

    @staticmethod
    def _plan_upload(request: _Request) -> _Plan:
        """What to write where; what cannot be written is refused before its first chunk."""
        target, size = request.target, request.payload
        if request.name == "create_and_write":
            region = target.create(size)
            return _Plan(region, [(0, size)], persist=request.arguments[0], created=True)
        if request.name == "write":
            region, offset, persist, extend = request.arguments
            plan = _Plan(region, [(offset, size)], persist, extend)
        else:
            region, packed, persist = request.arguments
            plan = _Plan(region, extents.unpack(packed, request.name), persist)
            extents.check_total(plan.extents, size, request.name)
        _check_bounds(target, plan, request.name)
        return plan

    @staticmethod
    async def _store_chunk(
        request: _Request,
        plan: _Plan,
        start: int,
        end: int,
        view: memoryview,
        failures: list[Exception],
    ) -> None:
        try:
            pieces = part(plan.extents, start, end)
            await store(request.target, plan.region, pieces, view, plan.extend)
        except Exception as error:
            failures.append(error)
        finally:
            request.core.transfers.release(view)

    # Downloads

    async def _download(self, request: _Request) -> None:
        plan, eager = self._plan_download(request)
        size = extents.total(plan.extents)
        transfers = request.core.transfers
        if eager:
            data = memoryview(bytearray(size))
            await load(request.target, plan.region, plan.extents, data, plan.short)
            await self._reply(request.number, None, data.obj)
        elif size <= transfers.chunk:
            view = await transfers.acquire(size)
            try:
                await load(request.target, plan.region, plan.extents, view, plan.short)
                await self._channel.send([wire.frame([request.number, None], size), view])
            finally:
                transfers.release(view)
        else:
            await self._download_in_chunks(request, plan, size)

    def _plan_download(self, request: _Request) -> tuple[_Plan, bool]:
        """What to read from where, and whether it is small enough for the reply's header."""
        eager = False
        short = False
        if request.name == "read":
            region, offset, size, eager, short = request.arguments
            if short and size > 0:
                size = min(size, max(0, request.target.size(region) - offset))
            plan = _Plan(region, [(offset, size)], short=short)
        else:
            region, packed = request.arguments
            plan = _Plan(region, extents.unpack(packed, request.name))
            size = extents.total(plan.extents)
        # The peer's limit may be anything; what is allocated here keeps to this side's too.
        limit = min(self._channel.peer.payload, self._channel.limits.payload)
        if not 0 <= size <= limit or (eager and size > self._channel.peer.header // 2):
            raise errors.ProtocolError(
                f"{request.name}: {size} bytes in one reply, the limit is {limit}"
            )
        if not short:
            _check_bounds(request.target, plan, request.name)
        return plan, eager

    async def _download_in_chunks(self, request: _Request, plan: _Plan, size: int) -> None:
        """Load a chunk while the one before it is being sent.

        The first chunk is loaded before anything is sent, so what is wrong from the start is a
        failure reply; later only the end of the connection can say so.
        """
        transfers = request.core.transfers
        pieces = list(chunks(size, transfers.chunk))
        view = await transfers.acquire(transfers.chunk)
        try:
            await self._load_chunk(request, plan, pieces[0], view)
            async with self._channel.stream() as stream:
                await stream.send(wire.frame([request.number, None], size))
                for index, (start, end) in enumerate(pieces):
                    following = pieces[index + 1] if index + 1 < len(pieces) else None
                    # Never wait for a second buffer while holding one: others may do the same.
                    ahead = transfers.acquire_nowait(transfers.chunk) if following else None
                    failures: list[Exception] = []
                    async with trio.open_nursery() as nursery:
                        if following and ahead is not None:
                            nursery.start_soon(
                                self._load_ahead, request, plan, following, ahead, failures
                            )
                        try:
                            await stream.send(view[: end - start])
                        except Exception as error:
                            failures.append(error)
                    if ahead is not None:
                        transfers.release(view)
                        view = ahead
                    if failures:
                        raise failures[0]
                    if following and ahead is None:
                        await self._load_chunk(request, plan, following, view)
        finally:
            transfers.release(view)

    @staticmethod
    async def _load_chunk(
        request: _Request, plan: _Plan, piece: tuple[int, int], view: memoryview
    ) -> None:
        start, end = piece
        pieces = part(plan.extents, start, end)
        await load(request.target, plan.region, pieces, view[: end - start], plan.short)

    async def _load_ahead(
        self,
        request: _Request,
        plan: _Plan,
        piece: tuple[int, int],
        view: memoryview,
        failures: list[Exception],
    ) -> None:
        try:
            await self._load_chunk(request, plan, piece, view)
        except Exception as error:
            failures.append(error)

    # Replies

    async def _reply(self, number: int, result: Any, eager: Any = None) -> None:
        header = [number, result] if eager is None else [number, result, eager]
        await self._channel.send([wire.frame(header, 0, self._channel.peer)])

    async def _fail(self, number: int, error: errors.Exception) -> None:
        await self._channel.send([wire.frame([number, None, None, errors.to_wire(error)])])

    def _unpin_all(self) -> None:
        for (provider_id, ino), count in self._pins.items():
            try:
                if count > 0:
                    self._find(provider_id).target.namespace.unpin(ino, count)
            except errors.Exception as error:
                log.debug("unpin of inode %d: %s", ino, error)


def _check_bounds(target: Target, plan: _Plan, what: str) -> None:
    """Refuse a transfer before memory for it is asked for."""
    have = target.size(plan.region)
    for offset, size in plan.extents:
        if not plan.extend and (offset < 0 or offset + size > have):
            raise errors.OutOfBounds(
                f"{what} {plan.region!r}: {size} bytes at offset {offset} end beyond its"
                f" {have} bytes"
            )
