"""The rows of the catalogue with checksums of blocks of regions.

A row has the checksum of a block as it was last persisted.  A region is *unsettled* while its data
on stable storage may be newer than its rows: it is marked so durably before any such data are
written.  Only in a region that is not unsettled does a checksum mismatch mean damage.

Every call is made with the target's lock held, as for the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from warabi.errors import ConfigError
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.inode import Inode

BLOCK = 64 * 1024
"""Bytes covered by one checksum."""
ALGORITHM = f"xxh3_64/{BLOCK}"
"""The name of the algorithm in the catalogue."""


def digest() -> Callable[[memoryview], int]:
    """Return the function that computes the checksum of a block.

    Raises:
        ConfigError: the library for it is not installed.
    """
    try:
        import xxhash
    except ImportError:
        raise ConfigError(
            "checksums: the package xxhash is missing, install warabifs[checksums]"
        ) from None

    def value(data: memoryview) -> int:
        number: int = xxhash.xxh3_64_intdigest(data)
        return number - (1 << 64) if number >> 63 else number  # SQLite's integers are signed

    return value


class SumRows:
    """The checksums and unsettled marks of one catalogue."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def enable(self, on: bool) -> None:
        """Enable checksums, or disable and delete them; a no-op if nothing changes."""
        catalogue = self._catalogue
        if catalogue.summed == (ALGORITHM if on else None):
            return
        for table in ("checksum", "unsettled", "meta WHERE key = 'checksums'"):
            catalogue.write(f"DELETE FROM {table}", ())
        if on:
            catalogue.write("INSERT INTO meta VALUES('checksums', ?)", (ALGORITHM,))
        catalogue.summed = ALGORITHM if on else None
        catalogue.change += 1
        catalogue.sync(catalogue.commit())

    def get(self, inode: Inode, first: int, count: int) -> dict[int, int]:
        """Return the checksums that exist among *count* blocks from *first* on, by block."""
        return dict(
            self._catalogue.rows(
                "SELECT block, sum FROM checksum WHERE ino = ? AND block >= ? AND block < ?",
                (inode.ino, first, first + count),
            )
        )

    def put(self, inode: Inode, sums: dict[int, int]) -> None:
        self._catalogue.write(
            "INSERT OR REPLACE INTO checksum VALUES(?, ?, ?)",
            *((inode.ino, block, value) for block, value in sums.items()),
        )
        self._changed(inode)

    def drop(self, inode: Inode, blocks: Iterable[int]) -> None:
        self._catalogue.write(
            "DELETE FROM checksum WHERE ino = ? AND block = ?",
            *((inode.ino, block) for block in blocks),
        )
        self._changed(inode)

    def drop_range(self, inode: Inode, first: int, last: int) -> None:
        """Delete the checksums of the blocks from *first* up to *last*, exclusive."""
        sql = "DELETE FROM checksum WHERE ino = ? AND block >= ? AND block < ?"
        self._catalogue.write(sql, (inode.ino, first, last))
        self._changed(inode)

    def attests(self, inode: Inode, size: int) -> bool:
        """Whether the region certainly had more than *size* bytes on stable storage."""
        sql = (
            "SELECT EXISTS(SELECT 1 FROM checksum WHERE ino = ? AND block >= ?)"
            " AND NOT EXISTS(SELECT 1 FROM unsettled WHERE ino = ?)"
        )
        return bool(self._catalogue.rows(sql, (inode.ino, size // BLOCK, inode.ino))[0][0])

    # Marks

    def unsettled(self) -> set[int]:
        return {row[0] for row in self._catalogue.rows("SELECT ino FROM unsettled")}

    def unsettle(self, inode: Inode) -> None:
        self._catalogue.write("INSERT OR REPLACE INTO unsettled VALUES(?)", (inode.ino,))
        self._changed(inode)

    def clear_unsettled(self, inos: Iterable[int]) -> None:
        self._catalogue.write("DELETE FROM unsettled WHERE ino = ?", *((ino,) for ino in inos))
        self._catalogue.change += 1

    def _changed(self, inode: Inode) -> None:
        # The row must exist for its checksums to be removed with it.
        inode.stored = True
        self._catalogue.touch(inode, durable=True)
