"""NumPy arrays as regions, in the ``.npy`` file format.

This module does no I/O, so that blocking and Trio clients share it.  NumPy is imported when an
array is first stored or fetched.
"""

from __future__ import annotations

import builtins
import io
import math
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from warabi.errors import Exception, InvalidBuffer

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC = b"\x93NUMPY"
_FIXED = len(_MAGIC) + 2
_LENGTHS = {(1, 0): "<H", (2, 0): "<I", (3, 0): "<I"}
"""The format of the length of the rest of the header, by the version of the format."""
_ALIGNMENT = 64  # of the data, so that they can be mapped from a file and used as they are
_LONGEST_HEADER = 1 << 20
_PIECE = 1 << 22  # bytes of a strided array to gather at a time
PREFIX = 1 << 16
"""Bytes of the first transfer, which is sufficient for small arrays."""


class NotAnArray(Exception, ValueError):
    """The region does not contain an array, or one that cannot be created without executing its
    code."""


def encode(array: Any) -> tuple[int, Iterator[tuple[int, memoryview]]]:
    """Return the size in bytes of *array*'s region, and an iterator of offsets and data.

    A contiguous array, in C or Fortran order, is not copied, and keeps its order; of others a few
    megabytes are copied at a time.

    Raises:
        InvalidBuffer: an array of objects or of a type that cannot be described, a masked one, or
            not an array.
    """
    import numpy
    from numpy.lib import format as npy

    if not isinstance(array, numpy.ndarray | numpy.generic):
        raise InvalidBuffer(f"put_array: expected a NumPy array, got {type(array).__name__}")
    if isinstance(array, numpy.ma.MaskedArray):
        raise InvalidBuffer("put_array: a masked array would lose its mask")
    array = numpy.asarray(array)
    if array.dtype.hasobject:
        raise InvalidBuffer(f"put_array: dtype {array.dtype} holds references to objects")
    try:
        fields = npy.header_data_from_array_1_0(array)
        if npy.descr_to_dtype(fields["descr"]) != array.dtype:
            raise ValueError("the description does not restore the same dtype")
    except (ValueError, TypeError) as error:
        raise InvalidBuffer(f"put_array: dtype {array.dtype}: {error}") from None
    header = _header(fields)
    if len(header) > _LONGEST_HEADER:
        raise InvalidBuffer(
            f"put_array: the description of its dtype is too long: {len(header)} bytes"
        )
    ordered = array.T if fields["fortran_order"] else array
    return len(header) + array.nbytes, _pieces(header, ordered)


def _header(fields: dict[str, Any]) -> bytes:
    body = ascii(dict(sorted(fields.items()))).encode()
    version = (1, 0) if len(body) < 0xFF00 else (2, 0)
    length = _LENGTHS[version]
    before = _FIXED + struct.calcsize(length)
    body += b" " * (-(before + len(body) + 1) % _ALIGNMENT) + b"\n"
    return _MAGIC + bytes(version) + struct.pack(length, len(body)) + body


def _pieces(header: bytes, array: NDArray[Any]) -> Iterator[tuple[int, memoryview]]:
    yield 0, memoryview(header)
    if array.flags.c_contiguous or not array.nbytes:
        yield len(header), _flat(array)
        return
    import numpy

    offset = len(header)
    pieces = numpy.nditer(  # type: ignore[call-overload]  # NumPy's types lack "contig"
        array,
        flags=["external_loop", "buffered"],
        op_flags=[["readonly", "contig"]],
        order="C",
        buffersize=max(1, _PIECE // array.itemsize),
    )
    for piece in pieces:
        view = _flat(numpy.asarray(piece))
        yield offset, view
        offset += len(view)


def _flat(array: NDArray[Any]) -> memoryview:
    """Return the bytes of a C-contiguous array, without copying."""
    return array.reshape(-1).view("u1").data if array.nbytes else memoryview(bytearray())


def data_offset(region: object, size: int, prefix: bytes) -> int:
    """Return the offset of an array's data, which may be beyond *prefix*.

    Args:
        region: for messages.
        size: of the region, in bytes.
        prefix: its first bytes, at least ``PREFIX`` of them or all.

    Raises:
        NotAnArray: the region contains something else.
    """
    if prefix[: len(_MAGIC)] != _MAGIC or len(prefix) < _FIXED + 4:
        raise NotAnArray(
            f"get_array {region!r}: its {size} bytes do not start with the header of an array"
        )
    version = (prefix[_FIXED - 2], prefix[_FIXED - 1])
    if version not in _LENGTHS:
        raise NotAnArray(
            f"get_array {region!r}: version {version} of the array format is not supported"
        )
    length = _LENGTHS[version]
    offset: int = _FIXED + struct.calcsize(length) + struct.unpack_from(length, prefix, _FIXED)[0]
    if offset > min(size, _LONGEST_HEADER):
        raise NotAnArray(f"get_array {region!r}: a header of {offset} bytes, the region has {size}")
    return offset


def decode(region: object, size: int, header: bytes) -> tuple[NDArray[Any], memoryview]:
    """Return an array to be filled, and its bytes.

    Args:
        region: for messages.
        size: of the region, in bytes.
        header: its bytes up to :func:`data_offset`.

    Raises:
        NotAnArray: the header does not describe an array, or one that exceeds the region.
    """
    import numpy
    from numpy.lib import format as npy

    version, rest = header[_FIXED - 2], header[_FIXED:]
    read = npy.read_array_header_1_0 if version == 1 else npy.read_array_header_2_0
    try:
        if version == 3:  # as version 2, but in UTF-8; NumPy has no public function for it
            text = rest[4:].decode().encode("latin-1", "backslashreplace")
            rest = struct.pack("<I", len(text)) + text
        shape, fortran, dtype = read(io.BytesIO(rest), max_header_size=len(rest))
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"shape {shape!r}")
        needed = dtype.itemsize * math.prod(shape)
    except (builtins.Exception, MemoryError) as error:  # any error of an invalid header
        raise NotAnArray(f"get_array {region!r}: its header: {error}") from None
    if dtype.hasobject:
        raise NotAnArray(f"get_array {region!r}: dtype {dtype} holds references to objects")
    if needed > size - len(header):
        raise NotAnArray(
            f"get_array {region!r}: an array of {needed} bytes, it has {size - len(header)}"
        )
    try:
        array = numpy.empty(shape, dtype, "F" if fortran else "C")
    except ValueError as error:  # too many dimensions, or too large a shape without data
        raise NotAnArray(f"get_array {region!r}: {error}") from None
    return array, _flat(array.T if fortran else array)


__all__ = ["PREFIX", "NotAnArray", "data_offset", "decode", "encode"]
