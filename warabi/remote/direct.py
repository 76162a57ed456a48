"""Direct access of a blocking client, over a separate connection for grants."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from warabi import errors
from warabi._core import forks, interrupts
from warabi._core.tuning import GRANT_PATIENCE
from warabi.protocol.pending import PendingRequest
from warabi.region import RegionID
from warabi.remote.connection import BlockingConnection
from warabi.shm.client import DirectAccess, Guest
from warabi.shm.layout import ENTRIES

_FIRST_SIZE = 64 * 1024
"""From this size in bytes on a transfer joins at once; smaller ones only if there are several."""
_MADE_SIZE = 256 * 1024
"""From this size in bytes on the data of a new region are written by direct access."""
_MOST_WANTED = 1024


def _made(made: list[Any], descriptors: list[int]) -> tuple[RegionID, Sequence[Any] | None]:
    """Parse the result of ``make``: the region, and its grant with one descriptor, if any.

    Raises:
        ProtocolError: it is inconsistent; the descriptors are closed.
    """
    region: RegionID = made[0]
    granted: Sequence[Any] = made[1:]
    if not descriptors:
        return region, None
    if len(descriptors) == 1 and granted and 0 < granted[0] < ENTRIES:
        return region, granted
    for fd in descriptors:
        os.close(fd)
    raise errors.ProtocolError(f"the provider made {made} with {len(descriptors)} descriptors")


class DirectAccessChannel(DirectAccess):
    """Direct access to one target, if its provider grants it.

    Args:
        connect: opens a connection with descriptors.
        provider_id: of the target's provider.
        writable: whether to request write access.
    """

    def __init__(
        self, connect: Callable[[], BlockingConnection], provider_id: int, *, writable: bool = True
    ) -> None:
        super().__init__()
        self._connect = connect
        self._provider_id = provider_id
        self._writable = writable
        self._lock = forks.lock()  # held while requesting a grant
        self._over = False
        self._begin()
        forks.register(self)

    def _begin(self) -> None:
        self.guest = None
        self._connection: BlockingConnection | None = None
        self._accesses = 0
        self._wanted: dict[RegionID, None] = {}  # requested by callers that do not wait
        self._beside = False  # a thread requests them

    def _asked(self, what: str, region: RegionID, size: int, wait: bool) -> Guest | None:
        """Request a grant; returns the guest if it was granted; without *wait* a thread requests
        it.

        Raises:
            TimedOut: the provider does not reply.
        """
        if self._over:
            return None
        if wait:
            if self._lock.locked():
                return None
            return interrupts.uninterrupted(self._ask, what, region, size, False)
        if self.guest is not None and not self.guest.wants(region, size):
            return None
        if len(self._wanted) < _MOST_WANTED:
            self._wanted[region] = None
        if not self._beside:
            self._beside = True
            thread = threading.Thread(
                target=self._ask_concurrently, args=(what,), name="warabi-grant", daemon=True
            )
            thread.start()
        return None

    def _ask_concurrently(self, what: str) -> None:
        """Request grants for callers that do not wait, until there are none left."""
        try:
            while self._wanted and not self._over:
                region = next(iter(self._wanted))
                with contextlib.suppress(errors.TimedOut):
                    self._ask(what, region, _FIRST_SIZE, True)
                self._wanted.pop(region, None)
        finally:
            self._beside = False

    def _ask(self, what: str, region: RegionID, size: int, wait: bool) -> Guest | None:
        """Request a grant; without *wait* returns None while another thread does."""
        held = False
        try:
            (held,) = map(self._lock.acquire, (wait,))  # in one step: see interrupts.py
            if not held:
                return None
            guest = self.guest
            if guest is None:
                self._accesses += 1
                if self._accesses > 1 or size >= _FIRST_SIZE:
                    guest = self.guest = self._join(what)
                    self._over = guest is None
            if guest is None or not guest.wants(region, size):
                return None
            guest.add(region, *self._call(what, "grant", [region]))
            return guest
        except (errors.InvalidRegion, errors.TargetBusy):
            return None  # the caller's next step reports it
        except errors.TimedOut:
            self._end()
            raise
        except (errors.Exception, OSError):
            self._end()
            return None
        except BaseException:
            self._restart()
            raise
        finally:
            if held:
                self._lock.release()

    def makes(self, size: int) -> bool:
        """Whether :meth:`make` may be possible for a region of *size* bytes."""
        return size >= _MADE_SIZE and not self._over

    def make(
        self, size: int, *, unnamed: bool = False
    ) -> tuple[RegionID, Callable[[memoryview], bool]] | None:
        """Create a region of *size* bytes; returns it and a function that writes its data.  None:
        use a normal request to create it; if the function returns False: use one to write the data.
        An *unnamed* one is removed with the connection, unless ``publish`` gives it a name.

        Raises:
            StorageFull, StorageError: and the other errors of creating a region.
            TimedOut: the provider does not reply.
        """
        what = "create_and_write"
        if not self.makes(size):
            return None
        held, request = False, None
        try:
            (held,) = map(self._lock.acquire, (False,))
            if not held:
                return None
            guest = self.guest = self.guest or self._join(what)
            self._over = guest is None
            if guest is None or not guest.writes:
                return None
            request = self._submit(what, "make_unnamed" if unnamed else "make", [size])
            made, descriptors = self._result(request)
            if made is None:
                return None
            region, granted = _made(made, descriptors)
            if granted is None:
                return region, lambda data: False
            return region, functools.partial(guest.fill, region, granted, descriptors[0])
        except errors.TargetBusy:
            return None
        except errors.TimedOut:
            self._end()
            raise
        except (errors.ConnectionLost, errors.ConnectionFailed, errors.ProtocolError, OSError):
            self._end()
            return None
        except errors.Exception:
            raise
        except BaseException:
            connection = self._connection
            if request is not None and connection is not None:
                self._connection = None
                threading.Thread(
                    target=self._erase_made, args=(connection, request), name="warabi-erase",
                    daemon=True,
                ).start()  # fmt: skip
            self._restart()
            raise
        finally:
            if held:
                self._lock.release()

    def _join(self, what: str) -> Guest | None:
        self._connection = self._connect()
        joined, descriptors = self._call(what, "join", [self._writable])
        return None if joined is None else Guest(joined, descriptors)

    def _call(self, what: str, name: str, arguments: list[Any]) -> tuple[Any, list[int]]:
        return self._result(self._submit(what, name, arguments))

    def _submit(self, what: str, name: str, arguments: list[Any]) -> PendingRequest:
        assert self._connection is not None
        request = PendingRequest(what, operation=name)
        self._connection.submit(request, [self._provider_id, name, arguments, None])
        return request

    def _result(self, request: PendingRequest) -> tuple[Any, list[int]]:
        assert self._connection is not None
        result = self._connection.wait(request)
        return result, self._connection.take_descriptors()

    def _erase_made(self, connection: BlockingConnection, request: PendingRequest) -> None:
        """Erase the region that *request* creates, whose caller was interrupted; in a separate
        thread, because the reply may take long."""
        with contextlib.suppress(errors.Exception):
            made = connection.wait(request)
            for fd in connection.take_descriptors():
                os.close(fd)
            if made is not None:
                erase = PendingRequest("erase")
                connection.submit(erase, [self._provider_id, "erase", [made[0]], None])
                connection.wait(erase)
        connection.close(0.0)

    def _end(self) -> None:
        """End direct access."""
        self._over = True
        if self.guest is not None:
            self.guest.close()
        if self._connection is not None:
            self._connection.close(0.0)

    def _restart(self) -> None:
        """Start again with a new connection, since a reply with its descriptors was abandoned."""
        if self.guest is not None:
            self.guest.close()
        if self._connection is not None:
            self._connection.close(0.0)
        self._begin()

    def _forked(self) -> None:
        """In a forked child: grants belong to the parent; request new ones over a new
        connection."""
        self._begin()

    def close(self) -> None:
        """Access nothing any more, and send ``leave``."""
        held = False
        try:
            (held,) = map(self._lock.acquire, (True,), (GRANT_PATIENCE,))
            if not held:
                # The requesting thread waits for a provider that does not respond.
                self._over = True
                if self._connection is not None:
                    self._connection.close(0.0)
                (held,) = map(self._lock.acquire, (True,))
            if self.guest is not None and not self._over:
                self.guest.close()
                with contextlib.suppress(errors.Exception):
                    self._call("leave", "leave", [])
            self._end()
        finally:
            if held:
                self._lock.release()
