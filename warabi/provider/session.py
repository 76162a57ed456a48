"""Sessions of clients: executing requests, and sending replies.

This is the only place where an exception becomes an error reply.  One task reads a connection;
requests that do not block are executed by that task, those that turn out to have to wait for stable
storage run concurrently, so replies may be sent in any order.  A peer that does not read its
replies, or violates the protocol, affects only its own connection.

Requests are ``[id, provider id, operation, arguments, eager data or None]``, replies ``[id,
result]`` with an optional third item, eager data, or ``[id, None, None, failure]``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from time import perf_counter_ns
from typing import Any

import trio

from warabi import errors
from warabi._core import changes
from warabi._core.log_limit import RateLimit
from warabi.errors import WouldBlock
from warabi.in_process import async_ops
from warabi.in_process.locking import Granting, SessionLocks
from warabi.in_process.occupancy import wait_free
from warabi.in_process.watch import Watching
from warabi.protocol import change_codec, wire
from warabi.protocol.auth import Peer, Security, permit
from warabi.protocol.limits import EngineLimits
from warabi.protocol.operations import (
    OPERATIONS,
    READING,
    Payload,
    Served,
    checked_arguments,
    operation_named,
)
from warabi.protocol.wire import NEED_DATA, Message
from warabi.provider import chunked, zero_copy
from warabi.provider.admission import Budget
from warabi.provider.buffer_pool import load
from warabi.provider.channel import Channel
from warabi.provider.core import ProviderCore
from warabi.provider.direct_access import GuestConnection
from warabi.provider.idle_connections import LEAVES, MORE, STAYS, IdleConnections, Next
from warabi.provider.inode_refs import Pins
from warabi.provider.migration.exchange import Exchange
from warabi.provider.requests import (
    SMALL,
    TargetRequest,
    TransferPlan,
    check_data,
    checked_header,
    checked_request,
    memory,
    plan_download,
)

log = logging.getLogger(__name__)
log.addFilter(RateLimit())  # messages are caused by peers


_REPORT = 64 * 1024
"""Bytes that a reply to ``stats`` may take."""
_WHOLE = ("append", "store")
"""Uploads that must have arrived before they begin: an offset, or a name, is determined then."""


class ClientSession:
    """One connection of one client.

    Args:
        sock: the connected socket; closed at the end.
        find: returns the provider of an ID; raises ``ProviderNotFound``.
        shutdown: called by a shutdown request; raises ``PermissionDenied``.
        security: requirements on the client.
        limits: limits on the client.
        local: whether it is known to be a process of this user, or of root, on this host.
        admit: called after the handshake; raises ``ConnectionFailed``.
        leave: called when the connection has ended.
        host: grants direct access; None if the peer can have none.
        idle_connections: the idle connections of the loop.
        name: how the client is called in reports, such as its host.
        report: returns the state of a provider and of the engine; called in a thread.

    Attributes:
        since: when the client connected, in seconds since the epoch.
        requests: number of requests so far.
    """

    def __init__(
        self,
        sock: socket.socket,
        find: Callable[[int], ProviderCore],
        shutdown: Callable[[], None],
        *,
        security: Security,
        limits: EngineLimits,
        local: bool,
        admit: Callable[[], None],
        leave: Callable[[], None],
        host: GuestConnection | None,
        idle_connections: IdleConnections,
        name: str,
        report: Callable[[int], dict[str, Any]],
    ) -> None:
        self.name = name
        self.since = time.time()
        self.requests = 0
        self._report_of = report
        self._host = host
        self._idle_connections = idle_connections
        self._channel = Channel(sock, limits.wire, idle_connections)
        self._exchange = Exchange(local, self._channel.close)
        self._find = find
        self._shutdown = shutdown
        self._security = security
        self._local = local
        self._admit = admit
        self._leave = leave
        self._peer = Peer(read_only=True)  # until it is authenticated
        self._reading = trio.CancelScope()
        self._handling = False  # whether a request is being handled
        self._nursery: trio.Nursery | None = None
        self._held: wire.Event | None = NEED_DATA  # event that the leader left to this task
        self._writes = zero_copy.Sequence()
        self._running = Budget(limits.requests, limits.outstanding)
        self._pins = Pins()
        self._locks = SessionLocks()
        self._origin = changes.Origin()  # referenced by inodes, which outlive the session
        self._watching = Watching(self._origin)
        self._watchers = 0  # pending watch requests

    def describe(self) -> dict[str, Any]:
        """Return what is known of the client, as JSON can have it.  From any thread."""
        return {
            "client": self.name,
            "since": self.since,
            "read_only": self._peer.read_only,
            "requests": self.requests,
            "pending": self._running.under_way,
            "watches": self._watchers,
            "direct_access": self._host is not None and self._host.joined,
        }

    def fileno(self) -> int:
        """The socket's descriptor; -1 if it is closed."""
        return self._channel.fileno()

    async def run(self) -> None:
        """Serve until the peer disconnects, then release its pins and grants."""
        changes.ORIGIN.set(self._origin)
        try:
            async with trio.open_nursery() as nursery:
                try:
                    await self._serve(nursery)
                finally:
                    self._watching.end()
                    self._locks.end()
        finally:
            self._channel.close()
            self._leave()
            await self._pins.give_back(self._find)
            await self._exchange.aclose()
        if self._host is not None:
            await self._host.end()

    def drop(self) -> None:
        """Close at once; only before the handshake has completed."""
        self._reading.cancel()

    def drain(self) -> None:
        """Complete the requests that have arrived, and end."""
        self._channel.drain()
        self._watching.finish()
        self._locks.end()
        if self._host is not None:
            self._host.drain()
        if not self._handling:
            self._reading.cancel()

    async def _serve(self, nursery: trio.Nursery) -> None:
        try:
            with self._reading:
                await self._read_requests(nursery)
            if self._reading.cancelled_caught and self._nursery is not None:
                await self._take_requests(nursery)  # requests that have arrived
        except errors.Exception as error:  # an error outside of a request closes the connection
            log.warning("connection refused: %s", error)
            await self._fail(0, error)
        except (OSError, trio.TooSlowError, trio.ClosedResourceError) as error:
            log.info("connection ended: %s", error or type(error).__name__)

    async def _read_requests(self, nursery: trio.Nursery) -> None:
        peer = await self._channel.open(self._security, local=self._local)
        if peer is None:
            return
        self._admit()
        self._peer = peer
        self._nursery = nursery
        await self._take_requests(nursery)

    async def _take_requests(self, nursery: trio.Nursery) -> None:
        channel = self._channel
        while True:
            # Watch requests wait for changes by others, which are still served then.
            idle = self._running.under_way == self._watchers
            event = await channel.next_event(look=idle, wait=not channel.plain)
            if event is NEED_DATA:
                self._handling = False
                await channel.wait_to_serve(self._serve_at_once)
                event, self._held = self._held, NEED_DATA
            if event is None:
                return
            if isinstance(event, Message):
                self._handling = True
                await self._handle(event, nursery)
                self._handling = False

    async def _serve_at_once(self) -> Next:
        """Serve a request that has arrived completely, while this connection is idle."""
        channel = self._channel
        event = channel.event_nowait()
        if event is NEED_DATA:
            self._handling = False
            return STAYS
        self._handling = True
        if not isinstance(event, Message) or (
            event.payload and event.payload > len(channel.arrived())
        ):
            self._held = event
            return LEAVES
        assert self._nursery is not None
        changes.ORIGIN.set(self._origin)
        await self._handle(event, self._nursery)
        self._handling = not channel.between_messages
        if self._handling:
            return MORE
        return LEAVES if channel.alone or channel.draining else STAYS

    async def _handle(self, message: Message, nursery: trio.Nursery) -> None:
        number, provider_id, name, arguments, eager = checked_header(message.header)
        began = perf_counter_ns()
        self.requests += 1
        try:
            operation = operation_named(name)
            permit(self._peer, name, operation.access)
            check_data(name, eager, message.payload)
            served = operation.served
            if served is Served.ENGINE:
                await self._control(number, provider_id, name, arguments, nursery)
                return
            core = self._find(provider_id)
            if served is Served.LOCKS:
                await self._lock(number, core, name, arguments, nursery)
                core.counters.add(name, perf_counter_ns() - began)
                return
            if served is Served.DIRECT_ACCESS:
                await self._share(number, core, name, arguments)
                core.counters.add(name, perf_counter_ns() - began)
                return
            request = None
            if served is not Served.MIGRATION:
                request = checked_request(
                    number, core, name, arguments, eager, message.payload, began
                )
        except errors.Exception as error:
            if message.payload:
                await self._channel.drop_payload()
            self._count_failure(provider_id, name, error, perf_counter_ns() - began)
            await self._fail(number, error)
            return
        if request is None:
            await self._migrate(message, core, began, operation.waits, nursery)
        elif operation.payload is Payload.UPLOAD:
            await self._upload(request, nursery)
        elif operation.payload is Payload.DOWNLOAD:
            await self._start(request, request.target.occupied, nursery, self._download)
        else:
            elsewhere = async_ops.off_loop(request.target, name)
            await self._start(request, elsewhere, nursery, self._operate)

    async def _control(
        self, number: int, provider_id: int, name: str, arguments: Any, nursery: trio.Nursery
    ) -> None:
        checked = checked_arguments(name, arguments)
        if name == "watch":
            await self._running.acquire(0)
            self._watchers += 1
            nursery.start_soon(self._watch, number, provider_id, checked)
            return
        if name == "ping":
            self._find(provider_id)
            await self._reply(number, None)
            return
        if name == "stats":
            self._find(provider_id)
            await self._running.acquire(_REPORT)
            nursery.start_soon(self._send_report, number, provider_id)
            return
        self._shutdown()
        with trio.move_on_after(1.0, shield=True):  # the loop may have been cancelled
            await self._reply(number, None)

    async def _send_report(self, number: int, provider_id: int) -> None:
        try:
            found = await trio.to_thread.run_sync(self._report_of, provider_id)
            await self._reply(number, json.dumps(found))
        except Exception as error:
            await self._report(number, provider_id, "stats", error)
        finally:
            self._running.release(_REPORT)

    async def _lock(
        self, number: int, core: ProviderCore, name: str, arguments: Any, nursery: trio.Nursery
    ) -> None:
        """Execute an operation on locks.  One that waits is none of the pending requests whose
        number is limited: those of a mount could all be waiting for a lock of the mount itself."""
        checked = checked_arguments(name, arguments)
        if core.target.occupied:
            await wait_free(core.target)
        try:
            result = self._locks.begin(core.target, name, checked)
        except Exception as error:
            await self._report(number, core.provider_id, name, error)
            return
        if isinstance(result, Granting):
            nursery.start_soon(self._grant, number, core.provider_id, result)
        else:
            await self._reply(number, result)

    async def _grant(self, number: int, provider_id: int, granting: Granting) -> None:
        try:
            await granting.wait()
            await self._reply(number, None)
        except Exception as error:
            await self._report(number, provider_id, "lock", error)

    async def _share(self, number: int, core: ProviderCore, name: str, arguments: Any) -> None:
        checked = checked_arguments(name, arguments)
        if name == "join":
            checked[0] = checked[0] and not self._peer.read_only
        if self._host is None:
            return await self._reply(number, None)
        if core.target.occupied:
            await wait_free(core.target)
        target = core.target
        makes = name in ("make", "make_unnamed")
        if makes and not core.changes.enter_nowait():
            return await self._reply(number, None)  # another request is pending
        try:
            result, descriptors = await self._host.answer(target, name, checked)
        finally:
            if makes:
                core.changes.leave()
        try:
            await self._channel.send([wire.frame([number, result])], descriptors)
        finally:
            for fd in descriptors:
                os.close(fd)

    async def _watch(self, number: int, provider_id: int, arguments: list[Any]) -> None:
        """Reply when something changes that this connection did not change itself."""
        try:
            found = await self._watching.changes(lambda: self._find(provider_id).target, *arguments)
            await self._reply(number, change_codec.to_wire(found))
        except Exception as error:
            await self._report(number, provider_id, "watch", error)
        finally:
            self._watchers -= 1
            self._running.release(0)

    async def _migrate(
        self,
        message: Message,
        core: ProviderCore,
        began: int,
        concurrently: bool,
        nursery: trio.Nursery,
    ) -> None:
        """Handle a message of a migration; its payload is received first, whatever the
        permissions."""
        number, _, name, arguments, _ = message.header
        data = memoryview(bytearray(message.payload))
        if message.payload:
            await self._channel.fill(data)

        async def answer() -> None:
            try:
                result = await self._exchange.call(core, name, arguments, data)
                core.counters.add_bytes(name, len(data))
                await self._reply(number, result)
            except Exception as error:
                await self._report(number, core.provider_id, name, error)
            core.counters.add(name, perf_counter_ns() - began)

        if concurrently:
            nursery.start_soon(answer)
        else:
            await answer()

    async def _start(
        self,
        request: TargetRequest,
        concurrent: bool,
        nursery: trio.Nursery,
        work: Callable[[TargetRequest], Awaitable[None]],
    ) -> None:
        """Serve a request, concurrently with later ones if it has to wait."""
        if request.name not in READING and not request.entered:
            request.entered = request.core.changes.enter_nowait()
            concurrent = concurrent or not request.entered
        if not concurrent:
            try:
                return await self._answer(request, work)
            except WouldBlock:
                pass
        request.concurrent = True
        size = memory(request, self._channel.limits.payload)
        await self._running.acquire(size)
        self._idle_connections.concurrent += 1
        nursery.start_soon(self._answer_concurrently, request, work, size)

    async def _answer_concurrently(
        self, request: TargetRequest, work: Callable[[TargetRequest], Awaitable[None]], size: int
    ) -> None:
        try:
            await self._answer(request, work)
        finally:
            self._idle_connections.concurrent -= 1
            self._running.release(size)

    async def _answer(
        self, request: TargetRequest, work: Callable[[TargetRequest], Awaitable[None]]
    ) -> None:
        """Run *work*, which replies, after entering the gate if it changes the target.

        Raises:
            WouldBlock: it must be run concurrently; it stays inside the gate.
        """
        leave = True
        try:
            # Others have entered, or change nothing, as _start found.
            if request.concurrent and not request.entered and request.name not in READING:
                await request.core.changes.enter()
                request.entered = True
                request.target = request.core.target  # it may have been migrated meanwhile
            if request.target.occupied:
                await wait_free(request.target)
                request.target = request.core.target
            await work(request)
        except WouldBlock:
            leave = False
            raise
        except Exception as error:
            await self._report(request.number, request.core.provider_id, request.name, error)
        finally:
            if leave:
                if request.entered:
                    request.core.changes.leave()
                request.core.counters.add(request.name, perf_counter_ns() - request.began)

    async def _report(self, number: int, provider_id: int, name: str, error: Exception) -> None:
        """Send the exception of an operation as an error reply."""
        if isinstance(error, trio.TooSlowError):
            log.info("connection closed: the peer does not read its replies")
            self._channel.close()
        else:
            failure = async_ops.failure(error, name)
            self._count_failure(provider_id, name, failure)
            await self._fail(number, failure)

    def _count_failure(
        self, provider_id: int, name: str, error: errors.Exception, took: int | None = None
    ) -> None:
        with contextlib.suppress(errors.ProviderNotFound):
            counters = self._find(provider_id).counters
            known = name if name in OPERATIONS else "unknown"
            counters.fail(known, error, self.name)
            if took is not None:  # it has not been counted
                counters.add(known, took)

    async def _operate(self, request: TargetRequest) -> None:
        operation = OPERATIONS[request.name]
        if request.name == "unpin":
            self._pins.check(request.core.provider_id, *request.arguments)
        result = await async_ops.execute(
            request.target, request.name, request.arguments, wait=request.concurrent
        )
        if operation.pins and (pinned := operation.pins(request.arguments, result)):
            self._pins.note(request.core.provider_id, *pinned)
        if request.name == "fetch" and result[1]:
            request.core.counters.add_bytes("fetch", len(result[1]))
        await self._reply(request.number, result)

    # Uploads: the payload must be received before the next request is parsed

    async def _upload(self, request: TargetRequest, nursery: trio.Nursery) -> None:
        transfers = request.core.transfers
        if request.payload and request.target.occupied:
            own = memoryview(bytearray(request.payload))
            await self._channel.fill(own, transfers.patience)
            await self._start(request, True, nursery, lambda r: self._store(r, own))
        elif not request.payload:
            data = request.eager or b""
            concurrent = async_ops.waits(request.target, request.name, request.arguments)
            await self._start(request, concurrent, nursery, lambda r: self._store(r, data))
        elif request.payload <= transfers.chunk:
            size = request.payload
            received = await zero_copy.receive(self._channel, request)
            request.core.counters.add_bytes(request.name, size - request.payload)
            if received:
                await self._reply(request.number, None)
                self._writes.answered(request, size)
                request.core.counters.add(request.name, perf_counter_ns() - request.began)
                return
            view = await transfers.acquire(request.payload)
            try:
                await self._channel.fill(view, transfers.patience)
            except BaseException:
                transfers.release(view)
                raise
            request.entered = request.core.changes.enter_nowait()
            if not request.entered:  # a shared buffer must not wait for the gate
                own = memoryview(bytes(view))
                transfers.release(view)
                await self._start(request, True, nursery, lambda r: self._store(r, own))
                return
            concurrent = async_ops.waits(request.target, request.name, request.arguments)
            await self._start(
                request, concurrent, nursery, lambda r: self._store_and_release(r, view)
            )
        elif request.name not in _WHOLE and request.core.changes.enter_nowait():
            request.entered = True
            await self._answer(request, self._store_in_chunks)
        else:
            own = memoryview(bytearray(request.payload))
            await self._channel.fill(own, transfers.patience)
            await self._start(request, True, nursery, lambda r: self._store(r, own))

    async def _store_and_release(self, request: TargetRequest, view: memoryview) -> None:
        release = True
        try:
            await self._store(request, view)
        except WouldBlock:  # it is repeated
            release = False
            raise
        finally:
            if release:
                request.core.transfers.release(view)

    async def _store(self, request: TargetRequest, data: bytes | memoryview) -> None:
        target = request.target
        size = len(data)
        if request.name == "write":
            region, offset, persist, extend = request.arguments
            await async_ops.write(
                target, region, offset, data, persist, extend, wait=request.concurrent
            )
            await self._reply(request.number, None)
        elif request.name == "create_and_write":
            region = await async_ops.create_and_write(target, data, request.arguments[0])
            await self._reply(request.number, region)
        elif request.name == "store":
            stored = await async_ops.store(target, request.arguments, data)
            await self._reply(request.number, stored)
        elif request.name == "append":
            region, persist = request.arguments
            wait = request.concurrent
            offset = await async_ops.append(target, region, data, persist, wait=wait)
            await self._reply(request.number, offset)
        else:
            await async_ops.execute(target, request.name, [*request.arguments, data])
            await self._reply(request.number, None)
        request.core.counters.add_bytes(request.name, size)

    async def _store_in_chunks(self, request: TargetRequest) -> None:
        size = request.payload
        await self._reply(request.number, await chunked.upload(self._channel, request))
        request.core.counters.add_bytes(request.name, size)

    # Downloads

    async def _download(self, request: TargetRequest) -> None:
        plan, size, eager = plan_download(request, self._channel.limits, self._channel.peer)
        transfers = request.core.transfers
        if eager or size <= SMALL:  # lending the region would cost more than copying
            data = bytearray(size)
            await self._load(request, plan, memoryview(data))
            if eager:
                await self._reply(request.number, None, data)
            else:
                await self._channel.send([wire.frame([request.number, None], size), data])
        elif size <= transfers.chunk:
            view = await transfers.acquire(size)
            try:
                if not await zero_copy.send(self._channel, request, plan, view):
                    await self._load(request, plan, view)
                    async with self._channel.stream(transfers.patience) as send:
                        await send(wire.frame([request.number, None], size), view)
            finally:
                transfers.release(view)
        elif request.target.blocking and not request.concurrent:
            raise WouldBlock
        else:
            await chunked.download(self._channel, request, plan, size)
        request.core.counters.add_bytes(request.name, size)

    @staticmethod
    def _load(request: TargetRequest, plan: TransferPlan, place: memoryview) -> Awaitable[None]:
        return load(
            request.target, plan.region, plan.extents, place, plan.short, wait=request.concurrent
        )

    # Replies

    def _reply(self, number: int, result: Any, eager: Any = None) -> Awaitable[None]:
        header = [number, result] if eager is None else [number, result, eager]
        return self._channel.send([wire.frame(header, 0, self._channel.peer)])

    def _fail(self, number: int, error: errors.Exception) -> Awaitable[None]:
        return self._channel.send([wire.frame([number, None, None, errors.to_wire(error)])])
