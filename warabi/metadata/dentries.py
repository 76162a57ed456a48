"""The names of a catalogue's inodes: a write-back cache of directory entries.

Known names, including negative entries, are cached and changed in memory, and written to rows in
batches, as inodes are.  As in ``catalogue.py``, nothing here locks.

A graft adds any number of names to directories atomically.  It first *stages* them, as entries
whose parent is no inode: the parent of names for directory ``d`` is ``-d``, that of regions that
will be listed by their IDs is ``ANONYMOUS``.  Nothing finds staged names until the catalogue
records that the graft is *joined*; from then on a directory has its staged names in addition to its
own, until each was moved to its directory.
"""

from __future__ import annotations

import itertools
import sqlite3

from warabi.metadata.journal import Journal

_KEPT = 65536
_KEPT_ABSENT = 4096  # number of cached names up to which removed names stay cached
_ABSENT = 0
"""Value of a negative entry, instead of an inode number."""
ANONYMOUS = 0
"""The parent of staged regions that are not to have a name."""


def staged(directory: int) -> int:
    """The parent of names that are staged for *directory*; and the other way round."""
    return -directory


def finish_graft(db: sqlite3.Connection) -> None:
    """Complete a graft that was joined, or make what it staged orphans, in the open transaction.

    For a database whose process did not do so.
    """
    staged_names = "SELECT 1 FROM dentry WHERE parent <= 0"
    joined = "SELECT 1 FROM meta WHERE key = 'joined'"
    if db.execute(f"{staged_names} UNION ALL {joined} LIMIT 1").fetchone() is None:
        return
    if db.execute("DELETE FROM meta WHERE key = 'joined'").rowcount:
        db.execute(
            "UPDATE inode SET anonymous = nlink = 1, nlink = nlink - 1"
            f" WHERE ino IN (SELECT ino FROM dentry WHERE parent = {ANONYMOUS})"
        )
        db.execute(f"DELETE FROM dentry WHERE parent = {ANONYMOUS}")
        db.execute("UPDATE dentry SET parent = -parent WHERE parent < 0")
        return
    db.execute("CREATE TEMP TABLE staged(ino INTEGER PRIMARY KEY)")
    db.execute(
        "INSERT INTO staged WITH RECURSIVE s(ino) AS (SELECT ino FROM dentry WHERE parent <= 0"
        " UNION SELECT d.ino FROM s JOIN dentry d ON d.parent = s.ino) SELECT ino FROM s"
    )
    db.execute("DELETE FROM dentry WHERE parent <= 0 OR parent IN (SELECT ino FROM staged)")
    # A region among them may have got another name, and keeps it.
    db.execute(
        "UPDATE inode SET nlink = (SELECT count(*) FROM dentry d WHERE d.ino = inode.ino)"
        " WHERE ino IN (SELECT ino FROM staged)"
    )
    db.execute("DROP TABLE staged")


class Dentries:
    """The directory entries.

    Args:
        db: the catalogue's database.
        journal: executes the changes.
    """

    def __init__(self, db: sqlite3.Connection, journal: Journal) -> None:
        self._db = db
        self._journal = journal
        # By directory and name.  Authoritative; the rows are updated by the next `flush`.
        self._known: dict[tuple[int, bytes], int] = {}
        # Directories whose names are all cached: other names do not exist.
        self._whole: set[int] = set()
        self.dirty: dict[tuple[int, bytes], None] = {}
        """The names whose rows are outdated, oldest first."""
        self.failed: dict[tuple[int, bytes], tuple[int, Exception]] = {}
        """Names among them that cannot be stored: their inode, and the error."""
        self.withheld: set[int] = set()
        """Inodes without a row because it cannot be stored: their names are not stored either."""
        self.staging = False
        """Whether a graft has staged names, or may do so."""
        self.joined = False
        """Whether staged names are names of their directories."""
        self.conflicts: dict[tuple[int, bytes], None] = {}
        """Names that were made while they were staged, and the graft not joined."""

    def get(self, parent: int, name: bytes) -> int | None:
        """Return the inode number of *name* in directory *parent*, or None."""
        ino = self._known.get((parent, name))
        if ino is None and parent not in self._whole:
            row = self._db.execute(
                "SELECT ino FROM dentry WHERE parent = ? AND name = ?", (parent, name)
            ).fetchone()
            ino = _ABSENT if row is None else int(row[0])
            self._known[parent, name] = ino
        if not ino and self.joined and parent > 0:
            return self.get(staged(parent), name)
        return ino or None

    def made(self, directory: int) -> None:
        """Record a new, empty directory."""
        self._whole.add(directory)

    def removed(self, directory: int) -> None:
        """Record the removal of an empty directory."""
        self._whole.discard(directory)

    def set(self, parent: int, name: bytes, ino: int | None) -> None:
        """Make *name* refer to *ino*; None removes it."""
        key = (parent, name)
        if self.staging and parent > 0 and self.get(staged(parent), name) is not None:
            if self.joined:
                self.set(staged(parent), name, None)
            elif ino:
                self.conflicts[key] = None
        self._known[key] = ino or _ABSENT
        self.dirty[key] = None

    def of(self, ino: int, most: int = -1) -> list[tuple[int, bytes]]:
        """Return the (parent, name) pairs of *ino*, at most *most* if not negative."""
        self.flush()
        names = self._db.execute(
            "SELECT parent, name FROM dentry WHERE ino = ? ORDER BY parent, name LIMIT ?",
            (ino, most),
        ).fetchall()
        return [(abs(parent), name) for parent, name in names] if self.joined else names

    def parents(self, directory: int) -> tuple[int, ...]:
        """The parents that entries of a directory have in the rows."""
        return (directory, staged(directory)) if self.joined else (directory,)

    def any_in(self, ino: int) -> bool:
        """Whether the directory *ino* has an entry."""
        return any(self.page(parent, 1) for parent in self.parents(ino))

    def staged_parent(self) -> int | None:
        """The parent of some staged names, or None when there are none."""
        self.flush()
        sql = "SELECT parent FROM dentry WHERE parent <= 0 LIMIT 1"
        row = self._db.execute(sql).fetchone()
        return None if row is None else int(row[0])

    def page(self, parent: int, limit: int) -> list[tuple[bytes, int]]:
        """The first *limit* names that have that parent in the rows, and what they mean."""
        self.flush()
        sql = "SELECT name, ino FROM dentry WHERE parent = ? LIMIT ?"
        return self._db.execute(sql, (parent, limit)).fetchall()

    def flush(self, most: int | None = None) -> None:
        """Update the rows of *most* names or of all, in the open transaction."""
        if not self.dirty:
            return
        linked: list[tuple[int, bytes, int]] = []
        gone: list[tuple[int, bytes]] = []
        keys = list(itertools.islice(self.dirty, most))
        for key in keys:
            if not (ino := self._known[key]):
                gone.append(key)
            elif ino not in self.withheld and key[0] not in self.withheld:
                linked.append((*key, ino))
        # If one of these fails, both are repeated later, which has no further effect.
        delete = "DELETE FROM dentry WHERE parent = ? AND name = ?"
        insert = "INSERT OR REPLACE INTO dentry VALUES(?, ?, ?)"
        failed = {
            gone[i]: (gone[i][0], e) for i, e in self._journal.write_each(delete, gone).items()
        }
        for i, error in self._journal.write_each(insert, linked).items():
            parent, name, ino = linked[i]
            failed[parent, name] = (ino, error)
        for key in keys:
            del self.dirty[key]
        if self.failed or self.withheld or failed:
            self._keep(keys, failed)
        if len(self._known) > _KEPT_ABSENT:
            for key in gone:
                if key not in self.dirty:
                    del self._known[key]

    def _keep(
        self, keys: list[tuple[int, bytes]], failed: dict[tuple[int, bytes], tuple[int, Exception]]
    ) -> None:
        """Keep those of *keys* dirty that were not written, after all others."""
        for key in keys:
            if key in failed:
                self.failed[key] = failed[key]
            else:
                self.failed.pop(key, None)
            held = self._known[key] in self.withheld or key[0] in self.withheld
            if key in failed or (held and self._known[key]):
                self.dirty[key] = None

    def trim(self) -> None:
        """Drop some cached names if there are too many."""
        if len(self._known) > _KEPT:
            self._whole.clear()
            for key in list(self._known)[: _KEPT // 2]:
                if key not in self.dirty:
                    del self._known[key]
