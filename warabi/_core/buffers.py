"""Buffers of the public API: any contiguous buffer in, a flat byte view out."""

from __future__ import annotations

import errno
import io
import operator
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from warabi.errors import InvalidBuffer, OutOfBounds, path_error

if TYPE_CHECKING:
    from typing_extensions import Buffer  # known to type checkers, installed or not

    class _Array(Protocol):
        """NumPy's arrays, which are known to export a buffer only from Python 3.12 on."""

        @property
        def __array_interface__(self) -> dict[str, Any]: ...

    Data: TypeAlias = Buffer | _Array
else:
    Data = Any  # what type hints of the API evaluate to, on Python 3.11 too

MAX_SIZE = (1 << 63) - 1
"""The largest size and offset in bytes: the maximum of a Linux ``off_t``."""
PATH_LIMIT = 64 * 1024
"""Most bytes of a path; far more than system calls accept, and less than a message holds."""
_FLAT = (bytes, bytearray)
"""The most common types, whose views are always flat bytes."""


def readable(data: Any, what: str) -> memoryview:
    """Return a flat, contiguous byte view of *data*, without copying.

    Raises:
        InvalidBuffer: *data* has no buffer, or is not C-contiguous.
    """
    if type(data) in _FLAT:
        return memoryview(data)
    try:
        view = memoryview(data)
    except TypeError:
        name = type(data).__name__
        raise InvalidBuffer(f"{what}: expected an object with a buffer, got {name}") from None
    except (ValueError, BufferError) as error:  # closed, released, or not exportable
        if getattr(getattr(data, "dtype", None), "kind", None) not in ("M", "m"):
            raise InvalidBuffer(f"{what}: {error}") from None
        view = memoryview(data.view("i8"))  # NumPy exports dates only as integers
    if view.ndim == 1 and view.format == "B" and view.contiguous:
        return view
    if "O" in re.sub(":[^:]*:", "", view.format):  # field names may contain any letter
        raise InvalidBuffer(f"{what}: the buffer holds references to objects, not bytes")
    if not view.c_contiguous:
        raise InvalidBuffer(
            f"{what}: the buffer is not C-contiguous (shape {view.shape}, strides {view.strides})"
        )
    if view.nbytes == 0:
        return memoryview(b"") if view.readonly else memoryview(bytearray())
    return view.cast("B")


def writable(data: Any, what: str) -> memoryview:
    """The same as :func:`readable`, for a destination.

    Raises:
        InvalidBuffer: as :func:`readable`, or *data* is read-only.
    """
    view = memoryview(data) if type(data) is bytearray else readable(data, what)
    if view.readonly:
        raise InvalidBuffer(f"{what}: the destination buffer is read-only")
    return view


def checked_size(value: Any, what: str) -> int:
    """Check a size or offset in bytes.

    Raises:
        OutOfBounds: not an integer, negative, or beyond 2**63 - 1.
    """
    if type(value) is int and 0 <= value <= MAX_SIZE:
        return value
    # NumPy integers are accepted; a bool or float is probably a bug of the caller.
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
    """Check a path in a target's tree; returns it as it is sent in messages.

    Raises:
        PathError: with ``errno`` EINVAL, not a path, or it cannot be encoded as a file name; or
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


def xattr_call(ino: int, name: str | bytes, value: Any, flags: int) -> tuple[Any, ...]:
    """Return the operation that sets an extended attribute with the *flags* of setxattr(2), and its
    arguments.

    Raises:
        InvalidBuffer: as :func:`readable`, for *value*.
    """
    arguments = ino, os.fsencode(name), bytes(readable(value, "setxattr")), True
    return ("setxattr_if", *arguments, flags) if flags else ("setxattr", *arguments)


def filled_bytes(size: int, fill: Callable[[memoryview], None]) -> bytes:
    """Return immutable bytes of *size*, filled in place by *fill* without a second copy.

    ``BytesIO`` owns the only reference to its buffer here, exports it writable, and returns it as
    bytes.
    """
    owner = io.BytesIO(bytes(size))
    try:
        with owner.getbuffer() as view:
            fill(view)
    except BaseException:
        abandon(owner)
        raise
    return owner.getvalue()


def abandon(owner: io.BytesIO) -> None:
    """Let *owner* be collected without a warning although views of its buffer may still exist.

    The exception's traceback references them; if it is part of a cycle, all are collected together.
    The finalizer of a ``BytesIO`` closes it, which fails while there are views; Python reports that
    from 3.13 on.
    """
    vars(owner)["close"] = _nothing


def _nothing() -> None:
    pass
