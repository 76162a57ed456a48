"""Programs that people run on file systems; more of them are in ``tests/mount/test_real_input.py``.

Each does its work on a tmpfs too, where a failure would be the test's own.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.support import Mount, another_python, line_of, mounting, python, run, watchdog
from tests.posix.support import KINDS, NOBODY, directory, file, make, mode_of
from warabifs.frontends.base import Ability

HDF5 = """
import sys
import h5py, numpy as np
path = sys.argv[1]
data = np.arange(300_000, dtype="f8").reshape(300, 1000)
with h5py.File(path, "w") as file:
    file.create_dataset("plain", data=data)
    file.create_dataset("packed", data=data, chunks=(50, 100), compression="gzip", shuffle=True)
    growing = file.create_dataset("growing", (0, 10), "f8", maxshape=(None, 10), chunks=(7, 10))
    for number in range(20):
        growing.resize(number + 1, axis=0)
        growing[number] = number
    file["link"] = h5py.SoftLink("/plain")
    file["plain"].attrs["unit"] = "m"
with h5py.File(path, "r+") as file:
    file["packed"][100:200, ::7] = -1
    del file["plain"]
    file.create_dataset("plain", data=data[::-1])
with h5py.File(path) as file:
    expected = data.copy()
    expected[100:200, ::7] = -1
    assert (file["packed"][:] == expected).all()
    assert (file["link"][:] == data[::-1]).all()
    assert (file["growing"][:, 3] == np.arange(20)).all()
try:
    with h5py.File(path, "r+"), h5py.File(path, "w"):
        print("opened twice")
except OSError:
    print("ok")
"""

ZARR = """
import sys
import numpy as np, zarr
root = zarr.open_group(sys.argv[1], mode="w")
data = np.random.default_rng(1).normal(size=(200, 300))
array = root.create_array("a/b/c", shape=data.shape, chunks=(32, 50), dtype=data.dtype)
array[:] = data
array[10:90, 5:7] = 0
data[10:90, 5:7] = 0
array.resize((250, 300))
array.append(np.ones((10, 300)))
array.attrs["unit"] = "m"
again = zarr.open_group(sys.argv[1], mode="r")["a/b/c"]
assert again.shape == (260, 300) and again.attrs["unit"] == "m"
assert (again[:200] == data).all() and (again[250:] == 1).all() and (again[200:250] == 0).all()
assert sorted(zarr.open_group(sys.argv[1])["a"].keys()) == ["b"]
print("ok")
"""

MEMMAP = """
import sys
import numpy as np
data = np.memmap(sys.argv[1], dtype="i4", mode="w+", shape=(1000, 500))
data[:] = np.arange(500_000).reshape(1000, 500)
data.flush()
again = np.memmap(sys.argv[1], dtype="i4", mode="r+", shape=(1000, 500))
again[::3] *= -1
assert (data[3] < 0).all() and data[4, 4] == 2004
del data, again
copy = np.memmap(sys.argv[1], dtype="i4", mode="c", shape=(1000, 500))
copy[:] = 7
assert np.fromfile(sys.argv[1], dtype="i4").reshape(1000, 500)[4, 4] == 2004
np.save(sys.argv[1] + ".npy", copy)
assert (np.load(sys.argv[1] + ".npy", mmap_mode="r") == 7).all()
print("ok")
"""


@pytest.mark.parametrize("script", [HDF5, ZARR, MEMMAP], ids=["h5py", "zarr", "memmap"])
def test_arrays_are_stored_changed_and_read(where: Path, script: str) -> None:
    assert python(script, where / "data") == "ok\n"


def test_pip_installs_here_and_what_it_installed_runs(where: Path) -> None:
    project = directory(where / "project")
    file(project / "pyproject.toml", b"""
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "tiny"
version = "1.2"
[project.scripts]
tiny = "tiny:main"
""")  # fmt: skip
    file(directory(project / "tiny") / "__init__.py", b"def main():\n    print('tiny runs')\n")
    scratch = directory(where / "tmp")
    run(
        "env", f"TMPDIR={scratch}", sys.executable, "-m", "pip", "--disable-pip-version-check",
        "install", "--no-index", "--no-build-isolation", "--no-cache-dir",
        "--target", where / "lib", project, timeout=100,
    )  # fmt: skip
    script = "import sys; sys.path.insert(0, sys.argv[1]); import tiny; tiny.main()"
    assert python(script, where / "lib") == "tiny runs\n"
    assert (where / "lib" / "tiny-1.2.dist-info" / "RECORD").stat().st_size > 0


MAKEFILE = b"""
parts := $(patsubst %.c,%.o,$(wildcard part*.c))
all: program
program: main.o libparts.a
\t$(CC) -o $@ $^
libparts.a: $(parts)
\tar rcs $@ $^
%.o: %.c parts.h
\t$(CC) -c -o $@ $<
"""


def test_make_builds_a_program_and_rebuilds_what_changed(where: Path) -> None:
    count = 8
    file(where / "Makefile", MAKEFILE)
    names = [f"part{number}" for number in range(count)]
    file(where / "parts.h", "".join(f"int {name}(void);\n" for name in names).encode())
    for number, name in enumerate(names):
        text = f'#include "parts.h"\nint {name}(void) {{ return {number}; }}\n'
        file(where / f"{name}.c", text.encode())
    total = " + ".join(f"{name}()" for name in names)
    main = f'#include <stdio.h>\n#include "parts.h"\nint main() {{ printf("%d", {total}); }}\n'
    file(where / "main.c", main.encode())
    run("make", "-j2", "-C", where)
    assert run(where / "program").stdout == str(sum(range(count)))
    assert "Nothing to be done" in run("make", "-C", where).stdout
    run("sed", "-i", "s/return 3/return 103/", where / "part3.c")
    said = run("make", "-j2", "-C", where).stdout
    assert said.count(" -c -o ") == 1
    assert run(where / "program").stdout == str(sum(range(count)) + 100)


@pytest.fixture
def tree(where: Path) -> Path:
    """A directory with everything in it that an archive may have to keep."""
    top = directory(where / "tree")
    for kind in KINDS:
        if kind != "socket":
            make(kind, top / kind, 0o640, 1234)
    deep = directory(top / ("d" * 200), 0o2770, 7)
    data = file(deep / ("é" * 100), os.urandom(100_001))
    os.link(data, top / "twin")
    os.setxattr(data, "user.x", b"attribute")
    run("setfacl", "-m", "u:1000:rwx", data)
    run("setfacl", "-d", "-m", "g:1000:rx", deep)
    os.utime(data, ns=(10**18 + 1, 10**18 + 123_456_789))
    with open(top / "sparse", "wb") as sparse:
        sparse.seek(1_000_000)
        sparse.write(b"end")
    os.utime(top, ns=(10**18, 10**18))
    return top


def _by_tar(source: Path, target: Path) -> None:
    archive = target.with_suffix(".tar")
    keep = ("--xattrs", "--xattrs-include=*", "--acls", "--sparse", "--numeric-owner")
    run("tar", "--format=pax", *keep, "-C", source, "-cf", archive, ".")
    target.mkdir()
    run("tar", *keep, "-C", target, "-xpf", archive)


COPIES: dict[str, Callable[[Path, Path], object]] = {
    "tar": _by_tar,
    "rsync": lambda source, target: run("rsync", "-aHAX", "--numeric-ids", f"{source}/", target),
    "cp": lambda source, target: run("cp", "-a", source, target),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_and_archives_keep_everything(where: Path, tree: Path, name: str) -> None:
    copy = where / "copy"
    COPIES[name](tree, copy)
    differences = run("rsync", "-nacHAX", "--out-format=%i %n", f"{tree}/", f"{copy}/").stdout
    assert differences == ""
    for path in tree.rglob("*"):
        one, two = path.lstat(), (copy / path.relative_to(tree)).lstat()
        assert one.st_mode == two.st_mode
        assert (one.st_uid, one.st_gid, one.st_nlink) == (two.st_uid, two.st_gid, two.st_nlink)
        if stat.S_ISREG(one.st_mode):
            assert (one.st_size, one.st_mtime_ns) == (two.st_size, two.st_mtime_ns)
    run("diff", "-r", "--no-dereference", "--exclude=fifo", "--exclude=block",
        "--exclude=character", tree, copy)  # fmt: skip


def test_rsync_updates_deletes_and_patches_in_place(where: Path, tree: Path) -> None:
    copy = where / "copy"
    for option in ("--whole-file", "--inplace", "--append-verify", "--delete-after"):
        file(tree / "log", b"x" * 50_000 + os.urandom(50_000))
        run("rsync", "-a", "--no-whole-file", option, f"{tree}/", copy)
        with open(tree / "log", "r+b") as log:
            log.seek(70_000)
            log.write(b"changed")
        file(tree / "new")
        run("rsync", "-ac", "--no-whole-file", "--delete", option, f"{tree}/", copy)
        (tree / "new").unlink()
        run("rsync", "-ac", "--inplace", "--delete", f"{tree}/", copy)
        assert (copy / "log").read_bytes() == (tree / "log").read_bytes()
        assert not (copy / "new").exists()


def test_editors_replace_files(where: Path) -> None:
    path = make("file", where / "text", 0o640, 1000)
    file(path, b"one\ntwo\n")
    os.setxattr(path, "user.x", b"kept by none of them")
    run("sed", "-i.bak", "-e", "s/one/three/", path)
    assert path.read_bytes() == b"three\ntwo\n"
    assert (where / "text.bak").read_bytes() == b"one\ntwo\n"
    assert (mode_of(path), path.stat().st_uid) == (0o640, 1000)
    file(where / "change", b"--- text\n+++ text\n@@ -1,2 +1,2 @@\n-three\n+four\n two\n")
    run("patch", "-d", where, "-p0", "-i", where / "change")
    assert path.read_bytes() == b"four\ntwo\n"
    # As vim does: the old file becomes the backup, the new one is written and synced.
    with open(path, "rb") as reading:
        os.rename(path, where / "text~")
        with open(path, "xb") as writing:
            os.fchmod(writing.fileno(), 0o640)
            writing.write(b"five\n")
            os.fsync(writing.fileno())
        (where / "text~").unlink()
        assert reading.read() == b"four\ntwo\n"
    assert path.read_bytes() == b"five\n"


SQLITE = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
assert db.execute(f"PRAGMA journal_mode = {sys.argv[2]}").fetchone()[0] == sys.argv[2]
db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v)")
print("made", flush=True)
number = 0
while True:
    db.execute("INSERT INTO t(v) VALUES(randomblob(2000))")
    number += 1
    print(number, flush=True)
"""


@pytest.mark.parametrize("journal", ["wal", "delete", "truncate", "persist"])
def test_sqlite_keeps_what_it_committed_before_it_was_killed(where: Path, journal: str) -> None:
    path = where / "data.db"
    with subprocess.Popen(
        [sys.executable, "-c", SQLITE, str(path), journal], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            while line_of(process) != "60":
                pass
        finally:
            process.kill()
    assert run("sqlite3", path, "PRAGMA integrity_check").stdout == "ok\n"
    assert int(run("sqlite3", path, "SELECT count(*) FROM t").stdout) >= 60
    run("sqlite3", path, "VACUUM; PRAGMA wal_checkpoint(TRUNCATE);")
    assert run("sqlite3", path, "PRAGMA integrity_check").stdout == "ok\n"


LMDB = """
import sys
import lmdb

def filled(change, step):
    for number in range(0, 5000, step):
        change.put(b"%d" % number, bytes(200) + b"%d" % number)

for writemap in False, True:
    with lmdb.open(sys.argv[1], subdir=False, map_size=64 << 20, writemap=writemap) as db:
        with db.begin(write=True) as change:
            filled(change, 1)
        with db.begin(write=True) as change:
            for number in range(0, 5000, 3):
                assert change.delete(b"%d" % number)
        with db.begin(write=True) as change:
            filled(change, 2)
            change.abort()
    with lmdb.open(sys.argv[1], subdir=False, readonly=True) as db, db.begin() as found:
        assert found.stat()["entries"] == 5000 - 1667
        assert all(value == bytes(200) + key for key, value in found.cursor())
print("ok")
"""


def test_lmdb_stores_by_writes_and_by_a_shared_mapping(where: Path) -> None:
    assert python(LMDB, where / "data") == "ok\n"


DUCKDB = """
import sys
import duckdb

with duckdb.connect(sys.argv[1], config={"threads": 2}) as db:
    db.execute("CREATE TABLE t AS SELECT i, i % 97 AS k, 'old' AS v FROM range(100000) r(i)")
    db.execute("CHECKPOINT")
    db.execute("BEGIN")
    db.execute("DELETE FROM t WHERE k < 10")
    db.execute("ROLLBACK")
    db.execute("UPDATE t SET v = 'new' WHERE k = 5")
    db.execute(f"COPY t TO '{sys.argv[1]}.parquet'")
    print("copied", flush=True)
    number = 0
    while True:
        db.execute("INSERT INTO t VALUES (-1, 0, repeat('x', 2000))")
        number += 1
        print(number, flush=True)
"""

DUCKDB_FOUND = """
import sys
import duckdb

with duckdb.connect(sys.argv[1]) as db:
    (added,) = db.execute("SELECT count(*) FROM t WHERE i < 0").fetchone()
    db.execute("DELETE FROM t WHERE i < 0")
    db.execute("CHECKPOINT")
with duckdb.connect(sys.argv[1], read_only=True) as db:
    counted = db.execute("SELECT count(*), count(DISTINCT k), sum(i) FROM t").fetchone()
    assert counted == (100000, 97, 4999950000), counted
    assert db.execute("SELECT count(*) FROM t WHERE v = 'new'").fetchone() == (1031,)
    different = f"SELECT * FROM t EXCEPT SELECT * FROM '{sys.argv[1]}.parquet'"
    assert db.execute(different).fetchall() == []
print(added)
"""


def test_duckdb_keeps_what_it_committed_before_it_was_killed(where: Path) -> None:
    path = where / "data.duckdb"
    with another_python(DUCKDB, path) as process:
        while line_of(process) != "30":
            pass
        second = run(sys.executable, "-c", DUCKDB_FOUND, path, check=False)
        assert "Could not set lock" in second.stderr  # the first one's is seen
    assert int(python(DUCKDB_FOUND, path)) >= 30


GIT = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.org")


def test_git_rebases_stashes_and_keeps_worktrees(where: Path) -> None:
    repository, tree, clone = where / "repository", where / "tree", where / "clone"

    def git(*words: str | Path, inside: Path = repository) -> str:
        return run(*GIT, "-C", inside, *words).stdout

    def commit(name: str, inside: Path = repository) -> None:
        file(inside / name, f"{name}\n".encode() * 1000)
        git("add", name, inside=inside)
        git("commit", "-q", "-m", name, inside=inside)

    run("git", "init", "-q", "-b", "main", repository)
    commit("a")
    commit("b")
    git("worktree", "add", "-q", "-b", "topic", tree, "main~1")
    commit("c", tree)
    commit("d", tree)
    git("rebase", "-q", "main", inside=tree)
    file(repository / "a", b"changed\n")
    git("stash", "-q")
    git("merge", "-q", "topic")
    git("stash", "pop", "-q")
    assert git("status", "--porcelain") == " M a\n"
    git("commit", "-q", "-a", "-m", "changed")
    git("worktree", "move", tree, where / "moved")
    git("worktree", "remove", where / "moved")
    run("git", "clone", "-q", repository, clone)  # with hard links
    git("gc", "-q", "--prune=now")
    for each in repository, clone:
        assert git("fsck", "--strict", "--no-dangling", inside=each) == ""
        assert git("log", "--format=%s", inside=each).split() == ["changed", *"dcba"]
        assert git("status", "--porcelain", inside=each) == ""


@pytest.mark.needs(Ability.SEEK_DATA)
def test_disk_images_stay_sparse(where: Path) -> None:
    raw, packed, again = where / "raw", where / "packed", where / "again"
    size, start, data = 1 << 28, 100 << 20, os.urandom(1 << 20)
    run("qemu-img", "create", "-f", "raw", raw, str(size))
    with open(raw, "r+b") as image:
        image.seek(start)
        image.write(data)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, packed)
    run("qemu-img", "check", packed)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", packed, again)
    assert run("qemu-img", "compare", raw, again).returncode == 0
    for path in raw, again:
        found = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", path).stdout)
        assert sum(extent["length"] for extent in found) == size
        extents = [(extent["start"], extent["length"]) for extent in found if extent["data"]]
        assert (start, len(data)) in extents
        assert sum(length for _, length in extents) < 2 * len(data)
        assert os.stat(path).st_blocks * 512 < 2 * len(data)


# PostgreSQL, which no root may run


@contextlib.contextmanager
def postgres(data: Path, sockets: Path, *, end: str) -> Iterator[None]:
    """A server on *data* while the block runs; *end* is the mode of ``pg_ctl stop``."""
    options = f"-c listen_addresses='' -c unix_socket_directories={sockets}"
    as_nobody("pg_ctl", "-w", "-D", data, "-l", sockets / "log", "-o", options, "start")
    try:
        yield
    finally:
        as_nobody("pg_ctl", "-w", "-D", data, "-m", end, "stop")


def as_nobody(program: str, *arguments: str | Path) -> str:
    place = max(glob.glob(f"/usr/lib/postgresql/*/bin/{program}"))
    who = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    return run(*who, "env", "-C", "/", place, *arguments, timeout=200).stdout


@pytest.fixture
def filed(place: Path) -> Iterator[Mount]:
    """A mount of a target in files."""
    with mounting(f"file:{place}/target", place) as mount, watchdog(mount, 280):
        yield mount


@pytest.mark.timeout(300)
def test_postgresql_works_crashes_and_recovers(filed: Mount, place: Path) -> None:
    data = directory(filed.path / "data", 0o700, NOBODY)
    sockets = directory(place / "s", 0o700, NOBODY)
    as_nobody("initdb", "-D", data, "-U", "me", "--auth=trust", "--data-checksums", "--no-locale")
    bench = ("-h", sockets, "-U", "me", "postgres")
    query = "SELECT count(*) FROM pgbench_history"
    with postgres(data, sockets, end="immediate"):
        as_nobody("pgbench", "-i", "-s", "1", "-q", *bench)
        said = as_nobody("pgbench", "-c", "2", "-t", "100", *bench)
        assert "200/200" in said
    filed.remount()
    with postgres(data, sockets, end="fast"):
        assert as_nobody("psql", "-Atc", query, *bench).strip() == "200"
        as_nobody("psql", "-c", "CREATE EXTENSION amcheck", *bench)
        as_nobody("pg_amcheck", "--heapallindexed", *bench)
        as_nobody("pgbench", "-S", "-c", "2", "-t", "100", *bench)
    as_nobody("pg_checksums", "--check", "-D", data)
