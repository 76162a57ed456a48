"""Notifications of a target's changes to its watchers, over every kind of link."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
import trio.testing

import warabi.aio
from tests.support.helpers import (
    MEMORY,
    RawPeer,
    eventually,
    file_config,
    provider_process,
    raw_connection,
)
from warabi import errors
from warabi._core.attributes import ROOT
from warabi._core.changes import ATTRIBUTES, CONTENT, Changes
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.metadata import notifications
from warabi.region import RegionID
from warabi.server import Provider
from warabi.target.target import Target

_SECONDS = 30.0


class Served(NamedTuple):
    """A provider of this process, and a handle that reaches it directly."""

    address: str
    target: TargetHandle
    provider: Provider
    engine: Engine


@pytest.fixture(params=["na+sm", "tcp"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    with Engine(request.param) as engine:
        config = MEMORY if request.param == "tcp" else file_config(tmp_path / "target")
        provider = Provider(engine, 1, config)
        address = str(engine.addr())
        yield Served(address, Client(engine).make_target_handle(address, 1), provider, engine)


class Watcher:
    """What was told to one client, gathered in the background."""

    def __init__(self, target: warabi.aio.Target) -> None:
        self.target = target
        self.everything = 0
        self.inodes: dict[int, int] = {}
        self.names: dict[tuple[int, bytes], int] = {}
        self._news = trio.Event()

    async def follow(self, new_names: bool) -> None:
        async for changes in self.target.changes(new_names=new_names):
            self.everything += changes.everything
            self.inodes |= changes.inodes
            self.names |= changes.names
            self._news.set()
            self._news = trio.Event()

    async def until(self, condition: Callable[[], object]) -> None:
        with trio.fail_after(_SECONDS):
            while not condition():
                await self._news.wait()

    def clear(self) -> None:
        self.inodes.clear()
        self.names.clear()


@asynccontextmanager
async def watching(
    address: str, *, new_names: bool = False, **settings: Any
) -> AsyncIterator[Watcher]:
    """A client that watches; it was told already that everything may have changed."""
    async with warabi.aio.connect(address, 1, **settings) as target, trio.open_nursery() as nursery:
        watcher = Watcher(target)
        nursery.start_soon(watcher.follow, new_names)
        await watcher.until(lambda: watcher.everything == 1)
        yield watcher
        nursery.cancel_scope.cancel()


def run(test: Callable[[Served], Awaitable[None]]) -> Callable[[Served], None]:
    """A test that runs in a Trio loop, with a limit in time."""

    def wrapper(served: Served) -> None:
        async def limited() -> None:
            with trio.fail_after(3 * _SECONDS):
                await test(served)

        trio.run(limited)

    return wrapper


async def there(watcher: Watcher, target: TargetHandle) -> None:
    """Return when all that was changed before has been told."""
    mark = await trio.to_thread.run_sync(target.create, 1)
    await trio.to_thread.run_sync(target.erase, mark)
    await watcher.until(lambda: mark.slot in watcher.inodes)
    del watcher.inodes[mark.slot]
    watcher.names.pop((ROOT, mark.hex().encode()), None)


@run
async def test_watchers_are_notified_of_changes_by_others(served: Served) -> None:
    target = served.target
    region = target.create_and_write(b"data")
    ino = region.slot
    async with watching(served.address) as watcher:
        target.write(region, 0, b"more")
        await watcher.until(lambda: watcher.inodes == {ino: CONTENT})
        watcher.clear()
        target.resize(region, 100)
        await watcher.until(lambda: watcher.inodes == {ino: CONTENT})
        watcher.clear()
        target.link_name(region, "/name")
        await watcher.until(lambda: ino in watcher.inodes and ROOT in watcher.inodes)
        assert watcher.inodes == {ino: ATTRIBUTES, ROOT: ATTRIBUTES}
        assert watcher.names == {}  # it meant nothing before
        watcher.clear()
        target.link_name(region, "/twin")
        target.unlink_name("/name")
        await watcher.until(lambda: watcher.names)
        assert watcher.names == {(ROOT, b"name"): 0}
        watcher.clear()
        target.erase(region)
        await watcher.until(lambda: ino in watcher.inodes)
        assert watcher.inodes[ino] == CONTENT
        assert watcher.names == {(ROOT, b"twin"): 0, (ROOT, region.hex().encode()): 0}
        assert watcher.everything == 1


@run
async def test_new_names_are_reported_to_subscribers_of_names(served: Served) -> None:
    async with watching(served.address, new_names=True) as watcher:
        region = served.target.create(1)
        served.target.link_name(region, "/name")
        await watcher.until(lambda: watcher.names)
        assert watcher.names == {(ROOT, b"name"): region.slot}


@run
async def test_a_rename_tells_both_names(served: Served) -> None:
    regions = [served.target.create_and_write(text) for text in (b"one", b"two")]
    for region, name in zip(regions, ("/one", "/two"), strict=True):
        served.target.link_name(region, name)
    async with (
        watching(served.address) as watcher,
        warabi.aio.connect(served.address, 1) as other,
    ):
        await other.call("rename", ROOT, b"one", ROOT, b"two", 0, False)
        key = (ROOT, b"one")
        await watcher.until(lambda: key in watcher.names and regions[1].slot in watcher.inodes)
        assert watcher.names[key] == 0
        assert watcher.names[ROOT, b"two"] == regions[0].slot
        assert watcher.inodes[regions[1].slot] == CONTENT  # replaced, and gone
        assert watcher.inodes[ROOT] == ATTRIBUTES


@run
async def test_a_watcher_is_not_notified_of_its_own_changes(served: Served) -> None:
    async with watching(served.address, new_names=True) as watcher:
        own = watcher.target
        for size in (100, 1_000_000):  # the larger one is reached directly on one host
            region = await own.create(size)
            for _ in range(3):
                await own.write(region, 0, bytes(size))
        await own.link_name(region, "/name")
        await own.resize(region, 5)
        await own.call("fsync", region, True)
        await trio.sleep(0.2)  # several looks at what guests wrote
        await there(watcher, served.target)
        assert (watcher.inodes, watcher.names, watcher.everything) == ({}, {}, 1)


@run
async def test_direct_writes_are_reported_to_other_watchers(served: Served) -> None:
    region = served.target.create(1_000_000)
    async with (
        watching(served.address) as watcher,
        watching(served.address) as writer,
    ):
        for number in range(3):
            await writer.target.write(region, 0, bytes([number]) * 1_000_000)
            await watcher.until(lambda: watcher.inodes.get(region.slot, ATTRIBUTES) != ATTRIBUTES)
            watcher.clear()
            await there(writer, served.target)  # two that it has not taken are one that may be new
        await trio.sleep(0.2)
        await there(writer, served.target)
        assert writer.inodes == {}


def test_a_delayed_poll_of_guests_is_repeated_soon() -> None:
    held = threading.Event()

    def hold(lock: AbstractContextManager[object]) -> None:
        with lock:
            held.set()
            time.sleep(0.5)

    async def watch(local: Target, guest: TargetHandle) -> None:
        region = guest.create_and_write(b"w" * 1_000_000)
        async with aclosing(warabi.aio.attach(local).changes()) as changes:
            assert (await anext(changes)).everything
            guest.write(region, 0, b"by itself")
            assert local.sharing.active
            assert (await anext(changes)).inodes.keys() == {region.slot}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(anext, changes)
                await trio.testing.wait_all_tasks_blocked()
                holder = threading.Thread(target=hold, args=[local.state.lock])
                holder.start()
                held.wait()
                await trio.sleep(0.1)  # a look waits for the lock
                holder.join()
                guest.write(region, 0, b"again")
                nursery.cancel_scope.deadline = trio.current_time() + 1
            assert not nursery.cancel_scope.cancelled_caught

    with (
        Engine("na+sm") as engine,
        Provider(engine, 1, MEMORY) as provider,
        Engine("na+sm", client) as other,
    ):
        guest = Client(other).make_target_handle(str(engine.addr()), 1)
        # The clock stands still for as long as a look takes.
        clock = trio.testing.MockClock(autojump_threshold=0)
        trio.run(watch, provider._core.target, guest, clock=clock)


@run
async def test_too_many_changes_are_reported_as_everything(served: Served) -> None:
    regions = [served.target.create(1) for _ in range(notifications.MOST + 10)]
    async with (
        warabi.aio.connect(served.address, 1) as target,
        aclosing(target.changes()) as changes,
    ):
        assert await anext(changes) == Changes(1, True, {}, {})
        for region in regions:
            served.target.write(region, 0, b"x")
        assert (await anext(changes)).everything


@run
async def test_many_changes_are_split_and_each_is_reported_once(served: Served) -> None:
    regions = [served.target.create(1) for _ in range(3 * notifications.BATCH)]
    async with watching(served.address) as watcher:
        for region in regions:
            served.target.write(region, 0, b"x")
            served.target.resize(region, 2)
        await watcher.until(lambda: len(watcher.inodes) == len(regions))
        assert watcher.inodes.keys() == {region.slot for region in regions}
        assert watcher.everything == 1


@run
async def test_a_lost_reply_to_a_watch_invalidates_everything(served: Served) -> None:
    region = served.target.create(1)
    async with warabi.aio.connect(served.address, 1) as target:
        assert await target._link.changes(0, False) == Changes(1, True, {}, {})
        with trio.move_on_after(0.05) as cancelled:
            await target._link.changes(1, False)
        assert cancelled.cancelled_caught
        served.target.write(region, 0, b"x")  # answers the question that was given up
        await target.call("ping")
        found = await target._link.changes(1, False)
        # The lost answer may be overtaken by the second question, which then gets the change.
        assert found.everything or found.inodes == {region.slot: CONTENT}


@run
async def test_a_program_with_the_target_in_its_process_can_watch_it(served: Served) -> None:
    local = served.provider._core.target
    watched = warabi.aio.attach(local)
    async with aclosing(watched.changes()) as changes:
        assert (await anext(changes)).everything
        region = served.target.create(1)
        await trio.to_thread.run_sync(served.target.write, region, 0, b"x")
        assert (await anext(changes)).inodes == {region.slot: CONTENT}


@run
async def test_the_end_of_the_provider_ends_the_watching(served: Served) -> None:
    with pytest.raises((errors.TargetNotFound, errors.ProviderNotFound)):
        async with (
            warabi.aio.connect(served.address, 1) as target,
            aclosing(target.changes()) as changes,
        ):
            await anext(changes)
            await trio.to_thread.run_sync(served.provider.close)
            await anext(changes)


def test_a_watcher_that_reads_no_replies_delays_no_other_client(served: Served) -> None:
    with raw_connection(served.address) as connection:
        peer = RawPeer(connection)
        for number in range(200):  # each takes the place of the one before
            peer.send([number + 1, 1, "watch", [0, False], None])
        regions = [served.target.create_and_write(b"x") for _ in range(100)]
        assert len({region.slot for region in regions}) == 100
    served.target.erase(RegionID(regions[0]))


@pytest.mark.parametrize("arguments", [[], [0], ["0", False], [0, 1], [1 << 63, False]])
def test_a_malformed_watch_is_refused(served: Served, arguments: list[Any]) -> None:
    with raw_connection(served.address) as connection:
        reply = RawPeer(connection).call([1, 1, "watch", arguments, None])
        assert reply[:3] == [1, None, None]


@run
async def test_the_end_of_the_engine_ends_the_watching(served: Served) -> None:
    async with warabi.aio.connect(served.address, 1) as target:
        with pytest.raises((errors.ConnectionLost, errors.ConnectionFailed)):
            async with aclosing(target.changes()) as changes:
                await anext(changes)
                await trio.to_thread.run_sync(served.engine.finalize)
                await anext(changes)


def test_a_host_that_died_is_noticed() -> None:
    """What its mounts hold ends with their connections, which ask for a sign of life."""
    with provider_process("tcp", MEMORY) as served, raw_connection(served.address) as connection:
        RawPeer(connection).call([1, 1, "ping", [], None])
        port = f":{int(served.address.rpartition(':')[2]):04X}"

        def asking() -> bool:
            lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
            ours = (line for line in lines if line[1].endswith(port) and line[3] == "01")
            # The timer that asks, once all is acknowledged.
            return any(line[5].startswith("02:") for line in ours)

        eventually(asking)
