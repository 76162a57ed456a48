"""symlink(2) and readlink(2)."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from tests.mount.support import fails_with
from tests.posix.support import (
    OLD,
    directory,
    file,
    mode_of,
    umask,
    updated,
    user,
)


def test_a_symbolic_link_holds_its_target(where: Path) -> None:
    file(where / "file", b"data")
    link = where / "link"
    link.symlink_to("file")
    assert os.readlink(link) == "file"
    assert link.read_bytes() == b"data"
    found = link.lstat()
    assert stat.S_ISLNK(found.st_mode)
    assert found.st_size == len("file")
    os.link(link, where / "twin", follow_symlinks=False)
    assert os.readlink(where / "twin") == "file"
    link.unlink()
    assert (where / "file").read_bytes() == b"data"
    with fails_with(errno.EINVAL):
        os.readlink(where / "file")


def test_symbolic_links_of_every_length(where: Path) -> None:
    for size in (1, 100, 4095):
        os.symlink("x" * size, where / f"link{size}")
        assert os.readlink(where / f"link{size}") == "x" * size
    with fails_with(errno.ENAMETOOLONG):
        os.symlink("x" * 4096, where / "too_long")
    os.symlink(b"\xff\xfe", where / "bytes")
    assert os.readlink(os.fsencode(where / "bytes")) == b"\xff\xfe"


def test_owner_and_times_of_a_symbolic_link_are_its_own(where: Path) -> None:
    file(where / "file")
    (where / "link").symlink_to("file")
    os.lchown(where / "link", 1234, 5678)
    os.utime(where / "link", ns=(OLD, OLD + 1), follow_symlinks=False)
    found = (where / "link").lstat()
    assert (found.st_uid, found.st_gid, found.st_mtime_ns) == (1234, 5678, OLD + 1)
    assert (where / "file").stat().st_uid == 0
    assert (where / "file").stat().st_mtime_ns != OLD + 1


def test_a_link_is_the_makers_and_changes_its_directory(where: Path) -> None:
    where.chmod(0o777)
    link = where / "link"
    with user(1000, 2000), umask(0o777):
        assert updated(lambda: link.symlink_to("target"), where) == ["mc"]
    found = link.lstat()
    assert (found.st_uid, found.st_gid, found.st_nlink) == (1000, 2000, 1)
    assert mode_of(link) == 0o777
    assert updated(lambda: os.readlink(link), link) == [""]


def test_a_link_to_a_directory_is_not_one(where: Path) -> None:
    directory(where / "directory")
    (where / "link").symlink_to("directory")
    assert os.listdir(where / "link") == []
    with fails_with(errno.ENOTDIR):
        os.rmdir(where / "link")
    with fails_with(errno.EEXIST):
        os.mkdir(where / "link")
    with fails_with(errno.ENOTDIR):
        os.open(where / "link", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    (where / "link").unlink()
    assert os.listdir(where) == ["directory"]


def test_a_link_may_hold_any_bytes_and_is_resolved_from_its_place(where: Path) -> None:
    for target in (b"\xff", b"a//b", b"./.", b"..", b"/", b"new\nline", b" "):
        link = os.fsencode(where / "link")
        os.symlink(target, link)
        assert os.readlink(link) == target
        os.unlink(link)
    directory(where / "d")
    file(where / "d" / "file", b"data")
    (where / "d" / "link").symlink_to("file")
    assert (where / "d" / "link").read_bytes() == b"data"
    os.rename(where / "d" / "link", where / "link")
    with fails_with(errno.ENOENT):
        (where / "link").read_bytes()
    with fails_with(errno.ENOENT):
        os.symlink("", where / "empty")
