"""Regions whose files the kernel reads and writes without requests to the target."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import PATIENCE, environment, open_memory, pattern
from warabi import errors
from warabi._core.attributes import Attributes
from warabi.region import RegionID
from warabi.target import opening
from warabi.target.config import FileConfig, MemoryConfig, PmemConfig
from warabi.target.target import Target

LARGE = 1 << 20


def _memory(path: Path, **settings: Any) -> Target:
    return open_memory(MemoryConfig(**settings))


def _file(path: Path, **settings: Any) -> Target:
    return opening.open_file(FileConfig(path=str(path), **{"create_if_missing": True, **settings}))


def _pmem(path: Path) -> Target:
    return opening.open_pmem(PmemConfig(path=str(path), create_if_missing_with_size=1 << 26))


@pytest.fixture(params=[_memory, _file])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.closing(request.param(tmp_path / "target")) as target:
        yield target
    assert len(os.listdir("/proc/self/fd")) <= before


def test_size_and_times_follow_writes_by_the_kernel(target: Target) -> None:
    region = target.create_and_write(pattern(LARGE))
    before = target.stat(region)
    fd = target.expose(region)
    assert fd is not None
    assert os.pread(fd, LARGE, 0) == pattern(LARGE)
    assert target.stat(region) == before
    os.pwrite(fd, b"x" * 100, LARGE + 1000)
    assert target.size(region) == LARGE + 1100
    expected = pattern(LARGE) + bytes(1000) + b"x" * 100
    assert target.read(region, 0, LARGE + 1100) == expected
    assert target.stat(region).mtime_ns > before.mtime_ns
    target.resize(region, 50)
    assert os.fstat(fd).st_size == 50
    os.pwrite(fd, b"y", 60)
    target.write(region, 51, b"z")
    assert target.read(region, 0, 61) == pattern(LARGE)[:50] + b"\0z" + bytes(8) + b"y"
    os.pwrite(fd, b"!", 61)
    target.kernel_backed.conceal(region)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert target.size(region) == 62
    target.kernel_backed.conceal(region)  # has no effect
    target.erase(region)


def _file_in(target: Target) -> tuple[Attributes, int]:
    """A file of some size, and the descriptor that exposes its region."""
    made = target.namespace.mknod(1, b"file", 0o644, 0, 0)
    target.write(made.region, 0, pattern(LARGE), extend=True)
    fd = target.expose(made.region)
    assert fd is not None
    return made, fd


def test_times_that_are_set_stay(target: Target) -> None:
    namespace, made, fd = target.namespace, *_file_in(target)
    os.pwrite(fd, b"x", 0)
    namespace.setattr(made.ino, mtime_ns=5)
    assert namespace.getattr(made.ino).mtime_ns == 5
    os.pwrite(fd, b"y", 0)
    assert time.time_ns() - namespace.lookup(1, b"file").mtime_ns < PATIENCE * 1e9


@pytest.mark.parametrize(
    ("mode", "left"), [(0o6755, 0o755), (0o2745, 0o2745), (0o4711, 0o711), (0o755, 0o755)]
)
def test_writing_takes_set_id_bits_away(target: Target, mode: int, left: int) -> None:
    namespace, made, fd = target.namespace, *_file_in(target)
    os.pwrite(fd, b"x", 0)
    namespace.setattr(made.ino, mode=mode)
    assert namespace.getattr(made.ino).mode & 0o7777 == mode  # what was written was before
    os.pwrite(fd, b"y", 0)
    target.kernel_backed.conceal(made.region)
    assert namespace.getattr(made.ino).mode & 0o7777 == left


def test_grants_and_exposure_of_a_region_exclude_each_other(target: Target) -> None:
    region = target.create_and_write(pattern(LARGE))
    assert target.expose(region) is not None
    assert target.expose(region) is None  # once
    assert target.sharing.join() is None
    with pytest.raises(errors.TargetBusy, match="does not see their writes"):
        target.sharing.pause()
    target.kernel_backed.conceal(region)
    joined = target.sharing.join()
    if joined is not None:
        assert target.expose(region) is None
        target.sharing.leave(joined[0])
    target.sharing.pause()
    assert target.expose(region) is None
    target.sharing.resume()
    assert target.expose(region) is not None


REFUSED: dict[str, tuple[Callable[[Path], Target], int]] = {
    "small": (_memory, 1000),
    "quota": (lambda path: _memory(path, capacity=1 << 30), LARGE),
    "checksums": (lambda path: _file(path, checksums=True), LARGE),
    "direct": (lambda path: _file(path, directio=True), LARGE),
    "sync": (lambda path: _file(path, sync=True), LARGE),
    "pmem": (_pmem, LARGE),
}


@pytest.mark.parametrize("case", REFUSED)
def test_regions_that_cannot_be_exposed_are_refused(case: str, tmp_path: Path) -> None:
    make, size = REFUSED[case]
    with contextlib.closing(make(tmp_path / "target")) as target:
        region = target.create_and_write(pattern(size))
        assert target.expose(region) is None
        target.kernel_backed.conceal(region)
        target.erase(region)


SYNCS = """
import mmap, os, sys
from warabi.target import commit as durability, opening as layout
from warabi.target.config import FileConfig
durability.COMMIT_INTERVAL = 3600
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
region = target.create_and_write(bytes(1 << 20), True)
fd = target.expose(region)
conceal = target.kernel_backed.conceal
for how in (lambda: target.fsync(region), target.sync, lambda: conceal(region), target.sync):
    os.pwrite(fd, b"x", 5)
    target.stat(region)
    os.pwrite(fd, b"y" * 10, os.fstat(fd).st_size)
    os.write(1, b"begin")
    how()
    os.write(1, b"end")
    if how is not target.sync and not target.kernel_backed._exposed:
        fd = os.open("/dev/null", os.O_RDWR)
print(region.hex(), target.size(region), flush=True)
os._exit(9)
"""
MAPS = """
import mmap, os, sys
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
region = target.create_and_write(bytes(1 << 20), True)
mapping = mmap.mmap(target.expose(region), 1 << 20)
target.kernel_backed.conceal(region)
target.sync()
mapping[5] = 1
os.write(1, b"begin")
target.close()
os.write(1, b"end")
"""


def _between(script: str, path: Path, status: int) -> tuple[str, list[str]]:
    """What *script* prints, and which syncs it makes between each "begin" and "end"."""
    log = path / "log"
    done = subprocess.run(
        ["strace", "-f", "-y", "-o", str(log), "-e", "trace=fsync,fdatasync,syncfs,write",
         sys.executable, "-c", script, str(path / "target")],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stdout, [p.partition('"end"')[0] for p in log.read_text().split('"begin"')[1:]]


def test_what_is_written_to_a_mapping_is_synced_at_the_end(tmp_path: Path) -> None:
    _, (part,) = _between(MAPS, tmp_path, 0)
    assert "syncfs(" in part


def test_what_was_written_unseen_is_synced_and_survives(tmp_path: Path) -> None:
    printed, parts = _between(SYNCS, tmp_path, 9)
    name, size = printed.removeprefix("beginend" * 4).split()
    synced = [f"{name}>" in part or "syncfs(" in part for part in parts]
    assert synced == [True, True, False, True]
    with contextlib.closing(_file(tmp_path / "target")) as target:  # it was killed
        (region,) = target.list()
        assert region.hex() == name
        assert target.size(region) == int(size)
        assert target.read(region, int(size) - 10, 10) == b"y" * 10


def granted(target: Target, region: RegionID) -> Callable[[], None]:
    """Have a guest granted the region; what makes it leave."""
    joined = target.sharing.join()
    assert joined is not None
    grant = target.grant(region, joined[0].number, writable=True)
    assert grant is not None
    os.close(grant.place.fd)
    return lambda: target.sharing.leave(joined[0])


def test_memory_that_a_guest_was_granted_is_not_exposed(tmp_path: Path) -> None:
    """It is never cut off, so its file may not end where the region does."""
    with _memory(tmp_path) as target:
        region, other = (target.create_and_write(pattern(LARGE)) for _ in range(2))
        granted(target, region)()
        assert target.expose(region) is None
        target.resize(region, 100_000)
        assert target.expose(region) is None
        assert target.read(region, 0, 100_000) == pattern(LARGE)[:100_000]
        assert target.expose(other) is not None
        target.kernel_backed.conceal(other)


def test_what_was_exposed_may_be_granted(target: Target) -> None:
    region = target.create_and_write(pattern(LARGE))
    fd = target.expose(region)
    assert fd is not None
    os.pwrite(fd, b"x" * 100_000, LARGE)
    target.kernel_backed.conceal(region)
    assert target.size(region) == LARGE + 100_000
    leave = granted(target, region)
    for size in (LARGE + 50_000, LARGE + 100_000):
        target.resize(region, size)
    expected = pattern(LARGE) + b"x" * 50_000 + bytes(50_000)
    assert target.read(region, 0, LARGE + 100_000) == expected
    leave()
