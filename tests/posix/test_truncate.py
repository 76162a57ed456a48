"""truncate(2) and ftruncate(2)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.mount.support import fails_with
from tests.posix.support import (
    KINDS,
    file,
    make,
    opened,
    updated,
    user,
)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 65_535, 65_536, 65_537, 300_000])
def test_shrinking_and_growing_fills_with_zeros(where: Path, size: int) -> None:
    path = file(where / "file", b"x" * 300_000)
    with opened(path) as fd:
        os.ftruncate(fd, size)
        assert os.fstat(fd).st_size == size
        os.ftruncate(fd, 400_000)
        assert os.pread(fd, 400_000, 0) == b"x" * size + bytes(400_000 - size)
    assert path.read_bytes() == b"x" * size + bytes(400_000 - size)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 123_456])
def test_both_calls_set_the_size_and_the_times(where: Path, size: int) -> None:
    path = file(where / "file", b"x" * 5000)
    with opened(path) as fd:
        assert updated(lambda: os.ftruncate(fd, size), path, where) == ["mc", ""]
        assert os.fstat(fd).st_size == size
        assert updated(lambda: os.ftruncate(fd, size), fd) == ["mc"]
    assert path.read_bytes() == (b"x" * 5000)[:size] + bytes(max(0, size - 5000))
    assert updated(lambda: os.truncate(path, size + 1), path, where) == ["mc", ""]
    assert path.stat().st_size == size + 1


def test_permissions_to_truncate(where: Path) -> None:
    path = make("file", where / "file", 0o644)
    with user(), fails_with(errno.EACCES):
        os.truncate(path, 0)
    path.chmod(0o002)
    with user():
        os.truncate(path, 100)
    assert path.stat().st_size == 100
    with opened(path, os.O_RDONLY) as fd, fails_with(errno.EINVAL):
        os.ftruncate(fd, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_only_files_are_truncated(where: Path, kind: str) -> None:
    path = make(kind, where / "it")
    if kind == "file":
        os.truncate(path, 1)
        with fails_with(errno.EINVAL):
            os.truncate(path, -1)
        return
    numbers = {"directory": errno.EISDIR, "link": errno.ENOENT}
    with fails_with(numbers.get(kind, errno.EINVAL)):
        os.truncate(path, 0)


def test_a_truncated_file_forgets(where: Path) -> None:
    path = file(where / "file", b"secret" * 10_000)
    for size in (59_999, 30_000, 4097, 4096, 1):
        os.truncate(path, size)
        os.truncate(path, 60_000)
        data = path.read_bytes()
        assert data[:size] == (b"secret" * 10_000)[:size]
        assert not data[size:].strip(b"\0")
    with opened(path) as fd:
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"end", 8190)
        assert os.pread(fd, 10_000, 0) == bytes(8190) + b"end"
