"""chmod(2), and what takes set-ID bits away."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
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
    remove,
    updated,
    user,
)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "link"])
def test_chmod_sets_every_bit_of_every_kind(where: Path, kind: str) -> None:
    path = make(kind, where / "it")
    inode = path.stat().st_ino
    for mode in (0, 0o111, 0o444, 0o1000, 0o2000, 0o4000, 0o7777, 0o641):
        assert updated(partial(path.chmod, mode), path, where) == ["c", ""]
        assert mode_of(path) == mode
        (where / "link").symlink_to("it")
        (where / "link").chmod(mode ^ 0o777)
        assert mode_of(path) == mode ^ 0o777
        (where / "link").unlink()
    assert kind_of(path) == kind
    assert path.stat().st_ino == inode
    assert updated(lambda: path.chmod(0o641), path) == ["c"]


def test_fchmod_works_on_what_has_no_name_any_more(where: Path) -> None:
    for path in (file(where / "file"), directory(where / "directory")):
        with opened(path, os.O_RDONLY) as fd:
            remove(path)
            assert updated(partial(os.fchmod, fd, 0o4751), fd) == ["c"]
            assert mode_of(fd) == 0o4751


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "link"])
def test_only_the_owner_and_root_change_a_mode(where: Path, kind: str) -> None:
    path = make(kind, where / "it", 0o666, NOBODY)
    with user(NOBODY - 1, NOBODY):

        def attempt() -> None:
            with fails_with(errno.EPERM):
                path.chmod(0o777)

        assert updated(attempt, path) == [""]
    assert mode_of(path) == 0o666
    with user():
        assert updated(lambda: path.chmod(0o600), path) == ["c"]
    assert mode_of(path) == 0o600


def test_an_owner_outside_the_group_cannot_set_the_set_group_id_bit(where: Path) -> None:
    path = file(where / "file")
    for gid, groups, kept in [(NOBODY, (), False), (5, (), True), (NOBODY, (4, 5, 6), True)]:
        os.chown(path, NOBODY, 5)
        path.chmod(0o644)
        with user(NOBODY, gid, groups):
            path.chmod(0o2755)
        assert mode_of(path) == (0o2755 if kept else 0o755)
        with user(NOBODY, gid, groups):
            path.chmod(0o4755)
        assert mode_of(path) == 0o4755


def test_an_owner_may_set_the_sticky_bit(where: Path) -> None:
    for path in (
        make("file", where / "file", 0o644, NOBODY),
        directory(where / "d", 0o755, NOBODY),
    ):
        with user():
            path.chmod(0o1755)
        assert mode_of(path) == 0o1755


@pytest.mark.parametrize("mode", [0o4777, 0o2777, 0o6777, 0o6755, 0o2745, 0o6711])
def test_writing_takes_set_id_bits_away_but_for_root(where: Path, passed: bool, mode: int) -> None:
    path = file(where / "file", b"data")
    kept = mode & ~0o4000 & ~(0o2000 if mode & 0o010 else 0)
    changes: list[Callable[[int], object]] = [
        lambda fd: os.write(fd, b"x"),
        lambda fd: os.pwrite(fd, b"x", 100_000),
        lambda fd: os.ftruncate(fd, 2),
        lambda fd: os.truncate(path, 3),
        lambda fd: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
        lambda fd: os.close(os.open(path, os.O_RDONLY | os.O_TRUNC)),
    ]
    for change in changes:
        for uid in (0, NOBODY):
            os.chown(path, NOBODY, NOBODY)
            path.chmod(mode | 0o200)
            with opened(path, os.O_WRONLY) as fd, user(uid, uid):
                change(fd)
            left = {kept} if uid else {mode, kept} if passed else {mode}
            assert mode_of(path) in {mode | 0o200 for mode in left}, change


def test_reading_keeps_set_id_bits(where: Path) -> None:
    path = make("file", where / "file", 0o6755, NOBODY)
    with user(NOBODY - 1, NOBODY - 1):
        path.read_bytes()
    assert mode_of(path) == 0o6755
