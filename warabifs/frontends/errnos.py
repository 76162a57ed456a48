"""The errno that a program gets for an exception: the only table of it, for every front end.

Exceptions of the library have an errno each; any other becomes ``EIO``, with a traceback in
the log.
"""

from __future__ import annotations

import errno
import logging
from typing import TypeGuard

from warabi import errors

log = logging.getLogger(__name__)

_ERRNO: dict[type[errors.Exception], int] = {
    errors.InvalidRegion: errno.ESTALE,
    errors.OutOfBounds: errno.EFBIG,  # offsets of the kernel are never negative
    errors.InvalidBuffer: errno.EINVAL,
    errors.ConfigError: errno.EINVAL,
    errors.ProviderNotFound: errno.ENXIO,
    errors.TargetNotFound: errno.ENXIO,
    errors.ConnectionFailed: errno.ENOTCONN,
    errors.ConnectionLost: errno.ENOTCONN,
    errors.ProtocolError: errno.EPROTO,
    errors.TimedOut: errno.ETIMEDOUT,
    errors.StorageFull: errno.ENOSPC,
    errors.StorageError: errno.EIO,
    errors.CorruptTarget: errno.EIO,
    errors.PermissionDenied: errno.EACCES,
    errors.TargetBusy: errno.EBUSY,
    errors.ProviderFailed: errno.EIO,
}
UNKNOWN_EFFECT = (errors.ConnectionLost, errors.TimedOut)
"""Raised when a reply was lost, and it is unknown whether the request took effect."""
_QUIET = (errors.InvalidRegion, errors.OutOfBounds, errors.StorageFull)
_ERRNOS = 512
"""Errnos from here on are internal to the kernel."""


def is_errno(number: object) -> TypeGuard[int]:
    """Whether *number* may be in a reply.  The kernel rejects a reply with any other number, and
    the program would wait forever."""
    return isinstance(number, int) and 0 < number < _ERRNOS


def errno_of(error: Exception, what: str) -> int:
    """Return the errno for *error*; logs errors that the errno does not explain."""
    if isinstance(error, OSError) and is_errno(error.errno):  # includes PathError of a provider
        return error.errno
    number = _ERRNO.get(type(error))  # type: ignore[arg-type]  # a miss for classes of others
    if number is None:
        log.error("unhandled exception in %s", what, exc_info=error)
        return errno.EIO
    if not isinstance(error, _QUIET):
        log.error("%s: %s", what, error)
    return number
