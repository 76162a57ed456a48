"""Storing a region's times in an extended attribute of its file, so that a single ``fsync`` of the
file persists both data and times."""

from __future__ import annotations

import errno
import os
import struct
from typing import NamedTuple

_NAME = "user.warabi.times"
_FORMAT = struct.Struct("<qq")
_NONE = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOENT)


class Times(NamedTuple):
    """Modification and change time of a region, in ns since the epoch."""

    mtime: int
    ctime: int


def put(fd: int, times: Times) -> None:
    """Store *times*."""
    os.setxattr(fd, _NAME, _FORMAT.pack(*times))


def get(file: str | int) -> Times | None:
    """Return the stored times; None if there are none."""
    try:
        return Times(*_FORMAT.unpack(os.getxattr(file, _NAME)))
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise
    except struct.error:  # written by another program
        return None


def copy(source: int, target: int) -> None:
    """Copy the stored times from *source* to *target*."""
    times = get(source)
    if times is not None:
        put(target, times)
