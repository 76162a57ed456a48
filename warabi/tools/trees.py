"""Directory trees that commands work on: that of a target, and the local disk.

Both have the same few operations with the same errors.  A file is written atomically: it has its
name when all of it is there, and until then the old file is there, if there is one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from warabi._core.attributes import Attributes, DirectoryEntry
from warabi._core.fileio import data_from, hole_from, pread_full
from warabi._core.output import output
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, Mode
from warabi.errors import ConfigError, Exception, ProtocolError, path_error
from warabi.protocol import paths
from warabi.protocol.auth import config_of
from warabi.protocol.pending import PendingRequest
from warabi.region import RegionID
from warabi.tools.access import owned
from warabi.tools.location import Location, parse

STORED = 1 << 20
"""Most bytes of a file that is written at once."""
_OUTSTANDING = 256  # requests whose replies are not waited for


class Source(Protocol):
    """The bytes of a file that is read; ``size`` of them."""

    size: int

    def extents(self) -> Iterable[tuple[int, int]]:
        """Yield offset and size of what is no hole, in order."""

    def read_into(self, offset: int, place: memoryview) -> None:
        """Fill *place*; raises ``OutOfBounds`` or ``OSError`` if the file has become shorter."""


class Sink(Protocol):
    """A file that is written, from its start to its end."""

    def write(self, data: memoryview) -> None: ...
    def skip(self, size: int) -> None:
        """Write a hole."""


class Space(NamedTuple):
    """Bytes of a file system or a target."""

    total: int
    available: int


class Tree(Protocol):
    """A tree of directories and files.  Paths are from its root; links are not followed unless an
    operation says so."""

    def stat(self, path: str, follow: bool = False) -> Attributes: ...
    def scandir(self, path: str) -> Iterator[DirectoryEntry]: ...
    def mkdir(self, path: str, mode: int = 0o755) -> None: ...
    def makedirs(self, path: str) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def rename(self, path: str, new_path: str) -> None: ...
    def symlink(self, target: str, path: str) -> None: ...
    def readlink(self, path: str) -> str: ...
    def reading(self, path: str, found: Attributes) -> AbstractContextManager[Source]:
        """Open the file at *path* with the attributes *found*, links followed."""

    def small(self, path: str, found: Attributes) -> bytes:
        """Return the bytes of a file of at most ``STORED`` bytes."""

    def store(self, path: str, data: bytes, mode: int, mtime_ns: int) -> None:
        """Make or replace a file."""

    def writing(self, path: str, mode: int, mtime_ns: int | None) -> AbstractContextManager[Sink]:
        """Make or replace a file, when the block has succeeded."""

    def flush(self) -> None:
        """Return when all that was called has been done; raises its errors."""

    def persist(self) -> None:
        """Return when everything is on stable storage."""

    def space(self, path: str) -> Space: ...


class LocalTree:
    """The local disk."""

    def stat(self, path: str, follow: bool = False) -> Attributes:
        return _attributes(os.stat(path, follow_symlinks=follow))

    def scandir(self, path: str) -> Iterator[DirectoryEntry]:
        with os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    found = entry.stat(follow_symlinks=False)
                    yield DirectoryEntry(entry.name, _attributes(found))

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        os.mkdir(path, mode)

    def makedirs(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rename(self, path: str, new_path: str) -> None:
        os.rename(path, new_path)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, path)

    def readlink(self, path: str) -> str:
        return os.readlink(path)

    @contextmanager
    def reading(self, path: str, found: Attributes) -> Iterator[Source]:
        with open(path, "rb", buffering=0) as file:
            yield _LocalSource(file.fileno(), path)

    def small(self, path: str, found: Attributes) -> bytes:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(fd, found.size + 1)
            if len(data) == found.size:
                return data
        finally:
            os.close(fd)
        with open(path, "rb") as file:  # it has changed meanwhile
            return file.read()

    def store(self, path: str, data: bytes, mode: int, mtime_ns: int) -> None:
        with self.writing(path, mode, mtime_ns) as sink:
            sink.write(memoryview(data))

    @contextmanager
    def writing(self, path: str, mode: int, mtime_ns: int | None) -> Iterator[Sink]:
        with output(path, mode & 0o777, durable=False, mtime_ns=mtime_ns) as out:
            yield out

    def flush(self) -> None:
        pass

    def persist(self) -> None:
        os.sync()

    def space(self, path: str) -> Space:
        found = shutil.disk_usage(path)
        return Space(found.total, found.free)


class _LocalSource:
    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self.size = os.fstat(fd).st_size

    def extents(self) -> Iterator[tuple[int, int]]:
        end = 0
        while (start := data_from(self._fd, end, self.size)) < self.size:
            end = hole_from(self._fd, start, self.size)
            yield start, end - start

    def read_into(self, offset: int, place: memoryview) -> None:
        if pread_full(self._fd, place, offset) < len(place):
            raise OSError(errno.EIO, "the file has become shorter while it was read", self._path)


def _attributes(found: os.stat_result) -> Attributes:
    return Attributes(
        found.st_ino, 0, found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_rdev,
        found.st_size, found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns,
        found.st_blocks * 512,
    )  # fmt: skip


class TargetTree:
    """The tree of names of a target."""

    def __init__(self, target: TargetHandle) -> None:
        self.target = target
        self._pending: list[list[PendingRequest]] = []

    def stat(self, path: str, follow: bool = False) -> Attributes:
        return self.target.stat_name(path, follow)

    def scandir(self, path: str) -> Iterator[DirectoryEntry]:
        return self.target.scandir(path)

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        self.target.mkdir(path, mode)

    def makedirs(self, path: str) -> None:
        self.target.makedirs(path, exist_ok=True)

    def rmdir(self, path: str) -> None:
        self.target.rmdir(path)

    def unlink(self, path: str) -> None:
        self.target.unlink_name(path)

    def rename(self, path: str, new_path: str) -> None:
        self.target.rename(path, new_path)

    def symlink(self, target: str, path: str) -> None:
        self.target.symlink(target, path)

    def readlink(self, path: str) -> str:
        return self.target.readlink(path)

    @contextmanager
    def reading(self, path: str, found: Attributes) -> Iterator[Source]:
        yield _Region(self.target, found.region)

    def small(self, path: str, found: Attributes) -> bytes:
        if found.size <= 65536:
            data = self.target.fetch_name(path)[1]
            if data is not None:
                return data
        return self.target.read(found.region, 0, self.target.size(found.region))

    def store(self, path: str, data: bytes, mode: int, mtime_ns: int) -> None:
        stored = self.target.store_name(path, data, mode)
        self._set_time(stored.ino, mtime_ns)

    def _set_time(self, ino: int, mtime_ns: int) -> None:
        self._pending.append(
            self.target.link.start("setattr", ino, None, None, None, None, mtime_ns)
        )
        if len(self._pending) > _OUTSTANDING:
            self.flush()

    @contextmanager
    def writing(self, path: str, mode: int, mtime_ns: int | None) -> Iterator[Sink]:
        link = self.target.link
        owner = os.geteuid(), os.getegid()
        storing = paths.Storing((path, mode & 0o7777, *owner, False, False), 0)
        region = paths.run(link.call, storing.begin())
        try:
            sink = _RegionSink(self.target, region)
            yield sink
            sink.finish()
            stored = paths.run(link.call, storing.end(region))
        except BaseException:
            with contextlib.suppress(Exception):
                paths.run(link.call, storing.give_up())
            raise
        if mtime_ns is not None:
            self._set_time(stored.ino, mtime_ns)

    def copy(self, found: Attributes, path: str, mode: int, mtime_ns: int) -> None:
        """Copy a file of this target to *path*; no bytes pass through this process."""
        region = self.target.copy(found.region)
        try:
            self.target.link.call("setattr", region.slot, mode, None, None, None, mtime_ns)
            self.target.link_name(region, path, replace=True)
        except BaseException:
            with contextlib.suppress(Exception):
                self.target.erase(region)
            raise

    def flush(self) -> None:
        with contextlib.suppress(IndexError):  # another thread has taken the last one
            while self._pending:
                self.target.link.finish(self._pending.pop())

    def persist(self) -> None:
        self.target.link.call("sync")

    def space(self, path: str) -> Space:
        total, available, _ = self.target.link.call("room")
        return Space(total, available)


class _Region:
    def __init__(self, target: TargetHandle, region: RegionID) -> None:
        self._target = target
        self._region = region
        self.size = target.size(region)

    def extents(self) -> Iterator[tuple[int, int]]:
        for start, length in self._target.data_extents(self._region):
            yield start, min(start + length, self.size) - start

    def read_into(self, offset: int, place: memoryview) -> None:
        self._target.read_into(self._region, offset, place)


class _RegionSink:
    def __init__(self, target: TargetHandle, region: RegionID) -> None:
        self._target = target
        self._region = region
        self._offset = self._size = 0

    def write(self, data: memoryview) -> None:
        self._target.link.write(self._region, self._offset, data, False, True)
        self._offset += len(data)
        self._size = self._offset

    def skip(self, size: int) -> None:
        self._offset += size

    def finish(self) -> None:
        if self._offset > self._size:  # it ends with a hole
            self._target.resize(self._region, self._offset)


class Trees:
    """The trees that a command needs, opened when they are, and closed with the block.

    Args:
        provider_id: of the provider where a location names none.
        security: options, as for :func:`warabi.protocol.auth.config_of`.
        read_only: whether nothing is changed.
    """

    def __init__(
        self, provider_id: int, security: Mapping[str, Any], *, read_only: bool = False
    ) -> None:
        self._provider_id = provider_id
        self._config = config_of(security)
        self._read_only = read_only
        self._open: dict[tuple[str, int, str], TargetTree] = {}
        self._stack = contextlib.ExitStack()
        self.local = LocalTree()

    def __enter__(self) -> Trees:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def find(self, text: str) -> tuple[Tree, Location]:
        """Return the tree that *text* leads into, and where.

        Raises:
            warabi.errors.Exception: as :func:`warabi.tools.location.parse`, and of connecting.
        """
        location = parse(text, self._provider_id)
        return (self.local if location.local else self._opened(location)), location

    def target(self, text: str) -> tuple[TargetTree, Location]:
        """The same for what must be in a target: a path on the local disk names one."""
        location = parse(text, self._provider_id)
        if location.local and not os.path.isfile(location.path):
            missing = not os.path.lexists(location.path)
            raise ConfigError(
                f"{text}: {'does not exist, and is' if missing else 'is'} neither a target nor on a"
                " mount of one; expected an engine's address, such as na+sm://1234-0, the path of"
                " a target in files, or a path on a mount"
            )
        location = location.in_target()
        return self._opened(location), location

    def _opened(self, location: Location) -> TargetTree:
        key = location.target
        if key not in self._open:
            self._open[key] = TargetTree(self._handle(location))
        return self._open[key]

    def _handle(self, location: Location) -> TargetHandle:
        if location.file:
            return TargetHandle(self._stack.enter_context(owned(Path(location.file))))
        scheme = location.address.partition("://")[0]
        engine = self._stack.enter_context(Engine(scheme, Mode.CLIENT, config=self._config))
        return Client(engine).make_target_handle(
            location.address, location.provider_id, self._read_only
        )


def entries(tree: Tree, path: str) -> Iterator[DirectoryEntry]:
    """Yield the entries of a directory, without regions that have no name.

    Raises:
        ProtocolError: a provider returned a name that leads out of the directory.
    """
    for entry in tree.scandir(path):
        if "/" in entry.name or entry.name in ("", ".", ".."):
            raise ProtocolError(f"{path}: {entry.name!r:.100} is not the name of an entry")
        if path.strip("/") or entry.name != entry.attributes.region.hex():
            yield entry


def remove_all(tree: Tree, path: str) -> None:
    """Remove what is at *path*, with everything below it; what goes meanwhile is no error."""
    if not stat.S_ISDIR(tree.stat(path).mode):
        tree.unlink(path)
        return
    for entry in list(entries(tree, path)):
        one = os.path.join(path, entry.name)
        with contextlib.suppress(FileNotFoundError):
            if entry.is_dir():
                remove_all(tree, one)
            else:
                tree.unlink(one)
    if path.strip("/"):
        tree.rmdir(path)


def make_directory(tree: Tree, path: str, mode: int) -> None:
    """Make a directory unless there is one.

    Raises:
        PathExists: there is something else.
    """
    try:
        tree.mkdir(path, mode)
    except FileExistsError:
        if not stat.S_ISDIR(tree.stat(path, follow=True).mode):
            raise path_error(errno.EEXIST, f"{path}: exists, and is not a directory") from None
