"""``-o passthrough``: the kernel reads and writes regions by itself."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.mount.conftest import limit_of
from tests.mount.support import (
    MIB,
    PASSED,
    Mount,
    fails_with,
    is_mounted,
    mounting,
    run,
    serving,
    source_of,
    wait_until,
    watchdog,
)
from tests.support.helpers import PATIENCE
from warabi.target import opening
from warabi.target.config import FileConfig
from warabifs.frontends.kernel.passthrough import Passing

EVERYWHERE = pytest.mark.parametrize("mounted", PASSED, indirect=True)
ON_DISK = pytest.mark.parametrize("mounted", PASSED[1:], indirect=True)


@contextmanager
def stopped(mount: Mount) -> Iterator[None]:
    """The mount's process does nothing, so whoever needs it waits for it."""
    mount.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        mount.signal(signal.SIGCONT)


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@EVERYWHERE
def test_an_open_file_needs_no_process(mounted: Mount) -> None:
    path, data = mounted.path / "file", os.urandom(MIB)
    path.write_bytes(data)
    with opened(path) as fd, mmap.mmap(fd, MIB) as mapping:
        os.pwrite(fd, data[:1], 0)  # before the first write the kernel asks for capabilities
        with stopped(mounted):
            assert os.pread(fd, MIB, 0) == data
            assert mapping[5000:6000] == data[5000:6000]
            assert os.pwrite(fd, b"by the kernel", MIB + 10) == 13
            mapping[:6] = b"mapped"
            mapping.flush()
    expected = b"mapped" + data[6:] + bytes(10) + b"by the kernel"
    assert path.stat().st_size == len(expected)
    assert path.read_bytes() == expected


@EVERYWHERE
def test_stat_of_a_passthrough_file_has_its_size_and_times(mounted: Mount) -> None:
    path = mounted.path / "file"
    path.write_bytes(bytes(MIB))
    os.utime(path, (1, 1))
    with opened(path, os.O_RDWR | os.O_APPEND) as fd:
        assert path.stat().st_mtime == 1
        for count in range(1, 4):
            os.write(fd, b"x" * 1000)
            before = path.stat()
            assert before.st_size == MIB + count * 1000
            assert before.st_mtime > 1
            assert [e.stat().st_size for e in os.scandir(mounted.path)] == [before.st_size]
        os.utime(path, (2, 2))  # of what was written before, nothing is left to be told
        assert path.stat().st_mtime == 2
        os.truncate(path, 10)
        os.write(fd, b"y")
        assert path.read_bytes() == bytes(10) + b"y"
    assert path.stat().st_size == 11


@pytest.mark.parametrize("mounted", PASSED[:1], indirect=True)
def test_a_file_that_is_open_the_usual_way_stays_so(mounted: Mount) -> None:
    """Small regions of a memory target have no descriptor of their own."""
    path = mounted.path / "file"
    with opened(path) as first:
        os.pwrite(first, b"a" * 100, 0)
        assert os.pread(first, 200, 0) == b"a" * 100
        os.pwrite(first, b"b" * MIB, 100)  # now it has one
        with opened(path) as second:
            assert os.pread(second, MIB, 50) == b"a" * 50 + b"b" * (MIB - 50)
            os.pwrite(second, b"c" * 50, 0)
            assert os.pread(first, 100, 0) == b"c" * 50 + b"a" * 50
    with opened(path) as third:
        os.pwrite(third, b"d" * 50, 50)
        with stopped(mounted):
            assert os.pread(third, 150, 0) == b"c" * 50 + b"d" * 50 + b"b" * 50
    assert path.read_bytes() == b"c" * 50 + b"d" * 50 + b"b" * MIB


@EVERYWHERE
def test_when_descriptors_run_out_files_are_opened_the_usual_way(mounted: Mount) -> None:
    paths = [mounted.path / f"file{number}" for number in range(60)]
    for path in paths:
        path.write_bytes(path.name.encode() * 20_000)
    used = len(os.listdir(f"/proc/{mounted.pid}/fd"))
    limits = resource.prlimit(mounted.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(mounted.pid, resource.RLIMIT_NOFILE, (used + 20, limits[1]))
    with ExitStack() as stack:
        files = [stack.enter_context(opened(path)) for path in paths]
        resource.prlimit(mounted.pid, resource.RLIMIT_NOFILE, limits)
        assert "passthrough is not used" in mounted.new_log()
        for path, fd in zip(paths, files, strict=True):
            os.pwrite(fd, b"changed", 0)
            expected = b"changed" + (path.name.encode() * 20_000)[7:]
            with opened(path) as again:
                assert os.pread(again, MIB, 0) == expected
    for path in paths:
        assert path.read_bytes()[:7] == b"changed"
    wait_until(
        lambda: len(os.listdir(f"/proc/{mounted.pid}/fd")) < used + 20 + len(paths),
        "descriptors to be closed",
    )


@pytest.mark.parametrize("kind", PASSED)
def test_few_descriptors_are_not_used_up(
    kind: str, place: Path, request: pytest.FixtureRequest
) -> None:
    """More files are open than the mount may have descriptors; all that files need works."""
    limit, count = 160, 300
    with (
        source_of(kind, place) as (source, options),
        mounting(source, place, *options, start=False) as mount,
        watchdog(mount, limit_of(request)),
        ExitStack() as stack,
    ):
        run("prlimit", f"--nofile=100:{limit}", *mount.command())
        mount.adopt()
        assert resource.prlimit(mount.pid, resource.RLIMIT_NOFILE) == (limit, limit)
        data = b"x" * 100_000  # large ones of a memory target have a descriptor each
        files = []
        for number in range(count):
            fd = stack.enter_context(opened(mount.path / f"file{number}"))
            size = 100 if kind == PASSED[0] and number > 40 else len(data)
            assert os.pwrite(fd, data[:size], 0) == size
            files.append(fd)
        # Opened again, since a memory target's files were too small when they were made.
        files += [stack.enter_context(opened(mount.path / f"file{n}")) for n in range(40)]
        for fd in files:
            os.fsync(fd)
            assert os.pread(fd, 10, 0) == b"x" * 10
        for number in range(20):
            (mount.path / f"new{number}").write_bytes(b"new")
            (mount.path / f"directory{number}").mkdir()
        assert len(os.listdir(f"/proc/{mount.pid}/fd")) <= limit
        assert "ERROR" not in mount.new_log()
        stack.close()
        run("sync", "-f", mount.path)
        assert (mount.path / "new7").read_bytes() == b"new"


@ON_DISK
def test_what_was_synced_survives_a_kill(mounted: Mount) -> None:
    data = os.urandom(3 * MIB)
    with opened(mounted.path / "new") as fd:
        os.write(fd, data)
        os.fsync(fd)
        os.write(fd, b"more")
        os.fdatasync(fd)
        mounted.kill()
    run("fusermount3", "-u", "-z", mounted.path)
    mounted.start()
    assert (mounted.path / "new").read_bytes() == data + b"more"


@ON_DISK
@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
def test_a_write_that_was_to_be_synced_survives_a_kill(mounted: Mount, flag: int) -> None:
    fd = os.open(mounted.path / "new", os.O_RDWR | os.O_CREAT | flag)
    os.write(fd, b"synced")
    mounted.kill()
    with fails_with(errno.ENOTCONN):
        os.close(fd)
    run("fusermount3", "-u", "-z", mounted.path)
    mounted.start()
    assert (mounted.path / "new").read_bytes() == b"synced"


@ON_DISK
def test_what_was_not_synced_survives_the_end(mounted: Mount) -> None:
    data = {f"file{number}": os.urandom(number * 20_000) for number in range(20)}
    for name, content in data.items():
        (mounted.path / name).write_bytes(content)
    with opened(mounted.path / "file5") as fd:
        os.pwrite(fd, b"at the end", 100_000)
    data["file5"] += b"at the end"
    mounted.remount()
    assert {e.name: Path(e).read_bytes() for e in os.scandir(mounted.path)} == data


@EVERYWHERE
def test_a_removed_file_can_be_used_until_it_is_closed(mounted: Mount) -> None:
    path = mounted.path / "file"
    path.write_bytes(b"x" * MIB)
    with opened(path) as fd:
        path.unlink()
        os.pwrite(fd, b"y" * MIB, MIB)
        assert os.fstat(fd).st_size == 2 * MIB
        assert os.pread(fd, 2, MIB - 1) == b"xy"
        with fails_with(errno.ENOENT):
            path.stat()
    assert os.listdir(mounted.path) == []


@EVERYWHERE
def test_a_mapping_outlives_its_file(mounted: Mount) -> None:
    path = mounted.path / "file"
    path.write_bytes(b"x" * MIB)
    with opened(path) as fd:
        mapping = mmap.mmap(fd, MIB)
    with mapping:
        path.unlink()
        (mounted.path / "other").write_bytes(b"y" * MIB)
        run("sync", "-f", mounted.path)  # whatever is to be erased is
        mapping[:MIB] = b"z" * MIB
        assert mapping[5000:5010] == b"z" * 10
    assert (mounted.path / "other").read_bytes() == b"y" * MIB


@EVERYWHERE
def test_the_mount_is_nosuid(mounted: Mount) -> None:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    (options,) = (line.split()[5] for line in lines if line.split()[4] == str(mounted.path))
    assert "nosuid" in options.split(",")


def test_a_target_on_a_stacked_file_system_is_used_the_usual_way(place: Path) -> None:
    lower, upper, work, merged = (place / name for name in ("lower", "upper", "work", "merged"))
    for path in (lower, upper, work, merged):
        path.mkdir()
    parts = f"lowerdir={lower},upperdir={upper},workdir={work}"
    run("mount", "-t", "overlay", "overlay", "-o", parts, merged)
    try:
        with mounting(f"file:{merged}/target", place, "passthrough") as mount:
            for number in range(3):
                (mount.path / f"file{number}").write_bytes(b"w" * MIB)
                assert (mount.path / f"file{number}").read_bytes() == b"w" * MIB
            log = mount.new_log()
            assert log.count("passthrough is not used") == 1
            assert "overlayfs" in log
    finally:
        run("umount", "-l", merged)


def test_an_engine_cannot_be_passed_through(place: Path) -> None:
    with serving("na+sm") as provider:
        mount = Mount(provider.address, place / "mnt", place / "log", "passthrough")
        mount.path.mkdir()
        done = run(*mount.command(), check=False)
    assert done.returncode == 1
    assert "only for embedded targets" in done.stderr
    assert not is_mounted(mount.path)


@pytest.mark.parametrize("kind", PASSED)
def test_read_only(kind: str, place: Path, request: pytest.FixtureRequest) -> None:
    with source_of(kind, place) as (source, options):
        if kind == PASSED[1]:
            with mounting(source, place, *options) as mount:
                (mount.path / "file").write_bytes(b"z" * MIB)
        with (
            mounting(source, place, *options, "ro") as mount,
            watchdog(mount, limit_of(request)),
        ):
            for entry in os.scandir(mount.path):
                with opened(Path(entry), os.O_RDONLY) as fd, stopped(mount):
                    assert os.pread(fd, 2 * MIB, 0) == b"z" * MIB
            with fails_with(errno.EROFS):
                (mount.path / "file").write_bytes(b"")


class _Kernel:
    """Takes every descriptor."""

    def __init__(self) -> None:
        self.backing = 0

    def register_backing(self, fd: int) -> int:
        self.backing += 1
        return self.backing

    def unregister_backing(self, number: int) -> None:
        self.backing -= 1


async def test_a_file_is_closed_while_the_target_s_lock_is_held(tmp_path: Path) -> None:
    """The mount's loop does not wait for the lock."""
    kernel: Any = _Kernel()
    config = FileConfig(path=str(tmp_path / "target"), create_if_missing=True)
    with opening.open_file(config) as target:
        region = target.create_and_write(bytes(100_000))
        passing = Passing(target, kernel)
        for _ in range(2):
            assert passing.open(region, os.O_RDWR) == 1
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                with target.state.long, target.state.lock:
                    for _ in range(2):
                        nursery.start_soon(passing.release, region.slot)
                    for _ in range(5):
                        await trio.sleep(0.01)
                    assert kernel.backing == 1
        assert kernel.backing == 0
        assert passing.open(region, os.O_RDWR) == 1
        await passing.release(region.slot)
