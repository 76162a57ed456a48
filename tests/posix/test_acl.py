"""POSIX access control lists: acl(5), setfacl(1), getfacl(1)."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

import pytest

from tests.mount.support import fails_with, run
from tests.posix.support import (
    directory,
    file,
    make,
    mode_of,
    opened,
    umask,
    updated,
    user,
)
from warabifs.frontends.base import Ability

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def setfacl(*arguments: str | Path) -> None:
    run("setfacl", *arguments)


def getfacl(path: Path) -> list[str]:
    """The entries of both lists, without comments."""
    return run("getfacl", "-cpnE", path).stdout.split()


def may(uid: int, path: Path, flags: int, gid: int = 1, groups: tuple[int, ...] = ()) -> bool:
    with user(uid, gid, groups):
        try:
            os.close(os.open(path, flags))
        except PermissionError:
            return False
        return True


def test_a_named_user_and_a_named_group_get_what_the_list_says(where: Path) -> None:
    path = make("file", where / "file", 0o640)
    assert not may(1000, path, os.O_RDONLY)
    setfacl("-m", "u:1000:rw,g:2000:r,u:1001:-", path)
    assert getfacl(path) == [
        "user::rw-", "user:1000:rw-", "user:1001:---", "group::r--", "group:2000:r--",
        "mask::rw-", "other::---",
    ]  # fmt: skip
    assert mode_of(path) == 0o660
    assert may(1000, path, os.O_RDWR)
    assert may(3, path, os.O_RDONLY, 2000)
    assert may(3, path, os.O_RDONLY, 1, (2000,))
    assert not may(3, path, os.O_WRONLY, 2000)
    assert not may(1001, path, os.O_RDONLY, 2000)  # a user's own entry comes first
    assert not may(3, path, os.O_RDONLY)


def test_the_mask_is_the_group_bits_of_the_mode(where: Path) -> None:
    path = make("file", where / "file", 0o600)
    setfacl("-m", "u:1000:rwx,g::rw", path)
    assert mode_of(path) == 0o670
    path.chmod(0o640)
    assert "mask::r--" in getfacl(path)
    assert "user:1000:rwx" in getfacl(path)
    assert may(1000, path, os.O_RDONLY)
    assert not may(1000, path, os.O_RDWR)
    path.chmod(0o4616)
    assert getfacl(path) == [
        "user::rw-", "user:1000:rwx", "group::rw-", "mask::--x", "other::rw-",
    ]  # fmt: skip
    assert mode_of(path) == 0o4616
    assert not may(1000, path, os.O_RDONLY)
    setfacl("-m", "m::rx", path)
    assert mode_of(path) & 0o777 == 0o656


def test_a_list_that_is_a_mode_is_only_a_mode(where: Path) -> None:
    path = make("file", where / "file", 0o600)
    setfacl("-m", "u::rwx,g::rx,o::x", path)
    assert mode_of(path) == 0o751
    assert ACCESS not in os.listxattr(path)
    setfacl("-m", "u:1000:rw", path)
    assert ACCESS in os.listxattr(path)
    setfacl("-b", path)
    assert ACCESS not in os.listxattr(path)
    assert getfacl(path) == ["user::rwx", "group::r-x", "other::--x"]
    assert not may(1000, path, os.O_RDWR)


def test_changes_of_a_list_change_the_change_time(where: Path) -> None:
    path = file(where / "file")
    assert updated(lambda: setfacl("-m", "u:1000:rw", path), path, where) == ["c", ""]
    assert updated(lambda: os.removexattr(path, ACCESS), path, where) == ["c", ""]
    with fails_with(errno.ENODATA):
        os.getxattr(path, ACCESS)
    os.removexattr(path, ACCESS)  # there was none


@pytest.mark.needs(Ability.UMASK)
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_is_made_gets_the_default_list_instead_of_the_umask(where: Path, mask: int) -> None:
    parent = directory(where / "parent")
    setfacl("-d", "-m", "u::rwx,u:1000:rwx,g::rx,o::-", parent)
    assert mode_of(parent) == 0o755
    with umask(mask):
        with opened(parent / "file", os.O_CREAT | os.O_WRONLY, 0o666):
            pass
        with opened(parent / "private", os.O_CREAT | os.O_WRONLY, 0o600):
            pass
        (parent / "below").mkdir(0o777)
        os.mkfifo(parent / "fifo", 0o666)
        os.mknod(parent / "socket", stat.S_IFSOCK | 0o777)
        (parent / "link").symlink_to("file")
    assert getfacl(parent / "file") == [
        "user::rw-", "user:1000:rwx", "group::r-x", "mask::rw-", "other::---",
    ]  # fmt: skip
    assert mode_of(parent / "file") == mode_of(parent / "fifo") == 0o660
    assert mode_of(parent / "private") == 0o600
    assert mode_of(parent / "socket") == mode_of(parent / "below") == 0o770
    assert "default:user:1000:rwx" in getfacl(parent / "below")
    assert DEFAULT not in os.listxattr(parent / "file")
    assert os.listxattr(parent / "link", follow_symlinks=False) == []
    assert may(1000, parent / "file", os.O_RDWR)
    assert not may(1000, parent / "private", os.O_RDONLY)
    setfacl("-k", parent)
    with umask(mask), opened(parent / "after", os.O_CREAT | os.O_WRONLY, 0o666) as fd:
        assert mode_of(fd) == 0o666 & ~mask


@pytest.mark.needs(Ability.UMASK)
def test_a_default_list_without_names_gives_modes_only(where: Path) -> None:
    parent = directory(where / "parent")
    setfacl("-d", "-m", "u::rwx,g::rwx,o::r", parent)
    with umask(0o077):
        file(parent / "file")
        (parent / "below").mkdir()
    assert mode_of(parent / "file") == 0o664
    assert mode_of(parent / "below") == 0o774
    assert ACCESS not in os.listxattr(parent / "file")
    assert DEFAULT in os.listxattr(parent / "below")


@pytest.mark.needs(Ability.UMASK)
def test_lists_go_deep_and_the_set_group_id_bit_with_them(where: Path) -> None:
    parent = directory(where / "parent")
    os.chown(parent, 0, 2000)
    parent.chmod(0o2770)
    setfacl("-m", "g:3000:rwx,d:g:3000:rwx", parent)
    with user(1000, 3000), umask(0o077):
        (parent / "a").mkdir()
        (parent / "a" / "b").mkdir()
        file(parent / "a" / "b" / "file", b"shared")
    found = (parent / "a" / "b").stat()
    assert (found.st_uid, found.st_gid, mode_of(parent / "a" / "b")) == (1000, 2000, 0o2770)
    assert may(1001, parent / "a" / "b" / "file", os.O_RDWR, 3000)
    assert not may(1001, parent / "a" / "b" / "file", os.O_RDONLY, 4000)


def test_permissions_to_change_a_list(where: Path) -> None:
    path = make("file", where / "file", 0o666, 1000)
    value = _value((1, 6, 0), (2, 6, 5), (4, 0, 0), (16, 6, 0), (32, 0, 0))
    with user(1001, 1000), fails_with(errno.EPERM):
        os.setxattr(path, ACCESS, value)
    assert ACCESS not in os.listxattr(path)
    with user(1000, 1000):
        os.setxattr(path, ACCESS, value)
    with user(1, 1):
        with fails_with(errno.EACCES):
            os.open(path, os.O_RDONLY)
        with fails_with(errno.EPERM):
            os.removexattr(path, ACCESS)


@pytest.mark.parametrize(
    ("gid", "groups", "kept"), [(5, (), True), (1, (4, 5), True), (1, (4,), False)]
)
def test_a_new_list_clears_set_group_id_for_non_members(
    where: Path, gid: int, groups: tuple[int, ...], kept: bool
) -> None:
    path = file(where / "file")
    os.chown(path, 1000, 5)
    path.chmod(0o2755)
    with user(1000, gid, groups):
        os.setxattr(path, ACCESS, _value((1, 7, 0), (2, 6, 5), (4, 5, 0), (16, 7, 0), (32, 5, 0)))
    assert mode_of(path) == (0o2775 if kept else 0o775)
    path.chmod(0o2775)
    with user(1000, gid, groups):
        os.removexattr(path, ACCESS)
    assert mode_of(path) == (0o2775 if kept else 0o775)


def _value(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_what_is_no_list(where: Path) -> None:
    path = file(where / "file")
    owner, group, other = (1, 6, 0), (4, 4, 0), (32, 4, 0)
    for bad in [
        b"\2\0\0", _value(owner, group), _value(owner, other),
        _value(owner, owner, group, other),
        _value(group, owner, other), _value(owner, (2, 6, 5), group, other),
        _value((1, 8, 0), group, other), _value(owner, group, (64, 4, 0), other),
        _value(owner, group, other)[:-1],
    ]:  # fmt: skip
        with fails_with(errno.EINVAL):
            os.setxattr(path, ACCESS, bad)
    with fails_with(errno.EOPNOTSUPP):
        os.setxattr(path, ACCESS, struct.pack("<I", 3) + _value(owner, group, other)[4:])
    with fails_with(errno.EACCES):
        os.setxattr(path, DEFAULT, _value(owner, group, other))
    (where / "link").symlink_to("file")
    with fails_with(errno.EOPNOTSUPP):
        os.setxattr(where / "link", ACCESS, _value(owner, group, other), follow_symlinks=False)
    assert os.listxattr(path) == []


@pytest.mark.parametrize("copy", [("cp", "-a"), ("rsync", "-aA"), ("cp", "-r", "--preserve=all")])
def test_copies_keep_lists(where: Path, copy: tuple[str, ...]) -> None:
    source = directory(where / "source")
    setfacl("-m", "u:1000:rwx,d:u:1000:rwx,d:g:2000:rx", source)
    make("file", source / "file", 0o640)
    setfacl("-m", "g:2000:rw", source / "file")
    file(source / "inherited")
    run(*copy, f"{source}/.", where / "copy")
    for name in (".", "file", "inherited"):
        assert getfacl(where / "copy" / name) == getfacl(source / name)
        assert mode_of(where / "copy" / name) == mode_of(source / name)
