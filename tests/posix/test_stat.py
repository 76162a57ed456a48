"""stat(2) and statvfs(2): attributes, and which call changes which time."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.support import MIB, PROVIDER_ID, fails_with, mounting, run, serving, wait_until
from tests.posix.conftest import MOUNTED
from tests.posix.support import (
    OLD,
    birth_ns,
    file,
    old,
    opened,
    tick,
)
from warabifs.frontends.base import Ability


def test_mode_owner_and_times_are_kept_to_the_last_bit(where: Path) -> None:
    path = file(where / "file")
    os.chown(path, 1234, 5678)
    path.chmod(0o7654)
    os.utime(path, ns=(OLD, OLD + 1))
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o7654
    assert (found.st_uid, found.st_gid) == (1234, 5678)
    assert (found.st_atime_ns, found.st_mtime_ns) == (OLD, OLD + 1)
    os.chown(path, -1, 9)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 9)
    os.chown(path, 4_000_000_000, -1)
    assert (path.stat().st_uid, path.stat().st_gid) == (4_000_000_000, 9)


def changed(path: Path, change: Callable[[], object]) -> tuple[bool, bool]:
    """Whether *change* changed the mtime and the ctime of *path*."""
    old(path)
    before = path.lstat()
    tick()
    change()
    after = path.lstat()
    return after.st_mtime_ns != OLD, after.st_ctime_ns > before.st_ctime_ns


def test_which_changes_of_a_file_change_which_time(where: Path) -> None:
    def there_and_back() -> None:
        os.rename(path, where / "other")
        os.rename(where / "other", path)

    path = file(where / "file", b"data")
    with opened(path) as fd:
        assert changed(path, lambda: os.pwrite(fd, b"x", 0)) == (True, True)
        assert changed(path, lambda: os.ftruncate(fd, 100)) == (True, True)
        assert changed(path, lambda: os.ftruncate(fd, 100)) == (True, True)
        assert changed(path, lambda: os.truncate(path, 50)) == (True, True)
        assert changed(path, lambda: os.pread(fd, 100, 0)) == (False, False)
        assert changed(path, lambda: os.fsync(fd)) == (False, False)
    assert changed(path, lambda: path.chmod(0o600)) == (False, True)
    assert changed(path, lambda: os.chown(path, 1, 1)) == (False, True)
    assert changed(path, lambda: os.link(path, where / "twin")) == (False, True)
    assert changed(path, lambda: (where / "twin").unlink()) == (False, True)
    assert changed(path, there_and_back) == (False, True)
    assert changed(path, lambda: os.setxattr(path, "user.x", b"x")) == (False, True)
    assert changed(path, path.stat) == (False, False)
    assert changed(path, lambda: path.write_bytes(b"")) == (True, True)


def test_which_changes_of_a_directory_change_its_time(where: Path) -> None:
    path = where / "directory"
    path.mkdir()
    inside = path / "file"
    assert changed(path, lambda: file(inside)) == (True, True)
    assert changed(path, lambda: inside.write_bytes(b"data")) == (False, False)
    assert changed(path, lambda: os.rename(inside, path / "other")) == (True, True)
    assert changed(path, lambda: os.link(path / "other", inside)) == (True, True)
    assert changed(path, lambda: inside.unlink()) == (True, True)
    assert changed(path, lambda: (path / "below").mkdir()) == (True, True)
    assert changed(path, lambda: (path / "below").rmdir()) == (True, True)
    assert changed(path, lambda: (path / "link").symlink_to("x")) == (True, True)
    assert changed(path, lambda: os.rename(path / "other", where / "other")) == (True, True)
    assert changed(path, lambda: os.listdir(path)) == (False, False)
    assert changed(path, lambda: path.chmod(0o700)) == (False, True)


def test_times_of_a_new_file_are_now(where: Path) -> None:
    before = time.time_ns() - 10**9
    found = file(where / "file").stat()
    assert before <= found.st_mtime_ns <= time.time_ns() + 10**9
    assert before <= found.st_ctime_ns <= time.time_ns() + 10**9


def test_statfs_tells_sizes_and_the_longest_name(where: Path) -> None:
    found = os.statvfs(where)
    assert found.f_namemax == 255
    assert found.f_bsize > 0
    assert found.f_blocks >= found.f_bfree >= found.f_bavail > 0
    assert found.f_files >= found.f_ffree > 0


def test_directories_count_their_subdirectories(where: Path) -> None:
    assert where.stat().st_nlink == 2
    (where / "a").mkdir()
    (where / "b").mkdir()
    file(where / "c")
    assert where.stat().st_nlink == 4
    (where / "a").rmdir()
    assert where.stat().st_nlink == 3


def test_statfs_tells_the_room_of_the_target(place: Path) -> None:
    capacity = 64 * MIB
    filled = b"x" * MIB  # pages that were never touched are handed on one by one
    config = {"type": "memory", "config": {"capacity": capacity}}
    with (
        serving("na+sm", config) as provider,
        mounting(provider.address, place, f"provider_id={PROVIDER_ID}") as mount,
    ):

        def room() -> tuple[int, int]:
            found = os.statvfs(mount.path)
            return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize

        assert room() == (capacity, capacity)
        file(mount.path / "file", filled * 20)
        assert room() == (capacity, 44 * MIB)
        with open(mount.path / "more", "wb", buffering=0) as more, fails_with(errno.ENOSPC):
            while True:
                more.write(filled)
        assert room() == (capacity, 0)
        (mount.path / "more").unlink()
        # FUSE lets go of a closed file when it comes to it.
        wait_until(lambda: room() == (capacity, 44 * MIB), "the room of the removed file")
        lines = run("df", "-B1", "--output=size,used,avail", mount.path).stdout.split()
        assert lines[-3:] == [str(capacity), str(20 * MIB), str(44 * MIB)]


def test_holes_count_neither_for_df_nor_for_a_quota(place: Path) -> None:
    settings = {"path": f"{place}/target", "create_if_missing": True, "capacity": 64 * MIB}
    config = {"type": "file", "config": settings}
    with (
        serving("na+sm", config) as provider,
        mounting(provider.address, place, f"provider_id={PROVIDER_ID}") as mount,
    ):

        def available() -> int:
            found = os.statvfs(mount.path)
            return round(found.f_bavail * found.f_frsize / MIB)

        with opened(file(mount.path / "file")) as fd:
            os.ftruncate(fd, 1 << 40)
            assert (available(), os.fstat(fd).st_blocks < 2048) == (64, True)
            os.pwrite(fd, b"x" * MIB, 1 << 39)
            os.fsync(fd)
            assert available() == 63
            os.posix_fallocate(fd, 0, 40 * MIB)
            assert available() == 23
            with fails_with(errno.ENOSPC):
                os.posix_fallocate(fd, 1 << 38, 24 * MIB)
            assert available() == 23
            with fails_with(errno.ENOSPC):
                for number in range(64):
                    os.pwrite(fd, b"x" * MIB, (1 << 38) + number * MIB)
                    os.fsync(fd)
            assert available() == 0
            for number in range(40):  # where the space is allocated
                os.pwrite(fd, b"y" * MIB, number * MIB)
            os.fsync(fd)
            os.ftruncate(fd, 8 * MIB)
            assert available() == 56
            assert round(os.fstat(fd).st_blocks * 512 / MIB) == 8


def test_statfs_of_a_file_target_is_that_of_the_file_system_below(place: Path) -> None:
    with mounting(f"file:{place}/target", place) as mount:
        found, medium = os.statvfs(mount.path), os.statvfs(place)
    assert found.f_blocks * found.f_frsize == medium.f_blocks * medium.f_frsize
    near = 2 * 1024 * MIB  # others write there too
    assert abs(found.f_bavail * found.f_frsize - medium.f_bavail * medium.f_frsize) < near


@pytest.mark.parametrize("shared", ["ext4", *MOUNTED], indirect=True, scope="package")
@pytest.mark.needs(Ability.BIRTH_TIME)
def test_the_time_of_birth_never_changes(where: Path) -> None:
    began = time.time_ns() - 50_000_000  # more than a tick of the clock
    path = file(where / "file", b"data")
    (directory := where / "directory").mkdir()
    (link := where / "link").symlink_to("file")
    os.mkfifo(pipe := where / "pipe")
    ended = time.time_ns()
    made = {each: birth_ns(each) for each in (path, directory, link, pipe)}
    for born in made.values():
        assert born is not None
        assert began <= born <= ended
    tick()
    for each in made:
        os.utime(each, ns=(OLD, OLD), follow_symlinks=False)
    path.write_bytes(b"other")
    os.truncate(path, 100)
    path.chmod(0o600)
    os.setxattr(path, "user.x", b"1")
    os.link(path, where / "second")
    os.rename(directory, where / "moved")
    assert [birth_ns(where / name) for name in ("file", "second", "moved", "link", "pipe")] == [
        made[each] for each in (path, path, directory, link, pipe)
    ]
    assert int(run("stat", "-c", "%W", path).stdout) == made[path] // 10**9  # type: ignore[operator]
    shutil.copy2(path, where / "copy")
    born = birth_ns(where / "copy")
    assert born is not None
    assert born > ended
