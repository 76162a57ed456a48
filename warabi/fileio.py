"""Reading and writing at an offset, all of it."""

from __future__ import annotations

import os


def pread_full(fd: int, out: memoryview, offset: int, flags: int = 0) -> int:
    """Fill *out* from *offset* of *fd*; returns how many bytes, fewer only at the file's end."""
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:] if done else out], offset + done, flags)
        if count == 0:
            break
        done += count
    return done


def pwrite_full(fd: int, data: memoryview, offset: int) -> None:
    """Write all of *data* at *offset* of *fd*."""
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
