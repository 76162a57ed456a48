"""Payloads between socket and region without a buffer: where a region's bytes are in memory, or to
be sent, in the page cache, and where all of what is to be written came with its header.

The kernel copies them once, as if they were in this process's own buffers.  What is to be moved is
lent by the target for moments in which nothing waits (``Target.lend``), so a peer that stops
half way keeps nobody from resizing the region; for the same reason a large write that ends half way
has written half, as one of a client that reaches the region itself.

Not for TLS, which stores and loads by itself, where only system calls may.
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
"""Bytes of the largest write that is stored when all of it has come, or not at all."""


async def receive(channel: Channel, request: TargetRequest) -> bool:
    """Receive what can be of a write's payload into its place; whether that was all of it.

    The request is left with what is still to be received, for which there is no such place, or
    not any more.
    """
    if request.name != "write" or request.arguments[2]:  # or it has to be persisted
        return False
    if len(channel.arrived()) == request.payload:
        return _store_whole(channel, request)
    if request.payload <= WHOLE or request.target.blocking or not channel.plain:
        return False
    if not request.core.changes.enter_nowait():
        return False
    try:  # inside until the end: of a write that a migration refuses, no part is to be stored
        while _receive_now(channel, request):
            if not request.payload:
                return True
            await channel.readable()
        return False
    finally:
        request.core.changes.leave()


def _store_whole(channel: Channel, request: TargetRequest) -> bool:
    """Store a payload that came with its header; False when it has to go another way."""
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
    """Receive what is there; False when it has to go another way."""
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
                with loan.place[arrived:] as rest:  # not kept by the traceback of an error
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
    """Writes of one connection that follow each other."""

    def __init__(self) -> None:
        self._end: object = None  # region and offset at which the last one ended

    def answered(self, request: TargetRequest, size: int) -> None:
        """*request* has stored *size* bytes; what seems to come next is mapped before it does.

        To be called once the client has its answer, and takes its time for the next request.
        """
        region, end = request.arguments[:2]
        follows = self._end == (region, end - size)
        self._end = region, end
        if follows:
            with suppress(errors.Exception), request.core.target.lend(region, end, size):
                """To be lent it has to be mapped."""


async def send(
    channel: Channel, request: TargetRequest, plan: TransferPlan, buffer: memoryview
) -> bool:
    """Answer a read of as many bytes as *buffer* has from where they are; False if that cannot be.

    What the socket does not take at once is copied to *buffer*, and does not hold up the region.
    """
    if not channel.plain or len(plan.extents) != 1:
        return False
    offset, size = plan.extents[0]
    frame = wire.frame([request.number, None], size)
    async with channel.stream(request.core.transfers.patience) as stream:
        with request.target.lend(plan.region, offset, size) as loan:
            if loan.place is None:
                return False
            sent = channel.send_nowait([frame, loan.place])
            done = max(0, sent - len(frame))
            if done < size:
                loan.load(offset + done, buffer[done:])
        if done < size:
            await stream.send(frame[sent:], buffer[done:])
    return True
