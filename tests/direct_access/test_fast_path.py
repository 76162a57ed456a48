"""Direct accesses with damaged shared memory and invalid arguments."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    environment,
    pattern,
    provider_process,
    python_process,
)
from warabi import errors
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.region import RegionID
from warabi.shm._fast_path import FastPath, Grant
from warabi.shm.memory import SharedMapping, SharedMemory

ALIVE = 77
STAMP = 1 << 60
REGION = RegionID(b"0123456789abcdef")
ENTRIES = 512
TOP = (1 << 63) - 1


class Rig:
    """A provider's part of the memory, and a guest's accesses to it.

    Args:
        slots: how many.
    """

    def __init__(self, slots: int = 64, *, writable: bool = True) -> None:
        self.memories = [SharedMemory("rig", size) for size in (4096, 12288, 4096, 8 * slots)]
        life, table, self.write_times, self.hazards = (m.view.cast("Q") for m in self.memories)
        self.life, self.table = life, table
        life[1] = ALIVE
        dropped: list[Any] = []
        self.dropped = dropped

        class Accesses(FastPath):
            def _drop(self, region: bytes, grant: Any) -> None:
                self.grants.pop(region, None)
                dropped.append(region)

            def _failure(self, region: bytes, error: OSError) -> Exception:
                return errors.from_os(error, f"write {region!r}")

        accesses: Any = Accesses
        mappings = [SharedMapping(m.fd, len(m.view), writable=True) for m in self.memories]
        self.path = accesses(*mappings, 2, ALIVE, writable)

    def grant(self, size: int, *, room: int | None = None, index: int = 3) -> memoryview:
        """Grant a region in memory; what it holds."""
        memory = SharedMemory("region", max(1, size))
        self.memories.append(memory)
        self.enter(index, size)
        mapping = SharedMapping(memory.fd, max(1, size), writable=True)
        room = size if room is None else room
        self.path.grants[REGION] = Grant(index, STAMP, room, keeper=mapping, view=mapping.view)
        return memory.view

    def grant_file(self, fd: int, size: int) -> None:
        """Grant a region in a file, which is closed with the grant."""
        self.enter(3, size)
        self.path.grants[REGION] = Grant(3, STAMP, TOP, fd)

    def enter(self, index: int, size: int) -> None:
        self.table[2 * index] = STAMP
        self.table[2 * index + 1] = size

    def close(self) -> None:
        if hasattr(self, "path"):
            self.path.grants.clear()
        for memory in self.memories:
            memory.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with contextlib.closing(Rig()) as made:
        yield made


@pytest.fixture
def file() -> int:
    """A file of 100 bytes; the grant closes it."""
    fd, name = tempfile.mkstemp()
    os.unlink(name)
    os.write(fd, pattern(100))
    return fd


def place(size: int) -> memoryview:
    return memoryview(bytearray(size))


def test_a_region_in_a_shared_file(rig: Rig, file: int) -> None:
    """Nothing outside of it is touched, and the file stays open as long as its keeper says."""
    grant = Grant(3, STAMP, 40, file, keeper=rig, start=50)
    assert (grant.owns, grant.start, grant.fd) == (False, 50, file)
    rig.enter(3, 40)
    rig.path.grants[REGION] = grant
    out = place(40)
    assert rig.path.read_some(REGION, 0, out, True, False) == 40
    assert out == pattern(100)[50:90]
    assert rig.path.try_read(REGION, 39, bytearray(1))
    assert not rig.path.try_read(REGION, 39, bytearray(2))
    assert rig.path.write(REGION, 35, memoryview(b"12345"))
    assert not rig.path.write(REGION, 36, memoryview(b"12345"))
    assert not rig.path.try_write(REGION, TOP, b"1")
    rig.enter(3, 60)  # the region has more than can be reached here
    assert rig.path.read_some(REGION, 0, place(50), True, True) == -1
    assert not rig.path.try_write(REGION, 38, b"123")
    assert os.pread(file, 200, 0) == pattern(100)[:85] + b"12345" + pattern(100)[90:]
    del grant
    rig.path.grants.clear()
    os.close(file)  # nobody else did


@pytest.mark.parametrize(("room", "start"), [(TOP, 1), (1, TOP), (10, -1)])
def test_an_impossible_extent_of_a_shared_file(rig: Rig, room: int, start: int) -> None:
    with open(os.devnull) as null, pytest.raises(ValueError, match="exceeds the mapping"):
        Grant(3, STAMP, room, null.fileno(), keeper=rig, start=start)


def test_a_region_in_shared_memory(rig: Rig) -> None:
    memory = bytearray(pattern(100))
    with pytest.raises(ValueError, match="exceeds the mapping"):
        Grant(3, STAMP, 51, keeper=memory, view=memoryview(memory), start=50)
    rig.enter(3, 50)
    rig.path.grants[REGION] = Grant(3, STAMP, 50, keeper=memory, view=memoryview(memory), start=50)
    out = place(50)
    assert rig.path.read_some(REGION, 0, out, True, False) == 50
    assert out == pattern(100)[50:]
    assert rig.path.try_write(REGION, 0, b"put")
    assert memory == pattern(100)[:50] + b"put" + pattern(100)[53:]
    rig.path.grants.clear()


# Without it

MESSAGES = """
import sys
sys.modules["warabi.shm._fast_path"] = None
from tests.support.helpers import MEMORY
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.server import Provider
if len(sys.argv) == 1:
    engine = Engine("na+sm")
    provider = Provider(engine, 1, MEMORY)
    address = str(engine.addr())
else:
    engine, address = Engine("na+sm", client), sys.argv[1]
target = Client(engine).make_target_handle(address, 1)
for size in (100, 1 << 20):
    data = bytes([size % 251]) * size
    region = target.create_and_write(data)
    for _ in range(3):
        target.write(region, 0, data, persist=True)
        assert target.read(region, 0, size) == data
engine.finalize()
"""


def test_without_the_compiled_part_accesses_are_messages() -> None:
    with provider_process("na+sm", MEMORY) as served:
        for arguments in ((), (served.address,)):
            subprocess.run(
                [sys.executable, "-W", "error", "-c", MESSAGES, *arguments],
                env=environment(), check=True, timeout=60,
            )  # fmt: skip


# Accesses


def test_memory(rig: Rig) -> None:
    held = rig.grant(100)
    before = time.time_ns()
    assert rig.path.write(REGION, 10, b"abc")
    assert bytes(held[9:14]) == b"\0abc\0"
    assert rig.path.try_write(REGION, 97, bytearray(b"end"))
    assert not rig.path.try_write(REGION, 98, b"end")
    assert not rig.path.write(REGION, 98, memoryview(b"end"))
    into = place(3)
    assert rig.path.read_some(REGION, 10, into) == 3
    assert bytes(into) == b"abc"
    taken = bytearray(3)
    assert rig.path.try_read(REGION, 97, taken)
    assert taken == b"end"
    assert rig.path.size(REGION) == 100
    recent = rig.path.recent
    assert len(recent) == 2
    assert before <= recent[0] <= recent[1] <= time.time_ns()
    assert rig.write_times[3] == rig.write_times[0] == recent[1]
    assert not any(rig.hazards)
    assert rig.path.busy == 0


@pytest.mark.parametrize("size", [100, 300_000, 9 << 20])
def test_files(rig: Rig, size: int) -> None:
    fd = os.memfd_create("file")
    os.truncate(fd, size)
    rig.grant_file(fd, size)
    assert rig.path.write(REGION, 0, pattern(size))
    for wait in (True, False):
        into = place(size)
        assert rig.path.read_some(REGION, 0, into, wait) in (size, -1 if not wait else size)
        assert not wait or into == pattern(size)
    assert rig.path.try_read(REGION, 7, bytearray(size - 7))
    assert not rig.path.try_read(REGION, 8, bytearray(size - 7))


def test_a_large_copy_in_memory(rig: Rig) -> None:
    held = rig.grant(9 << 20)
    assert rig.path.try_write(REGION, 5, pattern(8 << 20))
    assert held[5 : 5 + (8 << 20)] == pattern(8 << 20)
    taken = bytearray(8 << 20)
    assert rig.path.try_read(REGION, 5, taken)
    assert taken == pattern(8 << 20)


def test_the_latest_write_times_are_found(rig: Rig) -> None:
    rig.grant(1)
    first = time.time_ns()
    for _ in range(5000):
        rig.path.write(REGION, 0, b"x")
    recent = rig.path.recent
    assert len(recent) == 4096
    assert list(recent) == sorted(recent)
    assert recent[0] > first
    assert recent[-1] == rig.write_times[3]


@pytest.mark.parametrize("ahead", [0, 5_000_000])
def test_write_times_increase_when_the_clock_does_not(rig: Rig, ahead: int) -> None:
    """A mark that was there before would hide a write from the provider that has seen it."""
    rig.grant(1)
    last = rig.write_times[0] = time.time_ns() + ahead + 5_000_000
    for _ in range(10):
        rig.path.write(REGION, 0, b"x")
        assert rig.write_times[0] == rig.write_times[3] == last + 1
        last += 1


@pytest.mark.parametrize("lie", [1 << 62, (1 << 64) - 1, 10**9])
def test_a_write_time_far_in_the_future_is_ignored(rig: Rig, lie: int) -> None:
    rig.grant(1)
    rig.write_times[0] = lie if lie > 10**9 else time.time_ns() + lie
    first = time.time_ns()
    rig.path.write(REGION, 0, b"x")
    assert first < rig.write_times[0] == rig.write_times[3] <= time.time_ns()


def test_short_reads(rig: Rig, file: int) -> None:
    for granted in (lambda: rig.grant(200), lambda: rig.grant_file(file, 100)):
        granted()
        rig.enter(3, 100)
        assert rig.path.read_some(REGION, 90, place(20)) == 10
        assert rig.path.read_some(REGION, 100, place(20)) == 0
        assert rig.path.read_some(REGION, 101, place(20)) == 0
        assert rig.path.read_some(REGION, TOP, place(20)) in (0, -1)
        assert rig.path.read_some(REGION, 90, place(20), True, False) == -1
        assert rig.path.read_some(REGION, 101, place(0), True, False) == -1
        assert rig.path.read_some(REGION, 100, place(0), True, False) == 0


def test_extents_out_of_range_are_not_accessed(rig: Rig, file: int) -> None:
    for granted in (lambda: rig.grant(100), lambda: rig.grant_file(file, 100)):
        granted()
        for offset in (-1, TOP, TOP + 1, 1 << 64, 1 << 200, -(1 << 200)):
            for data in (b"", b"x", bytes(101)):
                assert not rig.path.write(REGION, offset, data)
                assert not rig.path.try_write(REGION, offset, data)
                size = len(data)
                assert rig.path.read_some(REGION, offset, place(size), True, False) == -1
                assert not rig.path.try_read(REGION, offset, bytearray(size))
    assert not any(rig.hazards)


@pytest.mark.parametrize("told", [TOP, TOP + 1, (1 << 64) - 1])
def test_an_impossible_size_is_not_used(rig: Rig, told: int) -> None:
    rig.grant(100)
    rig.table[7] = told
    for offset in (0, 90, TOP - 5):
        assert not rig.path.write(REGION, offset, bytes(101))
        assert rig.path.read_some(REGION, offset, place(101), True, False) == -1


def test_accesses_stay_within_the_granted_extent(rig: Rig) -> None:
    rig.grant(100, room=50)
    assert rig.path.write(REGION, 40, bytes(10))
    assert not rig.path.write(REGION, 41, bytes(10))
    assert rig.path.read_some(REGION, 0, place(51)) == -1
    with pytest.raises(ValueError, match="exceeds the mapping"):
        Grant(3, STAMP, 51, keeper=None, view=memoryview(bytes(50)))
    with pytest.raises(ValueError, match="exceeds the mapping"):
        Grant(3, STAMP, 1)


def test_a_region_without_a_grant(rig: Rig) -> None:
    def nothing() -> bool:
        return (
            rig.path.size(REGION) == -1
            and not rig.path.write(REGION, 0, b"x")
            and not rig.path.try_write(REGION, 0, b"x")
            and rig.path.read_some(REGION, 0, place(1)) == -1
            and not rig.path.try_read(REGION, 0, bytearray(1))
            and not any(rig.hazards)
        )

    assert nothing()
    rig.path.grants[REGION] = Grant(0, -1, -1)  # refused
    assert nothing()
    rig.grant(100)
    rig.path.usable = False
    assert nothing()
    rig.path.usable = True
    assert not nothing()
    rig.life[1] = ALIVE + 1
    assert not rig.path.living
    assert nothing()
    rig.life[1] = ALIVE
    assert rig.path.living
    assert rig.dropped == []


@pytest.mark.parametrize("access", ["write", "read_some"])
def test_a_version_that_changed(rig: Rig, access: str) -> None:
    rig.grant(100)
    rig.table[6] += 1
    assert rig.path.size(REGION) == -1
    if access == "write":
        assert not rig.path.write(REGION, 0, b"x")
    else:
        assert rig.path.read_some(REGION, 0, place(1)) == -1
    assert rig.dropped == [REGION]
    assert rig.path.grants == {}
    assert rig.path.recent == ()


def test_a_read_only_grant(rig: Rig) -> None:
    with contextlib.closing(Rig(writable=False)) as reading:
        held = reading.grant(5)
        held[:] = b"there"
        assert not reading.path.write(REGION, 0, b"x")
        assert not reading.path.try_write(REGION, 0, b"x")
        assert not reading.path.writable
        taken = bytearray(5)
        assert reading.path.try_read(REGION, 0, taken)
        assert taken == b"there"


# Arguments


def test_arguments_of_other_types(rig: Rig, file: int) -> None:
    for granted in (lambda: rig.grant(100), lambda: rig.grant_file(file, 100)):
        granted()
        wrong: tuple[tuple[Any, ...], ...] = (
            (REGION, 0), (REGION, 0, b"", True, True, True), (REGION, "0", b"x"),
            (REGION, 0.0, b"x"), (REGION, 0, "text"), (REGION, 0, None), (REGION, None, b"x"),
            ([], 0, b"x"),
        )  # fmt: skip
        for arguments in wrong:
            with pytest.raises(TypeError):
                rig.path.write(*arguments)
            if len(arguments) == 3:
                assert not rig.path.try_write(*arguments)
            with pytest.raises(TypeError):
                rig.path.read_some(*(bytearray(1) if a == b"x" else a for a in arguments))
        for read_only in (b"x", memoryview(b"x")):
            with pytest.raises((TypeError, BufferError)):
                rig.path.read_some(REGION, 0, read_only)
            assert not rig.path.try_read(REGION, 0, read_only)
    with pytest.raises(TypeError):
        rig.path.size([])
    assert not any(rig.hazards)
    assert rig.path.busy == 0


class Raising:
    """A switch that cannot be asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __bool__(self) -> bool:
        self.asked += 1
        raise LookupError("asked")


def test_the_first_wrong_argument_is_the_one_that_is_reported(rig: Rig) -> None:
    """No code in Python runs while there is an exception already."""
    rig.grant(100)
    switch = Raising()
    wrong: tuple[tuple[Any, ...], ...] = ((switch,), (switch, switch), (True, switch))
    for switches in wrong:
        with pytest.raises(TypeError):
            rig.path.read_some(REGION, "0", bytearray(1), *switches)
        assert switch.asked == 0
    for switches in wrong:
        with pytest.raises(LookupError, match="asked"):
            rig.path.read_some(REGION, 0, bytearray(1), *switches)
        assert switch.asked == 1
        switch.asked = 0
    assert rig.path.busy == 0


def test_read_only_buffers(rig: Rig) -> None:
    """Whatever else is said of a grant."""
    kept = bytes(100)
    rig.enter(3, 100)
    rig.path.grants[REGION] = Grant(3, STAMP, 100, keeper=kept, view=memoryview(kept))
    assert not rig.path.write(REGION, 0, b"x")
    assert not rig.path.try_write(REGION, 0, b"x")
    assert rig.path.try_read(REGION, 0, bytearray(100))
    assert kept == bytes(100)


def test_an_invalid_result_of_a_callback(rig: Rig, file: int) -> None:
    class Odd(FastPath):
        def _failure(self, region: bytes, error: OSError) -> Any:
            return "no exception"

    odd: Any = Odd
    mappings = [SharedMapping(m.fd, len(m.view), writable=True) for m in rig.memories]
    path = odd(*mappings, 2, ALIVE, True)
    rig.enter(3, 100)
    with open(f"/proc/self/fd/{file}", "rb") as reading:
        path.grants[REGION] = Grant(3, STAMP, TOP, os.dup(reading.fileno()))
        with pytest.raises(TypeError, match="no exception"):
            path.write(REGION, 0, b"x")
        path.grants.clear()
    os.close(file)
    assert path.busy == 0


def test_unusual_arguments_are_left_to_the_checking_path(rig: Rig) -> None:
    rig.grant(100)
    regions: tuple[Any, ...] = (bytearray(REGION), None, b"short", [])
    for region in regions:
        assert not rig.path.try_write(region, 0, b"x")
        assert not rig.path.try_read(region, 0, bytearray(1))
    for offset in (True, 0.0, None):
        assert not rig.path.try_write(REGION, offset, b"x")
    released = memoryview(bytearray(5))
    released.release()
    for buffer in (memoryview(bytearray(10))[::2], released, "text", None):
        assert not rig.path.try_write(REGION, 0, buffer)
        assert not rig.path.try_read(REGION, 0, buffer)
    assert rig.path.recent == ()


def test_numpy_arrays_as_data(rig: Rig) -> None:
    held = rig.grant(100)
    assert rig.path.try_write(REGION, 1, np.arange(3, dtype="<i4"))
    assert bytes(held[1:13]) == b"\0\0\0\0\1\0\0\0\2\0\0\0"
    into = np.zeros((2, 3), "<i2")
    assert rig.path.try_read(REGION, 1, into)
    assert into.tolist() == [[0, 0, 1], [0, 2, 0]]
    assert not rig.path.try_write(REGION, 0, np.array([object()]))
    assert not rig.path.try_read(REGION, 0, np.array([object()]))
    assert not rig.path.try_write(REGION, 0, np.zeros((2, 3)).T)
    assert not rig.path.try_write(REGION, 0, np.zeros(2, "M8[s]"))
    assert bytes(held[:1]) == b"\0"


def test_a_grant_dropped_while_a_region_id_is_compared(rig: Rig) -> None:
    class Sly(bytes):
        __hash__ = bytes.__hash__

        def __eq__(self, other: object) -> bool:
            rig.path.grants.clear()
            gc.collect()
            return bytes(self) == other

    rig.grant(100)
    for _ in range(3):
        rig.path.write(Sly(REGION), 0, b"x")
        rig.grant(100)
        rig.path.read_some(Sly(REGION), 0, place(5))
        rig.grant(100)
        rig.path.size(Sly(REGION))
        rig.grant(100)
        rig.path.try_write(Sly(REGION), 0, b"x")
    assert rig.path.write(REGION, 0, b"x")
    assert not any(rig.hazards)


if sys.version_info >= (3, 12):  # before, only C lends buffers

    def test_a_grant_dropped_while_a_buffer_is_exported(rig: Rig) -> None:
        class Lender:
            def __buffer__(self, flags: int) -> memoryview:
                rig.path.grants.clear()
                return memoryview(bytearray(b"lent"))

            def __release_buffer__(self, view: memoryview) -> None:
                rig.path.grants.clear()

        rig.grant(100)
        assert not rig.path.try_write(REGION, 0, Lender())
        rig.grant(100)
        assert not rig.path.write(REGION, 0, Lender())
        rig.grant(100)
        assert rig.path.read_some(REGION, 0, Lender()) == -1
        assert not any(rig.hazards)


# The medium


def test_a_truncated_file(rig: Rig, file: int) -> None:
    rig.grant_file(file, 100)
    os.truncate(file, 50)
    assert rig.path.read_some(REGION, 0, place(50)) == 50
    assert rig.path.read_some(REGION, 10, place(50)) == -1
    assert rig.path.read_some(REGION, 0, place(300)) == -1  # it has 100, says the table
    assert not rig.path.try_read(REGION, 60, bytearray(1))
    assert rig.dropped == []


def test_failing_reads(rig: Rig) -> None:
    rig.grant_file(os.open("/", os.O_RDONLY), 100)
    assert rig.path.read_some(REGION, 0, place(50)) == -1
    assert rig.path.read_some(REGION, 0, place(50), False) == -1
    assert not any(rig.hazards)


def test_a_full_disk_fails_the_call(rig: Rig) -> None:
    rig.grant_file(os.open("/dev/full", os.O_RDWR), 100)
    for write in (rig.path.write, rig.path.try_write):
        with pytest.raises(errors.StorageFull, match=r"write RegionID.*No space left") as caught:
            write(REGION, 0, b"x")
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENOSPC
    assert not any(rig.hazards)
    assert rig.path.busy == 0
    assert rig.path.recent == ()
    assert rig.write_times[3] == 0


def test_a_short_write_of_the_storage(rig: Rig, file: int) -> None:
    rig.grant_file(file, 200)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    try:
        with pytest.raises(errors.OutOfBounds, match="File too large"):
            rig.path.write(REGION, 100, b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.pread(file, 500, 0) == pattern(100) + b"x" * 50


# Lanes, references, threads

FULL = """
import contextlib, ctypes, os, sys, threading, time
from tests.direct_access.test_fast_path import REGION, Rig

with contextlib.closing(Rig(slots=2)) as rig:
    fd = os.memfd_create("file")
    os.truncate(fd, 1000)
    rig.grant_file(fd, 1000)
    data = bytearray(b"late" * 20)
    threads = []
    halted = ctypes.c_int.in_dll(ctypes.CDLL(None), "halted")
    for slot in range(2):
        ctypes.CDLL(None).halt_at(80, b"late", 0)
        arguments = (REGION, 100 * slot, data)
        threads.append(threading.Thread(target=rig.path.try_write, args=arguments))
        threads[-1].start()
        while halted.value == slot:
            time.sleep(0.001)
    print(rig.path.busy, sorted(rig.hazards))
    written = rig.path.try_write(REGION, 0, b"no")
    print(written, rig.path.read_some(REGION, 0, memoryview(bytearray(2))))
    try:
        data.append(1)
    except BufferError:
        print("lent")
    rig.path.grants.clear()
    print(os.fstat(fd).st_size, flush=True)
    for thread in threads:
        thread.join()
    print(rig.path.busy, sorted(rig.hazards))
    try:
        os.fstat(fd)
    except OSError:
        print("closed", flush=True)
"""


def test_all_slots_in_use(halt: Path) -> None:
    with python_process("-c", FULL, preloaded=halt) as process:

        def line() -> str:
            assert process.stdout is not None
            return process.stdout.readline().strip()

        def send() -> None:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

        assert line() == "inside"
        assert line() == "inside"
        assert [line() for _ in range(4)] == ["2 [3, 3]", "False -1", "lent", "1000"]
        send()
        send()
        assert [line() for _ in range(2)] == ["0 [0, 0]", "closed"]
        process.wait(PATIENCE)


def test_an_interrupt_anywhere_loses_no_hazard_slot(rig: Rig, file: int) -> None:
    """Handlers of signals may raise, as that of Ctrl-C does, after any call."""

    class Interrupted(Exception):
        pass

    armed = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Interrupted

    def until_interrupted() -> None:  # not in the `try`: Python 3.13 leaves that for a loop's jump
        while armed:
            rig.path.write(REGION, 0, data)
            rig.path.read_some(REGION, 0, out)

    dice = random.Random(1)
    data, out = memoryview(bytes(64)), place(64)
    interrupted = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for granted in (lambda: rig.grant(100), lambda: rig.grant_file(file, 100)):
            granted()
            for _ in range(1500):
                try:
                    armed = True
                    signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-6, 1e-4))
                    until_interrupted()
                except Interrupted:
                    interrupted += 1
                assert rig.path.busy == 0
                assert not any(rig.hazards)
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted == 3000


def test_descriptors_and_memory_go_with_the_grant(rig: Rig, file: int) -> None:
    gc.collect()  # what earlier tests mapped
    rig.grant_file(file, 100)
    os.fstat(file)
    del rig.path.grants[REGION]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
    rig.grant(100)
    assert "memfd:region" in Path("/proc/self/maps").read_text()
    rig.memories.pop().close()
    assert "memfd:region" in Path("/proc/self/maps").read_text()
    del rig.path.grants[REGION]
    assert "memfd:region" not in Path("/proc/self/maps").read_text()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_million_calls_leak_nothing(rig: Rig, file: int) -> None:
    path = rig.path
    data, into, number = b"d" * 64, bytearray(64), 1 << 40
    view = memoryview(into)

    def calls(count: int) -> None:
        for _ in range(count):
            path.try_write(REGION, 0, data)
            path.try_read(REGION, 0, into)
            path.write(REGION, 20, data)
            path.read_some(REGION, 36, view)
            path.read_some(REGION, 0, view, False, False)
            path.size(REGION)
            path.try_write(REGION, number, data)
            path.try_read(REGION, number, view)
            path.try_write(REGION, 0, None)
            path.try_read(REGION, 0, data)

    def refused(count: int) -> None:
        for _ in range(count):
            with contextlib.suppress(TypeError):
                path.write(REGION, None, data)
            with contextlib.suppress(errors.StorageFull):
                path.write(REGION, 0, data)
            rig.table[6] += 1
            path.write(REGION, 0, data)
            rig.table[6] = STAMP
            rig.grant_file(os.open("/dev/full", os.O_RDWR), 100)
            rig.dropped.clear()

    held = (REGION, data, into, number, path, path.grants)
    for grant in (lambda: rig.grant(100), lambda: rig.grant_file(file, 100)):
        grant()
        calls(1000)
        counts = [sys.getrefcount(each) for each in held]
        grants, before = sys.getrefcount(path.grants[REGION]), _resident()
        calls(50_000)
        assert [sys.getrefcount(each) for each in held] == counts
        after = sys.getrefcount(path.grants[REGION])
        assert after == grants
        assert _resident() - before < 1 << 20
    rig.grant_file(os.open("/dev/full", os.O_RDWR), 100)
    refused(500)
    counts, before = [sys.getrefcount(each) for each in held], _resident()
    refused(5000)
    assert [sys.getrefcount(each) for each in held] == counts
    assert _resident() - before < 1 << 20


def test_reference_cycles_are_collected(rig: Rig) -> None:
    rig.grant(100)
    rig.path.itself = rig.path
    found = weakref.ref(rig.path)
    del rig.path
    gc.collect()
    assert found() is None


def test_it_can_be_used_while_it_is_being_collected(rig: Rig) -> None:
    done: list[bool] = []

    class Late:
        path: Any

        def __del__(self) -> None:
            done.append(self.path.try_write(REGION, 0, b"x"))

    held = rig.grant(100)
    late = Late()
    late.path, rig.path.late = rig.path, late
    del late, rig.path
    gc.collect()
    assert done == [True]
    assert held[0] == ord("x")


def test_objects_that_are_no_grants_are_refused(rig: Rig) -> None:
    path = rig.path
    rig.grant(100)
    for other in (None, 5, object()):
        path.grants[REGION] = other
        assert not path.try_write(REGION, 0, b"")
        assert path.read_some(REGION, 0, place(1)) == -1
    for index in (-1, ENTRIES, 1 << 61, sys.maxsize, -sys.maxsize):
        fd = os.memfd_create("file")
        path.grants[REGION] = Grant(index, STAMP, TOP, fd)
        assert not path.try_write(REGION, 0, b"")
        assert path.read_some(REGION, 0, place(1)) == -1
        assert path.size(REGION) == -1


def test_objects_that_are_not_made_as_they_should_be(rig: Rig) -> None:
    path_type: Any = FastPath
    bare = path_type.__new__(path_type)
    assert not bare.try_write(REGION, 0, b"x")
    assert bare.read_some(REGION, 0, place(1)) == -1
    assert (bare.size(REGION), bare.busy, bare.living, bare.recent) == (-1, 0, False, ())
    with pytest.raises(AttributeError):
        _ = bare.grants
    del bare
    unmade = Grant.__new__(Grant)
    rig.path.grants[REGION] = unmade
    assert not rig.path.try_write(REGION, 0, b"x")
    del unmade
    good: Any = Grant(3, STAMP, 0, keeper=None, view=memoryview(b""))
    with pytest.raises(TypeError, match="does not change"):
        good.__init__(3, STAMP, 0)
    mappings: Any = [SharedMapping(m.fd, len(m.view), writable=True) for m in rig.memories[:4]]
    with pytest.raises(TypeError, match="made once"):
        rig.path.__init__(*mappings, 2, ALIVE, True)
    life, table, write_times, hazards = mappings
    for wrong in (
        (life, table, write_times, hazards, 1024),
        (life, table, write_times, hazards, -1),
        (life, write_times, table, hazards, 2),
        (life, table, write_times, table, 2),
    ):
        with pytest.raises(ValueError, match="cannot be"):
            FastPath(*wrong, ALIVE, True)
    with pytest.raises(AttributeError):
        path_type(None, table, write_times, hazards, 2, ALIVE, True)
    with pytest.raises(TypeError):
        path_type(life, table, write_times, hazards, 2, "alive", True)


# With a provider


def test_many_threads_while_regions_come_and_go() -> None:
    """Whatever they read is of their region, and whatever they write reaches no other one."""
    failures: list[BaseException] = []
    with (
        provider_process("na+sm", MEMORY) as served,
        Engine("na+sm", client) as engine,
        Engine("na+sm", client, config={"share": False}) as third,
    ):
        handle = Client(engine).make_target_handle(served.address, 1)
        other = Client(third).make_target_handle(served.address, 1)
        sizes = (100, 5000, 70_000, 400_000)
        regions = {tag: other.create_and_write(bytes([tag]) * sizes[tag % 4]) for tag in range(8)}
        over = threading.Event()

        def use(seed: int) -> None:
            try:
                turn = seed
                while not over.is_set():
                    turn += 1
                    tag, region = turn % 8, regions[turn % 8]
                    into = bytearray(sizes[tag % 4] // 2)
                    with contextlib.suppress(errors.InvalidRegion, errors.OutOfBounds):
                        handle.write(region, len(into), bytes([tag]) * len(into))
                        handle.read_into(region, 0, into)
                        assert set(into) <= {0, tag}
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=use, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        try:
            for turn in range(80):
                tag = turn % 8
                old, size = regions[tag], sizes[tag % 4]
                if turn % 3:
                    other.resize(old, size // 3)
                    other.resize(old, size)
                    other.write(old, 0, bytes([tag]) * size)
                else:
                    other.erase(old)
                    regions[tag] = other.create_and_write(bytes([tag]) * size)
                time.sleep(0.002)
        finally:
            over.set()
            for thread in threads:
                thread.join(PATIENCE)
        assert failures == []
        for tag, region in regions.items():
            assert set(other.read(region, 0, sizes[tag % 4])) <= {tag, 0}


FORKING = """
import os, sys, threading
from warabi.client import Client
from warabi.engine import Engine, client

with Engine("na+sm", client) as engine:
    handle = Client(engine).make_target_handle(sys.argv[1], 1)
    region = handle.create_and_write(b"parent" * 700_000)
    over = False

    def copying():
        into = bytearray(4_000_000)
        while not over:
            handle.read_into(region, 0, into)

    threads = [threading.Thread(target=copying) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        child = os.fork()
        if not child:
            ok = all(handle.read(region, 6 * i, 6) == b"parent" for i in range(5))
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert handle.read(region, 6, 6) == b"parent"
    over = True
    for thread in threads:
        thread.join()
print("done", flush=True)
"""


def test_children_of_a_process_whose_threads_are_copying() -> None:
    with (
        provider_process("na+sm", MEMORY) as served,
        python_process("-W", "ignore", "-c", FORKING, served.address) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
