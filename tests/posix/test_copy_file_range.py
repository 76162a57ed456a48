"""copy_file_range(2)."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from tests.mount.support import fails_with, run
from tests.posix.conftest import MOUNTED
from tests.posix.support import file, mode_of, opened, updated, user

pytestmark = pytest.mark.parametrize("shared", ["ext4", *MOUNTED], indirect=True, scope="package")


def test_ranges_are_copied_to_the_given_offset(where: Path) -> None:
    data, model = os.urandom(300_000), bytearray(os.urandom(200_000))
    source, path = file(where / "from", data), file(where / "to", bytes(model))
    with opened(source, os.O_RDONLY) as original, opened(path) as fd:
        for size, start, offset in (
            (1, 0, 0), (4096, 4096, 8192), (5000, 17, 100_001), (100_000, 200_000, 150_000),
            (70_000, 1000, 300_000),
        ):  # fmt: skip
            assert os.copy_file_range(original, fd, size, start, offset) == size
            model.extend(bytes(max(0, offset + size - len(model))))
            model[offset : offset + size] = data[start : start + size]
            assert os.fstat(fd).st_size == len(model)
            assert os.pread(fd, 1 << 20, 0) == model
        assert os.copy_file_range(original, fd, 1 << 30, 299_990, 0) == 10
        assert os.copy_file_range(original, fd, 100, 300_000, 0) == 0
        assert os.copy_file_range(original, fd, 100, 1 << 40, 0) == 0
        assert os.lseek(original, 0, os.SEEK_CUR) == os.lseek(fd, 0, os.SEEK_CUR) == 0
        assert os.copy_file_range(original, fd, 1000) == 1000
        assert os.lseek(original, 0, os.SEEK_CUR) == os.lseek(fd, 0, os.SEEK_CUR) == 1000
    model[:1000] = data[:1000]
    assert path.read_bytes() == model
    assert source.read_bytes() == data


def test_times_and_set_id_bits(where: Path) -> None:
    source, path = file(where / "from", b"x" * 9000), file(where / "to", b"y" * 9000)
    with opened(source) as original, opened(path) as fd:

        def copy() -> None:
            assert os.copy_file_range(original, fd, 9000, 0, 0) == 9000

        assert updated(copy, path, where) == ["mc", ""]
    for each in (source, path):
        os.chown(each, 65534, 65534)
    for owner, kept in ((0, 0o6777), (65534, 0o777)):
        path.chmod(0o6777)
        with user(owner, owner), opened(source) as original, opened(path) as fd:
            assert os.copy_file_range(original, fd, 100, 0, 0) == 100
        assert mode_of(path) == kept


def test_what_is_refused(where: Path) -> None:
    source, path = file(where / "from", b"x" * 9000), file(where / "to", b"y" * 9000)
    with opened(source) as original, opened(path) as fd:
        with fails_with(errno.EINVAL):
            os.copy_file_range(fd, fd, 100, 0, 99)
        with opened(path, os.O_RDONLY) as other, fails_with(errno.EBADF):
            os.copy_file_range(original, other, 100)
        with opened(source, os.O_WRONLY) as other, fails_with(errno.EBADF):
            os.copy_file_range(other, fd, 100)
        with opened(path, os.O_RDWR | os.O_APPEND) as other, fails_with(errno.EBADF):
            os.copy_file_range(original, other, 100)
        with opened(where, os.O_RDONLY) as other, fails_with(errno.EISDIR):
            os.copy_file_range(other, fd, 100)
    assert path.read_bytes() == b"y" * 9000


def test_a_file_that_is_used_at_random(where: Path) -> None:
    """Written, mapped, truncated, and copied to itself and from another one."""
    chance = random.Random(11)
    other = chance.randbytes(100_000)
    model, path = bytearray(), where / "file"
    with opened(file(where / "from", other)) as source, opened(path) as fd:
        for _ in range(300):
            offset, start = chance.randrange(200_000), chance.randrange(100_000)
            size = 1 + chance.randrange(1 << chance.randrange(17))
            name = chance.choice("write write truncate copy copy itself".split())
            if name == "truncate":
                os.ftruncate(fd, offset)
                del model[offset:]
                model.extend(bytes(offset - len(model)))
                continue
            if name == "write":
                data = chance.randbytes(size)
                assert os.pwrite(fd, data, offset) == size
            elif name == "copy":
                data = other[start : start + size]
                assert os.copy_file_range(source, fd, size, start, offset) == len(data)
            else:
                start, offset = chance.randrange(len(model) + 1), len(model) + chance.randrange(9)
                data = bytes(model[start : start + min(size, offset - start)])
                assert os.copy_file_range(fd, fd, len(data), start, offset) == len(data)
                if len(model) > 400_000:
                    os.ftruncate(fd, 0)
                    model.clear()
                    continue
            if data:
                model.extend(bytes(max(0, offset + len(data) - len(model))))
                model[offset : offset + len(data)] = data
            begin = chance.randrange(len(model) + 1)
            assert os.pread(fd, 50_000, begin) == model[begin : begin + 50_000]
    assert path.read_bytes() == model


def test_programs_copy(where: Path) -> None:
    data = os.urandom(3 << 20)
    file(where / "file", data)
    with opened(where / "sparse") as fd:
        os.ftruncate(fd, 20 << 20)
        os.pwrite(fd, data, 5 << 20)
    for name in ("file", "sparse"):
        for options in (["--reflink=auto"], ["--sparse=auto"], ["--sparse=never"]):
            run("cp", *options, where / name, where / "copy")
            run("cmp", where / name, where / "copy")
