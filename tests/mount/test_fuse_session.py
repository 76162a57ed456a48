"""The FUSE session, with a socket in place of the kernel: cases that are rare on real mounts."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from tests.support.helpers import open_memory
from warabi import aio, errors
from warabi._core import caller
from warabi.target.config import MemoryConfig
from warabifs.frontends.device import Device
from warabifs.frontends.kernel import dispatch, protocol
from warabifs.frontends.kernel import session as session_module
from warabifs.frontends.kernel.fatal_signals import is_killed
from warabifs.frontends.kernel.frontend import KernelFrontEnd
from warabifs.frontends.kernel.protocol import Feature, Header, Opcode
from warabifs.frontends.kernel.session import Answer, Early, FuseSession
from warabifs.frontends.notifier import Notifier
from warabifs.fs import filesystem, request_size
from warabifs.fs.filesystem import FileSystem

INIT = struct.Struct("=IIIII44x")  # with the fields that Linux 6 has
OUT = struct.Struct("=IiQ")


class Kernel:
    """The other end: sends requests, receives answers."""

    def __init__(self) -> None:
        self.here, self._there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.here.setblocking(False)
        self.notifier = Notifier()
        self.session = FuseSession(self._there.fileno(), self.notifier)
        device = SimpleNamespace(fd=self._there.fileno())
        self.front_end = KernelFrontEnd(cast(Device, device))

    def send(self, opcode: int, unique: int, body: bytes = b"") -> None:
        size = protocol.HEADER.size + len(body)
        self.here.send(protocol.HEADER.pack(size, opcode, unique, 1, 0, 0, 1, 0) + body)

    async def answer(self) -> tuple[int, int, bytes]:
        """Which request was answered, the errno, and what follows."""
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(self.here)
        data = self.here.recv(protocol.BUFFER)
        size, error, unique = OUT.unpack_from(data)
        assert size == len(data)
        return unique, -error, data[OUT.size :]

    def begin(self, major: int, minor: int, features: int, upper: int = 0) -> None:
        self.send(Opcode.INIT, 2, INIT.pack(major, minor, 131072, features, upper))

    def close(self) -> None:
        self.here.close()
        self._there.close()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    try:
        yield kernel
    finally:
        kernel.close()


class Handlers:
    """Requests, each handled by one function; an exception's answer is EIO."""

    def __init__(self, handler: Callable[[Header, memoryview], Coroutine[Any, Any, Answer]]):
        self.handle = handler
        self.undone: list[tuple[int, bytes, Answer]] = []

    def refusal(self, header: Header, body: memoryview, error: Exception) -> Answer:
        return errno.EIO

    async def undo(self, header: Header, body: memoryview, answer: Answer) -> None:
        assert not caller.is_gone()
        self.undone.append((header.unique, bytes(body), answer))


async def test_what_both_sides_know_is_agreed_on(kernel: Kernel) -> None:
    kernel.begin(7, 45, Feature.INIT_EXT | Feature.ASYNC_READ | Feature.POSIX_ACL)
    wanted = Feature.INIT_EXT | Feature.POSIX_ACL | Feature.WRITEBACK_CACHE
    assert kernel.session.begin(wanted) == Feature.INIT_EXT | Feature.POSIX_ACL
    unique, error, body = await kernel.answer()
    assert (unique, error, len(body)) == (2, 0, 64)
    major, minor, readahead, features = struct.unpack_from("=IIII", body)
    assert (major, minor, readahead) == (7, protocol.MINOR, 131072)
    assert features == Feature.INIT_EXT | Feature.POSIX_ACL
    assert struct.unpack_from("=IIH", body, 20) == (request_size.MAX_WRITE, 1, 256)


async def test_a_newer_protocol_is_asked_for_this_one(kernel: Kernel) -> None:
    kernel.begin(8, 1, Feature.POSIX_ACL)
    kernel.begin(7, 40, Feature.POSIX_ACL)
    assert kernel.session.begin(Feature.POSIX_ACL) == Feature.POSIX_ACL
    for _ in range(2):
        _, error, body = await kernel.answer()
        assert (error, struct.unpack_from("=I", body)) == (0, (7,))


@pytest.mark.parametrize("version", [(7, 30), (6, 40)])
def test_a_kernel_that_is_too_old_is_refused(kernel: Kernel, version: tuple[int, int]) -> None:
    kernel.begin(*version, Feature.POSIX_ACL)
    with pytest.raises(ValueError, match=r"FUSE 7\.30|FUSE 6\.40"):
        kernel.session.begin(Feature.POSIX_ACL)


async def test_a_blocked_request_does_not_block_others(kernel: Kernel) -> None:
    done = trio.Event()

    async def handle(header: Header, body: memoryview) -> Answer:
        if header.opcode == Opcode.READ:
            await done.wait()
            return bytes(body)  # nobody has used the buffer meanwhile
        return bytes(body[:1])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kernel.session.serve, Handlers(handle))
        kernel.send(Opcode.READ, 4, b"waits")
        for unique in range(6, 60, 2):
            kernel.send(Opcode.GETATTR, unique, b"gets an answer")
            assert await kernel.answer() == (unique, 0, b"g")
        done.set()
        assert await kernel.answer() == (4, 0, b"waits")
        kernel.session.stop()


async def test_more_requests_wait_than_there_is_room_for(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_ROOM", 100 * session_module._TASK)
    done = trio.Event()
    kernel.here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

    async def handle(header: Header, body: memoryview) -> Answer:
        await done.wait()
        return b"done"

    count = 250
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kernel.session.serve, Handlers(handle))
        for unique in range(count):
            kernel.send(Opcode.READ, unique)
        await trio.testing.wait_all_tasks_blocked(0.05)
        done.set()
        answers = {await kernel.answer() for _ in range(count)}
        assert answers == {(unique, 0, b"done") for unique in range(count)}
        kernel.send(Opcode.READ, count)
        assert await kernel.answer() == (count, 0, b"done")
        kernel.session.stop()


async def test_what_is_under_way_at_the_end_is_answered(kernel: Kernel) -> None:
    ended, done, began = trio.Event(), trio.Event(), trio.Event()

    async def handle(header: Header, body: memoryview) -> Answer:
        began.set()
        await done.wait()
        return b"done"

    async def serve() -> None:
        await kernel.session.serve(Handlers(handle))
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        kernel.send(Opcode.RELEASE, 2)
        with trio.fail_after(10):
            await began.wait()
        kernel.session.stop()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not ended.is_set()
        done.set()
        assert await kernel.answer() == (2, 0, b"done")
        with trio.fail_after(10):
            await ended.wait()


async def test_notifications_are_sent_until_silence(kernel: Kernel) -> None:
    front_end = kernel.front_end
    front_end.drop_name(7, b"name")
    unique, _, body = await kernel.answer()
    assert (unique, body) == (0, struct.pack("=QII", 7, 4, 0) + b"name\0")
    front_end.drop_attributes(8)
    assert (await kernel.answer())[2] == struct.pack("=Qqq", 8, -1, 0)
    front_end.forget_inode(9, False)
    assert (await kernel.answer())[2] == struct.pack("=Qqq", 9, 0, 0)
    front_end.close()
    with pytest.raises(OSError, match="No such device"):
        front_end.forget_name(7, b"name")
    front_end.drop_name(7, b"other")
    await trio.testing.wait_all_tasks_blocked(0.05)
    with pytest.raises(BlockingIOError):
        kernel.here.recv(100)


@pytest.mark.parametrize("late", [False, True])
async def test_an_exception_is_an_answer(kernel: Kernel, late: bool) -> None:
    async def handle(header: Header, body: memoryview) -> Answer:
        if late:
            await trio.lowlevel.checkpoint()
        raise RuntimeError("a defect")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kernel.session.serve, Handlers(handle))
        for unique in (2, 4):
            kernel.send(Opcode.LOOKUP, unique)
            assert await kernel.answer() == (unique, errno.EIO, b"")
        kernel.session.stop()


@pytest.mark.parametrize("late", [False, True])
async def test_no_handler_leaves_a_request_unanswered(kernel: Kernel, late: bool) -> None:
    """Whatever it raises, even when what makes an errno of that raises, and whatever it returns."""
    raised = (errors.path_error(100_000), MemoryError(), ExceptionGroup("two", [ValueError()]))
    returned: tuple[Any, ...] = ("no answer", 1 << 40, [], 3.5)

    async def handle(header: Header, body: memoryview) -> Answer:
        if late:
            await trio.lowlevel.checkpoint()
        number = header.unique // 2
        if number < len(raised):
            raise raised[number]
        answer: Answer = returned[number - len(raised)]
        return answer

    class Unsure(Handlers):
        def refusal(self, header: Header, body: memoryview, error: Exception) -> Answer:
            raise LookupError("nor does this know an errno")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kernel.session.serve, Unsure(handle))
        for number in range(len(raised) + len(returned)):
            kernel.send(4711, 2 * number)
            assert await kernel.answer() == (2 * number, errno.EIO, b"")
        kernel.session.stop()


def test_every_exception_of_every_opcode_becomes_one_errno() -> None:
    target = open_memory(MemoryConfig())
    try:
        files = FileSystem(
            aio.attach(target), exclusive=True, attr_timeout=1.0, drop_name=lambda *_: None
        )
        found = dispatch.Operations(
            files, entry_timeout=1.0, directory_timeout=1.0, attr_timeout=1.0,
            negative_timeout=1.0, direct_io=False, writeback=False,
        )  # fmt: skip
        silent = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.NOTIFY_REPLY}
        for opcode in (*range(64), 4096, 0xFFFFFFFF):
            header = Header(40, opcode, 2, 1, 0, 0, 1, 0)
            for error, number in (
                (RuntimeError("unexpected"), errno.EIO),
                (errors.path_error(errno.ENOENT), errno.ENOENT),
                (errors.path_error(-2), errno.EIO),  # a provider may send any number
                (errors.path_error(512), errno.EIO),
                (errors.StorageFull("full"), errno.ENOSPC),
            ):
                expected = None if opcode in silent else number
                assert found.refusal(header, memoryview(b""), error) == expected
            if opcode not in [*Opcode]:
                with pytest.raises(StopIteration) as answered:
                    found.handle(header, memoryview(b"")).send(None)
                assert answered.value.value == errno.ENOSYS
    finally:
        target.close()


@pytest.mark.parametrize("late", [False, True])
async def test_an_early_answer_goes_out_before_the_rest_is_done(kernel: Kernel, late: bool) -> None:
    log: list[tuple[str, bytes]] = []

    async def handle(header: Header, body: memoryview) -> Answer:
        if late:
            await trio.lowlevel.checkpoint()

        def rest() -> None:
            answer = kernel.here.recv(protocol.BUFFER)
            log.append(("rest", answer[OUT.size :] + bytes(body)))

        if header.opcode == Opcode.WRITE:
            return Early(b"certain: ", rest)
        log.append(("next", b""))
        return b"done"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kernel.session.serve, Handlers(handle))
        kernel.send(Opcode.WRITE, 2, b"bytes")
        if late:
            await trio.testing.wait_all_tasks_blocked(0.05)
        kernel.send(Opcode.READ, 4)
        assert await kernel.answer() == (4, 0, b"done")
        assert log == [("rest", b"certain: bytes"), ("next", b"")]
        kernel.session.stop()


@pytest.mark.parametrize(("minor", "depth"), [(41, 0), (42, 1)])
async def test_passing_through_wants_times_that_tell_every_write(
    kernel: Kernel, minor: int, depth: int
) -> None:
    kernel.begin(7, minor, Feature.INIT_EXT, upper=Feature.PASSTHROUGH >> 32)
    agreed = Feature.INIT_EXT | (Feature.PASSTHROUGH if depth else 0)
    assert kernel.session.begin(Feature.INIT_EXT | Feature.PASSTHROUGH) == agreed
    _, _, body = await kernel.answer()
    assert struct.unpack_from("=II", body, 32) == (agreed >> 32, depth)


async def test_a_request_of_a_killed_thread_is_answered_and_what_it_brings_given_back(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: set[int] = set()
    monkeypatch.setattr(session_module, "is_killed", killed.__contains__)
    done = trio.Event()
    gone = {}

    async def handle(header: Header, body: memoryview) -> Answer:
        if header.opcode == Opcode.INTERRUPT:
            kernel.session.interrupt(protocol.INTERRUPTED.unpack_from(body)[0])
            return None
        await done.wait()
        gone[header.unique] = caller.is_gone()
        return b"an inode"

    handlers = Handlers(handle)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kernel.session.serve, handlers)
        for unique in (2, 4):
            kernel.send(Opcode.LOOKUP, unique, b"name\0")
        await trio.testing.wait_all_tasks_blocked(0.05)
        for interrupted in (2, 2, 6, 4711):  # of two nothing is known
            kernel.send(Opcode.INTERRUPT, interrupted | 1, struct.pack("=Q", interrupted))
        await trio.sleep(0.3)
        with pytest.raises(BlockingIOError):  # a handler of its own may see to the signal
            kernel.here.recv(100)
        killed.add(1)  # the thread of all of these; of one the kernel has told
        assert await kernel.answer() == (2, errno.EINTR, b"")
        await trio.sleep(0.3)
        done.set()
        assert await kernel.answer() == (4, 0, b"an inode")
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert handlers.undone == [(2, b"name\0", b"an inode")]
        assert gone == {2: True, 4: False}
        killed.clear()
        for unique in (8, 10):  # nothing is left of it where the next ones are handled
            kernel.send(Opcode.LOOKUP, unique)
            assert await kernel.answer() == (unique, 0, b"an inode")
        assert gone[8] is gone[10] is False
        kernel.session.stop()


class Delayed:
    """A target whose calls wait once a number of them were made, until the provider answers."""

    def __init__(self, target: aio.Target) -> None:
        self._target = target
        self.free = 10_000
        self.waits, self.answers = trio.Event(), trio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def delay(self, free: int) -> None:
        self.free, self.waits, self.answers = free, trio.Event(), trio.Event()

    async def call(self, name: str, *arguments: Any) -> Any:
        self.free -= 1
        if self.free < 0 and not self.answers.is_set():
            self.waits.set()
            await self.answers.wait()
        return await self._target.call(name, *arguments)


COUNTING = [
    (Opcode.LOOKUP, b"f0\0", 0),
    (Opcode.MKNOD, protocol.MKNOD.pack(0o100644, 0, 0, 0) + b"made\0", 0),
    (Opcode.MKDIR, protocol.MKDIR.pack(0o755, 0) + b"made\0", 0),
    (Opcode.SYMLINK, b"made\0target\0", 0),
    (Opcode.LINK, protocol.LINK.pack(2) + b"made\0", 0),
    (Opcode.CREATE, protocol.CREATE.pack(os.O_RDWR | os.O_CREAT, 0o644, 0, 0) + b"made\0", 0),
    (Opcode.TMPFILE, protocol.CREATE.pack(os.O_RDWR, 0o644, 0, 0) + b"tmp\0", 0),
    *((Opcode.READDIRPLUS, b"", free) for free in (0, 1, 2, 3, 4)),
]
"""Requests whose replies count lookups, and how many of their calls are answered before a delay."""


@pytest.mark.parametrize(
    ("opcode", "body", "free"), COUNTING, ids=lambda value: getattr(value, "name", None)
)
async def test_no_lookup_is_counted_of_which_the_kernel_gets_no_reply(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, opcode: Opcode, body: bytes, free: int
) -> None:
    """The thread is killed while the provider is slow, also between two pages of a listing."""
    monkeypatch.setattr(session_module, "is_killed", lambda thread: True)
    monkeypatch.setattr(filesystem, "_PAGE", 10)
    with open_memory(MemoryConfig()) as target:
        for number in range(60):
            target.namespace.mknod(1, b"f%d" % number, 0o100644, 0, 0, 0)
        delayed = Delayed(aio.attach(target))
        files = FileSystem(
            cast(aio.Target, delayed), exclusive=False, attr_timeout=1.0,
            drop_name=lambda *_: None, drop_attributes=lambda ino: None,
        )  # fmt: skip
        operations = dispatch.Operations(
            files, entry_timeout=1.0, directory_timeout=1.0, attr_timeout=1.0,
            negative_timeout=1.0, direct_io=False, writeback=False,
            interrupt=kernel.session.interrupt,
        )  # fmt: skip
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel.session.serve, operations)
            if opcode == Opcode.READDIRPLUS:
                kernel.send(Opcode.OPENDIR, 2, bytes(8))
                _, _, opened = await kernel.answer()
                (handle,) = struct.unpack_from("=Q", opened)
                # Room for some pages.
                body = protocol.READ.pack(handle, 0, 50 * 160, 0).ljust(40, b"\0")
            delayed.delay(free)
            kernel.send(opcode, 4, body)
            with trio.move_on_after(10) as patience:
                await delayed.waits.wait()
            assert not patience.cancelled_caught, "it made fewer calls"
            kernel.send(Opcode.INTERRUPT, 5, struct.pack("=Q", 4))
            assert await kernel.answer() == (4, errno.EINTR, b"")
            delayed.answers.set()
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert {ino: known.count for ino, known in files._known.items()} == {}
            assert len(files._handles) == (opcode == Opcode.READDIRPLUS)
            kernel.session.stop()


@pytest.mark.parametrize("writeback", [False, True])
def test_what_truncates_is_not_cut_short_where_the_kernel_keeps_sizes(writeback: bool) -> None:
    class Files(FileSystem):
        async def setattr(self, *arguments: Any, **options: Any) -> Any:
            await trio.sleep_forever()

        open = setattr

    target = open_memory(MemoryConfig())
    interrupted: list[int] = []
    files = Files(aio.attach(target), exclusive=True, attr_timeout=1.0, drop_name=lambda *_: None)
    found = dispatch.Operations(
        files, entry_timeout=1.0, directory_timeout=1.0, attr_timeout=1.0, negative_timeout=1.0,
        direct_io=True, writeback=writeback, interrupt=interrupted.append,
    )  # fmt: skip

    def request(opcode: int, unique: int, body: bytes) -> Coroutine[Any, Any, Answer]:
        return found.handle(Header(40, opcode, unique, 1, 0, 0, 1, 0), memoryview(body))

    async def main() -> None:
        none = (0,) * 14
        waiting = [
            request(Opcode.SETATTR, 2, protocol.SETATTR.pack(protocol.Valid.SIZE, *none)),
            request(Opcode.SETATTR, 4, protocol.SETATTR.pack(protocol.Valid.MODE, *none)),
            request(Opcode.OPEN, 6, protocol.OPEN.pack(os.O_WRONLY | os.O_TRUNC, 0)),
            request(Opcode.OPEN, 8, protocol.OPEN.pack(os.O_WRONLY, 0)),
        ]
        for handler in waiting:
            handler.send(None)
        for unique in (2, 4, 6, 8):
            await request(Opcode.INTERRUPT, unique | 1, protocol.INTERRUPTED.pack(unique))
        assert interrupted == ([4, 8] if writeback else [2, 4, 6, 8])
        for handler in waiting:
            handler.close()
        assert not found._uninterruptible

    try:
        trio.run(main)
    finally:
        target.close()


WAITING = """
import signal, sys
handled, ignored, blocked = map(int, sys.argv[1:])
for number, action in ((handled, lambda *_: None), (ignored, signal.SIG_IGN)):
    if number:
        signal.signal(number, action)
signal.pthread_sigmask(signal.SIG_BLOCK, [blocked] if blocked else [])
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("what", ["default", "handled", "ignored", "blocked"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGCHLD])
def test_only_signals_that_end_a_thread_count(what: str, number: signal.Signals) -> None:
    names = ("handled", "ignored", "blocked")
    arguments = [str(int(number)) if what == name else "0" for name in names]
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            # A stopped thread keeps what comes pending, as one does that waits in the kernel.
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            assert not is_killed(process.pid)
            process.send_signal(number)
            ends = what == "default" and number != signal.SIGCHLD
            assert is_killed(process.pid) == ends
        finally:
            process.kill()
    assert not is_killed(0)
