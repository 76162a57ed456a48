"""Advisory locks on files, as by flock(2) and fcntl(2), for all clients of a target.

A data structure: nothing here does I/O or waits.  A request that has to wait is a
:class:`WaitingLock`, whose ``wake`` is called when it is over.  Nothing is stored: locks end with
the target's process.

*Owners.*  An owner is a number of a client: of a process for locks of fcntl(2), of an open file for
others.  A client is one connection, or several of a program one after the other if it gave a token.
When the connection of a client with a token ends, its locks do not keep others from locking any
more, but are kept until a conflicting lock is granted.  So a client that connects again finds out
for each lock whether it was held without interruption.

*Waiting.*  A request is granted as soon as no lock that another owner holds conflicts with it, in
the order of requests; one that is compatible with what is held does not wait for earlier requests
that are not, as in Linux.  Each waiting request knows one owner that blocks it, and is looked at
again when that one has unlocked something.  Deadlocks are detected when a request begins to wait,
and when it goes on waiting for another owner; only among locks of ranges, as in Linux.

*Work.*  A call takes steps in proportion to the owners of one file, of which there are at most
``OWNERS``.  A release that would have to look at too many waiting requests leaves the rest to the
first of these, which it wakes: its task calls :meth:`FileLocks.settle` again.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from warabi._core import forks
from warabi._core.lock_ranges import END, EXCLUSIVE, SHARED, UNLOCK, FileLock, LockRanges
from warabi.errors import ConnectionLost, Exception, OutOfBounds, TargetNotFound, path_error
from warabi.region import RegionID

RANGES = 8192
"""Most locked ranges of one client; more are ``ENOLCK``."""
OWNERS = 4096
"""Most owners with locks on one file, and most requests that wait for one."""
WAITING = 1024
"""Most waiting requests of one client."""
SESSIONS = 1024
"""Most clients whose connections have ended and whose locks are kept."""
_STEPS = 20_000
"""Owners and requests, of less than a microsecond each, to look at in one call."""
_DEADLOCK = "lock: its holder waits for a lock of the caller"
_TOKEN = 64  # most bytes of a client's token


class LockClient:
    """What locks know of a client.

    Attributes:
        session: the connection that has it; None once that has ended.
        token: by which a later connection of the same program is recognised; empty: none is.
    """

    __slots__ = ("files", "ranges", "session", "token", "waiting")

    def __init__(self, session: object, token: bytes = b"") -> None:
        self.session: object | None = session
        self.token = token
        self.ranges = 0
        self.files: dict[_File, set[Owner]] = {}
        self.waiting: dict[WaitingLock, None] = {}


Owner = tuple[LockClient, int]


class _File:
    """The locks of one kind on one region."""

    __slots__ = ("key", "owners", "waiting")

    def __init__(self, key: tuple[RegionID, bool]) -> None:
        self.key = key
        self.owners: dict[Owner, LockRanges] = {}
        self.waiting: dict[WaitingLock, None] = {}


class WaitingLock:
    """A request that waits for a lock.

    Attributes:
        number: by which its client may cancel it.
        done: it is over: granted, or *error* says why not.
    """

    __slots__ = (
        "blocker", "done", "end", "error", "exclusive", "file", "number", "owner", "pid", "start",
        "wake",
    )  # fmt: skip

    def __init__(
        self, file: _File, owner: Owner, exclusive: bool, start: int, end: int, pid: int,
        number: int, wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self.file = file
        self.owner = owner
        self.exclusive = exclusive
        self.start = start
        self.end = end
        self.pid = pid
        self.number = number
        self.wake = wake
        self.blocker: Owner | None = None
        self.done = False
        self.error: Exception | None = None


class FileLocks:
    """The locks on the files of one target.  Thread-safe.

    Args:
        check: called with a region before it is locked; raises if there is none.
    """

    def __init__(self, check: Callable[[RegionID], object]) -> None:
        self._check_region = check
        self._reset()

    def _reset(self) -> None:
        self._lock = forks.lock()
        self._files: dict[tuple[RegionID, bool], _File] = {}
        self._waiting_of: dict[Owner, dict[WaitingLock, None]] = {}  # for ranges only
        self._sessions: dict[bytes, LockClient] = {}  # by token
        self._ended: dict[LockClient, None] = {}  # without a connection, oldest first
        self._kept = 0  # ranges of these
        self._unsettled: dict[_File, None] = {}  # a release did not look at all that waits
        self._woken: deque[WaitingLock] = deque()  # to be woken when the lock is released
        self._steps = 0  # that are left for the current call
        self._closed = False
        self.local = LockClient(self)
        """The client that programs in the target's process are."""

    def forked(self) -> None:
        """In a forked child: it holds no locks, and the parent's are none of its own."""
        self._reset()
        self._closed = True

    def close(self) -> None:
        """Fail what waits, and all later requests; the target was closed or migrated."""
        with self._lock:
            self._closed = True
            for file in list(self._files.values()):
                for waiting in list(file.waiting):
                    self._over(waiting, TargetNotFound("lock: the target was closed"))
            self._files.clear()
        self._wake()

    # Clients

    def client(self, session: object, token: bytes = b"") -> LockClient:
        """Return the client of a connection; with the *token* of an earlier one that client, with
        the locks that it still has."""
        if not token:
            return LockClient(session)
        if len(token) > _TOKEN:
            raise OutOfBounds(f"lock_session: a token of {len(token)} bytes, at most {_TOKEN}")
        with self._lock:
            client = self._sessions.get(token)
            if client is None:
                client = self._sessions[token] = LockClient(session, token)
            elif client.session is None:
                del self._ended[client]
                self._kept -= client.ranges
            client.session = session
            for waiting in list(client.waiting):  # the connection that asked has ended
                self._over(waiting, ConnectionLost("lock: the connection was replaced"))
            self._settle()
        self._wake()
        return client

    def end(self, client: LockClient, session: object) -> None:
        """The connection *session* has ended: its client's locks block no others any more."""
        with self._lock:
            if client.session is not session:
                return  # a later connection has it
            client.session = None
            for waiting in list(client.waiting):
                self._over(waiting, ConnectionLost("lock: the connection has ended"))
            files = list(client.files)
            if not client.token or self._closed:
                self._forget(client)
            else:
                self._ended[client] = None
                self._kept += client.ranges
                while len(self._ended) > SESSIONS or self._kept > RANGES * 8:
                    oldest = next(iter(self._ended))
                    del self._ended[oldest]
                    self._kept -= oldest.ranges
                    self._forget(oldest)
            for file in files:
                self._unsettled[file] = None
            self._settle()
        self._wake()

    def _forget(self, client: LockClient) -> None:
        for file, owners in client.files.items():
            for owner in owners:
                del file.owners[owner]
            self._drop_if_unused(file)
        client.files.clear()
        client.ranges = 0
        self._sessions.pop(client.token, None)

    # Requests

    def request(
        self, client: LockClient, region: RegionID, flock: bool, owner: int, kind: int,
        start: int, end: int, pid: int, number: int = 0,
        *, wake: Callable[[], None] | None = None,
    ) -> WaitingLock | None:  # fmt: skip
        """Lock or unlock bytes *start* to *end* of a region for an owner.

        Args:
            client: whose owner.
            region: the region.
            flock: a lock of flock(2), which conflicts only with others of these; the range is that
                of the whole file.
            owner: a number of the client.
            kind: ``SHARED``, ``EXCLUSIVE`` or ``UNLOCK``.
            start: offset of the first byte.
            end: offset of the last byte.
            pid: the process, for :meth:`test`.
            number: names a request that waits, for :meth:`cancel`.
            wake: called, by any thread, when a request that waits is over, or should call
                :meth:`settle`.  None: do not wait.

        Returns:
            what waits; None: it was granted.

        Raises:
            PathError: ``EAGAIN``, it would have to wait; ``EDEADLK``, it would wait for ever;
                ``ENOLCK``, there are too many locks or requests.
            OutOfBounds: an impossible kind or range.
            InvalidRegion: unknown or erased.
            TargetNotFound: the target is closed.
        """
        self._check(kind, start, end)
        if kind != UNLOCK:
            self._check_region(region)
        holder = (client, owner)
        try:
            with self._lock:
                self._check_open(client)
                if kind == UNLOCK:
                    file = self._files.get((region, flock))
                    held = None if file is None else file.owners.get(holder)
                    if file is None or held is None:
                        return None
                    if client.ranges >= RANGES and held.splits(start, end):
                        raise path_error(errno.ENOLCK, "unlock: too many locks")
                    if self._unlock(file, holder, start, end):
                        self._unsettled[file] = None
                        self._settle()
                    return None
                return self._acquire(
                    holder, (region, flock), kind == EXCLUSIVE, start, end, pid, number, wake
                )
        finally:
            self._wake()

    @staticmethod
    def _check(kind: int, start: int, end: int) -> None:
        if kind not in (SHARED, EXCLUSIVE, UNLOCK):
            raise OutOfBounds(f"lock: {kind} is no kind of a lock")
        if not 0 <= start <= end <= END:
            raise OutOfBounds(f"lock: bytes {start} to {end} are no range of a file")

    def _check_open(self, client: LockClient) -> None:
        if self._closed:
            raise TargetNotFound("lock: the target was closed")
        if client.session is None:
            raise TargetNotFound("lock: the client's connection has ended")

    def _acquire(
        self, holder: Owner, key: tuple[RegionID, bool], exclusive: bool, start: int, end: int,
        pid: int, number: int, wake: Callable[[], None] | None,
    ) -> WaitingLock | None:  # fmt: skip
        client, flock = holder[0], key[1]
        if flock:
            start, end = 0, END
        file = self._files.get(key) or _File(key)
        held = file.owners.get(holder)
        if flock and held is not None:
            if held.covers(start, end, exclusive):
                return None
            # A lock of flock(2) is given up before it is asked for in another mode.
            self._unlock(file, holder, start, end)
            self._unsettled[file] = None
        elif client.ranges + 2 > RANGES or (held is None and len(file.owners) >= OWNERS):
            raise path_error(errno.ENOLCK, "lock: too many locks")
        try:
            blocker = self._blocker(file, holder, exclusive, start, end)
            if blocker is None:
                self._grant(file, holder, exclusive, start, end, pid)
                return None
            if wake is None:
                raise path_error(errno.EAGAIN, "lock: another owner has locked it")
            if len(file.waiting) >= OWNERS or len(client.waiting) >= WAITING:
                raise path_error(errno.ENOLCK, "lock: too many requests wait for locks")
            waiting = WaitingLock(file, holder, exclusive, start, end, pid, number, wake)
            waiting.blocker = blocker
            if not flock:
                self._steps = _STEPS
                if self._is_deadlock(waiting):
                    raise path_error(errno.EDEADLK, _DEADLOCK)
                self._waiting_of.setdefault(holder, {})[waiting] = None
            file.waiting[waiting] = client.waiting[waiting] = None
            self._files[key] = file
            return waiting
        finally:
            self._settle()

    def cancel(self, client: LockClient, number: int) -> None:
        """End what waits under that number, if anything does, with ``EINTR``."""
        with self._lock:
            for waiting in client.waiting:
                if waiting.number == number:
                    self._over(waiting, path_error(errno.EINTR, "lock: interrupted"))
                    break
            self._settle()
        self._wake()

    def test(
        self, client: LockClient, region: RegionID, flock: bool, owner: int, kind: int,
        start: int, end: int,
    ) -> FileLock | None:  # fmt: skip
        """Return a lock that conflicts with a request, see :meth:`request`; None if none does."""
        self._check(kind, start, end)
        holder = (client, owner)
        with self._lock:
            self._check_open(client)
            file = self._files.get((region, flock))
            if file is None or kind == UNLOCK:
                return None
            blocker = self._blocker(file, holder, kind == EXCLUSIVE, start, end)
            if blocker is None:
                return None
            found = file.owners[blocker].conflict(start, end, kind == EXCLUSIVE)
            return found if found is None or blocker[0] is client else found._replace(pid=0)

    def holds(
        self, client: LockClient, region: RegionID, flock: bool, owner: int, kind: int,
        start: int, end: int,
    ) -> bool:  # fmt: skip
        """Whether an owner has the range locked in this way."""
        with self._lock:
            file = self._files.get((region, flock))
            held = None if file is None else file.owners.get((client, owner))
            return held is not None and held.covers(start, end, kind == EXCLUSIVE)

    def execute(self, client: LockClient, name: str, arguments: Sequence[Any]) -> Any:
        """Execute an operation on locks, except ``lock`` with a number; returns its result."""
        if name == "lock":
            return self.request(client, *arguments)
        if name == "cancel_lock":
            return self.cancel(client, *arguments)
        return (self.test if name == "test_lock" else self.holds)(client, *arguments)

    # Within the lock

    def _blocker(
        self, file: _File, holder: Owner, exclusive: bool, start: int, end: int
    ) -> Owner | None:
        """Return an owner, with a connection, whose lock conflicts."""
        for owner, ranges in file.owners.items():
            if owner[0].session is None or owner == holder:
                continue
            if ranges.conflict(start, end, exclusive) is not None:
                return owner
        return None

    def _grant(
        self, file: _File, holder: Owner, exclusive: bool, start: int, end: int, pid: int
    ) -> None:
        if self._ended:  # what these held is lost now
            for owner, ranges in list(file.owners.items()):
                if owner[0].session is None and ranges.conflict(start, end, exclusive):
                    self._unlock(file, owner, start, end)
        own = file.owners.get(holder)
        if own is None:
            self._files[file.key] = file
            own = file.owners[holder] = LockRanges()
            holder[0].files.setdefault(file, set()).add(holder)
        elif not exclusive:  # others may share now what the owner had alone
            self._unsettled[file] = None
        before = len(own)
        own.lock(start, end, exclusive, pid)
        holder[0].ranges += len(own) - before

    def _unlock(self, file: _File, holder: Owner, start: int, end: int) -> bool:
        """Unlock a range; whether some of it was locked."""
        ranges, client = file.owners.get(holder), holder[0]
        if ranges is None:
            return False
        before = len(ranges)
        changed = ranges.unlock(start, end)
        more = len(ranges) - before
        client.ranges += more
        if client.session is None:
            self._kept += more
        if not ranges:
            del file.owners[holder]
            client.files[file].discard(holder)
            if not client.files[file]:
                del client.files[file]
            self._drop_if_unused(file)
        return changed

    def _drop_if_unused(self, file: _File) -> None:
        if not file.owners and not file.waiting and self._files.get(file.key) is file:
            del self._files[file.key]

    def _over(self, waiting: WaitingLock, error: Exception | None) -> None:
        waiting.done, waiting.error = True, error
        file, client = waiting.file, waiting.owner[0]
        del file.waiting[waiting]
        del client.waiting[waiting]
        others = self._waiting_of.get(waiting.owner)
        if others is not None:
            others.pop(waiting, None)
            if not others:
                del self._waiting_of[waiting.owner]
        self._drop_if_unused(file)
        self._woken.append(waiting)

    def _settle(self) -> None:
        """Grant what waits and does not have to any more, as far as the steps suffice."""
        self._steps = _STEPS
        while self._unsettled:
            file = next(iter(self._unsettled))
            del self._unsettled[file]
            for waiting in list(file.waiting):
                self._retry(file, waiting)
                if self._steps < 0:
                    break
            if self._steps < 0 and file.waiting:
                self._unsettled[file] = None
                self._woken.append(next(iter(file.waiting)))  # which goes on
                return

    def _retry(self, file: _File, waiting: WaitingLock) -> None:
        """Grant a waiting request if that is possible."""
        holder, exclusive, start, end = waiting.owner, waiting.exclusive, waiting.start, waiting.end
        self._steps -= 1
        old = waiting.blocker
        assert old is not None
        held = file.owners.get(old)
        if old[0].session is not None and held and held.conflict(start, end, exclusive):
            return
        self._steps -= len(file.owners)
        waiting.blocker = blocker = self._blocker(file, holder, exclusive, start, end) or old
        if blocker is not old:
            if not file.key[1] and self._is_deadlock(waiting):
                self._over(waiting, path_error(errno.EDEADLK, _DEADLOCK))
            return
        new = holder not in file.owners
        if holder[0].ranges + 2 > RANGES or (new and len(file.owners) >= OWNERS):
            self._over(waiting, path_error(errno.ENOLCK, "lock: too many locks"))
            return
        self._grant(file, holder, exclusive, start, end, waiting.pid)
        self._over(waiting, None)

    def _is_deadlock(self, waiting: WaitingLock) -> bool:
        """Whether one of those that block a request waits, perhaps by way of others, for its
        owner.  What more than the steps would be needed for is not found."""
        seen: set[Owner] = set()
        pending = [waiting]
        while pending:
            one = pending.pop()
            for owner, ranges in one.file.owners.items():
                self._steps -= 1
                if self._steps < 0:
                    return False
                if owner == one.owner or owner in seen or owner[0].session is None:
                    continue
                if ranges.conflict(one.start, one.end, one.exclusive) is None:
                    continue
                if owner == waiting.owner:
                    return True
                seen.add(owner)
                pending += self._waiting_of.get(owner, ())
        return False

    def settle(self) -> None:
        """Continue what a release left undone; for the task of a request that was woken early."""
        with self._lock:
            self._settle()
        self._wake()

    def _wake(self) -> None:
        while True:
            try:
                waiting = self._woken.popleft()
            except IndexError:  # this thread, or another one, has woken them
                return
            waiting.wake()
