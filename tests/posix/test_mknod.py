"""mkdir(2), mkfifo(2), mknod(2) and creat(2): what is made, and whose it is."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.mount.support import another_python, fails_with, line_of
from tests.posix.support import (
    directory,
    file,
    kind_of,
    make,
    mode_of,
    opened,
    remove,
    umask,
    updated,
    user,
)


def test_the_set_group_id_bit_of_a_directory_is_inherited(where: Path) -> None:
    directory = where / "directory"
    directory.mkdir()
    os.chown(directory, 0, 4321)
    directory.chmod(0o2755)
    file(directory / "file")
    (directory / "below").mkdir()
    (directory / "link").symlink_to("x")
    assert (directory / "file").stat().st_gid == 4321
    assert (directory / "link").lstat().st_gid == 4321
    assert (directory / "below").stat().st_gid == 4321
    assert (directory / "below").stat().st_mode & stat.S_ISGID


def test_a_fifo_joins_two_processes(where: Path) -> None:
    fifo = where / "fifo"
    os.mkfifo(fifo, 0o600)
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    with another_python("import sys; print(open(sys.argv[1]).read())", fifo) as reader:
        fifo.write_text("through the fifo")
        assert line_of(reader) == "through the fifo"


def test_a_socket_can_be_bound_and_reached(where: Path) -> None:
    path = str(where / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(path)
        server.listen()
        assert stat.S_ISSOCK(os.stat(path).st_mode)
        client.connect(path)


MAKERS: dict[str, Callable[[Path, int], object]] = {
    "creat": lambda path, mode: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, mode)),
    "file": lambda path, mode: os.mknod(path, stat.S_IFREG | mode),
    "typeless": lambda path, mode: os.mknod(path, mode),
    "fifo": os.mkfifo,
    "character": lambda path, mode: os.mknod(path, stat.S_IFCHR | mode, os.makedev(4, 5)),
    "block": lambda path, mode: os.mknod(path, stat.S_IFBLK | mode, os.makedev(4, 5)),
    "socket": lambda path, mode: os.mknod(path, stat.S_IFSOCK | mode),
    "directory": lambda path, mode: path.mkdir(mode),
}
_KIND = {"creat": "file", "typeless": "file"}


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_made_has_its_mode_its_maker_and_its_time(where: Path, maker: str) -> None:
    make_it = MAKERS[maker]
    path = where / "new"
    for mode, mask, wanted in [
        (0o777, 0o000, 0o777),
        (0o777, 0o077, 0o700),
        (0o666, 0o022, 0o644),
        (0o501, 0o345, 0o400),
        (0o151, 0o151, 0o000),
        (0o070, 0o777, 0o000),
    ]:
        with umask(mask):
            assert updated(partial(make_it, path, mode), where) == ["mc"]
        found = path.lstat()
        assert kind_of(path) == _KIND.get(maker, maker)
        assert mode_of(path) == wanted
        assert (found.st_uid, found.st_gid) == (0, 0)
        assert found.st_nlink == (2 if maker == "directory" else 1)
        assert found.st_mtime_ns == found.st_ctime_ns == found.st_atime_ns
        assert abs(found.st_mtime_ns - time.time_ns()) < 60 * 10**9
        remove(path)


@pytest.mark.parametrize("maker", MAKERS)
def test_what_users_make_is_theirs(where: Path, maker: str) -> None:
    where.chmod(0o777)
    path = where / "new"
    with user(1000, 2000, (3000,)):
        if maker in ("character", "block"):
            with fails_with(errno.EPERM):
                MAKERS[maker](path, 0o644)
            return
        MAKERS[maker](path, 0o640)
    assert (path.lstat().st_uid, path.lstat().st_gid) == (1000, 2000)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_set_group_id_directory_gives_its_group(where: Path, maker: str) -> None:
    parent = directory(where / "parent")
    os.chown(parent, 0, 4321)
    parent.chmod(0o2777)
    MAKERS[maker](parent / "new", 0o755)
    found = (parent / "new").lstat()
    assert found.st_gid == 4321
    assert bool(found.st_mode & stat.S_ISGID) == (maker == "directory")
    if maker in ("character", "block"):
        return
    with user(1000, 2000), umask(0):
        MAKERS[maker](parent / "theirs", 0o755 if maker == "directory" else 0o2755)
    found = (parent / "theirs").lstat()
    assert (found.st_uid, found.st_gid) == (1000, 4321)
    assert bool(found.st_mode & stat.S_ISGID) == (maker == "directory")


def test_a_directory_may_be_made_sticky(where: Path) -> None:
    with umask(0):
        (where / "new").mkdir(0o1777)
    assert mode_of(where / "new") == 0o1777


@pytest.mark.parametrize("device", [(0, 0), (1, 3), (255, 255), (4095, 1_048_575)])
def test_device_numbers_are_kept(where: Path, device: tuple[int, int]) -> None:
    for name, kind in (("c", stat.S_IFCHR), ("b", stat.S_IFBLK)):
        os.mknod(where / name, 0o600 | kind, os.makedev(*device))
        found = (where / name).stat().st_rdev
        assert (os.major(found), os.minor(found)) == device


def test_what_cannot_be_opened_of_special_files(where: Path) -> None:
    make("fifo", where / "fifo")
    make("socket", where / "socket")
    with fails_with(errno.ENXIO):  # nobody reads
        os.open(where / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    with fails_with(errno.ENXIO):
        os.open(where / "socket", os.O_RDONLY)
    with opened(where / "fifo", os.O_RDONLY | os.O_NONBLOCK) as reading:
        with opened(where / "fifo", os.O_WRONLY | os.O_NONBLOCK) as writing:
            os.write(writing, b"through")
            assert os.read(reading, 10) == b"through"
        with fails_with(errno.ESPIPE):
            os.lseek(reading, 0, os.SEEK_SET)
    (where / "fifo").unlink()
