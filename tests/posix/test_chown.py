"""chown(2): permissions, and effects on set-ID bits."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from pathlib import Path

import pytest

from tests.mount.support import fails_with
from tests.posix.support import (
    KINDS,
    NOBODY,
    directory,
    file,
    kind_of,
    make,
    mode_of,
    opened,
    umask,
    updated,
    user,
)


@pytest.mark.parametrize("kind", KINDS)
def test_root_changes_any_owner_and_group(where: Path, kind: str) -> None:
    path = make(kind, where / "it")

    def ids() -> tuple[int, int]:
        return path.lstat().st_uid, path.lstat().st_gid

    assert updated(lambda: os.lchown(path, 123, 456), path, where) == ["c", ""]
    assert ids() == (123, 456)
    os.lchown(path, -1, 7)
    assert ids() == (123, 7)
    os.lchown(path, 2**32 - 2, -1)
    assert ids() == (2**32 - 2, 7)
    assert updated(lambda: os.lchown(path, 2**32 - 2, 7), path) == ["c"]
    assert kind_of(path) == kind


def test_chown_follows_a_link_and_lchown_does_not(where: Path) -> None:
    target = file(where / "target")
    link = where / "link"
    link.symlink_to("target")
    os.chown(link, 5, 6)
    os.lchown(link, 7, 8)
    assert (target.stat().st_uid, target.stat().st_gid) == (5, 6)
    assert (link.lstat().st_uid, link.lstat().st_gid) == (7, 8)
    with opened(target) as fd:
        target.unlink()
        os.fchown(fd, 9, 10)
        assert (os.fstat(fd).st_uid, os.fstat(fd).st_gid) == (9, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_owner_changes_the_group_to_one_of_his_own(where: Path, kind: str) -> None:
    path = make(kind, where / "it", 0o644, NOBODY)
    with user(NOBODY, NOBODY, (10, 11)):
        for gid in (10, 11, NOBODY):
            assert updated(partial(os.lchown, path, -1, gid), path) == ["c"]
            assert path.lstat().st_gid == gid
        os.lchown(path, NOBODY, 10)
        assert path.lstat().st_gid == 10

        def attempts() -> None:
            for uid, gid in [(-1, 12), (-1, 0), (0, -1), (NOBODY - 1, -1), (0, 10)]:
                with fails_with(errno.EPERM):
                    os.lchown(path, uid, gid)

        assert updated(attempts, path) == [""]
    with user(NOBODY - 1, NOBODY - 1, (10,)):
        for uid, gid in [(-1, 10), (NOBODY - 1, -1), (NOBODY, 10)]:
            with fails_with(errno.EPERM):
                os.lchown(path, uid, gid)
    assert (path.lstat().st_uid, path.lstat().st_gid) == (NOBODY, 10)


@pytest.mark.parametrize("uid", [0, NOBODY])
def test_a_new_owner_or_group_takes_set_id_bits_away(where: Path, uid: int) -> None:
    path = file(where / "file")
    for mode, kept in [(0o6777, 0o777), (0o4755, 0o755), (0o2755, 0o755), (0o6711, 0o711)]:
        for new in [(-1, 10), (-1, NOBODY), (NOBODY, -1)]:
            os.chown(path, NOBODY, NOBODY)
            path.chmod(mode)
            with user(uid, NOBODY, (10,)):
                os.chown(path, *new)
            assert mode_of(path) == kept, (mode, new)
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o2744)  # mandatory locking once, no set-group-ID
    with user(uid, NOBODY, (10,)):
        os.chown(path, -1, 10)
    assert mode_of(path) == 0o2744


def test_a_file_that_was_made_with_set_id_bits_loses_them_too(where: Path) -> None:
    with umask(0):
        os.mknod(where / "given", stat.S_IFREG | 0o6777)
        os.mknod(where / "written", stat.S_IFREG | 0o6777)
    os.chown(where / "given", -1, 10)
    with user(), opened(where / "written", os.O_WRONLY) as fd:
        os.write(fd, b"x")
    assert (mode_of(where / "given"), mode_of(where / "written")) == (0o777, 0o777)


def test_a_directory_keeps_its_bits_when_its_owner_changes(where: Path) -> None:
    path = directory(where / "directory", 0o3777)
    os.chown(path, 5, 6)
    assert mode_of(path) == 0o3777
    path.chmod(0o4777)
    os.chown(path, 7, -1)
    assert mode_of(path) == 0o4777


def test_chown_to_the_same_owner_changes_the_change_time(where: Path) -> None:
    path = file(where / "file")
    assert updated(lambda: os.chown(path, -1, -1), path) == ["c"]
