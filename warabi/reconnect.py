"""A target of a Trio client that reconnects after losing the connection.

Rules of this module:

* One task, :meth:`ReconnectingLink.run`, opens connections, one after the other.  A call uses the
  current link, or waits for the next one until the outage has lasted for ``patience``.
* A call whose reply was lost is repeated on the next connection if its operation allows that
  (``Operation.repeatable``).  Others may or may not have taken effect, so they raise.
* A call that does not complete while others do fails and is not repeated.  If it may have pinned
  something, the connection is closed, which releases it.  Only ``watch`` is sent again after that
  time, since it may legitimately wait.  A call that was first lost more than ``patience`` ago is
  not repeated either: it may be what ends the connections.
* A call whose caller was cancelled (``warabi/_core/caller.py``) is neither sent nor repeated.
* State of a connection at the provider ends with it: pins are acquired again before the next link
  is used.  An inode that was removed in between stays removed, its region is invalid.
* Locks on files end with the connection, too, but the provider keeps them until another client
  locks the same.  The next link asks for each whether it still has it.  What is lost makes all use
  of the file fail until its owner has unlocked it.
* Unsynced writes may be lost when a provider is not shut down cleanly.  This changes the target's
  *epoch*: then the next sync of each file with such data fails, once, as after an I/O error.
* Between reading a table and changing it there is no checkpoint.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeVar

import trio

from warabi import aio, errors
from warabi._core.attributes import Attributes
from warabi._core.caller import is_gone
from warabi._core.changes import Changes
from warabi._core.extents import Extent
from warabi._core.results import OpenedInode
from warabi._core.tuning import RECONNECT_DELAYS, RECONNECT_PATIENCE, SILENCE_TIMEOUT
from warabi.in_process.aio_link import AsyncLink, GetBuffer
from warabi.protocol.operations import OPERATIONS, Syncs, operation_named
from warabi.protocol.operations import ChangeScope as Changing
from warabi.region import RegionID
from warabi.remote.held_locks import HeldLocks

log = logging.getLogger(__name__)

PATIENCE = RECONNECT_PATIENCE
"""Default seconds for which calls wait for a reconnect."""
_UNSYNCED = 65536  # most files that are remembered as having unsynced data
_LOST = (errors.ConnectionLost, errors.TimedOut)
_NOBODY_THERE = (*_LOST, errors.ConnectionFailed)
_T = TypeVar("_T")


class ReconnectingLink:
    """A link to a target of an engine over successive connections.

    Args:
        open_target: connects; its argument is set when the connection has ended.
        name: of the engine, for messages.
        patience: seconds of an outage for which calls wait.
    """

    def __init__(
        self,
        open_target: Callable[[trio.Event], AbstractAsyncContextManager[aio.Target]],
        name: str,
        patience: float,
    ) -> None:
        self._open_target = open_target
        self._name = name
        self._patience = patience
        self._link: AsyncLink | None = None  # of the current connection
        self._ended = trio.Event()  # set when that connection has ended, or should
        self._back = trio.Event()  # set when the next one is open
        self._since = 0.0  # when the outage began, by Trio's clock
        self._reason: errors.Exception = errors.ConnectionLost(f"{name}: not connected yet")
        self._identity: tuple[str, str] | None = None  # uuid and epoch of the target
        self._pins: Counter[int] = Counter()
        self._generations: dict[int, int] = {}  # of pinned inodes, whose numbers may be reused
        self._gone: set[int] = set()  # pinned ones that could not be pinned again
        self._clock = itertools.count(1)  # numbers changes
        self._unsynced: dict[
            RegionID, int
        ] = {}  # number of the last change of each file, oldest first
        self._names_changed = 0  # number of the last unsynced change of a name
        self._token = secrets.token_bytes(16)  # by which the provider recognises this client
        self._locks = HeldLocks()
        self._locking: AsyncLink | None = None  # the last link that was told the token
        self._torn: set[RegionID] = set()  # files that may have lost writes
        self._names_torn = False

    # Connections

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a connection until cancelled; raises only when the first one cannot be made."""
        delay, most = RECONNECT_DELAYS
        while True:
            ended = trio.Event()
            try:
                async with self._open_target(ended) as target:
                    link = target.link
                    await self._restore(link)
                    self._link, self._ended = link, ended
                    self._back.set()
                    if delay != RECONNECT_DELAYS[0]:
                        log.info("%s: reconnected", self._name)
                    delay = RECONNECT_DELAYS[0]
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                    await ended.wait()
                    self._lose(link, errors.ConnectionLost(f"{self._name}: the connection ended"))
            except errors.Exception as error:
                if task_status is not trio.TASK_STATUS_IGNORED:
                    raise
                self._reason = error
            await trio.sleep(delay)
            delay = min(2 * delay, most)

    async def _restore(self, link: AsyncLink) -> None:
        """Check the target's identity, and acquire again what the last connection held."""
        found = (await link.call("uuid", ()), await link.call("epoch", ()))
        if self._identity is not None and found[0] != self._identity[0]:
            raise errors.ConnectionFailed(f"{self._name}: a different target is served there now")
        held: Counter[int] = Counter()
        while missing := self._pins - held:  # calls that end late may add more
            for ino in missing.elements():
                held[ino] += 1
                if ino not in self._gone and not await self._pin_again(link, ino):
                    self._gone.add(ino)
        if self._identity is not None and found[1] != self._identity[1]:
            self._tear()
        self._identity = found
        if self._locking is not None:
            await self._restore_locks(link)

    async def _restore_locks(self, link: AsyncLink) -> None:
        """Find out which locks are still held."""
        locks = self._locks
        await link.call("lock_session", (self._token,))
        self._locking = link
        checked: set[Any] = set()
        while True:  # calls that end late may add more
            while locks.unknown:
                request = locks.unknown.pop()
                try:
                    await link.call("lock", request)
                except BaseException:
                    locks.unknown.append(request)
                    raise
            missing = [item for item in locks.items() if item not in checked]
            if not missing:
                return
            for item in missing:
                checked.add(item)
                if not await link.call("holds_lock", locks.question(*item)):
                    log.error("%s: a lock on region %s was lost", self._name, item[0][0].hex())
                    locks.lose(*item)

    async def _pin_again(self, link: AsyncLink, ino: int) -> bool:
        try:
            found: Attributes = await link.call("pin", (ino,))
            if found.generation == self._generations.get(ino, found.generation):
                return True
            await link.call("unpin", (ino, 1))
        except (errors.InvalidRegion, errors.PathError):
            pass
        log.warning("%s: inode %d was removed while it was open", self._name, ino)
        return False

    def _tear(self) -> None:
        if self._unsynced or self._names_changed:
            log.error(
                "%s: the provider was not shut down cleanly: unsynced writes to %d files may be"
                " lost", self._name, len(self._unsynced),
            )  # fmt: skip
        self._torn |= self._unsynced.keys()
        self._names_torn = self._names_torn or bool(self._names_changed)
        self._unsynced.clear()
        self._names_changed = 0

    def _lose(self, link: AsyncLink, reason: errors.Exception) -> None:
        if self._link is link:
            log.warning("%s; calls wait up to %g s for a reconnect", reason, self._patience)
            self._link = None
            self._since = trio.current_time()
            self._reason = reason
            self._back = trio.Event()
            self._ended.set()

    async def _usable(self) -> AsyncLink:
        if self._link is None:
            with trio.move_on_at(self._since + self._patience):
                while self._link is None:
                    await self._back.wait()
            if is_gone():
                raise errors.ConnectionLost(f"{self._name}: not sent, its caller was cancelled")
        if self._link is None:
            reason = self._reason
            kind = type(reason) if isinstance(reason, _NOBODY_THERE) else errors.ConnectionLost
            raise kind(str(reason))
        return self._link

    async def _do(
        self, name: str, work: Callable[[AsyncLink], Awaitable[_T]], region: object = None
    ) -> tuple[_T, AsyncLink]:
        """Run *work*, which is the operation *name* on *region*; returns its result and link."""
        repeated_until = 0.0
        while True:
            link = await self._usable()
            if self._locks.lost_in:  # also by the outage that was waited for
                self._locks.check(region, name)
            try:
                return await work(link), link
            except _LOST as error:
                now = trio.current_time()
                repeated_until = repeated_until or now + self._patience
                operation = OPERATIONS[name]
                alone = isinstance(error, errors.TimedOut) and error.alone
                unsent = isinstance(error, errors.TimedOut) and error.unsent
                if not alone or (operation.pins is not None and not unsent):
                    self._lose(link, error)
                if alone or not operation.repeatable or now > repeated_until or is_gone():
                    raise

    # Calls

    async def call(self, name: str, arguments: Sequence[Any]) -> Any:
        arguments = tuple(arguments)
        operation = operation_named(name)
        if name == "lock":
            return await self._lock(arguments)
        changes, syncs = operation.changes, operation.syncs is not Syncs.NOTHING
        before = next(self._clock)
        at = operation.position.get("region")
        region = None if at is None else arguments[at]
        if syncs:
            self._check_torn(name, arguments)
        if name == "unpin" and arguments[0] in self._gone:
            await self._count_pins(name, arguments, None, None)
            return None
        if changes is Changing.NAMES:
            self._names_changed = before
        try:
            result, link = await self._do(name, lambda link: link.call(name, arguments), region)
        except _NOBODY_THERE:
            if name == "unpin":
                # The pins ended with the connection, and must not be acquired again by the next
                # one.
                await self._count_pins(name, arguments, None, None)
            raise
        if syncs:
            self._check_torn(name, arguments)  # the data were lost while it was repeated
            self._synced(name, arguments, before)
        elif changes is Changing.NAMES:
            self._names_changed = next(self._clock)
        elif changes is Changing.REGION:
            self._changed(arguments[operation.position["region"]])
        elif changes is Changing.INODE:
            self._changed(getattr(result, "region", None))
        await self._count_pins(name, arguments, result, link)
        return result

    async def _lock(self, request: tuple[Any, ...]) -> None:
        """Lock or unlock; a request whose reply was lost is repeated."""
        locks = self._locks

        async def ask(link: AsyncLink) -> None:
            locks.check_owner(request)
            if link is not self._locking:
                await link.call("lock_session", (self._token,))
                self._locking = link
            await link.call("lock", request)

        while True:
            locks.asked(request)
            try:
                _, link = await self._do("lock", ask)
            except (*_NOBODY_THERE, trio.Cancelled):
                locks.uncertain(request)
                raise
            if self._link in (link, None):
                break
            # It was granted on a connection that has ended, and the next one knew nothing of it.
        locks.granted(request)

    async def _count_pins(
        self, name: str, arguments: tuple[Any, ...], result: Any, link: AsyncLink | None
    ) -> None:
        pins = OPERATIONS[name].pins
        pinned = None if pins is None else pins(arguments, result)
        if pinned is None:
            return
        ino, count = pinned
        self._pins[ino] += count
        if self._pins[ino] <= 0:
            del self._pins[ino]
            self._generations.pop(ino, None)
            self._gone.discard(ino)
            return
        found = result.attributes if isinstance(result, OpenedInode) else result
        if isinstance(found, Attributes):
            self._generations[ino] = found.generation
        if count > 0 and self._link not in (
            link,
            None,
        ):  # it was pinned on a connection that has ended
            with suppress(errors.InvalidRegion, errors.PathError):
                await self._do("pin", lambda link: link.call("pin", (ino,)))

    def _changed(self, region: RegionID | None, persisted: bool = False) -> None:
        if persisted:
            return
        if region is None:
            self._names_changed = next(self._clock)
            return
        self._unsynced.pop(region, None)
        self._unsynced[region] = next(self._clock)
        if len(self._unsynced) > _UNSYNCED:
            del self._unsynced[next(iter(self._unsynced))]

    def _check_torn(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Report, once, that a sync is too late.

        Raises:
            StorageError: earlier writes may be lost.
        """
        syncs = OPERATIONS[name].syncs
        if syncs is Syncs.NAMES:
            torn, self._names_torn = self._names_torn, False
        elif syncs is Syncs.EVERYTHING:
            torn = bool(self._torn) or self._names_torn
            self._torn.clear()
            self._names_torn = False
        else:
            torn = arguments[0] in self._torn
            self._torn.discard(arguments[0])
        if torn:
            raise errors.StorageError(
                f"{name}: {self._name} was not shut down cleanly; earlier unsynced writes may be"
                " lost"
            )

    def _synced(self, name: str, arguments: tuple[Any, ...], before: int) -> None:
        if self._names_changed < before:
            self._names_changed = 0
        syncs = OPERATIONS[name].syncs
        if syncs is Syncs.REGION and self._unsynced.get(arguments[0], before) < before:
            del self._unsynced[arguments[0]]
        elif syncs is Syncs.EVERYTHING:
            self._unsynced = {
                region: change for region, change in self._unsynced.items() if change > before
            }

    async def changes(self, number: int, new_names: bool) -> Changes:
        while True:
            try:
                changes, _ = await self._do("watch", lambda link: link.changes(number, new_names))
            except errors.TimedOut as error:
                if not error.alone:
                    raise
                # Nothing has changed, or the reply was lost, which the provider detects by
                # *number*.
            else:
                return changes

    # Bytes

    async def size(self, region: RegionID) -> int:
        size, _ = await self._do("size", lambda link: link.size(region), region)
        return size

    async def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        # Before and after: the reply may arrive when another provider is connected.
        self._changed(region, persist)
        await self._do(
            "write", lambda link: link.write(region, offset, data, persist, extend), region
        )
        self._changed(region, persist)

    async def read_into(self, region: RegionID, offset: int, place: memoryview) -> None:
        await self._do("read", lambda link: link.read_into(region, offset, place), region)

    async def read_some(self, region: RegionID, offset: int, size: int, place: GetBuffer) -> int:
        count, _ = await self._do(
            "read", lambda link: link.read_some(region, offset, size, place), region
        )
        return count

    async def create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        region, _ = await self._do(
            "create_and_write", lambda link: link.create_and_write(data, persist)
        )
        self._changed(region, persist)
        return region

    async def store(self, arguments: Sequence[Any], data: memoryview) -> Attributes | None:
        self._names_changed = next(self._clock)
        stored, _ = await self._do("store", lambda link: link.store(arguments, data))
        self._names_changed = next(self._clock)
        if stored is not None:
            self._changed(stored.region, arguments[OPERATIONS["store"].position["persist"]])
        return stored

    async def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None:
        self._changed(region, persist)
        await self._do(
            "write_vector", lambda link: link.write_vector(region, extents, data, persist), region
        )
        self._changed(region, persist)

    async def append(self, region: RegionID, data: memoryview, persist: bool) -> int:
        self._changed(region, persist)
        offset, _ = await self._do(
            "append", lambda link: link.append(region, data, persist), region
        )
        self._changed(region, persist)
        return offset

    async def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None:
        await self._do("read_vector", lambda link: link.read_vector(region, extents, place), region)


@asynccontextmanager
async def connect(
    address: str,
    provider_id: int,
    *,
    timeout: float = SILENCE_TIMEOUT,
    patience: float = PATIENCE,
    **settings: Any,
) -> AsyncIterator[aio.Target]:
    """The same as :func:`warabi.aio.connect`, with its arguments and errors, for a target that
    survives the end of its provider, if that restarts at the same address.

    Args:
        address: of the engine.
        provider_id: of the provider.
        timeout: seconds without a sign of life after which a connection counts as lost, and after
            which a call that does not complete while others do raises ``TimedOut``: ten times that
            if it may wait for stable storage.
        patience: seconds of an outage for which calls wait; then they raise ``ConnectionLost``,
            ``ConnectionFailed`` or ``TimedOut``.
        settings: further arguments of ``warabi.aio.connect``, for every connection.
    """
    aio.check_loop("warabi.reconnect.connect()")
    link = ReconnectingLink(
        lambda ended: aio.connect(
            address, provider_id, timeout=timeout, ended=ended, deadlines=True, **settings
        ),
        str(address),
        patience,
    )
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(link.run)
            yield aio.Target(link, f"{str(address)!r}, {provider_id}")
        except Exception as error:  # a nursery would wrap it in a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


__all__ = ["PATIENCE", "ReconnectingLink", "connect"]
