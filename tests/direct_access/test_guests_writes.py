"""Watchers of a target are notified of direct writes by guests, however a write ends."""

from __future__ import annotations

import random
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    environment,
    eventually,
    file_config,
    open_memory,
)
from warabi.engine import Engine
from warabi.region import RegionID
from warabi.server import Provider
from warabi.target.config import MemoryConfig
from warabi.target.leases import Grants
from warabi.target.target import Target

PAGE_OF_MARKS = 512
"""Regions whose write_times are in one page."""


@contextmanager
def guest(code: str, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process with a client, of which *code* is a part; killed at the end."""
    start = (
        "import ctypes, os, resource, sys\n"
        "from warabi import errors\n"
        "from warabi.client import Client, RegionID\n"
        "from warabi.engine import Engine, client\n"
        "engine = Engine('na+sm', client)\n"
        "handle = Client(engine).make_target_handle(sys.argv[1], 1)\n"
        "regions = [RegionID(bytes.fromhex(word)) for word in sys.argv[2].split(',')]\n"
        "def touch(region):\n"
        "    for _ in range(3):\n"
        "        handle.read(region, 0, 1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start + code, *arguments],
        env=environment(**variables), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def joined(target: Target) -> Iterator[Grants]:
    """What is shared with guests, kept while all of those leave."""
    found = target.sharing.join()
    assert found is not None
    yield found[1]
    target.sharing.leave(found[0])


def hexed(regions: list[RegionID]) -> str:
    return ",".join(region.hex() for region in regions)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture(params=["memory", "file"])
def target(request: pytest.FixtureRequest, engine: Engine, tmp_path: Path) -> Iterator[Target]:
    config = MEMORY if request.param == "memory" else file_config(tmp_path / "target")
    with Provider(engine, 1, config) as provider:
        yield provider._core.target


HALF_MARKED = """
for region in regions:
    touch(region)
with open("/proc/self/maps") as maps:
    (start,) = (int(line.split("-")[0], 16) for line in maps if "warabi-write_times" in line)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
page = resource.getpagesize()
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), 1) == 0
handle.write(regions[-1], 0, b"x")
"""
"""A guest that is killed when it stores mark 0."""


def test_the_write_time_of_a_region_is_stored_before_that_of_the_target(
    target: Target, engine: Engine
) -> None:
    """The provider looks at a region's mark only after it has seen that of the whole target change:
    set in the other order, a write could stay unnoticed for ever."""
    regions = [target.create_and_write(b"before") for _ in range(PAGE_OF_MARKS + 1)]
    with (
        joined(target) as grants,
        guest(HALF_MARKED, str(engine.addr()), hexed(regions)) as process,
    ):
        assert process.wait(PATIENCE) == -signal.SIGSEGV
        write_times: Any = grants._write_times
        (index,) = (i for i, inode in grants._shared.items() if inode.rid == regions[-1])
        assert index >= PAGE_OF_MARKS
        assert write_times[index] != 0
        assert write_times[0] == 0
        assert target.read(regions[-1], 0, 6) == b"xefore"


WRITING = """
for region in regions:
    touch(region)
print("ready", flush=True)
sys.stdin.readline()
for round in range(int(sys.argv[3])):
    for region in regions:
        handle.write(region, 0, b"x")
print("done", flush=True)
sys.stdin.readline()
"""


def test_polling_misses_no_write(target: Target, engine: Engine) -> None:
    regions = [target.create_and_write(b"before") for _ in range(50)]
    arguments = (str(engine.addr()), hexed(regions), "1000")
    with guest(WRITING, *arguments) as process:
        assert line(process) == "ready"
        grants = target.sharing._grants
        assert grants is not None
        write_times: Any = grants._write_times
        go_on(process)
        assert process.stdout is not None
        while not select.select([process.stdout], [], [], 0)[0]:
            target.sharing.look()
        assert line(process) == "done"
        target.sharing.look()
        for index, inode in grants._shared.items():
            assert inode.share is not None
            assert inode.share.seen == write_times[index] != 0
            assert inode.mtime == write_times[index]


def test_write_times_are_found_in_every_slot() -> None:
    """Also where the write_times of erased regions were."""
    chance = random.Random(7)
    told: list[bytes] = []
    with open_memory(MemoryConfig()) as memory, memory.state.guard.lock, memory.state.guard.checked:
        catalogue = memory._catalogue
        grants = Grants(catalogue, told.append)
        write_times: Any = grants._write_times
        inodes = [catalogue.add(stat.S_IFREG, 0, 0) for _ in range(3 * PAGE_OF_MARKS)]
        shared = {grants.grant(inode)[0]: inode for inode in inodes}  # type: ignore[index]
        for now in range(1, 50):
            chosen = chance.sample([*shared], chance.choice([0, 1, 2, 100]))
            for index in chosen:
                write_times[index] = now
            alone = chosen[: len(chosen) // 2]
            for index in alone:  # looked at by itself
                share = shared[index].share
                assert share is not None
                assert share.merge_writes(shared[index])
            write_times[0] = now
            grants.merge_all_writes(thorough=chance.random() < 0.5)
            assert sorted(told) == sorted(shared[index].rid for index in chosen)
            told.clear()
            for index in chance.sample([*shared], 3):
                share = shared.pop(index).share
                assert share is not None
                grants.withdraw(share)
                grants.recycle(index)
                write_times[index] = chance.choice([write_times[index], 1000 + now])
                fresh = catalogue.add(stat.S_IFREG, 0, 0)
                inodes.append(fresh)
                found = grants.grant(fresh)
                assert found is not None
                assert found[0] == index
                shared[index] = fresh
        grants.forget()
        for inode in inodes:  # there are no bytes of them
            catalogue.remove(inode)


PARTIAL = """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
(region,) = regions
touch(region)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
for offset in (300_000, 299_990):
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        handle.write(region, offset, b"y" * 1000)
        print("written", flush=True)
    except errors.Exception as error:
        print(type(error).__name__, flush=True)
sys.stdin.readline()
"""
"""A guest of a file that may not write beyond so many bytes; it asks nobody else to do it."""


def test_a_part_of_a_write_that_fails_is_noticed(engine: Engine, tmp_path: Path) -> None:
    with Provider(engine, 1, file_config(tmp_path / "target")) as provider:
        target = provider._core.target
        region = target.create_and_write(bytes(400_000))
        before = target.stat(region).mtime_ns
        arguments = (str(engine.addr()), region.hex())
        with guest(PARTIAL, *arguments) as process:
            assert line(process) == "ready"
            go_on(process)
            assert line(process) == "OutOfBounds"
            assert target.stat(region).mtime_ns == before  # nothing was written
            assert line(process) == "ready"
            go_on(process)
            assert line(process) == "OutOfBounds"
            target.sharing.look()
            assert target.read(region, 299_980, 30) == bytes(10) + b"y" * 10 + bytes(10)
            assert target.stat(region).mtime_ns > before


HALTED = """
(region,) = regions
touch(region)
ctypes.CDLL(None).halt_at(80, b"late", 40)
handle.write(region, 10, b"late" * 20)
"""
"""A guest that stops after it has stored a half of what it writes."""


def test_what_a_killed_guest_stored_is_noticed(target: Target, engine: Engine, halt: Path) -> None:
    region = target.create_and_write(bytes(100_000))
    before = target.stat(region).mtime_ns
    preload = {"LD_PRELOAD": str(halt)}
    with guest(HALTED, str(engine.addr()), region.hex(), **preload) as process:
        assert line(process) == "inside"
        process.kill()
        process.wait(PATIENCE)
    eventually(lambda: target.stat(region).mtime_ns > before)
    assert target.read(region, 0, 100) == bytes(10) + b"late" * 10 + bytes(50)
