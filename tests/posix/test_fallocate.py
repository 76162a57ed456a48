"""fallocate(2), and lseek(2) for data and holes.

The oracle is an ext4: a tmpfs has no ``FALLOC_FL_ZERO_RANGE``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
from pathlib import Path

import pytest

from tests.mount.support import another_python, fails_with, line_of, run
from tests.posix.conftest import MOUNTED
from tests.posix.support import check, file, libc, mode_of, opened, updated, user
from warabifs.frontends.base import Ability

pytestmark = [
    pytest.mark.parametrize("shared", ["ext4", *MOUNTED], indirect=True, scope="package"),
    pytest.mark.needs(Ability.FALLOCATE),
]

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 0x10
MODES = (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE)


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    check(libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(size)))


def apply(model: bytearray, mode: int, offset: int, size: int) -> None:
    """Do to *model* what fallocate(2) does to a file."""
    end = min(len(model), offset + size)
    if mode & (PUNCH_HOLE | ZERO_RANGE) and offset < end:
        model[offset:end] = bytes(end - offset)
    if not mode & KEEP_SIZE:
        model.extend(bytes(max(0, offset + size - len(model))))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_changes_bytes_and_size_as_it_says(where: Path, mode: int) -> None:
    model = bytearray(b"x" * 200_000)
    path = file(where / "file", bytes(model))
    with opened(path) as fd:
        for offset, size in (
            (0, 1), (4095, 2), (8192, 4096), (10_000, 50_001), (131_072, 65_536),
            (190_000, 20_000), (300_000, 1), (1_000_000, 5000),
        ):  # fmt: skip
            fallocate(fd, mode, offset, size)
            apply(model, mode, offset, size)
            assert os.fstat(fd).st_size == len(model)
            assert os.pread(fd, len(model) + 1, 0) == model
    assert path.read_bytes() == model


@pytest.mark.parametrize("mode", MODES)
def test_times_and_set_id_bits(where: Path, mode: int) -> None:
    path = file(where / "file", b"x" * 9000)
    with opened(path) as fd:
        assert updated(lambda: fallocate(fd, mode, 100, 5000), path, where) == ["mc", ""]
    os.chown(path, 65534, 65534)
    for owner, kept in ((0, 0o6777), (65534, 0o777)):
        path.chmod(0o6777)
        with user(owner, owner), opened(path) as fd:
            fallocate(fd, mode, 0, 100)
        assert mode_of(path) == kept


@pytest.mark.parametrize("mode", MODES)
def test_what_is_refused(where: Path, mode: int) -> None:
    path = file(where / "file", b"data")
    with opened(path) as fd:
        for offset, size in ((-1, 1), (0, 0), (0, -1)):
            with fails_with(errno.EINVAL):
                fallocate(fd, mode, offset, size)
        with fails_with(errno.EFBIG):
            fallocate(fd, mode, (1 << 63) - 10, 100)
        for unknown in (PUNCH_HOLE, 0x04, mode | 0x80):
            with fails_with(errno.EOPNOTSUPP):
                fallocate(fd, unknown, 0, 100)
    with opened(path, os.O_RDONLY) as fd, fails_with(errno.EBADF):
        fallocate(fd, mode, 0, 4096)
    with opened(where, os.O_RDONLY) as fd, fails_with(errno.EBADF, errno.EISDIR):
        fallocate(fd, mode, 0, 4096)
    with opened(path, os.O_RDWR | os.O_APPEND) as fd:
        fallocate(fd, mode, 0, 2)
        os.write(fd, b"more")
    model = bytearray(b"data")
    apply(model, mode, 0, 2)
    assert path.read_bytes() == model + b"more"


def test_the_limit_on_the_size_of_files(where: Path) -> None:
    script = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
try:
    os.posix_fallocate(fd, 0, 10_001)
except OSError as error:
    print(error.errno, os.fstat(fd).st_size)
"""
    with another_python(script, where / "file") as process:
        assert line_of(process) == f"{errno.EFBIG} 0"


def extents(fd: int) -> list[tuple[int, int]]:
    """From where to where a file has data."""
    found, end = [], 0
    with contextlib.suppress(OSError):
        while True:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, end))
    return found


@pytest.mark.needs(Ability.SEEK_DATA)
def test_data_and_holes_are_found(where: Path) -> None:
    path = where / "file"
    first, second, size, end = 1 << 20, 20 << 20, 102_400, 32 << 20
    with opened(path) as fd:
        os.ftruncate(fd, end)
        assert extents(fd) == []
        for offset in (first, second):
            os.pwrite(fd, b"x" * size, offset)
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, first + 40_960, 8192)
        wanted = [(first, first + 40_960), (first + 49_152, first + size), (second, second + size)]
        assert extents(fd) == wanted
        assert path.read_bytes().count(b"x") == 2 * size - 8192
        assert extents(fd) == wanted  # reading fills no hole
        assert os.lseek(fd, second + 200_000, os.SEEK_HOLE) == second + 200_000
        for offset, whence in (
            (end, os.SEEK_DATA), (end, os.SEEK_HOLE), (30 << 20, os.SEEK_DATA),
        ):  # fmt: skip
            with fails_with(errno.ENXIO):
                os.lseek(fd, offset, whence)
        os.ftruncate(fd, second + size)
        assert os.lseek(fd, second, os.SEEK_HOLE) == second + size


def blocks(path: Path) -> int:
    """Bytes that a file uses, in MiB, about."""
    return round(path.stat().st_blocks * 512 / (1 << 20))


def test_the_space_that_files_use(where: Path) -> None:
    path, copy = where / "file", where / "copy"
    mib = 1 << 20
    with opened(path) as fd:
        os.ftruncate(fd, 64 * mib)
        assert blocks(path) == 0
        os.pwrite(fd, b"x" * 4 * mib, 20 * mib)
        assert blocks(path) == 4
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 21 * mib, 2 * mib)
        assert blocks(path) == 2
        fallocate(fd, ZERO_RANGE, 20 * mib, 6 * mib)
        assert blocks(path) == 6
        fallocate(fd, 0, 0, 8 * mib)
        assert blocks(path) == 14
        run("cp", "--sparse=always", path, copy)
        assert blocks(copy) == 0
        os.pwrite(fd, b"x" * mib, 40 * mib)
        fallocate(fd, KEEP_SIZE, 64 * mib, 4 * mib)
        assert path.stat().st_size == 64 * mib
        assert blocks(path) == 19
    run("cp", "--sparse=auto", path, copy)
    run("cmp", path, copy)
    assert blocks(copy) <= 15
    assert run("du", "--block-size=1M", path).stdout.split()[0] in ("19", "20")
    os.truncate(path, 24 * mib)
    assert blocks(path) == 12
    with opened(where / "dense") as fd:
        os.write(fd, b"x" * 3 * mib)
        assert blocks(where / "dense") == 3
        os.write(fd, b"x" * mib)
    assert blocks(where / "dense") == 4


def test_a_file_that_is_used_at_random(where: Path) -> None:
    chance, model, path = random.Random(7), bytearray(), where / "file"
    with opened(path) as fd:
        for _ in range(400):
            offset, size = (
                chance.randrange(300_000),
                1 + chance.randrange(1 << chance.randrange(18)),
            )
            name = chance.choice("write write write truncate fallocate fallocate fallocate".split())
            if name == "write":
                data = chance.randbytes(size)
                assert os.pwrite(fd, data, offset) == size
                model.extend(bytes(max(0, offset + size - len(model))))
                model[offset : offset + size] = data
            elif name == "truncate":
                os.ftruncate(fd, offset)
                del model[offset:]
                model.extend(bytes(offset - len(model)))
            else:
                mode = chance.choice(MODES)
                fallocate(fd, mode, offset, size)
                apply(model, mode, offset, size)
            start = chance.randrange(len(model) + 1)
            assert os.pread(fd, 50_000, start) == model[start : start + 50_000]
            if start < len(model):
                hole = os.lseek(fd, start, os.SEEK_HOLE)
                assert start <= hole <= len(model)
                try:
                    data_at = os.lseek(fd, start, os.SEEK_DATA)
                except OSError:
                    data_at = len(model)
                assert model[start:data_at] == bytes(data_at - start)
    assert path.read_bytes() == model


def test_programs_make_and_keep_holes(where: Path) -> None:
    path = file(where / "file", b"x" * 100_000)
    run("fallocate", "--punch-hole", "--offset", "8192", "--length", "65536", path)
    wanted = b"x" * 8192 + bytes(65_536) + b"x" * 26_272
    assert path.read_bytes() == wanted
    run("tar", "-C", where, "-S", "-cf", where / "it.tar", "file")
    path.unlink()
    run("tar", "-C", where, "-S", "-xf", where / "it.tar")
    assert path.read_bytes() == wanted
    run("fallocate", "--length", "200000", path)
    run("fallocate", "--dig-holes", path)
    assert path.read_bytes() == wanted + bytes(100_000)
    with opened(path) as fd:
        assert os.lseek(fd, 8192, os.SEEK_HOLE) == 8192
        assert os.lseek(fd, 8192, os.SEEK_DATA) == 73_728
