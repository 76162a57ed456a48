"""Direct access of a Trio client; ``direct.py`` is the same for blocking clients."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio

from warabi import errors
from warabi._core.tuning import LEAVE_PATIENCE
from warabi.protocol.pending import PendingRequest
from warabi.region import RegionID
from warabi.remote.aio_connection import TrioConnection
from warabi.shm.client import Guest

_PIECE = 4 * 1024 * 1024
"""Bytes copied after which other tasks get a turn."""


class AsyncDirectAccessChannel:
    """Direct access to one target, if its provider grants it, for the tasks of one Trio loop.

    Methods return the number of bytes, from the first on, that were moved; the rest must be
    requested from the provider.  Nothing here waits for stable storage.

    Args:
        nursery: for requests of grants that continue after their caller was cancelled.
        connect: opens a connection with descriptors that runs until it is closed, even if
            everything is cancelled.
        provider_id: of the target's provider.
        writable: whether to request write access.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        connect: Callable[[], Awaitable[TrioConnection]],
        provider_id: int,
        *,
        writable: bool = True,
    ) -> None:
        self._nursery = nursery
        self._connect = connect
        self._provider_id = provider_id
        self._writable = writable
        self._asking = False  # a grant is being requested; other tasks use the provider meanwhile
        self._connection: TrioConnection | None = None
        self._guest: Guest | None = None
        self._over = False

    def size(self, region: RegionID) -> int:
        """See :meth:`Guest.size`."""
        return -1 if self._guest is None else self._guest.size(region)

    def wrote(self, write_times: set[int]) -> set[int]:
        """Return those of *write_times* that are of recent writes by this client."""
        return write_times & set(() if self._guest is None else self._guest.recent)

    async def write(self, region: RegionID, offset: int, data: memoryview) -> int:
        """Write *data* within the region.

        Raises:
            StorageFull, StorageError: writing failed.
        """
        done = 0
        while done < len(data):
            piece = data[done : done + _PIECE]
            guest = self._guest
            if guest is None or not guest.write(region, offset + done, piece):
                guest = await self._asked(region, len(piece))
                if guest is None or not guest.write(region, offset + done, piece):
                    break
            done += len(piece)
            await trio.lowlevel.checkpoint()
        return done

    async def read_into(self, region: RegionID, offset: int, place: memoryview) -> int:
        """Fill *place* from within the region."""
        done = 0
        while done < len(place):
            piece = place[done : done + _PIECE]
            if await self.read_some(region, offset + done, piece, short=False) < 0:
                break
            done += len(piece)
        return done

    async def read_some(
        self, region: RegionID, offset: int, place: memoryview, *, short: bool = True
    ) -> int:
        """The same as :meth:`Guest.read_some`, without a checkpoint, for small sizes."""
        count, guest = -1, self._guest
        if guest is not None:
            count = guest.read_some(region, offset, place, False, short)
        if count < 0 and (guest := await self._asked(region, len(place))) is not None:
            count = guest.read_some(region, offset, place, False, short)
        if count >= 0:
            await trio.lowlevel.checkpoint()
        return count

    async def _asked(self, region: RegionID, size: int) -> Guest | None:
        """Request a grant; returns the guest if it was granted."""
        if self._over or self._asking:
            return None
        if self._guest is not None and not self._guest.wants(region, size):
            return None
        # In a separate task, since a cancelled caller would leave an unclaimed reply.
        self._asking = True
        answered = trio.Event()
        self._nursery.start_soon(self._ask, region, size, answered)
        await answered.wait()
        return self._guest

    async def _ask(self, region: RegionID, size: int, answered: trio.Event) -> None:
        try:
            if self._guest is None:
                self._guest = await self._join()
                self._over = self._over or self._guest is None
                if self._guest is None or not self._guest.wants(region, size):
                    return
            self._guest.add(region, *await self._call("grant", [region]))
        except (errors.InvalidRegion, errors.TargetBusy):
            pass  # the caller's next step reports it
        except (errors.Exception, OSError):
            self._end()
        finally:
            self._asking = False
            answered.set()

    async def _join(self) -> Guest | None:
        self._connection = await self._connect()
        if self._over:  # closed concurrently
            self._connection.close()
            return None
        joined, descriptors = await self._call("join", [self._writable])
        guest = None if joined is None else Guest(joined, descriptors)
        if guest is not None and self._over:
            guest.close()
        return guest

    async def _call(self, name: str, arguments: list[Any]) -> tuple[Any, list[int]]:
        assert self._connection is not None
        result = await self._request(self._connection, name, arguments)
        return result, self._connection.take_descriptors()

    async def _request(self, connection: TrioConnection, name: str, arguments: list[Any]) -> Any:
        header = (self._provider_id, name, arguments, None)
        return await connection.request(PendingRequest(name), header)

    def _end(self) -> None:
        """End direct access."""
        self._over = True
        if self._guest is not None:
            self._guest.close()
        if self._connection is not None:
            self._connection.close()

    async def aclose(self) -> None:
        """Access nothing any more, and send ``leave``.

        Also if the caller of join was cancelled before the reply: the provider counts a guest then.
        """
        over, self._over = self._over, True
        if self._guest is not None:
            self._guest.close()
        try:
            if self._connection is not None and not over:
                # Descriptors that arrive now belong to a request for a grant.
                with trio.move_on_after(LEAVE_PATIENCE, shield=True), suppress(errors.Exception):
                    await self._request(self._connection, "leave", [])
        finally:
            self._end()
