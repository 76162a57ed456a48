"""read(2), write(2) and their kin."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path

from tests.mount.support import another_python, fails_with, line_of, run
from tests.posix.support import (
    file,
    opened,
    updated,
)


def test_appending_writes_at_the_end_wherever_the_handle_is(where: Path) -> None:
    path = file(where / "file", b"one ")
    with opened(path, os.O_RDWR | os.O_APPEND) as fd, opened(path) as other:
        os.write(fd, b"two ")
        os.pwrite(other, b"three ", 8)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"four")
    assert path.read_bytes() == b"one two three four"


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


def test_records_of_several_appenders_are_whole(where: Path) -> None:
    script = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
for number in range(300):
    os.write(fd, f"{sys.argv[2]} {number:04} {'x' * (number % 97)}\\n".encode())
print("done")
"""
    path = file(where / "file")
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(another_python(script, path, str(n))) for n in range(3)]
        assert [line_of(process) for process in processes] == ["done"] * 3
    wanted = [f"{who} {n:04} {'x' * (n % 97)}" for who in range(3) for n in range(300)]
    assert sorted(path.read_text().splitlines()) == sorted(wanted)


def test_reading_at_and_beyond_the_end(where: Path) -> None:
    path = file(where / "file", b"0123456789")
    with opened(path, os.O_RDONLY) as fd:
        assert os.pread(fd, 100, 5) == b"56789"
        assert os.pread(fd, 100, 10) == os.pread(fd, 1, 1 << 60) == b""
        assert os.lseek(fd, -3, os.SEEK_END) == 7
        assert os.read(fd, 2) + os.read(fd, 2) + os.read(fd, 2) == b"789"
        with fails_with(errno.EINVAL):
            os.lseek(fd, -1, os.SEEK_SET)
        with fails_with(errno.EINVAL):
            os.pread(fd, 1, -1)


def test_unaligned_direct_io_is_refused_or_right(where: Path) -> None:
    path = file(where / "file", bytes(range(256)) * 64)
    with opened(path, os.O_RDWR | os.O_DIRECT) as fd:
        for offset, size in [(1, 100), (4000, 200), (0, 16_384), (16_000, 1000)]:
            try:
                found = os.pread(fd, size, offset)
            except OSError as error:
                assert error.errno == errno.EINVAL  # noqa: PT017
            else:
                assert found == (bytes(range(256)) * 64)[offset : offset + size]


def test_a_write_changes_the_times_and_an_empty_one_does_not_matter(where: Path) -> None:
    path = file(where / "file", b"data")
    with opened(path) as fd:
        assert updated(lambda: os.pwrite(fd, b"x", 0), path, where) == ["mc", ""]
        assert updated(lambda: os.pwrite(fd, b"x", 10_000), path) == ["mc"]
        os.pwrite(fd, b"", 50_000)
        assert os.fstat(fd).st_size == 10_001
