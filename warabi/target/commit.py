"""Durability of a target: persists of regions, commits of the catalogue, and closing.

Order of a persist: the data, the directory entry of their file, then the catalogue commit that
mentions the region.  Bytes of an erased region are freed only after the commit that forgets it is
durable.

A commit also mentions regions that were never persisted.  It says from which slot on their files
may be missing after a power failure, so that those regions can be distinguished from damage.

Calls ``RegionLocks``, ``Erasure``, ``KernelBacked`` and ``Sharing``.  Called by ``Target``, by a
thread of its own from time to time, and by storages that must have the catalogue durable before
they go on.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator

from warabi import errors
from warabi._core import forks
from warabi._core.tuning import COMMIT_INTERVAL, STEP_PAUSE
from warabi.backends.xattr_times import Times
from warabi.errors import StorageError, TargetNotFound
from warabi.metadata.inode import Inode
from warabi.metadata.journal import translate
from warabi.target.erasure import Erasure
from warabi.target.kernel_backed import KernelBacked
from warabi.target.region_locks import RegionLocks
from warabi.target.sharing import Sharing
from warabi.target.state import TargetState, not_in_a_loop

log = logging.getLogger(__name__)


class Committer:
    """Commits what changes in a catalogue, when asked and from time to time."""

    def __init__(
        self,
        state: TargetState,
        locks: RegionLocks,
        erasure: Erasure,
        sharing: Sharing,
        kernel_backed: KernelBacked,
    ) -> None:
        self._state = state
        self._catalogue = state.catalogue
        self._storage = state.storage
        self._locks = locks
        self._erasure = erasure
        self._sharing = sharing
        self._kernel_backed = kernel_backed
        self._stop = forks.event()
        self._unforeseen = ""  # the last unexpected error of a commit
        # The order in which times of regions are put into their files.  Before the target's lock.
        self._keeping = forks.lock()
        self._thread: threading.Thread | None = None
        if state.catalogue.path is not None:
            self._thread = threading.Thread(
                target=self._commit_regularly, name="warabi-commit", daemon=True
            )
            self._thread.start()

    @contextlib.contextmanager
    def _errors_translated(self) -> Iterator[None]:
        """Convert any error to one of the library's, in a step that will be retried: every waiting
        caller gets the error, whatever its cause."""
        try:
            yield
        except errors.Exception:
            self._state.changed.set()
            raise
        except sqlite3.Error as error:
            self._state.changed.set()
            raise translate(error, self._catalogue.path) from error
        except Exception as error:
            self._state.changed.set()
            if repr(error) != self._unforeseen:
                self._unforeseen = repr(error)
                log.exception("commit of %s failed unexpectedly", self._catalogue.path)
            raise StorageError(
                f"commit of {self._catalogue.path} failed: {error!r}; the changes are kept and will"
                " be tried again"
            ) from error

    # The catalogue

    def commit(self) -> None:
        """Make every change of the catalogue durable, and then free the data of erased regions."""
        with self._locks.kept_open("commit"):
            self._storage.persist_names()
            self.commit_catalogue()
            self._check_stored()

    def _check_stored(self, inode: Inode | None = None) -> None:
        """Raise if the last commit could not store *inode*, or without one anything."""
        with self._state.lock:
            self._catalogue.check_stored(inode)

    def commit_catalogue(self) -> None:
        """The same as :meth:`commit`, for a caller that keeps the target open, and accepts that
        regions which were never persisted may be lost."""
        self._flush_backlog()
        if self._catalogue.commit_is_long:
            with self._state.long:
                self._state.announce()
                change = self._commit_to_wal()
        else:
            change = self._commit_to_wal()
        try:
            self._catalogue.sync(change)
        except BaseException:
            self._sharing.sync_failed()
            raise
        if self._catalogue.checkpoint_due:
            self._checkpoint()
        if self._erasure.pending:
            self._erasure.reap()

    def _flush_backlog(self) -> None:
        """Write most of what is dirty in steps, so that the commit holds the lock only briefly.

        Raises:
            WouldBlock: in an event loop, when steps are needed.
        """
        steps = self._catalogue.backlog
        if steps:
            not_in_a_loop()
        for _ in range(steps):
            with self._state.lock, self._errors_translated():
                self._catalogue.flush_some()
            time.sleep(STEP_PAUSE)

    def _commit_to_wal(self) -> int:
        with self._state.lock, self._errors_translated():
            return self.write_commit()

    def write_commit(self) -> int:
        """Commit every change, without waiting for stable storage; the lock is held.  Returns the
        change to wait for."""
        self._merge_all_writes()
        return self._catalogue.commit(self._storage.oldest_fresh())

    def _merge_all_writes(self, *, thorough: bool = False) -> None:
        """Take over changes that other processes made to regions directly, with *thorough* also
        those that may have gone unnoticed; the lock is held."""
        self._sharing.merge_all_writes(thorough=thorough)
        self._kernel_backed.merge_all_writes(thorough=thorough)

    def _checkpoint(self) -> None:
        """Checkpoint the catalogue's long WAL.

        SQLite waits for stable storage meanwhile, and does nothing else with the database.  The
        commit is durable, whether or not this succeeds.
        """
        with self._state.long:
            self._state.announce()
            try:
                with self._state.lock, self._errors_translated():
                    self._catalogue.commit(self._storage.oldest_fresh())
                    self._catalogue.checkpoint()
            except errors.Exception as error:
                log.warning(
                    "checkpoint of %s failed and will be retried: %s", self._catalogue.path, error
                )

    def _commit_regularly(self) -> None:
        failure = ""
        while True:
            self._state.changed.wait()
            if self._stop.wait(COMMIT_INTERVAL):
                return
            self._state.changed.clear()
            try:
                self._storage.run_deferred()
                self.commit()
            except TargetNotFound:
                return
            except Exception as error:
                self._state.changed.set()
                if str(error) != failure:  # it is retried repeatedly
                    log.exception(
                        "commit of %s failed; the next persist will report it", self._catalogue.path
                    )
                failure = str(error)
            else:
                failure = ""

    # Regions

    def persist(self, inode: Inode, offset: int, size: int, *, times: bool = False) -> None:
        """Persist an extent of a region that the caller has entered, and with *times* its times."""
        with self._sharing.marking_durable(inode):
            kept = times and self._keep_times(inode)
            self._storage.persist(inode.rid, offset, size, times=kept)
            if times and not kept:
                self._commit_times(inode)
            elif not self._catalogue.is_durable(inode):
                self.commit_catalogue()
                self._check_stored(inode)
            else:
                self._catalogue.check()

    def _commit_times(self, inode: Inode) -> None:
        """Commit a region's times, which are not durable changes by themselves."""
        with self._state.lock:
            ctime = inode.ctime
            if not inode.dead:
                self._catalogue.touch(inode, durable=True, tell=False)
        self.commit_catalogue()
        self._check_stored(inode)
        inode.kept = ctime

    def _keep_times(self, inode: Inode) -> bool:
        """Store a region's times where the sync of its data makes them durable; False if they must
        be committed."""
        with self._keeping:  # one at a time, so that the latest times are stored last
            with self._state.lock:
                if inode.share is not None:
                    inode.share.merge_writes(inode)
                if not self._catalogue.is_durable(inode):
                    return False  # a commit is needed, and includes the times
                times = Times(inode.mtime, inode.ctime)
            if times.ctime != inode.kept:
                if not self._storage.keep_times(inode.rid, times):
                    return False
                inode.kept = times.ctime
            return True

    # Everything

    def sync(self) -> None:
        """Make everything written so far durable: data first, then the catalogue."""
        with self._locks.kept_open("sync"):
            with self._state.guard.lock, self._state.guard.checked:
                self._merge_all_writes(thorough=True)
            try:
                self._storage.persist_all()
            except BaseException:
                self._sharing.sync_failed()
                raise
            self.commit_catalogue()
            self._check_stored()

    def close(self) -> None:
        """Persist everything and close the catalogue; calls are refused, and none is under way."""
        self._stop.set()
        self._state.changed.set()
        if self._thread is not None:
            self._thread.join()
        clean = False
        try:
            self.commit_catalogue()  # erased regions are freed even if this fails
            self._storage.run_deferred()
            self._storage.persist_all()
            with self._state.lock:
                self._state.guard.closed = True  # no further changes
                with self._errors_translated():
                    for inode in self._catalogue.orphans():
                        self._erasure.discard(inode)
            self.commit_catalogue()
            # Last, so that data freed by the commit do not reappear either.
            self._storage.persist_all()
            self._check_stored()
            clean = not (self._erasure.pending or self._catalogue.staging)
        finally:
            with self._state.lock:
                self._catalogue.close(clean=clean, unsettled=self._storage.oldest_fresh())
