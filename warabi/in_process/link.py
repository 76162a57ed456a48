"""Links of blocking handles: their interface, and the direct one to a target in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from warabi import errors
from warabi._core import forks, interrupts
from warabi._core.attributes import Attributes
from warabi._core.extents import Extent, pack
from warabi._core.tuning import INTERRUPT_CHECK
from warabi.errors import WouldBlock
from warabi.protocol.operations import OPERATIONS, READING, UNDONE, undo
from warabi.protocol.pending import EAGER_THRESHOLD, PendingRequest
from warabi.region import RegionID
from warabi.shm.client import DirectAccess

if TYPE_CHECKING:
    from warabi.provider.core import ProviderCore  # imports Trio, which a client does not need


class Link(Protocol):
    """The interface of links to a target.  The ``start`` methods return pending requests, which may
    be waited for in any order.

    Attributes:
        writing, reading: direct access, to be tried before :meth:`write` and :meth:`read_into`.
        eager_write, eager_read: most bytes of data that are sent inside a header.
    """

    writing: DirectAccess
    reading: DirectAccess
    eager_write: int
    eager_read: int

    def call(self, name: str, *arguments: Any) -> Any:
        """Execute an operation of the table and return its result."""

    def size(self, region: RegionID) -> int:
        """Return the size of a region in bytes."""

    def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None: ...
    def read_into(self, region: RegionID, offset: int, place: memoryview) -> None: ...
    def persist(self, region: RegionID, offset: int, size: int) -> None: ...
    def create_and_write(self, data: memoryview, persist: bool) -> RegionID: ...
    def store(self, arguments: Sequence[Any], data: memoryview) -> Attributes | None:
        """Execute the operation ``store``; None, without effect: use several operations."""

    def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None: ...
    def append(self, region: RegionID, data: memoryview, persist: bool) -> int: ...
    def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None: ...

    def start(self, name: str, *arguments: Any) -> list[PendingRequest]: ...
    def start_write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool
    ) -> list[PendingRequest]: ...
    def start_read(
        self, region: RegionID, offset: int, place: memoryview
    ) -> list[PendingRequest]: ...
    def start_create_and_write(self, data: memoryview, persist: bool) -> list[PendingRequest]: ...
    def start_store(self, arguments: Sequence[Any], data: memoryview) -> list[PendingRequest]:
        """The same as :meth:`store`, without waiting; an empty list: use several operations."""

    def poll(self, request: PendingRequest) -> None:
        """Update the state of a request without waiting."""

    def finish(self, requests: Sequence[PendingRequest]) -> Any:
        """As :func:`wait_all`; if that is interrupted, nothing accesses the buffers of reads any
        more."""

    def undo(self, requests: Sequence[PendingRequest]) -> None:
        """Abandon requests whose caller was interrupted, and erase regions that they create."""


def wait_all(wait: Callable[[PendingRequest], Any], requests: Sequence[PendingRequest]) -> Any:
    """The last result that *wait* returns, or the first error that it raises, after all
    requests have ended, so that none accesses a buffer later."""
    failure: errors.Exception | None = None
    result = None
    for request in requests:
        if request.late is None:  # else wait a moment for the reply, to erase what it created
            interrupts.check()
        try:
            result = wait(request)
        except errors.Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return result


def give_back(call: Callable[..., Any], name: str, arguments: Sequence[Any], result: Any) -> None:
    """Undo, by *call*, what an operation holds for a caller that gave up; see ``undo``."""
    undoing = undo(name, arguments, result)
    if undoing is not None:
        call(undoing[0], *undoing[1])


class DirectLink:
    """A link to a target in this process.

    All except plain access to regions runs under ``interrupts.uninterrupted``.
    """

    eager_write = EAGER_THRESHOLD
    eager_read = EAGER_THRESHOLD

    def __init__(self, core: ProviderCore) -> None:
        # Not needed by clients of other processes.
        from warabi.target.handlers import CALLS
        from warabi.target.named_files import store

        self._calls = CALLS
        self._store_file = store
        self._core = core
        self.writing: DirectAccess = core.direct
        self.reading: DirectAccess = self.writing

    def call(self, name: str, *arguments: Any) -> Any:
        if name in UNDONE:
            return interrupts.creating(
                lambda: self._call(name, *arguments),
                partial(give_back, self._call, name, arguments),
            )
        return interrupts.uninterrupted(self._call, name, *arguments)

    def _erase(self, region: RegionID) -> None:
        self._call("erase", region)

    def _call(self, name: str, *arguments: Any) -> Any:
        call = self._calls.get(name)
        if call is None:
            return self._lock(name, arguments)
        if name in READING:
            return call(self._core.target, *arguments)
        with self._core.changes:
            return call(self._core.target, *arguments)

    def _lock(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Execute an operation on locks; waits for other owners."""
        locks = self._core.target.file_locks
        if name != "lock" or not arguments[-1]:
            return locks.execute(locks.local, name, arguments)
        woken = interrupts.Wakeup()
        waiting = locks.request(locks.local, *arguments, wake=woken.set)
        while waiting is not None and not waiting.done:
            woken.wait(INTERRUPT_CHECK)
            interrupts.check()
            locks.settle()
        if waiting is not None and waiting.error is not None:
            raise waiting.error
        return None

    def size(self, region: RegionID) -> int:
        size = self.reading.size(region)
        return size if size >= 0 else interrupts.uninterrupted(self._core.target.size, region)

    def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        if self.writing.write(region, offset, data):
            if persist:
                self.persist(region, offset, len(data))
            return
        interrupts.uninterrupted(self._write, region, offset, data, persist, extend)

    def _write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        with self._core.changes:
            self._core.target.write(region, offset, data, persist, extend=extend)

    def read_into(self, region: RegionID, offset: int, place: memoryview) -> None:
        if not self.reading.read_into(region, offset, place):
            interrupts.uninterrupted(self._core.target.read_into, region, offset, place)

    def persist(self, region: RegionID, offset: int, size: int) -> None:
        if not self.writing.persist(region, offset, size):
            interrupts.uninterrupted(self._core.target.persist, region, offset, size)

    def create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        return interrupts.creating(lambda: self._create_and_write(data, persist), self._erase)

    def _create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        with self._core.changes:
            return self._core.target.create_and_write(data, persist)

    def store(self, arguments: Sequence[Any], data: memoryview) -> Attributes | None:
        return interrupts.uninterrupted(self._store, arguments, data)

    def _store(self, arguments: Sequence[Any], data: memoryview) -> Attributes:
        with self._core.changes:
            return self._store_file(self._core.target, *(*arguments, data))

    def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None:
        interrupts.uninterrupted(self._call, "write_vector", region, pack(extents), persist, data)

    def append(self, region: RegionID, data: memoryview, persist: bool) -> int:
        return interrupts.uninterrupted(self._append, region, data, persist)

    def _append(self, region: RegionID, data: memoryview, persist: bool) -> int:
        with self._core.changes:
            return self._core.target.append(region, data, persist)

    def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None:
        interrupts.uninterrupted(self._core.target.read_vector, region, extents, place)

    def start(self, name: str, *arguments: Any) -> list[PendingRequest]:
        return self._interruptible(self._start_call, name, *arguments)

    def _interruptible(
        self, start: Callable[..., list[PendingRequest]], *arguments: Any
    ) -> list[PendingRequest]:
        return interrupts.creating(lambda: start(*arguments), self.undo)

    def undo(self, requests: Sequence[PendingRequest]) -> None:
        for request in requests:
            if not request.done:
                request.event.wait()  # a thread executes it, which cannot be stopped, but ends soon
            if isinstance(request.result, RegionID):
                self._erase(request.result)

    def _start_call(self, name: str, *arguments: Any) -> list[PendingRequest]:
        operation = OPERATIONS[name]
        waits = operation.long or (operation.waits and self._core.target.blocking)
        waits = waits or (self._core.changes.frozen and name not in READING)
        return self._start(name, waits, self._call, name, *arguments)

    def start_write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool
    ) -> list[PendingRequest]:
        target = self._core.target
        waits = target.write_waits or (persist and target.blocking) or self._core.changes.frozen
        start = ("write", waits, self.write, region, offset, data, persist, False)
        # Without a thread nothing is pending when an exception passes.
        return self._interruptible(self._start, *start) if waits else self._start(*start)

    def start_read(self, region: RegionID, offset: int, place: memoryview) -> list[PendingRequest]:
        try:
            if self.reading.read_into(region, offset, place, wait=False):
                return [finished("read")]
        except errors.Exception as error:
            return [finished("read", error=error)]
        except WouldBlock:
            pass
        return self._interruptible(self._start_read, region, offset, place)

    def _start_read(self, region: RegionID, offset: int, place: memoryview) -> list[PendingRequest]:
        target = self._core.target
        try:
            target.read_into(region, offset, place, wait=not target.blocking)
        except WouldBlock:
            return self._start("read", True, self.read_into, region, offset, place)
        except errors.Exception as error:
            return [finished("read", error=error)]
        return [finished("read")]

    def start_create_and_write(self, data: memoryview, persist: bool) -> list[PendingRequest]:
        return self._interruptible(self._start_create_and_write, data, persist)

    def _start_create_and_write(self, data: memoryview, persist: bool) -> list[PendingRequest]:
        target = self._core.target
        waits = target.write_waits or (persist and target.blocking) or self._core.changes.frozen
        return self._start("create_and_write", waits, self._create_and_write, data, persist)

    def start_store(self, arguments: Sequence[Any], data: memoryview) -> list[PendingRequest]:
        target, persist = self._core.target, arguments[OPERATIONS["store"].position["persist"]]
        waits = target.write_waits or (persist and target.blocking) or self._core.changes.frozen
        return self._interruptible(self._start, "store", waits, self._store, arguments, data)

    def _start(
        self, what: str, waits: bool, call: Callable[..., Any], *arguments: Any
    ) -> list[PendingRequest]:
        """Execute *call*: directly, or in a thread if it *waits* for stable storage."""
        if waits:
            request = PendingRequest(what, buffers=arguments)
            request.event = interrupts.Wakeup()
            forks.register(request)
            self._core.run_concurrently(lambda: self._finish(request, call, arguments))
            return [request]
        try:
            return [finished(what, call(*arguments))]
        except errors.Exception as error:
            return [finished(what, error=error)]

    @staticmethod
    def _finish(
        request: PendingRequest, call: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        try:
            request.finish(call(*arguments))
        except errors.Exception as error:
            request.finish(error=error)
        except BaseException as error:
            request.finish(error=errors.ProviderFailed(f"{request.what}: {error!r}"))
            raise

    def _wait(self, request: PendingRequest) -> Any:
        if not request.done:
            request.event.wait()
            request.event.set()  # for another thread that waits for the same request
        return request.outcome()

    def poll(self, request: PendingRequest) -> None:
        """No effect: the threads that execute requests finish them."""

    def finish(self, requests: Sequence[PendingRequest]) -> Any:
        try:
            return wait_all(self._wait, requests)
        except errors.Exception:
            raise
        except BaseException:
            interrupts.uninterrupted(self._let_reads_end, requests)
            raise

    def _let_reads_end(self, requests: Sequence[PendingRequest]) -> None:
        for request in requests:
            if (
                request.what == "read"
            ):  # a thread executes it, which cannot be stopped, but ends soon
                with contextlib.suppress(errors.Exception):
                    self._wait(request)


def finished(
    what: str, result: Any = None, error: errors.Exception | None = None
) -> PendingRequest:
    request = PendingRequest(what)
    request.finish(result, error)
    return request
