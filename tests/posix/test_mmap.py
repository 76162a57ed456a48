"""mmap(2), shared and private."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.mount.support import fails_with, python, run
from tests.posix.support import (
    file,
    opened,
    updated,
)


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


def test_a_mapping_shows_no_more_than_the_file(where: Path) -> None:
    path = file(where / "file", b"x" * 8192)
    script = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
mapping = mmap.mmap(fd, 8192)
os.ftruncate(fd, 5000)
assert mapping[4096:5000] == b"x" * 904
assert mapping[5000:] == bytes(8192 - 5000)
os.ftruncate(fd, 100)
mapping[4096]
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGBUS, done.stderr


def test_bytes_beyond_the_end_are_not_kept(where: Path) -> None:
    path = file(where / "file", b"x" * 4096)
    with opened(path) as fd, mmap.mmap(fd, 4096) as mapping:
        os.ftruncate(fd, 100)
        mapping[100:110] = b"y" * 10
        mapping.flush()
        assert path.read_bytes() == b"x" * 100
        assert os.fstat(fd).st_size == 100


def test_a_mapping_needs_a_handle_that_may(where: Path) -> None:
    path = file(where / "file", b"x" * 4096)
    with opened(path, os.O_RDONLY) as fd:
        with fails_with(errno.EACCES):
            mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
            mapping[0] = 1
    with opened(path, os.O_WRONLY) as fd, fails_with(errno.EACCES):
        mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
    with opened(where, os.O_RDONLY) as fd, fails_with(errno.ENODEV):
        mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
    assert path.read_bytes() == b"x" * 4096


def test_a_flushed_mapping_changes_the_times(where: Path, passed: bool) -> None:
    path = file(where / "file", bytes(8192))
    with opened(path) as fd, mmap.mmap(fd, 8192) as mapping:

        def change() -> None:
            mapping[5000] = 1
            mapping.flush()
            if passed:
                time.sleep(1.1)  # the kernel believes the times that it was told for a second

        assert updated(change, path) == ["mc"]


def test_mappings_writes_and_truncations_in_turn(where: Path) -> None:
    path = file(where / "file")
    with opened(path) as fd:
        model = bytearray()
        for step in range(60):
            size = (step * 7919) % 40_000 + 1
            os.ftruncate(fd, size)
            model = model[:size] + bytes(max(0, size - len(model)))
            with mmap.mmap(fd, size) as mapping:
                mapping[size // 2 : size // 2 + 10] = bytes([step]) * len(mapping[size // 2 :][:10])
                model[size // 2 : size // 2 + 10] = bytes([step]) * len(model[size // 2 :][:10])
                os.pwrite(fd, b"pwrite", size // 3)
                model[size // 3 : size // 3 + 6] = b"pwrite"
                assert mapping[: len(model)] == model[:size]
            assert os.pread(fd, 50_000, 0) == model
    assert path.read_bytes() == model


def test_an_anonymous_copy_of_many_pages(where: Path) -> None:
    path = file(where / "file", os.urandom(3_000_000))
    data = path.read_bytes()
    with opened(path, os.O_RDONLY) as fd, mmap.mmap(fd, 0, access=mmap.ACCESS_COPY) as mapping:
        for offset in range(0, len(data), 4096):
            mapping[offset] ^= 255
        assert mapping[1:4096] == data[1:4096]
    assert path.read_bytes() == data


def test_what_is_written_to_a_mapping_is_data_at_once(where: Path) -> None:
    path, copy, size = where / "file", where / "copy", 4 << 20
    model = bytearray(size)
    with opened(path) as fd:
        os.ftruncate(fd, size)
        with mmap.mmap(fd, size) as mapping:
            for offset in (3 << 20, 1 << 20, 5000):
                model[offset : offset + 4] = mapping[offset : offset + 4] = b"data"
                start = os.lseek(fd, 0, os.SEEK_DATA)
                assert start <= offset < os.lseek(fd, start, os.SEEK_HOLE)
                assert path.read_bytes() == model
                run("cp", "--sparse=auto", path, copy)
                assert copy.read_bytes() == model
