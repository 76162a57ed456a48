"""Writing output files, for all commands that take the name of one.

A regular file appears, or is replaced, only when it is complete: the data go to a temporary file in
the same directory, which is synced and renamed.  If anything fails, or the command is interrupted,
the old file is unchanged and the temporary file is removed; if it is killed, too, where the file
system supports files without a name (``O_TMPFILE``).  Anything else at the path, a device, a FIFO,
a terminal or a descriptor of the process such as ``/dev/stdout``, is written to as a stream.
Symbolic links are followed.

In a world-writable sticky directory, such as ``/tmp``, a file of another user is neither followed,
replaced nor written to.  This is what ``fs.protected_symlinks`` and related settings do, but
the kernel cannot apply them to paths that are resolved here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from warabi import errors
from warabi.errors import ConfigError, PermissionDenied

PRIVATE = 0o600
"""Mode of new files that only their owner may access, regardless of the umask."""
_PUBLIC = 0o666  # reduced by the umask
_BUFFER = 256 * 1024
_DATABASES = (b"SQLite format 3\0", b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")
"""First bytes of an SQLite database, and of its write-ahead log in either byte order."""
_MOST_LINKS = 40  # the kernel's limit
_KEPT_XATTRS = ("system.posix_acl_access", "security.selinux")
_DESCRIPTOR = re.compile(r"/proc/(?:self|thread-self|[0-9]+)(?:/task/[0-9]+)?/fd/([0-9]+)")


class Output:
    """The object that :func:`output` yields: buffers and writes data.

    Attributes:
        path: the regular file that is written, symbolic links followed; None for a stream.
    """

    def __init__(self, fd: int, name: str, path: Path | None) -> None:
        self._fd = fd
        self._name = name
        self._buffer = bytearray()
        self.path = path

    def write(self, data: bytes | memoryview) -> None:
        """Write all of *data*; small data are buffered.

        Raises:
            BrokenPipeError: the reader of the pipe has closed it.
            StorageFull, StorageError: writing failed.
        """
        if len(self._buffer) + len(data) <= _BUFFER:
            self._buffer += data
            return
        self.flush()
        self._write(memoryview(data))

    def skip(self, size: int) -> None:
        """Write *size* zeros, which are a hole in a regular file; raises as :meth:`write`."""
        if self.path is None:
            for start in range(0, size, _BUFFER):
                self.write(bytes(min(_BUFFER, size - start)))
        elif size:
            self.flush()
            with _translated(self._name):
                os.ftruncate(self._fd, os.lseek(self._fd, size, os.SEEK_CUR))

    def flush(self) -> None:
        """Write the buffered data; raises as :meth:`write`."""
        kept, self._buffer = self._buffer, bytearray()
        self._write(memoryview(kept))

    def _write(self, data: memoryview) -> None:
        with _translated(self._name):
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except BlockingIOError:  # another process made the pipe non-blocking
                    waiting = select.poll()
                    waiting.register(self._fd, select.POLLOUT)
                    waiting.poll()


@contextmanager
def output(
    path: str | os.PathLike[str], mode: int | None = None, *, durable: bool = True,
    mtime_ns: int | None = None,
) -> Iterator[Output]:  # fmt: skip
    """Write to *path*, or to standard output for ``-``, in the block.

    Args:
        path: the file.
        mode: permissions of a new file; the default depends on the umask.  A file that is replaced
            keeps its permissions, extended attributes and, where this process may set them, owner
            and group.
        durable: whether to return when the file and its name are on stable storage.
        mtime_ns: the time of the last change of the file, in ns since the epoch; by default now.

    Raises:
        ConfigError: a directory, or its parent does not exist; or a database, such as a target's
            catalogue, which no command may replace.
        PermissionDenied: the file may not be written, or no file be created in its directory; or
            it belongs to another user, in a world-writable directory.
        StorageFull, StorageError: writing failed.
    """
    text = os.fspath(path)
    if text == "-":
        with _translated("standard output"):
            if sys.stdout is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            sys.stdout.flush()
            number = sys.stdout.fileno()
        out = Output(number, "standard output", None)
        yield out
        out.flush()
        return
    name = f"output {text}"
    with _translated(name):
        place = _resolved(text, name)
        stream = _stream(place)
        if stream is None and place.endswith("/"):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stream is not None:
        try:
            out = Output(stream, name, None)
            yield out
            out.flush()
        finally:
            os.close(stream)
        return
    with _replacing(Path(place), name, mode, durable) as fd:
        out = Output(fd, name, Path(place))
        yield out
        out.flush()
        if mtime_ns is not None:
            os.utime(fd, ns=(mtime_ns, mtime_ns))


def write_file(path: str | os.PathLike[str], data: bytes, mode: int | None = None) -> Path | None:
    """Replace the contents of *path* by *data*; returns :attr:`Output.path`, raises as
    :func:`output`."""
    with output(path, mode) as out:
        out.write(data)
    return out.path


@contextmanager
def _translated(name: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError(f"{name}: {error.strerror}") from None
    except OSError as error:
        if isinstance(error, errors.Exception):
            raise
        raise errors.from_os(error, name) from error
    except errors.Exception:
        raise
    except ValueError:  # a null byte
        raise ConfigError(f"{name}: contains a null byte") from None


def _resolved(path: str, name: str) -> str:
    """Follow symbolic links of *path*'s last component, except those of /proc, which refer to open
    files whatever their names are now."""
    for _ in range(_MOST_LINKS):
        parent, last = os.path.split(path)
        path = os.path.join(os.path.realpath(parent), last)
        _refuse_planted(path, name)
        if not os.path.islink(path) or _DESCRIPTOR.fullmatch(path):
            return path
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _refuse_planted(path: str, name: str) -> None:
    """Raise if another user may have created *path* to have it written by this one."""
    try:
        found, above = os.lstat(path), os.stat(os.path.dirname(path))
    except FileNotFoundError:
        return
    shared = above.st_mode & stat.S_ISVTX and above.st_mode & stat.S_IWOTH
    if shared and found.st_uid not in (os.geteuid(), above.st_uid):
        raise PermissionDenied(
            f"{name}: {path} belongs to another user, in a world-writable directory"
        )


def _stream(path: str) -> int | None:
    """Open *path* if it exists and is not a regular file; returns a descriptor or None."""
    found = _DESCRIPTOR.fullmatch(path)
    if found and path.startswith(f"/proc/{os.getpid()}/"):
        # Opening it again would write at the start of a file that the shell opened.
        return os.dup(int(found[1]))
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(kind) and not found:
        return None
    return os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)


@contextmanager
def _replacing(path: Path, name: str, mode: int | None, durable: bool) -> Iterator[int]:
    """Yield a descriptor of a temporary file, which replaces *path* if the block succeeds."""
    with _translated(name):
        try:
            old = os.stat(path)
        except FileNotFoundError:
            old = None
        if old is not None and not os.access(path, os.W_OK, effective_ids=True):
            raise PermissionDenied(f"{name}: this user has no write permission")
        if old is not None and _is_database(path):
            raise ConfigError(
                f"{name}: is a target or another database, and is not overwritten; remove it first"
                " if it is not needed any more"
            )
        if old is not None:
            _check_replaceable(path, name, old)
        kept = old is not None or mode is not None
        part = path.with_name(f".warabi-{os.urandom(8).hex()}.part")
    fd, named = -1, False
    try:
        with _translated(name):
            try:
                fd, named = _temporary(part, PRIVATE if kept else _PUBLIC)
            except PermissionError:
                raise PermissionDenied(
                    f"{name}: this user cannot create files in {path.parent}"
                ) from None
        yield fd
        with _translated(name):
            if old is not None:
                _take_over(fd, path, old)
            elif mode is not None:
                os.fchmod(fd, mode)
            if durable:
                _sync(fd)
            if named or not _link(fd, path):
                if not named:
                    _link(fd, part)
                os.replace(part, path)
            if durable:
                _sync_directory(path.parent)
    finally:
        if fd >= 0:
            os.close(fd)
        with contextlib.suppress(OSError):
            part.unlink()


def _check_replaceable(path: Path, name: str, old: os.stat_result) -> None:
    """Refuse a file that is writable, but cannot be replaced by rename(2)."""
    if _mount_id(path) != _mount_id(path.parent):
        raise ConfigError(
            f"{name}: is a mount point, which cannot be replaced; write to another file, or to"
            " standard output"
        )
    above = os.stat(path.parent)
    if above.st_mode & stat.S_ISVTX and os.geteuid() not in (0, old.st_uid, above.st_uid):
        raise PermissionDenied(
            f"{name}: belongs to another user, in a directory where only owners can replace files"
        )


def _mount_id(path: Path) -> str:
    """Return the number of the mount that *path* is on; empty if it is not known."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        fields = Path(f"/proc/self/fdinfo/{fd}").read_text().split()
    except FileNotFoundError:  # /proc is not mounted
        return ""
    finally:
        os.close(fd)
    return fields[fields.index("mnt_id:") + 1]


def _temporary(part: Path, mode: int) -> tuple[int, bool]:
    """Create a file without a name; where that is not supported, or there is no /proc for linking
    it later, a file with the name *part*.  Return its descriptor, and whether it has that name."""
    with contextlib.suppress(OSError):  # an error that matters is raised by the second attempt
        fd = os.open(part.parent, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, mode)
        if os.path.exists(f"/proc/self/fd/{fd}"):
            return fd, False
        os.close(fd)
    return os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), True


def _link(fd: int, path: Path) -> bool:
    """Give a name to a file without one; False if the name exists."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # os.link() follows symbolic links only if it is given a directory.
        os.link(f"/proc/self/fd/{fd}", path.name, src_dir_fd=directory, dst_dir_fd=directory)
    except FileExistsError:
        return False
    finally:
        os.close(directory)
    return True


def _is_database(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(16).startswith(_DATABASES)
    except PermissionError:  # it may be writable but not readable
        return False


def _take_over(fd: int, path: Path, old: os.stat_result) -> None:
    """Copy owner, permissions and attributes from the file that *fd* will replace."""
    mode = stat.S_IMODE(old.st_mode) & 0o777  # set-ID bits applied to the old content
    new = os.fstat(fd)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.fchown(fd, old.st_uid, old.st_gid)
        except PermissionError:
            try:
                os.fchown(fd, -1, old.st_gid)
            except PermissionError:
                mode &= 0o707  # the group bits applied to another group
    with contextlib.suppress(OSError):
        for name in os.listxattr(path):
            if name.startswith("user.") or name in _KEPT_XATTRS:
                with contextlib.suppress(OSError):
                    os.setxattr(fd, name, os.getxattr(path, name))
    os.fchmod(fd, mode)


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # not supported
            raise


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # it may be writable but not readable
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _sync(fd)
        finally:
            os.close(fd)
