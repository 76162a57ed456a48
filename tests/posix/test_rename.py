"""rename(2) and renameat2(2)."""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial
from pathlib import Path

import pytest

from tests.mount.support import another_python, fails_with, line_of
from tests.posix.support import (
    KINDS,
    NOBODY,
    OLD,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    directory,
    file,
    kind_of,
    make,
    old,
    opened,
    remove,
    renameat2,
    tick,
    updated,
    user,
)


def test_rename_replaces_a_file_and_keeps_the_inode(where: Path) -> None:
    source = old(file(where / "source", b"new"))
    inode = source.stat().st_ino
    file(where / "target", b"old")
    os.rename(source, where / "target")
    assert os.listdir(where) == ["target"]
    assert (where / "target").read_bytes() == b"new"
    found = (where / "target").stat()
    assert (found.st_ino, found.st_mtime_ns) == (inode, OLD)


def test_rename_moves_between_directories(where: Path) -> None:
    (where / "a").mkdir()
    (where / "b").mkdir()
    (where / "a" / "directory").mkdir()
    file(where / "a" / "directory" / "file", b"data")
    os.rename(where / "a" / "directory", where / "b" / "moved")
    assert (where / "b" / "moved" / "file").read_bytes() == b"data"
    assert os.listdir(where / "a") == []
    assert ((where / "a").stat().st_nlink, (where / "b").stat().st_nlink) == (2, 3)
    assert (where / "b" / "moved" / "..").stat().st_ino == (where / "b").stat().st_ino


def test_rename_of_a_name_to_itself_or_its_twin_changes_nothing(where: Path) -> None:
    path = file(where / "file", b"data")
    os.rename(path, path)
    os.link(path, where / "twin")
    os.rename(path, where / "twin")
    assert sorted(os.listdir(where)) == ["file", "twin"]
    assert path.read_bytes() == b"data"


@pytest.mark.parametrize(
    ("source", "target", "numbers"),
    [
        ("missing", "new", [errno.ENOENT]),
        ("file", "missing/new", [errno.ENOENT]),
        ("file", "file/new", [errno.ENOTDIR]),
        ("file", "empty", [errno.EISDIR]),
        ("empty", "file", [errno.ENOTDIR]),
        ("empty", "full", [errno.ENOTEMPTY, errno.EEXIST]),
        ("full", "full/below", [errno.EINVAL]),
        ("full", "full/below/deeper", [errno.EINVAL]),
        ("full/below", "full", [errno.ENOTEMPTY, errno.EEXIST]),
    ],
)
def test_what_cannot_be_renamed(where: Path, source: str, target: str, numbers: list[int]) -> None:
    file(where / "file")
    (where / "empty").mkdir()
    (where / "full").mkdir()
    (where / "full" / "below").mkdir()
    with fails_with(*numbers):
        os.rename(where / source, where / target)
    assert sorted(os.listdir(where)) == ["empty", "file", "full"]


def test_a_directory_replaces_an_empty_one(where: Path) -> None:
    (where / "a").mkdir()
    file(where / "a" / "file")
    (where / "b").mkdir()
    os.rename(where / "a", where / "b")
    assert os.listdir(where) == ["b"]
    assert os.listdir(where / "b") == ["file"]
    assert where.stat().st_nlink == 3


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_which_kind_replaces_which(where: Path, source: str, target: str) -> None:
    moved = make(source, where / "moved")
    other = directory(where / "other")
    victim = make(target, other / "victim")
    inode = moved.lstat().st_ino
    numbers = {(True, False): errno.ENOTDIR, (False, True): errno.EISDIR}
    number = numbers.get((source == "directory", target == "directory"))
    with opened(victim, os.O_PATH | os.O_NOFOLLOW) as fd:
        if number is not None:

            def attempt() -> None:
                with fails_with(number):
                    os.rename(moved, victim)

            assert updated(attempt, moved, victim, where, other) == [""] * 4
            return
        before = moved.lstat()
        assert updated(lambda: os.rename(moved, victim), where, other) == ["mc", "mc"]
        assert os.fstat(fd).st_nlink == 0
    after = victim.lstat()
    assert (after.st_ino, kind_of(victim)) == (inode, source)
    assert after.st_ctime_ns > before.st_ctime_ns
    assert after.st_mtime_ns == before.st_mtime_ns
    assert os.listdir(where) == ["other"]
    assert other.stat().st_nlink == (3 if source == "directory" else 2)
    assert where.stat().st_nlink == 3


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("two", ["file", "directory", "link"])
def test_any_two_kinds_are_exchanged(where: Path, one: str, two: str) -> None:
    first = make(one, where / "first")
    below = directory(where / "below")
    second = make(two, below / "second")
    inodes = first.lstat().st_ino, second.lstat().st_ino
    links = where.stat().st_nlink, below.stat().st_nlink
    swap = partial(renameat2, first, second, RENAME_EXCHANGE)
    assert updated(swap, where, below) == ["mc", "mc"]
    assert (second.lstat().st_ino, first.lstat().st_ino) == inodes
    assert (kind_of(first), kind_of(second)) == (two, one)
    moved = (two == "directory") - (one == "directory")
    assert (where.stat().st_nlink, below.stat().st_nlink) == (links[0] + moved, links[1] - moved)
    with fails_with(errno.ENOENT):
        renameat2(first, where / "missing", RENAME_EXCHANGE)
    with fails_with(errno.EINVAL):
        renameat2(where / "below", second, RENAME_EXCHANGE)
    with fails_with(errno.EINVAL):
        renameat2(second, where / "below", RENAME_EXCHANGE)


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_is_replaced_when_nothing_may_be(where: Path, kind: str) -> None:
    source = file(where / "source")
    taken = make(kind, where / "taken")
    os.link(source, where / "twin")
    for name in ("taken", "twin", "source"):

        def attempt(name: str = name) -> None:
            with fails_with(errno.EEXIST):
                renameat2(source, where / name, RENAME_NOREPLACE)

        assert updated(attempt, source, taken, where) == ["", "", ""]
    renameat2(taken, where / "free", RENAME_NOREPLACE)
    assert kind_of(where / "free") == kind
    with fails_with(errno.EINVAL):
        renameat2(source, where / "new", RENAME_NOREPLACE | RENAME_EXCHANGE)
    with fails_with(errno.EINVAL):
        renameat2(source, where / "new", 1 << 10)


def test_a_whiteout_is_left_where_one_is_wanted(where: Path) -> None:
    source = file(where / "source", b"data")
    below = directory(where / "below")
    assert updated(partial(renameat2, source, below / "new", RENAME_WHITEOUT), where) == ["mc"]
    found = source.lstat()
    assert (kind_of(source), found.st_rdev, found.st_nlink) == ("character", 0, 1)
    assert (below / "new").read_bytes() == b"data"
    renameat2(below, source, RENAME_EXCHANGE)
    with fails_with(errno.EEXIST):
        renameat2(source, below, RENAME_WHITEOUT | RENAME_NOREPLACE)
    with fails_with(errno.EINVAL):
        renameat2(source, below, RENAME_WHITEOUT | RENAME_EXCHANGE)
    assert where.stat().st_nlink == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_inode_keeps_all_but_its_change_time(where: Path, kind: str) -> None:
    path = make(kind, where / "it", 0o751, 7)
    other = directory(where / "other")
    before = path.lstat()
    tick()
    os.rename(path, other / "it")
    after = (other / "it").lstat()
    assert before[:8] == after[:8]
    assert before.st_mtime_ns == after.st_mtime_ns
    assert before.st_ctime_ns < after.st_ctime_ns
    with fails_with(errno.ENOENT):
        path.lstat()


def test_dots_and_roots_are_not_renamed(where: Path) -> None:
    below = directory(where / "below")
    directory(below / "deeper")
    for source in (".", "..", "../below/.", "deeper/.."):
        with contextlib.chdir(below), fails_with(errno.EBUSY, errno.EINVAL, errno.ENOTEMPTY):
            os.rename(source, "../new")
        with contextlib.chdir(below), fails_with(errno.EBUSY, errno.EINVAL, errno.ENOTEMPTY):
            os.rename("deeper", source)
    assert os.listdir(where) == ["below"]


@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo"])
def test_permissions_to_rename_from_a_sticky_directory(where: Path, kind: str) -> None:
    """The owner of the directory, the owner of the file, and root."""
    where.chmod(0o777)
    for parent_owner, owner, allowed in [
        (0, 0, False),
        (0, NOBODY, True),
        (NOBODY, 0, True),
        (1000, 1000, False),
    ]:
        sticky = directory(where / "sticky", 0o1777, parent_owner)
        path = make(kind, sticky / "it", 0o777, owner)
        own = make(kind, sticky / "own", 0o777, NOBODY)
        with user():
            if allowed:
                os.rename(path, sticky / "new")
                os.rename(sticky / "new", path)
                os.rename(own, path)
            else:
                with fails_with(errno.EPERM):
                    os.rename(path, sticky / "new")
                with fails_with(errno.EPERM):
                    os.rename(own, path)
                with fails_with(errno.EPERM):
                    remove(path)
                remove(own)
        remove(path)
        sticky.rmdir()


def test_another_parent_is_a_change_of_the_directory_itself(where: Path) -> None:
    where.chmod(0o777)
    other = directory(where / "other", 0o777)
    path = directory(where / "it", 0o555, NOBODY)
    with user():
        with fails_with(errno.EACCES):
            os.rename(path, other / "it")
        os.rename(path, where / "renamed")
        (where / "renamed").chmod(0o755)
        os.rename(where / "renamed", other / "it")
    assert (other / "it" / "..").stat().st_ino == other.stat().st_ino


def test_a_directory_that_moves_takes_its_tree_and_its_users_along(where: Path) -> None:
    tree = directory(where / "tree")
    directory(tree / "deep")
    file(tree / "deep" / "file", b"data")
    other = directory(where / "other")
    with opened(tree / "deep", os.O_RDONLY) as fd, contextlib.chdir(tree / "deep"):
        os.rename(tree, other / "moved")
        assert os.getcwd() == str(other / "moved" / "deep")
        assert Path("file").read_bytes() == b"data"
        assert os.stat("../..").st_ino == other.stat().st_ino
        assert os.listdir(fd) == ["file"]
        with fails_with(errno.EINVAL):
            os.rename("../../../other", "below")
    assert (other / "moved" / "deep" / "file").read_bytes() == b"data"


def test_two_directories_are_moved_into_each_other_by_at_most_one(where: Path) -> None:
    script = """
import os, sys
root, one, two = sys.argv[1:]
for number in range(200):
    try:
        os.rename(f"{root}/{one}", f"{root}/{two}/{one}")
        os.rename(f"{root}/{two}/{one}", f"{root}/{one}")
    except OSError:
        pass
print("done")
"""
    directory(where / "a")
    directory(where / "b")
    with (
        another_python(script, where, "a", "b") as one,
        another_python(script, where, "b", "a") as two,
    ):
        assert line_of(one) == line_of(two) == "done"
    assert len([path for path in where.rglob("*") if path.is_dir()]) == 2
    assert where.stat().st_nlink == 2 + len(os.listdir(where))
