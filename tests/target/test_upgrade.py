"""Targets of older versions: ``tests/data/vN`` was made by the code that wrote version N."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.helpers import PATIENCE, environment
from warabi import errors
from warabi.metadata.schema import SCHEMA_VERSION
from warabi.region import RegionID
from warabi.target import opening
from warabi.target.config import FileConfig, PmemConfig
from warabi.target.target import Target
from warabi.tools.cli.main import main

DATA = Path(__file__).parent.parent / "data"
STAMP = 1_700_000_000_000_000_000
REGIONS = {
    "file": ("00000000000000037a932d92621cc968", "0000000000000007043fb304b048dcca",
             "00000000000000067a117427a4f83bf8", "132c035f-3bb5-47d3-bfc3-6c2b195f5508"),
    "pmem": ("00000000000000036808344cff0e4bf5", "00000000000000073d1587defd4bb03c",
             "000000000000000632e587e83d49b091", "0400e8c9-3cd2-430a-841a-4ce6c281e1c9"),
}  # fmt: skip
"""IDs of the named region, the nameless one and the empty one, and the target's UUID."""


def open_target(path: Path, kind: str, **settings: Any) -> Target:
    if kind == "pmem":
        return opening.open_pmem(PmemConfig(path=str(path), **settings))
    return opening.open_file(FileConfig(path=str(path), **settings))


@pytest.fixture(params=sorted(REGIONS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=range(1, SCHEMA_VERSION))
def old(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def path(kind: str, old: int, tmp_path: Path) -> Path:
    shutil.copytree(DATA / f"v{old}", tmp_path / "old")
    return tmp_path / "old" / kind


def version(path: Path) -> int:
    """As the file itself says it, whatever its WAL says."""
    return int.from_bytes(path.read_bytes()[60:64], "big")


def compare(target: Target, kind: str) -> None:
    """Everything is as it was when the old version wrote it."""
    *texts, uuid = REGIONS[kind]
    named, nameless, empty = (RegionID(bytes.fromhex(text)) for text in texts)
    names = target.namespace
    assert target.uuid == uuid
    assert target.list() == [named, empty, nameless]
    assert target.read(named, 0, 100) == b"first run\n" * 10
    assert target.read(nameless, 0, 5120) == bytes(range(256)) * 20
    assert target.size(empty) == 0
    assert sorted(target.stat(named).names) == [
        "/latest", "/results/na\udcfeme \u20ac", "/results/run 1",
    ]  # fmt: skip
    assert target.stat(nameless).names == []
    assert names.readlink(names.resolve("/pointer").ino) == b"results/run 1"
    assert names.resolve("/queue").mode == 0o10600
    directory, file = names.resolve("/results"), names.resolve("/latest")
    assert (directory.mode, directory.uid, directory.gid) == (0o42750, 1000, 100)
    assert (file.mode, file.uid, file.gid, file.nlink) == (0o100640, 1000, 100, 3)
    assert (file.btime_ns, file.flags) == (0, 0)  # not known
    assert names.getxattr(file.ino, b"user.note") == b"bytes \x00\xff of any kind"
    assert names.getxattr(directory.ino, b"user.owner") == b"physics"
    assert (directory.atime_ns, directory.mtime_ns) == (STAMP, STAMP + 1000)
    assert (file.atime_ns, file.mtime_ns) == (STAMP + 1, STAMP + 1001)
    assert [name for name, _ in names.readdir(1)] == [
        b"empty", b"latest", b"pointer", b"queue", b"results", nameless.hex().encode(),
    ]  # fmt: skip
    capacity = (8 << 20) if kind == "pmem" else None
    assert target.sizes.capacity == capacity


def test_an_old_version_is_migrated(path: Path, kind: str, old: int) -> None:
    assert version(path) == old
    with open_target(path, kind) as target:
        assert version(path) == SCHEMA_VERSION  # before anything else happens
        compare(target, kind)
    with open_target(path, kind) as target:
        compare(target, kind)
        target.erase(target.create_and_write(b"x", persist=True))
    with open_target(path, kind, checksums=True) as target:
        compare(target, kind)


@pytest.mark.parametrize("joined", [False, True])
def test_staged_names_are_only_in_targets_that_older_programs_refuse(
    path: Path, kind: str, old: int, joined: bool
) -> None:
    """They look at the version in the header of the file, which has it before names are staged."""
    with open_target(path, kind) as target:
        assert version(path) >= 4
        inode = target.namespace.mknod(1, b"one", 0o100644, 0, 0, 0)
        target.commit()
    with contextlib.closing(sqlite3.connect(path)) as database, database:  # as after a kill
        database.execute("UPDATE dentry SET parent = -parent WHERE ino = ?", (inode.ino,))
        database.execute("UPDATE meta SET value = 0 WHERE key = 'clean'")
        if joined:
            database.execute("INSERT INTO meta VALUES('joined', 1)")
    assert version(path) >= 4
    with open_target(path, kind) as target:
        names = [name for name, _ in target.namespace.readdir(1)]
        assert (b"one" in names) == joined
        assert (inode.region in target.list()) == joined
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert not database.execute("SELECT 1 FROM dentry WHERE parent <= 0").fetchall()


def test_the_wrong_type_does_not_migrate(path: Path, kind: str, old: int) -> None:
    with pytest.raises(errors.ConfigError):
        open_target(path, "file" if kind == "pmem" else "pmem")
    assert version(path) == old


def test_killed_while_it_migrates(path: Path, kind: str, old: int, tmp_path: Path) -> None:
    """Killed at any write or sync, it leaves a target that opens, of one version or the other."""
    script = (
        "import sys; from pathlib import Path; from tests.target.test_upgrade import open_target;"
        "open_target(Path(sys.argv[1]), sys.argv[2])._catalogue.abandon()"
    )
    found = set()
    call = "pwrite64,fdatasync,fsync"
    for number in range(1, 40, 3 if kind == "pmem" else 2):
        shutil.rmtree(tmp_path / "old")
        shutil.copytree(DATA / f"v{old}", tmp_path / "old")
        done = subprocess.run(
            ["strace", "-f", "-qq", "-o", str(tmp_path / "trace"), "-e", f"trace={call}",
             "-e", f"inject={call}:signal=KILL:when={number}",
             sys.executable, "-c", script, str(path), kind],
            env=environment(), timeout=PATIENCE, capture_output=True, text=True, check=False,
        )  # fmt: skip
        found.add(version(path))
        with open_target(path, kind) as target:
            compare(target, kind)
        if done.returncode == 0:
            break
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    else:
        pytest.fail("it never came to its end")
    assert found == {old, SCHEMA_VERSION}


@pytest.mark.parametrize("old", [1], indirect=True)
def test_a_step_that_fails_changes_nothing(path: Path, kind: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE unsettled(something)")  # stands in the way of the second
    with pytest.raises(errors.CorruptTarget):
        open_target(path, kind)
    assert version(path) == 1
    with contextlib.closing(sqlite3.connect(path)) as database:
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_schema")]
        assert "checksum" not in tables
        database.execute("DROP TABLE unsettled")
    with open_target(path, kind) as target:
        compare(target, kind)


def test_a_newer_version_is_refused(path: Path, kind: str) -> None:
    open_target(path, kind).close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(errors.ConfigError, match=re.escape(f"schema {SCHEMA_VERSION + 1}")):
        open_target(path, kind)


def test_an_old_version_is_checked(path: Path, kind: str, old: int) -> None:
    """As it is, and by a repair, which brings it up to date."""
    for options, now in (((), old), (("--repair",), SCHEMA_VERSION)):
        done = CliRunner().invoke(main, ["fsck", *options, str(path)])
        assert (done.exit_code, version(path)) == (0, now), done.output
    with open_target(path, kind) as target:
        compare(target, kind)


def test_an_old_catalogue_is_salvaged(path: Path, kind: str, old: int) -> None:
    """By what can be read of it as it was."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        size = database.execute("PRAGMA page_size").fetchone()[0]
        sql = "SELECT rootpage FROM sqlite_schema WHERE name = 'anonymous'"
        index = database.execute(sql).fetchone()[0] - 1
    data = bytearray(path.read_bytes())
    data[index * size : (index + 1) * size] = b"\xa5" * size
    path.write_bytes(data)
    done = CliRunner().invoke(main, ["fsck", "--repair", str(path)])
    assert (done.exit_code, "rebuilt from what can be read" in done.output) == (1, True)
    with open_target(path, kind) as target:
        *texts, _ = REGIONS[kind]
        named, nameless, empty = (RegionID(bytes.fromhex(text)) for text in texts)
        assert target.list() == [named, empty, nameless]
        assert target.read(nameless, 0, 5120) == bytes(range(256)) * 20
