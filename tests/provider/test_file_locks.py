"""Locks on files by clients: in the provider's process, over connections, and hostile ones."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

from tests.protocol.test_provider_protocol import Bystander
from tests.support.helpers import (
    MEMORY,
    RawPeer,
    Served,
    eventually,
    provider_process,
    raw_connection,
)
from tests.support.loops import check_not_held, watched_loops
from warabi import aio, errors, reconnect
from warabi._core.lock_ranges import END, EXCLUSIVE, SHARED, UNLOCK, FileLock
from warabi.client import Client, RegionID, TargetHandle
from warabi.engine import Engine, client
from warabi.remote.link import WireLink
from warabi.server import Provider
from warabi.target import file_locks


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with provider_process("na+sm", MEMORY) as process:
        yield process


@pytest.fixture(params=["own process", "connection"])
def handles(request: pytest.FixtureRequest, served: Served) -> Iterator[Callable[[], TargetHandle]]:
    """Makes handles of one target, each of a client of its own if it has a connection."""
    if request.param == "own process":
        with Engine("na+sm") as engine, Provider(engine, 1, MEMORY):
            yield lambda: Client(engine).make_target_handle(str(engine.addr()), 1)
        return
    engines: list[Engine] = []

    def make() -> TargetHandle:
        engines.append(Engine("na+sm", client))
        return Client(engines[-1]).make_target_handle(served.address, 1)

    yield make
    for engine in engines:
        engine.finalize()


def refused(number: int, call: Callable[..., object], *arguments: Any, **more: Any) -> None:
    with pytest.raises(errors.PathError) as caught:
        call(*arguments, **more)
    assert caught.value.errno == number


def test_owners_lock_ranges_apart(handles: Callable[[], TargetHandle]) -> None:
    one, other = handles(), handles()
    region = one.create(100)
    one.lock(region, 10, 10, owner=1)
    refused(errno.EAGAIN, other.lock, region, 19, owner=2, wait=False)
    refused(errno.EAGAIN, other.lock, region, 0, owner=2, wait=False, shared=True)
    other.lock(region, 20, owner=2, wait=False)
    found = other.test_lock(region, 0, owner=2)
    assert found is not None
    assert found[:3] == (True, 10, 19)
    assert found.pid in (0, os.getpid())
    one.unlock(region, owner=1)
    assert other.test_lock(region, 0, owner=2) is None
    assert one.test_lock(region, shared=True, owner=1) == FileLock(True, 20, END, found.pid)
    other.unlock(region, owner=2)
    other.lock(region, flock=True, owner=2, shared=True)
    one.lock(region, owner=1)  # conflicts with none of flock(2)
    one.lock(region, flock=True, owner=1, shared=True, wait=False)
    refused(errno.EAGAIN, one.lock, region, flock=True, owner=1, wait=False)
    one.unlock(region, owner=1)
    other.unlock(region, flock=True, owner=2)


def test_what_is_no_lock_is_refused(handles: Callable[[], TargetHandle]) -> None:
    handle = handles()
    region = handle.create(1)
    for start, size in ((-1, 1), (0, 0), (0, -1), (5, END), ("0", 1), (0, 1.0)):
        with pytest.raises(errors.OutOfBounds):
            handle.lock(region, start, size)  # type: ignore[arg-type]
    with pytest.raises(errors.OutOfBounds):
        handle.lock(region, owner=-1)
    with pytest.raises(errors.InvalidRegion):
        handle.lock(RegionID(b"x" * 16))
    with pytest.raises(errors.InvalidRegion):
        handle.lock("region")  # type: ignore[arg-type]
    handle.erase(region)
    with pytest.raises(errors.InvalidRegion):
        handle.lock(region)
    handle.unlock(region)


def test_what_waits_gets_it_in_order(handles: Callable[[], TargetHandle]) -> None:
    one = handles()
    region = one.create(1)
    one.lock(region, owner=9)
    order: list[int] = []

    def work(number: int, handle: TargetHandle) -> None:
        handle.lock(region, owner=number)
        order.append(number)
        handle.unlock(region, owner=number)

    threads = []
    for number in range(3):
        handle = handles()
        threads.append(threading.Thread(target=work, args=(number, handle)))
        threads[-1].start()
        until_it_waits(handle, region, len(threads))
    one.unlock(region, owner=9)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2]


def until_it_waits(handle: TargetHandle, region: RegionID, count: int) -> None:
    """Return when *count* requests wait, the last of them one of this handle."""
    link: Any = handle.link
    if isinstance(link, WireLink):
        requests = link._connect()._requests
        eventually(lambda: any(request.operation == "lock" for request in [*requests.values()]))
        for _ in range(3):  # what was sent before, and the tasks that it started, are seen to
            handle.size(region)
    else:
        files = link._core.target.file_locks._files
        eventually(lambda: sum(len(file.waiting) for file in [*files.values()]) >= count)


def test_two_that_wait_for_each_other(handles: Callable[[], TargetHandle]) -> None:
    one, other = handles(), handles()
    region = one.create(2)
    one.lock(region, 0, 1, owner=1)
    other.lock(region, 1, 1, owner=2)
    thread = threading.Thread(target=one.lock, args=(region, 1, 1), kwargs={"owner": 1})
    thread.start()
    until_it_waits(one, region, 1)
    refused(errno.EDEADLK, other.lock, region, 0, 1, owner=2)
    other.unlock(region, owner=2)
    thread.join()
    one.unlock(region, owner=1)


def test_locks_end_with_the_connection(served: Served) -> None:
    with Engine("na+sm", client) as one, Engine("na+sm", client) as two:
        first = Client(one).make_target_handle(served.address, 1)
        second = Client(two).make_target_handle(served.address, 1)
        region = first.create(1)
        first.lock(region, owner=1)
        first.lock(region, flock=True)
        refused(errno.EAGAIN, second.lock, region, wait=False)
        threading.Timer(0.05, one.finalize).start()
        second.lock(region)
        second.lock(region, flock=True)


def test_a_cancelled_task_waits_no_more_and_holds_nothing(served: Served) -> None:
    async def main() -> None:
        async with (
            aio.connect(served.address, 1) as one,
            aio.connect(served.address, 1) as two,
        ):
            region = await one.create(1)
            await one.lock(region)
            with trio.move_on_after(0.05) as scope:
                await two.lock(region)
            assert scope.cancelled_caught
            await one.unlock(region)
            await one.lock(region, wait=False)
            assert await two.test_lock(region) == FileLock(True, 0, END, 0)

    trio.run(main)


def test_many_tasks_that_wait_do_not_keep_the_holder_from_unlocking(served: Served) -> None:
    """More than a connection may have requests under way, on either side."""

    async def main() -> None:
        async with aio.connect(served.address, 1) as target:
            region = await target.create(1)
            await target.lock(region, owner=1000)
            granted = []

            async def work(owner: int) -> None:
                await target.lock(region, owner=owner)
                granted.append(owner)
                await target.unlock(region, owner=owner)

            async with trio.open_nursery() as nursery:
                for owner in range(400):
                    nursery.start_soon(work, owner)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert granted == []
                await target.unlock(region, owner=1000)
            assert sorted(granted) == list(range(400))

    trio.run(main)


def test_a_program_in_the_provider_s_process(served: Served) -> None:
    async def main() -> None:
        with Engine("na+sm") as engine, Provider(engine, 1, MEMORY) as provider:
            target = aio.attach(provider._core.target)
            region = await target.create(1)
            await target.lock(region, owner=1)
            handle = Client(engine).make_target_handle(str(engine.addr()), 1)
            refused(errno.EAGAIN, handle.lock, region, owner=2, wait=False)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, lambda: handle.lock(region, owner=2))
                await trio.sleep(0.05)
                await target.unlock(region, owner=1)
            with trio.move_on_after(0.05) as scope:
                await target.lock(region, owner=1)
            assert scope.cancelled_caught
            handle.unlock(region, owner=2)
            assert await target.test_lock(region, owner=3) is None

    trio.run(main)


async def lost(link: Any) -> None:
    """Return when a link is connected again, and has lost a lock."""
    with trio.fail_after(20):
        while link._link is None or not link._locks.lost_in:  # noqa: ASYNC110
            await trio.sleep(0.01)


@pytest.mark.parametrize("taken", [False, True])
def test_a_client_that_connects_again(served: Served, taken: bool) -> None:
    """It has the lock again; unless another client had it, which is an error of what follows."""

    async def main() -> None:
        async with (
            reconnect.connect(served.address, 1) as one,
            aio.connect(served.address, 1) as two,
        ):
            region = await one.create_and_write(b"12345678")
            await one.lock(region, 2, 4)
            link: Any = one.link
            link._link._connection.close()
            if taken:
                await two.lock(region, 3, 1)
                await two.unlock(region)
            else:
                await two.lock(region, 0, 2)
            if not taken:
                assert await one.read(region, 0, 1) == b"1"
                with pytest.raises(errors.PathError):
                    await two.lock(region, 2, wait=False)
                return
            await lost(link)
            for use in (
                one.read(region, 0, 1), one.write(region, 0, b"x"), one.fsync(region),
                one.resize(region, 1), one.lock(region, 0, 1),
            ):  # fmt: skip
                with pytest.raises(errors.StorageError, match="lost"):
                    await use
            await one.lock(region, 50, 1, owner=5)  # which has lost nothing
            await one.unlock(region, 2, 4)
            assert await one.read(region, 0, 1) == b"1"

    trio.run(main)


def test_a_provider_that_restarts_keeps_no_locks() -> None:
    async def main(engine: Engine, config: dict[str, Any]) -> None:
        async with reconnect.connect(str(engine.addr()), 1) as one:
            region = await one.create(1)
            await one.lock(region)
            link: Any = one.link
            target = link._identity
            assert target is not None
            session = next(iter(link._locks.items()))
            assert session[0][0] == region
            # What a new process knows: nothing of the token.
            provider._core.target.file_locks._reset()
            link._link._connection.close()
            await lost(link)
            with pytest.raises(errors.StorageError):
                await one.read(region, 0, 1)
            await one.unlock(region)
            await one.lock(region, wait=False)

    with Engine("na+sm") as engine, Provider(engine, 1, MEMORY) as provider:
        trio.run(main, engine, MEMORY)


def test_a_client_that_locks_all_it_can() -> None:
    """It gets ``ENOLCK`` at the limits, holds no loop, and its end lets others lock."""
    with watched_loops() as held, Engine("na+sm") as engine, Provider(engine, 1, MEMORY):
        address = str(engine.addr())
        bystander = Bystander(address, 1)
        try:
            with raw_connection(address) as connection:
                peer = RawPeer(connection)
                region = peer.call([1, 1, "create", [100], None])[1]
                check_not_held(held, lambda: _flood(peer, region))
                bystander.goes_on()
                with Engine("na+sm", client) as other:
                    handle = Client(other).make_target_handle(address, 1)
                    refused(errno.EAGAIN, handle.lock, RegionID(region), 0, 1, wait=False)
                    check_not_held(held, connection.close)
                    handle.lock(RegionID(region))
            bystander.goes_on()
        finally:
            bystander.close()


def _flood(peer: RawPeer, region: bytes) -> None:
    def codes(requests: list[list[Any]]) -> list[int]:
        found = []
        for start in range(0, len(requests), 64):
            batch = requests[start : start + 64]
            for request in batch:
                peer.send(request)
            replies = 0
            while replies < len(batch):
                reply = peer.reply()
                if reply[0] == 7:  # not one to a request that waits
                    replies += 1
                    found.append(reply[3][2] if len(reply) == 4 else 0)
        return found

    def lock(owner: int, kind: int, start: int, end: int, wait: int = 0) -> list[Any]:
        number = 8 if wait else 7
        return [number, 1, "lock", [region, False, owner, kind, start, end, 0, wait], None]

    ranges = [lock(owner, SHARED, 0, 0) for owner in range(file_locks.OWNERS)]
    assert set(codes(ranges)) == {0}
    assert codes([lock(file_locks.OWNERS, SHARED, 0, 0)]) == [errno.ENOLCK]
    more = [
        lock(0, EXCLUSIVE, 2 * at, 2 * at) for at in range(1, file_locks.RANGES - file_locks.OWNERS)
    ]
    assert set(codes(more)) == {0}
    assert codes([lock(0, EXCLUSIVE, END, END)]) == [errno.ENOLCK]
    assert codes([lock(0, UNLOCK, 2, END), lock(0, UNLOCK, 0, 0)]) == [0, 0]
    nothing = lock(0, UNLOCK, 9, 9)
    for owner in range(200):  # most wait for each other
        peer.send(lock(owner, EXCLUSIVE, 0, 0, 1))
        assert codes([nothing]) == [0]
    for number in range(file_locks.WAITING):
        peer.send(lock(0, EXCLUSIVE, 0, 0, number + 1))
        assert codes([nothing]) == [0]
    for owner in range(1, 300):  # which is looked at again and again by all that waits
        assert codes([lock(owner, UNLOCK, 0, 0)]) == [0]
