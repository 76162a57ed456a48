"""Large files, one block after the other, in mounts of a provider over TCP."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.support import (
    Mount,
    another_python,
    fails_with,
    line_of,
    mounting,
    python,
    source_of,
    watchdog,
)
from tests.mount.test_outage import Service, mounted, service

__all__ = ["service"]
MIB = 1 << 20
BLOCKS = 48

COMMON = """
import os, random, sys
MIB = 1 << 20
def block(seed, number):
    return random.Random(f"{seed} {number}").randbytes(MIB)
def forget(file):
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
"""

WRITER = (
    COMMON
    + """
path, seed, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(path, "r+b" if os.path.exists(path) else "wb", buffering=0) as file:
    os.fsync(file.fileno())  # else it may be gone after a crash, with its name
    for number in range(count):
        assert file.write(block(seed, number)) == MIB
        print(number, flush=True)
print("done", flush=True)
"""
)

READER = (
    COMMON
    + """
path, seed, count, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
wanted = [block(seed, number) for number in range(count)]
with open(path, "rb", buffering=0) as file:
    for round in range(rounds):
        forget(file)
        file.seek(0)
        for number in range(count):
            assert file.read(MIB) == wanted[number], number
            print(number, flush=True)
print("done", flush=True)
"""
)


@pytest.fixture
def mount(place: Path) -> Iterator[Mount]:
    with (
        source_of("tcp", place) as (source, options),
        mounting(source, place, *options) as found,
        watchdog(found, 100),
    ):
        yield found


def _last_line(process: subprocess.Popen[str]) -> str:
    line = ""
    while line != "done":
        line = line_of(process)
    return line


def test_a_provider_that_is_killed_under_a_stream_of_writes(service: Service, place: Path) -> None:
    """Written for the first time, and again."""
    with mounted(service, place) as mount:
        path = mount.path / "file"
        for seed in ("first", "again"):
            with another_python(WRITER, path, seed, str(BLOCKS)) as writer:
                for wanted in range(10):
                    assert line_of(writer) == str(wanted)
                service.stop(signal.SIGKILL)
                service.start()
                assert _last_line(writer) == "done"
            with open(path, "rb") as file, fails_with(errno.EIO):
                os.fsync(file.fileno())  # what was written before may be lost, for all it knows
            assert python(READER, path, seed, str(BLOCKS), "1").endswith("done\n")
        mount.expected = ("was not shut down cleanly",)


def test_a_provider_that_is_killed_under_a_stream_of_reads(service: Service, place: Path) -> None:
    with mounted(service, place) as mount:
        path = mount.path / "file"
        python(WRITER, path, "read", str(BLOCKS))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        with another_python(READER, path, "read", str(BLOCKS), "4") as reader:
            for wanted in range(10):
                assert line_of(reader) == str(wanted)
            service.stop(signal.SIGKILL)
            service.start()
            assert _last_line(reader) == "done"


def test_readers_side_by_side_get_their_own_bytes(mount: Mount) -> None:
    """Replies go through few buffers, one after the other."""
    for seed in "abcd":
        python(WRITER, mount.path / seed, seed, "16")
    script = READER.replace("print(number, flush=True)", "pass")
    with (
        another_python(script, mount.path / "a", "a", "16", "6") as one,
        another_python(script, mount.path / "b", "b", "16", "6") as two,
        another_python(script, mount.path / "c", "c", "16", "6") as three,
    ):
        python(script, mount.path / "d", "d", "16", "6")
        for reader in (one, two, three):
            assert _last_line(reader) == "done"


def test_a_writer_that_is_killed_leaves_what_it_wrote(mount: Mount) -> None:
    path = mount.path / "file"
    with another_python(WRITER, path, "killed", "100000") as writer:
        for wanted in range(20):
            assert line_of(writer) == str(wanted)
        writer.kill()
        writer.wait()
    size = path.stat().st_size
    assert size >= 20 * MIB
    assert python(READER, path, "killed", "20", "1").endswith("done\n")
    assert mount.unmount() == 0


def test_blocks_of_all_sizes_at_any_offset(mount: Mount) -> None:
    """As a byte array that is changed in the same way, read back without the page cache."""
    numbers = random.Random(3)
    model = bytearray()
    with open(mount.path / "file", "w+b", buffering=0) as file:
        for _ in range(60):
            offset = numbers.randrange(len(model) + 100_000)
            data = numbers.randbytes(
                numbers.choice([1, 4096, 65_536, 70_001, MIB - 1, MIB, 3 * MIB + 5])
            )
            model.extend(bytes(max(0, offset + len(data) - len(model))))
            model[offset : offset + len(data)] = data
            assert os.pwrite(file.fileno(), data, offset) == len(data)
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = numbers.randrange(len(model))
            end = start + numbers.randrange(2 * MIB)
            assert os.pread(file.fileno(), end - start, start) == model[start:end]
        assert os.pread(file.fileno(), len(model) + 1, 0) == model


def test_a_mount_that_ends_in_the_middle_of_a_stream(mount: Mount) -> None:
    """By a signal while a program writes: the program gets an error, and nothing hangs."""
    with another_python(WRITER, mount.path / "file", "end", "100000") as writer:
        for wanted in range(20):
            assert line_of(writer) == str(wanted)
        mount.kill()
        assert writer.wait(30) != 0
