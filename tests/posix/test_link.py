"""link(2): several names for one inode."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.support import fails_with
from tests.posix.support import (
    AT_FDCWD,
    AT_SYMLINK_FOLLOW,
    KINDS,
    check,
    directory,
    file,
    kind_of,
    libc,
    make,
    updated,
    user,
)


def test_hard_links_are_one_file(where: Path) -> None:
    path = file(where / "file", b"data")
    (where / "directory").mkdir()
    twin = where / "directory" / "twin"
    os.link(path, twin)
    assert path.stat().st_nlink == twin.stat().st_nlink == 2
    assert path.stat().st_ino == twin.stat().st_ino
    twin.write_bytes(b"changed")
    twin.chmod(0o600)
    assert path.read_bytes() == b"changed"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.unlink()
    assert twin.stat().st_nlink == 1
    assert twin.read_bytes() == b"changed"


def test_what_cannot_be_linked(where: Path) -> None:
    file(where / "file")
    (where / "directory").mkdir()
    with fails_with(errno.EPERM):
        os.link(where / "directory", where / "new")
    with fails_with(errno.EEXIST):
        os.link(where / "file", where / "directory")
    with fails_with(errno.ENOENT):
        os.link(where / "missing", where / "new")
    with fails_with(errno.ENOENT):
        os.link(where / "file", where / "missing" / "new")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "directory"])
def test_every_kind_but_a_directory_has_as_many_names_as_one_likes(where: Path, kind: str) -> None:
    path = make(kind, where / "it")
    other = directory(where / "other")
    inode = path.lstat().st_ino

    def link(new: Path) -> Callable[[], None]:
        return lambda: os.link(path, new, follow_symlinks=False)

    assert updated(link(where / "two"), path, where) == ["c", "mc"]
    assert updated(link(other / "three"), path, where, other) == ["c", "", "mc"]
    names = [path, where / "two", other / "three"]
    assert [(name.lstat().st_nlink, name.lstat().st_ino) for name in names] == [(3, inode)] * 3
    os.lchown(names[2], 12, 34)
    assert [name.lstat().st_gid for name in names] == [34] * 3
    assert updated(path.unlink, names[1], where, other) == ["c", "mc", ""]
    assert names[1].lstat().st_nlink == 2
    names[1].unlink()
    assert names[2].lstat().st_nlink == 1
    assert kind_of(names[2]) == kind
    assert os.listdir(where) == ["other"]


def test_a_refused_link_changes_nothing(where: Path) -> None:
    path = file(where / "file")
    taken = file(where / "taken")
    below = directory(where / "below")

    def attempts() -> None:
        with fails_with(errno.EEXIST):
            os.link(path, taken)
        with fails_with(errno.EPERM):
            os.link(below, where / "new")
        with user(), fails_with(errno.EACCES, errno.EPERM):  # EPERM: protected_hardlinks
            os.link(path, where / "new")

    assert updated(attempts, path, taken, where) == ["", "", ""]
    assert path.stat().st_nlink == 1


def test_a_link_to_a_symbolic_link_is_to_the_link_or_to_its_target(where: Path) -> None:
    target = file(where / "target")
    link = where / "link"
    link.symlink_to("target")
    os.link(link, where / "to_link", follow_symlinks=False)
    names = os.fsencode(link), os.fsencode(where / "to_target")
    check(libc.linkat(AT_FDCWD, names[0], AT_FDCWD, names[1], AT_SYMLINK_FOLLOW))
    assert (where / "to_link").lstat().st_ino == link.lstat().st_ino
    assert (where / "to_target").lstat().st_ino == target.stat().st_ino


def test_four_hundred_names(where: Path) -> None:
    path = file(where / "file", b"data")
    for number in range(400):
        os.link(path, where / f"name{number}")
    assert path.stat().st_nlink == 401
    assert (where / "name399").read_bytes() == b"data"
    assert len(os.listdir(where)) == 401
