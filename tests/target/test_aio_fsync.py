"""Persisting from a Trio program: without a thread where one flush of a file is all."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NoReturn

import pytest
import trio
import trio.testing

from tests.support.helpers import PATIENCE, environment
from warabi import aio, errors
from warabi.backends.base import Flush
from warabi.eventloop import inline_wait
from warabi.eventloop.aio_fsync import Flusher, flushed
from warabi.target import opening
from warabi.target.config import FileConfig
from warabi.target.target import Target


def opened(path: Path) -> Target:
    return opening.open_file(FileConfig(path=str(path), create_if_missing=True))


PERSISTS = """
import os, sys, trio
from warabi import aio
from warabi.target import commit as durability, opening as layout, write_throttle as pace
from warabi.target.config import FileConfig
durability.COMMIT_INTERVAL = 3600
pace._SLOW = 10**12  # on a busy machine writes go to threads
async def main():
    target = aio.attach(layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True)))
    region = await target.create_and_write(bytes(9000), True)
    os.write(1, b"begin")
    for i in range(20):
        await target.write(region, i, b"x", True)
        await target.persist(region, 0, 9000)
        await target.fsync(region)
        await target.fsync(region, times=False)
    os.write(1, b"end")
    os._exit(0)
trio.run(main)
"""


def test_one_flush_of_a_file_takes_no_thread(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["strace", "-f", "-o", str(log), "-e", "trace=io_submit,fsync,fdatasync,futex,write"]
    done = subprocess.run(
        [*command, sys.executable, "-c", PERSISTS, str(tmp_path / "a")],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "beginend"), done.stderr
    before, _, rest = log.read_text().partition('"begin"')
    loop = before.splitlines()[-1].split()[0]  # the others may just be about to go to sleep
    lines = [line.split() for line in rest.partition('"end"')[0].splitlines()[1:]]
    calls = Counter(line[1].partition("(")[0] for line in lines if line[0] == loop)
    assert calls["io_submit"] == 80
    assert calls["fsync"] + calls["fdatasync"] + calls["futex"] == 0, calls


@pytest.mark.parametrize("data", [True, False])
async def test_many_at_once(data: bool, tmp_path: Path) -> None:
    """Also more than the system takes at a time."""
    with (tmp_path / "file").open("wb") as file:
        done = 0

        async def one() -> None:
            nonlocal done
            await flushed(Flush(file.fileno(), data))
            done += 1

        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(one)
        assert done == 1000


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment without an end, so that nothing here depends on times."""
    monkeypatch.setattr(inline_wait, "INLINE_MOMENT", int(PATIENCE * 1000))
    monkeypatch.setattr(inline_wait, "INLINE_LONGEST", int(PATIENCE * 1000))


class Turns(trio.abc.Instrument):
    """Counts the turns of the loop: which tasks one has is left to chance."""

    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


@pytest.mark.parametrize("busy", [False, True])
async def test_a_loop_with_nothing_else_to_do_waits_in_the_kernel(
    busy: bool, tmp_path: Path, patient: None
) -> None:
    here, there = os.pipe()
    turns = Turns()
    try:
        with (tmp_path / "file").open("wb") as file, inline_wait.serving(here):
            flush = Flush(file.fileno(), True)
            await flushed(flush)  # whatever has to be made is made
            if busy:
                os.write(there, b"a request")
            trio.lowlevel.add_instrument(turns)
            await flushed(flush)
            assert (turns.count > 0) == busy
    finally:
        os.close(here)
        os.close(there)


async def test_several_at_once_do_not_wait_for_each_other(tmp_path: Path, patient: None) -> None:
    here, there = os.pipe()
    try:
        with (tmp_path / "file").open("wb") as file, inline_wait.serving(here):
            os.write(there, b"a request")
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(flushed, Flush(file.fileno(), True))
                    await trio.lowlevel.checkpoint()
    finally:
        os.close(here)
        os.close(there)


async def test_errors_come_back() -> None:
    with open("/dev/null", "rb") as file:
        for fd, number in ((file.fileno(), errno.EINVAL), (1 << 20, errno.EBADF)):
            with pytest.raises(OSError) as caught:  # noqa: PT011  # whose number is looked at
                await flushed(Flush(fd, True))
            assert caught.value.errno == number


def test_other_machines_take_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Flush] = []
    monkeypatch.setattr(platform, "machine", lambda: "mips")
    monkeypatch.setattr(Flush, "wait", lambda flush: calls.append(flush))
    flush = Flush(0, True)
    trio.run(flushed, flush)
    assert calls == [flush]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """No memory of the kernel's, either, of which all processes together have a limited amount."""
    maps = Path("/proc/self/maps")

    async def main() -> None:
        await flushed(Flush(file.fileno(), True))
        assert "[aio]" in maps.read_text()

    with (tmp_path / "file").open("wb") as file:
        for _ in range(10):
            trio.run(main)
    assert "[aio]" not in maps.read_text()


async def test_a_failure_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a persist in a thread: the kernel reports it once."""
    target = opened(tmp_path / "a")
    region = target.create_and_write(bytes(9000), persist=True)
    trio_target = aio.attach(target)
    with monkeypatch.context() as patch:

        async def fail(self: Flusher, flush: Flush) -> NoReturn:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(Flusher, "flush", fail)
        with pytest.raises(errors.StorageError, match="Write it to a new region"):
            await trio_target.fsync(region)
    for persist in (trio_target.fsync(region), trio_target.persist(region, 0, 1)):
        with pytest.raises(errors.StorageError, match="Write it to a new region"):
            await persist
    with pytest.raises(errors.StorageError, match="Write it to a new region"):
        target.persist(region, 0, 100)
    await trio_target.erase(region)
    target.close()


async def test_calls_for_other_files_do_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = opened(tmp_path / "a")
    region, other = (target.create_and_write(bytes(9000), persist=True) for _ in range(2))
    trio_target = aio.attach(target)
    real, slow, go = Flusher.flush, trio.Event(), trio.Event()

    async def stall(self: Flusher, flush: Flush) -> bool:
        if not slow.is_set():
            slow.set()
            await go.wait()
        return await real(self, flush)

    monkeypatch.setattr(Flusher, "flush", stall)
    ended: list[str] = []

    async def persist() -> None:
        await trio_target.fsync(region)
        ended.append("fsync")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(persist)
        await slow.wait()
        await trio_target.fsync(other)
        await trio_target.write(other, 0, b"x" * 100, persist=True)
        await trio_target.write(region, 0, b"x" * 100)
        assert await trio_target.read(region, 0, 100) == b"x" * 100
        for wait in (target.close, lambda: target.resize(region, 5)):  # would be for ever
            with pytest.raises(errors.TargetBusy, match="let it finish first"):
                wait()
        await trio_target.erase(region)
        await trio_target.call("commit")
        assert not ended
        assert target._storage.kept_times(region)  # its file is in use
        go.set()
    assert ended == ["fsync"]
    target.close()
    assert [p for p in tmp_path.rglob("*") if p.name == region.hex()] == []
