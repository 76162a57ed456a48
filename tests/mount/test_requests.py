"""FUSE requests of a mount under load: signals, large reads, holes, set-ID bits."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.support import (
    BACKENDS,
    MIB,
    SOURCES,
    Mount,
    another_python,
    is_mounted,
    line_of,
    mounting,
    python,
    source_of,
)
from tests.posix.support import check, libc

CAPABILITY = "security.capability"
SOME = bytes.fromhex("0100000200040000000000000000000000000000")
"""cap_net_raw, permitted and effective."""
RESTLESS = """if True:
    import os, sys
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x")
    print("started", flush=True)
    while True:
        os.pwrite(fd, b"y", 0)
"""
READ_ALL = """if True:
    import sys
    with open(sys.argv[1], "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
"""


def cached(pages: mmap.mmap) -> int:
    """How many pages of a mapping the kernel has in memory."""
    found = (ctypes.c_ubyte * (len(pages) // mmap.PAGESIZE))()
    start = ctypes.c_char.from_buffer(pages)
    try:
        check(libc.mincore(ctypes.byref(start), ctypes.c_size_t(len(pages)), found))
    finally:
        del start  # else the mapping could not be closed
    return sum(page & 1 for page in found)


@contextlib.contextmanager
def restless(path: Path) -> Iterator[None]:
    """Another process sends requests for the file *path*, one after the other without a pause."""
    with another_python(RESTLESS, path) as process:
        assert line_of(process) == "started"
        yield


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_busy_mount_handles_signals(backend: str, place: Path) -> None:
    with (
        source_of(backend, place) as (source, options),
        mounting(source, place, *options, start=False) as mount,
    ):
        mount.start_in_foreground()
        with restless(mount.path / "file"):
            mount.signal(signal.SIGTERM)
            assert mount.wait() == 0
        assert not is_mounted(mount.path)


def test_requests_that_wait_for_the_disk_are_answered_by_a_busy_mount(mounted: Mount) -> None:
    with restless(mounted.path / "file"), open(mounted.path / "other", "wb") as other:
        for _ in range(50):
            other.write(b"z" * 100)
            other.flush()
            os.fsync(other.fileno())
    assert (mounted.path / "other").stat().st_size == 5000


@pytest.mark.parametrize("mounted", SOURCES, indirect=True)
def test_a_capability_that_a_written_file_is_given_is_taken_by_the_next_write(
    mounted: Mount,
) -> None:
    path = mounted.path / "program"
    with open(path, "wb", buffering=0) as file:
        for _ in range(2):
            file.write(b"text")  # before it the kernel learns that there is none
            os.setxattr(path, CAPABILITY, SOME)
            assert os.getxattr(path, CAPABILITY) == SOME
            file.write(b"text")
            assert CAPABILITY not in os.listxattr(path)


def test_large_reads_see_what_was_last_written(mounted: Mount) -> None:
    path = mounted.path / "file"
    pieces = [os.urandom(MIB) for _ in range(3)]
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, MIB)

        def write(number: int, offset: int) -> None:
            buffer[:] = pieces[number]
            assert os.pwrite(fd, buffer, offset) == MIB

        def read(offset: int) -> bytes:
            count = os.preadv(fd, [buffer], offset)
            return buffer[:count]

        write(0, 0)
        assert read(0) == pieces[0]
        write(1, MIB)  # beyond what was mapped
        assert read(MIB) == pieces[1]
        write(2, 0)  # where it is mapped
        assert read(0) == pieces[2]
        os.truncate(path, MIB + 4096)
        assert read(MIB) == pieces[1][:4096]
        os.truncate(path, MIB * 2)
        assert read(MIB) == pieces[1][:4096] + bytes(MIB - 4096)
        os.truncate(path, 0)
        assert read(0) == b""
        write(1, MIB)  # behind a hole
        assert read(0) == bytes(MIB)
        assert read(MIB) == pieces[1]
    finally:
        os.close(fd)


def test_reading_a_hole_takes_no_memory(place: Path) -> None:
    with mounting("memory:", place) as mount:
        path = mount.path / "file"
        path.write_bytes(b"start")
        os.truncate(path, 256 * MIB)
        python(READ_ALL, path)
        fds = Path(f"/proc/{mount.pid}/fd")
        blocks = [
            os.stat(entry).st_blocks
            for entry in fds.iterdir()
            if "warabi-region" in os.readlink(entry)
        ]
        assert len(blocks) == 1
        assert blocks[0] * 512 < MIB


@pytest.mark.parametrize(("mounted", "least"), [*zip(SOURCES, (512, 512, 512, 4096), strict=True)],
                         indirect=["mounted"])  # fmt: skip
def test_the_kernel_reads_ahead_in_large_requests(mounted: Mount, least: int) -> None:
    device = os.stat(mounted.path).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert int(setting.read_text()) == least


def test_what_is_cached_stays_when_another_part_is_written(mounted: Mount) -> None:
    """Nobody but the kernel changes an embedded target's files, and it knows what it did."""
    path = mounted.path / "file"
    path.write_bytes(os.urandom(MIB))
    with path.open("r+b", buffering=0) as file:
        file.read(MIB)
        with mmap.mmap(file.fileno(), MIB) as pages:
            for offset in range(0, MIB, MIB // 8):
                os.pwrite(file.fileno(), b"new", offset)
                assert os.pread(file.fileno(), 3, offset) == b"new"
                assert path.stat().st_size == MIB
            assert cached(pages) == MIB // mmap.PAGESIZE
