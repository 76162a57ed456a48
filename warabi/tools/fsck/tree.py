"""Consistency of the rows of a catalogue, independent of files.

The order of the steps is such that each may rely on the previous ones: single rows, names, places
in the tree, and finally link counts.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
import uuid
from typing import Any

from warabi._core.attributes import ROOT
from warabi.backends import registry
from warabi.metadata import domain
from warabi.metadata.checksums import BLOCK
from warabi.metadata.domain import SLOT_MAX
from warabi.metadata.schema import COLUMNS, OUTSIDE, UPSERT
from warabi.region import RegionID
from warabi.tools.fsck.report import Report

_TYPE = 0o170000
_IS_DIRECTORY = f"mode & {_TYPE} = {stat.S_IFDIR}"
_IS_REGION = f"(mode & {_TYPE} = {stat.S_IFREG})"
_KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR,
          stat.S_IFBLK)  # fmt: skip


def shown(name: Any) -> str:
    """Format a name, or an invalid value instead of one, for a message."""
    return repr(os.fsdecode(name)) if isinstance(name, bytes) else repr(name)


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 0


class TreeCheck:
    """Checks, and if the report allows it repairs, the rows of *db*.

    Args:
        db: the catalogue, in a transaction if repairs are enabled.
        report: receives problems, and decides about repairs.
        clean: whether the target was closed cleanly.
        sums: whether there are tables of checksums.
    """

    def __init__(self, db: sqlite3.Connection, report: Report, *, clean: bool, sums: bool) -> None:
        self._db = db
        self._report = report
        self._clean = clean
        self._sums = sums
        self._lost: int | None = None
        self._moved: set[int] = set()  # inodes whose link counts changed because of repairs

    def run(self) -> None:
        """Check all except link counts, which come last, after all moves."""
        self._meta()
        self._rows()
        self._root()  # which may have been removed just now
        self._names()
        self._extra_names()
        self._belongings()
        self._nameless()
        self._cycles()

    def _all(self, sql: str, *values: Any) -> list[Any]:
        return self._db.execute(sql, values).fetchall()

    def _meta(self) -> None:
        meta = dict(self._all("SELECT key, value FROM meta"))
        wrong = {
            "uuid": (isinstance(meta.get("uuid"), str), str(uuid.uuid4())),
            # None until it is opened for the first time
            "clean": ("clean" in meta and meta["clean"] in (0, 1, None), 0),
            "backend": (meta.get("backend", "file") in registry.checked_by_fsck(), "file"),
            "capacity": (_is_number(meta.get("capacity", 0) or 0), None),
            "last": (_is_number(meta.get("last", 0)) and meta.get("last", 0) < SLOT_MAX, 0),
            "settled": (_is_number(meta.get("settled", 0)), 0),
        }
        for key, (right, instead) in wrong.items():
            what = f"catalogue: {key} is {meta.get(key)!r}"
            if not right and self._report.problem(what, f"set to {instead!r}"):
                self._db.execute("INSERT OR REPLACE INTO meta VALUES(?, ?)", (key, instead))

    def _root(self) -> None:
        rows = self._all(f"SELECT {COLUMNS} FROM inode WHERE ino = {ROOT}")
        if rows and isinstance(rows[0][2], int) and rows[0][2] & _TYPE == stat.S_IFDIR:
            return
        what = "the root directory is missing" if not rows else f"inode {ROOT} is not a directory"
        if self._report.problem(what, "created again", details=repr(rows)):
            self._add(ROOT, stat.S_IFDIR | 0o755)

    def _add(self, ino: int, mode: int) -> None:
        now = time.time_ns()
        owner = os.getuid(), os.getgid()
        row = domain.Row(ino, 1, mode, 2, *owner, 0, 0, now, now, now, 0, None, btime=now)
        self._db.execute(UPSERT, row)

    def _rows(self) -> None:
        """Check single inodes."""
        for row in self._all(
            f"SELECT {COLUMNS} FROM inode WHERE typeof(mode) != 'integer'"
            f" OR mode & {_TYPE} NOT IN {_KINDS} OR typeof(generation) != 'integer'"
            " OR generation < 0 OR ino < 1"
            f" OR (mode & {_TYPE} = {stat.S_IFLNK} AND target IS NULL)"
        ):
            if self._report.problem(f"inode {row[0]} is invalid", "removed", details=repr(row)):
                self._db.execute("DELETE FROM inode WHERE ino = ?", (row[0],))
        self._numbers()
        link = f"(mode & {_TYPE} = {stat.S_IFLNK})"
        for where, what, remedy, change in (
            (f"{link} AND size != length(target)",
             "is a symbolic link with a wrong size", "set", "size = length(target)"),
            (f"NOT {link} AND target IS NOT NULL",
             "is not a symbolic link but has a target", "removed", "target = NULL"),
            (f"anonymous NOT IN (0, 1) OR (anonymous = 1 AND NOT {_IS_REGION})",
             "is marked as a region that never had a name", "unmarked", "anonymous = 0"),
            (f"packed NOT IN (0, 1, 2) OR (packed != 0 AND NOT {_IS_REGION})",
             "is marked as a region in a pack", "unmarked", "packed = 0"),
        ):  # fmt: skip
            self._update(where, what, remedy, change)

    def _numbers(self) -> None:
        """Check numbers and link targets."""
        for values in self._all(f"SELECT {COLUMNS} FROM inode WHERE {OUTSIDE}"):
            row = domain.mended(values)
            if not (isinstance(row.size, int) and row.size >= 0):
                row = row._replace(size=0)
            changes = [
                f"{column} {old!r:.40} becomes {new!r:.40}"
                for column, old, new in zip(row._fields, values, row, strict=True)
                if old != new
            ]
            text = f"inode {row.ino} has invalid values"
            if self._report.problem(text, ", ".join(changes), details=repr(values)):
                self._db.execute(UPSERT, row)

    def _update(self, where: str, what: str, remedy: str, change: str) -> None:
        for row in self._all(f"SELECT {COLUMNS} FROM inode WHERE {where}"):
            if self._report.problem(f"inode {row[0]} {what}", remedy, details=repr(row)):
                self._db.execute(f"UPDATE inode SET {change} WHERE ino = ?", (row[0],))

    def _names(self) -> None:
        """Check single directory entries, and that their inodes exist."""
        for where, what in (
            ("typeof(name) != 'blob' OR length(name) NOT BETWEEN 1 AND 255"
             " OR name IN (X'2E', X'2E2E') OR instr(name, X'2F') OR instr(name, X'00')",
             "is not a valid file name"),
            ("ino NOT IN (SELECT ino FROM inode)", "refers to no inode"),
            (f"parent NOT IN (SELECT ino FROM inode WHERE {_IS_DIRECTORY})",
             "is not in a directory"),
            (f"ino = {ROOT}", "refers to the root directory"),
        ):  # fmt: skip
            for parent, name, ino in self._all(
                f"SELECT parent, name, ino FROM dentry WHERE {where}"
            ):
                text = f"name {shown(name)} of inode {ino} in directory {parent} {what}"
                if self._report.problem(text, "removed"):
                    self._unlink(parent, name)

    def _unlink(self, parent: int, name: Any) -> None:
        ours = "FROM dentry WHERE parent = ? AND name = ?"
        self._moved.update(row[0] for row in self._all(f"SELECT ino {ours}", parent, name))
        self._moved.add(parent)
        self._db.execute(f"DELETE {ours}", (parent, name))

    def _extra_names(self) -> None:
        """Check that a directory has one name, and a region that is shown by its ID none."""
        for parent, name, ino in self._all(
            f"SELECT d.parent, d.name, d.ino FROM dentry d JOIN inode i USING(ino)"
            f" WHERE i.{_IS_DIRECTORY} AND (d.parent, d.name) != (SELECT parent, name FROM dentry e"
            " WHERE e.ino = d.ino ORDER BY parent, name LIMIT 1)"
        ):
            text = f"directory {ino} has one more name, {shown(name)} in directory {parent}"
            if self._report.problem(text, "removed"):
                self._unlink(parent, name)
        self._update("anonymous = 1 AND ino IN (SELECT ino FROM dentry)",
                     "is marked as a region that never had a name, but has one", "unmarked",
                     "anonymous = 0")  # fmt: skip

    def _belongings(self) -> None:
        """Check for attributes and checksums of missing inodes."""
        for ino, name, value in self._all(
            "SELECT * FROM xattr WHERE ino NOT IN (SELECT ino FROM inode)"
            " OR typeof(name) != 'blob' OR typeof(value) != 'blob'"
        ):
            text = f"attribute {shown(name)} of inode {ino} belongs to no inode"
            if self._report.problem(text, "removed", details=repr(value)):
                self._db.execute("DELETE FROM xattr WHERE ino = ? AND name = ?", (ino, name))
        self._attributes()
        if not self._sums:
            return
        regions = f"(SELECT ino FROM inode WHERE {_IS_REGION})"
        for ino, count in self._all(
            f"SELECT ino, count(*) FROM checksum c WHERE ino NOT IN {regions}"
            f" OR block < 0 OR block * {BLOCK} >= (SELECT size FROM inode WHERE ino = c.ino)"
            " GROUP BY ino"
        ):
            if self._report.problem(
                f"{count} checksums of inode {ino} are beyond its end", "removed"
            ):
                self._db.execute(
                    f"DELETE FROM checksum WHERE ino = ? AND (ino NOT IN {regions} OR block < 0"
                    f" OR block * {BLOCK} >= (SELECT size FROM inode WHERE ino = checksum.ino))",
                    (ino,),
                )
        for (ino,) in self._all(f"SELECT ino FROM unsettled WHERE ino NOT IN {regions}"):
            if self._report.problem(
                f"the checksum state of inode {ino} belongs to no inode", "removed"
            ):
                self._db.execute("DELETE FROM unsettled WHERE ino = ?", (ino,))

    def _attributes(self) -> None:
        """Check for invalid extended attributes."""
        spaces = " ".join(
            f"AND substr(name, 1, {len(space)}) != X'{space.hex()}'" for space in domain.SPACES
        )
        bare = ", ".join(f"X'{space.hex()}'" for space in domain.SPACES)
        for ino, name, value in self._all(
            f"SELECT ino, name, value FROM xattr WHERE length(value) > {domain.XATTR_VALUE_MAX}"
            f" OR length(name) > {domain.XATTR_NAME_MAX} OR instr(name, X'00')"
            f" OR name IN ({bare})"
            f" OR (1 {spaces})"
        ):
            why = domain.xattr_fault(name, value)
            text = f"attribute {shown(name)[:60]} of inode {ino} is invalid: {why}"
            if why and self._report.problem(text, "removed", details=f"{name!r} {value!r}"):
                self._db.execute("DELETE FROM xattr WHERE ino = ? AND name = ?", (ino, name))
                (mode,) = self._all("SELECT mode FROM inode WHERE ino = ?", ino)[0]
                mode = domain.mode_without(name, mode)
                self._db.execute("UPDATE inode SET mode = ? WHERE ino = ?", (mode, ino))

    def _nameless(self) -> None:
        """Check for inodes without names."""
        for ino, generation, mode, nlink in self._all(
            "SELECT ino, generation, mode, nlink FROM inode WHERE anonymous = 0"
            f" AND ino != {ROOT} AND ino NOT IN (SELECT ino FROM dentry)"
        ):
            if nlink == 0 and not self._clean:
                continue  # was open when its process died: opening the target removes it
            name = _name(ino, generation, mode)
            text = f"{'directory' if stat.S_ISDIR(mode) else 'inode'} {ino} has no name"
            if self._report.problem(text, f"moved to /lost+found/{name}"):
                self.rescue(ino, name)

    def rescue(self, ino: int, name: str) -> None:
        """Give an inode a name in ``/lost+found``."""
        values = (self._lost_and_found(), name.encode(), ino)
        self._moved.update((ROOT, values[0], ino))
        self._db.execute("INSERT OR REPLACE INTO dentry VALUES(?, ?, ?)", values)
        self._db.execute("UPDATE inode SET anonymous = 0 WHERE ino = ?", (ino,))

    def _lost_and_found(self) -> int:
        """Return the directory, creating it if it is missing; a non-directory of that name is
        kept."""
        number = 0
        while self._lost is None:
            name = f"lost+found{(number and f'.{number}') or ''}".encode()
            found = self._all(
                "SELECT ino, mode FROM dentry JOIN inode USING(ino) WHERE parent = ? AND name = ?",
                ROOT, name,
            )  # fmt: skip
            number += 1
            if found and stat.S_ISDIR(found[0][1]):
                self._lost = int(found[0][0])
            elif not found:
                last = f"SELECT max(ino) FROM inode WHERE ino < {domain.SEQUENCE}"
                self._lost = 1 + self._all(last)[0][0]
                while self._all("SELECT 1 FROM inode WHERE ino = ?", self._lost):
                    self._lost += 1
                self._add(self._lost, stat.S_IFDIR | 0o700)
                self._db.execute("INSERT INTO dentry VALUES(?, ?, ?)", (ROOT, name, self._lost))
        return self._lost

    def _cycles(self) -> None:
        """Check for directories with names that cannot be reached from the root."""
        for start in self._unreachable():
            seen: list[int] = []
            ino = start
            while ino not in seen:
                seen.append(ino)
                above = self._all("SELECT parent, name FROM dentry WHERE ino = ?", ino)
                if not above:
                    break  # in a directory without a name: reported already, and not repaired
                ino = above[0][0]
            if not above or ino == ROOT or ino in self._broken:
                continue
            self._broken.update(seen)
            text = f"directory {ino} is inside itself"
            if self._report.problem(text, f"moved to /lost+found/inode-{ino}"):
                self._unlink(*self._all("SELECT parent, name FROM dentry WHERE ino = ?", ino)[0])
                self.rescue(ino, f"inode-{ino}")

    def _unreachable(self) -> list[int]:
        self._broken: set[int] = set()
        rows = self._all(
            f"WITH RECURSIVE reached(ino) AS (SELECT {ROOT} UNION SELECT d.ino FROM dentry d"
            f" JOIN reached r ON d.parent = r.ino JOIN inode i ON i.ino = d.ino"
            f" WHERE i.{_IS_DIRECTORY})"
            f" SELECT ino FROM inode WHERE {_IS_DIRECTORY}"
            " AND ino NOT IN reached AND ino IN (SELECT ino FROM dentry) ORDER BY ino"
        )
        return [row[0] for row in rows]

    def take_names(self, ino: int) -> None:
        """Remove every name of an inode."""
        for parent, name in self._all("SELECT parent, name FROM dentry WHERE ino = ?", ino):
            self._unlink(parent, name)

    def paths(self, ino: int) -> list[str]:
        """Return every path of an inode."""
        rows = self._all("SELECT parent, name FROM dentry WHERE ino = ?", ino)
        return sorted(os.fsdecode(self._path(parent) + b"/" + name) for parent, name in rows)

    def _path(self, ino: int) -> bytes:
        """Return a directory's path without a trailing slash; the tree has no cycles any more."""
        parts: list[bytes] = []
        while ino != ROOT and len(parts) < 10_000:
            above = self._all("SELECT parent, name FROM dentry WHERE ino = ?", ino)
            if not above:
                return b"?" + b"".join(reversed(parts))
            ino, name = above[0]
            parts.append(b"/" + name)
        return b"".join(reversed(parts))

    def link_counts(self) -> None:
        """Compare link counts with names; counts changed by repairs are set without a report."""
        count = (
            f"CASE WHEN {_IS_DIRECTORY} THEN 2 + (SELECT count(*) FROM dentry d JOIN inode s"
            f" ON s.ino = d.ino WHERE d.parent = inode.ino AND s.{_IS_DIRECTORY})"
            " ELSE (SELECT count(*) FROM dentry d WHERE d.ino = inode.ino) END"
        )
        for ino, nlink, right in self._all(
            f"SELECT ino, nlink, {count} AS links FROM inode WHERE nlink != links"
            f" AND (nlink != 0 OR ino = {ROOT} OR ino IN (SELECT ino FROM dentry))"
        ):
            text = f"inode {ino} has {nlink} links instead of {right}"
            if ino in self._moved or self._report.problem(text, "set"):
                self._db.execute("UPDATE inode SET nlink = ? WHERE ino = ?", (right, ino))


def _name(ino: int, generation: int, mode: int) -> str:
    if stat.S_ISREG(mode):
        return RegionID.from_parts(ino, generation).hex()
    return f"inode-{ino}"
