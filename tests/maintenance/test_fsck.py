"""``warabi fsck``: each kind of damage is found, said, and repaired without losing anything."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.storage.test_checksums import KILLED, open_target, region_file
from tests.support.helpers import PATIENCE, environment, pattern, python_process, run_python
from tests.target.test_file_target import HOLD
from tests.tools.test_cli import COMMAND, run
from warabi import errors
from warabi.metadata import domain, schema
from warabi.metadata.checksums import BLOCK
from warabi.metadata.schema import COLUMNS
from warabi.region import RegionID
from warabi.tools.cli.main import main

CORRECTED, LEFT, FAILED, USAGE = 1, 4, 8, 16


def fsck(path: Path, *options: str) -> tuple[int, str]:
    """Exit status and output of the command, run in this process, which saves the time of many."""
    done = CliRunner().invoke(main, ["fsck", *options, str(path)])
    assert done.exit_code < FAILED, done.output
    return done.exit_code, done.stdout_bytes.decode(errors="surrogateescape")


def fsck_process(path: Path, *options: str) -> tuple[int, str]:
    """As :func:`fsck`, in a process of its own; standard error is used only when it fails."""
    done = run("fsck", *options, path)
    output = (done.stdout + done.stderr).decode(errors="surrogateescape")
    assert bool(done.stderr) == (done.returncode >= FAILED), output
    return done.returncode, output


def edit(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements:
            database.execute(statement)


def snapshot(path: Path) -> dict[str, bytes]:
    """Everything of the target but the lock, with its content; the catalogue as SQL."""
    files = {
        str(p): p.read_bytes()
        for p in Path(f"{path}.regions").rglob("*")
        if p.is_file() and p.name != "LOCK"
    }
    with contextlib.closing(sqlite3.connect(path)) as database:
        for table in ("meta", "inode", "dentry", "xattr", "checksum", "unsettled"):
            files[table] = repr(database.execute(f"SELECT * FROM {table}").fetchall()).encode()
    return files


class Sample:
    """A target with some of everything, closed in order.

    Inodes: 2 directory ``/a``, 3 directory ``/a/b``, 4 region ``/a/b/file`` and ``/hard``,
    5 symlink ``/link``, 6 nameless region, 7 empty region ``/empty``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_target("file", path) as target:
            names = target.namespace
            names.mkdir(1, b"a", 0o755, 0, 0)
            names.mkdir(2, b"b", 0o755, 0, 0)
            self.file = names.mknod(3, b"file", 0o640, 5, 6).region
            target.write(self.file, 0, pattern(3 * BLOCK), extend=True)
            names.link(4, 1, b"hard")
            names.setxattr(4, b"user.x", b"value")
            names.symlink(1, b"link", b"a/b/file", 0, 0)
            self.nameless = target.create_and_write(pattern(5000))
            self.empty = names.mknod(1, b"empty", 0o600, 0, 0).region

    def repaired(self, *texts: str) -> list[str]:
        """Find what was damaged, repair it, and see that nothing is left; the tree's names."""
        before = snapshot(self.path)
        status, output = fsck(self.path)
        assert status == LEFT, output
        assert snapshot(self.path) == before
        assert not Path(f"{self.path}.lost+found").exists()
        for text in texts:
            assert text in output
        status, output = fsck(self.path, "--repair")
        assert status == CORRECTED, output
        for text in texts:
            assert text in output
        status, output = fsck(self.path)
        assert (status, output) == (0, f"{self.path}: 0 problems, 0 corrected\n")
        return self.names()

    def names(self) -> list[str]:
        """Every path, once all of them and every region have been used."""
        with open_target("file", self.path, checksums=None) as target:
            found = []
            pending = [("", 1)]
            while pending:
                above, ino = pending.pop()
                entries = target.namespace.readdir(ino)
                for name, attributes in entries:
                    path = f"{above}/{os.fsdecode(name)}"
                    assert target.namespace.lookup(ino, name) == attributes
                    found.append(path)
                    if stat.S_ISDIR(attributes.mode):
                        pending.append((path, attributes.ino))
            for region in target.regions():
                target.read(region, 0, target.size(region))
            return sorted(found)

    def read(self, region: RegionID) -> bytes:
        with open_target("file", self.path, checksums=None) as target:
            return target.read(region, 0, target.size(region))


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return Sample(tmp_path / "target")


def usual(sample: Sample) -> list[str]:
    return sorted(
        ["/a", "/a/b", "/a/b/file", "/hard", "/link", "/empty", f"/{sample.nameless.hex()}"]
    )


def test_an_undamaged_target_passes_fsck(sample: Sample) -> None:
    before = snapshot(sample.path)
    for options in ((), ("--repair",)):
        status, output = fsck_process(sample.path, *options)
        assert (status, output) == (0, f"{sample.path}: 0 problems, 0 corrected\n")
    assert snapshot(sample.path) == before
    assert sorted(os.listdir(sample.path.parent)) == ["target", "target.regions"]
    assert sample.names() == usual(sample)


NUMBERS = ("uid", "gid", "rdev", "atime", "mtime", "ctime", "anonymous", "packed")
OUTSIDE = [
    "UPDATE inode SET uid = -1 WHERE ino = 4",
    "UPDATE inode SET gid = 4294967295 WHERE ino = 4",
    "UPDATE inode SET uid = 4294967296, gid = 9223372036854775807 WHERE ino = 4",
    "UPDATE inode SET rdev = 4294967296 WHERE ino = 4",
    "UPDATE inode SET mode = mode + 4294967296 WHERE ino = 4",
    "UPDATE inode SET ctime = 9223372036854775807 WHERE ino = 4",
    "UPDATE inode SET mtime = -9223372036854775808 WHERE ino = 4",
    "UPDATE inode SET target = X'6100622f63', size = 5 WHERE ino = 5",
    "UPDATE inode SET target = X'', size = 0 WHERE ino = 5",
    "UPDATE inode SET target = zeroblob(5000), size = 5000 WHERE ino = 5",
    "UPDATE inode SET target = 'text', size = 4 WHERE ino = 5",
    "UPDATE inode SET target = 17 WHERE ino = 5",
    *(f"UPDATE inode SET {column} = 0.5 WHERE ino = 4" for column in NUMBERS),
    *(
        f"UPDATE inode SET {', '.join(f'{column} = {value}' for column in NUMBERS)} WHERE ino = 4"
        for value in ("1e300", "-9e999", "'x'", "X'01'")
    ),
]
"""Values that only another program can have stored."""
ROWS: list[tuple[str, list[str], list[str]]] = [
    ("UPDATE inode SET nlink = 5 WHERE ino = 4", ["inode 4 has 5 links instead of 2"], []),
    ("UPDATE inode SET nlink = 0 WHERE ino = 4", ["inode 4 has 0 links instead of 2"], []),
    ("UPDATE inode SET nlink = 9 WHERE ino = 2", ["inode 2 has 9 links instead of 3"], []),
    ("UPDATE inode SET nlink = -1 WHERE ino = 7", ["inode 7 has invalid values"], []),
    ("UPDATE inode SET uid = 'x' WHERE ino = 4", ["inode 4 has invalid values"], []),
    ("UPDATE inode SET size = 1 WHERE ino = 5", ["wrong size"], []),
    ("UPDATE inode SET target = X'00' WHERE ino = 3", ["inode 3 is not a symbolic link"], []),
    ("UPDATE inode SET anonymous = 1 WHERE ino = 2", ["inode 2 is marked"], []),
    ("UPDATE inode SET anonymous = 1 WHERE ino = 4", ["inode 4 is marked", "has one"], []),
    ("INSERT INTO dentry VALUES(1, X'7a', 99)", ["name 'z'", "refers to no inode"], []),
    ("INSERT INTO dentry VALUES(98, X'7a', 4)", ["is not in a directory"], []),
    ("INSERT INTO dentry VALUES(4, X'7a', 4)", ["is not in a directory"], []),
    ("INSERT INTO dentry VALUES(2, X'7a', 1)", ["refers to the root directory"], []),
    ("INSERT INTO dentry VALUES(1, X'612f62', 4)", ["'a/b'", "is not a valid file name"], []),
    ("INSERT INTO dentry VALUES(1, 'text', 4)", ["is not a valid file name"], []),
    ("INSERT INTO dentry VALUES(2, X'2e2e', 4)", ["is not a valid file name"], []),
    ("INSERT INTO dentry VALUES(3, X'7a', 2)", ["directory 2 has one more name, 'z'"], []),
    ("INSERT INTO xattr VALUES(99, X'7a', X'00')", ["'z' of inode 99 belongs to no inode"], []),
    ("INSERT INTO checksum VALUES(99, 0, 0)", ["1 checksums of inode 99"], []),
    ("INSERT INTO checksum VALUES(4, 3, 0)", ["1 checksums of inode 4"], []),
    ("INSERT INTO unsettled VALUES(99)", ["checksum state of inode 99"], []),
    ("DELETE FROM inode WHERE ino = 1", ["root directory is missing"], []),
    ("UPDATE inode SET mode = 33188 WHERE ino = 1", ["inode 1 is not a directory"], []),
    ("UPDATE meta SET value = 17 WHERE key = 'clean'", ["clean is 17"], []),
    ("DELETE FROM meta WHERE key = 'uuid'", ["uuid is None"], []),
    ("UPDATE meta SET value = 'x' WHERE key = 'capacity'", ["capacity is 'x'"], []),
    ("UPDATE meta SET value = 'tape' WHERE key = 'backend'", ["backend is 'tape'"], []),
    # These move something.
    ("DELETE FROM dentry WHERE ino = 4", ["inode 4 has no name"],
     ["-/a/b/file", "-/hard", "+/lost+found", "+/lost+found/FILE"]),
    ("DELETE FROM dentry WHERE ino = 5", ["inode 5 has no name"],
     ["-/link", "+/lost+found", "+/lost+found/inode-5"]),
    ("DELETE FROM dentry WHERE ino = 2", ["directory 2 has no name"],
     ["-/a", "-/a/b", "-/a/b/file", "+/lost+found", "+/lost+found/inode-2",
      "+/lost+found/inode-2/b", "+/lost+found/inode-2/b/file"]),
    ("UPDATE dentry SET parent = 3 WHERE ino = 2", ["is inside itself"],
     ["-/a", "-/a/b", "-/a/b/file", "+/lost+found", "+/lost+found/inode-2",
      "+/lost+found/inode-2/b", "+/lost+found/inode-2/b/file"]),
    ("UPDATE inode SET anonymous = 0 WHERE ino = 6", ["inode 6 has no name"],
     ["-/NAMELESS", "+/lost+found", "+/lost+found/NAMELESS"]),
    ("DELETE FROM inode WHERE ino = 2", ["name 'a' of inode 2"],
     ["-/a", "-/a/b", "-/a/b/file", "+/lost+found", "+/lost+found/inode-3",
      "+/lost+found/inode-3/file"]),
    ("UPDATE inode SET mode = 61440 WHERE ino = 5", ["inode 5 is invalid"], ["-/link"]),
    *((statement, [f"inode {4 if 'ino = 4' in statement else 5} has invalid values"], [])
      for statement in OUTSIDE),
    ("INSERT INTO xattr VALUES(4, X'757365722e79', zeroblob(65537))", ["'user.y' of inode 4"], []),
    ("INSERT INTO xattr VALUES(4, X'757365722e', X'00')", ["'user.' of inode 4"], []),
    ("INSERT INTO xattr VALUES(4, X'706f', X'00')", ["'po' of inode 4"], []),
    ("INSERT INTO xattr VALUES(4, CAST('system.posix_acl_access' AS BLOB), X'00')",
     ["'system.posix_acl_access' of inode 4"], []),
    ("INSERT OR REPLACE INTO meta VALUES('last', 9223372036854775807)", ["last is"], []),
    ("INSERT OR REPLACE INTO meta VALUES('settled', 'x')", ["settled is"], []),
]  # fmt: skip


@pytest.mark.parametrize("statement", OUTSIDE)
def test_opening_refuses_values_that_no_operation_stores(sample: Sample, statement: str) -> None:
    before = sample.names()
    edit(sample.path, statement)
    with pytest.raises(errors.CorruptTarget, match=r"has invalid values .*; see warabi fsck"):
        open_target("file", sample.path)
    assert fsck(sample.path, "--repair")[0] == 1
    assert fsck(sample.path)[0] == 0
    assert sample.names() == before
    with contextlib.closing(sqlite3.connect(sample.path)) as database:
        for row in database.execute(f"SELECT {COLUMNS} FROM inode"):
            assert not domain.fault(row)


@pytest.mark.parametrize("value", ["-1", "0.5", "'x'", "X'01'"])
@pytest.mark.parametrize("column", ["size", "generation"])
@pytest.mark.parametrize("ino", [1, 4, 5])
def test_opening_refuses_what_only_fsck_can_mend(
    sample: Sample, column: str, value: str, ino: int
) -> None:
    edit(sample.path, f"UPDATE inode SET {column} = {value} WHERE ino = {ino}")
    with pytest.raises(errors.CorruptTarget, match=f"inode {ino} has invalid values"):
        open_target("file", sample.path)
    assert fsck(sample.path, "--repair")[0] == 1
    assert fsck(sample.path)[0] == 0
    open_target("file", sample.path).close()


@pytest.mark.parametrize("value", ["33188.5", "'33188'||'x'", "X'01'"])
def test_opening_refuses_a_type_that_is_no_number(sample: Sample, value: str) -> None:
    edit(sample.path, f"UPDATE inode SET mode = {value} WHERE ino = 4")
    with pytest.raises(errors.CorruptTarget, match="inode 4 has invalid values"):
        open_target("file", sample.path)
    assert fsck(sample.path, "--repair")[0] == 1
    assert fsck(sample.path)[0] == 0
    open_target("file", sample.path).close()


def test_opening_refuses_a_slot_that_is_no_number(sample: Sample) -> None:
    edit(sample.path, "INSERT OR REPLACE INTO meta VALUES('settled', 0.5)")
    with pytest.raises(errors.CorruptTarget, match=r"settled is 0\.5; see warabi fsck"):
        open_target("file", sample.path)
    assert fsck(sample.path, "--repair")[0] == 1
    open_target("file", sample.path).close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE inode SET uid = CAST(X'ff' AS TEXT) WHERE ino = 4",
        "UPDATE dentry SET parent = CAST(X'ff' AS TEXT) WHERE ino = 4",
        "UPDATE dentry SET name = CAST(X'ff' AS TEXT) WHERE ino = 5",
        "UPDATE xattr SET value = CAST(X'ff' AS TEXT)",
        "UPDATE meta SET value = CAST(X'ff' AS TEXT) WHERE key = 'uuid'",
        "INSERT INTO meta VALUES(CAST(X'ff' AS TEXT), 1)",
    ],
)
def test_columns_with_invalid_text(sample: Sample, statement: str) -> None:
    """Python's module for SQLite reads no row of it."""
    edit(sample.path, statement)
    status, output = fsck(sample.path)
    assert (status, "Could not decode" in output) == (4, True)
    assert fsck(sample.path, "--repair")[0] == 1
    assert fsck(sample.path)[0] == 0
    with open_target("file", sample.path) as target:
        assert len(list(target.regions())) == 3


def test_without_a_malformed_list_the_group_gets_no_more(sample: Sample) -> None:
    """Its permissions in the mode were the most that the list gave to anybody."""
    edit(sample.path, f"UPDATE inode SET mode = {0o100664} WHERE ino = 4")
    edit(sample.path, "INSERT INTO xattr VALUES(4, CAST('system.posix_acl_access' AS BLOB), X'00')")
    assert fsck(sample.path, "--repair")[0] == 1
    with open_target("file", sample.path) as target:
        assert target.namespace.getattr(4).mode == 0o100604
        assert target.namespace.listxattr(4) == [b"user.x"]


def test_an_invalid_owner_becomes_the_overflow_user(sample: Sample) -> None:
    """A program that ran as that owner is not root's."""
    edit(sample.path, f"UPDATE inode SET uid = {1 << 32}, mode = {0o106755} WHERE ino = 4")
    assert fsck(sample.path, "--repair")[0] == 1
    with open_target("file", sample.path) as target:
        found = target.namespace.getattr(4)
        assert (found.uid, found.mode) == (domain.NOBODY, 0o100755)


def test_an_unreadable_disk_is_not_repaired(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could be read of the catalogue there is not all that there is."""
    with sample.path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))
    before = sample.path.read_bytes()
    module = sys.modules["warabi.tools.fsck.check"]
    monkeypatch.setattr(module, "read_error", lambda path: "Input/output error")
    done = CliRunner().invoke(main, ["fsck", "--repair", str(sample.path)])
    assert isinstance(done.exception, errors.StorageError) or done.exit_code == FAILED
    assert sample.path.read_bytes() == before
    monkeypatch.undo()
    assert fsck(sample.path, "--repair")[0] == CORRECTED


def test_a_target_that_is_not_made_yet(tmp_path: Path) -> None:
    """Its process was killed before it was one."""
    path = tmp_path / "target"
    regions = Path(f"{path}.regions")
    regions.mkdir()
    (regions / "LOCK").touch()
    for made in (regions, path, Path(f"{path}.new")):
        made.touch()
        status, output = fsck(path)
        assert status == 0, output
        assert "killed while it created the target" in output
        assert fsck(path, "--repair")[0] == 0
    path.unlink()
    schema.create(path)  # and killed before it was opened
    assert fsck(path)[0] == 0
    assert fsck(path, "--repair")[0] == 0
    with open_target("file", path) as target:
        target.create(1)
    assert fsck(path)[0] == 0


def test_a_half_finished_migration(tmp_path: Path) -> None:
    """Regions came, and the catalogue that tells of them did not."""
    path = tmp_path / "target"
    with open_target("file", path, packed=False) as target:
        target.create_and_write(b"bytes")
    path.rename(f"{path}.migrating")
    status, output = fsck(path)
    assert status == 0, output
    with open_target("file", path) as target:
        assert target.list() == []
    assert fsck(path)[0] == 0


def test_a_region_that_was_never_persisted(tmp_path: Path) -> None:
    """Its row is on the medium, its file's name was lost with the power."""
    path = tmp_path / "target"
    with open_target("file", path, packed=False, checksums=False) as target:
        kept = target.create_and_write(b"kept", persist=True)
        named, nameless = (target.create_and_write(b"lost") for _ in range(2))
        target.namespace.link_name(named, "/named")
        target.committer.commit_catalogue()  # as a persist of another region would
        for repaired in (path.with_name("repaired"), path.with_name("opened")):
            for suffix in ("", "-wal"):
                shutil.copy(f"{path}{suffix}", f"{repaired}{suffix}")
            shutil.copytree(f"{path}.regions", f"{repaired}.regions")
            for region in (named, nameless):
                region_file(repaired, region).unlink()
    for place in (path.with_name("repaired"), path.with_name("opened")):
        status, output = fsck(place)
        assert status == 0, output
        assert output.count("was not persisted before") == 2
        if place.name == "repaired":
            assert fsck(place, "--repair")[0] == 0
        with open_target("file", place, packed=False, checksums=False) as target:
            assert sorted(target.list()) == sorted([kept, named])
            assert target.read(kept, 0, 4) == b"kept"
            assert target.size(named) == 0
        assert fsck(place)[0] == 0


@pytest.mark.parametrize(("statement", "texts", "changes"), ROWS, ids=[row[0] for row in ROWS])
def test_rows(sample: Sample, statement: str, texts: list[str], changes: list[str]) -> None:
    edit(sample.path, statement)
    expected = set(usual(sample))
    for change in changes:
        name = change[1:].replace("FILE", sample.file.hex())
        name = name.replace("NAMELESS", sample.nameless.hex())
        (expected.add if change[0] == "+" else expected.discard)(name)
    assert sample.repaired(*texts) == sorted(expected)
    assert sample.read(sample.file) == pattern(3 * BLOCK)
    assert sample.read(sample.nameless) == pattern(5000)


def test_what_is_removed_is_written_down(sample: Sample) -> None:
    edit(sample.path, "INSERT INTO xattr VALUES(99, X'7a', X'0102')")
    sample.repaired("belongs to no inode")
    log = Path(f"{sample.path}.lost+found", "fsck.log").read_text()
    assert repr(b"\x01\x02") in log


def test_a_foreign_file_at_the_lost_and_found_path(sample: Sample) -> None:
    edit(
        sample.path,
        f"UPDATE dentry SET name = X'{b'lost+found'.hex()}' WHERE name = X'{b'hard'.hex()}'",
        "UPDATE inode SET anonymous = 0 WHERE ino = 6",
    )
    names = sample.repaired("has no name")
    assert {"/lost+found", f"/lost+found.1/{sample.nameless.hex()}"} <= set(names)


# Files


def test_file_without_a_row(sample: Sample) -> None:
    edit(sample.path, "DELETE FROM inode WHERE ino = 6")
    sample.repaired(f"region {sample.nameless.hex()} has a file but no row")
    kept = Path(f"{sample.path}.lost+found", sample.nameless.hex())
    assert kept.read_bytes() == pattern(5000)


def test_row_without_a_file(sample: Sample) -> None:
    region_file(sample.path, sample.file).unlink()
    names = sample.repaired(f"the file of region {sample.file.hex()}", "/a/b/file, /hard")
    assert names == sorted(set(usual(sample)) - {"/a/b/file", "/hard"})
    log = Path(f"{sample.path}.lost+found", "fsck.log").read_text()
    assert "/a/b/file, /hard" in log
    assert "user.x" in log


def test_empty_region_without_a_file(sample: Sample) -> None:
    region_file(sample.path, sample.empty).unlink()
    assert sample.repaired("which was empty") == usual(sample)


def test_all_files_are_gone(sample: Sample) -> None:
    shutil.rmtree(f"{sample.path}.regions")
    assert sample.repaired("is missing") == ["/a", "/a/b", "/empty", "/link"]


def test_file_that_was_cut_off(sample: Sample) -> None:
    os.truncate(region_file(sample.path, sample.file), BLOCK + 10)
    with open_target("file", sample.path) as target:  # neither short nor filled up with zeros
        for use in (
            lambda: target.read(sample.file, 0, 3 * BLOCK),
            lambda: target.write(sample.file, 2 * BLOCK, b"x"),
            lambda: target.write(sample.file, 3 * BLOCK, b"x", extend=True),
            lambda: target.resize(sample.file, 4 * BLOCK),
        ):
            with pytest.raises(errors.CorruptTarget, match=sample.file.hex()):
                use()
        assert target.read(sample.file, 0, BLOCK) == pattern(3 * BLOCK)[:BLOCK]
    names = sample.repaired(f"has {BLOCK + 10} bytes, its row says {3 * BLOCK} (/a/b/file, /hard)")
    assert f"/lost+found/{sample.file.hex()}" in names
    assert not {"/a/b/file", "/hard"} & set(names)
    assert sample.read(sample.file) == pattern(3 * BLOCK)[: BLOCK + 10]


def test_file_that_is_too_long(sample: Sample) -> None:
    with open(region_file(sample.path, sample.nameless), "ab") as file:
        file.write(b"more")
    assert sample.repaired("has 5004 bytes, its row says 5000") == usual(sample)
    assert sample.read(sample.nameless) == pattern(5000) + b"more"


def test_file_in_the_wrong_place(sample: Sample) -> None:
    file = region_file(sample.path, sample.nameless)
    wrong = file.parent.with_name("00")
    wrong.mkdir(exist_ok=True)
    file.rename(wrong / file.name)
    assert sample.repaired(f"is in {wrong}") == usual(sample)
    assert sample.read(sample.nameless) == pattern(5000)


def test_two_files_of_one_region(sample: Sample) -> None:
    file = region_file(sample.path, sample.nameless)
    wrong = file.parent.with_name("00")
    wrong.mkdir(exist_ok=True)
    (wrong / file.name).write_bytes(b"another")
    assert sample.repaired("there is another one in the right place") == usual(sample)
    assert Path(f"{sample.path}.lost+found", file.name).read_bytes() == b"another"


# A target that was not closed


@pytest.mark.parametrize("kind", ["file", "pmem"])
def test_a_crash_is_no_damage(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "target"
    assert run_python(KILLED, kind, str(path), "make").returncode == 0
    assert run_python(KILLED, kind, str(path), "kill").returncode == -signal.SIGKILL
    unfinished = RegionID.from_parts(4711, 5)
    file = region_file(path, unfinished)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"unfinished")
    status, output = fsck(path)
    assert status == 0, output
    assert "was not closed" in output
    assert f"{unfinished.hex()} has a file but no row" in output
    status, output = fsck(path, "--repair")
    assert status == 0, output
    assert Path(f"{path}.lost+found", unfinished.hex()).read_bytes() == b"unfinished"
    assert fsck(path) == (0, f"{path}: 0 problems, 0 corrected\n")
    with open_target(kind, path) as target:
        hot = target.namespace.open_name("/hot")
        assert target.read(hot, 2 * BLOCK, 9) == b"persisted"


def test_times_after_a_crash(tmp_path: Path) -> None:
    """Those that a sync left in a region's file are taken over, as opening the target does."""
    path = tmp_path / "target"
    with open_target("file", path, checksums=False) as target:
        target.create_and_write(b"old" * 2000)
    done = run_python(SYNCED, str(path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    mtime, ctime = map(int, done.stdout.split())
    for options, text in (((), "its times were kept"), (("--repair",), "copied to the catalogue")):
        status, output = fsck(path, *options)
        assert (status, text in output) == (0, True), output
    with open_target("file", path, checksums=False) as target:
        found = target.stat(target.list()[0])
        assert (found.mtime_ns, found.ctime_ns) == (mtime, ctime)


SYNCED = """
import os, signal, sys
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1]))
(region,) = target.list()
target.write(region, 0, b"new")
target.fsync(region)
found = target.stat(region)
print(found.mtime_ns, found.ctime_ns, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_cut_off_file_after_a_crash(tmp_path: Path) -> None:
    """Without checksums it is taken for one that was never persisted; with them it is not."""
    path = tmp_path / "target"
    assert run_python(KILLED, "file", str(path), "make").returncode == 0
    with open_target("file", path) as target:
        cold = target.namespace.open_name("/cold")
    assert run_python(KILLED, "file", str(path), "kill").returncode == -signal.SIGKILL
    os.truncate(region_file(path, cold), 10)
    status, output = fsck(path)
    assert status == LEFT, output
    assert "(/cold)" in output
    assert fsck(path, "--repair")[0] == CORRECTED
    with open_target("file", path) as target:
        assert target.namespace.open_name(f"/lost+found/{cold.hex()}") == cold
        assert target.size(cold) == 10


def test_held_open_when_its_process_died(tmp_path: Path) -> None:
    path = tmp_path / "target"
    script = """
import os, signal, sys
from pathlib import Path
from tests.storage.test_checksums import open_target
target = open_target("file", Path(sys.argv[1]))
made = target.namespace.mknod(1, b"open", 0o600, 0, 0, pin=True)
target.write(made.region, 0, b"x", extend=True)
target.namespace.unlink(1, b"open")
target.fsync(made.region)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_python(script, str(path)).returncode == -signal.SIGKILL
    for options in ((), ("--repair",), ()):
        status, output = fsck(path, *options)
        assert status == 0, output
    with open_target("file", path) as target:
        assert target.list() == []


# Damaged databases


def damaged(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


def many(path: Path, kind: str = "file", count: int = 1500) -> dict[str, RegionID]:
    """A target whose catalogue has many pages: regions by path."""
    made = {}
    with open_target(kind, path, checksums=False) as target:
        names = target.namespace
        directories = [names.mkdir(1, b"d%d" % i, 0o755, 0, 0) for i in range(10)]
        for i in range(count):
            above = directories[i % 10]
            region = names.mknod(above.ino, b"name of file %d" % i, 0o600, i, i).region
            target.write(region, 0, b"%d" % i, extend=True)
            made[f"/d{i % 10}/name of file {i}"] = region
    return made


def found_again(path: Path, made: dict[str, RegionID], kind: str = "file") -> int:
    """How many regions have their names; all have their IDs, bytes and some name."""
    named = 0
    with open_target(kind, path, checksums=None) as target:
        live = set(target.regions())
        for i, (name, region) in enumerate(made.items()):
            assert region in live
            assert target.read(region, 0, target.size(region)) == b"%d" % i
            paths = target.stat(region).names
            assert paths
            named += name in paths
    return named


def pages(path: Path) -> int:
    return path.stat().st_size // 4096


def test_damaged_pages(tmp_path: Path) -> None:
    """No bytes are lost with pages of the catalogue, and few names."""
    path = tmp_path / "target"
    made = many(path)
    whole = path.read_bytes()
    for first in (1, pages(path) // 3, 2 * pages(path) // 3):
        path.write_bytes(whole)
        shutil.rmtree(f"{path}.lost+found", ignore_errors=True)

        def spoil(content: bytearray, first: int = first) -> bytearray:
            content[first * 4096 : (first + 2) * 4096] = b"\xa5" * 8192
            return content

        damaged(path, spoil)
        spoiled = path.read_bytes()
        status, output = fsck(path)
        assert status == LEFT, output
        assert path.read_bytes() == spoiled
        status, output = fsck(path, "--repair")
        assert status == CORRECTED, output
        assert Path(f"{path}.lost+found", "catalogue").read_bytes() == spoiled
        assert fsck(path)[0] == 0
        assert found_again(path, made) > 1000


@pytest.mark.parametrize("kind", ["file", "pmem"])
@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: b"\0" * len(content),
        lambda content: content[:50],
        lambda content: content[:4096],
        lambda content: b"some text that somebody put there\n" * 10,
        lambda content: content[:100] + b"\xff" * (len(content) - 100),
    ],
    ids=["empty", "zeros", "header cut off", "first page only", "text", "header only"],
)
def test_an_unreadable_catalogue(
    tmp_path: Path, kind: str, change: Callable[[bytearray], bytes]
) -> None:
    path = tmp_path / "target"
    made = many(path, kind, 30)
    damaged(path, change)
    content = path.read_bytes()
    with pytest.raises(errors.Exception, match="target"):
        open_target(kind, path, checksums=None)
    assert path.read_bytes() == content  # and the regions' files were not thought to be nobody's
    status, output = fsck(path)
    assert status == LEFT, output
    assert "the catalogue is damaged" in output
    status, output = fsck(path, "--repair", "--type", kind)
    assert status == CORRECTED, output
    assert fsck(path)[0] == 0
    found_again(path, made, kind)
    assert Path(f"{path}.lost+found", "catalogue").read_bytes() == content


def test_the_catalogue_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "target"
    made = many(path, count=10)
    path.unlink()
    with pytest.raises(errors.CorruptTarget, match="fsck"):
        open_target("file", path)
    assert fsck(path)[0] == LEFT
    assert not path.exists()
    assert fsck(path, "--repair")[0] == CORRECTED
    found_again(path, made)
    path.unlink()
    open_target("file", path, override_if_exists=True).close()  # who wants it empty can have it


def test_names_survive_without_inodes(tmp_path: Path) -> None:
    """What the files tell and what the names tell fit together again."""
    path = tmp_path / "target"
    made = many(path, count=20)
    edit(path, "DROP TABLE inode")
    status, output = fsck(path, "--repair")
    assert status == CORRECTED, output
    assert found_again(path, made) == 20


def test_an_index_that_is_wrong(sample: Sample) -> None:
    edit(
        sample.path,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_schema SET sql = 'CREATE INDEX dentry_ino ON dentry(ino) WHERE ino = 4'"
        " WHERE name = 'dentry_ino'",
    )
    edit(sample.path, "INSERT INTO dentry VALUES(1, X'7a', 7)")
    edit(
        sample.path,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_schema SET sql = 'CREATE INDEX dentry_ino ON dentry(ino)'"
        " WHERE name = 'dentry_ino'",
    )
    assert fsck(sample.path)[0] == LEFT
    status, output = fsck(sample.path, "--repair")
    assert status == CORRECTED, output
    assert "missing from index dentry_ino" in output
    assert "damaged" not in output
    assert fsck(sample.path)[0] == 0
    assert sample.names() == sorted([*usual(sample), "/z"])


def test_killed_while_it_repairs(tmp_path: Path) -> None:
    """Whatever moment it is killed at, nothing is lost and it can be run again."""
    path, whole = tmp_path / "target", tmp_path / "whole"
    made = many(path, count=300)
    with open_target("file", path, checksums=False) as target:
        kept = target.create_and_write(b"kept" * 2000)
    edit(path, "DELETE FROM inode WHERE ino = (SELECT max(ino) FROM inode)")
    damaged(path, lambda c: c[: 5 * 4096] + b"\xa5" * 4096 + c[6 * 4096 :])
    whole.mkdir()
    shutil.copy(path, whole)
    shutil.copytree(f"{path}.regions", whole / "target.regions")
    calls = "rename,unlink,fsync,fdatasync,pwrite64"
    for number in range(1, 600, 53):
        for old in (path, f"{path}.regions", f"{path}.lost+found"):
            if os.path.isdir(old):
                shutil.rmtree(old)
            else:
                Path(old).unlink(missing_ok=True)
        shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
        done = subprocess.run(
            ["strace", "-f", "-qq", "-o", str(tmp_path / "trace"), "-e", f"trace={calls}",
             "-e", f"inject={calls}:signal=KILL:when={number}",
             *COMMAND, "fsck", "--repair", str(path)],
            env=environment(), timeout=PATIENCE, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode in (CORRECTED, -signal.SIGKILL, 128 + signal.SIGKILL)
        assert fsck(path, "--repair")[0] in (0, CORRECTED)
        assert fsck(path)[0] == 0
        found_again(path, made)
        lost = Path(f"{path}.lost+found")
        with open_target("file", path, checksums=None) as target:
            assert (lost / kept.hex()).exists() or target.read(kept, 0, 4) == b"kept"
        if done.returncode == CORRECTED:
            break
    else:
        pytest.fail("it never came to its end")


# What it refuses


def test_a_target_that_is_open(tmp_path: Path) -> None:
    path = tmp_path / "target"
    with python_process("-c", HOLD, str(path)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for options in ((), ("--repair",)):
            status, output = fsck_process(path, *options)
            assert status == FAILED
            assert f"already open in process {process.pid}" in output
            assert output.count("\n") == 1


def test_a_catalogue_read_by_another_process_is_not_damaged(sample: Sample) -> None:
    before = sample.path.read_bytes()
    with contextlib.closing(sqlite3.connect(sample.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        status, output = fsck_process(sample.path, "--repair")
        assert status == FAILED
        assert "locked" in output
    assert sample.path.read_bytes() == before
    assert not Path(f"{sample.path}.lost+found").exists()


def test_a_path_without_a_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("somebody's work\n" * 100)
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").touch()
    for name in ("text", "directory", "empty", "missing", "text/below"):
        status, output = fsck_process(tmp_path / name, "--repair")
        assert status == FAILED
        assert output.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["directory", "empty", "text"]
    assert run("fsck").returncode == USAGE
    assert run("fsck", "--wrong", tmp_path).returncode == USAGE


def test_a_newer_target_is_left_alone(sample: Sample) -> None:
    edit(sample.path, "PRAGMA user_version = 99")
    before = sample.path.read_bytes()
    status, output = fsck_process(sample.path, "--repair")
    assert status == FAILED
    assert "99" in output
    assert sample.path.read_bytes() == before


def test_an_old_version_is_checked_too(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent.parent / "data" / "v1", tmp_path / "v1")
    path = tmp_path / "v1" / "file"
    assert fsck(path) == (0, f"{path}: 0 problems, 0 corrected\n")
    edit(path, "UPDATE inode SET nlink = 7 WHERE ino = 1")
    assert fsck(path)[0] == LEFT
    assert fsck(path, "--repair")[0] == CORRECTED
    assert fsck(path)[0] == 0
