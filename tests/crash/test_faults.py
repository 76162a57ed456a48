"""I/O errors, injected at every system call on storage; targets stay consistent."""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.crash import faults
from tests.crash.faults import MODULES, MSYNC, SYNCFS, SYNCS, Injector, Site, fails, short
from tests.crash.oracle import Found, Oracle
from tests.crash.targets import accounted, opened
from tests.crash.workload import REGION_KINDS, next_op, on_target, promised_times
from tests.support.helpers import PATIENCE, environment, open_memory
from warabi import errors
from warabi.backends import file
from warabi.backends.file import FileStorage
from warabi.backends.memory import OWN_DESCRIPTOR
from warabi.backends.pmem import PmemStorage
from warabi.backends.xattr_times import Times
from warabi.metadata import journal
from warabi.region import RegionID
from warabi.target.config import MemoryConfig
from warabi.target.target import Target

OPERATIONS = 60


@pytest.fixture
def injector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Injector]:
    monkeypatch.setattr(journal, "_CHECKPOINT", 40)  # pages: there are some in each life
    with faults.injector() as made:
        yield made


def attempt(backend: str, path: Path, seed: int, injector: Injector) -> errors.Exception | None:
    """A life of a target: made, worked on, closed.  Ends with the first failure, which it gives."""
    oracle = Oracle()
    try:
        target = opened(backend, path)
    except errors.Exception as error:
        injector.site = None
        opened(backend, path).close()  # nothing stands in the way of another try
        return error
    with contextlib.closing(target):
        failure = work(target, oracle, random.Random(seed), injector)
        try:
            target.close()
        except errors.Exception as error:
            failure = failure or error
    injector.site = None
    with opened(backend, path) as target:
        found = on_target(target).look()
        check(oracle, found)
        accounted(path, target, found.regions)
        assert target._catalogue.used == sum(map(len, found.regions.values()))
    return failure


MANY = b"many" * 2000  # bytes that are not in packs


def work(
    target: Target, oracle: Oracle, rng: random.Random, injector: Injector
) -> errors.Exception | None:
    """Operations up to the first that fails, and how."""
    surface = on_target(target)
    storage: Any = getattr(target._storage, "_inner", target._storage)
    getattr(storage, "_files", storage)._limit = 8  # descriptors are let go of
    try:
        for _ in range(OPERATIONS):
            op = next_op(rng, oracle, REGION_KINDS)
            region = oracle.regions.get(op.key)
            oracle.begin(op)
            rid = region.rid if region else None
            made = surface.run(op, rid)
            oracle.end(op, made, promised_times(op, surface, rid))
        many(target)
        found = surface.look()
    except errors.Exception as error:
        check(oracle, surface.look())  # all else can be read
        if injector.site and injector.site.call in SYNCS and "persist region" in str(error):
            again(target, error)
        return error
    check(oracle, found)
    return None


def check(oracle: Oracle, found: Found) -> None:
    """Compare with the oracle what is not of :func:`many`."""
    known = {region.rid for region in oracle.regions.values()} | set(found.names.values())
    regions = {
        rid: data
        for rid, data in found.regions.items()
        if rid in known or data not in (MANY, bytes(len(MANY)), b"")
    }
    oracle.check(found._replace(regions=regions))


def many(target: Target) -> None:
    """More than is synced file by file; some go again."""
    regions = [target.create_and_write(MANY) for _ in range(50)]
    target.sync()
    for region in regions[:45]:
        target.erase(region)
    target.commit()


def again(target: Target, error: errors.Exception) -> None:
    """A persist after a failed one fails, and says what to do."""
    rid = str(error).split("persist region ")[1][:32]
    for region in target.list():
        if region.hex() == rid:
            with pytest.raises(errors.Exception, match=f"{rid}.*Write it to a new region"):
                target.persist(region, 0, target.size(region))


def reached(backend: str, place: Path, injector: Injector) -> dict[Site, int]:
    """How often each call is made in such a life."""
    injector.arm(Site("", 0, ""), 1, short)
    assert attempt(backend, place / "counted", 1, injector) is None
    return dict(injector.seen)


ALL = sorted({*(site for module in MODULES for site in faults.sites(module)), MSYNC, SYNCFS})
UNREACHED = {
    ("warabi._core.fileio", "pwrite"): "goes on after a short write",
    ("warabi.backends.file", "scandir"): "after a crash, for which there is a test of its own",
    # Of regions that other processes map, which are replaced rather than resized
    ("warabi.backends.file", "fsync"): "a region's new file",
    ("warabi.backends.file", "rename"): "a region's new file",
    ("warabi._core.fileio", "copy_file_range"): "into a region's new file",
    ("warabi.backends.file", "open"): "a region's new file, and the descriptor to share",
    ("warabi.backends.file", "fstat"): "how much is to be copied",
    ("warabi._core.fileio", "pread"): "copies where the kernel does not",
    ("warabi.backends.file", "unlink"): "takes back a region that could not be made",
    ("warabi.backends.file", "ftruncate"): "takes back what could not be allocated",
    ("warabi.backends.pmem", "ftruncate"): "takes back what could not be reserved",
    ("warabi.backends.pmem", "fdatasync"): "with libpmem only",
    ("warabi.backends.xattr_times", "getxattr"): "after a crash, and for a region's new file",
    ("warabi.backends.packed", "fstat"): "after a crash",
    ("warabi.backends.pack_format", "pread"): "after a crash",
    ("warabi.target.opening", "statvfs"): "of catalogues on another system",
    ("warabi.target.lockfile", "pread"): "reads who has the target open, when somebody does",
}
SILENT = {("journal", "close"), ("file", "unlink"), ("opening", "fstat"), ("lockfile", "ftruncate"),
          ("lockfile", "pwrite"), ("journal", "pread"), ("journal", "pwrite"),
          ("xattr_times", "setxattr")}  # fmt: skip
"""Nobody waits for these, or they are tried again, or there is another way."""


@pytest.fixture(params=["file", "loose", "pmem", "direct", "summed"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(backend: str, scratch: Path, tmp_path: Path) -> Path:
    """Where targets are made; direct I/O is not possible everywhere."""
    return tmp_path if backend == "direct" else scratch


def test_a_fault_at_every_call(backend: str, place: Path, injector: Injector) -> None:
    """The operation fails with an error of the library and nothing else is harmed by it."""
    counts = reached(backend, place, injector)
    number = 0
    silent = []
    for site, count in sorted(counts.items()):
        for fault in (errno.EIO, errno.ENOSPC):
            for when in sorted({1, (count + 2) // 3}):
                number += 1
                injector.arm(site, when, fails(fault))
                path = place / f"{number}"
                try:
                    failure = attempt(backend, path, 1, injector)
                    hit = injector.hit
                except BaseException as error:
                    error.add_note(f"{errno.errorcode[fault]} at call {when} of {site}")
                    raise
                assert hit, (site, when)
                if failure is None:
                    silent.append((site.module.rpartition(".")[2], site.call))
                elif fault == errno.ENOSPC and site.call not in SYNCS:
                    assert isinstance(failure, errors.StorageFull), (site, failure)
                else:
                    expected = errors.StorageError, errors.StorageFull
                    assert isinstance(failure, expected), (site, failure)
    # What may fail unnoticed: nobody waits for it, or it is tried again.
    packs = {("fileio", "pwrite")} if backend in ("file", "summed") else set()
    assert set(silent) <= SILENT | packs, silent  # what is cut off is looked at before growth, too
    print(f"{backend}: {number} faults at {len(counts)} call sites")


REPLACING = {"open", "fstat", "ftruncate", "posix_fallocate", "getxattr", "setxattr", "fsync",
             "rename"}  # fmt: skip


@pytest.mark.parametrize("kind", [FileStorage, PmemStorage])
def test_a_fault_while_a_region_gets_another_file(
    scratch: Path, injector: Injector, kind: type[FileStorage]
) -> None:
    """As when another process may still be writing to the one it has."""
    storage = kind(scratch)
    rid, data = RegionID.from_parts(2, 3), random.Random(1).randbytes(50_000)
    storage.create(rid, len(data))
    storage.write(rid, 0, memoryview(data))
    times = Times(1, 2)
    assert storage.keep_times(rid, times)

    def content(size: int) -> bytes:
        place = bytearray(size)
        storage.read_into(rid, 0, memoryview(place))
        return bytes(place)

    injector.arm(Site("", 0, ""), 1, short)
    storage.replace(rid, 60_000)
    sites = sorted(injector.seen)
    assert content(60_000) == data + bytes(10_000)
    assert {site.call for site in sites} >= REPLACING - {"ftruncate", "posix_fallocate"}
    for site in sites:
        for fault in (errno.EIO, errno.ENOSPC):
            storage.resize(rid, 50_000)
            storage.write(rid, 0, memoryview(data))
            injector.arm(site, 1, fails(fault))
            failed = False
            try:
                storage.replace(rid, 60_000)
            except errors.Exception:
                failed = True
            assert injector.hit, site
            injector.site = None
            size = 50_000 if failed else 60_000
            assert content(size) == data + bytes(size - 50_000)
            assert storage.kept_times(rid) == times
            if site.call == "fsync" and not failed:  # of the directory
                with pytest.raises(errors.StorageError, match="Write it to a new region"):
                    storage.persist(rid, 0, size)
            storage.failed.clear()
            assert [path.name for path in scratch.rglob("*") if path.is_file()] == [rid.hex()]
    storage.close()


def test_every_call_is_reached(tmp_path: Path, injector: Injector) -> None:
    found: set[Site] = set()
    for backend in ("file", "loose", "pmem", "direct"):
        (tmp_path / backend).mkdir()
        found |= set(reached(backend, tmp_path / backend, injector))
    missing = {(site.module, site.call, site.line) for site in ALL if site not in found}
    assert {key[:2] for key in missing} <= UNREACHED.keys(), missing


def test_short_reads_and_writes(backend: str, place: Path, injector: Injector) -> None:
    """They are gone on with."""
    for site, count in sorted(reached(backend, place, injector).items()):
        if site.call in ("pwrite", "preadv") and site.module.startswith("warabi.backends"):
            for when in range(1, min(count, 4) + 1):
                injector.arm(site, when, short)
                path = place / f"{site.line}-{when}"
                assert attempt(backend, path, 1, injector) is None
                assert injector.hit


def test_a_directory_that_cannot_be_read_when_a_target_recovers(
    tmp_path: Path, injector: Injector
) -> None:
    with opened("file", tmp_path / "first" / "a") as target:
        region = target.create_and_write(b"kept", persist=True)
        shutil.copytree(tmp_path / "first", tmp_path / "copy")  # as a crash leaves it
    (site,) = (s for s in faults.sites(file) if s.call == "scandir" and s.line > 200)
    injector.arm(site, 1, fails(errno.EIO))
    with pytest.raises(errors.StorageError):
        opened("file", tmp_path / "copy" / "a")
    injector.site = None
    with opened("file", tmp_path / "copy" / "a") as target:
        assert target.read(region, 0, 4) == b"kept"


# What cannot be made good is remembered


def fsync_of(module: ModuleType, call: str) -> Site:
    found = [site for site in faults.sites(module) if site.call == call]
    return max(found)  # that of a persist


def test_a_failed_sync_of_the_file_system_is_remembered(tmp_path: Path, injector: Injector) -> None:
    target = opened("file", tmp_path / "a")
    kept = target.create_and_write(b"kept", persist=True)
    regions = [target.create_and_write(b"lost" * 2000) for _ in range(40)]
    injector.arm(SYNCFS, 1, fails(errno.EIO))
    with pytest.raises(errors.StorageError, match="sync"):
        target.sync()
    for _ in range(2):
        for region in regions[::13]:
            with pytest.raises(errors.StorageError, match=f"{region.hex()}.*to a new region"):
                target.persist(region, 0, 4)
    target.persist(kept, 0, 4)
    target.create_and_write(b"new", persist=True)
    with pytest.raises(errors.StorageError, match="to a new region"):
        target.close()
    with opened("file", tmp_path / "a") as target:
        assert target.read(kept, 0, 4) == b"kept"


def test_a_region_that_was_lost_and_erased_is_forgotten(tmp_path: Path, injector: Injector) -> None:
    with opened("file", tmp_path / "a") as target:
        region = target.create_and_write(b"lost")
        injector.arm(fsync_of(file, "fdatasync"), 1, fails(errno.EIO))
        with pytest.raises(errors.StorageError, match="to a new region"):
            target.persist(region, 0, 4)
        target.erase(region)  # closing has nothing to complain of


def test_a_failed_sync_of_a_directory_is_remembered(tmp_path: Path, injector: Injector) -> None:
    """Of all regions that were new in it, and of a new directory for as long as it lasts."""
    storage = FileStorage(tmp_path)
    with contextlib.closing(storage):
        first, second, third = (RegionID.from_parts(n, 5) for n in (1, 2, 3))
        for region in (first, second):
            storage.create(region, 4)
        injector.arm(fsync_of(journal, "fsync"), 1, fails(errno.EIO))
        for region in (first, second, first):
            with pytest.raises(errors.StorageError, match=f"{region.hex()}.*to a new region"):
                storage.persist(region, 0, 4)
        storage.create(third, 4)
        with pytest.raises(errors.StorageError, match="to a new region"):
            storage.persist(third, 0, 4)  # its directory's name may be lost
        other = RegionID.from_parts(4, 6)
        storage.create(other, 4)
        storage.persist(other, 0, 4)
        assert storage.oldest_fresh() == first


def test_a_failed_sync_of_the_catalogue_is_remembered(tmp_path: Path, injector: Injector) -> None:
    target = opened("file", tmp_path / "a")
    kept = target.create_and_write(b"kept", persist=True)
    injector.arm(fsync_of(journal, "fdatasync"), 1, fails(errno.EIO))
    for _ in range(2):
        with pytest.raises(errors.StorageError, match="Close the target, check the storage"):
            target.create_and_write(b"lost", persist=True)
    with pytest.raises(errors.StorageError, match="Close the target, check the storage"):
        target.persist(kept, 0, 4)
    with pytest.raises(errors.StorageError, match="Close the target, check the storage"):
        target.fsync(kept)
    assert target.read(kept, 0, 4) == b"kept"
    with pytest.raises(errors.StorageError, match="Close the target, check the storage"):
        target.close()
    with opened("file", tmp_path / "a") as target:
        assert target.read(kept, 0, 4) == b"kept"


@pytest.mark.parametrize("call", ["pwrite64", "preadv", "ftruncate", "fsync"])
def test_interrupted_calls_are_made_again(call: str, tmp_path: Path) -> None:
    """Also those to SQLite's files; SQLite asks for ``fdatasync`` once, the kernel does not
    interrupt it on a disk."""
    script = """
import sys
from tests.crash.targets import opened
for i in range(2):
    with opened("file", sys.argv[1]) as target:
        region = target.create_and_write(b"x" * 5000, persist=True)
        target.resize(region, 9000)
        assert target.read(region, 0, 9000) == b"x" * 5000 + bytes(4000)
"""
    done = subprocess.run(
        ["strace", "-f", "-o", "/dev/null", "-e", f"trace={call}",
         "-e", f"inject={call}:error=EINTR:when=1+2", sys.executable, "-c", script,
         str(tmp_path / "a")],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_slow_disk_delays_persists_only(tmp_path: Path, injector: Injector) -> None:
    """And nobody else, whatever it does with whichever region."""
    slow, waiting = threading.Event(), threading.Event()

    def stall(call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        waiting.set()
        assert slow.wait(PATIENCE)
        return call(*args, **options)

    with opened("file", tmp_path / "a") as target:
        region = target.create_and_write(b"first")
        for module in (file, journal):
            slow.clear()
            waiting.clear()
            injector.arm(fsync_of(module, "fdatasync"), 1, stall)
            target.write(region, 0, b"other")
            target.namespace.link_name(region, f"/{module.__name__}")
            thread = threading.Thread(target=target.persist, args=(region, 0, 5))
            thread.start()
            try:
                assert waiting.wait(PATIENCE)
                target.write(region, 0, b"again")
                assert target.read(region, 0, 5) == b"again"
                target.erase(target.create_and_write(b"more"))
                target.namespace.link_name(region, f"/more {module.__name__}")
                assert len(target.list()) == 1
                assert thread.is_alive()
            finally:
                slow.set()
                thread.join(PATIENCE)


# A full disk


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "small", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("backend", ["file", "pmem"])
def test_a_full_disk(backend: str, small: Path) -> None:
    """Fails what hits it, leaves the rest readable, and is forgotten when there is room."""
    path = small / "a"
    with opened(backend, path) as target:
        surface = on_target(target)
        kept = {target.create_and_write(b"%04d" % i, persist=True): b"%04d" % i for i in range(5)}
        filler = target.create(0)
        with pytest.raises(errors.StorageFull):
            for offset in range(0, 4 << 20, 4096):
                target.write(filler, offset, b"f" * 4096, extend=True)
        full = target.size(filler)
        catalogue = ""
        for i in range(3000):  # until the catalogue, too, needs more
            name = f"/{i} {'n' * 200}"
            target.namespace.link_name(next(iter(kept)), name)
            if i % 50 == 0:
                try:
                    target.commit()
                except errors.StorageFull as error:
                    catalogue = str(error)
                    break
        assert catalogue.startswith("catalogue"), catalogue
        with pytest.raises(errors.StorageFull):
            target.create_and_write(b"x" * 4096, persist=True)
        found = surface.look()
        assert {rid: found.regions[rid] for rid in kept} == kept
        assert len(found.names) == i + 1  # no name was forgotten
        assert target.size(filler) == full
        target.resize(filler, 0)  # there is room again
        target.commit()
        kept[target.create_and_write(b"late", persist=True)] = b"late"
        shutil.copytree(small, small.parent / "copy")  # as a crash would leave it
    for left in (small, small.parent / "copy"):
        with opened(backend, left / "a") as target:
            found = on_target(target).look()
            assert found.regions == {**kept, filler: b""}
            assert target.namespace.open_name(name) == next(iter(kept))


@pytest.mark.parametrize("size", [100, 70_000, 200_000])
@pytest.mark.parametrize("call", ["memfd_create", "ftruncate", "pwrite"])
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOSPC])
def test_memory_allocation_failures(
    monkeypatch: pytest.MonkeyPatch, size: int, call: str, number: int
) -> None:
    """What asks for it fails, the rest is as it was, and the next one succeeds."""

    def refuse(*_: object) -> None:
        raise OSError(number, "no memory")

    with open_memory(MemoryConfig()) as target:
        kept = target.create_and_write(b"kept" * 20_000)
        full = None
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{call}", refuse)
            try:
                target.create_and_write(bytes(size))
            except errors.StorageFull as error:
                full = error
        # Small regions are written through a mapping.
        assert (full is None) == (call == "pwrite" and size < OWN_DESCRIPTOR)
        assert target.read(kept, 0, 80_000) == b"kept" * 20_000
        assert target._catalogue.used == 80_000 + (size if full is None else 0)
        again = target.create_and_write(b"x" * size)
        assert target.read(again, 0, size) == b"x" * size
