"""The buffer protocol at the library's edge: any contiguous buffer in, a flat byte view out."""

from __future__ import annotations

import errno
import io
import operator
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from warabi.errors import InvalidBuffer, OutOfBounds, path_error

MAX_SIZE = (1 << 63) - 1
"""The largest size and offset, in bytes: what a Linux ``off_t`` holds."""
PATH_LIMIT = 64 * 1024
"""Bytes in a path; far more than system calls take, and less than a message holds."""
_FLAT = (bytes, bytearray)
"""What has no other view than a flat one of bytes, and what most buffers are."""


def readable(data: Any, what: str) -> memoryview:
    """A flat, contiguous byte view of *data*, without a copy.

    Raises:
        InvalidBuffer: *data* has no buffer, or its elements are not C-contiguous.
    """
    if type(data) in _FLAT:
        return memoryview(data)
    try:
        view = memoryview(data)
    except TypeError:
        name = type(data).__name__
        raise InvalidBuffer(f"{what}: expected an object with a buffer, got {name}") from None
    except (ValueError, BufferError) as error:  # closed, released, or not to be lent
        if getattr(getattr(data, "dtype", None), "kind", None) not in ("M", "m"):
            raise InvalidBuffer(f"{what}: {error}") from None
        view = memoryview(data.view("i8"))  # NumPy lends its dates and durations as integers only
    if view.ndim == 1 and view.format == "B" and view.contiguous:
        return view
    if "O" in re.sub(":[^:]*:", "", view.format):  # a field's name may have any letters
        raise InvalidBuffer(f"{what}: the buffer holds references to objects, not bytes")
    if not view.c_contiguous:
        raise InvalidBuffer(
            f"{what}: the buffer is not C-contiguous (shape {view.shape}, strides {view.strides})"
        )
    if view.nbytes == 0:
        return memoryview(b"") if view.readonly else memoryview(bytearray())
    return view.cast("B")


def writable(data: Any, what: str) -> memoryview:
    """As :func:`readable`, for a destination.

    Raises:
        InvalidBuffer: as :func:`readable`, or *data* is read-only.
    """
    view = memoryview(data) if type(data) is bytearray else readable(data, what)
    if view.readonly:
        raise InvalidBuffer(f"{what}: the destination buffer is read-only")
    return view


def checked_size(value: Any, what: str) -> int:
    """*value* as a size or offset in bytes.

    Raises:
        OutOfBounds: not an integer, negative, or beyond 2**63 - 1.
    """
    if type(value) is int and 0 <= value <= MAX_SIZE:
        return value
    # NumPy integers count; a bool or a float is somebody's mistake.
    try:
        if isinstance(value, bool):
            raise TypeError
        size = int(operator.index(value))
    except TypeError:
        raise OutOfBounds(f"{what} must be an integer number of bytes, got {value!r}") from None
    if not 0 <= size <= MAX_SIZE:
        raise OutOfBounds(f"{what} must be between 0 and {MAX_SIZE} bytes, got {size}")
    return size


def checked_path(value: Any, what: str) -> str:
    """*value* as a path in a target's tree of names, in the form that crosses the wire.

    Raises:
        PathError: with ``errno`` EINVAL, no path or one that no file name can spell; or
            ENAMETOOLONG.
    """
    try:
        path = os.fsdecode(value)
        size = len(os.fsencode(path))
    except (TypeError, UnicodeError) as error:
        raise path_error(errno.EINVAL, f"{what} {value!r:.100}: {error}") from None
    if size > PATH_LIMIT:
        raise path_error(errno.ENAMETOOLONG, f"{what}: {size} bytes, at most {PATH_LIMIT}")
    return path


class Copied(bytearray):
    """As ``BytesIO``, as far as :func:`filled_bytes` needs that, with a copy made at the end."""

    def getbuffer(self) -> memoryview:
        return memoryview(self)

    def getvalue(self) -> bytes:
        return bytes(self)


# Python 3.12.0 and 3.12.1 crash when they collect a cycle that has a view of a BytesIO.
Lender: Callable[[bytes], io.BytesIO | Copied] = (
    Copied if (3, 12) <= sys.version_info < (3, 12, 2) else io.BytesIO
)
"""What lends its buffer out writable, and hands it back as bytes."""


def filled_bytes(size: int, fill: Callable[[memoryview], None]) -> bytes:
    """Immutable bytes of *size*, filled in place by *fill*: no second copy.

    ``BytesIO`` owns the only reference to its buffer here, lends it out writable, and hands it
    back as bytes.
    """
    owner = Lender(bytes(size))
    try:
        with owner.getbuffer() as view:
            fill(view)
    except BaseException:
        abandon(owner)
        raise
    return owner.getvalue()


def abandon(owner: io.BytesIO | Copied) -> None:
    """Have *owner* be collected in silence, although parts of its view may still be there.

    The exception's traceback holds them; when that is part of a cycle, all are collected together.
    The finalizer of a ``BytesIO`` closes it, which fails while there are views, and Python says
    so from 3.13 on.
    """
    vars(owner)["close"] = _nothing


def _nothing() -> None:
    pass
