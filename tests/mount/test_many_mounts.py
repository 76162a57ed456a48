"""Several mounts of one tree: operations on names are atomic across them, and a killed mount leaves
nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import disposable, limit_of
from tests.mount.support import MIB, mounting, serving, wait_until
from tests.mount.together import OPTIONS, Together, emptied, erased, region_of, together
from warabi.region import RegionID

_EXCHANGE = 2
_AT_FDCWD = -100


@pytest.fixture(scope="module")
def both_module() -> Iterator[Together]:
    with disposable("/tmp") as path, together("na+sm", path, *OPTIONS) as four:
        yield four


@pytest.fixture
def both(request: pytest.FixtureRequest, both_module: Together) -> Iterator[Together]:
    """Two mounts as they are by default."""
    with emptied(both_module, limit_of(request)) as four:
        yield four


def paths(both: Together) -> list[Path]:
    return [both.first.path, both.second.path]


def race(*work: Callable[[], object]) -> None:
    """Run all at once, each in a thread of its own; raises the first error of one."""
    failures: list[BaseException] = []
    ready = threading.Barrier(len(work))

    def guarded(one: Callable[[], object]) -> None:
        try:
            ready.wait()
            one()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def winners(both: Together, attempt: Callable[[Path, int], object], refused: set[int]) -> None:
    """Two threads on each mount try *attempt* with the numbers 0 to 49; each succeeds once."""
    won: Counter[int] = Counter()
    lock = threading.Lock()

    def run(path: Path) -> None:
        for number in range(50):
            try:
                attempt(path, number)
            except OSError as error:
                if error.errno not in refused:
                    raise
            else:
                with lock:
                    won[number] += 1

    race(*(lambda path=path: run(path) for path in paths(both) * 2))
    assert won == dict.fromkeys(range(50), 1)


def exchange(one: Path, two: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(one), os.fsencode(two))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def test_one_of_many_makes_a_file(both: Together) -> None:
    def attempt(path: Path, number: int) -> None:
        os.close(os.open(path / f"file{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))

    winners(both, attempt, {errno.EEXIST})
    assert len(os.listdir(both.first.path)) == len(os.listdir(both.second.path)) == 50


def test_one_of_many_makes_a_directory_and_one_removes_it(both: Together) -> None:
    winners(both, lambda path, number: (path / f"dir{number}").mkdir(), {errno.EEXIST})
    winners(both, lambda path, number: (path / f"dir{number}").rmdir(), {errno.ENOENT})
    assert os.listdir(both.first.path) == os.listdir(both.second.path) == []


def test_one_of_many_links_and_one_unlinks(both: Together) -> None:
    (both.first.path / "file").write_bytes(b"data")
    region = region_of(both.first.path / "file")
    winners(
        both,
        lambda path, number: os.link(path / "file", path / f"link{number}"),
        {errno.EEXIST, errno.ENOENT},
    )
    wait_until(lambda: (both.second.path / "file").stat().st_nlink == 51, "the link count")
    winners(both, lambda path, number: (path / f"link{number}").unlink(), {errno.ENOENT})
    assert os.listdir(both.first.path) == ["file"]
    assert both.target.stat(region).names == ["/file"]
    assert (both.second.path / "file").read_bytes() == b"data"


def test_one_of_many_moves_a_file(both: Together) -> None:
    for number in range(50):
        (both.first.path / f"from{number}").touch()

    def attempt(path: Path, number: int) -> None:
        # To a name of its own: where the kernel finds one file under both names, it says that all
        # is done.
        os.rename(path / f"from{number}", path / f"to{number}-{threading.get_ident()}")

    winners(both, attempt, {errno.ENOENT})
    found = sorted(name.partition("-")[0] for name in os.listdir(both.second.path))
    assert found == sorted(f"to{number}" for number in range(50))


def test_a_directory_is_not_removed_while_another_fills_it(both: Together) -> None:
    """Either the directory goes, or what was made in it stays."""
    first, second = paths(both)
    kept = 0
    for number in range(40):
        (first / f"dir{number}").mkdir()
        made: list[bool] = []

        def fill(name: Path = second / f"dir{number}" / "file", made: list[bool] = made) -> None:
            with contextlib.suppress(FileNotFoundError):
                name.touch()
                made.append(True)

        def remove(name: Path = first / f"dir{number}") -> None:
            with contextlib.suppress(OSError):
                name.rmdir()

        race(fill, remove)
        assert (first / f"dir{number}" / "file").exists() == bool(made)
        kept += bool(made)
    assert len(os.listdir(first)) == kept


def test_an_exchange_is_never_seen_half_done(both: Together) -> None:
    first, second = paths(both)
    (first / "one").write_bytes(b"1")
    (first / "two").write_bytes(b"2")
    regions = {region_of(first / name) for name in ("one", "two")}
    done = threading.Event()
    seen: set[frozenset[RegionID]] = set()

    def swap(path: Path) -> None:
        for _ in range(150):
            exchange(path / "one", path / "two")

    def swap_all() -> None:
        try:
            race(lambda: swap(first), lambda: swap(second))
        finally:
            done.set()

    def look() -> None:
        while not done.is_set():
            names = set(os.listdir(first))
            assert names == {"one", "two"}
            seen.add(frozenset(both.target.open_name(f"/{name}") for name in ("one", "two")))

    race(swap_all, look)
    # Two questions, between which they may be exchanged, so one region may be seen twice.
    assert all(found <= regions for found in seen)
    assert {region_of(second / name) for name in ("one", "two")} == regions
    assert {(second / name).read_bytes() for name in ("one", "two")} == {b"1", b"2"}


def test_a_file_that_is_replaced_is_never_missing_and_never_torn(both: Together) -> None:
    first, second = paths(both)
    (first / "file").write_bytes(b"0" * 5000)
    done = threading.Event()

    def replace() -> None:
        try:
            for number in range(150):
                (first / "new").write_bytes(b"%d" % (number % 10) * 5000)
                os.rename(first / "new", first / "file")
        finally:
            done.set()

    def read() -> None:
        while not done.is_set():
            try:
                data = (second / "file").read_bytes()
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                # Replaced between finding and opening it, twice: the kernel tries again once.
            else:
                assert len(data) == 5000
                assert len(set(data)) == 1

    race(replace, read, read)


def test_what_one_renames_is_seen_by_the_other(both: Together) -> None:
    first, second = paths(both)
    (first / "directory").mkdir()
    (first / "directory" / "file").write_bytes(b"data")
    assert (second / "directory" / "file").read_bytes() == b"data"
    os.rename(first / "directory", first / "moved")
    assert (second / "moved" / "file").read_bytes() == b"data"  # a new name at once
    wait_until(lambda: not (second / "directory").exists(), "the end of the old name")


def test_a_hard_link_that_another_mount_removed_does_not_keep_the_region(both: Together) -> None:
    first, second = paths(both)
    (first / "file").write_bytes(bytes(MIB))
    region = region_of(first / "file")
    os.link(first / "file", first / "twin")  # the kernel of the first knows both
    (second / "twin").unlink()
    (first / "file").unlink()
    wait_until(lambda: erased(both.target, region), "the end of the region")


# Who dies


def close_dead(fd: int) -> None:
    """Close a file of a mount that is dead: the request that ends its locks has no reply."""
    with pytest.raises(OSError, match=r"not connected|abort"):
        os.close(fd)


def held(path: Path) -> tuple[int, RegionID]:
    """An open file without a name, and its region."""
    path.write_bytes(bytes(MIB))
    region = region_of(path)
    fd = os.open(path, os.O_RDWR)
    path.unlink()
    return fd, region


def test_a_dead_mount_keeps_no_region(place: Path) -> None:
    room = {"type": "memory", "config": {"capacity": 8 * MIB}}  # that nobody else uses
    for name in ("other", "dies"):
        (place / name).mkdir()
    with (
        serving("na+sm", room) as provider,
        mounting(provider.address, place / "other", *OPTIONS) as other,
        mounting(provider.address, place / "dies", *OPTIONS) as dies,
    ):
        empty = os.statvfs(other.path).f_bavail
        fd, _ = held(dies.path / "file")
        assert os.statvfs(other.path).f_bavail < empty
        dies.kill()
        wait_until(lambda: os.statvfs(other.path).f_bavail == empty, "free memory")
        close_dead(fd)


def test_an_open_file_survives_the_death_of_another_mount(both: Together, place: Path) -> None:
    with mounting(both.provider.address, place, *OPTIONS) as third:
        (third.path / "file").write_bytes(b"kept")
        with open(both.first.path / "file", "r+b", buffering=0) as kept:
            fd = os.open(third.path / "file", os.O_RDONLY)
            region = region_of(third.path / "file")
            (third.path / "file").unlink()
            third.kill()
            close_dead(fd)
            other, gone = held(both.second.path / "other")  # ends after the dead one's connection
            os.close(other)
            wait_until(lambda: erased(both.target, gone), "the end of another region")
            assert os.pread(kept.fileno(), 10, 0) == b"kept"
            os.pwrite(kept.fileno(), b"K", 0)
            assert both.target.read(region, 0, 4) == b"Kept"
        wait_until(lambda: erased(both.target, region), "the end of the region")


def test_a_mount_that_dies_in_the_middle_leaves_a_whole_tree(both: Together, place: Path) -> None:
    """Half of a rename, or of a file with a name and no region, is never seen."""
    with mounting(both.provider.address, place, *OPTIONS) as third:
        done = threading.Event()

        def churn() -> None:
            with contextlib.suppress(OSError):
                for number in range(100_000):
                    (third.path / "new").write_bytes(b"x" * 1000)
                    os.rename(third.path / "new", third.path / f"file{number % 5}")
                    if number > 20:
                        done.set()

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            fd, last = held(third.path / "held")
            assert done.wait(60)
            third.kill()
            close_dead(fd)
            wait_until(lambda: erased(both.target, last), "the end of its connection")
        finally:
            thread.join()
        for path in paths(both):
            for name in os.listdir(path):
                assert region_of(path / name) == both.target.open_name(f"/{name}")
                if name != "new":
                    assert (path / name).read_bytes() == b"x" * 1000
