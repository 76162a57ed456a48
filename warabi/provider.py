"""The Trio side of a provider: connections in, target operations, replies out.

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
from collections.abc import Callable
from typing import Any

import trio

from warabi import dispatch, errors, extents, wire
from warabi.operations import OPERATIONS, Operation, checked_arguments
from warabi.region import RegionID
from warabi.target import Target
from warabi.wire import NEED_DATA, PAYLOAD_DONE, Limits, Message, Opened

log = logging.getLogger(__name__)

OPENING_PATIENCE = 10.0
"""Seconds that a peer has for its opening."""
_SPARE = 1024 * 1024  # a payload buffer up to this size is kept for the next payload


class ProviderCore:
    """What serves one provider ID: a target, or none yet.

    Attributes:
        provider_id: 0 to 65535.
        target: the target; operations fail with ``TargetNotFound`` without one.
        abandoned: set when the last reference to the ``Provider`` object is gone.
    """

    def __init__(self, provider_id: int, target: Target | None) -> None:
        self.provider_id = provider_id
        self._target = target
        self.abandoned = False

    @property
    def target(self) -> Target:
        if self._target is None:
            raise errors.TargetNotFound(f"provider {self.provider_id} has no target")
        return self._target

    def close(self) -> None:
        """Close the target.  Idempotent."""
        if self._target is not None:
            self._target.close()


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
        self._socket = sock
        self._find = find
        self._shutdown = shutdown
        self._connection = wire.Connection(Limits())
        self._peer = Limits()
        self._sending = trio.Lock()
        self._deaf = False  # the peer no longer takes replies; its requests still count
        self._running = trio.Semaphore(Limits().requests)
        self._spare: bytearray | None = None
        self._pins: defaultdict[tuple[int, int], int] = defaultdict(int)

    async def run(self) -> None:
        """Serve until the peer goes, then give back what it held."""
        try:
            async with trio.open_nursery() as nursery:
                await self._serve(nursery)
        finally:
            self._socket.close()
            self._unpin_all()

    async def _serve(self, nursery: trio.Nursery) -> None:
        try:
            with trio.fail_after(OPENING_PATIENCE):
                await self._send([wire.opening(self._connection.limits)])
                opened = await self._next_event()
            if not isinstance(opened, Opened):
                return
            self._peer = opened.limits
            while (event := await self._next_event()) is not None:
                if isinstance(event, Message):
                    await self._handle(event, nursery)
        except errors.ProtocolError as error:
            log.warning("connection refused: %s", error)
            await self._send([wire.frame([0, None, None, errors.to_wire(error)])])
        except (OSError, trio.TooSlowError) as error:
            log.info("connection ended: %s", error or type(error).__name__)

    async def _next_event(self) -> wire.Event | None:
        """The next event, or None when the peer closed between two messages."""
        while (event := self._connection.next_event()) is NEED_DATA:
            count = await self._socket.recv_into(self._connection.buffer())
            if count == 0 and self._connection.between_messages:
                return None
            self._connection.received(count)
        return event

    async def _payload(self, size: int) -> bytearray:
        buffer, self._spare = self._spare, None
        if buffer is None or len(buffer) != size:
            buffer = bytearray(size)
        self._connection.accept_payload(memoryview(buffer))
        if await self._next_event() is not PAYLOAD_DONE:
            raise errors.ProtocolError("the peer closed the connection within a payload")
        return buffer

    async def _handle(self, message: Message, nursery: trio.Nursery) -> None:
        data: Any = None
        if message.payload:
            data = await self._payload(message.payload)
        request = message.header
        if (
            not isinstance(request, list)
            or len(request) != 5
            or not all(type(item) is int for item in request[:2])
            or not isinstance(request[2], str)
            or not isinstance(request[4], bytes | None)
        ):
            raise errors.ProtocolError(f"not a request: {request!r:.100}")
        request_id, provider_id, name, arguments, eager = request
        data = data if data is not None else eager
        try:
            if name == "shutdown":
                self._shutdown()
                with trio.move_on_after(1.0, shield=True):  # the loop may be cancelled by now
                    await self._reply(request_id, None)
                return
            target = self._find(provider_id).target if name != "ping" else None
            if target is not None and self._waits(target, name, arguments):
                await self._running.acquire()
                nursery.start_soon(
                    self._run_beside, target, request_id, provider_id, name, arguments, data
                )
                return
        except errors.Exception as error:
            await self._fail(request_id, error)
            return
        await self._run(target, request_id, provider_id, name, arguments, data)
        if isinstance(data, bytearray) and len(data) <= _SPARE:
            self._spare = data

    @staticmethod
    def _waits(target: Target, name: str, arguments: Any) -> bool:
        """Whether carrying out a request may take a while, so that the next one should not wait."""
        if not target.blocking:
            return False
        operation = OPERATIONS.get(name)
        return name in ("read", "write", "create_and_write") or (
            operation is not None and operation.waits
        )

    async def _run_beside(self, *request: Any) -> None:
        try:
            await self._run(*request)
        finally:
            self._running.release()

    async def _run(
        self,
        target: Target | None,
        request_id: int,
        provider_id: int,
        name: str,
        arguments: Any,
        data: Any,
    ) -> None:
        try:
            await self._execute(target, request_id, provider_id, name, arguments, data)
        except errors.Exception as error:
            await self._fail(request_id, error)
        except OSError as error:
            await self._fail(request_id, errors.from_os(error, name))
        except Exception as error:
            log.exception("a defect in operation %s", name)
            reason = f"{name}: {type(error).__name__} in the provider, see its log"
            await self._fail(request_id, errors.ProviderFailed(reason))

    async def _execute(
        self,
        target: Target | None,
        request_id: int,
        provider_id: int,
        name: str,
        arguments: Any,
        data: Any,
    ) -> None:
        if target is None:  # ping
            self._find(provider_id)
            await self._reply(request_id, None)
        elif name == "read":
            await self._read(target, request_id, *checked_arguments(name, "rii??", arguments))
        elif name == "write":
            region, offset, persist, extend = checked_arguments(name, "ri??", arguments)
            await dispatch.write(target, region, offset, data or b"", persist, extend)
            await self._reply(request_id, None)
        elif name == "create_and_write":
            (persist,) = checked_arguments(name, "?", arguments)
            region = await dispatch.create_and_write(target, data or b"", persist)
            await self._reply(request_id, region)
        else:
            operation = OPERATIONS.get(name)
            if operation is None:
                raise errors.ProtocolError(f"unknown operation {name!r:.60}")
            checked = checked_arguments(name, operation.arguments, arguments)
            if operation.data == "out":
                await self._read_extents(target, request_id, operation, checked)
                return
            if operation.data == "in":
                checked.append(data or b"")
            result = await dispatch.execute(target, operation, checked)
            if operation.pins and (pinned := operation.pins(checked, result)):
                self._pins[provider_id, pinned[0]] += pinned[1]
            await self._reply(request_id, result)

    async def _read(
        self,
        target: Target,
        request_id: int,
        region: RegionID,
        offset: int,
        size: int,
        eager: bool,
        short: bool,
    ) -> None:
        # The peer's limit may be anything; what is allocated here keeps to this side's too.
        limit = min(self._peer.payload, self._connection.limits.payload)
        if not 0 <= size <= limit or (eager and size > self._peer.header // 2):
            raise errors.ProtocolError(f"read: {size} bytes in one reply, the limit is {limit}")
        have = target.size(region)
        if short:
            size = min(size, max(0, have - offset))
        elif offset + size > have:  # before the memory for it is asked for
            raise errors.OutOfBounds(
                f"read {region!r}: {size} bytes at offset {offset} end beyond its {have} bytes"
            )
        buffer = memoryview(bytearray(size))
        buffer = buffer[: await dispatch.read_into(target, region, offset, buffer, short=short)]
        if eager:
            await self._reply(request_id, None, bytes(buffer))
        else:
            await self._send([wire.frame([request_id, None], len(buffer)), buffer])

    async def _read_extents(
        self, target: Target, request_id: int, operation: Operation, checked: list[Any]
    ) -> None:
        size = extents.total(extents.unpack(checked[1], "read_vector"))
        limit = min(self._peer.payload, self._connection.limits.payload)
        if size > limit:
            raise errors.ProtocolError(f"read: {size} bytes in one reply, the limit is {limit}")
        buffer = bytearray(size)
        await dispatch.execute(target, operation, [*checked, buffer])
        await self._send([wire.frame([request_id, None], size), buffer])

    async def _reply(self, request_id: int, result: Any, eager: Any = None) -> None:
        header = [request_id, result] if eager is None else [request_id, result, eager]
        await self._send([wire.frame(header, 0, self._peer)])

    async def _fail(self, request_id: int, error: errors.Exception) -> None:
        await self._send([wire.frame([request_id, None, None, errors.to_wire(error)])])

    async def _send(self, parts: list[bytes | bytearray | memoryview]) -> None:
        if self._deaf:
            return
        try:
            async with self._sending:
                sent = await self._socket.sendmsg(parts)
                for part in parts:
                    if sent >= len(part):
                        sent -= len(part)
                        continue
                    rest = memoryview(part)[sent:]
                    sent = 0
                    while rest:
                        rest = rest[await self._socket.send(rest) :]
        except OSError:
            self._deaf = True

    def _unpin_all(self) -> None:
        for (provider_id, ino), count in self._pins.items():
            try:
                if count > 0:
                    self._find(provider_id).target.namespace.unpin(ino, count)
            except errors.Exception as error:
                log.debug("unpin of inode %d: %s", ino, error)
