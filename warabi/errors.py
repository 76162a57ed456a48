"""The exceptions of the library, and their encoding in replies.

One table maps a class to its code in messages, in both directions.  A class that is not in the
table cannot be sent: the provider sends it as ``ProviderFailed`` and logs it.
"""

from __future__ import annotations

import builtins
import errno
import os


class Exception(builtins.Exception):
    """Base class of the library's exceptions.

    The message names the operation, the region or path, and the numbers involved.
    """


class InvalidRegion(Exception, ValueError):
    """The region is unknown, erased, or belongs to another target."""


class OutOfBounds(Exception, ValueError):
    """An extent exceeds its region, or a number is negative or not an integer."""


class InvalidBuffer(Exception, TypeError, BufferError):
    """The object has no buffer, or one that is not contiguous, or is read-only as a destination."""


class ConfigError(Exception, ValueError):
    """A configuration, an address or a target path cannot be used as given."""


class ProviderNotFound(Exception):
    """There is no provider with that ID at that address."""


class TargetNotFound(Exception):
    """The handle or provider has no target."""


class ConnectionFailed(Exception):
    """A connection could not be opened."""


class ConnectionLost(Exception):
    """The connection ended before the reply arrived; the operation may have taken effect."""


class ProtocolError(Exception):
    """The peer does not speak this protocol, or violated it."""


class TimedOut(Exception):
    """No reply in time; the operation may still take effect.

    Attributes:
        alone: whether other requests on the same connection are completed.
        unsent: whether it was not sent, since its caller was cancelled.
    """

    alone = False
    unsent = False


class StorageFull(Exception):
    """The storage, or the target's quota, is exhausted."""


class StorageError(Exception):
    """An I/O error of the storage."""


class CorruptTarget(Exception):
    """The target is damaged."""


class BadArchive(Exception, ValueError):
    """An archive of a target is damaged, truncated, or not an archive."""


class PermissionDenied(Exception):
    """Not allowed."""


class TargetBusy(Exception):
    """The target is open in another process."""


class ProviderFailed(Exception):
    """Unhandled exception in the provider; its log has the traceback."""


class PathError(Exception, OSError):
    """An operation on a name in the target's tree failed; ``errno`` tells why, as for a file.

    It is also Python's own error for that number: ``except FileNotFoundError`` catches ENOENT.
    """

    def __new__(cls, number: int, message: str) -> PathError:
        return super().__new__(_BY_ERRNO.get(number, cls), number, message)

    def __init__(self, number: int, message: str) -> None:
        OSError.__init__(self, number, message)

    def __str__(self) -> str:
        return str(self.strerror)


class PathNotFound(PathError, FileNotFoundError):
    """ENOENT: there is no such name."""


class PathExists(PathError, FileExistsError):
    """EEXIST: the name exists."""


class PathNotADirectory(PathError, NotADirectoryError):
    """ENOTDIR: a component of the path is not a directory."""


class PathIsADirectory(PathError, IsADirectoryError):
    """EISDIR: a directory has the name."""


class PathNotPermitted(PathError, PermissionError):
    """EPERM or EACCES."""


_BY_ERRNO: dict[int, type[PathError]] = {
    errno.ENOENT: PathNotFound,
    errno.EEXIST: PathExists,
    errno.ENOTDIR: PathNotADirectory,
    errno.EISDIR: PathIsADirectory,
    errno.EPERM: PathNotPermitted,
    errno.EACCES: PathNotPermitted,
}


class WouldBlock(builtins.Exception):
    """Internal: a ``*_nowait`` call would have to wait.  Never leaves the library."""


class Lengthy(builtins.Exception):
    """Internal: a call would exceed its limit on steps, and has had no effect.  Never leaves the
    library."""


_BY_CODE: dict[str, type[Exception]] = {
    "region": InvalidRegion,
    "bounds": OutOfBounds,
    "buffer": InvalidBuffer,
    "config": ConfigError,
    "provider": ProviderNotFound,
    "target": TargetNotFound,
    "connect": ConnectionFailed,
    "lost": ConnectionLost,
    "protocol": ProtocolError,
    "timeout": TimedOut,
    "full": StorageFull,
    "storage": StorageError,
    "corrupt": CorruptTarget,
    "archive": BadArchive,
    "denied": PermissionDenied,
    "busy": TargetBusy,
    "failed": ProviderFailed,
    "path": PathError,
}
_CODES: dict[type[Exception], str] = {cls: code for code, cls in _BY_CODE.items()}

_LONGEST = 8192
"""Most characters of a message in a reply: it may quote arguments of any length."""
Failure = tuple[str, str, int]
"""An error in a reply: code, message, errno (0 except for ``path``)."""


def to_wire(error: Exception) -> Failure:
    """Encode *error* for a reply."""
    if isinstance(error, PathError):
        return "path", str(error)[:_LONGEST], error.errno or 0
    return _CODES.get(type(error), "failed"), str(error)[:_LONGEST], 0


def from_wire(code: str, message: str, number: int) -> Exception:
    """Decode an error in a reply; an unknown code becomes ``ProviderFailed``."""
    if code == "path":
        return path_error(number, message)
    return _BY_CODE.get(code, ProviderFailed)(message)


def path_error(number: int, message: str = "") -> PathError:
    """Return a ``PathError``; without *message* it has the system's message for errno *number*."""
    return PathError(number, message or os.strerror(number))


def from_os(error: OSError, what: str) -> Exception:
    """Convert the error of a system call; *what* names the operation."""
    text = f"{what}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        return StorageFull(text)
    if error.errno in (errno.EMFILE, errno.ENFILE):  # not a lack of storage
        return StorageError(f"{text}; raise the limit on open files (ulimit -n)")
    if error.errno == errno.EFBIG:
        return OutOfBounds(f"{text}: beyond the largest file of the file system")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied(text)
    return StorageError(text)
