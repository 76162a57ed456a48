"""The blocking client: ``Client``, ``TargetHandle`` and asynchronous requests."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from warabi import arrays, processes
from warabi._core import forks, interrupts
from warabi._core.attributes import FETCHED, Attributes, DirectoryEntry
from warabi._core.buffers import (
    Data,
    checked_path,
    checked_size,
    filled_bytes,
    readable,
    writable,
    xattr_call,
)
from warabi._core.extents import EXTENTS, beyond_end, check_total, checked_extents, pack
from warabi._core.lock_ranges import (
    EXCLUSIVE,
    SHARED,
    UNLOCK,
    FileLock,
    lock_arguments,
    lock_numbers,
)
from warabi._core.results import RegionStat
from warabi.engine import Engine, state_of
from warabi.errors import ConfigError, Exception, PathError, TargetNotFound
from warabi.in_process.link import DirectLink, Link
from warabi.protocol import address as _address
from warabi.protocol import paths
from warabi.protocol.operations import PAGE
from warabi.protocol.pending import PendingRequest
from warabi.region import RegionID
from warabi.remote.link import WireLink
from warabi.remote.readonly import ReadOnlyLink, restricted

if TYPE_CHECKING:
    from numpy.typing import NDArray  # an extra, and slow to import

__all__ = [
    "AsyncCreateRequest",
    "AsyncRequest",
    "Attributes",
    "Client",
    "DirectoryEntry",
    "Exception",
    "RegionID",
    "RegionStat",
    "TargetHandle",
]


def _id(region: Any) -> RegionID:
    """Return *region*; raises ``InvalidRegion`` if it is not a region ID."""
    return region if type(region) is RegionID else RegionID(region)


class AsyncRequest:
    """A pending operation.  Dropping it neither cancels the operation nor affects others."""

    def __init__(self, link: Link, requests: Sequence[PendingRequest]) -> None:
        self._link = link
        self._requests = requests

    def wait(self) -> None:
        """Wait for the operation; returns None, or raises its error.  May be called repeatedly.

        A ``KeyboardInterrupt`` abandons a read, and the buffer belongs to the caller again; other
        operations continue, and may be waited for again.
        """
        self._link.finish(self._requests)

    def completed(self) -> bool:
        """Whether :meth:`wait` would return at once; becomes true without a call of it."""
        for request in self._requests:
            if not request.done:
                self._link.poll(request)
        return all(request.done for request in self._requests)

    def __reduce__(self) -> str:
        raise TypeError(
            f"an {type(self).__name__} cannot be pickled: it waits for a reply to this process;"
            " call wait() and pass on what the operation returned"
        )

    def __await__(self) -> Generator[Any, Any, None]:
        """Wait as :meth:`wait` does, in a thread, in a Trio task.

        If the task is cancelled the operation continues, and may be waited for again.  Programs
        that wait for many operations use ``warabi.aio``, which needs no threads.

        Raises:
            TypeError: Trio is not running.
        """
        trio = sys.modules.get("trio")
        if trio is None or not trio.lowlevel.in_trio_run():
            raise TypeError(
                f"an {type(self).__name__} cannot be awaited here: call wait(), which blocks, or"
                " await it in a Trio task"
            )
        if not self.completed():
            run = trio.to_thread.run_sync(self.wait, abandon_on_cancel=True)
            return (yield from run.__await__())  # type: ignore[no-any-return]
        yield from trio.lowlevel.checkpoint().__await__()
        return self.wait()


class AsyncCreateRequest(AsyncRequest):
    """A pending operation that creates a region."""

    if TYPE_CHECKING:  # the base's, with the result

        def __await__(self) -> Generator[Any, Any, RegionID]: ...  # type: ignore[override]

    def wait(self) -> RegionID:  # type: ignore[override]
        """Wait for the operation; returns the new region's ID."""
        region: RegionID = self._link.finish(self._requests)
        return region


_SEVERAL = 32
"""Most requests of one call that are under way at a time."""
_Requests = list[PendingRequest]
_Item = TypeVar("_Item")
_Request = TypeVar("_Request", bound=AsyncRequest)
_Value = TypeVar("_Value")


class _Nowhere:
    """Replaces the link of a handle without a target: every operation fails."""

    def _fail(self, *_: object) -> Any:
        raise TargetNotFound("the handle has no target; create it with make_target_handle()")

    __getattr__ = __setattr__ = _fail


_NOWHERE: Any = _Nowhere()


class TargetHandle:
    """A handle of a target.  ``TargetHandle()`` has no target: it is false and its calls fail.

    Thread-safe.  Sizes and offsets are in bytes.  ``data`` is any object with a contiguous
    buffer, ``buffer`` a writable one.  In addition to the errors of each method, every call raises
    ``TargetNotFound`` or ``ProviderNotFound`` if there is no target, ``ConnectionFailed`` or
    ``ConnectionLost`` if its provider cannot be reached (any more), ``TimedOut`` if it does not
    respond, ``StorageError`` for I/O errors, and ``OutOfBounds`` for an extent outside the region
    or a number that is not a size.
    """

    def __init__(
        self, link: Link | None = None, engine: Engine | None = None, place: Place | None = None
    ) -> None:
        self._link: Link = _NOWHERE if link is None else link
        self._engine = engine  # kept alive by its handles
        self._place = place
        if engine is not None and place is not None and isinstance(_inner(self._link), DirectLink):
            forks.register(self, last=True)

    def __bool__(self) -> bool:
        return self._link is not _NOWHERE

    def __repr__(self) -> str:
        if self._place is None:
            return "TargetHandle()" if not self else "TargetHandle(<a target of this process>)"
        text, provider_id, read_only = self._place
        return f"TargetHandle({text!r}, {provider_id}{', read_only=True' if read_only else ''})"

    def _forked(self) -> None:
        """In a forked child: the target belongs to the parent, and is accessed like from any
        process."""
        assert self._engine is not None
        assert self._place is not None
        old, self._link = self._link, _remote_link(self._engine, self._place)
        self._link.eager_write, self._link.eager_read = old.eager_write, old.eager_read

    @property
    def link(self) -> Link:
        """The link to the target, without validation of arguments."""
        return self._link

    # Copies and pickles: see processes.py.

    def __copy__(self) -> TargetHandle:
        return TargetHandle(self._link, self._engine, self._place)

    def __deepcopy__(self, memo: object) -> TargetHandle:
        return self.__copy__()

    def __reduce__(self) -> tuple[Callable[..., TargetHandle], tuple[Any, ...]]:
        if not self:
            return TargetHandle, ()
        if self._engine is None or self._place is None:
            raise TypeError("this TargetHandle cannot be pickled: it has no engine")
        settings = processes.settings_of(self._engine, "TargetHandle")
        link = self._link
        return _unpickled_handle, (settings, *self._place, link.eager_write, link.eager_read)

    # Regions

    def create(self, size: int) -> RegionID:
        """Create a region of *size* zero bytes; returns its ID.

        Raises:
            StorageFull: there is not enough space, or the storage is smaller than *size*.
        """
        region: RegionID = self._link.call("create", checked_size(size, "create: size"))
        return region

    def create_async(self, size: int) -> AsyncCreateRequest:
        """The same as :meth:`create`, without waiting."""
        size = checked_size(size, "create: size")
        return self._started(AsyncCreateRequest, lambda: self._link.start("create", size))

    def _started(self, kind: type[_Request], start: Callable[[], list[PendingRequest]]) -> _Request:
        requests: list[PendingRequest] = []
        request = kind(self._link, requests)
        requests += start()  # no handler runs from its return on: see interrupts.py
        return request

    def write(self, region: RegionID, offset: int, data: Data, persist: bool = False) -> None:
        """Write *data* at *offset*; with *persist*, durably.

        Raises:
            InvalidRegion: unknown or erased.
            InvalidBuffer: *data* has no contiguous buffer.
            StorageFull: there is not enough space.
        """
        guest = self._link.writing.guest
        if guest is not None and guest.try_write(region, offset, data):
            if persist:
                self._link.persist(_id(region), offset, readable(data, "write: data").nbytes)
            return
        view = readable(data, "write: data")
        offset = checked_size(offset, "write: offset")
        self._link.write(_id(region), offset, view, bool(persist), False)

    def append(self, region: RegionID, data: Data, persist: bool = False) -> int:
        """Write *data* at the end of the region, which grows; returns the offset of *data* in
        bytes.

        Atomic: appends of several clients neither overlap nor mix.  If the connection is lost
        before the reply (``ConnectionLost``, ``TimedOut``), *data* was appended or not.

        Raises:
            InvalidRegion: unknown or erased.
            InvalidBuffer: *data* has no contiguous buffer, or exceeds the provider's limit on one
                request (4 MiB).
            StorageFull: there is not enough space; nothing was appended.
        """
        return self._link.append(_id(region), readable(data, "append: data"), bool(persist))

    def write_async(
        self, region: RegionID, offset: int, data: Data, persist: bool = False
    ) -> AsyncRequest:
        """The same as :meth:`write`, without waiting; *data* must not change until it is done."""
        view = readable(data, "write: data")
        offset = checked_size(offset, "write: offset")
        region = _id(region)
        return self._started(
            AsyncRequest, lambda: self._link.start_write(region, offset, view, bool(persist))
        )

    def read(self, region: RegionID, offset: int, size: int) -> bytes:
        """Return exactly *size* bytes from *offset*.

        Raises:
            InvalidRegion: unknown or erased.
        """
        offset = checked_size(offset, "read: offset")
        size = checked_size(size, "read: size")
        region = _id(region)
        if size > 1 << 20:  # check before allocating an absurd size
            have = self.size(region)
            if offset + size > have:
                raise beyond_end("read", region, offset, size, have)
        return filled_bytes(size, lambda view: self._link.read_into(region, offset, view))

    def read_into(self, region: RegionID, offset: int, buffer: Data) -> None:
        """Fill *buffer* from *offset*.

        Raises:
            InvalidRegion: unknown or erased.
            InvalidBuffer: *buffer* is read-only or not contiguous.
        """
        guest = self._link.reading.guest
        if guest is not None and guest.try_read(region, offset, buffer):
            return
        view = writable(buffer, "read_into: buffer")
        offset = checked_size(offset, "read_into: offset")
        self._link.read_into(_id(region), offset, view)

    def read_async(self, region: RegionID, offset: int, buffer: Data) -> AsyncRequest:
        """The same as :meth:`read_into`, without waiting; *buffer* is filled when the request is
        done."""
        view = writable(buffer, "read_async: buffer")
        offset = checked_size(offset, "read_async: offset")
        region = _id(region)
        return self._started(AsyncRequest, lambda: self._link.start_read(region, offset, view))

    def persist(self, region: RegionID, offset: int, size: int) -> None:
        """Return when the extent is on stable storage, and will be found there after a crash.

        Raises:
            InvalidRegion: unknown or erased.
        """
        self._link.persist(*self._extent(region, offset, size))

    def persist_async(self, region: RegionID, offset: int, size: int) -> AsyncRequest:
        """The same as :meth:`persist`, without waiting."""
        extent = self._extent(region, offset, size)
        return self._started(AsyncRequest, lambda: self._link.start("persist", *extent))

    @staticmethod
    def _extent(region: RegionID, offset: int, size: int) -> tuple[RegionID, int, int]:
        return (
            _id(region),
            checked_size(offset, "persist: offset"),
            checked_size(size, "persist: size"),
        )

    def write_vector(
        self,
        region: RegionID,
        extents: Iterable[tuple[int, int]],
        data: Data,
        persist: bool = False,
    ) -> None:
        """Write *data* to several ``(offset, size)`` extents, one after the other, in one request.

        The contents of overlapping parts of extents are undefined.

        Raises:
            InvalidRegion: unknown or erased.
            InvalidBuffer: *data* has no contiguous buffer, or not the total size of the extents.
            StorageFull: there is not enough space.
        """
        view = readable(data, "write_vector: data")
        checked = checked_extents(extents, "write_vector")
        check_total(checked, len(view), "write_vector")
        self._link.write_vector(_id(region), checked, view, bool(persist))

    def read_vector(
        self, region: RegionID, extents: Iterable[tuple[int, int]], buffer: Data
    ) -> None:
        """Fill *buffer* from several ``(offset, size)`` extents, one after the other, in one
        request.

        Raises:
            InvalidRegion: unknown or erased.
            InvalidBuffer: *buffer* is read-only, not contiguous, or not as large as the extents.
        """
        view = writable(buffer, "read_vector: buffer")
        checked = checked_extents(extents, "read_vector")
        check_total(checked, len(view), "read_vector")
        self._link.read_vector(_id(region), checked, view)

    def persist_vector(self, region: RegionID, extents: Iterable[tuple[int, int]]) -> None:
        """The same as :meth:`persist`, for several ``(offset, size)`` extents, in one request.

        Raises:
            InvalidRegion: unknown or erased.
        """
        checked = checked_extents(extents, "persist_vector")
        for start in range(0, max(1, len(checked)), EXTENTS):
            packed = pack(checked[start : start + EXTENTS])
            self._link.call("persist_vector", _id(region), packed)

    def lock(
        self, region: RegionID, start: int = 0, size: int | None = None, *, shared: bool = False,
        wait: bool = True, owner: int = 0, flock: bool = False,
    ) -> None:  # fmt: skip
        """Lock bytes of the region, or with *shared* lock them for reading: an advisory lock, as of
        fcntl(2), which programs on mounts see, too.

        A lock belongs to *owner*, a number of at most 63 bits that tells apart the users of one
        connection, such as threads; handles of one client use the same connection.  What the owner
        had locked there before is converted.  Locks end with :meth:`unlock`, with the connection,
        and with the provider; a fork has none.

        Args:
            region: the region.
            start: offset of the first byte.
            size: number of bytes; None: to the end, however long the region grows.
            shared: whether other owners may have shared locks of these bytes.
            wait: whether to wait for other owners.  Without a time limit; an interrupted call
                leaves the bytes unlocked.
            owner: whose lock.
            flock: a lock of the whole region as of flock(2), which conflicts only with others of
                these; *start* and *size* have no effect.

        Raises:
            InvalidRegion: unknown or erased.
            PathError: with the ``errno`` ``EAGAIN``, another owner has it and *wait* is false;
                ``EDEADLK``, that owner waits for a lock of this one; ``ENOLCK``, too many locks.
        """
        kind = SHARED if shared else EXCLUSIVE
        request = lock_arguments("lock", region, flock, owner, kind, start, size)
        number = next(lock_numbers) if wait else 0
        try:
            self._link.call("lock", *request, os.getpid(), number)
        except Exception:
            raise
        except BaseException:  # interrupted: it may be waiting, or granted
            with contextlib.suppress(Exception):
                self._link.call("cancel_lock", number)
                self.unlock(region, start, size, owner=owner, flock=flock)
            raise

    def unlock(
        self, region: RegionID, start: int = 0, size: int | None = None, *, owner: int = 0,
        flock: bool = False,
    ) -> None:  # fmt: skip
        """Unlock what *owner* has locked of these bytes, if anything; see :meth:`lock`.

        Raises:
            PathError: ``ENOLCK``, too many locks: unlocking a part of a range makes two.
        """
        request = lock_arguments("unlock", region, flock, owner, UNLOCK, start, size)
        self._link.call("lock", *request, 0, 0)

    def test_lock(
        self, region: RegionID, start: int = 0, size: int | None = None, *, shared: bool = False,
        owner: int = 0, flock: bool = False,
    ) -> FileLock | None:  # fmt: skip
        """Return a lock of another owner that would keep :meth:`lock` waiting; None if there is
        none."""
        kind = SHARED if shared else EXCLUSIVE
        request = lock_arguments("test_lock", region, flock, owner, kind, start, size)
        found: FileLock | None = self._link.call("test_lock", *request)
        return found

    def erase(self, region: RegionID) -> None:
        """Remove the region, and its names.

        Raises:
            InvalidRegion: unknown or erased already.
        """
        self._link.call("erase", _id(region))

    def erase_async(self, region: RegionID) -> AsyncRequest:
        """As :meth:`erase`, not waiting."""
        return self._started(AsyncRequest, lambda: self._link.start("erase", _id(region)))

    def create_and_write(self, data: Data, persist: bool = False) -> RegionID:
        """Create a region with the contents *data*; with *persist*, durable.

        If the process is killed, a region with part of large *data* may be left.

        Raises:
            InvalidBuffer: *data* has no contiguous buffer.
            StorageFull: there is not enough space; no region remains.
        """
        return self._link.create_and_write(readable(data, "create_and_write: data"), bool(persist))

    def create_and_write_async(self, data: Data, persist: bool = False) -> AsyncCreateRequest:
        """The same as :meth:`create_and_write`, without waiting; *data* must not change until it is
        done."""
        view = readable(data, "create_and_write: data")
        return self._started(
            AsyncCreateRequest, lambda: self._link.start_create_and_write(view, bool(persist))
        )

    def size(self, region: RegionID) -> int:
        """Return the region's size in bytes.

        Raises:
            InvalidRegion: unknown or erased.
        """
        return self._link.size(_id(region))

    def stat(self, region: RegionID) -> RegionStat:
        """Return the region's size, times (ns since the epoch) and paths, up to 1000 of them and
        about 64 KiB.

        Raises:
            InvalidRegion: unknown or erased.
        """
        found: RegionStat = self._link.call("stat", _id(region))
        return found

    def list(self, page_size: int = PAGE) -> Iterator[RegionID]:
        """Yield every region in an unspecified order, *page_size* of them per request.

        Regions created or erased during the iteration may or may not appear.
        """
        last = RegionID()
        page_size = max(1, checked_size(page_size, "list: page_size"))
        while page := self._link.call("list", last, page_size):
            yield from page
            last = page[-1]

    def list_stats(self, page_size: int = PAGE) -> Iterator[tuple[RegionID, RegionStat]]:
        """The same as :meth:`list`, with the result of :meth:`stat` for each region; the provider
        chooses the number of regions per request, up to *page_size*."""
        last = RegionID()
        page_size = max(1, checked_size(page_size, "list_stats: page_size"))
        while page := self._link.call("list_stats", last, page_size):
            yield from page
            last = page[-1][0]

    def resize(self, region: RegionID, size: int) -> None:
        """Grow or shrink the region to *size*; its ID stays, new bytes read as zero.

        Raises:
            InvalidRegion: unknown or erased.
            StorageFull: it would exceed the quota.
        """
        self._link.call("resize", _id(region), checked_size(size, "resize: size"))

    # Space and holes

    def allocate(self, region: RegionID, offset: int, size: int, keep_size: bool = False) -> None:
        """Allocate the space of *size* bytes at *offset*, so that writes there cannot fail for lack
        of it; no byte changes.

        The region grows if the extent ends beyond it.  With *keep_size* its size stays the same,
        and the space is kept for later growth.

        Raises:
            InvalidRegion: unknown or erased.
            StorageFull: there is not enough space, or the quota is exceeded.
            PathError: with ``errno`` EOPNOTSUPP, the file system of the target cannot allocate in
                advance.
        """
        self._change("allocate", region, offset, size, bool(keep_size))

    def zero_range(self, region: RegionID, offset: int, size: int, keep_size: bool = False) -> None:
        """Zero *size* bytes at *offset*, and allocate their space as :meth:`allocate` does."""
        self._change("zero_range", region, offset, size, bool(keep_size))

    def punch_hole(self, region: RegionID, offset: int, size: int) -> None:
        """Zero *size* bytes at *offset*, and free their space where possible.

        The part of the extent beyond the region's end is ignored.

        Raises:
            InvalidRegion: unknown or erased.
        """
        self._change("punch_hole", region, offset, size)

    def _change(self, name: str, region: RegionID, offset: int, size: int, *more: bool) -> None:
        offset, size = checked_size(offset, f"{name}: offset"), checked_size(size, f"{name}: size")
        self._link.call(name, _id(region), offset, size, *more)

    def seek_data(self, region: RegionID, offset: int) -> int | None:
        """The first offset from *offset* on at which there is data; None if there is none.

        A hole has no data: it was never written, or was punched, and reads as zeros.  Storages may
        report data where there is a hole.

        Raises:
            InvalidRegion: unknown or erased.
        """
        found: int | None = self._link.call(
            "seek", _id(region), checked_size(offset, "seek_data: offset"), False
        )
        return found

    def seek_hole(self, region: RegionID, offset: int) -> int | None:
        """The first offset from *offset* on at which there is a hole; the end of the region counts
        as one.  None if *offset* is not before the end."""
        found: int | None = self._link.call(
            "seek", _id(region), checked_size(offset, "seek_hole: offset"), True
        )
        return found

    def data_extents(self, region: RegionID) -> Iterator[tuple[int, int]]:
        """Offset and size, in bytes, of each extent of data, in order.

        Raises:
            InvalidRegion: unknown or erased.
        """
        end = 0
        while (start := self.seek_data(region, end)) is not None:
            end = self.seek_hole(region, start) or 0
            if end <= start:  # the region was truncated
                return
            yield start, end - start

    # Copies

    def copy(self, region: RegionID, persist: bool = False) -> RegionID:
        """A new region that has the bytes that *region* has at one instant; with *persist*,
        durably.

        The target copies, so that no bytes pass through this process.  Holes are preserved, and
        blocks are shared if the target's file system supports it (XFS, btrfs).

        Raises:
            InvalidRegion: unknown or erased.
            StorageFull: there is not enough space, or the quota is exceeded; no region remains.
        """
        copy: RegionID = self._link.call("clone", _id(region), bool(persist))
        return copy

    def copy_range(
        self, source: RegionID, source_offset: int, region: RegionID, offset: int, size: int
    ) -> int:
        """Copy *size* bytes at *source_offset* of *source* to *offset* of *region*, which grows if
        they end beyond it; returns how many were copied, fewer only if *source* ends before.

        As :meth:`copy`, but not at one instant: other calls may come between every 256 MiB.

        Raises:
            InvalidRegion: unknown or erased.
            OutOfBounds: extents of one region overlap.
            StorageFull: there is not enough space, or the quota is exceeded.
        """
        steps = paths.copy_range(_id(source), source_offset, _id(region), offset, size)
        return self._run(steps)

    # NumPy

    def put_array(self, array: NDArray[Any], persist: bool = False) -> RegionID:
        """Create a region with *array* in NumPy's ``.npy`` format.

        Only arrays that are not contiguous are copied, a few megabytes at a time.

        Raises:
            InvalidBuffer: an array of objects, a masked one, or not an array.
            StorageFull: there is not enough space; no region remains.
        """
        size, pieces = arrays.encode(array)
        if size <= arrays.PREFIX:
            return self.create_and_write(b"".join(piece for _, piece in pieces), persist)
        made: list[RegionID] = []
        try:
            made.append(self.create(size))  # no handler runs in between: see interrupts.py
            for offset, piece in pieces:
                self.write(made[0], offset, piece)
            if persist:
                self.persist(made[0], 0, size)
            return made[0]
        except BaseException:
            while made:
                try:  # again if Ctrl-C comes before it is deferred
                    interrupts.uninterrupted(interrupts.remove_all, made, self.erase)
                except BaseException:
                    continue
            raise

    def get_array(self, region: RegionID) -> NDArray[Any]:
        """Return the array in *region*, with its type, shape and order.

        Raises:
            InvalidRegion: unknown or erased.
            NotAnArray: it contains something else.
        """
        size = self.size(region)
        prefix = self.read(region, 0, min(size, arrays.PREFIX))
        start = arrays.data_offset(region, size, prefix)
        if start > len(prefix):
            prefix = self.read(region, 0, start)
        array, place = arrays.decode(region, size, prefix[:start])
        if start + len(place) <= len(prefix):
            place[:] = prefix[start : start + len(place)]
        else:
            self.read_into(region, start, place)
        return array

    # Names

    def open_name(self, path: str) -> RegionID:
        """Return the region at *path* in the tree that a mount shows.

        Raises:
            PathError: with ``errno`` ENOENT, ENOTDIR, or EISDIR or EINVAL if it is not a region.
        """
        region: RegionID = self._link.call("open_name", checked_path(path, "open_name"))
        return region

    def link_name(self, region: RegionID, path: str, replace: bool = False) -> None:
        """Give the region the name *path*, in an existing directory.

        With *replace* the region, which must have no name yet, takes the name over from what has
        it, in one step: others find the old region or the new one, which may be erased then.

        Raises:
            InvalidRegion: unknown or erased.
            PathError: with ``errno`` EEXIST if the name exists, ENOENT, ENOTDIR; with *replace*
                EISDIR if a directory has the name, EPERM if the region has a name.
        """
        if replace:
            self._run(paths.replace(_id(region), path))
        else:
            self._link.call("link_name", _id(region), checked_path(path, "link_name"))

    def create_name(self, path: str, mode: int = 0o644) -> RegionID:
        """Create an empty region with the name *path*; returns its ID.

        Raises:
            PathError: with ``errno`` EEXIST if the name exists, ENOENT, ENOTDIR.
            StorageFull: there is not enough space.
        """
        return self._run(paths.create(path, mode))

    def store_name(
        self, path: str, data: Data, mode: int = 0o644, exclusive: bool = False,
        persist: bool = False,
    ) -> Attributes:  # fmt: skip
        """Give a new region with the contents *data* the name *path*, in an existing directory.

        In one step: others find what had the name before, which is replaced and loses it, or the
        new file with all its bytes.  Nothing is left of a failed call, nor if this process or the
        provider is killed.

        Args:
            path: of the file.
            data: its bytes.
            mode: its permissions; it belongs to this process's effective user and group.
            exclusive: whether it is an error if the name exists.
            persist: whether to return when the file is durable, with its name.

        Raises:
            PathError: with ``errno`` ENOENT, ENOTDIR; EISDIR for a directory; EEXIST.
            InvalidBuffer: *data* has no contiguous buffer.
            StorageFull: there is not enough space.
        """
        view = readable(data, "store_name: data")
        arguments = self._store_arguments(path, mode, exclusive, persist)
        stored = self._link.store(arguments, view)
        if stored is not None:
            return stored
        storing = paths.Storing(arguments, len(view))
        try:
            region = self._run(storing.begin())
            self._link.write(region, 0, view, bool(persist), False)
            return self._run(storing.end(region))
        except BaseException:
            with contextlib.suppress(Exception):
                self._run(storing.give_up())
            raise

    @staticmethod
    def _store_arguments(
        path: str, mode: int, exclusive: bool, persist: bool
    ) -> tuple[str, int, int, int, bool, bool]:
        path, owner = checked_path(path, "store_name"), (os.geteuid(), os.getegid())
        return path, mode & 0o7777, *owner, bool(exclusive), bool(persist)

    def fetch_name(self, path: str, limit: int = FETCHED) -> tuple[Attributes, bytes | None]:
        """Return the attributes of what is at *path*, with symbolic links followed, and the bytes
        of a region of at most *limit* bytes (64 KiB at most), in one request; None for others,
        whose bytes :meth:`read` returns.

        Raises:
            PathError: with ``errno`` ENOENT, ENOTDIR, or ELOOP after 40 symbolic links.
        """
        return self._run(paths.fetch(path, checked_size(limit, "fetch_name: limit")))

    def store_names(
        self, files: Iterable[tuple[str, Data]], mode: int = 0o644, exclusive: bool = False,
        persist: bool = False,
    ) -> Generator[Attributes | Exception, None, None]:  # fmt: skip
        """Store files as :meth:`store_name` does, with several requests under way at a time.

        Yields for each of the pairs of a path and data, in order, what that returns, or the error
        that it raises.
        """

        def start(file: tuple[str, Data]) -> _Requests:
            path, data = file
            arguments = self._store_arguments(path, mode, exclusive, persist)
            return self._link.start_store(arguments, readable(data, "store_names: data"))

        return self._several(
            files, start, lambda file: self.store_name(*file, mode, exclusive, persist)
        )

    def fetch_names(
        self, paths: Iterable[str], limit: int = FETCHED
    ) -> Generator[tuple[Attributes, bytes | None] | Exception, None, None]:
        """Fetch files as :meth:`fetch_name` does, with several requests under way at a time.

        Yields for each path, in order, what that returns, or the error that it raises.
        """
        limit = checked_size(limit, "fetch_names: limit")
        return self._several(
            paths,
            lambda path: self._link.start("fetch", checked_path(path, "fetch_names"), limit),
            lambda path: self.fetch_name(path, limit),
        )

    def _several(
        self,
        items: Iterable[_Item],
        start: Callable[[_Item], _Requests],
        alone: Callable[[_Item], _Value],
    ) -> Generator[_Value | Exception, None, None]:
        """Yield the results, or the errors, of the requests that *start* begins for each item.  An
        item for which there are none is left to *alone*."""
        under_way: deque[tuple[_Item, _Requests | Exception]] = deque()

        def ended() -> _Value | Exception:
            item, requests = under_way[0]
            try:
                if isinstance(requests, Exception):
                    return requests
                if requests:
                    result: _Value = self._link.finish(requests)
                    return result
                return alone(item)
            except Exception as error:
                return error
            finally:
                under_way.popleft()

        try:
            for item in items:
                if len(under_way) >= _SEVERAL:
                    yield ended()
                try:
                    under_way.append((item, start(item)))
                except Exception as error:
                    under_way.append((item, error))
            while under_way:
                yield ended()
        finally:
            while under_way:  # their data must not be sent any more
                ended()

    def stat_name(self, path: str, follow_symlinks: bool = True) -> Attributes:
        """Return the attributes of what is at *path*: type and permissions (``mode``), size in
        bytes, times in ns since the epoch, owner, and the ID of a region.

        Raises:
            PathError: with ``errno`` ENOENT, ENOTDIR, or ELOOP after 40 symbolic links.
        """
        return self._run(paths.attributes("stat_name", path, follow_symlinks))

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        """Make a directory, which belongs to this process's effective user and group.

        Raises:
            PathError: with ``errno`` EEXIST, ENOENT, ENOTDIR.
            StorageFull: there is not enough space.
        """
        self._run(paths.mkdir(path, mode))

    def makedirs(self, path: str, mode: int = 0o755, exist_ok: bool = False) -> None:
        """Make a directory, and those above it that are missing.

        Raises:
            PathError: with ``errno`` EEXIST, unless *exist_ok* and it is a directory; ENOTDIR.
            StorageFull: there is not enough space.
        """
        self._run(paths.makedirs(path, mode, exist_ok))

    def rmdir(self, path: str) -> None:
        """Remove an empty directory.

        Raises:
            PathError: with ``errno`` ENOTEMPTY, ENOENT, ENOTDIR, EBUSY for the root.
        """
        self._run(paths.remove("rmdir", path))

    def rename(self, path: str, new_path: str, replace: bool = True) -> None:
        """Move a name, in one step.

        What has the new name already is replaced: a region, which is erased if it has no other
        name, or an empty directory by a directory.

        Raises:
            PathError: with ``errno`` ENOENT, ENOTDIR, EISDIR, ENOTEMPTY; EEXIST if the new name
                exists and not *replace*; EINVAL for a directory into itself.
        """
        self._run(paths.rename(path, new_path, replace))

    def symlink(self, target: str, path: str) -> None:
        """Make a symbolic link at *path* that leads to *target*, which need not exist.

        Raises:
            PathError: with ``errno`` EEXIST, ENOENT, ENOTDIR, ENAMETOOLONG.
        """
        self._run(paths.symlink(target, path))

    def readlink(self, path: str) -> str:
        """Return where the symbolic link at *path* leads.

        Raises:
            PathError: with ``errno`` EINVAL if it is not a symbolic link, ENOENT, ENOTDIR.
        """
        return self._run(paths.readlink(path))

    def scandir(self, path: str = "/") -> Iterator[DirectoryEntry]:
        """Yield the entries of the directory at *path* with their attributes, in order; the root
        also has nameless regions, under their IDs.

        Raises:
            PathError: with ``errno`` ENOENT, ENOTDIR.
        """
        directory = self._run(paths.attributes("scandir", path, True)).ino
        last = b""
        while page := self._link.call("readdir", directory, last, PAGE):
            for name, attributes in page:
                yield DirectoryEntry(os.fsdecode(name), attributes)
            last = page[-1][0]

    def listdir(self, path: str = "/") -> Sequence[str]:
        """Return the names in the directory at *path*; raises as :meth:`scandir`."""
        return [entry.name for entry in self.scandir(path)]

    def walk(self, top: str = "/") -> Iterator[tuple[str, Sequence[str], Sequence[str]]]:
        """Yield the path of each directory from *top* downwards, with the names of the directories
        and of all else in it.  Symbolic links are not followed.

        Raises:
            PathError: with ``errno`` ENOENT, ENOTDIR, for *top*.
        """
        left = [top]
        while left:
            path = left.pop()
            try:
                entries = [*self.scandir(path)]
            except PathError as error:  # removed meanwhile
                if path is top or error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    raise
                continue
            directories = [entry.name for entry in entries if entry.is_dir()]
            yield path, directories, [entry.name for entry in entries if not entry.is_dir()]
            left += [os.path.join(path, name) for name in reversed(directories)]

    def _run(self, steps: paths.Steps[_Value]) -> _Value:
        return paths.run(self._link.call, steps)

    def unlink_name(self, path: str) -> None:
        """Remove the name *path*.  A region without names left is erased.

        Raises:
            PathError: with ``errno`` ENOENT, or EISDIR for a directory.
        """
        self._link.call("unlink_name", checked_path(path, "unlink_name"))

    def commit(self) -> None:
        """Make every change of names and attributes durable, also those of other clients.

        The bytes of regions are what :meth:`persist` makes durable.

        Raises:
            StorageError: stable storage failed, now or earlier.
        """
        self._link.call("commit")

    def list_names(self, path: str = "/") -> Iterator[str]:
        """Yield the names in the directory at *path*; the root also has the IDs of nameless
        regions.

        Raises:
            PathError: with ``errno`` ENOENT, ENOTDIR.
        """
        return (entry.name for entry in self.scandir(path))

    # Extended attributes: names and values as of the os functions of the same names; symbolic links
    # are not followed.

    def getxattr(self, path: str, name: str | bytes) -> bytes:
        """Return an extended attribute of the inode at *path*.

        Raises:
            PathError: with ``errno`` ENOENT, ENOTDIR, or ENODATA if there is no such attribute.
        """
        value: bytes = self._link.call("getxattr", self._ino(path, "getxattr"), os.fsencode(name))
        return value

    def setxattr(self, path: str, name: str | bytes, value: Data, flags: int = 0) -> None:
        """Set an extended attribute of the inode at *path*.

        With ``os.XATTR_CREATE`` in *flags* it must not exist, with ``os.XATTR_REPLACE`` it must:
        of several clients that create an attribute one succeeds.

        Raises:
            PathError: with ``errno`` EEXIST or ENODATA because of *flags*; ENOENT, ENOTDIR;
                EOPNOTSUPP, ERANGE, E2BIG, ENOSPC for what cannot be stored.
        """
        ino = self._ino(path, "setxattr")
        self._link.call(*xattr_call(ino, name, value, flags))

    def set_flags(self, path: str, flags: int) -> None:
        """Set the flags of chattr(1) of the inode at *path*, which ``Attributes.flags`` of
        :meth:`stat_name` has: a sum of ``0x10``, immutable, ``0x20``, append-only, and ``0x40``,
        not to be backed up.  The target refuses changes that they forbid, of every client.

        Raises:
            PathError: with ``errno`` ENOENT, ENOTDIR; EOPNOTSUPP for other flags; EBUSY while a
                mount with ``-o passthrough`` has the file open.
        """
        self._link.call("set_flags", self._ino(path, "set_flags"), flags)

    def removexattr(self, path: str, name: str | bytes) -> None:
        """Remove an extended attribute of the inode at *path*; raises as :meth:`getxattr`."""
        self._link.call("removexattr", self._ino(path, "removexattr"), os.fsencode(name))

    def listxattr(self, path: str) -> Sequence[str]:
        """Return the names of the extended attributes of the inode at *path*.

        Raises:
            PathError: with ``errno`` ENOENT, ENOTDIR.
        """
        names = self._link.call("listxattr", self._ino(path, "listxattr"))
        return [os.fsdecode(name) for name in names]

    def _ino(self, path: str, what: str) -> int:
        ino: int = self._link.call("resolve", checked_path(path, what)).ino
        return ino

    # Tuning

    def set_eager_write_threshold(self, size: int) -> None:
        """Send data of up to *size* bytes inside the request's header (default 2048)."""
        self._link.eager_write = checked_size(size, "set_eager_write_threshold: size")

    def set_eager_read_threshold(self, size: int) -> None:
        """Receive data of up to *size* bytes inside the reply's header (default 2048)."""
        self._link.eager_read = checked_size(size, "set_eager_read_threshold: size")


Place = tuple[str, int, bool]
"""An engine's address, a provider's ID, and whether access is read-only."""


def _inner(link: Link) -> Link:
    return link.link if isinstance(link, ReadOnlyLink) else link


def _link_to(engine: Engine, place: Place) -> Link:
    """Return a link from *engine* to a target, over a connection that is opened when needed.

    Raises:
        ProviderNotFound: the address is *engine*'s own, and it has no such provider.
    """
    text, provider_id, read_only = place
    runtime = state_of(engine).runtime
    if runtime is not None and str(engine.addr()) == text:
        link: Link = DirectLink(runtime.find(provider_id))
        return restricted(link) if read_only else link
    return _remote_link(engine, place)


def _remote_link(engine: Engine, place: Place) -> Link:
    text, provider_id, read_only = place
    connections = state_of(engine).connections
    side = connections.side_channel(text, provider_id, read_only)
    link = WireLink(lambda: connections.get(text, read_only), provider_id, side)
    return restricted(link) if read_only else link


def _unpickled_handle(
    settings: dict[str, Any],
    text: str,
    provider_id: int,
    read_only: bool,
    eager_write: int,
    eager_read: int,
) -> TargetHandle:
    engine, place = processes.engine_for(settings, text), (text, provider_id, read_only)
    handle = TargetHandle(_link_to(engine, place), engine, place)
    handle.set_eager_write_threshold(eager_write)
    handle.set_eager_read_threshold(eager_read)
    return handle


def _unpickled_client(settings: dict[str, Any]) -> Client:
    return Client(processes.engine_for(settings))


class Client:
    """Creates handles of targets, through an engine."""

    def __init__(self, engine: Engine) -> None:
        if not isinstance(engine, Engine):
            raise ConfigError(f"Client: expected an Engine, got {type(engine).__name__}")
        self._engine = engine

    def __repr__(self) -> str:
        return f"Client({self._engine!r})"

    def make_target_handle(
        self, address: str, provider_id: int, read_only: bool = False
    ) -> TargetHandle:
        """Create a handle of a provider's target.

        With *read_only* every change fails with ``PermissionDenied``, here and at the provider.

        Raises:
            ConfigError: a malformed address or ID.
            PermissionDenied: the engine refuses this client, or cannot authenticate itself.
            ConnectionFailed, ProtocolError, TimedOut: no engine responds there.
            ProviderNotFound: that engine has no such provider.
        """
        text = str(_address.parse(str(address)))
        if (
            isinstance(provider_id, bool)
            or not isinstance(provider_id, int)
            or not 0 <= provider_id <= 65535
        ):
            raise ConfigError(f"provider_id: expected 0 to 65535, got {provider_id!r}")
        place = (text, provider_id, bool(read_only))
        link = _link_to(self._engine, place)
        if isinstance(_inner(link), WireLink):
            link.call("ping")
        return TargetHandle(link, self._engine, place)

    def get_config(self) -> str:
        """The client's settings, as JSON text."""
        patience = state_of(self._engine).connections.patience
        settings = {"timeout": patience.silence}
        if patience.deadline is not None:
            settings["deadline"] = patience.deadline
        return json.dumps(settings)

    def __reduce__(self) -> tuple[Callable[..., Client], tuple[Any, ...]]:
        return _unpickled_client, (processes.settings_of(self._engine, "Client"),)

    def __copy__(self) -> Client:
        return Client(self._engine)

    def __deepcopy__(self, memo: object) -> Client:
        return Client(self._engine)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        """No effect: connections belong to the engine."""
