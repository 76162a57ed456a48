"""Real programs on a real mount: whole trees, large files, git, SQLite, fio."""

from __future__ import annotations

import os
import sqlite3
import struct
import sysconfig
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.mount.conftest import disposable
from tests.mount.support import MIB, Mount, another_python, line_of, mounting, run

LONG = 300.0  # seconds; the limit of one tool, not what it takes
GIB = 1024 * MIB


@pytest.fixture(scope="module")
def library() -> Iterator[Path]:
    """A copy of the standard library that nobody changes meanwhile."""
    with disposable("/tmp") as path:
        source = sysconfig.get_path("stdlib")
        copy = ("rsync", "-a", "--exclude=/site-packages", f"{source}/", path / "lib")
        # 24: a file was gone, such as one under a temporary name that a Python was compiling.
        assert run(*copy, timeout=LONG, check=False).returncode in (0, 24)
        yield path / "lib"


def _lines(*command: str | Path) -> list[str]:
    return run(*command, timeout=LONG).stdout.splitlines()


def _used(path: Path) -> int:
    """Bytes in files below *path*, by ``du``, which counts what a directory itself takes too."""
    directories = _lines("find", path, "-type", "d", "-printf", "%s\n")
    return int(_lines("du", "-sb", path)[0].split()[0]) - sum(map(int, directories))


@pytest.mark.timeout(LONG)
def test_a_real_tree_is_copied_compared_counted_and_removed(mounted: Mount, library: Path) -> None:
    copy = mounted.path / "lib"
    run("cp", "-a", library, copy, timeout=LONG)

    assert _lines("diff", "-r", "--no-dereference", library, copy) == []
    assert _lines("rsync", "-nacH", "--out-format=%i %n", f"{library}/", f"{copy}/") == []
    assert len(_lines("find", copy)) == len(_lines("find", library)) > 2000
    assert _used(copy) == _used(library) > 50 * MIB

    run("rm", "-rf", copy, timeout=LONG)
    assert os.listdir(mounted.path) == []


@pytest.mark.timeout(LONG)
def test_a_real_tree_survives_a_remount(place: Path, library: Path) -> None:
    with mounting(f"file:{place}/target", place) as mount:
        run("cp", "-a", library / "json", library / "email", mount.path)
        mount.remount()
        for name in ("json", "email"):
            assert _lines("diff", "-r", library / name, mount.path / name) == []
            arguments = ("-nac", "--out-format=%i %n")
            assert _lines("rsync", *arguments, f"{library / name}/", f"{mount.path / name}/") == []


@pytest.fixture(scope="module")
def gibibyte() -> Iterator[Path]:
    """A file of 1 GiB, no two pages of which are the same."""
    with disposable("/tmp") as path:
        block = bytearray(os.urandom(16 * MIB))
        with open(path / "random", "wb") as file:
            for start in range(0, GIB, len(block)):
                for page in range(0, len(block), 4096):
                    struct.pack_into("<Q", block, page, start + page)
                file.write(block)
        yield path / "random"


@pytest.mark.timeout(LONG)
def test_a_file_of_1_gib_goes_in_and_out_with_dd(
    mounted: Mount, place: Path, gibibyte: Path
) -> None:
    big, back = mounted.path / "big", place / "back"
    run("dd", f"if={gibibyte}", f"of={big}", "bs=1M", timeout=LONG)
    assert big.stat().st_size == GIB
    # O_DIRECT, so that the bytes come from the mount and not from the page cache.
    run("dd", f"if={big}", f"of={back}", "bs=1M", "iflag=direct", timeout=LONG)
    run("cmp", gibibyte, back, timeout=LONG)
    run("cmp", gibibyte, big, timeout=LONG)
    big.unlink()
    assert os.listdir(mounted.path) == []


FIO = {
    "aligned": ["--bs=4k"],
    "any_size_and_offset": ["--bsrange=512-128k", "--bs_unaligned"],
    "direct": ["--bs=4k", "--direct=1"],
    "large_blocks": ["--bs=1M"],
    "four_processes": ["--bs=16k", "--numjobs=4", "--filename_format=$jobnum"],
}


@pytest.mark.parametrize("arguments", FIO.values(), ids=FIO.keys())
def test_fio_finds_what_it_wrote_at_random_offsets(mounted: Mount, arguments: list[str]) -> None:
    run(
        "fio", "--name=verify", f"--directory={mounted.path}", "--size=32M", "--rw=randwrite",
        "--ioengine=psync", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
        "--randseed=20", "--end_fsync=1", "--verify_state_save=0", *arguments,
    )  # fmt: skip


def test_truncate_cuts_off_and_fills_with_zeros(mounted: Mount) -> None:
    path = mounted.path / "file"
    data = os.urandom(100_000)
    path.write_bytes(data)
    run("truncate", "-s", "54321", path)
    assert path.read_bytes() == data[:54321]
    run("truncate", "-s", "200000", path)
    assert path.read_bytes() == data[:54321] + bytes(200_000 - 54321)
    run("truncate", "-s", "0", path)
    assert path.read_bytes() == b""
    run("truncate", "-s", "8192", path)
    assert path.read_bytes() == bytes(8192)


APPEND = """
import os, sys
path, who = sys.argv[1:]
fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
print("open", flush=True)
input()
for number in range(2000):
    record = f"{who} {number:05}\\n".encode()
    assert os.write(fd, record) == len(record)
print("done", flush=True)
"""


def test_no_record_is_lost_when_two_processes_append(mounted: Mount) -> None:
    path = mounted.path / "journal"
    with another_python(APPEND, path, "a") as one, another_python(APPEND, path, "b") as two:
        assert line_of(one) == line_of(two) == "open"
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert line_of(one) == line_of(two) == "done"
    lines = path.read_text().splitlines()
    assert sorted(lines) == [f"{who} {n:05}" for who in "ab" for n in range(2000)]
    assert [line for line in lines if line.startswith("a")] == [f"a {n:05}" for n in range(2000)]


GIT = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.org")


def test_git_clones_checks_and_commits(mounted: Mount, place: Path) -> None:
    origin, clone = place / "origin", mounted.path / "clone"
    run("git", "init", "-q", "-b", "main", origin)
    for number in range(5):
        (origin / f"dir{number}").mkdir()
        for name in range(10):
            (origin / f"dir{number}" / f"file{name}").write_text(f"{number} {name}\n" * 100)
        (origin / "changing").write_text(f"version {number}\n")
        run(*GIT, "-C", origin, "add", ".")
        run(*GIT, "-C", origin, "commit", "-q", "-m", f"commit {number}")

    run("git", "clone", "-q", "--no-hardlinks", origin, clone)
    assert _lines("git", "-C", clone, "fsck", "--full", "--strict") == []
    assert _lines("git", "-C", clone, "status", "--porcelain") == []
    (clone / "changing").write_text("from the mount\n")
    run(*GIT, "-C", clone, "commit", "-q", "-a", "-m", "in the clone")
    run("git", "-C", clone, "repack", "-q", "-a", "-d")
    run("git", "-C", clone, "gc", "-q", "--prune=now")
    assert _lines("git", "-C", clone, "fsck", "--full", "--strict") == []
    assert len(_lines("git", "-C", clone, "log", "--oneline")) == 6
    run("git", "-C", clone, "push", "-q", "origin", "main:from-the-mount")
    assert _lines("git", "-C", origin, "show", "from-the-mount:changing") == ["from the mount"]


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite_commits_1000_transactions(mounted: Mount, journal: str) -> None:
    path = mounted.path / "data.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        assert db.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
        db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)")
        for number in range(1000):
            db.execute("BEGIN IMMEDIATE")
            db.execute("INSERT INTO t VALUES(?, ?)", (number, bytes([number % 256]) * 500))
            db.execute("COMMIT")
    assert _lines("sqlite3", path, "PRAGMA integrity_check") == ["ok"]
    assert _lines("sqlite3", path, "SELECT count(*) FROM t") == ["1000"]


WRITER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
for number in range(100):
    db.execute("INSERT INTO t(who, n) VALUES(?, ?)", (sys.argv[2], number))
print("done", flush=True)
db.close()
"""


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_two_processes_write_one_sqlite_database(mounted: Mount, journal: str) -> None:
    path = mounted.path / "data.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        assert db.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
        db.execute("CREATE TABLE t(who, n)")
        with another_python(WRITER, path, "a") as one, another_python(WRITER, path, "b") as two:
            assert line_of(one) == line_of(two) == "done"
        assert db.execute("SELECT who, count(*) FROM t GROUP BY who").fetchall() == [
            ("a", 100), ("b", 100),
        ]  # fmt: skip
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
