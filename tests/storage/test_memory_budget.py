"""Limits on memory for regions: StorageFull before the machine or a control group runs out."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import warabi.backends.memory_budget as budget
from tests.support.helpers import environment, open_memory
from warabi import errors
from warabi.backends.memory_budget import Machine, machine_memory, physical_memory
from warabi.metadata.tree import RENAME_WHITEOUT
from warabi.region import RegionID
from warabi.target.config import MemoryConfig
from warabi.target.handlers import CALLS
from warabi.target.target import Target

MiB = 1 << 20
GROUPS = Path("/sys/fs/cgroup")


def memory(limit: int | None = None) -> Target:
    return open_memory(MemoryConfig(), limit=limit)


# What there is


MEMINFO = """MemTotal: 16000000 kB
MemFree: 1000000 kB
MemAvailable: 8000000 kB
SwapTotal: 1000000 kB
SwapFree: 500000 kB
HugePages_Total: 0
"""
KiB = 1024


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 16 GB, half of them available, without control groups."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    return tmp_path


def group(root: Path, path: str, **files: Any) -> None:
    directory = root / path
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (directory / name.replace("__", ".")).write_text(f"{value}\n")


def described(root: Path, cgroup: str, mountinfo: str) -> None:
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mountinfo)


def test_a_machine_without_groups(root: Path) -> None:
    assert Machine(root).physical() == 16_000_000 * KiB
    assert Machine(root).memory() == (17_000_000 * KiB, 8_500_000 * KiB)


def test_groups_of_version_2(root: Path) -> None:
    described(
        root, "0::/a/b\n",
        "20 1 0:1 / / rw - ext4 /dev/sda rw\n30 20 0:26 / /sys/fs/cgroup rw - cgroup2 none rw\n",
    )  # fmt: skip
    stat = "anon 1\ninactive_file 1000\nactive_file 2000\ntotal_active_file 7777"
    group(root, "sys/fs/cgroup/a/b", memory__max="max", memory__current=5, memory__stat=stat)
    assert Machine(root).physical() == 16_000_000 * KiB
    group(root, "sys/fs/cgroup/a", memory__max=500_000, memory__current=400_000, memory__stat=stat)
    assert Machine(root).physical() == 500_000
    assert Machine(root).memory() == (500_000, 103_000)
    group(root, "sys/fs/cgroup/a/b", memory__max=90_000, memory__current=99_000, memory__stat=stat)
    assert Machine(root).memory() == (90_000, 0)


def test_groups_of_version_1(root: Path) -> None:
    described(
        root, "5:cpu,cpuacct:/x\n4:memory:/a b\n0::/\n",
        "30 20 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
        "31 20 0:27 / /sys/fs/cgroup/memory\\040of\\040all rw shared:1 - cgroup cgroup rw,memory\n"
        "32 20 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
    )  # fmt: skip
    stat = "inactive_file 1\ntotal_inactive_file 1000\ntotal_active_file 2000"
    top = "sys/fs/cgroup/memory of all"
    files = {"memory__usage_in_bytes": 400_000, "memory__stat": stat}
    group(root, top, memory__limit_in_bytes=9223372036854771712, **files)
    group(root, f"{top}/a b", memory__limit_in_bytes=500_000, **files)
    assert Machine(root).memory() == (500_000, 103_000)


def test_groups_of_a_container(root: Path) -> None:
    """Where the mount is of the container's group, or the path is hidden."""
    stat = "inactive_file 0\nactive_file 0"
    group(root, "cg", memory__max=500_000, memory__current=400_000, memory__stat=stat)
    for own in ("/docker/1234", "/../../elsewhere", "/"):
        described(root, f"0::{own}\n", "30 20 0:26 /docker/1234 /cg rw - cgroup2 cgroup rw\n")
        assert Machine(root).memory() == (500_000, 100_000)
    group(root, "cg/below", memory__max=50_000, memory__current=40_000, memory__stat=stat)
    described(root, "0::/docker/1234/below\n", "30 20 0:26 /docker/1234 /cg rw - cgroup2 c rw\n")
    assert Machine(root).memory() == (50_000, 10_000)


def test_without_descriptors_nothing_fails() -> None:
    with memory() as target:
        region, other = target.create(MiB), target.create_and_write(bytes(MiB))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                os.dup(0)
            target._storage._budget._allowance = 0  # type: ignore[attr-defined]
            target._storage._spare._look = 0.0  # type: ignore[attr-defined]
            target.write(region, 0, bytes(MiB))
            target.erase(other)
            assert target.room()[2] == 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_this_machine() -> None:
    total, available = machine_memory()
    assert 0 < available <= total
    assert 0 < physical_memory() <= total


# A limit


@pytest.mark.parametrize("size", [1000, 5000, 100_000, 3 * MiB])
def test_the_limit_is_reached_and_kept(size: int) -> None:
    limit = 40 * MiB
    with memory(limit) as target:
        total = target.room()[0]
        assert total == limit
        data = bytes(size)
        regions = []
        with pytest.raises(errors.StorageFull, match="do not fit"):
            while True:
                region = target.create(0)
                target.write(region, 0, data, extend=True)
                regions.append(region)
        # A small region takes a slot, and a row.
        taken = size if size > 64 * 1024 else 1024 + (1 << (size - 1).bit_length())
        assert 0.8 * limit < len(regions) * taken <= limit
        for _ in range(3):
            with pytest.raises(errors.StorageFull, match="do not fit"):
                target.create_and_write(data + bytes(2048))
        assert target.room()[1] < 2 * taken + limit / 10
        for region in regions[: len(regions) // 2 + 1]:
            target.erase(region)
        again = target.create(0)
        target.write(again, 0, data, extend=True)


def test_holes_take_nothing() -> None:
    with memory(8 * MiB) as target:
        region = target.create(0)
        target.resize(region, 1 << 50)
        for offset in range(0, 1 << 50, 1 << 45):
            target.write(region, offset, b"data")
        with pytest.raises(errors.StorageFull):
            for offset in range(0, 100 * MiB, MiB):
                target.write(region, offset, bytes(MiB))
        target.resize(region, 0)
        target.write(region, 0, bytes(MiB), extend=True)


def test_writing_over_what_is_there_goes_on_when_all_is_full() -> None:
    with memory(8 * MiB) as target:
        first, sparse = target.create(0), target.create(4 * MiB)
        target.write(first, 0, bytes(MiB), extend=True)
        target.write(sparse, 2 * MiB, bytes(MiB))
        full = target.create(0)
        target.resize(full, 100 * MiB)
        with pytest.raises(errors.StorageFull):
            for offset in range(0, 100 * MiB, 100_000):
                target.write(full, offset, bytes(100_000))
        for _ in range(20):
            target.write(first, 1000, bytes(MiB - 1000))
            target.write(sparse, 2 * MiB, bytes(MiB))
        with pytest.raises(errors.StorageFull):
            target.write(sparse, MiB, bytes(MiB + 1))
        target.erase(full)
        target.write(sparse, MiB, bytes(MiB + 1))


def test_the_memory_of_files_between_others_is_used_again() -> None:
    with memory(32 * MiB) as target:
        regions = []
        with pytest.raises(errors.StorageFull):
            while True:
                regions.append(target.create_and_write(b"a" * 5000))
        for region in regions[::2]:
            target.erase(region)
        half = len(regions) // 2 - 50
        assert target.room()[1] > half * 8192 - 2 * MiB
        again = [target.create_and_write(b"b" * 5000) for _ in range(half)]
        with pytest.raises(errors.StorageFull):
            target.create_and_write(bytes(MiB))
        for region in again:
            target.erase(region)
        large = target.create_and_write(b"c" * (half * 8192 - 2 * MiB))
        with pytest.raises(errors.StorageFull):
            target.create_and_write(bytes(6 * MiB))
        target.erase(large)
        for _ in range(half - 100):
            region = target.create(5000)
            assert target.read(region, 0, 5000) == bytes(5000)
        for region in regions[1::2]:
            assert target.read(region, 0, 5000) == b"a" * 5000


def test_copies_take_memory() -> None:
    with memory(32 * MiB) as target:
        region = target.create_and_write(b"f" * (8 * MiB))
        sparse = target.create(24 * MiB)
        target.write(sparse, 23 * MiB, b"g")
        copies = [RegionID.from_parts(1000 + i, 1) for i in range(4)]
        for copy in copies[:2]:
            target._storage.clone(region, copy, 8 * MiB)
        with pytest.raises(errors.StorageFull):
            target._storage.clone(region, copies[2], 8 * MiB)
        target._storage.clone(sparse, copies[3], 24 * MiB)


def test_large_regions_without_descriptors_of_their_own() -> None:
    with memory(32 * MiB) as target:
        target._storage._own_limit = 2  # type: ignore[attr-defined]
        kept = []
        with pytest.raises(errors.StorageFull):
            for _ in range(100):
                region = target.create(0)
                target.write(region, 0, b"d" * MiB, extend=True)
                kept.append(region)
        assert 24 < len(kept) < 32
        target.erase(kept.pop())
        target.erase(kept.pop())
        kept.append(target.create_and_write(b"e" * MiB))


def test_what_the_machine_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    left = 30 * MiB  # but for the reserve
    monkeypatch.setattr(
        budget, "machine_memory", lambda: (100 * MiB, left + budget.reserve(100 * MiB))
    )
    with memory() as target:
        region = target.create(90 * MiB)
        with pytest.raises(errors.StorageFull, match="this machine has memory for"):
            for offset in range(0, 90 * MiB, 4 * MiB):
                target.write(region, offset, bytes(4 * MiB))
                left -= 4 * MiB
        assert left < 4 * MiB
        # Others are not let fill what does not fit.
        assert target.state.storage.share(region, writable=True) is None
        place = target.state.storage.share(region, writable=False)
        assert place is not None
        os.close(place.fd)
        left = 60 * MiB
        with pytest.raises(errors.StorageFull):
            target.create_and_write(bytes(61 * MiB))
        assert target.room()[2] == 1
        other = target.create(50 * MiB)
        place = target.state.storage.share(other, writable=True)
        assert place is not None
        os.close(place.fd)
        # What they may fill by themselves counts.
        with pytest.raises(errors.StorageFull):
            target.create_and_write(bytes(20 * MiB))


def symbolic_link(target: Target, i: int) -> None:
    target.namespace.symlink(1, b"%d" % i, b"t" * 4000, 0, 0)


def directory(target: Target, i: int) -> None:
    target.namespace.mkdir(1, b"%d" % i + b"d" * 240, 0o755, 0, 0)


def attribute(target: Target, i: int) -> None:
    ino = target.namespace.mkdir(1, b"%d" % i, 0o755, 0, 0).ino
    target.namespace.setxattr(ino, b"user.name", b"a" * 60_000)


def name(target: Target, i: int) -> None:
    if i == 0:
        target.namespace.link_name(target.create(0), "/first")
    found = target.namespace.lookup(1, b"first")
    target.namespace.link(found.ino, 1, b"%d" % i + b"n" * 240)


def whiteout(target: Target, i: int) -> None:
    if i == 0:
        target.namespace.mkdir(1, b"0" + b"w" * 240, 0o755, 0, 0)
    names = [b"%d" % n + b"w" * 240 for n in (i, i + 1)]
    target.namespace.rename(1, names[0], 1, names[1], RENAME_WHITEOUT)


@pytest.mark.parametrize("make", [symbolic_link, directory, attribute, name, whiteout])
def test_names_take_memory(make: Callable[[Target, int], None]) -> None:
    limit = 12 * MiB
    with memory(limit) as target:
        before = target._catalogue._one("PRAGMA page_count")
        i = 0
        with pytest.raises(errors.StorageFull, match="do not fit"):
            while i < 100_000:
                make(target, i)
                i += 1
        target._catalogue.flush()
        taken = 4096 * (target._catalogue._one("PRAGMA page_count") - before)
        assert limit / 3 < taken < 1.1 * limit
        # Nothing of it was done, and nothing of what is there lost.
        page = target.namespace.readdir(1, b"", 10_000)
        listed = [*page]
        while page:
            page = target.namespace.readdir(1, page[-1][0], 10_000)
            listed += page
        assert len(listed) == i + (make in (attribute, name, whiteout))
        assert target.room()[1] < limit / 3
        with pytest.raises(errors.StorageFull):
            target.create_and_write(bytes(limit // 2))
        for each, attributes in listed:
            if stat.S_ISDIR(attributes.mode):
                target.namespace.rmdir(1, each)
            else:
                target.namespace.unlink(1, each)
        target.create_and_write(bytes(limit // 2))


# In a real control group


FILL = """
import sys, mochi.margo
from mochi.warabi.client import Client
from mochi.warabi.server import Provider
from warabi import errors
share = sys.argv[1] == "share"
with mochi.margo.Engine("na+sm", mochi.margo.server, config={"share": share}) as engine:
    provider = Provider(engine, 1, {"target": {"type": "memory"}})
    target = Client(engine).make_target_handle(str(engine.addr()), 1)
    region = target.create(100)
    target.write(region, 0, b"x" * 100)
    for kind in range(3):
        regions = []
        try:
            while True:
                if kind == 0:
                    regions.append(target.create_and_write(bytes(1000_000)))
                elif kind == 1:
                    regions.append(target.create_and_write(bytes(10_000)))
                else:
                    regions.append(target.create(10_000_000))
                    for offset in range(0, 10_000_000, 100_000):
                        target.write(regions[-1], offset, bytes(100_000))
                assert len(regions) < 100_000
        except errors.StorageFull as error:
            print(error)
        for one in regions:
            target.erase(one)
    assert target.read(region, 0, 100) == b"x" * 100
"""


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 256 MiB; the machine that runs these tests lets root make one."""
    where = GROUPS / "memory" if (GROUPS / "memory").is_dir() else GROUPS
    path = where / f"warabi-test-{os.getpid()}"
    path.mkdir()
    try:
        first = path / "memory.limit_in_bytes"
        (first if first.exists() else path / "memory.max").write_text(str(256 * MiB))
        yield path
    finally:
        path.rmdir()


def run_in(group: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    join = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    return subprocess.run(
        ["sh", "-c", join, "sh", sys.executable, *arguments],
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("share", ["share", "alone"])
def test_a_provider_in_a_control_group(small_group: Path, share: str) -> None:
    done = run_in(small_group, "-c", FILL, share)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert len(done.stdout.splitlines()) == 3


# Room that is reserved


@pytest.mark.parametrize("keep_size", [False, True])
def test_what_is_allocated_far_beyond_the_end_takes_no_memory_before_it(keep_size: bool) -> None:
    """Nor the machine's, whatever the offset."""
    with memory(8 * MiB) as target:
        region = target.create(10)
        call(target, "allocate", region, 64 * MiB, 10, keep_size)
        assert target.create_and_write(bytes(4 * MiB))
        target.resize(region, 10)
        with pytest.raises(errors.StorageFull):
            call(target, "allocate", region, 1 << 40, 16 * MiB, True)
        target.write(region, 0, b"0123456789")


def test_what_is_reserved_can_be_written_when_nothing_else_fits() -> None:
    with memory(16 * MiB) as target:
        region = target.create(8 * MiB)
        call(target, "allocate", region, 2 * MiB, 2 * MiB, False)
        call(target, "allocate", region, 8 * MiB, 2 * MiB, True)
        with pytest.raises(errors.StorageFull):
            call(target, "allocate", region, 0, 64 * MiB, False)
        assert target.size(region) == 8 * MiB
        others = []
        with pytest.raises(errors.StorageFull):
            while True:
                others.append(target.create_and_write(bytes(MiB // 2)))
        target.write(region, 2 * MiB, b"x" * 2 * MiB)
        target.write(region, 8 * MiB, b"y" * 2 * MiB, extend=True)
        assert target.read(region, 0, 10 * MiB) == (
            bytes(2 * MiB) + b"x" * 2 * MiB + bytes(4 * MiB) + b"y" * 2 * MiB
        )
        call(target, "punch_hole", region, 2 * MiB, 2 * MiB)
        assert target.create_and_write(bytes(MiB))  # which the hole has given back


def test_a_hole_that_others_may_fill_is_promised_to_them() -> None:
    with memory(16 * MiB) as target:
        region = target.create_and_write(b"x" * 8 * MiB)
        place = target.state.storage.share(region, writable=True)
        assert place is not None
        call(target, "punch_hole", region, 0, 8 * MiB)
        with pytest.raises(errors.StorageFull):
            target.create_and_write(bytes(10 * MiB))
        os.close(place.fd)


def call(target: Target, name: str, *arguments: Any) -> None:
    CALLS[name](target, *arguments)
