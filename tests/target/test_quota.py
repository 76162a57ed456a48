"""Quotas count the space that regions use: holes cost nothing until they are written."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import (
    PATIENCE,
    file_config,
    open_memory,
    pattern,
    provider_process,
)
from warabi import errors
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.region import RegionID
from warabi.target import opening
from warabi.target.config import FileConfig, MemoryConfig, PmemConfig
from warabi.target.handlers import CALLS
from warabi.target.target import Target

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
QUOTA = 8 * MIB
SLACK = 64 * KIB  # of a file system's own blocks

Opener = Callable[[], Target]


def _file(**settings: Any) -> Callable[[Path], Target]:
    def open_(path: Path) -> Target:
        config = FileConfig(path=str(path), create_if_missing=True, capacity=QUOTA, **settings)
        return opening.open_file(config)

    return open_


SPARSE: dict[str, Callable[[Path], Target]] = {
    "memory": lambda path: open_memory(MemoryConfig(capacity=QUOTA)),
    "file": _file(),
    "checksums": _file(checksums=True),
    "directio": _file(directio=True),
}


@pytest.fixture(params=list(SPARSE))
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    return lambda: SPARSE[request.param](tmp_path / "target")


@pytest.fixture
def target(opener: Opener) -> Iterator[Target]:
    with opener() as opened:
        yield opened


@pytest.fixture
def pmem(tmp_path: Path) -> Iterator[Target]:
    config = PmemConfig(path=str(tmp_path / "pmem"), create_if_missing_with_size=QUOTA)
    with opening.open_pmem(config) as opened:
        yield opened


def call(target: Target, name: str, *arguments: Any) -> Any:
    return CALLS[name](target, *arguments)


def sparse(target: Target, size: int = TIB) -> RegionID:
    region = target.create(0)
    target.resize(region, size)
    return region


def left(target: Target) -> int:
    return target.room()[1]


def near(found: int, expected: int) -> bool:
    return expected - SLACK <= found <= expected + SLACK


def fill(target: Target) -> RegionID:
    """Use what is left of the quota, but for less than a page."""
    return target.create(left(target))


def test_holes_cost_nothing_until_they_are_written(target: Target) -> None:
    region = sparse(target)
    assert near(left(target), QUOTA)
    target.write(region, TIB // 2, pattern(MIB))
    assert near(left(target), QUOTA - MIB)
    target.write(region, TIB // 2, pattern(MIB, 1))  # the same bytes again
    assert near(left(target), QUOTA - MIB)
    target.write(region, TIB + 5 * MIB, b"x", extend=True)
    assert near(left(target), QUOTA - MIB)
    target.append(region, pattern(MIB))
    assert near(left(target), QUOTA - 2 * MIB)
    other = fill(target)
    for offset in (0, TIB // 2 - 4096, TIB // 2 + 3 * MIB):
        with pytest.raises(errors.StorageFull, match=str(QUOTA)):
            target.write(region, offset, pattern(8192))
    with pytest.raises(errors.StorageFull):
        target.write_vector(region, [(0, 8192), (TIB // 4, 8192)], pattern(16384))
    with pytest.raises(errors.StorageFull):
        target.append(region, pattern(MIB))
    target.write(region, TIB // 2 + 7, pattern(MIB - 7, 2), persist=True)
    assert target.read(region, TIB // 2, MIB) == pattern(MIB, 1)[:7] + pattern(MIB - 7, 2)
    assert target.read(region, 0, 8192) == bytes(8192)
    call(target, "punch_hole", region, TIB // 2, MIB)
    target.write_vector(region, [(0, 400_000), (TIB // 4, 400_000)], pattern(800_000), persist=True)
    target.erase(other)
    target.resize(region, 400_000)
    assert near(left(target), QUOTA - 400_000)
    target.erase(region)
    target.commit()
    assert near(left(target), QUOTA)


@pytest.mark.parametrize("opener", sorted(SPARSE.keys() - {"memory"}), indirect=True)
def test_what_is_used_is_known_after_opening_again(opener: Opener) -> None:
    with opener() as target:
        region = sparse(target)
        target.write(region, TIB // 2, pattern(MIB))
        target.create_and_write(pattern(MIB))
        before = left(target)
    with opener() as target:
        assert left(target) == before
        target.write(region, 0, pattern(4 * MIB))
        with pytest.raises(errors.StorageFull):
            target.write(region, 4 * MIB, pattern(4 * MIB))
        target.erase(region)
        assert near(left(target), QUOTA - MIB)


def test_space_that_was_allocated_is_there_when_the_quota_is_used_up(target: Target) -> None:
    region = sparse(target)
    call(target, "allocate", region, MIB, 2 * MIB)
    assert near(left(target), QUOTA - 2 * MIB)
    call(target, "allocate", region, MIB, 2 * MIB)
    fill(target)
    for name in ("allocate", "zero_range"):
        with pytest.raises(errors.StorageFull):
            call(target, name, region, 0, 8 * MIB)
    call(target, "zero_range", region, MIB, MIB)
    for offset in range(MIB, 3 * MIB, 256 * KIB):
        target.write(region, offset, pattern(256 * KIB, offset))
    assert left(target) < SLACK
    with pytest.raises(errors.StorageFull):
        target.write(region, 3 * MIB, pattern(MIB))
    for offset in range(MIB, 3 * MIB, 256 * KIB):
        assert target.read(region, offset, 256 * KIB) == pattern(256 * KIB, offset)


def test_a_write_that_is_partly_into_allocated_space_leaves_the_quota_right(target: Target) -> None:
    region = sparse(target)
    call(target, "allocate", region, MIB, MIB)
    target.write(region, 8 * MIB, pattern(100))
    fill(target)
    with pytest.raises(errors.StorageFull):
        target.write(region, MIB + 4096, pattern(2 * MIB))
    assert 0 <= left(target) <= MIB + SLACK
    assert target.read(region, 8 * MIB, 100) == pattern(100)
    target.write(region, MIB, pattern(4096))  # not in the extent that failed
    assert left(target) + 4096 <= QUOTA


def test_copies_count_what_they_use(target: Target) -> None:
    region = sparse(target)
    target.write(region, TIB // 2, pattern(MIB))
    copy = call(target, "clone", region)
    assert near(left(target), QUOTA - 2 * MIB)
    other = target.create(0)
    start = TIB // 2 - 100 * MIB
    assert call(target, "copy_range", other, 5, region, start, 200 * MIB) == 200 * MIB
    assert near(left(target), QUOTA - 3 * MIB)
    assert target.read(other, 5 + 100 * MIB, MIB) == target.read(copy, TIB // 2, MIB)
    fill(target)
    regions = target.list()
    with pytest.raises(errors.StorageFull):
        call(target, "clone", region)
    with pytest.raises(errors.StorageFull):
        call(target, "copy_range", other, 0, region, start, 200 * MIB)
    assert target.list() == regions
    target.erase(copy)
    assert call(target, "copy_range", other, 0, region, start, 200 * MIB) == 200 * MIB


def test_imported_regions_count_what_is_written(target: Target) -> None:
    found = call(target, "adopt", RegionID(), TIB)
    assert near(left(target), QUOTA)
    target.write(found.region, TIB // 2, pattern(MIB))
    assert near(left(target), QUOTA - MIB)
    with pytest.raises(errors.StorageFull):
        target.write(found.region, 0, pattern(8 * MIB))


def test_space_beyond_the_end_is_not_allocated(target: Target) -> None:
    region = sparse(target, MIB)
    with pytest.raises(errors.PathError) as refused:
        call(target, "allocate", region, 0, 2 * MIB, True)
    assert refused.value.errno == errno.EOPNOTSUPP
    call(target, "allocate", region, 0, MIB, True)
    assert near(left(target), QUOTA - MIB)


def test_concurrent_writes_into_holes_stay_within_the_quota(target: Target) -> None:
    piece, count = 64 * KIB, 4
    regions = [sparse(target) for _ in range(2)]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(60):
                region = regions[step % 2]
                target.write(region, (number * 60 + step) * 3 * piece, pattern(piece))
                if step % 7 == 6:
                    call(target, "punch_hole", region, (number * 60 + step) * 3 * piece, piece)
        except errors.StorageFull:
            pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures
    # The check and the write of another region are two steps.
    assert -count * piece <= QUOTA - target.sizes.used < 2 * MIB
    used = sum(call(target, "getattr", region.slot).space for region in regions)
    assert target.sizes.used == used


def test_persistent_memory_is_reserved_and_given_back(pmem: Target) -> None:
    region = pmem.create(MIB)
    for change in (
        lambda: pmem.resize(region, QUOTA + 1),
        lambda: pmem.write(region, QUOTA, b"x", extend=True),
        lambda: call(pmem, "adopt", RegionID(), QUOTA),
    ):
        with pytest.raises(errors.StorageFull):
            change()
    pmem.resize(region, 6 * MIB)
    assert left(pmem) == QUOTA - 6 * MIB
    call(pmem, "punch_hole", region, 0, 4 * MIB)
    assert near(left(pmem), QUOTA - 2 * MIB)
    other = fill(pmem)
    with pytest.raises(errors.StorageFull):
        pmem.write(region, 0, pattern(MIB))
    pmem.erase(other)
    pmem.write(region, 0, pattern(4 * MIB))
    assert near(left(pmem), QUOTA - 6 * MIB)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_processes_with_direct_access_stay_within_the_quota(tmp_path: Path, kind: str) -> None:
    config = file_config(tmp_path / "target")
    if kind == "memory":
        config["target"] = {"type": "memory", "config": {}}
    config["target"]["config"]["capacity"] = QUOTA
    with provider_process("na+sm", config) as served, Engine("na+sm", client) as engine:
        handle = Client(engine).make_target_handle(served.address, 1)
        region = handle.create(MIB)
        handle.write(region, 0, pattern(MIB))  # by direct access
        handle.resize(region, 64 * MIB)
        handle.write(region, 2 * MIB, pattern(2 * MIB))
        assert near(handle._link.call("room")[1], QUOTA - 3 * MIB)
        with pytest.raises(errors.StorageFull):
            for offset in range(4 * MIB, 64 * MIB, MIB):
                handle.write(region, offset, pattern(MIB))
        assert 0 <= handle._link.call("room")[1] < MIB + SLACK
        handle.punch_hole(region, 0, MIB)
        handle.write(region, 32 * MIB, pattern(MIB, 2))
        with pytest.raises(errors.StorageFull):
            handle.write(region, 0, pattern(2 * MIB))
        assert handle.read(region, 32 * MIB, MIB) == pattern(MIB, 2)
