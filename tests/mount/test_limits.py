"""What a mount cannot do, as docs/mount.md tells it, is refused as programs expect it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import limit_of
from tests.mount.support import Mount, fails_with, mounting, run, watchdog

ACL = "system.posix_acl_access"
# Version 2; the owner may read and write, the group read, others nothing.
ACL_0640 = bytes.fromhex("02000000 01000600ffffffff 04000400ffffffff 20000000ffffffff")


@pytest.fixture
def direct(request: pytest.FixtureRequest, place: Path) -> Iterator[Mount]:
    """A mount that bypasses the page cache."""
    with mounting("memory:", place, "direct_io") as mount, watchdog(mount, limit_of(request)):
        yield mount


def test_an_access_control_list_is_refused_and_not_stored_and_ignored(mounted: Mount) -> None:
    path = mounted.path / "file"
    path.write_bytes(b"data")
    with fails_with(errno.EOPNOTSUPP):
        os.setxattr(path, ACL, ACL_0640)
    assert ACL not in os.listxattr(path)


@pytest.mark.parametrize("mode", [0o644, 0o755, 0o400, 0o777])
def test_cp_keeps_the_mode_which_it_sets_by_an_access_control_list_where_it_can(
    mounted: Mount, place: Path, mode: int
) -> None:
    original = place / "original"
    original.write_bytes(b"data")
    original.chmod(mode)
    run("cp", "-a", original, mounted.path / "copy")
    assert (mounted.path / "copy").stat().st_mode == original.stat().st_mode


def test_fallocate_is_refused_and_posix_fallocate_falls_back(mounted: Mount) -> None:
    path = mounted.path / "file"
    with open(path, "wb") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        size = ctypes.c_int64(4096)
        assert libc.fallocate(file.fileno(), 0, ctypes.c_int64(0), size) == -1
        assert ctypes.get_errno() == errno.EOPNOTSUPP
        os.posix_fallocate(file.fileno(), 0, 4096)
    assert path.read_bytes() == bytes(4096)


def test_holes_count_as_data(mounted: Mount) -> None:
    with open(mounted.path / "file", "w+b") as file:
        file.truncate(100_000)
        assert os.lseek(file.fileno(), 10, os.SEEK_DATA) == 10
        assert os.lseek(file.fileno(), 10, os.SEEK_HOLE) == 100_000
    run("cp", "--sparse=always", mounted.path / "file", mounted.path / "copy")
    assert (mounted.path / "copy").read_bytes() == bytes(100_000)


def test_unnamed_files_are_refused_and_programs_fall_back(mounted: Mount) -> None:
    with fails_with(errno.EOPNOTSUPP):
        os.open(mounted.path, os.O_TMPFILE | os.O_RDWR)


def test_direct_io_refuses_shared_mappings_and_does_all_else(direct: Mount) -> None:
    path = direct.path / "file"
    data = os.urandom(3_000_001)
    path.write_bytes(data)
    assert path.read_bytes() == data
    with open(path, "r+b", buffering=0) as file:
        with fails_with(errno.ENODEV):
            mmap.mmap(file.fileno(), 4096)
        with mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE) as mapping:
            assert mapping[:] == data[:4096]
        assert os.pwrite(file.fileno(), b"odd", 12_345) == 3
        file.truncate(12_350)
    with open(path, "ab", buffering=0) as file:
        file.write(b"end")
    assert path.read_bytes() == data[:12_345] + b"odd" + data[12_348:12_350] + b"end"
    shutil.copy(path, direct.path / "copy")
    run("cmp", path, direct.path / "copy")
