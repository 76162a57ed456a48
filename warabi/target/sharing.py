"""Regions that other processes of the host may reach by themselves: see ``leases.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from warabi.backends.base import Flush, Location
from warabi.errors import TargetBusy, WouldBlock
from warabi.metadata.inode import Inode
from warabi.region import RegionID
from warabi.shm.memory import barrier
from warabi.target.commit import DurableRegions
from warabi.target.leases import GrantHolder, Grants


@dataclass(frozen=True, slots=True)
class Granted:
    """A region that a guest may reach: where, and by which entry of the table."""

    index: int
    stamp: int
    place: Location

    def answer(self, guest: GrantHolder) -> tuple[list[Any], list[int]]:
        """What the guest is told, and the descriptors that go with it: a segment's only once."""
        place = self.place
        reply = [self.index, self.stamp, *place[1:]]
        if place.segment in guest.segments:
            os.close(place.fd)
            return [*reply, False], []
        if place.segment > 0:
            guest.segments.add(place.segment)
        return [*reply, True], [place.fd]


class SharedRegions(DurableRegions):
    """Admits guests and grants them regions."""

    _paused = False

    def pause_sharing(self) -> None:
        """End every grant, and give no new ones: until :meth:`resume_sharing` all changes come
        through the provider.  What guests report as written before is there."""
        with self._lock:
            self._paused = True
        self._revoke_all()

    def resume_sharing(self) -> None:
        self._paused = False

    def quieten(self, inode: Inode) -> None:
        """End every grant of a region that this call has closed to others, and give accesses that
        are under way a moment to end."""
        with self._lock:
            share = inode.share
            if self._grants is None or share is None:
                return
            self._grants.revoke(inode)
        self._wait_for_guests(lambda grants: grants.quiet(share.index))

    def _fasten(self, inode: Inode) -> None:
        """Have guests persist the region by themselves, if that can be; the lock is held."""
        share = inode.share
        if (
            share is not None
            and share.grants is self._grants
            and self._catalogue.is_durable(inode)
            and self._storage.firm(inode.rid)
        ):
            self._grants.fasten(share)

    def _persist_inside(self, inode: Inode, offset: int, size: int, *, times: bool = False) -> None:
        with self._fastening(inode):
            super()._persist_inside(inode, offset, size, times=times)

    @contextmanager
    def _flushing_inside(self, inode: Inode, *, times: bool) -> Iterator[Flush]:
        with self._fastening(inode), super()._flushing_inside(inode, times=times) as flush:
            yield flush

    @contextmanager
    def _fastening(self, inode: Inode) -> Iterator[None]:
        """The block persists a region, as guests may do after it; unless it fails."""
        try:
            yield
        except WouldBlock:
            raise
        except BaseException:
            with self._lock:  # what failed may have been a sync of others' bytes, too
                if self._grants is not None:
                    self._grants.loosen_all()
            raise
        if inode.share is not None:
            with self._lock:
                self._fasten(inode)

    def _check_sharing(self) -> None:
        if self._paused:
            raise TargetBusy("share: the target is being migrated")

    def join(self) -> tuple[GrantHolder, Grants] | None:
        """A new guest, and the memory that it shares; None where the system does not allow it.

        Raises:
            TargetNotFound: the target is closed.
            TargetBusy: not now.
        """
        with self._guard.lock, self._guard.checked:
            self._check_sharing()
            if self._grants is None:
                try:
                    barrier()
                except (OSError, KeyError):
                    return None
                self._grants = Grants(self._catalogue, self._storage.wrote)
                self.feed.nudge()  # from now on somebody has to look at what guests write
            return self._grants.join(), self._grants

    @property
    def has_guests(self) -> bool:
        """Whether other processes may be writing to regions by themselves."""
        return self._grants is not None

    def begin_write(
        self, region: RegionID, offset: int, data: memoryview
    ) -> Callable[[], None] | None:
        """What writes *data*, to be called in any case, and soon; None where that might wait or
        fail, or be missed by who survives this process: :meth:`write` does it or says why not.

        So it is for memory that the region has, and that nobody else may cut off.
        """
        if self._storage.blocking or self.has_guests:
            return None
        loan = self.lend(region, offset, len(data), writable=True)
        place = loan.__enter__().place
        if place is None:
            loan.__exit__()
            return None

        def write() -> None:
            place[:] = data
            loan.__exit__()

        return write

    def look_at_guests(self) -> None:
        """Take over what guests wrote, and so tell those who watch the target."""
        if self._grants is not None:
            with self._lock:
                if self._grants is not None:
                    self._grants.settle_all()

    def asks_no_more(self, guest: GrantHolder) -> None:
        """The guest makes no regions any more: nothing is kept for those."""
        self._storage.left(guest.number)

    def leave(self, guest: GrantHolder) -> None:
        """The guest's process is gone, or has promised to touch nothing more."""
        self.asks_no_more(guest)
        with self._lock:
            due = []
            if self._grants is not None:
                if self._grants.leave(guest):
                    due, self._grants = self._grants.forget(), None
                else:
                    due = self._grants.due()
        for free in due:
            free()

    def grant(
        self, region: RegionID, holder: int, *, writable: bool, wait: bool = True
    ) -> Granted | None:
        """What a guest needs to reach the region; None when it has to go through the provider.

        The descriptor in it is the caller's to close, and *holder*'s to use: a guest, by its
        number, or ``THIS_PROCESS``.

        Raises:
            InvalidRegion: unknown or erased.
            TargetBusy: not now.
            WouldBlock: without *wait*, while the region is being resized.
        """
        self._check_sharing()
        inode = self._enter(region, "share", wait)
        try:
            place = self._storage.share(region, writable=writable, holder=holder)
            if place is None:
                return None
            with self._lock:
                granted = None
                if self._grants is not None and not inode.dead and not self._paused:
                    granted = self._grants.grant(inode)
                    self._fasten(inode)
            if granted is None:
                os.close(place.fd)
                return None
            return Granted(*granted, place)
        finally:
            self._leave(inode)
