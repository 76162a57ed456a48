"""Pmem targets: the quota, reserved space, flushed ranges, and files that others damaged."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import PATIENCE, environment, pattern, pmem_config, run_python
from warabi import errors
from warabi.backends.pmem import PmemStorage
from warabi.client import Client
from warabi.engine import Engine
from warabi.region import RegionID
from warabi.server import Provider
from warabi.target import opening
from warabi.target.config import FileConfig, PmemConfig
from warabi.target.target import Target

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGESIZE")
AS_ROOT = [] if os.geteuid() == 0 else ["sudo", "-n"]
PREAMBLE = """
import os, resource, signal, sys, threading
from pathlib import Path
from warabi import errors
from warabi.target import opening as layout
from warabi.target.config import PmemConfig
target = layout.open_pmem(PmemConfig(path=sys.argv[1], create_if_missing_with_size=1 << 30))
"""


def open_target(path: Path, size: int = 1 << 30, **settings: Any) -> Target:
    config = {"path": str(path), "create_if_missing_with_size": size, **settings}
    return opening.open_pmem(PmemConfig(**config))


def existing(path: Path) -> Target:
    return open_target(path, 0)


def region_files(path: Path) -> dict[str, Path]:
    return {p.name: p for p in Path(f"{path}.regions").rglob("*") if len(p.name) == 32}


def tree(path: Path) -> dict[str, bytes]:
    """Every file at and below *path* with its content."""
    return {str(p): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "target"


@pytest.fixture(params=["0", "1"], ids=["msync", "libpmem"])
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What makes other processes flush in the one way or the other."""
    monkeypatch.setenv("PMEM_IS_PMEM_FORCE", request.param)
    return str(request.param)


# Configuration


@pytest.mark.parametrize(
    ("config", "where", "what"),
    [
        ({"target": {"type": "pmem"}}, "$.target.config", "missing"),
        ({"target": {"type": "pmdk", "config": {}}}, "$.target.config.path", "missing"),
        *(
            (
                pmem_config(Path("/x"), create_if_missing_with_size=size),
                "$.target.config.create_if_missing_with_size",
                what,
            )
            for size, what in [
                (1, "8388608"), (8388607, "8388608"), (-1, "0"), (1e9, "integer"), (True, "integer")
            ]
        ),
        (pmem_config(Path("/x"), override_if_exists=1), "$.target.config.override_if_e", "bool"),
        (pmem_config(Path("/x"), create_if_missing=True), "$.target.config.create", "unknown key"),
        (pmem_config(Path("/x"), capacity=1 << 30), "$.target.config.capacity", "unknown key"),
        (pmem_config(Path("/x\0y")), "$.target.config.path", "null"),
        (
            pmem_config(Path("/x"), create_if_missing_with_size=0, override_if_exists=True),
            "$.target.config.override_if_exists",
            "create_if_missing_with_size",
        ),
    ],
)  # fmt: skip
def test_wrong_configuration_is_refused_with_its_json_path(
    engine: Engine, config: Any, where: str, what: str
) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Provider(engine, 1, config)
    assert where in str(caught.value)
    assert what in str(caught.value)


@pytest.mark.parametrize("name", ["pmem", "pmdk"])
def test_both_names_serve_and_reopen(engine: Engine, path: Path, name: str) -> None:
    config = {"path": str(path), "create_if_missing_with_size": 8388608}
    with Provider(engine, 1, json.dumps({"target": {"type": name, "config": config}})) as provider:
        assert provider.get_config()["target"] == {
            "type": name, "config": {**config, "override_if_exists": False},
        }  # fmt: skip
        handle = Client(engine).make_target_handle(str(engine.addr()), 1)
        region = handle.create_and_write(pattern(100_000), persist=True)
    for other in ("pmem", "pmdk"):
        settings = {"target": {"type": other, "config": {"path": str(path)}}}
        with Provider(engine, 1, settings):
            handle = Client(engine).make_target_handle(str(engine.addr()), 1)
            assert handle.read(region, 0, 100_000) == pattern(100_000)


def test_an_unreferenced_provider_releases_its_target(engine: Engine, path: Path) -> None:
    Provider(engine, 1, pmem_config(path))
    Provider(engine, 2, pmem_config(path))


def test_missing_without_size(path: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="create_if_missing_with_size"):
        existing(path)
    assert list(tmp_path.iterdir()) == []


def test_empty_file_becomes_a_target(path: Path) -> None:
    path.touch()
    with open_target(path, 8 * MIB) as target:
        assert target.room()[0] == 8 * MIB


def test_foreign_file_is_left_alone(path: Path) -> None:
    path.write_text("somebody's work")
    for override in (False, True):
        with pytest.raises(errors.ConfigError, match="not a warabi target"):
            open_target(path, override_if_exists=override)
    assert path.read_text() == "somebody's work"


def open_file(path: Path, **settings: Any) -> Target:
    return opening.open_file(FileConfig(path=str(path), **settings))


def test_another_type_is_refused_and_left_alone(path: Path, tmp_path: Path) -> None:
    with open_target(path) as target:
        target.create_and_write(b"pmem")
    before = tree(tmp_path)
    for create in (False, True):
        with pytest.raises(errors.ConfigError, match="of type 'pmem', not 'file'"):
            open_file(path, create_if_missing=create)
    assert tree(tmp_path).keys() == before.keys()
    assert path.read_bytes() == before[str(path)]
    open_file(path, create_if_missing=True, override_if_exists=True).close()
    with pytest.raises(errors.ConfigError, match="of type 'file', not 'pmem'"):
        open_target(path)
    open_file(path).close()


def test_target_that_records_no_type_is_of_type_file(path: Path) -> None:
    open_file(path, create_if_missing=True).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("DELETE FROM meta WHERE key IN ('backend', 'capacity')")
    with pytest.raises(errors.ConfigError, match="of type 'file', not 'pmem'"):
        open_target(path)
    open_file(path).close()


# Quota


def test_quota_is_the_target_s_own(path: Path) -> None:
    """It is what the target was made with, whatever a later configuration says."""
    with open_target(path, 8 * MIB) as target:
        region = target.create(5 * MIB)
    for size in (0, 8 * MIB, 64 * MIB):
        with open_target(path, size) as target:
            assert target.room()[0] == 8 * MIB
            for call in (
                lambda target: target.create(3 * MIB + 1),
                lambda target: target.create_and_write(bytes(3 * MIB + 1)),
                lambda target: target.resize(region, 8 * MIB + 1),
                lambda target: target.write(region, 5 * MIB, bytes(3 * MIB + 1), extend=True),
            ):
                with pytest.raises(errors.StorageFull, match=str(8 * MIB)):
                    call(target)
            assert target.size(region) == 5 * MIB
            assert target.list() == [region]
            target.resize(region, 8 * MIB)
            target.resize(region, 5 * MIB)
    with open_target(path, 16 * MIB, override_if_exists=True) as target:
        assert target.create(16 * MIB)


def test_damaged_quota(path: Path) -> None:
    open_target(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE meta SET value = 'many' WHERE key = 'capacity'")
    with pytest.raises(errors.CorruptTarget, match="'many'"):
        existing(path)


# Reserved space


def test_space_is_reserved(path: Path) -> None:
    def reserved(region: RegionID) -> int:
        return region_files(path)[region.hex()].stat().st_blocks * 512

    with open_target(path) as target:
        region = target.create(MIB)
        assert reserved(region) >= MIB
        target.resize(region, 3 * MIB + 1)
        assert reserved(region) >= 3 * MIB + 1
        target.write(region, 5 * MIB, b"beyond", extend=True)
        assert reserved(region) >= 5 * MIB + 6
        assert target.read(region, 0, 5 * MIB) == bytes(5 * MIB)
        target.resize(region, 10)
        assert reserved(region) <= MIB


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 48 MiB, of its own."""
    mounted, image = tmp_path / "small", tmp_path / "image"
    mounted.mkdir()
    mount = [*AS_ROOT, "mount", "-t", request.param]
    if request.param == "tmpfs":
        mount += ["-o", f"size=48m,uid={os.getuid()},mode=700", "tmpfs", str(mounted)]
    else:
        image.touch()
        os.truncate(image, 48 * MIB)
        owner = f"root_owner={os.getuid()}:{os.getgid()}"
        mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert mkfs is not None
        command = [mkfs, "-q", "-m", "0", "-E", owner, str(image)]
        subprocess.run(command, check=True, timeout=PATIENCE)
        mount += ["-o", "loop", str(image), str(mounted)]
    subprocess.run(mount, check=True, timeout=PATIENCE)
    try:
        yield mounted
    finally:
        subprocess.run([*AS_ROOT, "umount", mounted], check=True, timeout=PATIENCE)


def available(path: Path) -> int:
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


def test_a_full_disk_is_storage_full(small: Path) -> None:
    """What does not fit is refused at once and takes no room; what exists can be filled."""
    with open_target(small / "target") as target:
        tail = target.create_and_write(b"tail" * 100, persist=True)
        large = target.create(available(small) - 6 * MIB)
        left = available(small)
        assert left < 7 * MIB
        for call in (
            lambda: target.create(8 * MIB),
            lambda: target.create(47 * MIB),
            lambda: target.create_and_write(bytes(8 * MIB)),
            lambda: target.resize(tail, 8 * MIB),
            lambda: target.resize(tail, 1 << 40),
            lambda: target.resize(tail, 1 << 60),
            lambda: target.write(tail, 400, bytes(8 * MIB), extend=True),
            lambda: target.write(tail, 1 << 40, b"x", extend=True),
        ):
            with pytest.raises(errors.StorageFull):
                call()
            assert available(small) >= left - MIB  # the catalogue may grow
        assert sorted(target.list()) == sorted([tail, large])
        assert target.read(tail, 0, target.size(tail)) == b"tail" * 100
        for offset in range(0, target.size(large) - MIB, MIB):
            target.write(large, offset, pattern(MIB))
        target.persist(large, 0, target.size(large))
        target.erase(large)
        target.commit()
        assert target.create(8 * MIB)
    with existing(small / "target") as target:
        assert target.read(tail, 0, 400) == b"tail" * 100


def test_a_disk_with_less_space_than_statfs_says(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reservation that fails half way gives back what it got."""
    monkeypatch.setattr(PmemStorage, "room", lambda storage: (1 << 50, 1 << 50))
    with open_target(small / "target") as target:
        region = target.create_and_write(b"kept", persist=True)
        before = available(small)
        for call in (
            lambda: target.create(100 * MIB),
            lambda: target.resize(region, 100 * MIB),
            lambda: target.write(region, 100 * MIB, b"x", extend=True),
        ):
            with pytest.raises(errors.StorageFull):
                call()
            assert available(small) >= before - MIB
            assert region_files(small / "target")[region.hex()].stat().st_size == 4
        target.write(region, 0, b"also", persist=True)


def test_file_larger_than_allowed(path: Path) -> None:
    script = f"""{PREAMBLE}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
region = target.create_and_write(b"kept", persist=True)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
for call in (lambda: target.create(1 << 21), lambda: target.resize(region, 1 << 21),
             lambda: target.write(region, 1 << 21, b"x", extend=True)):
    try:
        call()
    except errors.OutOfBounds as error:
        print("refused")
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
files = [p for p in Path(sys.argv[1] + ".regions").rglob("*") if len(p.name) == 32]
assert [p.stat().st_size for p in files] == [4], files
assert target.read(region, 0, target.size(region)) == b"kept"
target.close()
"""
    done = run_python(script, str(path))
    assert done.stderr == ""
    assert done.stdout.split() == ["refused"] * 3


# Flushed ranges


def traced(script: str, path: Path, calls: str, *options: str) -> list[str]:
    """The system calls that *script* makes after it closed descriptor 9999, one a line."""
    log = path.parent / "trace"
    done = subprocess.run(
        ["strace", "-f", "-qq", "-e", f"trace={calls},close", *options, "-o", log,
         sys.executable, "-c", script, path],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split(maxsplit=1)[1] for line in log.read_text().splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("close(9999)"))
    return [line for line in lines[start:] if not line.startswith("close(")]


MARK = """
def mark():
    try:
        os.close(9999)
    except OSError:
        pass
"""
EXTENTS = [(0, 1), (4095, 2), (5000, 4000), (MIB - 1, 1), (0, MIB), (PAGE, PAGE), (7, 0)]


def page_ranges(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offset and length of the pages of every extent that has any."""
    return [
        (first := offset // PAGE * PAGE, -(-(offset + size) // PAGE) * PAGE - first)
        for offset, size in extents
        if size
    ]


def test_msync_covers_exactly_the_pages(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMEM_IS_PMEM_FORCE", "0")
    script = f"""{PREAMBLE}{MARK}
region = target.create({MIB})
target.write(region, 0, os.urandom({MIB}))
target.persist(region, 0, 0)
mark()
for offset, size in {EXTENTS}:
    target.persist(region, offset, size)
os._exit(0)
"""
    lines = traced(script, path, "mmap,msync,fdatasync,fsync")
    mapped = [re.search(rf"mmap\(NULL, {MIB}, PROT_READ, MAP_SHARED.* = (0x\w+)", line)
              for line in lines]  # fmt: skip
    bases = {int(found[1], 16) for found in mapped if found}
    flushed = [
        (int(found[1], 16), int(found[2]))
        for line in lines
        if (found := re.match(r"msync\((0x\w+), (\d+), MS_SYNC\) += 0", line))
    ]
    assert len(bases) == 1, lines  # mapped once, touched never
    base = bases.pop()
    assert flushed == [(base + first, length) for first, length in page_ranges(EXTENTS)]
    assert not [line for line in lines if "sync(" in line and not line.startswith("msync")]


def test_persist_waits_for_the_name_too(path: Path, forced: str) -> None:
    """A new region's file and directories are on the medium with its first persist."""
    script = f"""{PREAMBLE}{MARK}
region = target.create(10)
mark()
target.persist(region, 0, 10)
target.persist(region, 0, 10)
os._exit(0)
"""
    lines = traced(script, path, "msync,fdatasync,fsync", "-y")
    synced = [re.sub(r"^(\w+)\((?:\d+<(.*)>\)|0x).*", r"\1 \2", line).strip() for line in lines]
    region = next(iter(region_files(path).values()))
    first = {"0": "msync", "1": f"fdatasync {region}"}
    again = {"0": ["msync"], "1": []}
    assert synced == [
        first[forced], f"fsync {region.parent}", f"fsync {region.parent.parent}",
        f"fdatasync {path}-wal", *again[forced],
    ]  # fmt: skip


def test_libpmem_flushes_exactly_the_range(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMEM_IS_PMEM_FORCE", "1")
    script = f"""{PREAMBLE}{MARK}
from warabi.backends import range_flush as mapping
library = mapping.libpmem()
flush, flushed = library.pmem_persist, []
def pmem_persist(address, size):
    flushed.append((address, size))
    flush(address, size)
library.pmem_persist = pmem_persist
data = os.urandom({MIB})
region = target.create_and_write(data)
target.persist(region, 0, 1)
mark()
for offset, size in {EXTENTS}:
    target.persist(region, offset, size)
base = flushed.pop(0)[0]
assert [(address - base, size) for address, size in flushed] == {[e for e in EXTENTS if e[1]]}
assert target.read(region, 0, {MIB}) == data
os._exit(0)
"""
    lines = traced(script, path, "madvise,msync,fdatasync,fsync")
    populated = [re.match(r"madvise\((0x\w+), (\d+), (?:MADV_POPULATE_WRITE|0x17.*)\) += 0", line)
                 for line in lines]  # fmt: skip
    assert all(populated), lines
    found = [(int(match[1], 16), int(match[2])) for match in populated if match]
    base = min(found)[0]
    assert found == [(base + first, length) for first, length in page_ranges(EXTENTS)]


def test_failed_flush_is_remembered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMEM_IS_PMEM_FORCE", "0")
    script = f"""{PREAMBLE}{MARK}
first, second = (target.create_and_write(b"12345678", persist=True) for _ in range(2))
for _ in range(2):
    try:
        target.persist(first, 0, 8)
    except errors.StorageError as error:
        assert first.hex() in str(error), error
    else:
        sys.exit("it did not fail")
target.persist(second, 0, 8)
assert target.read(first, 0, 8) == b"12345678"
mark()
target.erase(first)
target.close()
"""
    traced(script, path, "msync", "-e", "inject=msync:error=EIO:when=3")


# Nobody dies


DAMAGED = """
good, cut, gone, later = (target.create_and_write(b"x" * 20000, persist=True) for _ in range(4))
files = {p.name: p for p in Path(sys.argv[1] + ".regions").rglob("*") if len(p.name) == 32}
def refused(region):
    for call in (lambda: target.read(region, 0, 20000), lambda: target.persist(region, 0, 20000),
                 lambda: target.write(region, 10000, b"y" * 10000)):
        try:
            call()
        except errors.CorruptTarget as error:
            assert region.hex() in str(error), error
        else:
            sys.exit("not refused")
os.truncate(files[cut.hex()], 5000)
os.truncate(files[later.hex()], 0)
refused(cut)
refused(later)
assert target.read(cut, 0, 5000) == b"x" * 5000
assert files[cut.hex()].stat().st_size == 5000
os.truncate(files[later.hex()], 20000)
target.persist(later, 0, 20000)
assert target.read(good, 0, 20000) == b"x" * 20000
os.unlink(files[gone.hex()])
target.close()
target = layout.open_pmem(PmemConfig(path=sys.argv[1]))
refused(cut)
refused(gone)
for region in (cut, gone, later):
    target.erase(region)
assert target.list() == [good]
target.close()
"""


def test_damaged_files_are_reported_as_corrupt_without_sigbus(path: Path, forced: str) -> None:
    done = run_python(PREAMBLE + DAMAGED, str(path))
    assert (done.returncode, done.stderr) == (0, "")


RESTLESS = """
region = target.create_and_write(b"x" * 200_000, persist=True)
stop = threading.Event()
failures = []
def repeat(call):
    number = 0
    while not stop.is_set():
        try:
            call(number)
        except errors.OutOfBounds:
            pass
        except BaseException as error:
            failures.append(repr(error))
            raise
        number += 1
def create_and_erase(number):
    target.erase(target.create_and_write(b"y" * 5000, persist=number % 2 == 0))
calls = [
    lambda number: target.resize(region, (number * 7919) % 300_000),
    lambda number: target.persist(region, 0, target.size(region)),
    lambda number: target.persist(region, 100_000, 50_000),
    lambda number: target.read(region, 0, 150_000),
    lambda number: target.write(region, 50_000, b"z" * 100_000),
    lambda number: target.write(region, 0, b"x" * (number % 200_000), extend=True),
    lambda number: target.sync(),
    create_and_erase,
]
threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
for thread in threads:
    thread.start()
stop.wait(2)
stop.set()
for thread in threads:
    thread.join()
target.close()
assert not failures, failures
"""


def test_resize_concurrently_with_all_other_calls(path: Path, forced: str) -> None:
    done = run_python(PREAMBLE + RESTLESS, str(path))
    assert (done.returncode, done.stderr) == (0, "")


def test_more_regions_than_descriptors_or_mappings(path: Path, forced: str) -> None:
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
{PREAMBLE}
def held():
    return Path("/proc/self/maps").read_text().count(".regions/")
regions = [target.create_and_write(b"%04d" % i, persist=True) for i in range(400)]
assert 0 < held() <= 80, held()
for i, region in enumerate(regions):
    assert target.read(region, 0, 4) == b"%04d" % i
    target.write(region, 0, b"%04d" % (i + 1), persist=True)
for region in regions[10:]:
    target.erase(region)
target.commit()
assert held() <= 10, held()
target.close()
assert held() == 0
target = layout.open_pmem(PmemConfig(path=sys.argv[1]))
for i, region in enumerate(regions[:10]):
    assert target.read(region, 0, 4) == b"%04d" % (i + 1)
target.close()
"""
    done = run_python(script, str(path))
    assert (done.returncode, done.stderr) == (0, "")


# Life and death


def test_reopen_keeps_everything(path: Path) -> None:
    with open_target(path) as target:
        regions = {target.create_and_write(pattern(size)): size for size in (0, 1, 4096, 3_000_000)}
        for i, region in enumerate(regions):
            target.namespace.link_name(region, f"/name {i}")
    for _ in range(2):
        with existing(path) as target:
            assert target.list() == sorted(regions)
            for i, (region, size) in enumerate(regions.items()):
                assert target.read(region, 0, size) == pattern(size)
                assert target.namespace.open_name(f"/name {i}") == region


def test_kill_after_persist(path: Path, forced: str) -> None:
    script = f"""{PREAMBLE}
regions = [target.create(300_000) for _ in range(50)]
for i, region in enumerate(regions):
    target.write(region, 100_000, bytes([i]) * 100_000)
    target.namespace.link_name(region, f"/region {{i}}")
    target.persist(region, 100_000, 100_000)
target.resize(regions[0], 1_000_000)
target.write(regions[0], 999_999, b"!", persist=True)
print(*(region.hex() for region in regions), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_python(script, str(path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    regions = [RegionID(bytes.fromhex(text)) for text in done.stdout.split()]
    with existing(path) as target:
        assert target.list() == regions
        for i, region in enumerate(regions):
            assert target.namespace.open_name(f"/region {i}") == region
            assert target.read(region, 100_000, 100_000) == bytes([i]) * 100_000
        assert target.size(regions[0]) == 1_000_000
        assert target.read(regions[0], 999_999, 1) == b"!"


def test_unlinked_path_takes_the_regions_with_it(path: Path) -> None:
    with open_target(path) as target:
        os.unlink(path)
        region = target.create_and_write(b"x", persist=True)
        assert target.read(region, 0, 1) == b"x"
    assert list(path.parent.iterdir()) == []


def test_concurrent_persists(path: Path) -> None:
    with open_target(path) as target:
        region = target.create(64 * PAGE)

        def fill(i: int) -> None:
            for _ in range(5):
                target.write(region, i * PAGE, bytes([i]) * PAGE, persist=True)

        threads = [threading.Thread(target=fill, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(16):
            assert target.read(region, i * PAGE, PAGE) == bytes([i]) * PAGE
