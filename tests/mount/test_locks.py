"""Locks of programs on two mounts of one provider, as of flock(2) and fcntl(2)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import signal
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import disposable, limit_of
from tests.mount.support import (
    Mount,
    another_python,
    fails_with,
    line_of,
    mounting,
    python,
    run,
    serving,
    wait_until,
)
from tests.mount.test_outage import Service
from tests.mount.together import OPTIONS, Together, emptied, region_of, together
from tests.posix.support import file, opened
from tests.posix.test_locks import LOCKED
from tests.support.relay import Relay, relay
from warabi import errors

F_OFD_SETLK = 37


@pytest.fixture(scope="module")
def both_module() -> Iterator[Together]:
    with disposable("/tmp") as path, together("na+sm", path, *OPTIONS) as four:
        yield four


@pytest.fixture
def both(request: pytest.FixtureRequest, both_module: Together) -> Iterator[Together]:
    with emptied(both_module, limit_of(request)) as four:
        yield four


def wait_for_request(pid: int, mount: Mount) -> None:
    """Return when a process that uses *mount* waits for a lock, and the provider knows."""
    stack = Path(f"/proc/{pid}/stack")
    wait_until(lambda: "fuse_setlk" in stack.read_text(), "a request that waits")
    assert not (mount.path / "missing").exists()  # a later request over the same connection


def range_lock(kind: int, start: int, size: int) -> bytes:
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, start, size, 0)


def test_flock_of_two_mounts(both: Together) -> None:
    path = file(both.first.path / "file")
    with opened(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_SH)
        script = ("flock", "-n", "-x", both.second.path / "file", "true")
        assert run(*script, check=False).returncode == 1
        assert run("flock", "-n", "-s", both.second.path / "file", "true").returncode == 0
        with pytest.raises(errors.PathError):
            both.target.lock(region_of(path), flock=True, wait=False)
    assert run("flock", "-w", "30", "-x", both.second.path / "file", "true").returncode == 0


def test_what_waits_on_another_mount_sees_what_was_written(both: Together) -> None:
    script = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
old = os.pread(fd, 100, 0)
print(len(old), flush=True)
fcntl.lockf(fd, fcntl.LOCK_EX)
print(os.pread(fd, 100, 0).decode(), os.fstat(fd).st_size, flush=True)
"""
    path = file(both.first.path / "file", b"old")
    with opened(path) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        with another_python(script, both.second.path / "file") as other:
            assert line_of(other) == "3"
            wait_for_request(other.pid, both.second)
            os.pwrite(fd, b"new and longer", 0)
            fcntl.lockf(fd, fcntl.LOCK_UN)
            assert line_of(other) == "new and longer 14"


def test_a_signal_ends_the_waiting(both: Together) -> None:
    script = """
import fcntl, os, signal, sys
def interrupted(*_):
    raise InterruptedError
signal.signal(signal.SIGUSR1, interrupted)
fd = os.open(sys.argv[1], os.O_RDWR)
for lock in (fcntl.flock, fcntl.lockf):
    print("waiting", flush=True)
    try:
        lock(fd, fcntl.LOCK_EX)
    except InterruptedError:
        print("interrupted", flush=True)
"""
    path = file(both.first.path / "file")
    with opened(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.lockf(fd, fcntl.LOCK_EX)
        with another_python(script, both.second.path / "file") as other:
            for _ in range(2):
                assert line_of(other) == "waiting"
                wait_for_request(other.pid, both.second)
                other.send_signal(signal.SIGUSR1)
                assert line_of(other) == "interrupted"
            assert other.wait(30) == 0
    with opened(both.second.path / "file") as fd:  # and left nothing behind
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.lockf(fd, fcntl.LOCK_EX)


def test_a_program_that_is_killed_holds_nothing_and_waits_no_more(both: Together) -> None:
    script = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)
fcntl.flock(fd, fcntl.LOCK_SH)
print("locked", flush=True)
fcntl.lockf(fd, fcntl.LOCK_EX, 1, 1)
"""
    path = file(both.first.path / "file")
    with opened(path) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, 1)
        with another_python(script, both.second.path / "file") as other:
            assert line_of(other) == "locked"
            wait_for_request(other.pid, both.second)
            other.kill()
            fcntl.flock(fd, fcntl.LOCK_EX)
            fcntl.lockf(fd, fcntl.LOCK_EX)


def test_processes_that_wait_for_each_other(both: Together) -> None:
    script = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX, 1, 1)
print("locked", flush=True)
fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)
print("got it", flush=True)
"""
    path = file(both.first.path / "file")
    with opened(path) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)
        with another_python(script, both.second.path / "file") as other:
            assert line_of(other) == "locked"
            wait_for_request(other.pid, both.second)
            with fails_with(errno.EDEADLK):
                fcntl.lockf(fd, fcntl.LOCK_EX, 1, 1)
            fcntl.lockf(fd, fcntl.LOCK_UN, 1, 0)
            assert line_of(other) == "got it"


def test_when_locks_end(both: Together) -> None:
    """Those of a process with any descriptor of the file, those of an open file with its last."""
    path, there = file(both.first.path / "file"), both.second.path / "file"
    with opened(path) as fd:
        copy = os.dup(fd)
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.lockf(fd, fcntl.LOCK_EX)
        assert python(LOCKED, there) == "locked locked "
        os.close(copy)
        assert python(LOCKED, there) == "locked free "
        fcntl.lockf(fd, fcntl.LOCK_EX)
        child = os.fork()
        if not child:
            os.close(fd)  # no lock of the parent's
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert python(LOCKED, there) == "locked locked "
        with opened(path):
            pass
        assert python(LOCKED, there) == "locked free "
    # The kernel does not wait for the request by which the last close is told.
    wait_until(lambda: python(LOCKED, there) == "free free ", "the end of the locks")
    with opened(path) as fd:
        fcntl.fcntl(fd, F_OFD_SETLK, range_lock(fcntl.F_WRLCK, 0, 0))
        with opened(path):
            pass
        assert python(LOCKED, there) == "free locked "
    wait_until(lambda: python(LOCKED, there) == "free free ", "the end of the locks")


def test_a_mount_that_is_killed_holds_nothing(both: Together, place: Path) -> None:
    path = file(both.first.path / "file")
    with mounting(both.first.source, place, *OPTIONS) as third:
        fd = os.open(third.path / "file", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.lockf(fd, fcntl.LOCK_EX)
        assert python(LOCKED, path) == "locked locked "
        third.kill()
        with fails_with(errno.ENOTCONN, errno.ECONNABORTED):
            os.close(fd)
            os.stat(third.path / "file")
        with opened(path) as mine:
            fcntl.flock(mine, fcntl.LOCK_EX)
            fcntl.lockf(mine, fcntl.LOCK_EX)


def test_locks_that_are_local(both: Together, place: Path) -> None:
    path = file(both.first.path / "file")
    with (
        mounting(both.first.source, place, *OPTIONS, "local_lock=flock") as third,
        opened(third.path / "file") as fd,
    ):
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.lockf(fd, fcntl.LOCK_EX)
        assert python(LOCKED, third.path / "file") == "locked locked "
        assert python(LOCKED, path) == "free locked "


SQLITE = """
import sqlite3, sys
path, number = sys.argv[1], int(sys.argv[2])
database = sqlite3.connect(path, timeout=60, isolation_level=None)
assert database.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)
database.execute("PRAGMA synchronous=OFF")
for turn in range(25):
    database.execute("BEGIN IMMEDIATE")
    (value,) = database.execute("SELECT value FROM counter").fetchone()
    database.execute("UPDATE counter SET value = ?", (value + 1,))
    database.execute("INSERT INTO rows VALUES (?, ?, ?)", (number, turn, "x" * 300))
    database.execute("COMMIT")
"""


def test_a_database_that_programs_on_two_mounts_write(both: Together) -> None:
    path = both.first.path / "database"
    database = sqlite3.connect(path, timeout=60)
    database.execute("CREATE TABLE counter (value)")
    database.execute("INSERT INTO counter VALUES (0)")
    database.execute("CREATE TABLE rows (number, turn, text, UNIQUE (number, turn))")
    database.commit()
    database.close()
    with (
        another_python(SQLITE, path, "1") as one,
        another_python(SQLITE, both.second.path / "database", "2") as two,
    ):
        assert one.wait(60) == 0
        assert two.wait(60) == 0
    for mount in (both.first, both.second):
        database = sqlite3.connect(mount.path / "database", timeout=60)
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("SELECT value FROM counter").fetchone() == (50,)
        assert database.execute("SELECT count(*) FROM rows").fetchone() == (50,)
        database.close()


RANDOM = """
import errno, fcntl, os, random, sys
paths = sys.argv[2:]
rng = random.Random(int(sys.argv[1]))
import subprocess
worker = '''
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for line in sys.stdin:
    kind, start, size = map(int, line.split())
    try:
        fcntl.lockf(fd, kind, size, start)
        print("ok", flush=True)
    except OSError as error:
        print("refused", flush=True)
'''
start = lambda path: subprocess.Popen([sys.executable, "-c", worker, path],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
workers = [start(path) for path in paths]
for _ in range(400):
    one = rng.choice(workers)
    kind = rng.choice((fcntl.LOCK_SH | fcntl.LOCK_NB, fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN))
    print(kind, rng.randrange(12), rng.randrange(1, 6), file=one.stdin, flush=True)
    print(one.stdout.readline().strip())
for one in workers:
    one.stdin.close()
    one.wait()
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_random_ranges_are_locked_as_locally(both: Together, place: Path, seed: int) -> None:
    """Three programs on two mounts, and on a local file system, which is the oracle."""
    local = file(place / "file")
    file(both.first.path / "file")
    here, there = both.first.path / "file", both.second.path / "file"
    wanted = python(RANDOM, str(seed), local, local, local)
    assert python(RANDOM, str(seed), here, there, there) == wanted
    assert wanted.count("refused") > 30


def test_a_mount_that_was_cut_off_has_its_locks_again(place: Path) -> None:
    with two_ways(place) as (cut_off, other, line):
        path = file(cut_off.path / "file", b"text")
        with opened(path) as fd, opened(other.path / "file") as there:
            fcntl.lockf(fd, fcntl.LOCK_EX, 10, 0)
            fcntl.flock(fd, fcntl.LOCK_SH)
            line.cut()
            os.fstat(fd)
            assert os.pwrite(fd, b"more", 0) == 4
            fcntl.lockf(there, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 10)
            for call in (fcntl.flock, fcntl.lockf):
                with fails_with(errno.EAGAIN):
                    call(there, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(fd, fcntl.LOCK_UN)
            fcntl.lockf(there, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_another_mount_had_meanwhile_is_lost(place: Path) -> None:
    with two_ways(place) as (cut_off, other, line):
        path = file(cut_off.path / "file", b"text")
        file(cut_off.path / "another", b"text")
        with opened(path) as fd, opened(other.path / "file") as there:
            fcntl.lockf(fd, fcntl.LOCK_EX, 10, 0)
            engine, line.engine = line.engine, ""
            line.cut()
            fcntl.lockf(there, fcntl.LOCK_EX, 1, 5)  # once the provider has noticed
            os.pwrite(there, b"theirs", 0)
            fcntl.lockf(there, fcntl.LOCK_UN, 1, 5)
            line.engine = engine
            assert (cut_off.path / "another").read_bytes() == b"text"
            for use in (
                lambda: os.pwrite(fd, b"mine", 0),
                lambda: os.fsync(fd),
                lambda: fcntl.lockf(fd, fcntl.LOCK_EX, 1, 20),
            ):
                with fails_with(errno.EIO):
                    use()
            fcntl.lockf(fd, fcntl.LOCK_UN)
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert os.pread(fd, 10, 0) == b"theirs"


def test_a_request_that_waits_outlives_an_outage(place: Path) -> None:
    script = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""
    with two_ways(place) as (cut_off, other, line):
        file(cut_off.path / "file")
        with opened(other.path / "file") as fd:
            fcntl.lockf(fd, fcntl.LOCK_EX)
            with another_python(script, cut_off.path / "file") as waiter:
                wait_for_request(waiter.pid, cut_off)
                line.cut()
                os.stat(cut_off.path / "file")
                fcntl.lockf(fd, fcntl.LOCK_UN)
                assert line_of(waiter) == "locked"
                with fails_with(errno.EAGAIN):
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_provider_that_restarts_has_no_locks(place: Path) -> None:
    for name in ("first", "second"):
        (place / name).mkdir()
    service = Service(place)
    service.start()
    try:
        with (
            mounting(service.address, place / "first", *OPTIONS) as first,
            mounting(service.address, place / "second", *OPTIONS) as second,
            opened(file(first.path / "file", b"text")) as fd,
            opened(second.path / "file") as there,
        ):
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.fsync(fd)
            service.stop(signal.SIGKILL)
            service.start()
            with fails_with(errno.EIO):
                os.pwrite(fd, b"mine", 0)
            fcntl.flock(there, fcntl.LOCK_EX)
            os.pwrite(there, b"more", 0)
            fcntl.flock(fd, fcntl.LOCK_UN)
            with fails_with(errno.EAGAIN):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert os.pread(fd, 10, 0) == b"more"
    finally:
        service.stop()


@contextlib.contextmanager
def two_ways(place: Path) -> Iterator[tuple[Mount, Mount, Relay]]:
    """Two mounts of a provider; the connection of the first can be cut."""
    for name in ("first", "second"):
        (place / name).mkdir()
    with (
        serving("tcp") as provider,
        relay(provider.address) as line,
        mounting(line.address, place / "first", *OPTIONS) as first,
        mounting(provider.address, place / "second", *OPTIONS) as second,
    ):
        yield first, second, line


WAL = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
for turn in range(20):
    database.execute("BEGIN IMMEDIATE")
    database.execute("UPDATE counter SET value = value + 1")
    database.execute("COMMIT")
"""


def test_a_write_ahead_log_that_programs_of_one_mount_share(both: Together) -> None:
    path = both.first.path / "database"
    database = sqlite3.connect(path, timeout=60)
    assert database.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
    database.execute("CREATE TABLE counter (value)")
    database.execute("INSERT INTO counter VALUES (0)")
    database.commit()
    database.close()
    with another_python(WAL, path) as one, another_python(WAL, path) as two:
        assert one.wait(60) == 0
        assert two.wait(60) == 0
    database = sqlite3.connect(path, timeout=60)
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert database.execute("SELECT value FROM counter").fetchone() == (40,)
    database.close()


RECORDING = """
import os
from warabi.provider.session import ClientSession
handle = ClientSession._handle
async def recording(self, message, nursery):
    with open({path!r}, "a") as file:
        print(message.header[2], file=file)
    await handle(self, message, nursery)
ClientSession._handle = recording
"""


def test_a_lock_is_one_round_trip(place: Path) -> None:
    """The first one of a mount is two, and closing a file without locks is none for them."""
    record = place / "record"

    def locking() -> list[str]:
        found = [line for line in record.read_text().split() if "lock" in line]
        record.write_text("")
        return found

    with (
        serving("na+sm", before=RECORDING.format(path=str(record))) as provider,
        mounting(provider.address, place, *OPTIONS) as mount,
        opened(file(mount.path / "file")) as fd,
    ):
        fcntl.lockf(fd, fcntl.LOCK_EX)
        assert locking() == ["lock_session", "lock"]
        for call, kind in itertools.product(
            (fcntl.lockf, fcntl.flock), (fcntl.LOCK_EX, fcntl.LOCK_UN)
        ):
            call(fd, kind)
            assert locking() == ["lock"]
        with opened(mount.path / "file"):
            pass
        assert locking() == []
        fcntl.lockf(fd, fcntl.LOCK_EX)
        with opened(mount.path / "file"):
            pass
        assert locking() == ["lock", "lock"]
