"""Calls that take several operations, mostly on paths of a target, for both kinds of client.

A function here is a generator.  It yields the name and the arguments of an operation, is sent the
result, or has its error thrown, and returns the result of the call.  Paths are from the
root; symbolic links in the directories of a path are followed, the last component is only where
the function says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

from warabi._core.attributes import LINKS, ROOT, Attributes
from warabi._core.buffers import checked_path, checked_size
from warabi.errors import Exception, InvalidRegion, PathError, path_error
from warabi.region import RegionID

_T = TypeVar("_T")
Steps = Generator[tuple[Any, ...], Any, _T]

_NOREPLACE = 1  # RENAME_NOREPLACE of renameat2(2)


def run(call: Callable[..., Any], steps: Steps[_T]) -> _T:
    """Carry out *steps* with operations by *call*; returns their result."""
    try:
        request = next(steps)
        while True:
            try:
                result = call(*request)
            except Exception as error:
                request = steps.throw(error)
            else:
                request = steps.send(result)
    except StopIteration as end:
        value: _T = end.value
        return value


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """Put the call and its path into the message of a ``PathError``; what was removed between two
    operations was not found."""
    try:
        yield
    except PathError as error:
        number = error.errno or errno.EIO
        number = errno.ENOENT if number == errno.ESTALE else number
        raise path_error(number, f"{what}: {os.strerror(number)}") from None


def _parts(path: str) -> list[bytes]:
    return [part for part in os.fsencode(path).split(b"/") if part not in (b"", b".")]


def _find(parts: list[bytes], follow: bool) -> Steps[Attributes]:
    try:
        found: Attributes = yield "resolve", os.fsdecode(b"/".join(parts))
        if not (follow and stat.S_ISLNK(found.mode)):
            return found
    except PathError as error:
        if error.errno != errno.ENOTDIR:  # a link among the directories is not one
            raise
    return (yield from _walked(parts, follow))


def _walked(parts: list[bytes], follow: bool) -> Steps[Attributes]:
    """As :func:`_find`, one component after the other, through symbolic links."""
    root: Attributes = yield "getattr", ROOT
    above, left, links = [root], parts[::-1], 0
    while left:
        name = left.pop()
        if name == b"..":
            above = above[:-1] or [root]
            continue
        found: Attributes = yield "lookup", above[-1].ino, name
        if not stat.S_ISLNK(found.mode) or not (left or follow):
            above.append(found)
            continue
        links += 1
        if links > LINKS:
            raise path_error(errno.ELOOP)
        target: bytes = yield "readlink", found.ino
        if target.startswith(b"/"):
            above = [root]
        left += [part for part in target.split(b"/") if part not in (b"", b".")][::-1]
    return above[-1]


def _entry(path: str, root: int) -> Steps[tuple[int, bytes]]:
    """The directory and the name of *path*; the error *root* if it is the root directory."""
    parts = _parts(path)
    if not parts:
        raise path_error(root)
    if len(parts) == 1:
        return ROOT, parts[0]
    return (yield from _find(parts[:-1], True)).ino, parts[-1]


def attributes(what: str, path: str, follow: bool) -> Steps[Attributes]:
    """What is at *path*; with *follow*, what a symbolic link there leads to."""
    path = checked_path(path, what)
    with _about(f"{what} {path}"):
        return (yield from _find(_parts(path), follow))


def mkdir(path: str, mode: int) -> Steps[None]:
    """Make a directory."""
    path = checked_path(path, "mkdir")
    with _about(f"mkdir {path}"):
        parent, name = yield from _entry(path, errno.EEXIST)
        yield "mkdir", parent, name, mode, os.geteuid(), os.getegid(), 0


def makedirs(path: str, mode: int, exist_ok: bool) -> Steps[None]:
    """Make a directory, and those above it that are missing."""
    path = checked_path(path, "makedirs")
    with _about(f"makedirs {path}"):
        parts, missing = _parts(path), 0
        while missing <= len(parts):
            try:
                found = yield from _find(parts[: len(parts) - missing], True)
                break
            except PathError as error:
                if error.errno != errno.ENOENT:
                    raise
            missing += 1
        if not stat.S_ISDIR(found.mode) or (not missing and not exist_ok):
            raise path_error(errno.ENOTDIR if missing else errno.EEXIST)
        for name in parts[len(parts) - missing :]:
            try:
                found = yield "mkdir", found.ino, name, mode, os.geteuid(), os.getegid(), 0
            except PathError as error:  # another client has made it meanwhile
                if error.errno != errno.EEXIST or (name is parts[-1] and not exist_ok):
                    raise
                found = yield "lookup", found.ino, name


def create(path: str, mode: int) -> Steps[RegionID]:
    """Make an empty region with a name; returns its ID."""
    path = checked_path(path, "create_name")
    with _about(f"create_name {path}"):
        parent, name = yield from _entry(path, errno.EEXIST)
        kind, uid, gid = stat.S_IFREG | mode & 0o7777, os.geteuid(), os.getegid()
        made: Attributes = yield "mknod", parent, name, kind, uid, gid, 0, False, 0
        return made.region


def fetch(path: str, limit: int) -> Steps[tuple[Attributes, bytes | None]]:
    """What is at *path*, with symbolic links followed, and the bytes of a small region."""
    path = checked_path(path, "fetch_name")
    with _about(f"fetch_name {path}"):
        fetched: tuple[Attributes, bytes | None] = yield "fetch", path, limit
        return fetched


def copy_range(
    source: RegionID, source_offset: int, region: RegionID, offset: int, size: int
) -> Steps[int]:
    """Copy bytes of a region to another one, or to another place in it; returns how many."""
    source_offset = checked_size(source_offset, "copy_range: source_offset")
    offset = checked_size(offset, "copy_range: offset")
    left, done = checked_size(size, "copy_range: size"), 0
    if source == region:  # which may grow by the copy
        have: int = yield "size", source
        left = min(left, max(0, have - source_offset))
    while left > done:
        count: int = yield (
            "copy_range", region, offset + done, source, source_offset + done, left - done,
        )  # fmt: skip
        if not count:
            break
        done += count
    return done


class Storing:
    """A region that becomes the file at a path by several operations, since its data exceed the
    limit of one request.

    Args:
        arguments: of the operation ``store``.
        size: bytes of the data.
    """

    def __init__(self, arguments: Sequence[Any], size: int) -> None:
        self._path, self._mode, self._uid, self._gid, self._exclusive, self._persist = arguments
        self._size = size
        self._made = 0  # it goes with the connection, unless it is named

    def begin(self) -> Steps[RegionID]:
        """Make the region, to which the data are to be written."""
        with _about(f"store_name {self._path}"):
            with contextlib.suppress(InvalidRegion):
                # Is there a directory?
                yield "publish", RegionID(), self._path, self._exclusive, None, None, None
            parent, _ = yield from _entry(self._path, errno.EISDIR)
            mode = stat.S_IFREG | self._mode
            made: Attributes = yield "tmpfile", parent, False, mode, self._uid, self._gid, 0
            self._made = made.ino
            if self._size:
                yield "resize", made.region, self._size
            return made.region

    def end(self, region: RegionID) -> Steps[Attributes]:
        """Give the region its name."""
        with _about(f"store_name {self._path}"):
            stored: Attributes = yield (
                "publish", region, self._path, self._exclusive, None, None, None,
            )  # fmt: skip
            yield "unpin", stored.ino, 1
            if self._persist:
                yield ("commit",)
            return stored

    def give_up(self) -> Steps[None]:
        """Remove the region."""
        if self._made:
            yield "unpin", self._made, 1


def replace(region: RegionID, path: str) -> Steps[None]:
    """Give a region without names the name *path*, which may have been another's."""
    path = checked_path(path, "link_name")
    with _about(f"link_name {path}"):
        parent, name = yield from _entry(path, errno.EISDIR)
        yield "rename", ROOT, region.hex().encode(), parent, name, 0, False


def remove(what: str, path: str) -> Steps[None]:
    """Remove the name of anything but a directory (``unlink``), or an empty directory
    (``rmdir``)."""
    path = checked_path(path, what)
    with _about(f"{what} {path}"):
        parent, name = yield from _entry(path, errno.EBUSY)
        yield what, parent, name, False


def rename(path: str, new_path: str, replace: bool) -> Steps[None]:
    """Move a name; with *replace* another thing that has the new one loses it."""
    path, new_path = checked_path(path, "rename"), checked_path(new_path, "rename")
    with _about(f"rename {path} to {new_path}"):
        source = yield from _entry(path, errno.EBUSY)
        into = yield from _entry(new_path, errno.EBUSY)
        yield "rename", *source, *into, 0 if replace else _NOREPLACE, False


def symlink(target: str, path: str) -> Steps[None]:
    """Make a symbolic link."""
    path = checked_path(path, "symlink")
    content = os.fsencode(checked_path(target, "symlink"))
    with _about(f"symlink {path}"):
        parent, name = yield from _entry(path, errno.EEXIST)
        yield "symlink", parent, name, content, os.geteuid(), os.getegid()


def readlink(path: str) -> Steps[str]:
    """Where a symbolic link leads."""
    path = checked_path(path, "readlink")
    with _about(f"readlink {path}"):
        found = yield from _find(_parts(path), False)
        content: bytes = yield "readlink", found.ino
        return os.fsdecode(content)
