"""rmdir(2)."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.support import fails_with, run
from tests.posix.support import (
    KINDS,
    directory,
    file,
    kind_of,
    make,
    opened,
    remove,
    updated,
)


@pytest.mark.parametrize(
    ("call", "name", "number"),
    [
        (os.mkdir, "file", errno.EEXIST),
        (os.mkdir, "full", errno.EEXIST),
        (os.mkdir, "missing/below", errno.ENOENT),
        (os.mkdir, "file/below", errno.ENOTDIR),
        (os.rmdir, "missing", errno.ENOENT),
        (os.rmdir, "file", errno.ENOTDIR),
        (os.rmdir, "full", errno.ENOTEMPTY),
        (os.rmdir, "link", errno.ENOTDIR),
        (os.rmdir, "full/.", errno.EINVAL),
        (os.rmdir, "full/below/..", errno.ENOTEMPTY),
        (os.unlink, "missing", errno.ENOENT),
        (os.unlink, "full", errno.EISDIR),
        (os.listdir, "file", errno.ENOTDIR),
        (os.listdir, "missing", errno.ENOENT),
        (os.stat, "dangling", errno.ENOENT),
        (os.stat, "file/.", errno.ENOTDIR),
    ],
)
def test_what_cannot_be_made_or_removed(
    where: Path, call: Callable[[str], object], name: str, number: int
) -> None:
    file(where / "file")
    (where / "full").mkdir()
    (where / "full" / "below").mkdir()
    (where / "link").symlink_to("full")
    (where / "dangling").symlink_to("nowhere")
    with fails_with(number):
        call(f"{where}/{name}")


def test_the_working_directory_may_be_here(where: Path) -> None:
    (where / "directory").mkdir()
    assert run("pwd", cwd=where / "directory").stdout == f"{where}/directory\n"
    run("touch", "file", cwd=where / "directory")
    assert os.listdir(where / "directory") == ["file"]


def test_an_empty_directory_goes_and_its_parent_changes(where: Path) -> None:
    path = directory(where / "it")
    with opened(path, os.O_RDONLY) as fd:
        assert updated(path.rmdir, where) == ["mc"]
        assert os.fstat(fd).st_nlink == 0
    assert where.stat().st_nlink == 2
    with fails_with(errno.ENOENT):
        path.rmdir()


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_with_anything_in_it_stays(where: Path, kind: str) -> None:
    path = directory(where / "full")
    inside = make(kind, path / "inside")

    def attempt() -> None:
        with fails_with(errno.ENOTEMPTY):
            path.rmdir()

    assert updated(attempt, path, where) == ["", ""]
    remove(inside)
    path.rmdir()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "directory"])
def test_nothing_else_is_a_directory(where: Path, kind: str) -> None:
    path = make(kind, where / "it")
    with fails_with(errno.ENOTDIR):
        path.rmdir()
    assert kind_of(path) == kind


def test_dots_and_mount_points_stay(where: Path) -> None:
    path = directory(where / "it")
    directory(path / "below")
    for name, number in [
        (".", errno.EINVAL),
        ("below/.", errno.EINVAL),
        ("below/..", errno.ENOTEMPTY),
    ]:
        with contextlib.chdir(path), fails_with(number):
            os.rmdir(name)
    run("mount", "-t", "tmpfs", "none", path / "below")
    try:
        with fails_with(errno.EBUSY):
            (path / "below").rmdir()
        with fails_with(errno.EBUSY):
            os.rename(path / "below", path / "new")
    finally:
        run("umount", path / "below")
    (path / "below").rmdir()


def test_the_working_directory_can_be_removed(where: Path) -> None:
    path = directory(where / "it")
    with contextlib.chdir(path):
        path.rmdir()
        with fails_with(errno.ENOENT):
            os.getcwd()
        with fails_with(errno.ENOENT):
            file(Path("new"))
        with fails_with(errno.ENOENT):
            os.mkdir("new")
        assert os.stat(".").st_nlink == 0
