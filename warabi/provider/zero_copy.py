"""Zero-copy transfers: payloads between socket and region without a buffer, where region data are
in memory or, for sending, in the page cache, and where a complete write arrived with its header.

The kernel copies the data once, as if they were in this process's own buffers.  The target lends
the data for moments without waiting (``Target.lend``), so that a peer that stops half way does
not block a resize of the region; for the same reason a large write that is interrupted half way has
written half, like one by direct access.

Not for TLS, which would load and store the data directly, where only system calls are safe.
"""

from __future__ import annotations

import errno
from contextlib import suppress

from warabi import errors
from warabi.errors import WouldBlock
from warabi.protocol import wire
from warabi.provider.channel import Channel
from warabi.provider.requests import TargetRequest, TransferPlan

WHOLE = 64 * 1024
"""Bytes of the largest write that is atomic: stored when complete, or not at all."""


async def receive(channel: Channel, request: TargetRequest) -> bool:
    """Receive as much of a write's payload as possible in place; whether that was all of it.

    The request is left with the remaining bytes, for which there is no memory, or not any more.
    """
    if request.name != "write" or request.arguments[2]:  # not if it must be persisted
        return False
    if len(channel.arrived()) == request.payload:
        return _store_whole(channel, request)
    if request.payload <= WHOLE or request.target.blocking or not channel.plain:
        return False
    if not request.core.changes.enter_nowait():
        return False
    try:  # entered until the end, so that a migration blocks all or nothing
        while _receive_now(channel, request):
            if not request.payload:
                return True
            await channel.readable()
        return False
    finally:
        request.core.changes.leave()


def _store_whole(channel: Channel, request: TargetRequest) -> bool:
    """Store a payload that arrived with its header; False if that is not possible."""
    region, offset, _, extend = request.arguments
    if not request.core.changes.enter_nowait():
        return False
    try:
        target = request.core.target
        wait = not target.blocking
        target.write(region, offset, channel.arrived(), extend=extend, wait=wait)
    except (errors.Exception, WouldBlock):
        return False
    finally:
        request.core.changes.leave()
    channel.skip(request.payload)
    request.payload = 0
    return True


def _receive_now(channel: Channel, request: TargetRequest) -> bool:
    """Receive available data; False if that is not possible."""
    region, offset = request.arguments[:2]
    try:
        target = request.core.target
    except errors.Exception:
        return False
    with target.lend(region, offset, request.payload, writable=True) as loan:
        if loan.place is None:
            return False
        if arrived := len(view := channel.arrived()):
            try:
                loan.store(offset, view)
            except errors.Exception:
                return False
            channel.skip(arrived)
            _advance(request, arrived)
        if request.payload:
            try:
                with loan.place[arrived:] as rest:  # released before a traceback can keep it
                    _advance(request, channel.fill_nowait(rest))
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                return False
    return True


def _advance(request: TargetRequest, count: int) -> None:
    request.arguments[1] += count
    request.payload -= count


class Sequence:
    """Detects sequential writes of one connection."""

    def __init__(self) -> None:
        self._end: object = None  # region and end offset of the last write

    def answered(self, request: TargetRequest, size: int) -> None:
        """Record that *request* has stored *size* bytes; maps the memory that the next one will
        use.

        Called after the reply was sent, while the client prepares the next request.
        """
        region, end = request.arguments[:2]
        follows = self._end == (region, end - size)
        self._end = region, end
        if follows:
            with suppress(errors.Exception), request.core.target.lend(region, end, size):
                """Map the memory, which lending requires."""


async def send(
    channel: Channel, request: TargetRequest, plan: TransferPlan, buffer: memoryview
) -> bool:
    """Reply to a read of the size of *buffer* in place; False if that is not possible.

    Data that the socket does not accept at once are copied to *buffer*, so as not to block the
    region.
    """
    if not channel.plain or len(plan.extents) != 1:
        return False
    offset, size = plan.extents[0]
    frame = wire.frame([request.number, None], size)
    async with channel.stream(request.core.transfers.patience) as send:
        with request.target.lend(plan.region, offset, size) as loan:
            if loan.place is None:
                return False
            sent = channel.send_nowait([frame, loan.place])
            done = max(0, sent - len(frame))
            if done < size:
                loan.load(offset + done, buffer[done:])
        if done < size:
            await send(frame[sent:], buffer[done:])
    return True
