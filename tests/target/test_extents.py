"""Extents of regions: copies that share blocks, space that runs out, calls that wait."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.test_loop import make, mounted
from tests.support.helpers import PATIENCE, open_memory, pattern
from warabi import errors
from warabi.region import RegionID
from warabi.target import opening
from warabi.target.config import FileConfig, MemoryConfig
from warabi.target.handlers import CALLS
from warabi.target.target import Target

MIB = 1 << 20


def call(target: Target, name: str, *arguments: Any) -> Any:
    return CALLS[name](target, *arguments)


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system of the kind that the test says."""
    make(tmp_path / "image", request.param, {"xfs": 320 * MIB, "ext4": 64 * MIB}[request.param])
    with mounted(tmp_path / "image", tmp_path / "mnt") as path:
        yield path


def opened(path: Path, **settings: Any) -> Target:
    return opening.open_file(FileConfig(path=str(path), create_if_missing=True, **settings))


def used(path: Path) -> int:
    os.sync()
    found = os.statvfs(path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.mark.parametrize("disk", ["xfs"], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"checksums": True}, {"directio": True}])
def test_copies_share_blocks_where_files_can(disk: Path, settings: dict[str, Any]) -> None:
    data = pattern(24 * MIB)
    with opened(disk / "target", **settings) as target:
        region = target.create_and_write(data)
        other = target.create(0)
        target.sync()
        before = used(disk)
        copy = call(target, "clone", region, True)
        assert call(target, "copy_range", other, 0, region, 0, len(data)) == len(data)
        target.sync()
        assert used(disk) - before < 4 * MIB
        target.write(region, 0, b"changed")
        assert target.read(copy, 0, len(data)) == data == target.read(other, 0, len(data))


@pytest.mark.parametrize("checksums", [False, True])
def test_a_quota_is_not_passed_by_space_beyond_the_end(tmp_path: Path, checksums: bool) -> None:
    with opened(tmp_path / "target", capacity=2 * MIB, checksums=checksums) as target:
        region = target.create_and_write(pattern(MIB))
        space = call(target, "getattr", region.slot).space
        for offset, size in ((0, 64 * MIB), (MIB, 1), (MIB - 1, 2)):
            with pytest.raises(errors.PathError) as refused:
                call(target, "allocate", region, offset, size, True)
            assert refused.value.errno == errno.EOPNOTSUPP
        for name in ("allocate", "zero_range"):
            with pytest.raises(errors.StorageFull):
                call(target, name, region, 0, 2 * MIB + 1, False)
        assert target.read(region, 0, MIB) == pattern(MIB)
        call(target, "zero_range", region, MIB - 5, 64 * MIB, True)
        assert target.read(region, 0, MIB) == pattern(MIB)[:-5] + bytes(5)
        assert call(target, "getattr", region.slot).space == space
        call(target, "allocate", region, 0, MIB, True)
        call(target, "allocate", region, 0, 2 * MIB)
        assert target.size(region) == 2 * MIB


@pytest.mark.parametrize("disk", ["ext4"], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"checksums": True}])
def test_space_that_is_not_there_is_refused_at_once(disk: Path, settings: dict[str, Any]) -> None:
    with opened(disk / "target", **settings) as target:
        region = target.create_and_write(pattern(100_000))
        copied = target.create_and_write(pattern(30 * MIB))
        for keep_size in (False, True):
            for name in ("allocate", "zero_range"):
                with pytest.raises(errors.StorageFull):
                    call(target, name, region, 50_000, 60 * MIB, keep_size)
        with pytest.raises(errors.StorageFull):
            call(target, "clone", copied)
        with pytest.raises(errors.StorageFull):
            call(target, "copy_range", region, 200_000, copied, 0, 30 * MIB)
        assert len(target.list()) == 2
        assert target.size(region) == 100_000
        assert target.read(region, 0, 50_000) == pattern(100_000)[:50_000]
        target.commit()  # frees what is left of the copy
        kept = target.create(0)
        call(target, "allocate", kept, 0, 4 * MIB, True)
        space = call(target, "getattr", kept.slot).space
        for offset, more in ((4 * MIB, 2 * MIB), (0, 6 * MIB)):
            with pytest.raises(errors.StorageFull):
                call(target, "allocate", kept, offset, target.room()[1] + more, True)
            assert call(target, "getattr", kept.slot).space == space >= 4 * MIB
        call(target, "allocate", region, 0, 8 * MIB, False)
        fill = target.create(0)
        with pytest.raises(errors.StorageFull):
            while True:
                target.append(fill, bytes(MIB))
        target.write(region, 0, pattern(8 * MIB), persist=True)
        assert target.read(region, 0, 8 * MIB) == pattern(8 * MIB)


def test_what_exceeds_the_quota_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "target", capacity=100_000) as target:
        region = target.create_and_write(pattern(60_000))
        for name, arguments in {
            "allocate": (region, 50_000, 60_000, False),
            "zero_range": (region, 50_000, 60_000, False),
            "copy_range": (region, 60_000, region, 0, 50_000),
            "clone": (region,),
        }.items():
            with pytest.raises(errors.StorageFull):
                call(target, name, *arguments)
        assert target.list() == [region]
        assert target.read(region, 0, 60_000) == pattern(60_000)


@pytest.fixture(params=["memory", "file"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    if request.param == "memory":
        made = open_memory(MemoryConfig())
    else:
        made = opened(tmp_path / "target")
    with made:
        yield made


def test_copies_to_and_fro_do_not_wait_for_each_other(target: Target) -> None:
    size = 100_000
    regions = [target.create_and_write(pattern(size, seed)) for seed in range(3)]
    failures: list[BaseException] = []

    def work(source: RegionID, region: RegionID) -> None:
        try:
            for _ in range(50):
                assert call(target, "copy_range", region, 0, source, 0, size) == size
                call(target, "punch_hole", source, 0, 10)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(source, region), daemon=True)
        for source in regions
        for region in regions
        if source != region
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures
    kept = {pattern(size, seed)[10:] for seed in range(3)}
    assert all(target.read(region, 10, size - 10) in kept for region in regions)


def test_a_region_may_be_erased_while_it_is_changed(target: Target) -> None:
    region, source = target.create(4 * MIB), target.create_and_write(pattern(4 * MIB))
    ended = threading.Event()

    def work() -> None:
        try:
            while True:
                call(target, "copy_range", region, 0, source, 0, 4 * MIB)
                call(target, "punch_hole", region, 5000, 3 * MIB)
                call(target, "allocate", region, 0, 8 * MIB, True)
        except errors.InvalidRegion:
            ended.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    target.erase(region)
    assert ended.wait(PATIENCE)
    thread.join(PATIENCE)
    assert target.list() == [source]


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", ["allocate", "zero_range", "punch_hole"])
def test_an_unknown_region_is_refused_whatever_the_size_is(name: str, size: int) -> None:
    keep_size = () if name == "punch_hole" else (False,)
    with open_memory(MemoryConfig()) as target:
        region = target.create(100)
        call(target, name, region, 10, size, *keep_size)
        assert target.size(region) == 100
        target.erase(region)
        with pytest.raises(errors.InvalidRegion):
            call(target, name, region, 10, size, *keep_size)
