"""The provider's side of direct access: the grants of one connection, and its descriptors.

A guest uses a separate connection for this.  It sends ``join [writable]`` and gets ``[word offset,
word value, writable]`` with four descriptors (liveness word, table, last-write times or, when not
writable, the table again, and its hazard slots), and then ``grant [region]``, whose result is
``[index, version, offset, room, segment, mapped, follows]``, of a
:class:`~warabi.backends.base.Location`, and, if it *follows*, one descriptor.  ``make [size]``
creates a region and grants it: ``[region, ...]``, as for ``grant`` and with a descriptor of the
region's own, or ``[region]`` if it cannot be granted.  ``make_unnamed`` is the same for a region
that goes with the connection unless it gets a name.  The result is ``None`` if direct access is not
possible.  Numbers are bytes except ``segment``, which identifies a descriptor that several regions
share and that is sent once.

After sending ``leave`` a guest accesses nothing any more.  If its connection ends without that, an
access may still be pending, so it stays registered until its process has exited.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import trio

from warabi import errors
from warabi.errors import WouldBlock
from warabi.region import RegionID
from warabi.shm.liveness import LifeSigns
from warabi.target.leases import GrantHolder
from warabi.target.sharing import Granted
from warabi.target.target import Target

log = logging.getLogger(__name__)


class GuestConnection:
    """The guests of one connection.

    Args:
        life: the liveness words of the loop's thread.
        pid: ID of the guest's process; 0 if it is not visible here.
    """

    def __init__(self, life: LifeSigns, pid: int) -> None:
        self._life = life
        self._pid = pid
        self._process = -1  # pidfd
        self._waiting = trio.CancelScope()
        self._guest: GrantHolder | None = None
        self._target: Target | None = None
        self._writable = False
        self._unnamed: list[RegionID] = []  # made by ``make_unnamed``, and perhaps named since

    @property
    def joined(self) -> bool:
        """Whether the process has direct access to a target."""
        return self._guest is not None

    async def answer(
        self, target: Target, name: str, arguments: list[Any]
    ) -> tuple[Any, list[int]]:
        """Return the result of an operation, and descriptors for the caller to send and close."""
        if name == "join":
            return self._join(target, arguments[0])
        if self._guest is None or target is not self._target:
            raise errors.ProtocolError(f"{name}: expected a join before it")
        if name == "leave":
            self._leave()
            return None, []
        if name == "make":
            return self._make(target, self._guest, arguments[0])
        if name == "make_unnamed":
            self._unnamed = [*filter(target.namespace.is_linkable, self._unnamed)]
            return self._make(target, self._guest, arguments[0], linkable=True)
        return await self._grant(target, self._guest, arguments[0])

    def _join(self, target: Target, writable: bool) -> tuple[Any, list[int]]:
        if self._guest is not None:
            raise errors.ProtocolError("join: this connection has already joined")
        try:
            life = self._life.take()
        except OSError as error:
            log.info("direct access is not available: %s", error.strerror)
            return None, []
        joined = target.sharing.join()
        if joined is None:
            self._life.drop()
            return None, []
        with contextlib.suppress(OSError, ValueError):
            self._process = os.pidfd_open(self._pid)
        self._guest, grants = joined
        self._target = target
        self._writable = self._guest.writes = writable and target.shares_writes
        write_times = grants.write_times if self._writable else grants.table
        shown = (life.memory, grants.table, write_times, self._guest.hazards)
        answer = [life.offset, life.value, self._writable]
        return answer, [os.dup(memory.fd) for memory in shown]

    async def _grant(
        self, target: Target, guest: GrantHolder, region: RegionID
    ) -> tuple[Any, list[int]]:
        try:
            granted = target.grant(region, guest.number, writable=self._writable, wait=False)
        except WouldBlock:
            granted = await trio.to_thread.run_sync(self._grant_slowly, target, guest, region)
        if granted is None:
            return None, []
        return granted.answer(guest)

    def _make(
        self, target: Target, guest: GrantHolder, size: int, *, linkable: bool = False
    ) -> tuple[Any, list[int]]:
        if not self._writable:
            return None, []
        region = target.make(size, guest.number, linkable=linkable)
        if linkable:
            self._unnamed.append(region)
        try:
            granted = target.grant(region, guest.number, writable=True, wait=False)
        except (errors.Exception, WouldBlock):  # another client has found and is using it
            granted = None
        if granted is not None and granted.place.segment:
            os.close(granted.place.fd)
            granted = None
        if granted is None:
            return [region], []
        answer, descriptors = granted.answer(guest)
        return [region, *answer], descriptors

    def _grant_slowly(self, target: Target, guest: GrantHolder, region: RegionID) -> Granted | None:
        return target.grant(region, guest.number, writable=self._writable)

    def _leave(self) -> None:
        if self._guest is not None and self._target is not None:
            self._target.sharing.leave(self._guest)
            self._guest = None
            self._life.drop()

    async def end(self) -> None:
        """After the end of the connection: return when the guest cannot access anything any more,
        or at :meth:`drain`, since closing the target handles it then."""
        try:
            if self._target is not None:
                with contextlib.suppress(errors.Exception):  # the target has been closed
                    for region in filter(self._target.namespace.is_linkable, self._unnamed):
                        self._target.namespace.unpin(region.slot)
            if self._guest is not None and self._target is not None:
                self._target.sharing.asks_no_more(self._guest)
                with self._waiting:
                    if self._process < 0:
                        await trio.sleep_forever()
                    await trio.lowlevel.wait_readable(self._process)
                    self._leave()
        finally:
            if self._process >= 0:
                os.close(self._process)

    def drain(self) -> None:
        """Do not wait for guests."""
        self._waiting.cancel()
