"""What of a target is on the medium, and when: commits, recovery, and the end.

Order of a persist: the data, the directory entry of their file, then the catalogue commit that
mentions the region.  Bytes of an erased region are freed only after the commit that forgets it
is on the medium.

A commit also mentions regions that nobody has persisted.  It says from which slot on their files
may be missing after a power failure, so that those regions can be told from damage.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator

from warabi import errors
from warabi._core import interrupts
from warabi.backends import Storage
from warabi.backends.base import Flush
from warabi.backends.xattr_times import Times
from warabi.errors import StorageError, TargetNotFound, WouldBlock
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.inode import MOVED, PACKED, Inode
from warabi.metadata.journal import translate
from warabi.target.leases import Grants
from warabi.target.region_locks import RegionGate

log = logging.getLogger(__name__)

COMMIT_INTERVAL = 5.0
"""Seconds after which volatile changes of the catalogue are committed without being asked."""
GUESTS_PATIENCE = 1.0
"""Seconds that accesses of other processes have to end when a target closes or is migrated."""


class DurableRegions(RegionGate):
    """Commits what changes in a catalogue, when asked and from time to time.

    Args:
        catalogue: which regions exist; recovered if it was not closed.
        storage: where their bytes are.
        on_closing: called when the target begins to close, or is about to.
        on_close: called once after the target was closed.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        storage: Storage,
        on_closing: Callable[[], None],
        on_close: Callable[[], None],
    ) -> None:
        super().__init__(catalogue, storage)
        self._on_closing = on_closing
        self._on_close = on_close
        self._stop = threading.Event()
        self._unforeseen = ""  # the last error of a commit that is no failure of the medium
        self._keeping = threading.Lock()  # taken before the target's, if both are
        if not catalogue.clean:
            self._recover()
        self._committer: threading.Thread | None = None
        if catalogue.path is not None:
            self._committer = threading.Thread(
                target=self._commit_regularly, name="warabi-commit", daemon=True
            )
            self._committer.start()

    @contextlib.contextmanager
    def _kept_open(self, what: str = "persist") -> Iterator[None]:
        """Keep the target from closing while the block runs."""
        with self._lock:
            if self._closed:
                raise TargetNotFound(f"{what}: {self._guard.reason}")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._waiters:
                    self._idle.notify_all()

    @contextlib.contextmanager
    def _errors_translated(self) -> Iterator[None]:
        """Any error as one of the library's, in a step that is to be tried again: whoever waits
        for it is told so, for whatever reason it failed."""
        try:
            yield
        except errors.Exception:
            self._changed.set()
            raise
        except sqlite3.Error as error:
            self._changed.set()
            raise translate(error, self._catalogue.path) from error
        except Exception as error:
            self._changed.set()
            if repr(error) != self._unforeseen:
                self._unforeseen = repr(error)
                log.exception("commit of %s failed unexpectedly", self._catalogue.path)
            raise StorageError(
                f"commit of {self._catalogue.path} failed: {error!r}; the changes are kept and will"
                " be tried again"
            ) from error

    def _settle_all(self, *, thorough: bool = False) -> None:
        """Take over what others did to regions by themselves, with *thorough* also what may have
        gone unnoticed; the lock is held."""
        if self._grants is not None:
            self._grants.settle_all(thorough=thorough)

    def commit(self) -> None:
        """Make every change of the catalogue durable, and then free what erased regions held."""
        with self._kept_open():
            self._storage.persist_names()
            self._commit()
            self._check_stored()

    def _check_stored(self, inode: Inode | None = None) -> None:
        """Raise if the last commit had to leave out *inode*, or without one anything."""
        with self._lock:
            self._catalogue.check_stored(inode)

    def _commit(self) -> None:
        """As :meth:`commit`, by a caller that keeps the target from closing, and does not mind
        that regions which nobody persisted may be lost."""
        if self._catalogue.commit_is_long:
            with self._long:
                self._announce()
                change = self._commit_to_wal()
        else:
            change = self._commit_to_wal()
        try:
            self._catalogue.sync(change)
        except BaseException:
            with self._lock:  # guests do not persist by themselves any more, either
                if self._grants is not None:
                    self._grants.loosen_all()
            raise
        if self._catalogue.checkpoint_due:
            self._checkpoint()
        if self._freed:
            self._reap()

    def _commit_to_wal(self) -> int:
        with self._lock, self._errors_translated():
            self._settle_all()
            return self._catalogue.commit(self._storage.oldest_fresh())

    def _checkpoint(self) -> None:
        """Put the catalogue's WAL, which is long, into its database.

        SQLite waits for the medium meanwhile, and does nothing else with the database.  What was to
        be made durable is so, whether or not this succeeds.
        """
        with self._long:
            self._announce()
            try:
                with self._lock, self._errors_translated():
                    self._catalogue.commit(self._storage.oldest_fresh())
                    self._catalogue.checkpoint()
            except errors.Exception as error:
                log.warning(
                    "checkpoint of %s failed and will be retried: %s", self._catalogue.path, error
                )

    def _persist_inside(self, inode: Inode, offset: int, size: int, *, times: bool = False) -> None:
        """Persist an extent of a region that the caller is in, and with *times* its times."""
        kept = times and self._keep_times(inode)
        self._storage.persist(inode.rid, offset, size, times=kept)
        if times and not kept:
            self._commit_times(inode)
        elif not self._catalogue.is_durable(inode):
            self._commit()
            self._check_stored(inode)
        else:
            self._catalogue.check()

    def _commit_times(self, inode: Inode) -> None:
        """Commit a region's times, which by themselves are no change that is waited for."""
        with self._lock:
            ctime = inode.ctime
            if not inode.dead:
                self._catalogue.touch(inode, durable=True, tell=False)
        self._commit()
        self._check_stored(inode)
        inode.kept = ctime

    @contextlib.contextmanager
    def _flushing_inside(self, inode: Inode, *, times: bool) -> Iterator[Flush]:
        """As :meth:`_persist_inside` of the whole region, when it is one flush of a file, which is
        to be waited for within the block; raises ``WouldBlock`` when it is more."""
        if not self._catalogue.is_durable(inode):
            raise WouldBlock
        if times and not self._keep_times(inode, wait=False):
            raise WouldBlock
        thread = threading.get_ident()
        self._flushes[thread] += 1
        try:
            with self._storage.flushing(inode.rid, times=times) as flush:
                yield flush
        finally:
            self._flushes[thread] -= 1
        self._catalogue.check()

    def _keep_times(self, inode: Inode, *, wait: bool = True) -> bool:
        """Put a region's times where the sync of its bytes makes them durable; False where they
        have to be committed, or without *wait* while others are about to do so."""
        held = False
        try:  # one at a time, or the times of an earlier call could be put there last
            (held,) = map(self._keeping.acquire, (wait,))  # in one step: see interrupts.py
            if not held:
                return False
            with self._lock:
                if inode.share is not None:
                    inode.share.settle(inode)
                if not self._catalogue.is_durable(inode):
                    return False  # a commit is due, and has the times, too
                times = Times(inode.mtime, inode.ctime)
            if times.ctime != inode.kept:
                if not self._storage.keep_times(inode.rid, times):
                    return False
                inode.kept = times.ctime
            return True
        finally:
            if held:
                self._keeping.release()

    def sync(self) -> None:
        """Make everything written so far durable: data first, then the catalogue."""
        with self._kept_open():
            with self._guard.lock, self._guard.checked:
                self._settle_all(thorough=True)
            try:
                self._storage.persist_all()
            except BaseException:
                with self._lock:
                    if self._grants is not None:
                        self._grants.loosen_all()
                raise
            self._commit()
            self._check_stored()

    def _commit_regularly(self) -> None:
        failure = ""
        while True:
            self._changed.wait()
            if self._stop.wait(COMMIT_INTERVAL):
                return
            self._changed.clear()
            try:
                self._storage.settle()
                self.commit()
            except TargetNotFound:
                return
            except Exception as error:
                self._changed.set()
                if str(error) != failure:  # it is tried again and again
                    log.exception(
                        "commit of %s failed; the next persist will report it", self._catalogue.path
                    )
                failure = str(error)
            else:
                failure = ""

    def _recover(self) -> None:
        """After a crash: drop bytes that no row mentions, believe the files' sizes.

        A region that was not persisted and lost its file is gone; if it had a name, that means
        an empty region now, as on other file systems.  This may take long, and Ctrl-C ends it.
        """
        catalogue = self._catalogue
        orphaned = resized = lost = 0
        for inode in catalogue.orphans():
            catalogue.remove(inode)
        missing = set(catalogue.fresh())
        any_found = False
        for rid, size in self._storage.scan():
            any_found = True
            missing.discard(rid)
            found = catalogue.region(rid)
            if found is None:
                # Never persisted, or erased: the catalogue on the medium knows nothing of it.
                self._storage.erase(rid)
                orphaned += 1
            else:
                if found.packed == PACKED:  # it had grown out of its pack, and no commit said so
                    found.packed = MOVED
                    catalogue.touch(found, durable=True, tell=False)
                if found.size != size and not (
                    size < found.size and self._storage.attests(found, size)
                ):
                    catalogue.resize(found, size)
                    resized += 1
                times = self._storage.kept_times(rid)
                if times is not None and times.ctime > found.ctime:
                    catalogue.set_attributes(found, mtime=times.mtime, ctime=times.ctime)
                    catalogue.touch(found, durable=False)
            catalogue.trim()
            interrupts.check()  # the next to open begins anew, as after a crash
        for rid in sorted(missing):
            interrupts.check()
            found = catalogue.region(rid)
            if found is not None and not self._storage.found(found):
                lost += 1
                if found.anonymous:
                    catalogue.remove(found)
                else:
                    self._storage.create(rid, 0)
                    catalogue.resize(found, 0)
        if self._storage.tidy(self._storage.attests) or any_found:
            self._storage.sync_found()  # who was killed left us to persist what it had written
        if orphaned or resized or lost:
            log.warning(
                "%s was not closed cleanly: removed %d unfinished regions, took %d sizes from"
                " files, lost the bytes of %d regions that were not persisted",
                catalogue.path, orphaned, resized, lost,
            )  # fmt: skip

    def will_close(self) -> None:
        """Say that :meth:`close` will come soon: whoever wants to open the target waits for it."""
        self._on_closing()

    def close(self) -> None:
        """Persist everything and let go of the medium.  Idempotent; never deletes a region.

        Waits for calls in flight.  Later calls raise ``TargetNotFound``.

        Raises:
            TargetBusy: a Trio task of this thread is persisting; nothing was done.
        """
        if os.getpid() != self._pid:
            return  # a forked child holds copies of things that are its parent's
        with self._lock:
            if self._closed:
                return
            self._check_waiting()
            self._closed = True
            while self._inside:
                self._wait(True)
        self.will_close()
        self._close_grants()
        self._stop.set()
        self._changed.set()
        if self._committer is not None:
            self._committer.join()
        clean = False
        try:
            self._commit()  # what is erased goes, whether or not it could be persisted
            self._storage.settle()
            self._storage.persist_all()
            with self._lock:
                self._guard.closed = True  # nothing changes any more
                with self._errors_translated():
                    for inode in self._catalogue.orphans():
                        self.discard(inode)
            self._commit()
            # Last, so that what the commit has freed does not come back either.
            self._storage.persist_all()
            self._check_stored()
            clean = not (self._freed or self._catalogue.staging)
        finally:
            try:
                with self._lock:
                    self._catalogue.close(clean=clean, unsettled=self._storage.oldest_fresh())
            finally:
                self._storage.close()
                self._on_close()

    def _close_grants(self) -> None:
        """End all direct access; what guests wrote until now counts."""
        self._revoke_all()
        with self._guard.lock, self._guard.checked:
            grants, self._grants = self._grants, None  # unless the last guest has left meanwhile
            freeing = [] if grants is None else grants.forget()
        for free in freeing:
            free()

    def _revoke_all(self) -> None:
        """End every grant, and give accesses that are under way a moment to end."""
        with self._guard.lock, self._guard.checked:
            if self._grants is None:
                return
            self._grants.revoke_all()
        self._wait_for_guests(lambda grants: grants.all_quiet)

    def _wait_for_guests(self, quiet: Callable[[Grants], bool]) -> None:
        """Wait until *quiet*, or no guest is left, but not long: a guest may have been stopped, or
        lie.  Guests may leave meanwhile, and the last one takes the grants with it."""
        deadline = time.monotonic() + GUESTS_PATIENCE
        while time.monotonic() < deadline:
            with self._lock:
                if self._grants is None or quiet(self._grants):
                    return
            time.sleep(0.001)

    def discard(self, inode: Inode) -> None:
        """Forget a nameless inode, and its bytes; the guard is held."""
        self._storage.retire(inode)
        self._catalogue.remove(inode)
        inode.dead = True
        if inode.share is not None and self._grants is not None:
            self._grants.withdraw(inode.share)
        self._holds.discard(inode.rid)
        if stat.S_ISREG(inode.mode):
            if not (inode.users or inode.exclusive):
                self._free(inode)
            elif self._holds:
                self._ending.add(inode.rid)
