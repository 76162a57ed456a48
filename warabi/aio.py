"""The client for Trio programs: the API of ``warabi.client``, where every wait is a checkpoint.

    async with warabi.aio.connect(address, provider_id) as target:
        region = await target.create_and_write(b"...")

A cancelled request has taken effect or not, and its late reply never accesses the caller's buffer;
a region that it creates late is erased.  The data of a cancelled write must not change until the
connection ends or a later request on it has completed.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Coroutine,
    Iterable,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from warabi import arrays, errors
from warabi._core import forks
from warabi._core.attributes import FETCHED, Attributes, DirectoryEntry
from warabi._core.buffers import (
    Data,
    abandon,
    checked_path,
    checked_size,
    readable,
    writable,
    xattr_call,
)
from warabi._core.changes import Changes
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
from warabi._core.tuning import CONNECT_TIMEOUT, SILENCE_TIMEOUT
from warabi.client import TargetHandle
from warabi.in_process.aio_link import AsyncDirectLink, AsyncLink, GetBuffer
from warabi.protocol import address as _address
from warabi.protocol import auth, paths, transport
from warabi.protocol.address import Endpoint
from warabi.protocol.operations import PAGE
from warabi.protocol.pending import Patience
from warabi.protocol.transport import Transport
from warabi.region import RegionID
from warabi.remote.aio_connection import TrioConnection
from warabi.remote.aio_direct import AsyncDirectAccessChannel
from warabi.remote.aio_link import AsyncWireLink
from warabi.remote.readonly import restricted
from warabi.target.target import Target as LocalTarget

if TYPE_CHECKING:
    from numpy.typing import NDArray  # an extra, and slow to import
_Value = TypeVar("_Value")


class Target:
    """A target with the methods, arguments, results and errors of
    :class:`warabi.client.TargetHandle`.

    Every method is a coroutine; a cancelled one has taken effect or not.
    """

    def __init__(self, link: AsyncLink, place: str = "<a target of this process>") -> None:
        self._link = link
        self._place = place

    def __repr__(self) -> str:
        return f"{type(self).__module__}.Target({self._place})"

    @property
    def link(self) -> AsyncLink:
        """The link to the target, without validation of arguments."""
        return self._link

    def __reduce__(self) -> str:
        raise TypeError(
            "a warabi.aio.Target cannot be pickled or copied, it belongs to a Trio loop of this"
            " process; pass the address and provider ID, and connect in the other process"
        )

    def call(self, name: str, *arguments: Any) -> Awaitable[Any]:
        """Execute an operation of :data:`warabi.protocol.operations.OPERATIONS`."""
        return self._link.call(name, arguments)

    async def create(self, size: int) -> RegionID:
        region: RegionID = await self.call("create", checked_size(size, "create: size"))
        return region

    async def write(
        self,
        region: RegionID,
        offset: int,
        data: Data,
        persist: bool = False,
        *,
        extend: bool = False,
    ) -> None:
        """Write *data*; with *extend* a write beyond the region's end makes it grow."""
        view = readable(data, "write: data")
        offset = checked_size(offset, "write: offset")
        await self._link.write(_id(region), offset, view, bool(persist), extend)

    async def read(self, region: RegionID, offset: int, size: int) -> bytes:
        size = checked_size(size, "read: size")
        have = await self.size(region)
        if checked_size(offset, "read: offset") + size > have:
            raise beyond_end("read", region, offset, size, have)
        owner = io.BytesIO(bytes(size))  # see filled_bytes: its buffer becomes the result
        try:
            with owner.getbuffer() as view:
                await self._link.read_into(_id(region), offset, view)
        except BaseException:
            abandon(owner)
            raise
        return owner.getvalue()

    async def append(self, region: RegionID, data: Data, persist: bool = False) -> int:
        return await self._link.append(_id(region), readable(data, "append: data"), bool(persist))

    async def read_into(self, region: RegionID, offset: int, buffer: Data) -> None:
        view = writable(buffer, "read_into: buffer")
        await self._link.read_into(_id(region), checked_size(offset, "read_into: offset"), view)

    async def read_some(self, region: RegionID, offset: int, buffer: Data) -> int:
        """The same as :meth:`read_into`, but the region may end earlier: returns the number of
        bytes read.

        *buffer* is at most as large as the provider's limit on a payload.
        """
        view = writable(buffer, "read_some: buffer")
        return await self.read_later(region, offset, len(view), lambda: view)

    async def read_later(self, region: RegionID, offset: int, size: int, place: GetBuffer) -> int:
        """The same as :meth:`read_some`, into a view of *size* bytes that *place* returns.

        *place* is called when the data arrive, or not at all, so that pending reads need no
        buffers; and again, for the same view, if the connection was lost in between.
        """
        offset = checked_size(offset, "read_some: offset")
        return await self._link.read_some(_id(region), offset, size, place)

    async def persist(self, region: RegionID, offset: int, size: int) -> None:
        offset = checked_size(offset, "persist: offset")
        await self.call("persist", _id(region), offset, checked_size(size, "persist: size"))

    async def fsync(self, region: RegionID, *, times: bool = True) -> None:
        """Make the whole region durable; with *times* also its timestamps."""
        await self.call("fsync", _id(region), times)

    async def write_vector(
        self,
        region: RegionID,
        extents: Iterable[tuple[int, int]],
        data: Data,
        persist: bool = False,
    ) -> None:
        view = readable(data, "write_vector: data")
        checked = checked_extents(extents, "write_vector")
        check_total(checked, len(view), "write_vector")
        await self._link.write_vector(_id(region), checked, view, bool(persist))

    async def read_vector(
        self, region: RegionID, extents: Iterable[tuple[int, int]], buffer: Data
    ) -> None:
        view = writable(buffer, "read_vector: buffer")
        checked = checked_extents(extents, "read_vector")
        check_total(checked, len(view), "read_vector")
        await self._link.read_vector(_id(region), checked, view)

    async def persist_vector(self, region: RegionID, extents: Iterable[tuple[int, int]]) -> None:
        checked = checked_extents(extents, "persist_vector")
        for start in range(0, max(1, len(checked)), EXTENTS):
            await self.call("persist_vector", _id(region), pack(checked[start : start + EXTENTS]))

    async def lock(
        self, region: RegionID, start: int = 0, size: int | None = None, *, shared: bool = False,
        wait: bool = True, owner: int = 0, flock: bool = False,
    ) -> None:  # fmt: skip
        kind = SHARED if shared else EXCLUSIVE
        request = lock_arguments("lock", region, flock, owner, kind, start, size)
        number = next(lock_numbers) if wait else 0
        try:
            await self.call("lock", *request, os.getpid(), number)
        except trio.Cancelled:  # it may be waiting, or granted
            with trio.move_on_after(CONNECT_TIMEOUT, shield=True), suppress(errors.Exception):
                await self.call("cancel_lock", number)
                await self.unlock(region, start, size, owner=owner, flock=flock)
            raise

    async def unlock(
        self, region: RegionID, start: int = 0, size: int | None = None, *, owner: int = 0,
        flock: bool = False,
    ) -> None:  # fmt: skip
        request = lock_arguments("unlock", region, flock, owner, UNLOCK, start, size)
        await self.call("lock", *request, 0, 0)

    async def test_lock(
        self, region: RegionID, start: int = 0, size: int | None = None, *, shared: bool = False,
        owner: int = 0, flock: bool = False,
    ) -> FileLock | None:  # fmt: skip
        kind = SHARED if shared else EXCLUSIVE
        request = lock_arguments("test_lock", region, flock, owner, kind, start, size)
        found: FileLock | None = await self.call("test_lock", *request)
        return found

    async def erase(self, region: RegionID) -> None:
        await self.call("erase", _id(region))

    async def create_and_write(self, data: Data, persist: bool = False) -> RegionID:
        view = readable(data, "create_and_write: data")
        return await self._link.create_and_write(view, bool(persist))

    async def size(self, region: RegionID) -> int:
        return await self._link.size(_id(region))

    async def stat(self, region: RegionID) -> RegionStat:
        found: RegionStat = await self.call("stat", _id(region))
        return found

    async def list(self, page_size: int = PAGE) -> AsyncIterator[RegionID]:
        last = RegionID()
        while page := await self.call("list", last, max(1, page_size)):
            for region in page:
                yield region
            last = page[-1]

    async def list_stats(self, page_size: int = PAGE) -> AsyncIterator[tuple[RegionID, RegionStat]]:
        last = RegionID()
        while page := await self.call("list_stats", last, max(1, page_size)):
            for item in page:
                yield item
            last = page[-1][0]

    async def resize(self, region: RegionID, size: int) -> None:
        await self.call("resize", _id(region), checked_size(size, "resize: size"))

    async def allocate(
        self, region: RegionID, offset: int, size: int, keep_size: bool = False
    ) -> None:
        await self._extent("allocate", region, offset, size, bool(keep_size))

    async def zero_range(
        self, region: RegionID, offset: int, size: int, keep_size: bool = False
    ) -> None:
        await self._extent("zero_range", region, offset, size, bool(keep_size))

    async def punch_hole(self, region: RegionID, offset: int, size: int) -> None:
        await self._extent("punch_hole", region, offset, size)

    async def _extent(
        self, name: str, region: RegionID, offset: int, size: int, *more: bool
    ) -> None:
        offset, size = checked_size(offset, f"{name}: offset"), checked_size(size, f"{name}: size")
        await self.call(name, _id(region), offset, size, *more)

    async def seek_data(self, region: RegionID, offset: int) -> int | None:
        found: int | None = await self.call(
            "seek", _id(region), checked_size(offset, "seek_data: offset"), False
        )
        return found

    async def seek_hole(self, region: RegionID, offset: int) -> int | None:
        found: int | None = await self.call(
            "seek", _id(region), checked_size(offset, "seek_hole: offset"), True
        )
        return found

    async def data_extents(self, region: RegionID) -> AsyncIterator[tuple[int, int]]:
        end = 0
        while (start := await self.seek_data(region, end)) is not None:
            end = await self.seek_hole(region, start) or 0
            if end <= start:  # the region was truncated
                return
            yield start, end - start

    async def copy(self, region: RegionID, persist: bool = False) -> RegionID:
        copy: RegionID = await self.call("clone", _id(region), bool(persist))
        return copy

    async def copy_range(
        self, source: RegionID, source_offset: int, region: RegionID, offset: int, size: int
    ) -> int:
        steps = paths.copy_range(_id(source), source_offset, _id(region), offset, size)
        return await self._run(steps)

    async def changes(self, *, new_names: bool = False) -> AsyncGenerator[Changes, None]:
        """Yield changes of the target by other clients; never ends by itself.

        The first item reports that everything may have changed, and so does one after too many
        changes, or a lost connection.  Several changes of one object may be merged.  Only one
        iteration at a time per connection.

        Args:
            new_names: include names that did not exist before.
        """
        number = 0
        while True:
            changes = await self._link.changes(number, new_names)
            number = changes.number
            if changes.everything or changes.inodes or changes.names:
                yield changes

    async def put_array(self, array: NDArray[Any], persist: bool = False) -> RegionID:
        size, pieces = arrays.encode(array)
        if size <= arrays.PREFIX:
            return await self.create_and_write(b"".join(piece for _, piece in pieces), persist)
        region = await self.create(size)
        try:
            for offset, piece in pieces:
                await self.write(region, offset, piece)
            if persist:
                await self.persist(region, 0, size)
        except BaseException:
            await self._clean_up(self.erase(region))
            raise
        return region

    async def _clean_up(self, undo: Coroutine[Any, Any, None]) -> None:
        """Run *undo* after a failure, also when the caller is cancelled."""
        with trio.move_on_after(CONNECT_TIMEOUT, shield=True), suppress(errors.Exception):
            await undo

    async def get_array(self, region: RegionID) -> NDArray[Any]:
        size = await self.size(region)
        prefix = await self.read(region, 0, min(size, arrays.PREFIX))
        start = arrays.data_offset(region, size, prefix)
        if start > len(prefix):
            prefix = await self.read(region, 0, start)
        array, place = arrays.decode(region, size, prefix[:start])
        if start + len(place) <= len(prefix):
            place[:] = prefix[start : start + len(place)]
        else:
            await self.read_into(region, start, place)
        return array

    async def open_name(self, path: str) -> RegionID:
        region: RegionID = await self.call("open_name", checked_path(path, "open_name"))
        return region

    async def link_name(self, region: RegionID, path: str, replace: bool = False) -> None:
        if replace:
            await self._run(paths.replace(_id(region), path))
        else:
            await self.call("link_name", _id(region), checked_path(path, "link_name"))

    async def create_name(self, path: str, mode: int = 0o644) -> RegionID:
        return await self._run(paths.create(path, mode))

    async def store_name(
        self, path: str, data: Data, mode: int = 0o644, exclusive: bool = False,
        persist: bool = False,
    ) -> Attributes:  # fmt: skip
        view = readable(data, "store_name: data")
        path, owner = checked_path(path, "store_name"), (os.geteuid(), os.getegid())
        arguments = (path, mode & 0o7777, *owner, bool(exclusive), bool(persist))
        stored = await self._link.store(arguments, view)
        if stored is not None:
            return stored
        storing = paths.Storing(arguments, len(view))
        try:
            region = await self._run(storing.begin())
            await self._link.write(region, 0, view, bool(persist), False)
            return await self._run(storing.end(region))
        except BaseException:
            await self._clean_up(self._run(storing.give_up()))
            raise

    async def fetch_name(self, path: str, limit: int = FETCHED) -> tuple[Attributes, bytes | None]:
        return await self._run(paths.fetch(path, checked_size(limit, "fetch_name: limit")))

    async def stat_name(self, path: str, follow_symlinks: bool = True) -> Attributes:
        return await self._run(paths.attributes("stat_name", path, follow_symlinks))

    async def mkdir(self, path: str, mode: int = 0o755) -> None:
        await self._run(paths.mkdir(path, mode))

    async def makedirs(self, path: str, mode: int = 0o755, exist_ok: bool = False) -> None:
        await self._run(paths.makedirs(path, mode, exist_ok))

    async def rmdir(self, path: str) -> None:
        await self._run(paths.remove("rmdir", path))

    async def rename(self, path: str, new_path: str, replace: bool = True) -> None:
        await self._run(paths.rename(path, new_path, replace))

    async def symlink(self, target: str, path: str) -> None:
        await self._run(paths.symlink(target, path))

    async def readlink(self, path: str) -> str:
        return await self._run(paths.readlink(path))

    async def scandir(self, path: str = "/") -> AsyncIterator[DirectoryEntry]:
        directory = (await self._run(paths.attributes("scandir", path, True))).ino
        last = b""
        while page := await self.call("readdir", directory, last, PAGE):
            for name, attributes in page:
                yield DirectoryEntry(os.fsdecode(name), attributes)
            last = page[-1][0]

    async def list_names(self, path: str = "/") -> AsyncIterator[str]:
        async for entry in self.scandir(path):
            yield entry.name

    async def listdir(self, path: str = "/") -> Sequence[str]:
        return [entry.name async for entry in self.scandir(path)]

    async def walk(self, top: str = "/") -> AsyncIterator[tuple[str, Sequence[str], Sequence[str]]]:
        left = [top]
        while left:
            path = left.pop()
            try:
                entries = [entry async for entry in self.scandir(path)]
            except errors.PathError as error:  # removed meanwhile
                if path is top or error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    raise
                continue
            directories = [entry.name for entry in entries if entry.is_dir()]
            yield path, directories, [entry.name for entry in entries if not entry.is_dir()]
            left += [os.path.join(path, name) for name in reversed(directories)]

    async def _run(self, steps: paths.Steps[_Value]) -> _Value:
        """The same as ``paths.run``."""
        try:
            request = next(steps)
            while True:
                try:
                    result = await self.call(*request)
                except errors.Exception as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(result)
        except StopIteration as end:
            value: _Value = end.value
            return value

    async def unlink_name(self, path: str) -> None:
        await self.call("unlink_name", checked_path(path, "unlink_name"))

    async def commit(self) -> None:
        """Make every change of names and attributes durable, also those of other clients."""
        await self.call("commit")

    async def getxattr(self, path: str, name: str | bytes) -> bytes:
        ino = await self._ino(path, "getxattr")
        value: bytes = await self.call("getxattr", ino, os.fsencode(name))
        return value

    async def setxattr(self, path: str, name: str | bytes, value: Data, flags: int = 0) -> None:
        await self.call(*xattr_call(await self._ino(path, "setxattr"), name, value, flags))

    async def set_flags(self, path: str, flags: int) -> None:
        await self.call("set_flags", await self._ino(path, "set_flags"), flags)

    async def removexattr(self, path: str, name: str | bytes) -> None:
        await self.call("removexattr", await self._ino(path, "removexattr"), os.fsencode(name))

    async def listxattr(self, path: str) -> Sequence[str]:
        names = await self.call("listxattr", await self._ino(path, "listxattr"))
        return [os.fsdecode(name) for name in names]

    async def _ino(self, path: str, what: str) -> int:
        ino: int = (await self.call("resolve", checked_path(path, what))).ino
        return ino


for _name, _method in vars(Target).items():
    if callable(_method) and not _name.startswith("_") and not _method.__doc__:
        _method.__doc__ = getattr(TargetHandle, _name).__doc__


def _id(region: Any) -> RegionID:
    """Return *region*; raises ``InvalidRegion`` if it is not a region ID."""
    return region if type(region) is RegionID else RegionID(region)


def _asyncio_runs() -> bool:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def check_loop(what: str) -> None:
    """Raise ``RuntimeError``, with advice, unless *what* runs in a Trio loop."""
    if trio.lowlevel.in_trio_run():
        return
    if _asyncio_runs():
        raise RuntimeError(
            f"{what} is for Trio programs and cannot run under asyncio: use warabi.asyncio"
        )
    raise RuntimeError(f"{what} must be called in a Trio task, within trio.run()")


@asynccontextmanager
async def connect(
    address: str,
    provider_id: int,
    *,
    timeout: float = SILENCE_TIMEOUT,
    deadline: float | None = None,
    share: bool = True,
    read_only: bool = False,
    tls: dict[str, Any] | None = None,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    ended: trio.Event | None = None,
    deadlines: bool = False,
) -> AsyncIterator[Target]:
    """Connect to a target of the engine at *address*, for the duration of the block.

    Args:
        address: as returned by ``str(engine.addr())``.
        provider_id: 0 to 65535.
        timeout: seconds without a sign of life from the provider after which a call raises
            ``TimedOut``.
        deadline: seconds after which a call raises it even with signs of life; by default 5 times
            *timeout* for calls that only read, 60 times for others.
        share: whether to use direct access to regions of a provider on this host.
        read_only: let every change fail with ``PermissionDenied``, here and at the provider.
        tls, token, token_file: as in an engine's configuration, see docs/security.md.
        ended: set when the connection has ended, for whatever reason.
        deadlines: whether a call also raises ``TimedOut`` if it does not complete for *timeout*
            while others do; ten times that if it may wait for stable storage.

    Raises:
        ConfigError: a malformed address, or invalid certificates or token.
        PermissionDenied: the engine refuses this client, or cannot authenticate itself.
        ConnectionFailed, ProtocolError, TimedOut: no engine responds there.
        ProviderNotFound: that engine has no such provider.
        RuntimeError: not in a Trio task.
    """
    check_loop("warabi.aio.connect()")
    endpoint = _address.parse(str(address))
    given = {"tls": tls, "token": token, "token_file": token_file}
    shown = auth.from_config({key: value for key, value in given.items() if value is not None})
    limit = min(timeout, CONNECT_TIMEOUT)

    async def opened(*, descriptors: bool = False) -> TrioConnection:
        plain, over = await _in_thread(endpoint, limit, shown)
        connection = TrioConnection(
            plain,
            over,
            str(endpoint),
            Patience(timeout, deadline),
            descriptors=descriptors,
            deadlines=deadlines,
        )
        try:
            await connection.open(shown, local=endpoint.local, read_only=read_only)
        except BaseException:
            plain.close()
            raise
        if descriptors:
            nursery.start_soon(_run_until_closed, connection)
        else:
            nursery.start_soon(_run, connection, ended)
        return connection

    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            connection = await opened()
            side = None
            if share and endpoint.local:
                side = AsyncDirectAccessChannel(
                    nursery,
                    partial(opened, descriptors=True),
                    provider_id,
                    writable=not read_only,
                )
            link: AsyncLink = AsyncWireLink(connection, provider_id, side)
            place = f"{str(endpoint)!r}, {provider_id}{', read_only=True' if read_only else ''}"
            target = Target(restricted(link) if read_only else link, place)
            await target.call("ping")
            try:
                yield target
            finally:
                if side is not None:
                    await side.aclose()
        except Exception as error:  # a nursery would wrap it in a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _in_thread(
    endpoint: Endpoint, limit: float, shown: auth.Security
) -> tuple[socket.socket, Transport]:
    """The same as ``transport.connect``; a connection that arrives after a cancellation is
    closed."""
    lock = forks.lock()
    made: list[socket.socket] = []
    given_up = False

    def make() -> tuple[socket.socket, Transport]:
        found = transport.connect(endpoint, limit, shown)
        with lock:
            if given_up:
                found[0].close()
            made.append(found[0])
        return found

    try:
        return await trio.to_thread.run_sync(make, abandon_on_cancel=True)
    except trio.Cancelled:
        with lock:
            given_up = True
            for sock in made:
                sock.close()
        raise


async def _run(connection: TrioConnection, ended: trio.Event | None) -> None:
    try:
        await connection.run()
    finally:
        if ended is not None:
            ended.set()


async def _run_until_closed(connection: TrioConnection) -> None:
    """Run even if the caller is cancelled: a last message must be sent."""
    with trio.CancelScope(shield=True):
        await connection.run()


def attach(target: LocalTarget) -> Target:
    """Return the Trio API of a target of this process.

    Calls that may wait for stable storage run in threads.  A few calls take longer the more names a
    region or the deeper a directory has, such as erasing a region with thousands of names; these
    run in the caller's event loop, which is not watched as those of providers and mounts are.
    """
    if _asyncio_runs():
        check_loop("warabi.aio.attach()")
    return Target(AsyncDirectLink(target))


__all__ = ["RegionID", "RegionStat", "Target", "attach", "connect"]
