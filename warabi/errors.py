"""Everything the library raises, and how it travels.

One table maps a class to its code on the wire, in both directions.  A class that is not in
the table cannot cross the wire: the provider sends it as ``ProviderFailed`` and logs it.
"""

from __future__ import annotations

import builtins
import errno
import os


class Exception(builtins.Exception):
    """Base of everything that the library raises.

    The message names the operation, the region or path, and the numbers involved.
    """


class InvalidRegion(Exception, ValueError):
    """The region is unknown, erased, or belongs to another target."""


class OutOfBounds(Exception, ValueError):
    """An extent leaves its region, or a number is negative or no integer."""


class InvalidBuffer(Exception, TypeError, BufferError):
    """The object has no buffer, or one that is not contiguous, or is read-only as a destination."""


class ConfigError(Exception, ValueError):
    """A configuration, an address or a target path cannot be used as given."""


class ProviderNotFound(Exception):
    """Nothing serves that provider ID at that address."""


class TargetNotFound(Exception):
    """The handle or provider has no target."""


class ConnectionFailed(Exception):
    """No connection could be made."""


class ConnectionLost(Exception):
    """The connection ended before the answer came; the operation may have taken effect."""


class ProtocolError(Exception):
    """The peer does not speak this protocol, or broke one of its rules."""


class TimedOut(Exception):
    """No answer in time; the operation may still take effect.

    Attributes:
        alone: whether other requests are answered, on the connection on which this one is not.
        unsent: whether it was not sent, since its caller was gone.
    """

    alone = False
    unsent = False


class StorageFull(Exception):
    """The medium or the target's quota has no room."""


class StorageError(Exception):
    """The medium failed."""


class CorruptTarget(Exception):
    """The target is damaged."""


class BadArchive(Exception, ValueError):
    """An archive of a target is damaged, cut off, or none."""


class PermissionDenied(Exception):
    """Not allowed."""


class TargetBusy(Exception):
    """The target is open in another process."""


class ProviderFailed(Exception):
    """Unhandled exception in the provider; its log has the traceback."""


class PathError(Exception, OSError):
    """A name in the target's tree cannot be used so; ``errno`` says why, as for a file."""

    def __init__(self, number: int, message: str) -> None:
        OSError.__init__(self, number, message)

    def __str__(self) -> str:
        return str(self.strerror)


class WouldBlock(builtins.Exception):
    """Internal: a ``*_nowait`` call would have to wait.  Never leaves the library."""


class Lengthy(builtins.Exception):
    """Internal: a call would take more steps than it was allowed, and has done nothing.  Never
    leaves the library."""


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
"""Characters of a message on the wire: one may repeat what it is about, of any length."""
Failure = tuple[str, str, int]
"""A failure on the wire: code, message, errno (0 but for ``path``)."""


def to_wire(error: Exception) -> Failure:
    """*error* as the three values that a failure reply carries."""
    number = error.errno or 0 if isinstance(error, PathError) else 0
    return _CODES.get(type(error), "failed"), str(error)[:_LONGEST], number


def from_wire(code: str, message: str, number: int) -> Exception:
    """The exception that a failure reply stands for; an unknown code is a ``ProviderFailed``."""
    if code == "path":
        return path_error(number, message)
    return _BY_CODE.get(code, ProviderFailed)(message)


def path_error(number: int, message: str = "") -> PathError:
    """A ``PathError`` with the system's words for errno *number* when *message* is empty."""
    return PathError(number, message or os.strerror(number))


def from_os(error: OSError, what: str) -> Exception:
    """The library's exception for a failed system call; *what* names the operation."""
    text = f"{what}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        return StorageFull(text)
    if error.errno in (errno.EMFILE, errno.ENFILE):  # the medium has room
        return StorageError(f"{text}; raise the limit on open files (ulimit -n)")
    if error.errno == errno.EFBIG:
        return OutOfBounds(f"{text}: beyond the largest file of the file system")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied(text)
    return StorageError(text)
