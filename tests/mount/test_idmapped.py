"""Idmapped mounts of a mount: owners are mapped, and no user may do more than on the mount."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import disposable, limit_of
from tests.mount.idmapped import idmapped
from tests.mount.support import Mount, fails_with, mounting, source_of, watchdog
from tests.mount.test_features import mounted_without
from tests.posix.support import AT_FDCWD, check, directory, file, libc, mode_of, opened, umask, user
from tests.posix.test_acl import ACCESS, _value
from warabifs.frontends.kernel.protocol import Feature

FIRST, COUNT = 100_000, 200_000
"""What user 0 of the file system is shown as, and how many are."""
SOMEBODY = 7
AT_SYMLINK_FOLLOW = 0x400


@pytest.fixture(scope="module", params=["memory", "engine"])
def mount(request: pytest.FixtureRequest) -> Iterator[Mount]:
    with (
        disposable("/tmp") as place,
        source_of(request.param, place) as (source, options),
        mounting(source, place, *options) as found,
    ):
        yield found


@pytest.fixture
def views(request: pytest.FixtureRequest, mount: Mount) -> Iterator[tuple[Path, Path]]:
    """A directory that all may write to, by the mount and by an idmapped one."""
    with (
        watchdog(mount, limit_of(request)),
        idmapped(mount.path, mount.path.parent / "mapped", (0, FIRST, COUNT)) as mapped,
    ):
        path = directory(mount.path / "d", 0o777)
        try:
            yield path, mapped / "d"
        finally:
            shutil.rmtree(path)
    mapped.rmdir()
    mount.check_log()


def _without_name(path: Path) -> None:
    """Make a file without a name, and give it one."""
    fd = check(libc.open(os.fsencode(path.parent), os.O_TMPFILE | os.O_RDWR, 0o600))
    try:
        old, new = f"/proc/self/fd/{fd}".encode(), os.fsencode(path)
        check(libc.linkat(AT_FDCWD, old, AT_FDCWD, new, AT_SYMLINK_FOLLOW))
    finally:
        os.close(fd)


MAKERS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.touch(),
    "directory": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("nowhere"),
    "fifo": lambda path: os.mkfifo(path),
    "without a name": _without_name,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_made_has_the_mapped_owner(views: tuple[Path, Path], maker: str) -> None:
    plain, mapped = views
    with user(FIRST + SOMEBODY, FIRST + 5):
        MAKERS[maker](mapped / "made")
    found = (plain / "made").lstat()
    assert (found.st_uid, found.st_gid) == (SOMEBODY, 5)
    found = (mapped / "made").lstat()
    assert (found.st_uid, found.st_gid) == (FIRST + SOMEBODY, FIRST + 5)
    os.chown(mapped / "made", FIRST + 8, FIRST + 9, follow_symlinks=False)
    found = (plain / "made").lstat()
    assert (found.st_uid, found.st_gid) == (8, 9)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_user_without_a_mapping_makes_nothing(views: tuple[Path, Path], maker: str) -> None:
    plain, mapped = views
    for one in (0, SOMEBODY, FIRST + COUNT):
        with user(one, one), fails_with(errno.EOVERFLOW):
            MAKERS[maker](mapped / "made")
    assert os.listdir(plain) == []


def test_permissions_are_those_of_the_mapped_owner(views: tuple[Path, Path]) -> None:
    plain, mapped = views
    path = file(plain / "file", b"data")
    os.chown(path, SOMEBODY, 5)
    path.chmod(0o640)
    with user(FIRST + SOMEBODY, FIRST + 6):
        assert (mapped / "file").read_bytes() == b"data"
        (mapped / "file").chmod(0o600)
        (mapped / "file").chmod(0o640)
    with user(FIRST + 8, FIRST + 5):
        assert (mapped / "file").read_bytes() == b"data"
        with fails_with(errno.EACCES):
            (mapped / "file").write_bytes(b"")
        with fails_with(errno.EPERM):
            (mapped / "file").chmod(0o666)
    # Neither a user with the number that the file system has, nor the root of the namespace.
    for one in (SOMEBODY, FIRST):
        with user(one, 6), fails_with(errno.EACCES):
            (mapped / "file").read_bytes()
    with user(FIRST + SOMEBODY, FIRST + 6), fails_with(errno.EACCES):
        path.read_bytes()


def _allocate(fd: int) -> None:
    check(libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(100)))


CHANGES: dict[str, Callable[[int], object]] = {
    "write": lambda fd: os.write(fd, b"x"),
    "truncate": lambda fd: os.ftruncate(fd, 10),
    "fallocate": _allocate,
    "copy": lambda fd: os.copy_file_range(fd, fd, 10, 0, 100),
    "empty": lambda fd: os.close(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("one", [0, SOMEBODY])
def test_a_change_by_a_user_clears_set_id_bits(
    views: tuple[Path, Path], one: int, change: str
) -> None:
    """Also by the root of a container: it has no privilege over the file system."""
    plain, mapped = views
    path = file(plain / "file", bytes(1000))
    os.chown(path, one, one)
    for owner, place, kept in ((0, mapped, 0o6777), (FIRST + one, mapped, 0o777)):
        path.chmod(0o6777)
        with user(owner, owner), opened(place / "file", os.O_RDWR) as fd:
            CHANGES[change](fd)
        assert mode_of(path) == kept


def test_a_change_of_a_list_by_a_user_outside_the_group_clears_its_bit(
    views: tuple[Path, Path],
) -> None:
    """The file's group has the number of one of the user's groups, and is shown as another one."""
    plain, mapped = views
    path = file(plain / "file")
    os.chown(path, SOMEBODY, FIRST + 5)
    changes: tuple[Callable[[], None], ...] = (
        lambda: os.setxattr(mapped / "file", ACCESS, _value((1, 6, 0), (4, 6, 0), (32, 0, 0))),
        lambda: os.removexattr(mapped / "file", ACCESS),
    )
    for change in changes:
        path.chmod(0o2775)
        os.setxattr(path, ACCESS, _value((1, 6, 0), (2, 6, 5), (4, 7, 0), (16, 7, 0), (32, 0, 0)))
        path.chmod(0o2775)
        with user(FIRST + SOMEBODY, FIRST + 5, (FIRST + 5,)):
            change()
        assert not path.stat().st_mode & stat.S_ISGID


def test_privileged_attributes_are_not_listed(views: tuple[Path, Path]) -> None:
    plain, mapped = views
    path = file(plain / "file")
    os.setxattr(path, "trusted.secret", b"1")
    os.setxattr(path, "user.open", b"1")
    names = {"trusted.secret", "user.open"}
    assert names <= {*os.listxattr(path)}
    assert names <= {*os.listxattr(mapped / "file")}
    for one, where in ((FIRST, mapped), (FIRST + 1, mapped), (1, plain)):
        with user(one, one):
            assert names & {*os.listxattr(where / "file")} == {"user.open"}


def test_a_kernel_without_them_refuses_one(place: Path) -> None:
    with mounted_without(Feature.ALLOW_IDMAP, place, "memory:") as path:
        with (
            fails_with(errno.EINVAL),
            idmapped(path, place / "mapped", (0, FIRST, COUNT)),
        ):
            pass
        with umask(0):
            path.chmod(0o777)
        with user(SOMEBODY, SOMEBODY), opened(path / "file") as fd:
            os.fchmod(fd, 0o6777)
            _allocate(fd)
        assert ((path / "file").stat().st_uid, mode_of(path / "file")) == (SOMEBODY, 0o777)
