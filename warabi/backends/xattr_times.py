"""A region's times in an extended attribute of its file, which the file system puts on the
medium together with the bytes: ``fsync`` of the file is all that it takes to keep both."""

from __future__ import annotations

import errno
import os
import struct
from typing import NamedTuple

_NAME = "user.warabi.times"
_FORMAT = struct.Struct("<qq")
_NONE = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOENT)


class Times(NamedTuple):
    """When a region's bytes and when anything of it changed last, in ns since the epoch."""

    mtime: int
    ctime: int


def put(fd: int, times: Times) -> None:
    """Keep *times* instead of what was kept."""
    os.setxattr(fd, _NAME, _FORMAT.pack(*times))


def get(file: str | int) -> Times | None:
    """The times that are kept; None when there are none."""
    try:
        return Times(*_FORMAT.unpack(os.getxattr(file, _NAME)))
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise
    except struct.error:  # somebody else's
        return None


def copy(source: int, target: int) -> None:
    """Have *target* keep what *source* keeps."""
    times = get(source)
    if times is not None:
        put(target, times)
