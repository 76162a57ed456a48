"""What a program may expect of files.

Every test runs on a tmpfs too, so that nothing is promised here that Linux does not do, and in
a directory of its own; the mounts are shared by all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import disposable, limit_of
from tests.mount.support import (
    BACKENDS,
    Mount,
    another_python,
    fails_with,
    line_of,
    mounting,
    python,
    run,
    source_of,
    watchdog,
)

NOBODY = 65534
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400  # of linkat(2)
OLD = 1_000_000_000_123_456_789  # a time, in ns, that no change leaves as it is


@pytest.fixture(scope="module", params=["tmpfs", *BACKENDS, "engine"])
def shared(request: pytest.FixtureRequest) -> Iterator[Path | Mount]:
    """A tmpfs or a mount, for all tests of this module."""
    if request.param == "tmpfs":
        with disposable("/dev/shm") as path:
            yield path
        return
    with (
        disposable("/tmp") as path,
        source_of(request.param, path) as (source, options),
        mounting(source, path, *options) as mount,
    ):
        yield mount


@pytest.fixture
def where(request: pytest.FixtureRequest, shared: Path | Mount) -> Iterator[Path]:
    """An empty directory on it."""
    with contextlib.ExitStack() as stack:
        root = shared
        if isinstance(root, Mount):
            stack.enter_context(watchdog(root, limit_of(request)))
            stack.callback(root.check_log)
            root = root.path
        path = root / "d"
        path.mkdir(mode=0o755)
        stack.callback(shutil.rmtree, path)
        yield path


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def file(path: Path, data: bytes = b"") -> Path:
    path.write_bytes(data)
    return path


def old(path: Path) -> Path:
    os.utime(path, ns=(OLD, OLD))
    return path


def tick() -> None:
    """Let the clock that stamps files go on."""
    time.sleep(0.02)


# Opening and creating


def test_exclusive_creation_refuses_what_exists(where: Path) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    with opened(where / "file", flags):
        pass
    with fails_with(errno.EEXIST):
        os.open(where / "file", flags)
    (where / "link").symlink_to("nowhere")
    with fails_with(errno.EEXIST):
        os.open(where / "link", flags)
    (where / "directory").mkdir()
    with fails_with(errno.EEXIST):
        os.open(where / "directory", flags)


def test_creation_follows_a_dangling_symlink(where: Path) -> None:
    (where / "link").symlink_to("target")
    with opened(where / "link") as fd:
        os.write(fd, b"data")
    assert (where / "target").read_bytes() == b"data"


def test_truncation_at_open_empties_the_file(where: Path) -> None:
    path = file(where / "file", b"data")
    with opened(path, os.O_WRONLY | os.O_TRUNC):
        assert path.stat().st_size == 0
    assert path.read_bytes() == b""


def test_truncation_at_open_does_not_bring_old_bytes_back(where: Path) -> None:
    path = file(where / "file", b"x" * 10_000)
    with opened(path, os.O_RDWR | os.O_TRUNC) as fd:
        os.pwrite(fd, b"end", 9_000)
    assert path.read_bytes() == bytes(9_000) + b"end"


def test_the_mode_of_a_new_file_obeys_the_umask(where: Path) -> None:
    before = os.umask(0o027)
    try:
        with opened(where / "file", os.O_CREAT | os.O_WRONLY, 0o666) as fd:
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o640
        (where / "directory").mkdir(0o777)
        assert stat.S_IMODE((where / "directory").stat().st_mode) == 0o750
    finally:
        os.umask(before)


def test_opening_for_writing_is_possible_in_a_file_without_write_permission_at_creation(
    where: Path,
) -> None:
    with opened(where / "file", os.O_CREAT | os.O_RDWR, 0o444) as fd:
        assert os.write(fd, b"data") == 4


@pytest.mark.parametrize(
    ("name", "flags", "number"),
    [
        ("missing", os.O_RDONLY, errno.ENOENT),
        ("missing/file", os.O_WRONLY | os.O_CREAT, errno.ENOENT),
        ("file/below", os.O_WRONLY | os.O_CREAT, errno.ENOTDIR),
        ("file", os.O_RDONLY | os.O_DIRECTORY, errno.ENOTDIR),
        ("file/", os.O_RDONLY, errno.ENOTDIR),
        ("directory", os.O_WRONLY, errno.EISDIR),
        ("directory", os.O_WRONLY | os.O_CREAT, errno.EISDIR),
        ("new/", os.O_WRONLY | os.O_CREAT, errno.EISDIR),
        ("link", os.O_RDONLY | os.O_NOFOLLOW, errno.ELOOP),
        ("loop", os.O_RDONLY, errno.ELOOP),
        ("", os.O_RDONLY | os.O_CREAT, errno.EISDIR),
    ],
)
def test_what_cannot_be_opened(where: Path, name: str, flags: int, number: int) -> None:
    file(where / "file")
    (where / "directory").mkdir()
    (where / "link").symlink_to("file")
    (where / "loop").symlink_to("loop")
    with fails_with(number):
        os.open(f"{where}/{name}", flags)


def test_a_handle_does_only_what_it_was_opened_for(where: Path) -> None:
    path = file(where / "file", b"data")
    with opened(path, os.O_RDONLY) as fd:
        with fails_with(errno.EBADF):
            os.write(fd, b"x")
        with fails_with(errno.EINVAL):
            os.ftruncate(fd, 0)
    with opened(path, os.O_WRONLY) as fd, fails_with(errno.EBADF):
        os.read(fd, 1)


def test_appending_writes_at_the_end_wherever_the_handle_is(where: Path) -> None:
    path = file(where / "file", b"one ")
    with opened(path, os.O_RDWR | os.O_APPEND) as fd, opened(path) as other:
        os.write(fd, b"two ")
        os.pwrite(other, b"three ", 8)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"four")
    assert path.read_bytes() == b"one two three four"


# Reading and writing


def test_a_large_write_and_read_are_whole(where: Path) -> None:
    data = os.urandom(5_000_001)
    with opened(where / "file") as fd:
        assert os.write(fd, data) == len(data)
        assert os.pread(fd, len(data) + 10, 0) == data
        assert os.pread(fd, 100, len(data)) == b""
        assert os.pread(fd, 100, len(data) + 10**9) == b""


def test_vectored_reads_and_writes(where: Path) -> None:
    with opened(where / "file") as fd:
        assert os.pwritev(fd, [b"abc", b"", b"defg"], 2) == 7
        first, second = bytearray(4), bytearray(10)
        assert os.preadv(fd, [first, second], 1) == 8
        assert (bytes(first), bytes(second[:4])) == (b"\0abc", b"defg")


def test_a_hole_reads_as_zeros(where: Path) -> None:
    with opened(where / "file") as fd:
        os.pwrite(fd, b"begin", 0)
        os.pwrite(fd, b"end", 10_000_000)
        assert os.fstat(fd).st_size == 10_000_003
        assert os.pread(fd, 4096, 5_000_000) == bytes(4096)
        assert os.pread(fd, 10, 9_999_998) == b"\0\0end"
        assert os.pread(fd, 10, 0) == b"begin" + bytes(5)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 65_535, 65_536, 65_537, 300_000])
def test_shrinking_and_growing_fills_with_zeros(where: Path, size: int) -> None:
    path = file(where / "file", b"x" * 300_000)
    with opened(path) as fd:
        os.ftruncate(fd, size)
        assert os.fstat(fd).st_size == size
        os.ftruncate(fd, 400_000)
        assert os.pread(fd, 400_000, 0) == b"x" * size + bytes(400_000 - size)
    assert path.read_bytes() == b"x" * size + bytes(400_000 - size)


def test_growing_by_many_small_writes(where: Path) -> None:
    pieces = [os.urandom(n) for n in range(600)]
    with open(where / "file", "wb", buffering=0) as out:
        for piece in pieces:
            out.write(piece)
    assert (where / "file").read_bytes() == b"".join(pieces)


def test_a_write_is_seen_by_every_other_handle_at_once(where: Path) -> None:
    path = where / "file"
    with opened(path) as one, opened(path) as two:
        os.write(one, b"first")
        assert os.fstat(two).st_size == path.stat().st_size == 5
        assert os.read(two, 10) == b"first"
        os.pwrite(two, b"F", 0)
        assert os.pread(one, 10, 0) == b"First"
        os.ftruncate(two, 2)
        assert os.pread(one, 10, 0) == b"Fi"
        assert path.read_bytes() == b"Fi"


PARTS = """
import os, sys
path, part = sys.argv[1], int(sys.argv[2])
fd = os.open(path, os.O_WRONLY)
for block in range(part, 400, 2):
    os.pwrite(fd, bytes([65 + block % 26]) * 1000, block * 1000)
"""


def test_two_processes_write_different_parts_of_a_file(where: Path) -> None:
    path = file(where / "file", bytes(400_000))
    with another_python(PARTS, path, "0") as one, another_python(PARTS, path, "1") as two:
        assert one.wait(60) == two.wait(60) == 0
    assert path.read_bytes() == b"".join(bytes([65 + n % 26]) * 1000 for n in range(400))


def test_two_processes_grow_one_file(where: Path) -> None:
    path = file(where / "file")
    with another_python(PARTS, path, "0") as one, another_python(PARTS, path, "1") as two:
        assert one.wait(60) == two.wait(60) == 0
    assert path.read_bytes() == b"".join(bytes([65 + n % 26]) * 1000 for n in range(400))


def test_a_huge_offset_is_refused_or_makes_a_hole(where: Path) -> None:
    path = file(where / "file", b"data")
    with opened(path) as fd:
        for offset in (1 << 40, 1 << 50, (1 << 62) + 1):
            try:
                os.pwrite(fd, b"x", offset)
            except OSError as error:
                assert error.errno in (errno.EFBIG, errno.ENOSPC), error  # noqa: PT017
            else:
                assert os.fstat(fd).st_size == offset + 1
                assert os.pread(fd, 2, offset) == b"x"
        assert os.pread(fd, 4, 0) == b"data"
        with fails_with(errno.EFBIG, errno.EINVAL):
            os.pwrite(fd, b"xx", (1 << 63) - 1)
        with fails_with(errno.EINVAL):
            os.ftruncate(fd, -1)
        os.ftruncate(fd, 4)
    assert path.read_bytes() == b"data"


def test_direct_io_and_the_page_cache_show_the_same_bytes(where: Path) -> None:
    path = file(where / "file", b"a" * 12_288)
    with (
        mmap.mmap(-1, 8192) as buffer,
        opened(path, os.O_RDWR | os.O_DIRECT) as direct,
        opened(path) as cached,
    ):
        assert os.pread(cached, 3, 4096) == b"aaa"
        buffer[:] = b"b" * 8192
        assert os.pwritev(direct, [buffer], 4096) == 8192
        assert os.pread(cached, 12_288, 0) == b"a" * 4096 + b"b" * 8192
        os.pwrite(cached, b"c" * 4096, 8192)
        assert os.preadv(direct, [buffer], 4096) == 8192
        assert buffer[:] == b"b" * 4096 + b"c" * 4096
        assert os.preadv(direct, [buffer], 12_288) == 0


def test_copy_file_range_and_sendfile_copy(where: Path) -> None:
    data = os.urandom(300_000)
    file(where / "from", data)
    with opened(where / "from") as source, opened(where / "to") as target:
        copied = 0
        while count := os.copy_file_range(source, target, 200_000):
            copied += count
        assert copied == len(data)
    assert (where / "to").read_bytes() == data
    with opened(where / "from") as source, opened(where / "sent") as target:
        sent = 0
        while count := os.sendfile(target, source, sent, 200_000):
            sent += count
    assert (where / "sent").read_bytes() == data


def test_posix_fallocate_makes_room(where: Path) -> None:
    path = file(where / "file", b"data")
    with opened(path) as fd:
        os.posix_fallocate(fd, 0, 100_000)
    assert path.read_bytes() == b"data" + bytes(99_996)


def test_every_kind_of_sync_is_accepted(where: Path) -> None:
    path = file(where / "file", b"data")
    with opened(path) as fd:
        os.fsync(fd)
        os.fdatasync(fd)
    with opened(where, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)
    run("sync", "-f", where)
    with opened(path, os.O_RDWR | os.O_SYNC) as fd:
        os.write(fd, b"DATA")
    assert path.read_bytes() == b"DATA"


# Memory mappings


def test_a_shared_mapping_is_the_file(where: Path) -> None:
    path = file(where / "file", b"a" * 10_000)
    with opened(path) as fd, mmap.mmap(fd, 10_000) as mapping:
        mapping[5000:5003] = b"bbb"
        assert os.pread(fd, 3, 5000) == b"bbb"
        os.pwrite(fd, b"cc", 9_998)
        assert mapping[9_997:] == b"acc"
        mapping.flush()
    assert path.read_bytes() == b"a" * 5000 + b"bbb" + b"a" * 4995 + b"cc"


def test_a_shared_mapping_is_shared_by_processes(where: Path) -> None:
    script = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
with mmap.mmap(fd, 8192) as mapping:
    assert mapping[:3] == b"one"
    mapping[4096:4099] = b"two"
    print("ok")
"""
    path = file(where / "file", bytes(8192))
    with opened(path) as fd, mmap.mmap(fd, 8192) as mapping:
        mapping[:3] = b"one"
        assert python(script, path) == "ok\n"
        assert mapping[4096:4099] == b"two"


def test_a_private_mapping_changes_no_file(where: Path) -> None:
    path = file(where / "file", b"a" * 5000)
    with opened(path) as fd, mmap.mmap(fd, 5000, mmap.MAP_PRIVATE) as mapping:
        mapping[:3] = b"bbb"
        assert mapping[:4] == b"bbba"
    assert path.read_bytes() == b"a" * 5000


def test_a_mapping_outlives_its_handle_and_its_name(where: Path) -> None:
    path = file(where / "file", b"a" * 5000)
    with opened(path) as fd:
        mapping = mmap.mmap(fd, 5000)
    with mapping:
        path.unlink()
        mapping[4000:4003] = b"bbb"
        mapping.flush()
        assert mapping[3999:4004] == b"abbba"


def test_a_truncated_file_maps_zeros_beyond_its_old_end(where: Path) -> None:
    path = file(where / "file", b"a" * 8192)
    with opened(path) as fd, mmap.mmap(fd, 8192) as mapping:
        os.ftruncate(fd, 100)
        os.ftruncate(fd, 8192)
        assert mapping[:] == b"a" * 100 + bytes(8092)


def test_a_program_runs_from_here(where: Path) -> None:
    shutil.copy("/bin/echo", where / "echo")
    assert run(where / "echo", "hello").stdout == "hello\n"
    script = file(where / "script", b"#!/bin/sh\necho from a script\n")
    script.chmod(0o755)
    assert run(script).stdout == "from a script\n"


# Removing what is open


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


# Renaming


def renameat2(old_path: Path, new_path: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(old_path), os.fsencode(new_path)
    if libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


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


def test_rename_can_refuse_to_replace(where: Path) -> None:
    file(where / "a", b"a")
    file(where / "b", b"b")
    with fails_with(errno.EEXIST):
        renameat2(where / "a", where / "b", 1)
    renameat2(where / "a", where / "c", 1)
    assert sorted(os.listdir(where)) == ["b", "c"]


def test_rename_can_exchange_a_file_and_a_directory(where: Path) -> None:
    file(where / "a", b"a")
    (where / "sub").mkdir()
    (where / "sub" / "b").mkdir()
    renameat2(where / "a", where / "sub" / "b", 2)
    assert (where / "a").is_dir()
    assert (where / "sub" / "b").read_bytes() == b"a"
    assert where.stat().st_nlink == 4
    assert (where / "sub").stat().st_nlink == 2
    assert (where / "a" / "..").stat().st_ino == where.stat().st_ino
    with fails_with(errno.ENOENT):
        renameat2(where / "a", where / "missing", 2)


# Links


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


# Attributes


def test_mode_owner_and_times_are_kept_to_the_last_bit(where: Path) -> None:
    path = file(where / "file")
    os.chown(path, 1234, 5678)
    path.chmod(0o7654)
    os.utime(path, ns=(OLD, OLD + 1))
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o7654
    assert (found.st_uid, found.st_gid) == (1234, 5678)
    assert (found.st_atime_ns, found.st_mtime_ns) == (OLD, OLD + 1)
    os.chown(path, -1, 9)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 9)
    os.chown(path, 4_000_000_000, -1)
    assert (path.stat().st_uid, path.stat().st_gid) == (4_000_000_000, 9)


@pytest.mark.parametrize("seconds", [-(2**31), -1, 0, 2**31, 2**33])
def test_times_before_1970_and_after_2038(where: Path, seconds: int) -> None:
    path = file(where / "file")
    times = (seconds * 10**9 + 123_456_789, seconds * 10**9 + 987_654_321)
    os.utime(path, ns=times)
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == times


def test_one_time_can_be_set_alone_or_to_now(where: Path) -> None:
    path = old(file(where / "file"))
    run("touch", "-a", "-d", "2001-01-01T00:00:00.5Z", path)
    assert path.stat().st_mtime_ns == OLD
    assert path.stat().st_atime_ns == 978_307_200_500_000_000
    before = time.time_ns() - 10**9
    run("touch", "-m", path)
    assert path.stat().st_atime_ns == 978_307_200_500_000_000
    assert path.stat().st_mtime_ns >= before


def changed(path: Path, change: Callable[[], object]) -> tuple[bool, bool]:
    """Whether *change* changed the mtime and the ctime of *path*."""
    old(path)
    before = path.lstat()
    tick()
    change()
    after = path.lstat()
    return after.st_mtime_ns != OLD, after.st_ctime_ns > before.st_ctime_ns


def test_which_changes_of_a_file_change_which_time(where: Path) -> None:
    def there_and_back() -> None:
        os.rename(path, where / "other")
        os.rename(where / "other", path)

    path = file(where / "file", b"data")
    with opened(path) as fd:
        assert changed(path, lambda: os.pwrite(fd, b"x", 0)) == (True, True)
        assert changed(path, lambda: os.ftruncate(fd, 100)) == (True, True)
        assert changed(path, lambda: os.ftruncate(fd, 100)) == (True, True)
        assert changed(path, lambda: os.truncate(path, 50)) == (True, True)
        assert changed(path, lambda: os.pread(fd, 100, 0)) == (False, False)
        assert changed(path, lambda: os.fsync(fd)) == (False, False)
    assert changed(path, lambda: path.chmod(0o600)) == (False, True)
    assert changed(path, lambda: os.chown(path, 1, 1)) == (False, True)
    assert changed(path, lambda: os.link(path, where / "twin")) == (False, True)
    assert changed(path, lambda: (where / "twin").unlink()) == (False, True)
    assert changed(path, there_and_back) == (False, True)
    assert changed(path, lambda: os.setxattr(path, "user.x", b"x")) == (False, True)
    assert changed(path, path.stat) == (False, False)
    assert changed(path, lambda: path.write_bytes(b"")) == (True, True)


def test_which_changes_of_a_directory_change_its_time(where: Path) -> None:
    path = where / "directory"
    path.mkdir()
    inside = path / "file"
    assert changed(path, lambda: file(inside)) == (True, True)
    assert changed(path, lambda: inside.write_bytes(b"data")) == (False, False)
    assert changed(path, lambda: os.rename(inside, path / "other")) == (True, True)
    assert changed(path, lambda: os.link(path / "other", inside)) == (True, True)
    assert changed(path, lambda: inside.unlink()) == (True, True)
    assert changed(path, lambda: (path / "below").mkdir()) == (True, True)
    assert changed(path, lambda: (path / "below").rmdir()) == (True, True)
    assert changed(path, lambda: (path / "link").symlink_to("x")) == (True, True)
    assert changed(path, lambda: os.rename(path / "other", where / "other")) == (True, True)
    assert changed(path, lambda: os.listdir(path)) == (False, False)
    assert changed(path, lambda: path.chmod(0o700)) == (False, True)


def test_times_of_a_new_file_are_now(where: Path) -> None:
    before = time.time_ns() - 10**9
    found = file(where / "file").stat()
    assert before <= found.st_mtime_ns <= time.time_ns() + 10**9
    assert before <= found.st_ctime_ns <= time.time_ns() + 10**9


def test_writing_takes_the_set_user_id_bit_away_from_others(where: Path) -> None:
    path = file(where / "file", b"data")
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o6777)
    python(AS_NOBODY + "open(sys.argv[1], 'r+b', buffering=0).write(b'x')", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777
    path.chmod(0o4755)
    os.chown(path, 1, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_statfs_tells_sizes_and_the_longest_name(where: Path) -> None:
    found = os.statvfs(where)
    assert found.f_namemax == 255
    assert found.f_bsize > 0
    assert found.f_blocks >= found.f_bfree >= found.f_bavail > 0
    assert found.f_files >= found.f_ffree > 0


# Directories


def test_directories_count_their_subdirectories(where: Path) -> None:
    assert where.stat().st_nlink == 2
    (where / "a").mkdir()
    (where / "b").mkdir()
    file(where / "c")
    assert where.stat().st_nlink == 4
    (where / "a").rmdir()
    assert where.stat().st_nlink == 3


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


def test_a_listing_has_the_dots_with_their_inodes(where: Path) -> None:
    directory = where / "directory"
    directory.mkdir()
    file(directory / "file")
    lines = run("ls", "-1aif", directory).stdout.splitlines()
    inodes = {name: int(ino) for ino, name in (line.split() for line in lines)}
    assert inodes == {
        ".": directory.stat().st_ino,
        "..": where.stat().st_ino,
        "file": (directory / "file").stat().st_ino,
    }


def test_a_listing_tells_types_and_attributes(where: Path) -> None:
    file(where / "file", b"data")
    (where / "directory").mkdir()
    (where / "link").symlink_to("file")
    os.mkfifo(where / "fifo")
    with os.scandir(where) as entries:
        kinds = {
            entry.name: (entry.is_file(follow_symlinks=False), entry.is_dir(), entry.is_symlink())
            for entry in entries
        }
    assert kinds == {
        "file": (True, False, False),
        "directory": (False, True, False),
        "link": (False, False, True),
        "fifo": (False, False, False),
    }


def test_a_listing_while_the_directory_changes_shows_the_rest_exactly_once(where: Path) -> None:
    stable = {f"stable{n:04}" for n in range(2000)}
    fleeting = [f"fleeting{n:04}" for n in range(500)]
    for name in (*stable, *fleeting):
        file(where / name)
    seen: list[str] = []
    with os.scandir(where) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number % 4 == 0 and fleeting:
                (where / fleeting.pop()).unlink()
                file(where / f"added{number:04}")
    assert sorted(name for name in seen if name.startswith("stable")) == sorted(stable)
    assert len(set(seen)) == len(seen)


def test_removing_entries_while_listing_them_removes_all(where: Path) -> None:
    for number in range(2000):
        file(where / f"file{number}")
    with os.scandir(where) as entries:
        for entry in entries:
            os.unlink(entry)
    assert os.listdir(where) == []


def test_an_open_directory_can_be_listed_again(where: Path) -> None:
    file(where / "one")
    with opened(where, os.O_RDONLY | os.O_DIRECTORY) as fd:
        assert os.listdir(fd) == ["one"]
        file(where / "two")
        (where / "one").unlink()
        assert os.listdir(fd) == ["two"]


def test_the_working_directory_may_be_here(where: Path) -> None:
    (where / "directory").mkdir()
    assert run("pwd", cwd=where / "directory").stdout == f"{where}/directory\n"
    run("touch", "file", cwd=where / "directory")
    assert os.listdir(where / "directory") == ["file"]


# Names

NAMES = [
    b"a b", b"new\nline", b"tab\t", b"-dash", b"back\\slash", b"quote'\"", b"$(echo)", b"*", b"...",
    b"trailing.", b" ", b"\xff\xfe\x80", "größe ✓ 文件".encode(), b"\x01", b"x" * 255,
    "é".encode() * 127, b"0123456789abcdef0123456789abcdef", b"lost+found", b".hidden", b"%s%n",
]  # fmt: skip


def test_names_are_bytes(where: Path) -> None:
    root = os.fsencode(where)
    for number, name in enumerate(NAMES):
        with open(root + b"/" + name, "xb") as new:
            new.write(b"%d" % number)
    assert sorted(os.listdir(root)) == sorted(NAMES)
    for number, name in enumerate(NAMES):
        with open(root + b"/" + name, "rb") as found:
            assert found.read() == b"%d" % number
        os.rename(root + b"/" + name, root + b"/" + name[:200] + b"~")
        os.unlink(root + b"/" + name[:200] + b"~")
    assert os.listdir(root) == []


def test_names_differ_by_case_and_normalisation(where: Path) -> None:
    names = {"file", "File", "FILE", "\u00e9", "e\u0301"}
    for name in names:
        file(where / name, name.encode())
    assert set(os.listdir(where)) == names
    assert all((where / name).read_bytes() == name.encode() for name in names)


def test_a_name_has_at_most_255_bytes(where: Path) -> None:
    longest, too_long = where / ("x" * 255), where / ("y" * 256)
    file(longest)
    calls: list[Callable[[], object]] = [
        lambda: file(too_long),
        lambda: too_long.mkdir(),
        lambda: too_long.symlink_to("x"),
        lambda: os.mkfifo(too_long),
        lambda: os.link(longest, too_long),
        lambda: os.rename(longest, too_long),
        lambda: too_long.stat(),
        lambda: too_long.unlink(),
        lambda: too_long.rmdir(),
    ]
    for call in calls:
        with fails_with(errno.ENAMETOOLONG):
            call()
    assert os.listdir(where) == [longest.name]


def test_paths_may_be_deep(where: Path) -> None:
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(opened(where, os.O_RDONLY))
        for depth in range(50):
            os.mkdir(f"directory{depth}", dir_fd=directory)
            fd = os.open(f"directory{depth}", os.O_RDONLY, dir_fd=directory)
            directory = fd
            stack.callback(os.close, fd)
        fd = os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
        os.close(fd)
    assert len(list(where.rglob("*"))) == 51


# Special files


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


def test_device_nodes_keep_their_numbers(where: Path) -> None:
    os.mknod(where / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    found = (where / "device").stat()
    assert stat.S_ISCHR(found.st_mode)
    assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == (1, 3)


# Extended attributes


def test_extended_attributes_are_set_listed_and_removed(where: Path) -> None:
    (where / "directory").mkdir()
    for path in (file(where / "file"), where / "directory"):
        os.setxattr(path, "user.one", b"1")
        os.setxattr(path, "user.binary", bytes(range(256)))
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "trusted.two", b"2")
        assert {"user.one", "user.binary", "user.empty", "trusted.two"} <= set(os.listxattr(path))
        assert os.getxattr(path, "user.binary") == bytes(range(256))
        assert os.getxattr(path, "user.empty") == b""
        os.setxattr(path, "user.one", b"other")
        assert os.getxattr(path, "user.one") == b"other"
        os.removexattr(path, "user.one")
        assert "user.one" not in os.listxattr(path)
        with fails_with(errno.ENODATA):
            os.getxattr(path, "user.one")
        with fails_with(errno.ENODATA):
            os.removexattr(path, "user.one")


def test_extended_attributes_can_be_created_or_replaced_only(where: Path) -> None:
    path = file(where / "file")
    with fails_with(errno.ENODATA):
        os.setxattr(path, "user.x", b"1", os.XATTR_REPLACE)
    os.setxattr(path, "user.x", b"1", os.XATTR_CREATE)
    with fails_with(errno.EEXIST):
        os.setxattr(path, "user.x", b"2", os.XATTR_CREATE)
    os.setxattr(path, "user.x", b"3", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.x") == b"3"


def test_extended_attributes_go_with_their_file_and_only_with_it(where: Path) -> None:
    path = file(where / "file")
    os.setxattr(path, "user.x", b"x" * 10_000)
    os.rename(path, where / "moved")
    assert os.getxattr(where / "moved", "user.x") == b"x" * 10_000
    (where / "moved").unlink()
    file(where / "moved")
    with fails_with(errno.ENODATA):
        os.getxattr(where / "moved", "user.x")


def test_extended_attributes_of_users_are_for_files_and_directories(where: Path) -> None:
    (where / "link").symlink_to("nowhere")
    os.mkfifo(where / "fifo")
    for path in (where / "link", where / "fifo"):
        with fails_with(errno.EPERM):
            os.setxattr(path, "user.x", b"x", follow_symlinks=False)
    with fails_with(errno.EOPNOTSUPP):
        os.setxattr(file(where / "file"), "unknown.x", b"x")
    with fails_with(errno.ERANGE, errno.ENAMETOOLONG):
        os.setxattr(where / "file", "user." + "x" * 300, b"x")


# Permissions

AS_NOBODY = f"""
import os, sys
os.setgroups([])
os.setegid({NOBODY})
os.seteuid({NOBODY})
"""
ATTEMPT = (
    AS_NOBODY
    + """
path = sys.argv[1]
calls = {
    "read": lambda: open(path, "rb").close(),
    "write": lambda: os.close(os.open(path, os.O_WRONLY)),
    "truncate": lambda: os.truncate(path, 0),
    "chmod": lambda: os.chmod(path, 0o777),
    "chown": lambda: os.chown(path, os.geteuid(), -1),
    "utime": lambda: os.utime(path, ns=(1, 1)),
    "touch": lambda: os.utime(path),
    "unlink": lambda: os.unlink(path),
    "list": lambda: os.listdir(path),
    "create": lambda: open(path + "/new", "xb").close(),
    "lookup": lambda: os.stat(path + "/there"),
    "setxattr": lambda: os.setxattr(path, "user.x", b"x"),
}
try:
    calls[sys.argv[2]]()
    print("allowed")
except OSError as error:
    print(__import__("errno").errorcode[error.errno])
"""
)


@pytest.mark.parametrize(
    ("mode", "owner", "call", "answer"),
    [
        (0o600, 0, "read", "EACCES"),
        (0o604, 0, "read", "allowed"),
        (0o604, 0, "write", "EACCES"),
        (0o604, 0, "truncate", "EACCES"),
        (0o602, 0, "write", "allowed"),
        (0o602, 0, "truncate", "allowed"),
        (0o077, NOBODY, "read", "EACCES"),  # the owner's bits count for the owner
        (0o600, NOBODY, "write", "allowed"),
        (0o666, 0, "chmod", "EPERM"),
        (0o600, NOBODY, "chmod", "allowed"),
        (0o666, 0, "chown", "EPERM"),
        (0o666, 0, "utime", "EPERM"),
        (0o666, 0, "touch", "allowed"),
        (0o644, 0, "touch", "EACCES"),
        (0o644, 0, "setxattr", "EACCES"),
        (0o646, 0, "setxattr", "allowed"),
        (0o644, 0, "unlink", "EACCES"),  # its directory is root's
    ],
)
def test_another_user_does_with_a_file_what_its_mode_allows(
    where: Path, mode: int, owner: int, call: str, answer: str
) -> None:
    path = file(where / "file", b"data")
    os.chown(path, owner, owner)
    path.chmod(mode)
    assert python(ATTEMPT, path, call).strip() == answer


@pytest.mark.parametrize(
    ("mode", "call", "answer"),
    [
        (0o755, "create", "EACCES"),
        (0o757, "create", "allowed"),
        (0o756, "create", "EACCES"),
        (0o751, "list", "EACCES"),
        (0o754, "list", "allowed"),
        (0o751, "lookup", "allowed"),
        (0o754, "lookup", "EACCES"),
    ],
)
def test_another_user_does_with_a_directory_what_its_mode_allows(
    where: Path, mode: int, call: str, answer: str
) -> None:
    directory = where / "directory"
    directory.mkdir()
    file(directory / "there")
    directory.chmod(mode)
    assert python(ATTEMPT, directory, call).strip() == answer


def test_in_a_sticky_directory_only_the_owner_removes(where: Path) -> None:
    directory = where / "directory"
    directory.mkdir()
    directory.chmod(0o1777)
    file(directory / "roots")
    os.chown(file(directory / "own"), NOBODY, NOBODY)
    assert python(ATTEMPT, directory / "roots", "unlink").strip() == "EPERM"
    assert python(ATTEMPT, directory / "own", "unlink").strip() == "allowed"


def test_a_new_file_belongs_to_its_maker(where: Path) -> None:
    where.chmod(0o777)
    python(
        AS_NOBODY + "os.mkdir(sys.argv[1]); open(sys.argv[1] + '/file', 'x').close()", where / "x"
    )
    assert ((where / "x").stat().st_uid, (where / "x" / "file").stat().st_gid) == (NOBODY, NOBODY)


# Locks

LOCKED = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for lock in (fcntl.flock, fcntl.lockf):
    try:
        lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("free", end=" ")
    except BlockingIOError:
        print("locked", end=" ")
"""


def test_locks_are_seen_by_other_processes(where: Path) -> None:
    path = file(where / "file")
    with opened(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.lockf(fd, fcntl.LOCK_EX)
        assert python(LOCKED, path) == "locked locked "
        fcntl.lockf(fd, fcntl.LOCK_UN)
        assert python(LOCKED, path) == "locked free "
    assert python(LOCKED, path) == "free free "


# Everything at once


def test_eight_processes_work_side_by_side(where: Path) -> None:
    script = """
import os, sys
root, who = sys.argv[1], sys.argv[2]
for number in range(60):
    directory = f"{root}/{who}-{number}"
    os.mkdir(directory)
    with open(directory + "/a", "wb") as file:
        file.write((who * 1000).encode())
    os.rename(directory + "/a", directory + "/b")
    os.link(directory + "/b", f"{root}/{who}-{number}-link")
    assert open(directory + "/b").read() == who * 1000
    os.unlink(directory + "/b")
    os.rmdir(directory)
    os.listdir(root)
"""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(another_python(script, where, str(n))) for n in range(8)]
        assert [process.wait(60) for process in processes] == [0] * 8
    names = sorted(os.listdir(where))
    assert names == sorted(f"{who}-{n}-link" for who in range(8) for n in range(60))
    sample = random.Random(1).sample(names, 20)
    assert all((where / name).read_bytes() == name[0].encode() * 1000 for name in sample)
