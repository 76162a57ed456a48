"""``sync`` during a persist, or after a failed one, covers its data, too."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.storage.test_checksums import open_target
from tests.support.helpers import eventually
from warabi import errors
from warabi._core import syscalls
from warabi.backends.range_flush import FlushMapping, PageCacheMapping
from warabi.region import RegionID
from warabi.target.target import Target

SIZE = 1 << 20
PATIENCE = 30.0


@pytest.fixture(params=["file", "pmem"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    with open_target(request.param, tmp_path / "target") as target:
        yield target


@pytest.fixture
def region(target: Target) -> RegionID:
    """A region whose file is known, so that only its bytes are to be flushed."""
    region = target.create(SIZE)
    target.write(region, 0, b"-" * SIZE, persist=True)
    target.sync()
    return region


@contextmanager
def each_flush(monkeypatch: pytest.MonkeyPatch, begin: Callable[[], None]) -> Iterator[None]:
    """Call *begin* before each flush of a file's bytes, by whatever system call."""
    with monkeypatch.context() as patch:
        for owner, name in [
            (os, "fsync"),
            (os, "fdatasync"),
            (syscalls, "syncfs"),
            (FlushMapping, "flush"),
            (PageCacheMapping, "flush"),
        ]:
            real = getattr(owner, name)

            def flush(*args: object, _real: Callable[..., None] = real, **named: object) -> None:
                begin()
                _real(*args, **named)

            patch.setattr(owner, name, flush)
        yield


@pytest.mark.parametrize("first", ["persist", "sync"])
@pytest.mark.parametrize("others", [0, 100], ids=["one by one", "the file system"])
def test_a_flush_under_way(
    target: Target, region: RegionID, first: str, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ``sync`` that returns before that flush would promise what is not there yet."""
    target.write(region, 0, b"x" * SIZE)
    many = [target.create_and_write(b"y" * 8192) for _ in range(others)]
    begun, go_on = threading.Event(), threading.Event()
    flushed: list[int] = []

    def begin() -> None:
        flushed.append(threading.get_ident())
        if len(flushed) == 1:
            begun.set()
            assert go_on.wait(PATIENCE)

    with each_flush(monkeypatch, begin), ThreadPoolExecutor(2) as pool:
        if first == "persist":
            slow = pool.submit(target.persist, region, 0, SIZE)
        else:
            slow = pool.submit(target.sync)
        try:
            assert begun.wait(PATIENCE)
            assert many or first == "sync" or len(flushed) == 1
            second = pool.submit(target._storage.persist_all)
            eventually(lambda: len(set(flushed)) == 2 or second.done(), PATIENCE)
            assert len(set(flushed)) == 2, "it took the flush that was under way for its own"
        finally:
            go_on.set()
        second.result(PATIENCE)
        slow.result(PATIENCE)
    flushed.clear()
    with each_flush(monkeypatch, lambda: flushed.append(0)):
        target._storage.persist_all()
    assert not flushed, "nothing is dirty any more"


def test_a_persist_for_which_there_is_no_descriptor(
    target: Target, region: RegionID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It flushed nothing, so that the bytes are still for a later ``sync`` to flush."""
    target.write(region, 0, b"x" * SIZE)

    def short() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with each_flush(monkeypatch, short), pytest.raises(errors.StorageError):
        target.persist(region, 0, SIZE)
    flushed: list[int] = []
    with each_flush(monkeypatch, lambda: flushed.append(0)):
        target._storage.persist_all()
    assert flushed


def test_an_erased_region_is_not_flushed_for_ever(
    target: Target, region: RegionID, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.write(region, 0, b"x" * SIZE)
    target.erase(region)
    for _ in range(2):  # The files are removed once the catalogue is durable.
        target.sync()
    flushed: list[int] = []
    with each_flush(monkeypatch, lambda: flushed.append(0)):
        target._storage.persist_all()
    assert not flushed
