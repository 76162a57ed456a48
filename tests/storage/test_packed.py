"""Small regions that share files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import inspect
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.crash.faults import Injector, Site, fails, injector, sites
from tests.crash.targets import accounted
from tests.maintenance.test_fsck import edit, fsck
from tests.support.helpers import (
    environment,
    eventually,
    file_config,
    pattern,
    provider_process,
    run_python,
)
from warabi import errors
from warabi._core import fileio
from warabi.backends import file as storage
from warabi.backends import packed
from warabi.backends.fd_cache import Borrowed
from warabi.backends.pack_format import PACK, SLOT, SLOTS, is_pack, pack_of
from warabi.backends.packed import PackedStorage
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.metadata import journal
from warabi.metadata.inode import MOVED, OWN, PACKED
from warabi.region import RegionID
from warabi.shm.layout import METADATA_DURABLE
from warabi.target import opening
from warabi.target.config import FileConfig
from warabi.target.target import Target


def opened(path: Path, **settings: Any) -> Target:
    return opening.open_file(FileConfig(path=str(path), create_if_missing=True, **settings))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "target"


@pytest.fixture
def faults() -> Iterator[Injector]:
    with injector() as made:
        yield made


def files(path: Path) -> tuple[list[Path], list[Path]]:
    """Packs, and regions' own files."""
    found = [p for p in Path(f"{path}.regions").rglob("*") if len(p.name) == 32]
    packs = [p for p in found if is_pack(RegionID(bytes.fromhex(p.name)))]
    return sorted(packs), sorted(set(found) - set(packs))


def pack_file(path: Path, region: RegionID) -> Path:
    name = pack_of(region.slot).hex()
    return Path(f"{path}.regions", name[-2:], name)


def place(target: Target, region: RegionID) -> int:
    inode = target._catalogue.region(region)
    assert inode is not None
    return inode.packed


def contents(target: Target) -> dict[RegionID, bytes]:
    return {region: target.read(region, 0, target.size(region)) for region in target.regions()}


def crashed(path: Path) -> Path:
    """A copy of a target as it is now, which is what a killed process leaves."""
    copy = path.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        if file.is_dir():
            shutil.copytree(file, copy / file.name)
        else:
            shutil.copy(file, copy / file.name)
    return copy / path.name


# Who is in a pack


def test_small_nameless_regions_share_files(path: Path) -> None:
    with opened(path) as target:
        small = [target.create_and_write(pattern(n % (SLOT + 1), n)) for n in range(0, 9000, 15)]
        large = target.create_and_write(pattern(SLOT + 1))
        named = target.namespace.mknod(1, b"named", 0o100644, 0, 0, 0).region
        packs, own = files(path)
        assert len(packs) == -(-(len(small) + 2) // SLOTS)
        assert sorted(p.name for p in own) == sorted([large.hex(), named.hex()])
        assert {place(target, r) for r in small} == {PACKED}
        assert all(p.stat().st_size == PACK for p in packs)
        told = contents(target)
    with opened(path) as target:
        assert contents(target) == told
        assert [len(told[r]) for r in small] == [n % (SLOT + 1) for n in range(0, 9000, 15)]


@pytest.mark.parametrize("settings", [{"packed": False}, {"directio": True}])
def test_no_packs_where_they_are_disabled(path: Path, settings: dict[str, Any]) -> None:
    with opened(path, **settings) as target:
        target.create_and_write(b"own")
        assert [len(found) for found in files(path)] == [0, 1]
    with opened(path) as target:
        region = target.create_and_write(b"packed")
        assert place(target, region) == PACKED
    for changed in ({"packed": False}, {"directio": True}, {"sync": True}, {"checksums": True}):
        with opened(path, **changed) as target:  # those that are in packs stay there
            target.write(region, 0, b"PACKED", persist=True)
            assert target.read(region, 0, 6) == b"PACKED"
            assert place(target, region) == PACKED


def test_a_limit_on_the_sizes_of_files(path: Path) -> None:
    """Where a pack would be too large, small regions have files of their own."""
    script = """
import resource, signal, sys
from warabi.target import opening as layout
from warabi.target.config import FileConfig
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
region = target.create_and_write(b"kept")
assert target.read(region, 0, 4) == b"kept"
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
target.close()
"""
    done = run_python(script, str(path))
    assert done.returncode == 0, done.stderr
    assert [len(found) for found in files(path)] == [0, 1]


# Sizes


def test_any_changes_of_size(path: Path) -> None:
    """Neighbours keep their bytes, and what was cut off never comes back."""
    rng = random.Random(5)
    with opened(path) as target:
        told = {target.create_and_write(pattern(50 * n, n)): pattern(50 * n, n) for n in range(60)}
        for step in range(3000):
            region = rng.choice(list(told))
            data = pattern(rng.randrange(200), step)
            match rng.randrange(4):
                case 0:
                    size = rng.choice((0, 1, 100, SLOT, SLOT + 1, rng.randrange(2 * SLOT)))
                    target.resize(region, size)
                    told[region] = told[region][:size].ljust(size, b"\0")
                case 1:
                    start = rng.randrange(SLOT + 100)
                    target.write(region, start, data, extend=True)
                    if data:
                        old = told[region].ljust(start, b"\0")
                        told[region] = old[:start] + data + old[start + len(data) :]
                case 2 if len(told[region]) > len(data):
                    target.write(region, 0, data)
                    told[region] = data + told[region][len(data) :]
                case _ if step % 10 == 0:
                    target.erase(region)
                    del told[region]
                    told[target.create_and_write(data)] = data
        assert contents(target) == told
        assert {place(target, region) for region in told} == {PACKED, MOVED}
    with opened(path) as target:
        assert contents(target) == told
        accounted(path, target, told)


def test_a_region_that_grows_gets_a_file(path: Path) -> None:
    with opened(path) as target:
        region, other = target.create_and_write(b"first" * 100), target.create_and_write(b"other")
        target.persist(region, 0, 500)
        target.write(region, 500, b"x" * SLOT, extend=True)
        assert (place(target, region), place(target, other)) == (MOVED, PACKED)
        assert [p.name for p in files(path)[1]] == [region.hex()]
        told = b"first" * 100 + b"x" * SLOT
        # Its file is on the medium, for what was persisted is to be found wherever it is.
        for left in (crashed(path), path):
            if left == path:
                target.close()
            with opened(left) as again:
                assert again.read(region, 0, len(told)) == told
                assert again.read(other, 0, 5) == b"other"
                assert place(again, region) == MOVED


def _lines(function: Callable[..., Any]) -> range:
    """The lines of a function in its file."""
    lines, first = inspect.getsourcelines(function)
    return range(first, first + len(lines))


def test_growing_out_of_a_pack_fails(path: Path, faults: Injector) -> None:
    """As a whole: the region is what it was, and grows another time."""
    calls = {"open", "pwrite", "preadv", "ftruncate", "rename", "fsync"}
    places = [site for module in (packed, fileio) for site in sites(module) if site.call in calls]
    new = _lines(storage.FileStorage.create_durable)
    files = sites(storage)  # its other syncs are of directories, whose failure is told later
    places += [site for site in files if site.call in calls - {"fsync"}]
    places += [site for site in files if site.call == "fsync" and site.line in new]
    hit = set()
    told = {}
    with opened(path) as target:
        for site in places:
            region = target.create_and_write(b"kept", persist=True)
            name = f"/{site.module}-{site.line}"  # what it was is on the medium nevertheless
            target.namespace.link_name(region, name)
            faults.arm(site, 1, fails(errno.EIO))
            with contextlib.suppress(errors.StorageError):
                target.resize(region, 5000)
            if faults.hit:
                hit.add(site.call)
                assert target.size(region) == 4, site
                assert target.read(region, 0, 4) == b"kept"
            faults.site = None
            target.resize(region, 6000)
            assert place(target, region) == MOVED
            told[region] = b"kept" + bytes(5996)
        assert hit == calls
        left = crashed(path)
    for found in (left, path):
        with opened(found) as target:
            assert contents(target) == told


def test_a_region_that_may_have_been_persisted_is_synced_before_it_moves(
    path: Path, faults: Injector
) -> None:
    new = _lines(storage.FileStorage.create_durable)
    (file_sync,) = (s for s in sites(storage) if s.call == "fsync" and s.line in new)
    name_sync = max(site for site in sites(journal) if site.call == "fsync")
    faults.arm(Site("", 0, ""), 1, fails(errno.EIO))  # counts
    with opened(path) as target:
        region = target.create_and_write(b"kept", persist=True)
        target.namespace.link_name(region, "/name")
        faults.seen.clear()
        target.write(region, 4, b"x" * SLOT, extend=True)
        assert (faults.seen[file_sync], faults.seen[name_sync]) == (1, 1)


# Crashes and the end


def test_sizes_after_a_kill(path: Path) -> None:
    """A size in a pack is known as soon as that of a file is."""
    script = """
import os, signal, sys
from warabi.target import commit as durability, opening as layout
from warabi.target.config import FileConfig
durability.COMMIT_INTERVAL = 3600
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
grown, cut, out, same = (target.create_and_write(b"12345678") for _ in range(4))
target.commit()
target.write(grown, 8, b"9" * 100, extend=True)
target.resize(cut, 3)
target.resize(out, 5000)
print(*(r.hex() for r in (grown, cut, out, same)), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_python(script, str(path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    status, output = fsck(path)
    assert status == 0
    assert output.count("its pack says") == 2
    grown, cut, out, same = (RegionID(bytes.fromhex(word)) for word in done.stdout.split())
    with opened(path) as target:
        told = contents(target)
        assert told == {
            grown: b"12345678" + b"9" * 100, cut: b"123", out: b"12345678" + bytes(4992),
            same: b"12345678",
        }  # fmt: skip
        assert place(target, out) == MOVED
        target.resize(cut, 8)
        assert target.read(cut, 0, 8) == b"123" + bytes(5)
        accounted(path, target, contents(target))


def test_bytes_of_forgotten_regions_are_not_in_new_regions(path: Path) -> None:
    """A process was killed before it committed: its regions' slots are used again, as zeros."""
    script = """
import os, signal, sys
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
kept = target.create_and_write(b"kept", persist=True)
for _ in range(600):
    target.create_and_write(b"x" * 4096)
print(kept.hex(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_python(script, str(path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = RegionID(bytes.fromhex(done.stdout))
    with opened(path) as target:
        assert len(files(path)[0]) == 1  # the others have nothing that is known
        new = [target.create(SLOT) for _ in range(700)]
        assert {target.read(region, 0, SLOT) for region in new} == {bytes(SLOT)}
        assert target.read(kept, 0, 4) == b"kept"


def blocks(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in files(path)[0])


def test_erased_regions_take_no_room(path: Path) -> None:
    with opened(path) as target:
        regions = [target.create_and_write(b"x" * SLOT) for _ in range(3 * SLOTS)]
        target.sync()
        assert blocks(path) >= 3 * SLOTS * SLOT
        for region in regions[10:]:
            target.erase(region)
        target.commit()
        assert blocks(path) <= 20 * SLOT
        late = target.create_and_write(b"late")
        assert late.slot > regions[-1].slot
    assert len(files(path)[0]) == 2  # that of the first ten, and that of the last one
    with opened(path) as target:
        for region in (*regions[:10], late):
            target.erase(region)
    with opened(path) as target:
        assert target.create(1).slot == late.slot + 1  # no slot is used again
        assert contents(target) == {RegionID(target.list()[0]): b"\0"}
    assert len(files(path)[0]) == 1


def test_readers_of_an_erased_region(path: Path) -> None:
    """A call that is inside ends well."""
    with opened(path) as target:
        region = target.create_and_write(b"bytes")
        target.commit()
        inode = target.locks.enter(region, "read", True)
        target.erase(region)
        target.commit()
        place = bytearray(5)
        target._storage.read_into(region, 0, memoryview(place))
        assert place == b"bytes"
        target.locks.leave(inode)
        target.commit()
        eventually(lambda: not any(files(path)[0][0].read_bytes()))


# Damage


def test_a_pack_that_is_gone_or_short(path: Path) -> None:
    with opened(path) as target:
        regions = [target.create_and_write(b"12345678") for _ in range(2 * SLOTS - 10)]
    gone, short = pack_file(path, regions[0]), pack_file(path, regions[-10])
    gone.unlink()
    os.truncate(short, (regions[-10].slot % SLOTS) * SLOT + 4)
    with opened(path) as target:
        for region in (regions[0], regions[-10], regions[-1]):
            for use in (target.read, lambda r, *_: target.write(r, 0, b"1234567")):
                with pytest.raises(errors.CorruptTarget, match=f"region {region.hex()}"):
                    use(region, 0, 8)
        assert target.read(regions[-11], 0, 8) == b"12345678"
        new = target.create_and_write(b"new")
        assert target.read(new, 0, 3) == b"new"
    whole = sum(pack_of(r.slot) == pack_of(regions[-1].slot) for r in regions) - 10
    assert fsck(path)[0] == 4
    status, output = fsck(path, "--repair")
    assert status == 1
    assert output.count("the pack of region") == len(regions) - whole
    assert fsck(path)[0] == 0
    with opened(path) as target:
        assert len(target.list()) == whole + 1


def test_a_lost_pack_is_not_made_again(path: Path) -> None:
    with opened(path) as target:
        region = target.create_and_write(b"lost")
    files(path)[0][0].unlink()
    with opened(path) as target:
        new = target.create_and_write(b"new")
        assert place(target, new) == OWN
        with pytest.raises(errors.CorruptTarget, match="missing"):
            target.read(region, 0, 4)


def test_a_failed_sync_of_a_pack(path: Path, faults: Injector) -> None:
    """Who is in it may have lost bytes; who comes later is elsewhere; it is forgotten with them."""
    (site,) = (site for site in sites(storage) if site.call == "fdatasync")
    with opened(path) as target:
        regions = [target.create_and_write(b"lost") for _ in range(3)]
        faults.arm(site, 1, fails(errno.EIO))
        for region in (regions[0], regions[1], regions[0]):
            with pytest.raises(errors.StorageError, match=f"{region.hex()}.*to a new region"):
                target.persist(region, 0, 4)
        new = target.create_and_write(b"new", persist=True)
        assert (place(target, new), place(target, regions[0])) == (OWN, PACKED)
        with pytest.raises(errors.StorageError, match=r"persist small regions in 0.*a new region"):
            target.sync()
        for region in regions:
            target.erase(region)
        target.commit()
        target.sync()
        assert files(path)[0] == []
        last = target.create_and_write(b"last", persist=True)
        assert place(target, last) == PACKED
    with opened(path) as target:
        assert contents(target) == {new: b"new", last: b"last"}


def test_regions_of_a_damaged_pack_can_be_erased(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is left of it does not seem to be whole then."""
    with opened(path) as target:
        regions = [target.create_and_write(b"12345678") for _ in range(SLOTS + 100)]
    gone, short = pack_file(path, regions[0]), pack_file(path, regions[-1])
    gone.unlink()
    end = regions[-50].slot % SLOTS * SLOT
    os.truncate(short, end)
    with opened(path) as target:
        for region in (*regions[:9], regions[-90], regions[-1]):
            target.erase(region)
        target.commit()
        assert short.stat().st_size == end
        assert target.read(regions[-51], 0, 8) == b"12345678"
        for region in target.list():
            target.erase(region)
    assert files(path) == ([short], [])
    assert not caplog.records


def test_erasing_is_tried_again(
    path: Path, faults: Injector, caplog: pytest.LogCaptureFixture
) -> None:
    site = min(site for site in sites(fileio) if site.call == "pwrite")
    with opened(path) as target:
        regions = [target.create_and_write(b"12345678") for _ in range(20)]
        target.sync()
        for region in regions[::2]:
            target.erase(region)
        faults.arm(site, 2, fails(errno.EIO))
        target.commit()
        assert faults.hit
        assert "will be retried" in caplog.text
        faults.site = None
        target.commit()
        accounted(path, target, contents(target))
    with opened(path) as target:
        assert contents(target) == dict.fromkeys(regions[1::2], b"12345678")


# fsck


def test_bytes_of_no_region(path: Path) -> None:
    with opened(path) as target:
        kept, lost = target.create_and_write(b"kept"), target.create_and_write(b"lost" * 9)
    edit(path, f"DELETE FROM inode WHERE ino = {lost.slot}")
    assert fsck(path)[0] == 4
    status, output = fsck(path, "--repair")
    assert status == 1
    assert "has 1 regions without a row" in output
    copy = Path(f"{path}.lost+found", pack_of(lost.slot).hex()).read_bytes()
    assert copy[lost.slot % SLOTS * SLOT :][:36] == b"lost" * 9
    assert fsck(path)[0] == 0
    with opened(path) as target:
        assert contents(target) == {kept: b"kept"}
        new = [target.create(40) for _ in range(3)]
        assert {target.read(region, 0, 40) for region in new} == {bytes(40)}


def test_a_file_of_a_region_whose_row_says_pack(path: Path) -> None:
    with opened(path) as target:
        region = target.create_and_write(b"bytes")
        target.resize(region, 5000)
    edit(path, f"UPDATE inode SET packed = {PACKED} WHERE ino = {region.slot}")
    status, output = fsck(path, "--repair")
    assert (status, "took the file" in output) == (1, True)
    assert fsck(path)[0] == 0
    edit(path, f"UPDATE inode SET packed = 7 WHERE ino = {region.slot}")
    status, output = fsck(path, "--repair")
    assert (status, "is marked as a region in a pack" in output) == (1, True)
    with opened(path) as target:
        assert target.read(region, 0, 5000) == b"bytes" + bytes(4995)


def test_a_damaged_catalogue(path: Path) -> None:
    """The packs know whose bytes they have."""
    with opened(path) as target:
        told = {target.create_and_write(pattern(300, n)): pattern(300, n) for n in range(2000)}
    with closing(sqlite3.connect(path)) as database:
        size = database.execute("PRAGMA page_size").fetchone()[0]
    data = bytearray(path.read_bytes())
    leaf = data.index(list(told)[1000][8:]) // size  # where a generation is, is an inode's row
    data[leaf * size : (leaf + 1) * size] = b"\xa5" * size
    path.write_bytes(data)
    assert fsck(path, "--repair")[0] == 1
    assert fsck(path)[0] == 0
    with opened(path) as target:
        found = contents(target)
        accounted(path, target, found)
    assert found == told  # what no row tells, the packs do


# Other processes


def test_many_regions_by_few_descriptors(tmp_path: Path) -> None:
    """A client of the host has one of a pack, whatever it reaches in it."""
    path = tmp_path / "target"
    with (
        provider_process("na+sm", file_config(path)) as served,
        Engine("na+sm", client) as engine,
    ):
        handle = Client(engine).make_target_handle(served.address, 1)
        told = {handle.create_and_write(pattern(900, n)): pattern(900, n) for n in range(500)}
        for _ in range(3):
            for region, data in told.items():
                assert handle.read(region, 0, 900) == data
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                 if os.path.islink(f"/proc/self/fd/{fd}")]  # fmt: skip
        mine = [link for link in links if link.startswith(f"{path}.regions/")]
        assert 1 <= len(mine) <= 3
        served.stop()  # what is read and written now does not ask it
        try:
            for number, region in enumerate(told):
                handle.write(region, number, b"here")
                told[region] = told[region][:number] + b"here" + told[region][number + 4 :]
                assert handle.read(region, 0, 900) == told[region]
        finally:
            served.signal(signal.SIGCONT)
        region = next(iter(told))
        handle.resize(region, 10_000)
        handle.write(region, 9_000, b"far")
        assert handle.read(region, 0, 900) == told[region]
        for other in list(told)[1:50]:
            handle.erase(other)
            with pytest.raises(errors.InvalidRegion):
                handle.read(other, 0, 1)
            del told[other]
        handle.persist(region, 0, 10_000)
    with opened(path) as target:
        found = contents(target)
        assert {r: data[:900] for r, data in found.items()} == told
        assert place(target, region) == MOVED


def test_more_packs_than_descriptors(tmp_path: Path) -> None:
    script = """
import resource, sys
from warabi.client import Client
from warabi.engine import Engine, client
resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))
with Engine("na+sm", client) as engine:
    handle = Client(engine).make_target_handle(sys.argv[1], 1)
    regions = [handle.create_and_write(b"%08d" % n) for n in range(256 * 100)]
    for _ in range(3):
        for n in range(0, len(regions), 200):
            assert handle.read(regions[n], 0, 8) == b"%08d" % n
"""
    with provider_process("na+sm", file_config(tmp_path / "target")) as served:
        done = run_python(script, served.address)
        assert done.returncode == 0, done.stderr


def test_clients_do_not_persist_regions_of_a_pack_whose_sync_failed(
    path: Path, faults: Injector
) -> None:
    """Their own descriptors may be newer than the failure, and know nothing of it."""
    (site,) = (site for site in sites(storage) if site.call == "fdatasync")
    with opened(path) as target:
        regions = [target.create_and_write(b"lost", persist=True) for _ in range(3)]
        joined = target.sharing.join()
        assert joined is not None
        guest, grants = joined
        indices = []
        for region in regions:
            granted = target.grant(region, guest.number, writable=True)
            assert granted is not None
            os.close(granted.place.fd)
            indices.append(granted.index)
            target.persist(region, 0, 4)
        assert all(grants._entries[METADATA_DURABLE + index] for index in indices)
        faults.arm(site, 1, fails(errno.EIO))
        with pytest.raises(errors.StorageError):
            target.persist(regions[0], 0, 4)
        assert not any(grants._entries[METADATA_DURABLE + index] for index in indices)
        for region in regions:
            target.erase(region)
        target.sharing.leave(guest)


def test_a_region_that_grew_out_of_a_pack_is_persisted_as_others_are(path: Path) -> None:
    """Its file counts, whatever its row says; no commit has to wait for the medium."""
    with opened(path) as target:
        region = target.create_and_write(b"x" * SLOT, persist=True)
        inode = target._catalogue.region(region)
        assert inode is not None
        for number in range(5):
            target.write(region, SLOT + number, b"y", extend=True)
            assert target._catalogue.is_synced(inode.changed)
            target.persist(region, 0, SLOT)
        with opened(crashed(path)) as left:
            assert left.read(region, 0, SLOT + 5) == b"x" * SLOT + b"y" * 5
            assert place(left, region) == MOVED


def test_the_lock_is_not_held_while_the_disk_is_waited_for(path: Path) -> None:
    """The place where new regions are noted is none of the writes that `sync` is for."""
    with opened(path, sync=True) as target:
        region = target.create(8)
        flags = {
            fcntl.fcntl(int(fd), fcntl.F_GETFL) & os.O_DSYNC
            for fd in os.listdir("/proc/self/fd")
            if os.path.islink(f"/proc/self/fd/{fd}")
            and os.readlink(f"/proc/self/fd/{fd}") == str(pack_file(path, region))
        }
        assert flags == {0}
        target.write(region, 0, b"12345678", persist=True)
        assert target.read(region, 0, 8) == b"12345678"


def test_a_pack_goes_when_its_last_regions_are_erased_side_by_side(path: Path) -> None:
    """Each of two calls sees what the other one is still to erase."""
    with opened(path) as target:
        regions = [target.create_and_write(b"bytes") for _ in range(SLOTS + 10)]
        target.sync()
        storage = target._storage
        assert isinstance(storage, PackedStorage)
        looked, go = threading.Event(), threading.Event()
        borrow = storage._files.borrow

        def slowly(rid: bytes) -> Borrowed:
            if not looked.is_set():
                looked.set()
                assert go.wait(10)
            return borrow(rid)

        inode = target.locks.enter(regions[0], "read", True)
        for region in regions[: SLOTS - 2]:
            target.erase(region)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage._files, "borrow", slowly)
            first = threading.Thread(target=target.commit)
            first.start()
            assert looked.wait(10)
            target.locks.leave(inode)
            target.commit()
            go.set()
            first.join(10)
        storage.run_deferred()
        assert len(files(path)[0]) == 1
        assert not storage._retired
        assert not storage._retired_of
        assert target.read(regions[-1], 0, 5) == b"bytes"


def test_creating_while_a_failed_pack_is_removed(path: Path, faults: Injector) -> None:
    """A new region is not made in a file that is about to have no name."""
    (site,) = (site for site in sites(storage) if site.call == "fdatasync")
    with opened(path) as target:
        region = target.create_and_write(b"lost")
        faults.arm(site, 1, fails(errno.EIO))
        with pytest.raises(errors.StorageError):
            target.persist(region, 0, 4)
        made: list[RegionID] = []
        creator = threading.Thread(target=lambda: made.append(target.create_and_write(b"new")))
        unlink = os.unlink

        def unlinked(name: Any, **keywords: Any) -> None:
            if str(name) == str(pack_file(path, region)):
                creator.start()
                creator.join(0.5)  # it waits for the lock, or is done
            unlink(name, **keywords)

        target.erase(region)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "unlink", unlinked)
            target.commit()
        creator.join(10)
        (new,) = made
        with opened(crashed(path)) as left:
            assert new not in left.list() or left.read(new, 0, 3) == b"new"
        target.persist(new, 0, 3)
        with opened(crashed(path)) as left:
            assert left.read(new, 0, 3) == b"new"


@pytest.mark.parametrize("checked", [False, True])
def test_a_write_interrupted_by_a_kill(path: Path, checked: bool) -> None:
    """It goes on to write to a region that nobody knows any more, and to no new one."""
    script = """
import os, signal, sys
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
kept = target.create_and_write(b"kept", persist=True)
for _ in range(600):
    target.create(4096)
print("here", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        packs = [os.open(file, os.O_RDWR) for file in files(path)[0]]
        process.kill()
        process.wait(60)
    assert len(packs) == 3
    try:
        if checked:
            assert fsck(path, "--repair")[0] == 0
        with opened(path) as target:
            (kept,) = target.list()
            new = [target.create(SLOT) for _ in range(700)]
            for pack in packs:
                for slot in range(SLOTS):
                    if pack != packs[0] or slot != kept.slot:
                        os.pwrite(pack, b"late", slot * SLOT)
            assert {target.read(region, 0, SLOT) for region in new} == {bytes(SLOT)}
            assert target.read(kept, 0, 4) == b"kept"
    finally:
        for pack in packs:
            os.close(pack)


def test_numbers_beyond_those_of_packs(path: Path) -> None:
    """A slot that no import can have is in no pack; its file would not be known as one."""
    with opened(path) as target:
        target._catalogue._next_ino = (1 << 62) - 1
        last, beyond = (target.create_and_write(b"bytes", persist=True) for _ in range(2))
        assert (place(target, last), place(target, beyond)) == (PACKED, OWN)
        with opened(crashed(path)) as left:
            assert contents(left) == {last: b"bytes", beyond: b"bytes"}


def test_damaged_records(path: Path) -> None:
    """Of a lost catalogue, too; what cannot be a region's record is none."""
    rng = random.Random(3)
    for lost in (False, True):
        with opened(path) as target:
            told = {target.create_and_write(pattern(99, n)): pattern(99, n) for n in range(300)}
        for file in files(path)[0]:
            with open(file, "r+b") as pack:
                for number in rng.sample(range(SLOTS), 99):
                    pack.seek(PACK - SLOTS * 16 + number * 16)
                    pack.write(rng.choice((b"\xff" * 16, rng.randbytes(16), bytes(8) + b"x" * 8)))
        if lost:
            path.write_bytes(b"")
        assert fsck(path)[0] == 4
        assert fsck(path, "--repair")[0] == 1
        assert fsck(path)[0] == 0
        with opened(path) as target:
            found = contents(target)
            accounted(path, target, found)
            if not lost:
                assert found == told
            for region in found:
                target.resize(region, 5)
                target.erase(region)
    assert sum(found[region] == told[region] for region in told.keys() & found.keys()) > 100


def test_a_pack_that_is_too_long_keeps_its_records(path: Path) -> None:
    with opened(path) as target:
        told = {target.create_and_write(pattern(99, n)): pattern(99, n) for n in range(9)}
    (file,) = files(path)[0]
    with open(file, "ab") as pack:
        pack.write(b"more")
    assert fsck(path, "--repair")[0] == 1
    assert fsck(path)[0] == 0
    path.write_bytes(b"")
    assert fsck(path, "--repair")[0] == 1
    with opened(path) as target:
        assert contents(target) == told


@pytest.mark.parametrize("damage", ["short", "record"])
def test_sums_tell_that_a_pack_had_more(path: Path, damage: str) -> None:
    """A pack that is shorter than what was persisted is not believed after a crash."""
    with opened(path, checksums=True) as target:
        kept, region = (target.create_and_write(b"12345678" * 9, persist=True) for _ in range(2))
        target.sync()
        target.commit()
        left = crashed(path)
    (file,) = files(left)[0]
    if damage == "short":
        os.truncate(file, region.slot * SLOT + 20)
    else:
        with open(file, "r+b") as pack:
            pack.seek(PACK - (SLOTS - region.slot) * 16 + 8)
            pack.write(bytes(8))
    copy = left.parent.with_name("other")
    shutil.copytree(left.parent, copy)
    with opened(left) as target:
        assert target.size(region) == 72
        if damage == "short":
            with pytest.raises(errors.CorruptTarget):
                target.read(region, 0, 72)
        else:
            assert target.read(region, 0, 72) == b"12345678" * 9
        assert target.read(kept, 0, 72) == b"12345678" * 9
    assert fsck(copy / left.name)[0] == 4
    assert fsck(copy / left.name, "--repair")[0] == 1
    assert fsck(copy / left.name)[0] == 0
    with opened(copy / left.name) as target:
        assert (target.size(region) if damage == "record" else len(target.list())) in (72, 1)


def test_a_pack_that_was_not_synced_is_no_damage(path: Path) -> None:
    """Its length was lost with the power, and so were bytes that nobody persisted."""
    with opened(path) as target:
        regions = [target.create_and_write(b"12345678") for _ in range(9)]
        target.committer.commit_catalogue()
        left = crashed(path)
    os.truncate(files(left)[0][0], regions[5].slot * SLOT + 4)
    copy = left.parent.with_name("other")
    shutil.copytree(left.parent, copy)
    found = []
    for place_, checked in ((left, False), (copy / left.name, True)):
        if checked:
            assert fsck(place_)[0] == 0
            assert fsck(place_, "--repair")[0] == 0
            assert fsck(place_)[0] == 0
        with opened(place_) as target:
            found.append(contents(target))
    assert found[0] == found[1]
    assert list(found[0].values()) == [b"12345678"] * 5 + [b"1234"] + [b""] * 3
