"""From the mount's first answer to its last byte: start, end, crash, and start again."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import limit_of
from tests.mount.support import (
    PATIENCE,
    PROVIDER_ID,
    Mount,
    another_python,
    fails_with,
    is_mounted,
    line_of,
    mounting,
    run,
    serving,
    wait_until,
    watchdog,
)


@pytest.fixture
def kept(request: pytest.FixtureRequest, place: Path) -> Iterator[Mount]:
    """A mount of a file target, not started, to be started as often as a test likes."""
    with (
        mounting(f"file:{place}/target", place, start=False) as mount,
        watchdog(mount, limit_of(request)),
    ):
        yield mount


def region_of(path: Path) -> str:
    return os.getxattr(path, "user.warabi.region").decode()


def fill(directory: Path, count: int) -> dict[str, bytes]:
    """Files that nobody synced, by name."""
    written = {f"file{n}": os.urandom(n * 37) for n in range(count)}
    for name, data in written.items():
        (directory / name).write_bytes(data)
    return written


def content(directory: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in directory.iterdir()}


# Starting


def test_a_mount_in_the_background_is_usable_at_once(mounted: Mount) -> None:
    (mounted.path / "file").write_bytes(b"at once")
    assert (mounted.path / "file").read_bytes() == b"at once"
    shown = run("findmnt", "-n", "-o", "FSTYPE,SOURCE", mounted.path).stdout.split()
    assert shown == ["fuse.warabifs", mounted.source]


def test_the_command_prints_nothing_and_lets_go_of_its_terminal(kept: Mount) -> None:
    done = run(*kept.command())
    assert (done.stdout, done.stderr) == ("", "")
    kept.adopt()
    links = {os.readlink(f"/proc/{kept.pid}/fd/{number}") for number in (0, 1, 2)}
    assert links == {"/dev/null"}


def test_the_log_is_where_the_command_was_started(kept: Mount, place: Path) -> None:
    kept.log = Path("logs/of the mount")
    (place / "logs").mkdir()
    run(*kept.command(), cwd=place)
    kept.adopt()
    kept.log = place / kept.log
    assert kept.log.exists()
    assert os.readlink(f"/proc/{kept.pid}/cwd") == "/"
    assert os.readlink(f"/proc/{kept.pid}/cwd") == "/"
    assert os.getsid(kept.pid) == kept.pid


def test_a_mount_in_the_foreground_ends_with_exit_status_0(kept: Mount) -> None:
    kept.start_in_foreground()
    (kept.path / "file").write_bytes(b"data")
    assert kept.unmount() == 0
    assert not is_mounted(kept.path)


def test_a_relative_target_is_found_again_after_the_process_left_its_directory(
    place: Path,
) -> None:
    with mounting("file:target", place, start=False) as mount:
        run(*mount.command(), cwd=place)
        mount.adopt()
        (mount.path / "file").write_bytes(b"data")
        mount.unmount()
    assert (place / "target").is_file()


def test_a_read_only_mount_refuses_changes_and_shows_files(place: Path) -> None:
    with mounting(f"file:{place}/target", place) as mount:
        (mount.path / "file").write_bytes(b"data")
        mount.unmount()
        mount.options = ("ro",)
        mount.start()
        assert (mount.path / "file").read_bytes() == b"data"
        with fails_with(errno.EROFS):
            (mount.path / "file").write_bytes(b"other")


def test_two_memory_mounts_share_nothing(place: Path) -> None:
    for name in ("a", "b"):
        (place / name).mkdir()
    with mounting("memory:", place / "a") as one, mounting("memory:", place / "b") as two:
        (one.path / "file").write_bytes(b"one")
        assert os.listdir(two.path) == []


# Ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_mount_with_everything_persisted(
    kept: Mount, number: signal.Signals
) -> None:
    kept.start_in_foreground()
    written = fill(kept.path, 200)
    kept.signal(number)
    assert kept.wait() == 0
    assert not is_mounted(kept.path)
    kept.start()
    assert content(kept.path) == written


def test_unmounting_persists_everything_and_a_new_mount_may_follow_at_once(kept: Mount) -> None:
    kept.start()
    written = fill(kept.path, 200)
    regions = {name: region_of(kept.path / name) for name in written}
    for _ in range(3):
        run("fusermount3", "-u", kept.path)
        kept.start()  # without waiting for the old process
        assert content(kept.path) == written
        assert {name: region_of(kept.path / name) for name in written} == regions


def test_unmounting_is_refused_while_a_file_is_open(mounted: Mount) -> None:
    with open(mounted.path / "file", "wb") as file:
        refused = run("fusermount3", "-u", mounted.path, check=False)
        assert refused.returncode != 0
        assert "busy" in refused.stderr
        file.write(b"still here")
    assert (mounted.path / "file").read_bytes() == b"still here"
    assert mounted.alive


HOLDER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.write(fd, b"before")
print("open", flush=True)
input()
try:
    os.write(fd, b"after")
    print("written", flush=True)
except OSError as error:
    print(error.errno, flush=True)
"""


def test_sigterm_ends_the_mount_though_a_program_has_a_file_open(kept: Mount) -> None:
    kept.start_in_foreground()
    with another_python(HOLDER, kept.path / "held") as holder:
        assert line_of(holder) == "open"
        kept.signal(signal.SIGTERM)
        assert kept.wait() == 0
        assert not is_mounted(kept.path)
        assert holder.stdin is not None
        print("go on", file=holder.stdin, flush=True)
        assert line_of(holder) in (str(errno.ENOTCONN), str(errno.ECONNABORTED))
    kept.start()
    assert content(kept.path) == {"held": b"before"}


def test_sigterm_keeps_what_was_written_through_a_shared_mapping(kept: Mount) -> None:
    script = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 100000)
with mmap.mmap(fd, 100000) as mapping:
    mapping[50000:50004] = b"here"
    print("mapped", flush=True)
    input()
"""
    kept.start_in_foreground()
    with another_python(script, kept.path / "mapped") as holder:
        assert line_of(holder) == "mapped"
        kept.signal(signal.SIGTERM)
        assert kept.wait() == 0
    kept.start()
    assert (kept.path / "mapped").read_bytes() == bytes(50000) + b"here" + bytes(49996)


def test_a_lazy_unmount_persists_when_the_last_file_is_closed(kept: Mount) -> None:
    kept.start_in_foreground()
    with open(kept.path / "file", "wb") as file:
        run("fusermount3", "-u", "-z", kept.path)
        assert not is_mounted(kept.path)
        file.write(b"late")
    assert kept.wait() == 0
    kept.start()
    assert content(kept.path) == {"file": b"late"}


def test_a_file_that_was_removed_while_open_is_gone_after_a_remount(kept: Mount) -> None:
    kept.start_in_foreground()
    with another_python(HOLDER, kept.path / "held") as holder:
        assert line_of(holder) == "open"
        (kept.path / "held").unlink()
        kept.signal(signal.SIGTERM)
        assert kept.wait() == 0
    kept.start()
    assert os.listdir(kept.path) == []
    regions = Path(f"{kept.source.removeprefix('file:')}.regions")
    assert [path for path in regions.glob("*/*") if path.is_file()] == []


def test_the_bytes_of_a_removed_file_are_freed_though_it_was_opened_by_its_digits(
    kept: Mount,
) -> None:
    kept.start()
    path = kept.path / "file"
    path.write_bytes(b"data")
    digits = kept.path / region_of(path)
    assert digits.read_bytes() == b"data"
    stored = list(Path(f"{kept.source.removeprefix('file:')}.regions").glob(f"*/{digits.name}"))
    assert len(stored) == 1
    path.unlink()

    def freed() -> bool:
        run("sync", kept.path)  # the bytes go after the commit that forgets the region
        return not stored[0].exists()

    wait_until(freed, "the end of the region's file")
    assert os.listdir(kept.path) == []
    assert not digits.exists()


# Owning a target


def test_a_target_that_is_mounted_cannot_be_mounted_twice(kept: Mount, place: Path) -> None:
    kept.start()
    written = fill(kept.path, 10)
    other = place / "other"
    other.mkdir()
    second = Mount(kept.source, other, place / "other.log")
    refused = run(*second.command(), check=False)
    assert refused.returncode != 0
    assert not is_mounted(other)
    assert refused.stderr.count("\n") == 1
    assert str(kept.pid) in refused.stderr
    assert content(kept.path) == written


def test_a_target_is_never_served_by_two_processes_while_the_first_still_closes(
    kept: Mount,
) -> None:
    kept.start()
    fill(kept.path, 50)
    for _ in range(4):
        first = kept.pid
        run("fusermount3", "-u", kept.path)
        kept.start()
        assert kept.pid != first
        assert not Path(f"/proc/{first}").exists() or not _holds(first, kept.lock)


def _holds(pid: int, lock: Path) -> bool:
    inode = f":{lock.stat().st_ino} "
    locks = Path("/proc/locks").read_text().splitlines()
    return any(f" {pid} " in line and inode in line for line in locks)


# Crashing


def test_a_synced_file_survives_kill_9_under_its_name_and_region(kept: Mount) -> None:
    kept.start()
    data = os.urandom(3_000_000)
    directory = kept.path / "some" / "directory"
    directory.mkdir(parents=True)
    with open(directory / "file", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    region = region_of(directory / "file")
    before = (directory / "file").stat()

    kept.kill()
    with fails_with(errno.ENOTCONN):
        os.listdir(kept.path)
    kept.start()  # over the dead mount

    assert (directory / "file").read_bytes() == data
    assert region_of(directory / "file") == region
    after = (directory / "file").stat()
    assert (after.st_mode, after.st_uid, after.st_ino) == (
        before.st_mode, before.st_uid, before.st_ino,
    )  # fmt: skip


def test_what_was_synced_before_stays_whole_when_a_rewrite_is_killed(kept: Mount) -> None:
    kept.start()
    old, new = os.urandom(500_000), os.urandom(700_000)
    path = kept.path / "file"
    for name, data in (("file", old), ("file.tmp", new)):
        with open(kept.path / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    os.rename(kept.path / "file.tmp", path)  # as programs replace a file; the rename is not synced
    kept.kill()
    kept.start()
    assert path.read_bytes() in (old, new)


def test_a_rename_is_kept_once_its_directory_was_synced(kept: Mount) -> None:
    kept.start()
    (kept.path / "old").write_bytes(b"data")
    os.rename(kept.path / "old", kept.path / "new")
    directory = os.open(kept.path, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    kept.kill()
    kept.start()
    assert os.listdir(kept.path) == ["new"]


# Synced files are announced on standard output after the fsync; every file holds its own name
# over and over, so that foreign bytes in it are seen.
CHURN = """
import itertools, os, random, sys
root, seed = sys.argv[1], int(sys.argv[2])
chance = random.Random(seed)
def fill(name, size):
    unit = f"{name:>16}".encode()
    return (unit * (size // 16 + 1))[:size]
for number in itertools.count():
    name = f"r{seed}n{number}"
    size = chance.choice((0, 1, 100, 4096, 70_000, 1_200_000))
    data = fill(name, size)
    fd = os.open(f"{root}/{name}", os.O_WRONLY | os.O_CREAT)
    while data:
        data = data[os.write(fd, data):]
    what = chance.random()
    if what < 0.3:
        os.fsync(fd)
        print(name, size, flush=True)
    elif what < 0.5:
        os.unlink(f"{root}/{name}")
    elif what < 0.6:
        os.ftruncate(fd, size // 2)
    os.close(fd)
"""


def _owner_of(data: bytes, name: str) -> bool:
    """Whether *data* is what a file called *name* may hold: its name repeated, or zeros."""
    unit = f"{name:>16}".encode()
    whole = (unit * (len(data) // 16 + 1))[: len(data)]
    return all(
        data[n : n + 4096] in (whole[n : n + 4096], bytes(len(data[n : n + 4096])))
        for n in range(0, len(data), 4096)
    )


def test_kill_9_at_any_moment_damages_no_synced_file_and_mixes_no_two(kept: Mount) -> None:
    chance = random.Random(2)
    synced: dict[str, int] = {}
    for seed in range(6):
        kept.start()
        with another_python(CHURN, kept.path, str(seed)) as churn:
            for _ in range(chance.randrange(1, 40)):
                name, size = line_of(churn).split()
                synced[name] = int(size)
            kept.kill()
            assert churn.stdout is not None
            # Announced before the kill, but not read until now.
            for line in churn.stdout.read().splitlines():
                synced[line.split()[0]] = int(line.split()[1])
        kept.start()
        found = content(kept.path)
        missing = synced.keys() - found.keys()
        assert not missing, f"round {seed}"
        for name, data in found.items():
            assert _owner_of(data, name), f"round {seed}: {name} is damaged"
            if name in synced:
                assert len(data) == synced[name], f"round {seed}: {name}"
                assert data.strip(b"\0") == data, f"round {seed}: {name} has holes"
        kept.unmount()


def test_a_crash_leaves_no_unreachable_bytes(kept: Mount) -> None:
    kept.start()
    fill(kept.path, 100)
    kept.kill()
    kept.start()
    names = os.listdir(kept.path)
    regions = {region_of(kept.path / name) for name in names}
    stored = {path.name for path in Path(f"{kept.source[5:]}.regions").glob("*/*")}
    assert stored == regions


# The provider ends


@pytest.mark.parametrize("transport", ["na+sm", "tcp"])
def test_a_dead_provider_is_an_error_and_the_mount_can_still_be_removed(
    place: Path, transport: str
) -> None:
    with (
        serving(transport) as provider,
        mounting(provider.address, place, f"provider_id={PROVIDER_ID}", "reconnect=0") as mount,
        watchdog(mount, 60),
    ):
        path = mount.path / "file"
        path.write_bytes(b"data")
        with open(path, "r+b", buffering=0) as file:
            provider.kill()
            for attempt in (
                lambda: file.write(b"more"),
                lambda: os.fsync(file.fileno()),
                lambda: (mount.path / "other").write_bytes(b"data"),
                lambda: os.listdir(mount.path),
                lambda: os.statvfs(mount.path),
            ):
                with fails_with(errno.ENOTCONN):
                    attempt()
        assert mount.alive
        mount.unmount()
        assert not is_mounted(mount.path)


def test_a_provider_that_stops_answering_is_an_error_in_the_end(place: Path) -> None:
    options = f"provider_id={PROVIDER_ID},timeout=1,reconnect=0"
    with (
        serving("na+sm") as provider,
        mounting(provider.address, place, options) as mount,
        watchdog(mount, 60),
    ):
        provider.process.send_signal(signal.SIGSTOP)
        try:
            with fails_with(errno.ETIMEDOUT):
                (mount.path / "file").write_bytes(b"data")
            mount.signal(signal.SIGTERM)
            mount.wait()
            assert not is_mounted(mount.path)
        finally:
            provider.process.send_signal(signal.SIGCONT)


def test_a_mount_of_an_engine_is_ended_by_a_signal_and_loses_nothing(place: Path) -> None:
    target = {"type": "abtio", "config": {"path": f"{place}/target", "create_if_missing": True}}
    with serving("na+sm", target) as provider:
        options = f"provider_id={PROVIDER_ID}"
        with mounting(provider.address, place, options, start=False) as mount:
            mount.start_in_foreground()
            written = fill(mount.path, 50)
            mount.signal(signal.SIGTERM)
            assert mount.wait() == 0
            mount.start()
            assert content(mount.path) == written


# Programs around it


def test_umount_and_the_command_warabifs_end_a_mount(kept: Mount) -> None:
    for command in (["umount"], [*WARABIFS, "umount"]):
        kept.start()
        run(*command, kept.path)
        kept.wait()
        assert not is_mounted(kept.path)


WARABIFS = [sys.executable, "-c", "import sys; from warabifs.mount.cli import main; main()"]


def test_the_mount_answers_while_its_disk_is_busy(kept: Mount) -> None:
    """An fsync of one file, which waits for the disk, does not stop work on another."""
    kept.start()
    writer = ["dd", "if=/dev/zero", f"of={kept.path}/big", "bs=1M", "count=300", "conv=fsync"]
    with subprocess.Popen(writer, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: (kept.path / "big").exists(), "dd")
        for number in range(100):
            (kept.path / f"small{number}").write_bytes(b"data")
        assert process.wait(100) == 0
    assert len(os.listdir(kept.path)) == 101


KILLED_IN_AN_UNLUCKY_MOMENT = """
import sys, threading, trio
from warabifs.mount import main as mount
from warabifs.fs.filesystem import FileSystem

async def mknod(self, parent, *rest):
    # The program that creates holds the directory's lock, which this waits for in the kernel.
    self.drop_name(parent, b"anything")
    print("now", flush=True)
    await trio.sleep_forever()

FileSystem.mknod = mknod
mount.main(["--foreground", *sys.argv[1:]])
"""

REFUSED = """
from warabifs.frontends import device

def refused(*arguments):
    raise PermissionError

device._mount = refused
"""


def waits_in_the_kernel(thread: Path) -> bool:
    with contextlib.suppress(OSError):  # it ended
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "D"
    return False


@pytest.mark.parametrize("kind", ["mount(2)", "fusermount3"])
def test_the_watchdog_ends_a_killed_mount_that_cannot_exit(place: Path, kind: str) -> None:
    (path := place / "mnt").mkdir()
    script = KILLED_IN_AN_UNLUCKY_MOMENT
    if kind == "fusermount3":
        script = REFUSED + script
    with another_python(script, "memory:", path) as process:
        wait_until(lambda: is_mounted(path), "it is mounted")
        creating = subprocess.Popen(["touch", path / "new"], stderr=subprocess.PIPE, text=True)
        try:
            assert line_of(process) == "now"
            task = Path(f"/proc/{process.pid}/task")
            wait_until(lambda: any(map(waits_in_the_kernel, task.iterdir())), "such a thread")
            process.kill()
            _, said = creating.communicate(timeout=PATIENCE)
            assert "not connected" in said or "abort" in said
        finally:
            run("umount", "-i", "-f", "-l", path, check=False)
            creating.kill()
            creating.communicate()
