"""The names of a catalogue's inodes: directory entries, in memory and as rows.

What is known of a name, that it does not exist included, is kept and changed in memory, and
written back in batches as inodes are.  As in ``catalogue.py``, nothing here locks.
"""

from __future__ import annotations

import itertools
import sqlite3

from warabi.metadata.journal import Journal

_KEPT = 65536
_KEPT_ABSENT = 4096  # names known in all, up to which those that were removed are kept among them
_ABSENT = 0
"""Instead of an inode number: there is no such name."""


class Dentries:
    """What each name in each directory means.

    Args:
        db: the catalogue's database.
        journal: where changes of it go.
    """

    def __init__(self, db: sqlite3.Connection, journal: Journal) -> None:
        self._db = db
        self._journal = journal
        # By directory and name.  What is in it is the truth; the rows follow at the next `flush`.
        self._known: dict[tuple[int, bytes], int] = {}
        # Directories all of whose names are in it: what is not there, is nowhere.
        self._whole: set[int] = set()
        self.dirty: dict[tuple[int, bytes], None] = {}
        """The names whose rows are not up to date, longest first."""
        self.failed: dict[tuple[int, bytes], tuple[int, Exception]] = {}
        """Names among them that cannot be stored: the inode they are about, and why."""
        self.withheld: set[int] = set()
        """Inodes that have no row because it cannot be stored: their names have none either."""

    def get(self, parent: int, name: bytes) -> int | None:
        """The inode number that *name* means in directory *parent*, or None."""
        ino = self._known.get((parent, name))
        if ino is None:
            if parent in self._whole:
                return None
            row = self._db.execute(
                "SELECT ino FROM dentry WHERE parent = ? AND name = ?", (parent, name)
            ).fetchone()
            ino = _ABSENT if row is None else int(row[0])
            self._known[parent, name] = ino
        return ino or None

    def made(self, directory: int) -> None:
        """There is a new directory, without names."""
        self._whole.add(directory)

    def removed(self, directory: int) -> None:
        """A directory without names is gone."""
        self._whole.discard(directory)

    def set(self, parent: int, name: bytes, ino: int | None) -> None:
        """Make *name* mean *ino*, instead of what it meant, or nothing."""
        key = (parent, name)
        self._known[key] = ino or _ABSENT
        self.dirty[key] = None

    def of(self, ino: int, most: int = -1) -> list[tuple[int, bytes]]:
        """Every (parent, name) that means *ino*, or the first *most* of them."""
        self.flush()
        return self._db.execute(
            "SELECT parent, name FROM dentry WHERE ino = ? ORDER BY parent, name LIMIT ?",
            (ino, most),
        ).fetchall()

    def any_in(self, ino: int) -> bool:
        """Whether the directory *ino* has an entry."""
        self.flush()
        sql = "SELECT 1 FROM dentry WHERE parent = ? LIMIT 1"
        return self._db.execute(sql, (ino,)).fetchone() is not None

    def flush(self, most: int | None = None) -> None:
        """Bring the rows up to date, of *most* names or of all, in the open transaction."""
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
        # When one of these fails, both are done again: what they do twice is as if done once.
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
        """Have those of *keys* that were not written be written later, after all others."""
        for key in keys:
            if key in failed:
                self.failed[key] = failed[key]
            else:
                self.failed.pop(key, None)
            held = self._known[key] in self.withheld or key[0] in self.withheld
            if key in failed or (held and self._known[key]):
                self.dirty[key] = None

    def trim(self) -> None:
        """Drop what is known of some names when there are too many."""
        if len(self._known) > _KEPT:
            self._whole.clear()
            for key in list(self._known)[: _KEPT // 2]:
                if key not in self.dirty:
                    del self._known[key]
