"""A loop with one pending request waits for its reply with poll(2), not in Trio."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.support.helpers import MEMORY, PATIENCE, RawPeer, Served, pattern, provider_process
from warabi import aio, errors
from warabi.eventloop import inline_wait

LARGE = 3 << 20


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments and turns without an end, so that nothing here depends on times."""
    monkeypatch.setattr(inline_wait, "INLINE_TURN", int(PATIENCE * 1000))
    monkeypatch.setattr(inline_wait, "INLINE_MOMENT", int(PATIENCE * 1000))
    monkeypatch.setattr(inline_wait, "INLINE_LONGEST", int(PATIENCE * 1000))


@pytest.fixture(params=["na+sm", "tcp"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with provider_process(request.param, MEMORY) as served:
        yield served


class Turns:
    """Counts the turns that a task beside gets: many, while others wait in the loop."""

    def __init__(self) -> None:
        self.count = 0

    async def run(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            self.count += 1


@asynccontextmanager
async def _counting() -> AsyncIterator[Turns]:
    """The turns that another task gets meanwhile."""
    turns = Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        await trio.lowlevel.checkpoint()
        yield turns
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _serving() -> AsyncIterator[socket.socket]:
    """As a loop does that serves requests; they come when the socket given is sent to."""
    here, there = socket.socketpair()
    with here, there, inline_wait.serving(here.fileno()):
        yield there


async def test_a_request_takes_no_turn_of_the_loop(served: Served, patient: None) -> None:
    async with (
        aio.connect(served.address, 1, share=False) as target,
        _serving(),
        _counting() as turns,
    ):
        before = turns.count
        region = await target.create(LARGE)
        for size in (0, 1, 5000, 65_536):
            await target.write(region, 0, pattern(size))
            assert await target.read(region, 0, size) == pattern(size)
        assert await target.read(region, 65_536, LARGE - 65_536) == bytes(LARGE - 65_536)
        with pytest.raises(errors.OutOfBounds):
            await target.read(region, LARGE, 1)
        assert turns.count == before


async def test_others_get_turns_between_requests(
    served: Served, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inline_wait, "INLINE_TURN", 1)
    async with (
        aio.connect(served.address, 1, share=False) as target,
        _serving(),
        _counting() as turns,
    ):
        region = await target.create(1)
        before = turns.count
        with trio.fail_after(PATIENCE):
            while turns.count < before + 10:
                assert await target.size(region) == 1


async def test_a_loop_that_serves_nothing_never_waits_inline(served: Served, patient: None) -> None:
    async with aio.connect(served.address, 1, share=False) as target, _counting() as turns:
        before = turns.count
        served.stop()
        with trio.move_on_after(0.5):
            await target.create(1)
        assert turns.count > before + 1
        served.signal(signal.SIGCONT)


async def test_what_comes_meanwhile_ends_it(served: Served, patient: None) -> None:
    """Also when it comes while the reply does not."""
    async with aio.connect(served.address, 1, share=False) as target, _serving() as there:
        region = await target.create_and_write(pattern(1000))
        served.stop()
        there.send(b"a request")
        found = bytearray(1000)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(target.read_into, region, 0, found)
            nursery.start_soon(target.size, region)  # beside it
            await trio.testing.wait_all_tasks_blocked()
            assert found == bytes(1000)
            served.signal(signal.SIGCONT)
        assert found == pattern(1000)


async def test_several_at_once_go_side_by_side(served: Served, patient: None) -> None:
    async with aio.connect(served.address, 1, share=False) as target, _serving():
        # More than the socket takes at once, too.
        regions = [await target.create_and_write(pattern(LARGE + i)) for i in range(4)]
        found = [bytearray(LARGE + i) for i in range(4)]

        async def read(number: int) -> None:
            for _ in range(5):
                await target.read_into(regions[number], 0, found[number])
                assert found[number] == pattern(LARGE + number)
                found[number][:] = bytes(LARGE + number)

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(read, number)


async def test_a_pending_watch_does_not_prevent_inline_waiting(
    served: Served, patient: None
) -> None:
    turns = Turns()
    async with (
        aio.connect(served.address, 1, share=False) as target,
        aio.connect(served.address, 1, share=False) as other,
        trio.open_nursery() as nursery,
    ):
        told = [trio.Event(), trio.Event()]

        async def watch() -> None:
            number = 0
            for event in told:
                number = (await target._link.changes(number, False)).number
                event.set()
            await target._link.changes(number, False)

        nursery.start_soon(watch)
        with trio.fail_after(PATIENCE):
            await told[0].wait()  # everything may have changed
            region = await other.create_and_write(pattern(1000))
            await told[1].wait()
            await trio.testing.wait_all_tasks_blocked()  # until something else changes
        async with _serving():
            nursery.start_soon(turns.run)
            await trio.lowlevel.checkpoint()
            before = turns.count
            assert await target.read(region, 0, 1000) == pattern(1000)
            assert turns.count == before
        nursery.cancel_scope.cancel()


async def test_a_provider_that_ends_meanwhile(served: Served, patient: None) -> None:
    async with aio.connect(served.address, 1, share=False) as target, _serving():
        region = await target.create(1000)
        served.stop()
        ending = threading.Thread(target=served.kill)
        ending.start()
        with trio.fail_after(PATIENCE):
            with pytest.raises(errors.ConnectionLost):
                await target.read(region, 0, 1000)
            with pytest.raises(errors.ConnectionLost):
                await target.size(region)
        ending.join(PATIENCE)


def _chatter(listener: socket.socket, stop: threading.Event) -> None:
    """A provider that answers a ping, and anything else with answers to what nobody asked."""
    accepted, _ = listener.accept()
    with accepted, contextlib.suppress(EOFError, ConnectionError):
        peer = RawPeer(accepted)
        number, _, name, _, _ = peer.reply()
        while name == "ping":
            peer.send([number, None])
            number, _, name, _, _ = peer.reply()
        while not stop.is_set():
            peer.send([number + 1000, None])
        peer.send([number, 5])


async def test_a_provider_that_sends_without_end_does_not_starve_requests() -> None:
    turns, stop = Turns(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        talking = threading.Thread(target=_chatter, args=(listener, stop))
        talking.start()
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        try:
            async with (
                aio.connect(address, 1) as target,
                _serving(),
                trio.open_nursery() as nursery,
            ):

                async def end() -> None:
                    while turns.count < 10:
                        await trio.lowlevel.checkpoint()
                    stop.set()

                nursery.start_soon(turns.run)
                nursery.start_soon(end)
                with trio.fail_after(PATIENCE):
                    assert await target.call("size", b"r" * 16) == 5
                nursery.cancel_scope.cancel()
        finally:
            stop.set()
            await trio.to_thread.run_sync(talking.join)


async def test_a_provider_that_is_silent_times_out(served: Served) -> None:
    async with aio.connect(served.address, 1, share=False, timeout=0.3) as target, _serving():
        region = await target.create_and_write(b"1234")
        served.stop()
        with pytest.raises(errors.TimedOut):
            await target.size(region)
        served.signal(signal.SIGCONT)
        assert await target.read(region, 0, 4) == b"1234"
