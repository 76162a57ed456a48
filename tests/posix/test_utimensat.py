"""utimensat(2): times, now and never."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.mount.support import fails_with, run
from tests.posix.support import (
    AT_SYMLINK_NOFOLLOW,
    KINDS,
    OLD,
    UTIME_NOW,
    UTIME_OMIT,
    file,
    make,
    old,
    tick,
    user,
    utimensat,
)


def test_one_time_can_be_set_alone_or_to_now(where: Path) -> None:
    path = old(file(where / "file"))
    run("touch", "-a", "-d", "2001-01-01T00:00:00.5Z", path)
    assert path.stat().st_mtime_ns == OLD
    assert path.stat().st_atime_ns == 978_307_200_500_000_000
    before = time.time_ns() - 10**9
    run("touch", "-m", path)
    assert path.stat().st_atime_ns == 978_307_200_500_000_000
    assert path.stat().st_mtime_ns >= before


@pytest.mark.parametrize("kind", KINDS)
def test_times_are_set_on_every_kind(where: Path, kind: str) -> None:
    path = make(kind, where / "it")

    def times() -> tuple[int, int]:
        return path.lstat().st_atime_ns, path.lstat().st_mtime_ns

    flags = AT_SYMLINK_NOFOLLOW
    tick()
    before = path.lstat().st_ctime_ns
    utimensat(path, (100, 1), (200, 999_999_999), flags)
    assert path.lstat().st_ctime_ns > before
    assert times() == (100_000_000_001, 200_999_999_999)
    utimensat(path, UTIME_OMIT, (300, 3), flags)
    assert times() == (100_000_000_001, 300_000_000_003)
    utimensat(path, (400, 4), UTIME_OMIT, flags)
    assert times() == (400_000_000_004, 300_000_000_003)
    before = path.lstat().st_ctime_ns
    tick()
    utimensat(path, UTIME_OMIT, UTIME_OMIT, flags)
    assert (times(), path.lstat().st_ctime_ns) == ((400_000_000_004, 300_000_000_003), before)
    utimensat(path, UTIME_NOW, UTIME_OMIT, flags)
    assert abs(times()[0] - time.time_ns()) < 60 * 10**9
    assert times()[1] == 300_000_000_003
    utimensat(path, UTIME_NOW, UTIME_NOW, flags)
    assert times()[0] == times()[1]
    assert path.lstat().st_ctime_ns > before


@pytest.mark.parametrize("seconds", [-(2**31), -1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**33])
def test_any_second_of_five_centuries(where: Path, seconds: int) -> None:
    path = file(where / "file")
    utimensat(path, (seconds, 123_456_789), (seconds + 1, 987_654_321))
    assert path.stat().st_atime_ns == seconds * 10**9 + 123_456_789
    assert path.stat().st_mtime_ns == (seconds + 1) * 10**9 + 987_654_321


def test_invalid_times_are_refused(where: Path) -> None:
    path = file(where / "file")
    for bad in (-1, 10**9, 2 * 10**9):
        with fails_with(errno.EINVAL):
            utimensat(path, (1, bad), (1, 1))
        with fails_with(errno.EINVAL):
            utimensat(path, (1, 1), (1, bad))
    with fails_with(errno.EINVAL):
        utimensat(path, (1, 1), (1, 1), 0x4000)


def test_permissions_to_set_times(where: Path) -> None:
    """To anything: the owner and root; to now: who may write, too."""
    path = make("file", where / "file", 0o664, 1000)
    os.chown(path, 1000, 2000)
    now, some = UTIME_NOW, (1, 1)
    users: list[tuple[tuple[Any, ...], int | None, int | None]] = [
        ((0, 0), None, None),
        ((1000, 1), None, None),
        ((1, 2000), errno.EPERM, None),
        ((1, 1, (2000,)), errno.EPERM, None),
        ((1, 1), errno.EPERM, errno.EACCES),
    ]
    for who, any_time, to_now in users:
        for times, number in [
            ((some, some), any_time),
            ((some, UTIME_OMIT), any_time),
            ((UTIME_OMIT, some), any_time),
            ((now, UTIME_OMIT), any_time),
            ((UTIME_OMIT, now), any_time),
            ((some, now), any_time),
            ((now, now), to_now),
            ((UTIME_OMIT, UTIME_OMIT), None),
        ]:
            with user(*who):
                if number is None:
                    utimensat(path, *times)
                else:
                    with fails_with(number):
                        utimensat(path, *times)


@pytest.mark.parametrize("second", [10_413_792_000, -11_676_096_000, 1 << 62, -(1 << 62)])
def test_times_beyond_what_64_bits_of_nanoseconds_tell(where: Path, second: int) -> None:
    """As far as the file system can store them, and other files do not mind."""
    path, other = file(where / "file"), file(where / "other")
    utimensat(path, (second, 5), (second, 5))
    latest = (1 << 63) - 1
    exact, nearest = second * 10**9 + 5, max(-latest, min(latest, second * 10**9))
    assert {path.stat().st_atime_ns, path.stat().st_mtime_ns} <= {exact, nearest}
    with other.open("wb", buffering=0) as opened:
        opened.write(b"bytes")
        os.fsync(opened.fileno())
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
