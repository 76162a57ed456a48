"""Reads that overlap pending writes do not leave old pages in the page cache."""

from __future__ import annotations

import signal

import trio
from trio.testing import wait_all_tasks_blocked

import warabi.aio
from tests.support.helpers import MEMORY, provider_process
from warabi._core.attributes import ROOT
from warabifs.fs.filesystem import FileSystem
from warabifs.fs.write_ordering import KERNEL

OLD, NEW = b"o" * 8192, b"n" * 12288


def test_a_read_after_a_write_waits_for_it_though_it_could_be_answered() -> None:
    """It makes the file grow, which only the provider can; the read is from shared memory."""

    async def main() -> None:
        async with warabi.aio.connect(served.address, 1) as target:
            files = FileSystem(target, exclusive=False, attr_timeout=1.0, drop_name=lambda *_: None)
            handle, _, made = await files.create(ROOT, b"file", 0o644, 0, 0, 0, 0, keep_setid=True)
            await files.write(made.ino, handle, 0, OLD)
            for _ in range(3):  # until it is granted
                assert await files.read(made.ino, handle, 0, 8192) == OLD
            found: list[bytes] = []

            async def read(offset: int) -> None:
                found.append(bytes(await files.read(made.ino, handle, offset, 4096)))

            served.stop()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, 0)
                await wait_all_tasks_blocked()
                assert found == [OLD[:4096]]
                nursery.start_soon(files.write, made.ino, handle, 4096, NEW)
                await wait_all_tasks_blocked()
                nursery.start_soon(read, 0)  # of others
                await wait_all_tasks_blocked()
                assert found == [OLD[:4096]] * 2
                nursery.start_soon(read, 4096)
                await wait_all_tasks_blocked()
                served.signal(signal.SIGCONT)
            assert found == [OLD[:4096], OLD[:4096], NEW[:4096]]

    with provider_process("na+sm", MEMORY) as served:
        trio.run(main)


ANNE, BERT = 1001, 1002


def test_pages_read_by_another_thread_shortly_before_a_write_are_dropped() -> None:
    """The kernel may keep old data, but not for the thread that wrote them."""
    dropped: list[tuple[int, int, int]] = []

    async def main() -> None:
        async with warabi.aio.connect(served.address, 1) as target:
            files = FileSystem(target, exclusive=False, attr_timeout=1.0, drop_name=lambda *_: None)
            files.writes.drop = lambda *what: dropped.append(what)
            handle, _, made = await files.create(ROOT, b"file", 0o644, 0, 0, 0, 0, keep_setid=True)
            ino = made.ino
            await files.write(ino, handle, 0, bytes(65536), ANNE)
            await files.read(ino, handle, 8192, 8192, ANNE)
            for offset, size, thread in (
                (8192, 4096, ANNE), (0, 8192, BERT), (16384, 4096, BERT), (8192, 4096, KERNEL)
            ):  # fmt: skip
                await files.write(ino, handle, offset, bytes(size), thread)
                assert not dropped
            for offset, size, thread, start, count in (
                (12287, 2, BERT, 8192, 8192),
                (16000, 1000, BERT, 12288, 8192),
                (0, 9000, 0, 0, 12288),
            ):
                await files.write(ino, handle, offset, bytes(size), thread)
                assert dropped.pop() == (ino, start, count)
                assert not dropped

    with provider_process("tcp", MEMORY) as served:
        trio.run(main)
