"""setxattr(2) and its kin."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import partial
from pathlib import Path

import pytest

from tests.mount.support import fails_with
from tests.posix.support import (
    NOBODY,
    check,
    directory,
    file,
    libc,
    make,
    opened,
    updated,
    user,
)


def test_extended_attributes_are_set_listed_and_removed(where: Path) -> None:
    (where / "directory").mkdir()
    for path in (file(where / "file"), where / "directory"):
        os.setxattr(path, "user.one", b"1")
        os.setxattr(path, "user.binary", bytes(range(256)))
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "trusted.two", b"2")
        assert {"user.one", "user.binary", "user.empty", "trusted.two"} <= set(os.listxattr(path))
        assert os.getxattr(path, "user.binary") == bytes(range(256))
        assert os.getxattr(path, "user.empty") == b""
        os.setxattr(path, "user.one", b"other")
        assert os.getxattr(path, "user.one") == b"other"
        os.removexattr(path, "user.one")
        assert "user.one" not in os.listxattr(path)
        with fails_with(errno.ENODATA):
            os.getxattr(path, "user.one")
        with fails_with(errno.ENODATA):
            os.removexattr(path, "user.one")


def test_extended_attributes_can_be_created_or_replaced_only(where: Path) -> None:
    path = file(where / "file")
    with fails_with(errno.ENODATA):
        os.setxattr(path, "user.x", b"1", os.XATTR_REPLACE)
    os.setxattr(path, "user.x", b"1", os.XATTR_CREATE)
    with fails_with(errno.EEXIST):
        os.setxattr(path, "user.x", b"2", os.XATTR_CREATE)
    os.setxattr(path, "user.x", b"3", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.x") == b"3"


def test_extended_attributes_go_with_their_file_and_only_with_it(where: Path) -> None:
    path = file(where / "file")
    os.setxattr(path, "user.x", b"x" * 10_000)
    os.rename(path, where / "moved")
    assert os.getxattr(where / "moved", "user.x") == b"x" * 10_000
    (where / "moved").unlink()
    file(where / "moved")
    with fails_with(errno.ENODATA):
        os.getxattr(where / "moved", "user.x")


def test_extended_attributes_of_users_are_for_files_and_directories(where: Path) -> None:
    (where / "link").symlink_to("nowhere")
    os.mkfifo(where / "fifo")
    for path in (where / "link", where / "fifo"):
        with fails_with(errno.EPERM):
            os.setxattr(path, "user.x", b"x", follow_symlinks=False)
    with fails_with(errno.EOPNOTSUPP):
        os.setxattr(file(where / "file"), "unknown.x", b"x")
    with fails_with(errno.ERANGE, errno.ENAMETOOLONG):
        os.setxattr(where / "file", "user." + "x" * 300, b"x")


def test_how_large_attributes_may_be(where: Path) -> None:
    path = file(where / "file")
    for size in (0, 1, 4096, 65_000, 65_536):
        os.setxattr(path, "user.size", b"x" * size)
        assert os.getxattr(path, "user.size") == b"x" * size
    with fails_with(errno.E2BIG):
        os.setxattr(path, "user.size", b"x" * 65_537)
    os.removexattr(path, "user.size")
    name = "user." + "n" * 250
    os.setxattr(path, name, b"x")
    assert name in os.listxattr(path)
    with fails_with(errno.ERANGE):
        os.setxattr(path, name + "n", b"x")
    with fails_with(errno.EINVAL, errno.EOPNOTSUPP):
        os.setxattr(path, "user.", b"x")


def test_a_too_small_buffer_is_erange(where: Path) -> None:
    path = os.fsencode(file(where / "file"))
    os.setxattr(path, "user.x", b"twelve bytes")
    buffer = ctypes.create_string_buffer(100)
    with fails_with(errno.ERANGE):
        check(libc.getxattr(path, b"user.x", buffer, 11))
    assert check(libc.getxattr(path, b"user.x", buffer, 12)) == 12
    assert check(libc.getxattr(path, b"user.x", None, 0)) == 12
    with fails_with(errno.ERANGE):
        check(libc.listxattr(path, buffer, 3))
    assert check(libc.listxattr(path, None, 0)) >= len(b"user.x\0")


def test_permissions_to_read_and_set_attributes_by_namespace(where: Path) -> None:
    path = make("file", where / "file", 0o644, NOBODY)
    os.setxattr(path, "trusted.x", b"root's")
    os.setxattr(path, "security.x", b"anybody's to read")
    os.setxattr(path, "user.x", b"x")
    with user():
        assert "trusted.x" not in os.listxattr(path)
        with fails_with(errno.ENODATA):
            os.getxattr(path, "trusted.x")
        with fails_with(errno.EPERM):
            os.setxattr(path, "trusted.x", b"y")
        with fails_with(errno.EPERM):
            os.setxattr(path, "security.x", b"y")
        assert os.getxattr(path, "security.x") == b"anybody's to read"
        os.setxattr(path, "user.x", b"y")
    with user(1, 1):
        assert os.getxattr(path, "user.x") == b"y"
        with fails_with(errno.EACCES):
            os.setxattr(path, "user.x", b"")
        with fails_with(errno.EACCES):
            os.removexattr(path, "user.x")
    path.chmod(0o600)
    with user(1, 1), fails_with(errno.EACCES):
        os.getxattr(path, "user.x")


def test_attributes_of_others_sticky_directories_are_not_changed(where: Path) -> None:
    sticky = directory(where / "sticky", 0o1777)
    with user(), fails_with(errno.EPERM):
        os.setxattr(sticky, "user.x", b"x")


def test_setting_and_removing_change_the_change_time_only(where: Path) -> None:
    for path in (file(where / "file"), directory(where / "directory")):
        assert updated(partial(os.setxattr, path, "user.x", b"x"), path, where) == ["c", ""]
        assert updated(partial(os.getxattr, path, "user.x"), path) == [""]
        assert updated(partial(os.removexattr, path, "user.x"), path, where) == ["c", ""]


@pytest.mark.parametrize("kind", ["link", "fifo", "socket", "character", "block"])
def test_trusted_attributes_of_special_files(where: Path, kind: str) -> None:
    path = make(kind, where / "it")
    os.setxattr(path, "trusted.x", b"x", follow_symlinks=False)
    assert os.getxattr(path, "trusted.x", follow_symlinks=False) == b"x"
    with fails_with(errno.EPERM):
        os.setxattr(path, "user.x", b"x", follow_symlinks=False)


def test_attributes_of_a_handle_whose_file_has_no_name(where: Path) -> None:
    with opened(where / "file") as fd:
        (where / "file").unlink()
        os.setxattr(fd, "user.x", b"x")
        assert os.getxattr(fd, "user.x") == b"x"
        assert os.listxattr(fd).count("user.x") == 1


def test_a_hundred_attributes(where: Path) -> None:
    path = file(where / "file")
    for number in range(100):
        os.setxattr(path, f"user.{number:03}", b"%d" % number)
    names = [name for name in os.listxattr(path) if name.startswith("user.")]
    assert sorted(names) == [f"user.{number:03}" for number in range(100)]
    assert os.getxattr(path, "user.077") == b"77"
