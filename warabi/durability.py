"""What of a target is on the medium, and when: commits, recovery, and the end.

Order of a persist: the data, the directory entry of their file, then the catalogue commit that
mentions the region.  Bytes of an erased region are freed only after the commit that forgets it
is on the medium.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator

from warabi.backends import Storage
from warabi.catalogue import Catalogue
from warabi.errors import TargetNotFound
from warabi.gate import RegionGate
from warabi.inode import Inode

log = logging.getLogger(__name__)

COMMIT_INTERVAL = 5.0
"""Seconds after which volatile changes of the catalogue are committed without being asked."""


class DurableRegions(RegionGate):
    """Commits what changes in a catalogue, when asked and from time to time.

    Args:
        catalogue: which regions exist; recovered if it was not closed.
        storage: where their bytes are.
        on_closing: called once when the target begins to close.
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
        self._pid = os.getpid()
        self._stop = threading.Event()
        if not catalogue.clean:
            self._recover()
        self._committer: threading.Thread | None = None
        if catalogue.path is not None:
            self._committer = threading.Thread(
                target=self._commit_regularly, name="warabi-commit", daemon=True
            )
            self._committer.start()

    @contextlib.contextmanager
    def _kept_open(self) -> Iterator[None]:
        """Keep the target from closing while the block runs."""
        with self._lock:
            if self._closed:
                raise TargetNotFound("persist: the target is closed")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._waiters:
                    self._idle.notify_all()

    def commit(self) -> None:
        """Make every change of the catalogue durable, and then free what erased regions held."""
        with self._kept_open():
            self._commit()

    def _commit(self) -> None:
        """As :meth:`commit`, by a caller that keeps the target from closing."""
        with self._guard:
            change = self._catalogue.commit()
        self._catalogue.sync(change)
        if self._freed:
            self._reap()

    def sync(self) -> None:
        """Make everything written so far durable: data first, then the catalogue."""
        with self._kept_open():
            self._storage.persist_all()
            self._commit()

    def _commit_regularly(self) -> None:
        while True:
            self._changed.wait()
            if self._stop.wait(COMMIT_INTERVAL):
                return
            self._changed.clear()
            try:
                self.commit()
            except TargetNotFound:
                return
            except Exception:
                log.exception(
                    "commit of %s failed; the next persist will say so", self._catalogue.path
                )

    def _recover(self) -> None:
        """After a crash: drop bytes that no row mentions, believe the files' sizes."""
        catalogue = self._catalogue
        orphaned = resized = 0
        for inode in catalogue.orphans():
            catalogue.remove(inode)
        for rid, size in self._storage.scan():
            found = catalogue.region(rid)
            if found is None:
                # Never persisted, or erased: the catalogue on the medium knows nothing of it.
                self._storage.erase(rid)
                orphaned += 1
            elif found.size != size:
                catalogue.resize(found, size)
                resized += 1
            catalogue.trim()
        if orphaned or resized:
            log.warning(
                "%s was not closed: removed %d unfinished regions, took %d sizes from files",
                catalogue.path, orphaned, resized,
            )  # fmt: skip

    def close(self) -> None:
        """Persist everything and let go of the medium.  Idempotent; never deletes a region.

        Waits for calls in flight.  Later calls raise ``TargetNotFound``.
        """
        if os.getpid() != self._pid:
            return  # a forked child holds copies of things that are its parent's
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while self._inside:
                self._wait(True)
        self._on_closing()
        self._stop.set()
        self._changed.set()
        if self._committer is not None:
            self._committer.join()
        try:
            self._storage.persist_all()
            with self._guard:
                for inode in self._catalogue.orphans():
                    self.discard(inode)
            self._commit()
        finally:
            try:
                with self._lock:
                    self._guard.closed = True
                    self._catalogue.close()
            finally:
                self._storage.close()
                self._on_close()

    def discard(self, inode: Inode) -> None:
        """Forget a nameless inode, and its bytes; the guard is held."""
        self._catalogue.remove(inode)
        inode.dead = True
        if stat.S_ISREG(inode.mode) and not (inode.users or inode.exclusive):
            self._free(inode)
