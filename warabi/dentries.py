"""The names of a catalogue's inodes: directory entries, in memory and as rows.

What is known of a name, that it does not exist included, is kept and changed in memory, and
written back in batches as inodes are.  As in ``catalogue.py``, nothing here locks.
"""

from __future__ import annotations

import itertools
import sqlite3

from warabi.journal import Journal

_KEPT = 65536
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

    def of(self, ino: int) -> list[tuple[int, bytes]]:
        """Every (parent, name) that means *ino*."""
        self.flush()
        return self._db.execute(
            "SELECT parent, name FROM dentry WHERE ino = ? ORDER BY parent, name", (ino,)
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
            if ino := self._known[key]:
                linked.append((*key, ino))
            else:
                gone.append(key)
        # When one of these fails, both are done again: what they do twice is as if done once.
        if gone:
            self._journal.write("DELETE FROM dentry WHERE parent = ? AND name = ?", gone)
        if linked:
            self._journal.write("INSERT OR REPLACE INTO dentry VALUES(?, ?, ?)", linked)
        for key in keys:
            del self.dirty[key]

    def trim(self) -> None:
        """Drop what is known of some names when there are too many."""
        if len(self._known) > _KEPT:
            self._whole.clear()
            for key in list(self._known)[: _KEPT // 2]:
                if key not in self.dirty:
                    del self._known[key]
