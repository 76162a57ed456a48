"""Reuse of the memory of erased regions, without access to it by clients that had it before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import warabi.backends.memory_pool
from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    RawPeer,
    Served,
    eventually,
    memories,
    pattern,
    provider_process,
    python_process,
    raw_connection,
    run_python,
)
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.errors import StorageFull
from warabi.region import RegionID
from warabi.server import Provider
from warabi.target.target import Target

MIB = 1 << 20
SIZE = MIB + 5


def only(pid: int) -> int:
    """The number of the only one."""
    (number,) = memories(pid)
    return number


@pytest.fixture
def served() -> Iterator[Served]:
    with provider_process("na+sm", MEMORY) as served:
        yield served


@contextlib.contextmanager
def connected(served: Served, *, share: bool = True) -> Iterator[TargetHandle]:
    with Engine("na+sm", client, config={"share": share}) as engine:
        yield Client(engine).make_target_handle(served.address, 1)


@pytest.fixture
def maker(served: Served) -> Iterator[TargetHandle]:
    """A client that fills its large regions by itself."""
    with connected(served) as handle:
        yield handle


@pytest.fixture
def other(served: Served) -> Iterator[TargetHandle]:
    """One more of these."""
    with connected(served) as handle:
        yield handle


@pytest.fixture
def asking(served: Served) -> Iterator[TargetHandle]:
    """A client that always asks the provider."""
    with connected(served, share=False) as handle:
        yield handle


@pytest.fixture
def target(engine: Engine) -> Iterator[Target]:
    with Provider(engine, 1, MEMORY) as provider:
        yield provider._core.target


# Who gets it


def test_a_client_gets_the_memory_of_its_own_regions(served: Served, maker: TargetHandle) -> None:
    region = maker.create_and_write(pattern(SIZE))
    number = only(served.process.pid)
    for seed, size in enumerate((SIZE, MIB + 1, 2 * MIB, SIZE)):
        maker.erase(region)
        region = maker.create_and_write(pattern(size, seed))
        assert only(served.process.pid) == number
        assert maker.read(region, 0, size) == pattern(size, seed)


def test_no_other_client_gets_the_memory(
    served: Served, maker: TargetHandle, other: TargetHandle, asking: TargetHandle
) -> None:
    region = maker.create_and_write(pattern(SIZE))
    number = only(served.process.pid)
    maker.erase(region)
    for handle in (other, asking):
        before = memories(served.process.pid)
        region = handle.create_and_write(pattern(SIZE))
        (new,) = memories(served.process.pid).keys() - before.keys()
        assert new != number
        handle.erase(region)
    assert maker.read(maker.create_and_write(pattern(SIZE)), 0, SIZE) == pattern(SIZE)
    assert number in memories(served.process.pid)


def test_memory_granted_to_two_clients_is_returned_to_the_system(
    served: Served, maker: TargetHandle, other: TargetHandle
) -> None:
    region = maker.create_and_write(pattern(SIZE))
    assert other.read(region, 0, SIZE) == pattern(SIZE)
    maker.erase(region)
    assert memories(served.process.pid) == {}


def test_memory_granted_for_reading_is_returned_to_the_system(
    served: Served, asking: TargetHandle, client_engine: Engine
) -> None:
    reader = Client(client_engine).make_target_handle(served.address, 1, read_only=True)
    region = asking.create_and_write(pattern(SIZE))
    assert reader.read(region, 0, SIZE) == pattern(SIZE)
    asking.erase(region)
    assert memories(served.process.pid) == {}


def test_memory_never_granted_is_reused_for_any_client(
    served: Served, maker: TargetHandle, asking: TargetHandle
) -> None:
    region = asking.create_and_write(pattern(SIZE))
    number = only(served.process.pid)
    asking.erase(region)
    region = asking.create_and_write(pattern(SIZE, 1))
    assert only(served.process.pid) == number
    assert asking.read(region, 0, SIZE) == pattern(SIZE, 1)
    asking.erase(region)
    region = maker.create_and_write(pattern(SIZE, 2))
    assert only(served.process.pid) == number
    assert asking.read(region, 0, SIZE) == pattern(SIZE, 2)


def test_the_provider_s_own_process_shares_with_itself(engine: Engine) -> None:
    with Provider(engine, 1, MEMORY):
        handle = Client(engine).make_target_handle(str(engine.addr()), 1)
        numbers: set[int] = set()
        for seed in range(5):
            region = handle.create_and_write(pattern(SIZE, seed))
            for written in (b"", b"a", b"ab"):
                handle.write(region, 0, written)
                assert handle.read(region, 0, SIZE) == written + pattern(SIZE, seed)[len(written) :]
            numbers |= memories().keys()
            handle.erase(region)
        assert len(numbers) == 1
    assert memories() == {}


def test_memory_kept_for_a_client_is_freed_when_it_disconnects(
    served: Served, asking: TargetHandle
) -> None:
    with connected(served) as leaving:
        kept = leaving.create_and_write(pattern(SIZE))
        leaving.erase(leaving.create_and_write(pattern(SIZE, 1)))
        assert len(memories(served.process.pid)) == 2
    eventually(lambda: len(memories(served.process.pid)) == 1)
    assert asking.read(kept, 0, SIZE) == pattern(SIZE)
    asking.erase(kept)
    assert memories(served.process.pid) == {}


def test_memory_kept_for_a_lost_connection_is_freed(served: Served, asking: TargetHandle) -> None:
    with raw_connection(served.address) as connection:
        peer = RawPeer(connection)
        assert peer.call([1, 1, "join", [True], None])[1] is not None
        region = RegionID(peer.call([2, 1, "make", [SIZE], None])[1][0])
        asking.write(region, 0, pattern(SIZE))
        asking.erase(region)
        assert len(memories(served.process.pid)) == 1
    eventually(lambda: memories(served.process.pid) == {})


def test_the_first_write_to_an_empty_region_reuses_memory(target: Target) -> None:
    kept = target.create_and_write(pattern(1_000_000))
    numbers = memories().keys()
    target.erase(kept)
    emptied = target.create_and_write(b"small")
    target.resize(emptied, 0)
    for region in (target.create(0), emptied):
        target.write(region, 0, pattern(700_000, 1), extend=True)
        assert memories().keys() == numbers
        target.write(region, 700_100, b"end", extend=True)
        assert target.read(region, 0, 700_103) == pattern(700_000, 1) + bytes(100) + b"end"
        target.resize(region, 1_000_000)
        assert target.read(region, 700_103, 1_000_000 - 700_103) == bytes(1_000_000 - 700_103)
        target.write(region, 0, pattern(1_000_000))
        target.erase(region)
    small = target.create_and_write(b"small")
    target.write(small, 3, pattern(900_000), extend=True)
    assert target.read(small, 0, 900_003) == b"sma" + pattern(900_000)


# What is in it


def test_new_bytes_are_zero(served: Served, maker: TargetHandle, asking: TargetHandle) -> None:
    for handle in (maker, asking):
        for _ in range(3):
            for region in [handle.create_and_write(pattern(SIZE, i)) for i in range(3)]:
                handle.erase(region)
            region = handle.create(SIZE)
            assert handle.read(region, 0, SIZE) == bytes(SIZE)
            handle.erase(region)
            region = handle.create_and_write(pattern(MIB - 70_001))
            handle.resize(region, SIZE + 5000)
            assert handle.read(region, 0, MIB - 70_001) == pattern(MIB - 70_001)
            assert handle.read(region, MIB - 70_001, 75_006) == bytes(75_006)
            handle.erase(region)


HALTED = """
import ctypes, sys
from warabi.client import Client
from warabi.engine import Engine, client

with Engine("na+sm", client) as engine:
    handle = Client(engine).make_target_handle(sys.argv[1], 1)
    handle.erase(handle.create_and_write(b"secret" * 200_000))
    ctypes.CDLL(None).halt_at(1_200_000, b"publ", int(sys.argv[2]))
    handle.create_and_write(b"public" * 200_000)
"""
"""A client that stops while it fills a new region, and has written so many bytes."""


@pytest.mark.parametrize("written", [0, 600_000])
def test_a_client_that_is_killed_while_it_fills_one(
    served: Served, halt: Path, asking: TargetHandle, written: int
) -> None:
    arguments = ("-c", HALTED, served.address, str(written))
    with python_process(*arguments, preloaded=halt) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        assert len(memories(served.process.pid)) == 1  # it is what the other region had
        (region,) = asking.list()
        expected = (b"public" * 200_000)[:written].ljust(1_200_000, b"\0")
        assert asking.read(region, 0, 1_200_000) == expected
        process.kill()
        process.wait(PATIENCE)
        assert asking.read(region, 0, 1_200_000) == expected
        asking.erase(region)
    eventually(lambda: memories(served.process.pid) == {})


KEEPING = """
import os, sys, threading
import warabi.shm.client
from warabi.client import Client
from warabi.engine import Engine, client

kept = []

def keeping(guest, region, granted, fd, data):
    kept.append(os.dup(fd))
    return real(guest, region, granted, fd, data)

real, warabi.shm.client.Guest.fill = warabi.shm.client.Guest.fill, keeping
engine = Engine("na+sm", client)
handle = Client(engine).make_target_handle(sys.argv[1], 1)
regions = [handle.create_and_write(b"mine" * 250_000) for _ in range(5)]
for region in regions:
    handle.erase(region)
print("erased", flush=True)
threading.Thread(target=sys.stdin.readline).start()
while threading.active_count() > 1:
    for fd in kept:
        os.pwrite(fd, b"evil" * 250_000, 0)
print(sum(b"evil" in os.pread(fd, 1_000_000, 0) for fd in kept), flush=True)
"""
"""A client that keeps what it was given, and writes there whatever it was told."""


def test_a_client_that_goes_on_writing_where_its_regions_were(
    served: Served, maker: TargetHandle, asking: TargetHandle
) -> None:
    with python_process("-c", KEEPING, served.address) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "erased\n"
        for seed in range(40):
            for handle in (maker, asking):
                region = handle.create_and_write(pattern(1_000_000, seed))
                empty = handle.create(1_000_000)
                assert asking.read(region, 0, 1_000_000) == pattern(1_000_000, seed)
                assert asking.read(empty, 0, 1_000_000) == bytes(1_000_000)
                handle.erase(region)
                handle.erase(empty)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "5\n"


LONGER = """
        os.ftruncate(fd, 2_000_000)
        for path in (fd, f"/proc/self/fd/{fd}"):
            try:
                os.truncate(path, 0)
            except PermissionError:
                continue
            sys.exit("the memory was cut off")
"""


def test_a_client_cannot_cut_off_the_memory_that_it_was_granted(
    served: Served, asking: TargetHandle
) -> None:
    """It can make the file longer, which then is not used for other regions."""
    code = KEEPING.replace('        os.pwrite(fd, b"evil" * 250_000, 0)\n', LONGER.lstrip("\n"))
    code = code.replace("print(sum", "handle.create_and_write(b'next' * 250_000)\nprint(sum")
    with python_process("-c", code, served.address) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "erased\n"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "0\n"
        (region,) = asking.list()
        assert asking.read(region, 0, 1_000_000) == b"next" * 250_000


def test_a_view_of_what_was_erased_shows_nothing_new(target: Target) -> None:
    region = target.create_and_write(pattern(SIZE))
    view = target.view(region, 0, SIZE)
    assert view is not None
    target.erase(region)
    target.create_and_write(pattern(SIZE, 1))
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match="Bad address"):
            os.writev(writing, [view[:1000]])
    finally:
        os.close(reading)
        os.close(writing)


def test_memory_is_reused_once_its_views_are_gone(target: Target) -> None:
    region = target.create_and_write(pattern(SIZE))
    numbers = memories().keys()
    view = target.view(region, 0, SIZE)
    assert view is not None
    assert view == pattern(SIZE)
    del view
    target.erase(region)
    target.create_and_write(pattern(SIZE, 1))
    assert memories().keys() == numbers


# How much is kept


def test_the_memory_pool_is_bounded(
    served: Served, maker: TargetHandle, asking: TargetHandle
) -> None:
    for handle in (maker, asking):
        for size in (8 * MIB, 3 * MIB, 100_000):
            for region in [handle.create_and_write(bytes(size)) for _ in range(30)]:
                handle.erase(region)
            kept = memories(served.process.pid)
            assert sum(kept.values()) <= 64 * MIB
    for region in [asking.create_and_write(bytes(70_000)) for _ in range(300)]:
        asking.erase(region)
    assert len(memories(served.process.pid)) <= 128


def test_what_is_very_large_or_mostly_a_hole_is_not_kept(
    served: Served, asking: TargetHandle
) -> None:
    asking.erase(asking.create_and_write(bytes(9 * MIB)))
    assert memories(served.process.pid) == {}
    region = asking.create(4 * MIB)
    asking.write(region, 0, bytes(MIB))
    asking.erase(region)
    assert memories(served.process.pid) == {}


def test_new_sizes_take_the_place_of_old_ones(target: Target) -> None:
    for size in (MIB, 4 * MIB, 100_000):
        for region in [target.create_and_write(bytes(size)) for _ in range(70)]:
            target.erase(region)
        before = memories()
        target.create_and_write(bytes(size))
        assert memories().keys() == before.keys()


def test_pooled_memory_is_freed_when_memory_is_short(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warabi.backends.memory_pool, "MEMORY_CHECK", 0.0)
    regions = [target.create_and_write(pattern(SIZE)) for _ in range(5)]
    for region in regions[:3]:
        target.erase(region)
    assert len(memories()) == 5
    with monkeypatch.context() as patched:
        patched.setattr(warabi.backends.memory_pool, "machine_memory", lambda: (16 << 30, 1 << 29))
        target.erase(target.create(MIB))
        assert len(memories()) == 2
        target.erase(regions[3])
        assert len(memories()) == 1
    target.erase(regions[4])
    assert len(memories()) == 1


FEW = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600))
from warabi.client import Client
from warabi.engine import Engine
from warabi.region import RegionID
from warabi.server import Provider
with Engine("na+sm") as engine, Provider(engine, 1, {"target": {"type": "memory"}}):
    handle = Client(engine).make_target_handle(str(engine.addr()), 1)
    for _ in range(2):
        regions = [handle.create_and_write(b"%6d" % i * 20_000) for i in range(400)]
        for i, region in enumerate(regions):
            assert handle.read(region, 60, 6) == b"%6d" % i
            handle.erase(region)
        regions = [handle.create(120_000) for _ in range(400)]
        assert len(os.listdir("/proc/self/fd")) < 320
        for region in regions:
            assert handle.read(region, 60, 6) == bytes(6)
            handle.erase(region)
"""


def test_memory_regions_work_with_few_descriptors() -> None:
    done = run_python(FEW)
    assert (done.returncode, done.stderr) == (0, "")


def test_closing_frees_the_memory_pool(engine: Engine) -> None:
    with Provider(engine, 1, MEMORY) as provider:
        target = provider._core.target
        for region in [target.create_and_write(pattern(SIZE)) for _ in range(3)]:
            target.erase(region)
        assert len(memories()) == 3
        total, room, _ = target.room()
        assert room <= total
    assert memories() == {}


# Failures half way


def test_a_region_that_is_refused_leaves_nothing(engine: Engine) -> None:
    config = {"target": {"type": "memory", "config": {"capacity": 3 * MIB}}}
    with Provider(engine, 1, config) as provider:
        target = provider._core.target
        kept = target.create_and_write(pattern(2 * MIB))
        target.erase(target.create_and_write(pattern(MIB)))
        target.create(MIB // 2)
        before = memories()
        with pytest.raises(StorageFull):
            target.create_and_write(pattern(MIB))
        assert memories().keys() <= before.keys()
        assert target.read(kept, 0, 2 * MIB) == pattern(2 * MIB)
