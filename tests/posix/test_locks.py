"""flock(2), fcntl(2) locks, and those of handles."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from pathlib import Path

from tests.mount.support import another_python, fails_with, line_of, python
from tests.posix.support import (
    file,
    opened,
)

LOCKED = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for lock in (fcntl.flock, fcntl.lockf):
    try:
        lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("free", end=" ")
    except BlockingIOError:
        print("locked", end=" ")
"""


def test_locks_are_seen_by_other_processes(where: Path) -> None:
    path = file(where / "file")
    with opened(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.lockf(fd, fcntl.LOCK_EX)
        assert python(LOCKED, path) == "locked locked "
        fcntl.lockf(fd, fcntl.LOCK_UN)
        assert python(LOCKED, path) == "locked free "
    assert python(LOCKED, path) == "free free "


F_OFD_SETLK = 37


def _lock(kind: int, start: int, size: int) -> bytes:
    return struct.pack("hhqqi4x", kind, 0, start, size, 0)


def test_ranges_are_locked_apart(where: Path) -> None:
    script = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for start in range(0, 50, 10):
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, start)
        print("free", end=" ")
    except OSError as error:
        assert error.errno in (11, 13), error
        print("taken", end=" ")
"""
    path = file(where / "file", bytes(100))
    with opened(path) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 10, 10)
        fcntl.lockf(fd, fcntl.LOCK_SH, 10, 30)
        assert python(script, path) == "free taken free taken free "
        fcntl.lockf(fd, fcntl.LOCK_UN, 5, 10)
        with opened(path):  # closing any descriptor of the file lets go of them all
            pass
        assert python(script, path) == "free free free free free "


def test_shared_locks_are_shared(where: Path) -> None:
    path = file(where / "file")
    with opened(path) as one, opened(path) as two, opened(path) as three:
        fcntl.flock(one, fcntl.LOCK_SH)
        fcntl.flock(two, fcntl.LOCK_SH)
        with fails_with(errno.EWOULDBLOCK):
            fcntl.flock(three, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(two, fcntl.LOCK_UN)
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an upgrade
        with fails_with(errno.EWOULDBLOCK):
            fcntl.flock(three, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_locks_of_handles_are_the_handles(where: Path) -> None:
    path = file(where / "file", bytes(100))
    with opened(path) as one, opened(path) as two:
        fcntl.fcntl(one, F_OFD_SETLK, _lock(fcntl.F_WRLCK, 0, 10))
        with fails_with(errno.EAGAIN):
            fcntl.fcntl(two, F_OFD_SETLK, _lock(fcntl.F_WRLCK, 5, 10))
        fcntl.fcntl(two, F_OFD_SETLK, _lock(fcntl.F_WRLCK, 10, 10))
        fcntl.fcntl(one, F_OFD_SETLK, _lock(fcntl.F_UNLCK, 0, 10))
        fcntl.fcntl(two, F_OFD_SETLK, _lock(fcntl.F_RDLCK, 0, 10))


def test_a_waiting_process_gets_the_lock(where: Path) -> None:
    script = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
print("waiting", flush=True)
(fcntl.flock if sys.argv[2] == "flock" else fcntl.lockf)(fd, fcntl.LOCK_EX)
print(os.pread(fd, 100, 0).decode(), flush=True)
"""
    for call in (fcntl.flock, fcntl.lockf):
        path = file(where / "file")
        with opened(path) as fd:
            call(fd, fcntl.LOCK_EX)
            with another_python(script, path, call.__name__) as waiter:
                assert line_of(waiter) == "waiting"
                time.sleep(0.05)
                os.write(fd, b"written before")
                call(fd, fcntl.LOCK_UN)
                assert line_of(waiter) == "written before"


def test_locks_end_with_their_process(where: Path) -> None:
    script = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(fd, fcntl.LOCK_EX)
fcntl.lockf(fd, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""
    path = file(where / "file")
    with another_python(script, path) as holder, opened(path) as fd:
        assert line_of(holder) == "locked"
        for call in (fcntl.flock, fcntl.lockf):
            with fails_with(errno.EWOULDBLOCK, errno.EACCES):
                call(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder.kill()
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.lockf(fd, fcntl.LOCK_EX)
