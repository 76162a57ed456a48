"""unlink(2), and what is open when its last name goes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from pathlib import Path

import pytest

from tests.mount.support import fails_with
from tests.posix.support import (
    AT_FDCWD,
    AT_SYMLINK_FOLLOW,
    KINDS,
    OLD,
    directory,
    file,
    make,
    opened,
    updated,
)


def test_an_unlinked_open_file_lives_on(where: Path) -> None:
    path = file(where / "file", b"before")
    with opened(path) as fd, opened(path) as other:
        path.unlink()
        assert not path.exists()
        assert os.fstat(fd).st_nlink == 0
        os.pwrite(fd, b"after", 6)
        assert os.pread(other, 20, 0) == b"beforeafter"
        os.ftruncate(fd, 3)
        os.fchmod(fd, 0o600)
        os.utime(fd, ns=(OLD, OLD))
        os.fsync(fd)
        found = os.fstat(other)
        assert (found.st_size, found.st_mtime_ns, stat.S_IMODE(found.st_mode)) == (3, OLD, 0o600)
        file(path, b"another")
        assert os.pread(fd, 20, 0) == b"bef"
    assert path.read_bytes() == b"another"


def test_a_replaced_open_file_lives_on(where: Path) -> None:
    path = file(where / "file", b"old")
    with opened(path) as fd:
        os.rename(file(where / "new", b"newer"), path)
        assert path.read_bytes() == b"newer"
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 10, 0) == b"old"
        os.pwrite(fd, b"OLD", 0)
        assert os.pread(fd, 10, 0) == b"OLD"
    assert path.read_bytes() == b"newer"


def test_a_removed_open_directory_is_empty_and_takes_nothing_more(where: Path) -> None:
    directory = where / "directory"
    directory.mkdir()
    with opened(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        directory.rmdir()
        assert os.listdir(fd) == []
        assert os.fstat(fd).st_nlink == 0
        with fails_with(errno.ENOENT):
            os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        with fails_with(errno.ENOENT):
            os.mkdir("below", dir_fd=fd)


def test_an_unlinked_file_is_not_linked_again(where: Path) -> None:
    with opened(where / "file") as fd:
        (where / "file").unlink()
        libc = ctypes.CDLL(None, use_errno=True)
        names = f"/proc/self/fd/{fd}".encode(), os.fsencode(where / "again")
        assert libc.linkat(AT_FDCWD, names[0], AT_FDCWD, names[1], AT_SYMLINK_FOLLOW) == -1
        assert ctypes.get_errno() == errno.ENOENT


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "directory"])
def test_every_kind_is_unlinked(where: Path, kind: str) -> None:
    path = make(kind, where / "it")
    with opened(path, os.O_PATH | os.O_NOFOLLOW) as fd:
        assert updated(path.unlink, where, fd) == ["mc", "c"]
        assert os.fstat(fd).st_nlink == 0
    with fails_with(errno.ENOENT):
        path.lstat()
    with fails_with(errno.ENOENT):
        path.unlink()


def test_a_directory_is_not_unlinked(where: Path) -> None:
    path = directory(where / "it")

    def attempt() -> None:
        with fails_with(errno.EISDIR):
            path.unlink()

    assert updated(attempt, path, where) == ["", ""]
    with fails_with(errno.ENOTDIR, errno.EISDIR):
        os.unlink(f"{path}/")
    file(where / "file")
    with fails_with(errno.ENOTDIR):
        os.unlink(f"{where}/file/")


def test_hundreds_of_unlinked_open_files_are_one_each(where: Path) -> None:
    with contextlib.ExitStack() as stack:
        fds = []
        for number in range(200):
            fds.append(stack.enter_context(opened(where / "same")))
            os.write(fds[-1], b"%d" % number)
            (where / "same").unlink()
        assert os.listdir(where) == []
        assert [os.pread(fd, 10, 0) for fd in fds] == [b"%d" % number for number in range(200)]
        assert len({os.fstat(fd).st_ino for fd in fds}) == 200
