"""The contents of a migration: rows of the catalogue and regions, page by page.

For a target whose changes are blocked.  Open inodes without names are not migrated.  The target's
lock is held for a page at a time.
"""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from typing import Any

from warabi.metadata.journal import translate
from warabi.provider.migration.records import TABLES
from warabi.region import RegionID
from warabi.target.extents import seek
from warabi.target.target import Target

_PAGE = 1000  # rows
_HOLES = 64 * 1024  # size from which on holes of a region are looked for
_MOVES = "(nlink > 0 OR anonymous = 1)"
_REGULAR = f"mode & {0o170000} = {stat.S_IFREG} AND {_MOVES}"
# Each table's key, and the condition for rows to migrate.
_KEYS = {
    "inode": (("ino",), _MOVES),
    "dentry": (("parent", "name"), "1"),
    "xattr": (
        ("ino", "name"),
        f"EXISTS(SELECT 1 FROM inode i WHERE i.ino = xattr.ino AND {_MOVES})",
    ),
}


def totals(target: Target) -> tuple[int, int]:
    """Return the number of regions to migrate, and their total bytes."""
    sql = f"SELECT count(*), coalesce(sum(size), 0) FROM inode WHERE {_REGULAR}"
    regions, used = _page(target, sql)[0]
    return regions, used


def rows(target: Target, table: str) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table of the catalogue, by their key."""
    columns = TABLES[table]
    key, moves = _KEYS[table]
    last: tuple[Any, ...] = (-1, b"")[: len(key)]
    sql = (
        f"SELECT {', '.join(columns)} FROM {table} WHERE {moves} AND"
        f" ({', '.join(key)}) > ({', '.join('?' * len(key))}) ORDER BY {', '.join(key)} LIMIT ?"
    )
    while page := _page(target, sql, *last, _PAGE):
        yield from page
        last = tuple(page[-1][columns.index(column)] for column in key)


def regions(target: Target) -> Iterator[tuple[RegionID, int]]:
    """Yield the ID and the size of each region, by slot."""
    sql = (
        f"SELECT ino, generation, size FROM inode WHERE ino > ? AND {_REGULAR} ORDER BY ino LIMIT ?"
    )
    last = 0
    while page := _page(target, sql, last, _PAGE):
        for ino, generation, size in page:
            yield RegionID.from_parts(ino, generation), size
        last = page[-1][0]


def next_data(target: Target, region: RegionID, offset: int, size: int) -> tuple[int, int]:
    """Return start and end of the first data of a region of *size* bytes from *offset* on; *size*
    twice if there is only a hole.  Holes of small regions are data: they are read sooner."""
    if size < _HOLES:
        return offset, size
    start = seek(target, region, offset, False)
    if start is None:
        return size, size
    return start, seek(target, region, start, True) or size


def _page(target: Target, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    with target.state.guard.lock, target.state.guard.checked:
        try:
            target.state.catalogue.flush()
            target.state.catalogue.check_stored()  # otherwise it would be missing
            return target.state.catalogue.rows(sql, values)
        except sqlite3.Error as error:
            raise translate(error, target.state.catalogue.path) from error
