"""Power failures on real file systems: snapshots of a disk in use, mounted and opened.

The disk is a file on an XFS, which can clone a file at one instant whatever is written to it;
the clone is what the disk would have held had the power failed then, its cache excepted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.crash.powerloss import Promises, check
from tests.crash.targets import opened
from tests.support.helpers import (
    PATIENCE,
    environment,
    file_config,
    pmem_config,
    provider_process,
)
from warabi import errors
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.target.target import Target
from warabi.tools import fsck

_FICLONE = 0x40049409
_SHUTDOWN = 0x8004587D
"""``EXT4_IOC_SHUTDOWN``, and XFS's."""
FAILED = (errors.StorageError, errors.StorageFull)
SNAPSHOTS = 8
OPERATIONS = 1_000_000
"""More than there is time for: it is killed after the last snapshot."""
MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}


def run(*command: str | Path) -> None:
    subprocess.run(
        [str(word) for word in command], check=True, timeout=PATIENCE, capture_output=True,
        env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
    )  # fmt: skip


def make(image: Path, kind: str, size: int) -> None:
    image.write_bytes(b"")
    os.truncate(image, size)
    run(*MAKE[kind], image)


@contextlib.contextmanager
def mounted(image: Path, place: Path, *options: str) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    run("mount", "-o", ",".join(("loop", *options)), image, place)
    try:
        yield place
    finally:
        run("umount", "-l", place)


def clone(image: Path, copy: Path) -> None:
    with image.open("rb") as source, copy.open("wb") as destination:
        fcntl.ioctl(destination.fileno(), _FICLONE, source.fileno())


@pytest.mark.parametrize(
    ("backend", "kind"), [("file", "ext4"), ("pmem", "ext4"), ("file", "xfs"), ("pmem", "xfs")]
)
def test_a_snapshot_of_a_disk_in_use(backend: str, kind: str, scratch: Path) -> None:
    make(scratch / "outer", "xfs", 2 << 30)
    with mounted(scratch / "outer", scratch / "on-outer") as outer:
        make(outer / "image", kind, 400 << 20)
        with mounted(outer / "image", scratch / "disk") as disk:
            told = snapshots(backend, disk, outer)
        checked = 0
        for number, (before, after) in enumerate(told):
            options = ["nouuid"] if kind == "xfs" else []
            with mounted(outer / f"copy{number}", scratch / "copy", *options) as copy:
                promises = Promises(1)
                for mark in before:
                    promises.hear(mark)
                # What was begun while the clone was made may be in it.
                promises.may_go_on(after)
                check(backend, copy / "target", promises)
                checked += promises.phase == "open"
            (outer / f"copy{number}").unlink()
    assert checked == SNAPSHOTS


def lines(file: Path) -> list[str]:
    """Of a file that is being written, those that are whole."""
    return file.read_text().rpartition("\n")[0].splitlines()


def snapshots(backend: str, disk: Path, outer: Path) -> list[tuple[list[str], list[str]]]:
    """Clone the disk while a workload runs on it; what that had said before and after each."""
    script = Path(__file__).with_name("recorded.py")
    marks = disk.parent / "marks"
    arguments = [str(script), backend, f"{disk}/target", "1", str(OPERATIONS)]
    rng = random.Random(1)
    told: list[tuple[list[str], list[str]]] = []
    with marks.open("wb") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, env=environment())
    try:
        while "end 5 " not in marks.read_text():
            assert process.poll() is None
            time.sleep(0.005)
        for number in range(SNAPSHOTS):
            time.sleep(rng.uniform(0, 0.1))
            before = lines(marks)
            clone(outer / "image", outer / f"copy{number}")
            told.append((before, lines(marks)[len(before) :]))
        assert process.poll() is None, "it had ended before the last snapshot"
    finally:
        process.kill()
        process.wait(PATIENCE)
    return told


@contextlib.contextmanager
def disk_that_cannot_grow(scratch: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A mounted disk, and what makes the kernel fail to write what has no place on it yet.

    Within the block it is mounted; afterwards it has room again.
    """
    run("mount", "-t", "tmpfs", "-o", "size=40m", "none", scratch)
    try:
        image = scratch / "image"
        image.write_bytes(b"")
        os.truncate(image, 200 << 20)
        run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", image)

        def fill() -> None:
            with contextlib.suppress(OSError), (scratch / "filler").open("wb", 0) as filler:
                while True:  # what the disk is in has no room left for what it is to hold
                    filler.write(bytes(1 << 16))

        with mounted(image, scratch / "disk") as disk:
            yield disk, fill
    finally:
        run("umount", "-l", scratch)


def test_what_a_client_could_not_sync_is_remembered(scratch: Path) -> None:
    """By the provider, although each process syncs by itself what it has written."""
    size = 8 << 20
    with (
        disk_that_cannot_grow(scratch) as (disk, fill),
        provider_process("na+sm", file_config(disk / "target")) as served,
        contextlib.ExitStack() as stack,
    ):
        handles = []
        for _ in range(2):
            engine = stack.enter_context(Engine("na+sm", client))
            handles.append(Client(engine).make_target_handle(served.address, 1))
        region = handles[0].create(size)
        handles[0].persist(region, 0, size)
        for handle in handles:
            handle.read(region, 0, size)
        fill()
        handles[0].write(region, 0, b"x" * size)
        for _ in range(3):
            for handle in handles:
                with pytest.raises(FAILED, match="a sync failed"):
                    handle.persist(region, 0, size)
        (scratch / "filler").unlink()
        for handle in handles:
            with pytest.raises(FAILED, match="Write it to a new region"):
                handle.persist(region, 0, size)


def persisted(calls: list[Callable[[], object]]) -> list[bool]:
    """Which of the calls, that threads make at the same time, do not fail."""
    together = threading.Barrier(len(calls))
    succeeded = [False] * len(calls)

    def work(number: int) -> None:
        together.wait(PATIENCE)
        with contextlib.suppress(*FAILED):
            calls[number]()
            succeeded[number] = True

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return succeeded


CALLERS = 8


@pytest.mark.parametrize("way", ["threads", "guests", "requests"])
@pytest.mark.parametrize("kind", ["loose", "file", "pmem", "sync"])
def test_each_persist_under_way_learns_that_data_are_lost(
    kind: str, way: str, scratch: Path
) -> None:
    """The kernel reports it to the first sync by a descriptor, and the others succeed.

    The persists, or writes that sync, are of parts of one region, or of small regions that share a
    file.
    """
    size = 1 << 15 if kind == "file" else 1 << 20
    data = [bytes([65 + number]) * size for number in range(CALLERS)]
    with disk_that_cannot_grow(scratch) as (disk, fill), contextlib.ExitStack() as stack:
        path = disk / "target"
        target: Target | TargetHandle
        if way == "threads":
            target = opened(kind, path)
        else:
            transport = "na+sm" if way == "guests" else "tcp"
            settings = {"packed": kind == "file", "sync": kind == "sync"}
            config = pmem_config(path) if kind == "pmem" else file_config(path, **settings)
            served = stack.enter_context(provider_process(transport, config))
            engine = stack.enter_context(Engine(transport, client))
            target = Client(engine).make_target_handle(served.address, 1)
        if kind == "file":
            regions = [(target.create(size), 0) for _ in data]
        else:
            whole = target.create(size * CALLERS)
            regions = [(whole, number * size) for number in range(CALLERS)]
        for region, _ in regions:
            target.persist(region, 0, 1)
            for _ in range(3):  # so that guests are granted it
                assert target.read(region, 0, 1) == b"\0"
        fill()
        extents = list(zip(regions, data, strict=True))
        if kind != "sync":
            for (region, offset), part in extents:
                target.write(region, offset, part)
        calls: list[Callable[[], object]] = []
        for (region, offset), part in extents:
            if kind == "sync":
                calls.append(partial(target.write, region, offset, part))
            elif isinstance(target, Target) or way == "guests":
                calls.append(partial(target.persist, region, offset, size))
            else:
                calls.append(target.persist_async(region, offset, size).wait)
        succeeded = persisted(calls)
        (scratch / "filler").unlink()
        if isinstance(target, Target):
            with contextlib.suppress(*FAILED):
                target.close()
        stack.close()
        run("umount", disk)
        run("mount", "-o", "loop", scratch / "image", disk)
        with opened(kind, path, create=False) as again:
            for ((region, offset), part), safe in zip(extents, succeeded, strict=True):
                assert not safe or again.read(region, offset, size) == part
    assert not all(succeeded)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_an_io_error_is_not_taken_for_damage(kind: str, scratch: Path) -> None:
    """SQLite calls a database malformed when it cannot be read."""
    make(scratch / "image", kind, 400 << 20)
    with mounted(scratch / "image", scratch / "disk") as disk:
        with opened("file", disk / "target") as target:
            regions = [target.namespace.mknod(1, b"%d" % n, 0o644, 0, 0) for n in range(2000)]
            for region in regions:
                target.namespace.setxattr(region.ino, b"user.a", b"value" * 50)
        target = opened("file", disk / "target", create=False)
        names = target.namespace
        names.setattr(regions[0].ino, mode=0o600)
        fd = os.open(disk, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", 2))
        finally:
            os.close(fd)
        calls: list[Callable[[], object]] = [
            lambda: names.getattr(regions[1000].ino),
            lambda: names.getxattr(regions[1000].ino, b"user.a"),
            lambda: names.setxattr(regions[1500].ino, b"user.a", b"other"),
            lambda: names.lookup(1, b"1999"),
            lambda: names.readdir(1),
            lambda: target.persist(regions[0].region, 0, 0),
            target.list,
            target.commit,
            target.sync,
            target.close,
            lambda: opened("file", disk / "target", create=False),
        ]
        failed = 0
        for call in calls:
            try:
                call()
            except FAILED:
                failed += 1  # what is in memory can still be had
        assert failed > 5
        with pytest.raises((OSError, errors.StorageError)):
            fsck.check(disk / "target", repair=True, say=lambda line: None)
    with (
        mounted(scratch / "image", scratch / "disk") as disk,
        opened("file", disk / "target", create=False) as target,
    ):
        assert len(target.list(None, 10_000)) == 2000
