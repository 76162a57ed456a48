"""Writing output files, for every command that takes the name of one.

A regular file appears, or is replaced, when it is complete: the bytes go to a temporary file in the
same directory, which is synced and renamed.  When anything fails, or the command is interrupted,
the old file is as it was and the temporary file is gone.  Whatever else is at the path, a device,
a FIFO, a terminal or a descriptor of the process such as ``/dev/stdout``, is written to as a stream
and stays what it is.  Symbolic links are followed.

In a directory where every user may make files, such as ``/tmp``, what another user made is neither
followed, replaced nor written to.  It is what ``fs.protected_symlinks`` and its like do, but the
kernel cannot see what is resolved here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from warabi import errors
from warabi.errors import ConfigError, PermissionDenied

PRIVATE = 0o600
"""Mode of new files that only their owner may read, whatever the umask."""
_PUBLIC = 0o666  # less the umask
_BUFFER = 256 * 1024
_DATABASES = (b"SQLite format 3\0", b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")
"""How an SQLite database begins, and its log of either byte order."""
_MOST_LINKS = 40  # as many as the kernel follows
_KEPT_XATTRS = ("system.posix_acl_access", "security.selinux")
_DESCRIPTOR = re.compile(r"/proc/(?:self|thread-self|[0-9]+)(?:/task/[0-9]+)?/fd/([0-9]+)")


class Output:
    """What :func:`output` gives out: takes bytes until its block ends.

    Attributes:
        path: the regular file that is written, symbolic links followed; None for a stream.
    """

    def __init__(self, fd: int, name: str, path: Path | None) -> None:
        self._fd = fd
        self._name = name
        self._buffer = bytearray()
        self.path = path

    def write(self, data: bytes | memoryview) -> None:
        """Take all of *data*, which is written at once if it is much.

        Raises:
            BrokenPipeError: it is a pipe that is not read any more.
            StorageFull, StorageError: the medium.
        """
        if len(self._buffer) + len(data) <= _BUFFER:
            self._buffer += data
            return
        self.flush()
        self._write(memoryview(data))

    def flush(self) -> None:
        """Write what was taken and is not written yet; raises as :meth:`write`."""
        kept, self._buffer = self._buffer, bytearray()
        self._write(memoryview(kept))

    def _write(self, data: memoryview) -> None:
        with _translated(self._name):
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except BlockingIOError:  # a pipe that its other users made so
                    waiting = select.poll()
                    waiting.register(self._fd, select.POLLOUT)
                    waiting.poll()


@contextmanager
def output(path: str | os.PathLike[str], mode: int | None = None) -> Iterator[Output]:
    """Write to *path*, or for ``-`` to standard output, in the block.

    Args:
        path: where to.
        mode: permissions of a new file; without it those that the umask leaves.  A file that is
            replaced keeps its permissions, extended attributes and, where this process may set
            them, owner and group.

    Raises:
        ConfigError: a directory, or in none that exists; or a database, such as a target's
            catalogue, which no command is to replace.
        PermissionDenied: the file may not be written, or no file be made in its directory; or
            another user made what is there, in a directory for everybody.
        StorageFull, StorageError: the medium.
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
    with _replacing(Path(place), name, mode) as fd:
        out = Output(fd, name, Path(place))
        yield out
        out.flush()


def write_file(path: str | os.PathLike[str], data: bytes, mode: int | None = None) -> Path | None:
    """Make *data* all that is at *path*; returns and raises as :func:`output` gives and does."""
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
    """*path* with its last component's symbolic links followed, but for those of /proc, which
    lead to what is open, wherever its name is now."""
    for _ in range(_MOST_LINKS):
        parent, last = os.path.split(path)
        path = os.path.join(os.path.realpath(parent), last)
        _refuse_planted(path, name)
        if not os.path.islink(path) or _DESCRIPTOR.fullmatch(path):
            return path
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _refuse_planted(path: str, name: str) -> None:
    """Refuse what another user may have put at *path* for this one to find."""
    try:
        found, above = os.lstat(path), os.stat(os.path.dirname(path))
    except FileNotFoundError:
        return
    shared = above.st_mode & stat.S_ISVTX and above.st_mode & stat.S_IWOTH
    if shared and found.st_uid not in (os.geteuid(), above.st_uid):
        raise PermissionDenied(
            f"{name}: {path} is another user's, in a directory where every user may make files"
        )


def _stream(path: str) -> int | None:
    """A descriptor of what is at *path*, if that exists and is no regular file."""
    found = _DESCRIPTOR.fullmatch(path)
    if found and path.startswith(f"/proc/{os.getpid()}/"):
        # Another description of a file that a shell opened would begin at its start.
        return os.dup(int(found[1]))
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(kind) and not found:
        return None
    return os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)


@contextmanager
def _replacing(path: Path, name: str, mode: int | None) -> Iterator[int]:
    """A descriptor of a temporary file that becomes *path* when the block ends well."""
    with _translated(name):
        try:
            old = os.stat(path)
        except FileNotFoundError:
            old = None
        if old is not None and not os.access(path, os.W_OK, effective_ids=True):
            raise PermissionDenied(f"{name}: may not be written by this user")
        if old is not None and _is_database(path):
            raise ConfigError(
                f"{name}: is a target, or another database, which is not replaced; remove it first"
                " if it is not needed any more"
            )
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        kept = old is not None or mode is not None
        part = path.with_name(f".warabi-{secrets.token_hex(8)}.part")
    fd = -1
    try:
        with _translated(name):
            try:
                fd = os.open(part, flags, PRIVATE if kept else _PUBLIC)
            except PermissionError:
                raise PermissionDenied(
                    f"{name}: this user may not make files in {path.parent}"
                ) from None
        yield fd
        with _translated(name):
            if old is not None:
                _take_over(fd, path, old)
            elif mode is not None:
                os.fchmod(fd, mode)
            _sync(fd)
            os.replace(part, path)
            _sync_directory(path.parent)
    finally:
        if fd >= 0:
            os.close(fd)
        with contextlib.suppress(OSError):
            part.unlink()


def _is_database(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(16).startswith(_DATABASES)
    except PermissionError:  # it may be written and not read
        return False


def _take_over(fd: int, path: Path, old: os.stat_result) -> None:
    """Give the file *fd* owner, permissions and attributes of the one that it is to replace."""
    mode = stat.S_IMODE(old.st_mode) & 0o777  # set-ID bits were for the old content
    new = os.fstat(fd)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.fchown(fd, old.st_uid, old.st_gid)
        except PermissionError:
            try:
                os.fchown(fd, -1, old.st_gid)
            except PermissionError:
                mode &= 0o707  # they were another group's
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
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # has no such thing
            raise


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # it may be written and not read
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _sync(fd)
        finally:
            os.close(fd)
