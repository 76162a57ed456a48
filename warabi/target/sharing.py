"""Direct access of other processes to regions: see ``leases.py``.

Calls the storage.  Called by ``Target``, by the parts that erase, resize or persist regions, and by
the provider for its guests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from warabi._core.tuning import GUESTS_PATIENCE, GUESTS_POLL
from warabi.backends.base import Location
from warabi.errors import TargetBusy, WouldBlock
from warabi.metadata.inode import Inode
from warabi.shm.memory import barrier
from warabi.target.leases import GrantHolder, Grants, Share
from warabi.target.state import TargetState


@dataclass(frozen=True, slots=True)
class Granted:
    """A granted region: its location, and its entry of the table."""

    index: int
    version: int
    place: Location

    def answer(self, guest: GrantHolder) -> tuple[list[Any], list[int]]:
        """Return the reply, and the descriptors to send with it: a segment's only once."""
        place = self.place
        reply = [self.index, self.version, *place[1:]]
        if place.segment in guest.segments:
            os.close(place.fd)
            return [*reply, False], []
        if place.segment > 0:
            guest.segments.add(place.segment)
        return [*reply, True], [place.fd]


class Sharing:
    """Admits guests and grants them regions."""

    def __init__(self, state: TargetState) -> None:
        self._state = state
        self._grants: Grants | None = None  # while there are guests
        self._paused = False
        self._exposed = False

    def forked(self) -> None:
        """In a forked child the guests are the parent's."""
        self._grants = None

    @property
    def active(self) -> bool:
        """Whether there are processes with direct access."""
        return self._grants is not None

    @property
    def excluded(self) -> bool:
        """Whether regions must not be exposed to the kernel now."""
        return self._paused or self.active

    # Guests

    def join(self) -> tuple[GrantHolder, Grants] | None:
        """Add a guest; returns it and the shared memory; None if the system does not support it.

        Raises:
            TargetNotFound: the target is closed.
            TargetBusy: not possible now.
        """
        state = self._state
        with state.guard.lock, state.guard.checked:
            if self._exposed:
                return None  # guests are not notified of an exposed region's size
            self._check_paused()
            if self._grants is None:
                try:
                    barrier()
                except (OSError, KeyError):
                    return None
                self._grants = Grants(state.catalogue, state.storage.wrote)
                state.catalogue.feed.nudge()  # from now on guests' writes have to be looked for
            return self._grants.join(), self._grants

    def asks_no_more(self, guest: GrantHolder) -> None:
        """Record that a guest creates no more regions: free memory kept for it."""
        self._state.storage.left(guest.number)

    def leave(self, guest: GrantHolder) -> None:
        """Remove a guest whose process has ended, or has promised to access nothing more."""
        self.asks_no_more(guest)
        due = []
        with self._state.lock:
            if self._grants is not None:
                if self._grants.leave(guest):
                    due, self._grants = self._grants.forget(), None
                else:
                    due = self._grants.due()
        for free in due:
            free()

    def _check_paused(self) -> None:
        if self._paused:
            raise TargetBusy("share: the target is being migrated")

    def grant(self, inode: Inode, holder: int, *, writable: bool) -> Granted | None:
        """As ``Target.grant``, of a region that the caller is inside."""
        self._check_paused()
        place = self._state.storage.share(inode.rid, writable=writable, holder=holder)
        if place is None:
            return None
        with self._state.lock:
            granted = None
            if self._grants is not None and not inode.dead and not self._paused:
                granted = self._grants.grant(inode)
                self._set_metadata_durable(inode)
        if granted is None:
            os.close(place.fd)
            return None
        return Granted(*granted, place)

    # What guests may rely on; the lock is held, except where it is said

    def resized(self, inode: Inode) -> None:
        """Publish the region's size; grants of one that shrank were revoked before."""
        if self._grants is not None:
            self._grants.resized(inode)

    def revoke(self, inode: Inode) -> bool:
        """Revoke all grants of the region; returns whether no access is pending.

        Data that a guest wrote and reports as written are present when this returns.
        """
        return self._grants is None or self._grants.revoke(inode)

    def withdraw(self, inode: Inode) -> None:
        """Permanently revoke the grants of an erased region."""
        if inode.share is not None and self._grants is not None:
            self._grants.withdraw(inode.share)

    def later(self, share: Share, free: Callable[[], None]) -> bool:
        """Have *free* called when no guest touches the region of *share* any more; False where no
        guest can."""
        if share.grants is not self._grants:
            return False
        share.grants.later(share.index, free)
        return True

    def free_drained(self) -> None:
        """Free locations that guests were still accessing when they were revoked."""
        if self._grants is not None and self._grants.waiting:
            with self._state.lock:
                due = [] if self._grants is None else self._grants.due()
            for free in due:
                free()

    def _set_metadata_durable(self, inode: Inode) -> None:
        """Let guests persist the region themselves, if possible; the lock is held."""
        share = inode.share
        if (
            share is not None
            and share.grants is self._grants
            and self._state.catalogue.is_durable(inode)
            and self._state.storage.metadata_durable(inode.rid)
        ):
            share.grants.set_metadata_durable(share)

    @contextmanager
    def marking_durable(self, inode: Inode) -> Iterator[None]:
        """The block persists a region, which guests may do afterwards unless it fails."""
        try:
            yield
        except WouldBlock:
            raise
        except BaseException:
            self.sync_failed()
            raise
        if inode.share is not None:
            with self._state.lock:
                self._set_metadata_durable(inode)

    def clear_all_metadata_durable(self) -> None:
        """Guests persist no region by themselves any more; the lock is held."""
        if self._grants is not None:
            self._grants.clear_all_metadata_durable()

    def sync_failed(self) -> None:
        """Guests persist no region by themselves any more: what failed may have been a sync of any
        region's bytes, or of the catalogue; takes the lock."""
        with self._state.lock:
            self.clear_all_metadata_durable()

    # Writes by guests

    def merge_all_writes(self, *, thorough: bool = False) -> None:
        """Take over what guests did to regions, with *thorough* also what may have gone unnoticed;
        the lock is held."""
        if self._grants is not None:
            self._grants.merge_all_writes(thorough=thorough)

    def look(self) -> None:
        """Take over what guests wrote, and so notify subscribers of the target."""
        if self._grants is not None:
            with self._state.lock:
                self.merge_all_writes()

    # The end of grants

    def exclude(self, exposed: bool) -> None:
        """Admit no guests while regions are *exposed* to the kernel; the lock is held."""
        self._exposed = exposed

    def pause(self) -> None:
        """Revoke all grants, and refuse new ones: until :meth:`resume` all changes are
        requests.
        Data that guests reported as written before are present."""
        with self._state.lock:
            if self._exposed:
                raise TargetBusy(
                    "files are open for passthrough, so the target does not see their writes"
                )
            self._paused = True
        self._revoke_all()

    def resume(self) -> None:
        self._paused = False

    def drain(self, inode: Inode) -> None:
        """Revoke the grants of a region that this call has closed, and wait a moment for pending
        accesses."""
        with self._state.lock:
            share = inode.share
            if self._grants is None or share is None:
                return
            self._grants.revoke(inode)
        self._wait_for_guests(lambda grants: grants.drained(share.index))

    def close(self) -> None:
        """End all direct access; writes of guests until now are taken over."""
        self._revoke_all()
        with self._state.guard.lock, self._state.guard.checked:
            grants, self._grants = self._grants, None  # unless the last guest has left concurrently
            freeing = [] if grants is None else grants.forget()
        for free in freeing:
            free()

    def _revoke_all(self) -> None:
        """End every grant, and wait a moment for pending accesses."""
        with self._state.guard.lock, self._state.guard.checked:
            if self._grants is None:
                return
            self._grants.revoke_all()
        self._wait_for_guests(lambda grants: grants.all_drained)

    def _wait_for_guests(self, drained: Callable[[Grants], bool]) -> None:
        """Wait until *drained*, or no guest is left, for a limited time: a guest may be stopped, or
        misbehave.  Guests may leave meanwhile, and the last one removes the grants."""
        deadline = time.monotonic() + GUESTS_PATIENCE
        while time.monotonic() < deadline:
            with self._state.lock:
                if self._grants is None or drained(self._grants):
                    return
            time.sleep(GUESTS_POLL)
