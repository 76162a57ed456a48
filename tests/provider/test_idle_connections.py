"""Many connections served by one task: each is served in turn, and none blocks another."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    RawPeer,
    eventually,
    file_config,
    pattern,
    provider_process,
    raw_connection,
)
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.protocol import wire
from warabi.provider import idle_connections
from warabi.provider.idle_connections import LEAVES, MORE, STAYS, IdleConnections, Next

BUSY = 16


@contextlib.asynccontextmanager
async def _served() -> AsyncIterator[IdleConnections]:
    """Idle connections, with a limit on the time that a test takes."""
    with trio.fail_after(PATIENCE):
        served = IdleConnections()
        async with served.served():
            yield served


class Ends:
    """Both ends of a connection, one of which is idle at the loop."""

    def __init__(self, idle_connections: IdleConnections) -> None:
        self.here, self.peer = socket.socketpair()
        self.here.setblocking(False)
        self.idle_connections = idle_connections
        self.taken = b""

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        self.here.close()
        self.peer.close()

    def take(self) -> bytes:
        """A byte that has come."""
        byte = self.here.recv(1)
        self.taken += byte
        return byte

    async def serve(self) -> Next:
        """Take a byte; the end, and an ``x``, are for the own task."""
        return STAYS if self.take() not in (b"", b"x") else LEAVES

    async def wait_to_serve(self) -> None:
        await self.idle_connections.wait_to_serve(self.here.fileno(), self.serve)


async def _gone(nursery: trio.Nursery, left: int = 0) -> None:
    """Wait until no more than *left* tasks are."""
    while len(nursery.child_tasks) > left:
        await trio.lowlevel.checkpoint()


async def test_requests_are_served_until_the_connections_task_resumes() -> None:
    async with _served() as idle_connections, trio.open_nursery() as nursery:
        with contextlib.ExitStack() as stack:
            all_ends = [stack.enter_context(Ends(idle_connections)) for _ in range(20)]
            for ends in all_ends:
                nursery.start_soon(ends.wait_to_serve)
            for ends in all_ends:
                ends.peer.send(b"abcx")
            await _gone(nursery)
            assert [ends.taken for ends in all_ends] == [b"abcx"] * 20
            all_ends[0].peer.close()
            await all_ends[0].wait_to_serve()


async def test_a_blocked_request_continues_while_others_are_served() -> None:
    async with _served() as idle_connections, trio.open_nursery() as nursery:
        with Ends(idle_connections) as slow, Ends(idle_connections) as other:
            go_on = trio.Event()
            ended: list[str] = []

            async def serve_slowly() -> Next:
                slow.take()
                with trio.fail_after(PATIENCE):  # belongs to the task in which it began
                    await go_on.wait()
                ended.append("begun")
                return STAYS

            async def own_task() -> None:
                await idle_connections.wait_to_serve(slow.here.fileno(), serve_slowly)
                ended.append("own")

            nursery.start_soon(own_task)
            nursery.start_soon(other.wait_to_serve)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                slow.peer.send(b"aa")  # is not served twice at once
                other.peer.send(b"bb")
                await trio.testing.wait_all_tasks_blocked()
            assert (slow.taken, other.taken, ended) == (b"a", b"b" * 6, [])
            go_on.set()
            await trio.testing.wait_all_tasks_blocked()
            assert ended == ["begun", "own"]
            assert slow.taken == b"a"
            other.peer.send(b"x")
            await _gone(nursery)


async def test_cancelling_the_connections_task_cancels_its_pending_request() -> None:
    async with _served() as idle_connections, trio.open_nursery() as nursery:
        with Ends(idle_connections) as ends, Ends(idle_connections) as other:
            ended = 0

            async def serve() -> Next:
                nonlocal ended
                ends.take()
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(0.01)
                    ended += 1
                raise AssertionError

            async def own_task(scope: trio.CancelScope) -> None:
                with scope:
                    await idle_connections.wait_to_serve(ends.here.fileno(), serve)
                    raise AssertionError
                assert ended == again

            nursery.start_soon(other.wait_to_serve)
            for again in range(1, 4):
                scope = trio.CancelScope()
                nursery.start_soon(own_task, scope)
                ends.peer.send(b"a")
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                other.peer.send(b"b")
                await _gone(nursery, 1)
                assert ended == again
            other.peer.send(b"x")
            await _gone(nursery)


async def test_cancelling_an_idle_connection_has_no_effect_on_requests() -> None:
    async with _served() as idle_connections:
        with Ends(idle_connections) as ends:
            for _ in range(3):
                with trio.move_on_after(0) as scope:
                    await ends.wait_to_serve()
                assert scope.cancelled_caught
            ends.peer.send(b"x")
            await ends.wait_to_serve()
            assert ends.taken == b"x"


async def test_errors_are_raised_in_the_connections_task() -> None:
    async with _served() as idle_connections:
        with Ends(idle_connections) as ends:

            async def serve() -> Next:
                if ends.take() == b"w":
                    await trio.lowlevel.checkpoint()
                raise OSError("broken")

            for what in (b"a", b"w"):
                ends.peer.send(what)
                with pytest.raises(OSError, match="broken"):
                    await idle_connections.wait_to_serve(ends.here.fileno(), serve)
            ends.peer.send(b"bx")
            await ends.wait_to_serve()
            assert ends.taken == b"awbx"


async def test_a_descriptor_that_is_closed_and_used_again() -> None:
    async with _served() as idle_connections, trio.open_nursery() as nursery:
        for _ in range(3):
            with Ends(idle_connections) as ends:
                fd = ends.here.fileno()
                ended = trio.Event()

                async def own_task(ends: Ends = ends, ended: trio.Event = ended) -> None:
                    with pytest.raises(trio.ClosedResourceError):
                        await ends.wait_to_serve()
                    ended.set()

                nursery.start_soon(own_task)
                await trio.testing.wait_all_tasks_blocked()
                ends.peer.send(b"a")
                idle_connections.closing(fd)
                ends.here.close()
                with Ends(idle_connections) as later:
                    assert later.here.fileno() == fd
                    later.peer.send(b"bx")
                    await later.wait_to_serve()
                    assert (later.taken, ends.taken) == (b"bx", b"")
                await ended.wait()


async def test_closed_while_it_is_being_served() -> None:
    async with _served() as idle_connections:
        for waits in (False, True):
            with Ends(idle_connections) as ends:

                async def serve(ends: Ends = ends, waits: bool = waits) -> Next:
                    ends.take()
                    idle_connections.closing(ends.here.fileno())
                    ends.here.close()
                    if waits:
                        await trio.lowlevel.checkpoint()
                    return STAYS

                ends.peer.send(b"ab")
                await idle_connections.wait_to_serve(ends.here.fileno(), serve)
                assert ends.taken == b"a"


async def test_a_connection_that_is_always_readable_does_not_starve_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither another connection nor another task."""
    monkeypatch.setattr(idle_connections, "QUIET_TURN", 100_000)
    async with _served() as served, trio.open_nursery() as nursery:
        with Ends(served) as endless, Ends(served) as other:
            count = 0

            async def serve() -> Next:
                nonlocal count
                count += 1
                if other.taken != b"x":
                    return MORE
                endless.take()
                return LEAVES

            nursery.start_soon(served.wait_to_serve, endless.here.fileno(), serve)
            endless.peer.send(b"a")
            while not count:
                await trio.lowlevel.checkpoint()
            began = count
            while count < began + 100:
                await trio.lowlevel.checkpoint()
            other.peer.send(b"x")
            await other.wait_to_serve()


# Through providers


class Busy:
    """Clients that go on asking, each checking what it gets."""

    def __init__(self, address: str, ask: Callable[[RawPeer, int], None]) -> None:
        self.counts = [0] * BUSY
        self.failures: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(address, ask, index)) for index in range(BUSY)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, address: str, ask: Callable[[RawPeer, int], None], index: int) -> None:
        try:
            with raw_connection(address) as connection:
                peer = RawPeer(connection)
                while not self._stop.is_set():
                    ask(peer, self.counts[index])
                    self.counts[index] += 1
        except BaseException as error:
            self.failures.append(error)

    def all_go_on(self) -> None:
        """Wait until each has been answered ten times more."""
        goals = [count + 10 for count in self.counts]
        eventually(
            lambda: (
                self.failures
                or all(count >= goal for count, goal in zip(self.counts, goals, strict=True))
            )
        )
        assert not self.failures

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)


@contextlib.contextmanager
def _busy(address: str, ask: Callable[[RawPeer, int], None]) -> Iterator[Busy]:
    busy = Busy(address, ask)
    try:
        busy.all_go_on()
        yield busy
        busy.all_go_on()
    finally:
        busy.close()


def _ping(peer: RawPeer, number: int) -> None:
    assert peer.call([number, 1, "ping", [], None]) == [number, None]


@pytest.mark.parametrize("transport", ["na+sm", "tcp"])
@pytest.mark.parametrize("size", [1000, 60_000, 300_000])
def test_a_slow_request_among_busy_clients(transport: str, size: int) -> None:
    """Its header and its payload come in pieces, the next request with their end."""
    with (
        provider_process(transport, MEMORY) as served,
        _busy(served.address, _ping) as busy,
        raw_connection(served.address) as connection,
    ):
        slow = RawPeer(connection)
        region = slow.call([1, 1, "create", [size], None])[1]
        data = pattern(size)
        request = wire.frame([2, 1, "write", [region, 0, False, False], None], size) + data
        following = wire.frame([3, 1, "read", [region, 0, size, False, False], None])
        cuts = [0, 5, 12, 30, len(request) - size, len(request) - size // 2, len(request) - 1]
        for start, end in itertools.pairwise(cuts):
            connection.sendall(request[start:end])
            busy.all_go_on()
        connection.sendall(request[cuts[-1] :] + following[:7])
        assert slow.reply() == [2, None]
        busy.all_go_on()
        connection.sendall(following[7:] + wire.frame([4, 1, "size", [region], None]))
        assert slow.reply() == [3, None]
        assert slow.reply() == [4, size]


def test_busy_clients_are_served_while_others_wait_for_the_disk(tmp_path: Path) -> None:
    with (
        provider_process("tcp", file_config(tmp_path / "target")) as served,
        Engine("tcp", client) as engine,
    ):
        handle = Client(engine).make_target_handle(served.address, 1)
        region = handle.create_and_write(pattern(4096))

        def ask(peer: RawPeer, number: int) -> None:
            if number % 4:
                header = [number, 1, "read", [region.to_bytes(), 0, 4096, False, False], None]
                assert peer.call(header) == [number, None]
            else:
                arguments = [region.to_bytes(), 0, True, False]
                assert peer.call([number, 1, "write", arguments, None], pattern(4096)) == [
                    number,
                    None,
                ]

        with _busy(served.address, ask) as busy:
            for _ in range(10):
                handle.persist(region, 0, 4096)
                busy.all_go_on()
            assert handle.read(region, 0, 4096) == pattern(4096)


@pytest.mark.parametrize("transport", ["na+sm", "tcp"])
def test_clients_that_are_killed_among_busy_ones(transport: str) -> None:
    """Their connections end, in the middle of requests and of replies."""
    with (
        provider_process(transport, MEMORY) as served,
        _busy(served.address, _ping) as busy,
        raw_connection(served.address) as kept,
    ):
        region = RawPeer(kept).call([1, 1, "create", [1 << 20], None])[1]
        before = served.descriptors()
        for end in (3, 25, 500):
            for _ in range(5):
                with raw_connection(served.address) as connection:
                    RawPeer(connection)
                    read = wire.frame([2, 1, "read", [region, 0, 1 << 20, False, False], None])
                    connection.sendall(8 * read)
                    connection.sendall(wire.frame([3, 1, "create_and_write", [False], None], 999))
                    connection.sendall(bytes(end))
            busy.all_go_on()
        eventually(lambda: served.descriptors() == before)


@pytest.mark.parametrize("transport", ["na+sm", "tcp"])
def test_the_end_in_the_middle(transport: str) -> None:
    """What has been taken in is answered, in order, and then the connection ends in order."""
    with provider_process(transport, MEMORY) as served:
        replies: list[list[int]] = [[] for _ in range(BUSY)]
        failures: list[BaseException] = []
        many = 500  # which are received at once

        def pour(index: int) -> None:
            mine = replies[index]
            try:
                with raw_connection(served.address) as connection:
                    peer = RawPeer(connection)
                    while True:
                        first = len(mine)
                        burst = b"".join(
                            wire.frame([first + i, 1, "ping", [], None]) for i in range(many)
                        )
                        connection.sendall(burst)
                        for _ in range(many):
                            mine.append(peer.reply()[0])
            except (EOFError, ConnectionError):
                pass
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=pour, args=(index,)) for index in range(BUSY)]
        for thread in threads:
            thread.start()
        eventually(lambda: failures or all(len(mine) > many for mine in replies))
        os.kill(served.process.pid, signal.SIGTERM)
        for thread in threads:
            thread.join(PATIENCE)
        assert served.process.wait(PATIENCE) == 0
        assert not failures
        for mine in replies:
            assert mine == list(range(len(mine)))
            if transport == "na+sm":  # where what is sent at once is received at once
                assert len(mine) % many == 0
