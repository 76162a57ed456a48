"""The lock that covers a catalogue, with the checks of a block that holds it."""

from __future__ import annotations

import sqlite3
import threading
from types import TracebackType

from warabi.errors import TargetNotFound
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.journal import translate


class Guard:
    """The target's lock, and what is checked under it: ``with guard.lock, guard.checked``.

    Both are named wherever the lock is taken: a context written in Python that took it could be
    interrupted by a signal's handler between the two, and the lock would never be released.

    Attributes:
        lock: the target's.
        checked: a context for a block that holds the lock: refuses it once the target is closed,
            trims the catalogue at its end, and translates SQLite's errors.
        closed: whether *checked* refuses.
        reason: what it says then.
    """

    __slots__ = ("checked", "closed", "lock", "reason")

    def __init__(
        self, lock: threading.Lock, catalogue: Catalogue, changed: threading.Event
    ) -> None:
        self.lock = lock
        self.checked = Checked(self, catalogue, changed)
        self.closed = False
        self.reason = "the target is closed"


class Checked:
    """See :class:`Guard`."""

    __slots__ = ("_catalogue", "_changed", "_guard")

    def __init__(self, guard: Guard, catalogue: Catalogue, changed: threading.Event) -> None:
        self._guard = guard
        self._catalogue = catalogue
        self._changed = changed

    def __enter__(self) -> None:
        if self._guard.closed:
            raise TargetNotFound(self._guard.reason)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                self._catalogue.trim()
            except Exception:
                # The operation itself has succeeded.  What could not be written is kept, and the
                # next commit reports why.
                self._catalogue.restore()
                self._changed.set()
        if not self._changed.is_set() and self._catalogue.uncommitted:
            self._changed.set()
        if isinstance(error, sqlite3.Error):
            self._catalogue.restore()
            raise translate(error, self._catalogue.path) from error
