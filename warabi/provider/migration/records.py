"""Contents of a migration's messages: rows of the catalogue, and chunks of regions.

The sender may be any peer with permission to send a target, so everything is validated here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgpack

from warabi.errors import PathError, ProtocolError
from warabi.metadata import domain
from warabi.region import RegionID

TABLES: dict[str, tuple[str, ...]] = {
    "inode": domain.Row._fields[:-1],  # but whether it is packed
    "dentry": ("parent", "name", "ino"),
    "xattr": ("ino", "name", "value"),
}
"""The catalogue's tables that are migrated, in this order, with their columns."""

_PIECE = struct.Struct("<16sQI?")  # region, offset, length, whether all bytes are zero
PIECE_HEADER = _PIECE.size
_BYTES = {"name", "value"}


class Piece(NamedTuple):
    """A chunk of a region; *data* is None if all bytes are zero."""

    region: RegionID
    offset: int
    length: int
    data: memoryview | None


def put_header(
    place: memoryview, at: int, region: bytes, offset: int, length: int, zero: bool
) -> None:
    """Write the header of a chunk, ``PIECE_HEADER`` bytes."""
    _PIECE.pack_into(place, at, region, offset, length, zero)


def pieces(payload: memoryview) -> Iterator[Piece]:
    """Yield the chunks of a message.

    Raises:
        ProtocolError: it is malformed.
    """
    at = 0
    while at < len(payload):
        if at + PIECE_HEADER > len(payload):
            raise ProtocolError("receive_data: a chunk without its header")
        rid, offset, length, zero = _PIECE.unpack_from(payload, at)
        at += PIECE_HEADER
        data = None if zero else payload[at : at + length]
        if data is not None and len(data) != length:
            raise ProtocolError(f"receive_data: a chunk of {length} bytes has {len(data)}")
        yield Piece(RegionID(rid), offset, length, data)
        at += 0 if zero else length


def pack_row(row: Sequence[Any]) -> bytes:
    packed: bytes = msgpack.packb(row, use_bin_type=True)
    return packed


def join_rows(packed: Sequence[bytes]) -> memoryview:
    """Return a message of individually packed rows."""
    header: bytes = msgpack.Packer().pack_array_header(len(packed))
    return memoryview(header + b"".join(packed))


def rows(table: str, payload: memoryview) -> list[list[Any]]:
    """Validate the rows of *table* in a message.

    Raises:
        ProtocolError: they are malformed or invalid.
    """
    columns = TABLES.get(table)
    if columns is None:
        raise ProtocolError(f"receive_rows: unknown table {table!r:.60}")
    try:
        found = msgpack.unpackb(payload, raw=False)  # bounded by the message's size
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"receive_rows: malformed rows of {table}: {error}") from None
    if not isinstance(found, list):
        raise ProtocolError(f"receive_rows: not rows of {table}: {found!r:.100}")
    for row in found:
        if not (isinstance(row, list) and len(row) == len(columns)):
            raise ProtocolError(f"receive_rows: not a row of {table}: {row!r:.100}")
        _check_types(table, columns, row)
    if table == "inode":
        return [_inode(row) for row in found]
    for row in found:
        try:
            if table == "dentry":
                domain.name(row[1])
            else:
                domain.xattr(row[1], row[2])
        except PathError as error:
            raise ProtocolError(f"receive_rows: {table} {row!r:.200}: {error}") from None
    return found


def _check_types(table: str, columns: tuple[str, ...], row: list[Any]) -> None:
    for column, value in zip(columns, row, strict=True):
        if column in ("atime", "mtime", "ctime", "btime") and type(value) is int:
            continue  # clamped below
        if column == "target":
            good = value is None or isinstance(value, bytes)
        elif column in _BYTES:
            good = isinstance(value, bytes)
        else:
            good = type(value) is int and -(1 << 63) <= value < 1 << 63
        if not good:
            raise ProtocolError(f"receive_rows: {table}.{column} cannot be {value!r:.60}")


def _inode(values: list[Any]) -> list[Any]:
    """Validate the row of an inode, and clamp its times."""
    values[8:11] = (
        domain.clamped(values[8]),
        domain.clamped(values[9]),
        domain.clamped_change(values[10]),
    )
    values[13] = domain.clamped(values[13])
    why = domain.fault(values)
    if why:
        raise ProtocolError(f"receive_rows: inode {values!r:.200}: {why}")
    return values
