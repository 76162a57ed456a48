"""Asynchronous writes with ``O_DIRECT`` while others use the file through the page cache.

What io_getevents(2) brought is what every later read finds, however the file is read.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.aio import PAGE, writing
from tests.mount.conftest import disposable, limit_of
from tests.mount.support import (
    MIB,
    SOURCES,
    Mount,
    mounting,
    run,
    serving,
    source_of,
    watchdog,
)
from tests.mount.together import BELIEVING
from warabifs.frontends.base import Ability
from warabifs.frontends.registry import FRONT_ENDS

PAGES = 160
PASSED = "memory-passed"
MODES = (*SOURCES, PASSED, "engine exclusive", "memory direct_io")
SOME = pytest.mark.parametrize("mount", ["memory", "file", "engine"], indirect=True)


@pytest.fixture(scope="module")
def mounts(front_end: str) -> Iterator[dict[str, Mount]]:
    """A mount of each mode, made once."""
    passes = Ability.PASSTHROUGH in FRONT_ENDS[front_end].abilities
    with disposable("/tmp") as path, contextlib.ExitStack() as stack:
        made = {}
        for number, mode in enumerate(mode for mode in MODES if passes or mode != PASSED):
            kind, _, option = mode.partition(" ")
            place = path / str(number)
            place.mkdir()
            source, options = stack.enter_context(source_of(kind, place))
            options = [*options, *filter(None, [option])]
            made[mode] = stack.enter_context(mounting(source, place, *options))
        yield made


@pytest.fixture
def mount(request: pytest.FixtureRequest, mounts: dict[str, Mount]) -> Iterator[Mount]:
    mount = mounts[request.param]
    with watchdog(mount, limit_of(request)):
        yield mount
    mount.check_log()


def filled(mount: Mount, pages: int = PAGES) -> Path:
    path = mount.path / "file"
    path.write_bytes(bytes(pages * PAGE))
    return path


@contextlib.contextmanager
def busy(*work: Callable[[], object]) -> Iterator[None]:
    """Do *work* again and again, each in a thread, while the block runs."""
    done = threading.Event()

    def repeat(one: Callable[[], object]) -> None:
        while not done.is_set():
            one()

    with ThreadPoolExecutor(len(work)) as pool:
        threads = [pool.submit(repeat, one) for one in work]
        try:
            yield
        finally:
            done.set()
        for thread in threads:
            thread.result(60)


def written(fd: int, depth: int, count: int, check: Callable[[int, bytes], None]) -> list[bytes]:
    """Write *count* random pages, *depth* at a time; *check* is told what has ended.  Returns what
    each page begins with by then."""
    chosen = random.Random(depth)
    content, under_way = [bytes(8)] * PAGES, dict[int, bytes]()
    with writing(fd, depth) as writer:
        for number in range(count):
            while not writer.free or (number == count - 1 and under_way):
                for page in writer.completed():
                    content[page] = under_way.pop(page)
                    check(page, content[page])
            page = chosen.choice([page for page in range(PAGES) if page not in under_way])
            under_way[page] = b"%08d" % number
            writer.submit(page, under_way[page])
        while under_way:
            for page in writer.completed():
                content[page] = under_way.pop(page)
                check(page, content[page])
    return content


@pytest.mark.parametrize(
    ("mount", "reading"),
    [
        *((mode, "read") for mode in MODES if mode != PASSED),
        pytest.param(PASSED, "read", marks=pytest.mark.needs(Ability.PASSTHROUGH)),
        *((mode, "mapping") for mode in ("memory", "engine")),
        *((mode, "buffered writes") for mode in ("memory", "file", "engine")),
    ],
    indirect=["mount"],
)
def test_what_has_ended_is_what_is_read(mount: Mount, reading: str) -> None:
    path = filled(mount)
    chosen = random.Random(1)
    with contextlib.ExitStack() as stack:
        cached = os.open(path, os.O_RDWR)
        stack.callback(os.close, cached)
        direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        stack.callback(os.close, direct)

        def look(page: int) -> bytes:
            return os.pread(cached, 8, page * PAGE)

        def disturb() -> None:
            page = chosen.randrange(PAGES)
            if reading == "buffered writes":  # of bytes that nobody else writes
                os.pwrite(cached, b"tail", page * PAGE + PAGE - 4)
            look(page)

        if reading == "mapping":
            mapped = stack.enter_context(mmap.mmap(cached, PAGES * PAGE, prot=mmap.PROT_READ))

            def look(page: int) -> bytes:
                return mapped[page * PAGE : page * PAGE + 8]

        def check(page: int, data: bytes) -> None:
            assert look(page) == data

        with busy(disturb):
            content = written(direct, 16, 400, check)
        assert [look(page) for page in range(PAGES)] == content


@SOME
def test_many_at_a_time_do_not_keep_readers_from_going_on(mount: Mount) -> None:
    """More than the kernel has under way at once, and than may wait for pages to be dropped."""
    path = filled(mount)
    direct = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with busy(path.read_bytes, path.read_bytes):
            content = written(direct, 150, 600, lambda page, data: None)
        found = path.read_bytes()
    finally:
        os.close(direct)
    assert [found[page * PAGE : page * PAGE + 8] for page in range(PAGES)] == content


@SOME
@pytest.mark.parametrize("engine", ["libaio", "io_uring"])
def test_what_fio_wrote_is_what_is_read(mount: Mount, engine: str) -> None:
    path = filled(mount)
    cached = os.open(path, os.O_RDONLY)
    chosen = random.Random(1)
    try:
        with busy(lambda: os.pread(cached, PAGE, chosen.randrange(PAGES) * PAGE)):
            run(
                "fio", "--name=write", f"--filename={path}", f"--ioengine={engine}", "--direct=1",
                "--rw=randwrite", "--bs=4k", f"--size={PAGES * PAGE}", "--iodepth=16", "--loops=3",
                "--refill_buffers", cwd="/tmp",
            )  # fmt: skip
        found = os.pread(cached, MIB, 0)
    finally:
        os.close(cached)
    direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGES * PAGE) as place:
            assert os.preadv(direct, [place], 0) == PAGES * PAGE
            assert found == place[:]
    finally:
        os.close(direct)


def test_what_has_ended_is_durable_where_that_was_asked_for(place: Path) -> None:
    """For asynchronous writes the kernel sends no FSYNC."""
    with mounting(f"file:{place}/target", place) as mount:
        path = mount.path / "file"
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
        try:
            os.ftruncate(fd, PAGES * PAGE)
            content = written(fd, 16, 200, lambda page, data: None)
        finally:
            os.close(fd)
        mount.kill()
        mount.start()
        found = path.read_bytes()
        assert [found[page * PAGE : page * PAGE + 8] for page in range(PAGES)] == content


SLOW = """
import trio
from warabi.in_process import async_ops
from warabi.provider import zero_copy

at_once = async_ops.write

async def later(*arguments, **options):
    await trio.sleep(0.2)
    await at_once(*arguments, **options)

async def refuse(channel, request):
    return False

async_ops.write = later
async_ops.waits = lambda target, name, arguments: True
zero_copy.receive = refuse
"""
"""A provider whose writes take their time, while it answers everything else."""


def test_what_was_asked_while_writes_were_under_way_is_not_believed(place: Path) -> None:
    """The kernel believes for long what it was told of the times, and was told before the end."""
    with (
        serving("tcp", before=SLOW) as provider,
        mounting(provider.address, place, *BELIEVING) as mount,
    ):
        path = mount.path / "file"
        path.write_bytes(bytes(PAGE))
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        try:
            with writing(fd, 1) as writer:
                for number in range(3):
                    writer.submit(0, b"%08d" % number)
                    before = os.fstat(fd).st_mtime_ns
                    writer.completed()
                    assert os.fstat(fd).st_mtime_ns > before
        finally:
            os.close(fd)
