"""What every call refuses: paths, permissions on the way, read-only mounts."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import disposable
from tests.mount.support import fails_with, run
from tests.posix.support import (
    AT_EACCESS,
    AT_FDCWD,
    KINDS,
    NOBODY,
    check,
    directory,
    file,
    libc,
    make,
    remove,
    tick,
    user,
)

PATH_MAX = 4096

Call = Callable[[str], object]


# What makes a name, and what needs one; what follows a link at the end, and what does not.
MAKING: dict[str, Call] = {
    "creat": lambda path: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
    "mkdir": os.mkdir,
    "mkfifo": os.mkfifo,
    "mknod": lambda path: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3)),
    "symlink": lambda path: os.symlink("target", path),
    "link": lambda path: os.link("source", path),
    "rename": lambda path: os.rename("source", path),
}
FOLLOWING: dict[str, Call] = {
    "open": lambda path: os.close(os.open(path, os.O_RDONLY)),
    "stat": os.stat,
    "access": lambda path: check(libc.faccessat(AT_FDCWD, path.encode(), 0, AT_EACCESS)),
    "chmod": lambda path: os.chmod(path, 0o700),
    "chown": lambda path: os.chown(path, 0, 0),
    "truncate": lambda path: os.truncate(path, 0),
    "utimensat": lambda path: os.utime(path),
    "statvfs": os.statvfs,
    "setxattr": lambda path: os.setxattr(path, "user.x", b"x"),
    "getxattr": lambda path: os.listxattr(path),
    "chdir": lambda path: os.chdir(path),
    "opendir": lambda path: os.listdir(path),
}
NAMING: dict[str, Call] = {
    "lstat": os.lstat,
    "lchown": lambda path: os.lchown(path, 0, 0),
    "readlink": os.readlink,
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "rename from": lambda path: os.rename(path, path),
    "link from": lambda path: os.link(path, path + "twin", follow_symlinks=False),
    "utimensat nofollow": lambda path: os.utime(path, follow_symlinks=False),
}
ALL = {**MAKING, **FOLLOWING, **NAMING}


@pytest.fixture
def inside(where: Path) -> Iterator[Path]:
    """*where*, as the working directory, with a file ``source`` in it."""
    file(where / "source")
    with contextlib.chdir(where):
        yield where


@pytest.mark.parametrize("name", ALL)
def test_invalid_paths_are_refused(inside: Path, name: str) -> None:
    call = ALL[name]
    file(inside / "file")
    (inside / "loop").symlink_to("pool")
    (inside / "pool").symlink_to("loop")
    for bad, number in [
        ("file/below", errno.ENOTDIR),
        ("missing/below", errno.ENOENT),
        ("loop/below", errno.ELOOP),
        ("x" * 256, errno.ENAMETOOLONG),
        ("x" * 256 + "/below", errno.ENAMETOOLONG),
        ("é" * 128, errno.ENAMETOOLONG),
        ("./" * (PATH_MAX // 2), errno.ENAMETOOLONG),
        ("", errno.ENOENT),
    ]:
        with fails_with(number):
            call(bad)
    assert sorted(os.listdir(inside)) == ["file", "loop", "pool", "source"]


@pytest.mark.parametrize("name", MAKING)
@pytest.mark.parametrize("kind", KINDS)
def test_what_exists_is_not_made_again(inside: Path, name: str, kind: str) -> None:
    make(kind, inside / "taken")
    before = (inside / "taken").lstat()
    if name == "rename":  # replaces, but for a directory
        if kind == "directory":
            with fails_with(errno.EISDIR):
                MAKING[name]("taken")
        return
    with fails_with(errno.EEXIST):
        MAKING[name]("taken")
    after = (inside / "taken").lstat()
    assert (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns)


@pytest.mark.parametrize("name", [*FOLLOWING, *NAMING])
def test_what_is_missing_is_not_found(inside: Path, name: str) -> None:
    with fails_with(errno.ENOENT):
        ALL[name]("missing")
    (inside / "dangling").symlink_to("missing")
    if name in FOLLOWING:
        with fails_with(errno.ENOENT):
            ALL[name]("dangling")
        (inside / "loop").symlink_to("loop")
        with fails_with(errno.ELOOP):
            ALL[name]("loop")


@pytest.mark.parametrize("name", MAKING)
def test_the_longest_name_and_the_longest_path_work(inside: Path, name: str) -> None:
    longest = "n" * 255
    MAKING[name](longest)
    remove(Path(longest))
    file(inside / "source")
    path = "./" * ((PATH_MAX - 2) // 2) + "a"
    assert len(path) == PATH_MAX - 1
    MAKING[name](path)
    assert (inside / "a").lstat()


@pytest.mark.parametrize("name", ALL)
def test_a_directory_on_the_way_must_be_searchable(inside: Path, name: str) -> None:
    call = ALL[name]
    inside.chmod(0o777)
    (inside / "source").chmod(0o666)
    outer = directory(inside / "outer", 0o755, NOBODY)
    inner = directory(outer / "inner", 0o777, NOBODY)
    there = inner / "there"
    for mode in (0o644, 0o600, 0o000):
        outer.chmod(mode)
        with user(), fails_with(errno.EACCES):
            call("outer/inner/there")
        with user(NOBODY - 1, NOBODY - 1), fails_with(errno.EACCES):
            call("outer/inner/there")
    outer.chmod(0o711)
    assert not there.exists()


@pytest.mark.parametrize("name", [*MAKING, "unlink", "rmdir", "rename from", "link from"])
def test_a_directory_that_is_changed_must_be_writable(inside: Path, name: str) -> None:
    parent = directory(inside / "parent")
    inside.chmod(0o777)
    os.chown(file(inside / "source"), NOBODY, NOBODY)
    if name == "rmdir":
        directory(parent / "there", 0o777, NOBODY)
    elif name not in MAKING:
        os.chown(file(parent / "there"), NOBODY, NOBODY)
    for owner, mode in [(0, 0o755), (0, 0o775), (NOBODY, 0o577), (NOBODY, 0o077), (0, 0o776)]:
        os.chown(parent, owner, owner)
        parent.chmod(mode)
        with user(), fails_with(errno.EACCES):
            if name == "rename from":
                os.rename("parent/there", "parent/elsewhere")
            else:
                ALL[name]("parent/there")
    os.chown(parent, 0, NOBODY)
    parent.chmod(0o070)
    before = parent.stat()
    tick()
    with user():
        if name == "mknod":
            os.mkfifo("parent/there")
        elif name == "rename from":
            os.rename("parent/there", "parent/elsewhere")
        else:
            ALL[name]("parent/there")
    after = parent.stat()
    assert before.st_mtime_ns < after.st_mtime_ns
    assert before.st_ctime_ns < after.st_ctime_ns


@pytest.mark.parametrize("name", [*MAKING, "unlink", "rmdir", "rename from", "chmod", "chown",
                                  "truncate", "utimensat", "setxattr", "lchown"])  # fmt: skip
def test_a_read_only_mount_refuses_every_change(inside: Path, name: str) -> None:
    there = inside / "there"
    if name == "rmdir":
        there.mkdir()
    elif name not in MAKING:
        file(there)
    shown = directory(inside / "shown")
    run("mount", "--bind", inside, shown)
    try:
        run("mount", "-o", "remount,bind,ro", shown)
        with contextlib.chdir(shown), fails_with(errno.EROFS):
            if name == "rename from":
                os.rename("there", "elsewhere")
            elif name == "rename":
                os.rename("source", "elsewhere")
            elif name == "link":
                os.link("source", "elsewhere")
            else:
                ALL[name]("there")
        with contextlib.chdir(shown), fails_with(errno.EROFS):
            os.open("source", os.O_WRONLY)
        assert (shown / "source").read_bytes() == b""
        assert not os.access(shown / "source", os.W_OK)
    finally:
        run("umount", shown)


def test_a_chain_of_links_may_be_40_long(where: Path) -> None:
    file(where / "0", b"found")
    for number in range(1, 42):
        (where / str(number)).symlink_to(str(number - 1))
    assert (where / "40").read_bytes() == b"found"
    with fails_with(errno.ELOOP):
        os.stat(where / "41")


def test_paths_cross_no_mounts_unseen(where: Path) -> None:
    file(where / "file")
    with disposable("/tmp" if str(where).startswith("/dev/shm") else "/dev/shm") as other:
        file(other / "file")
        for call in (os.link, os.rename):
            with fails_with(errno.EXDEV):
                call(where / "file", other / "new")
            with fails_with(errno.EXDEV):
                call(other / "file", where / "new")
    assert os.listdir(where) == ["file"]
