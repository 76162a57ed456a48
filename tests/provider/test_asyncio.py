"""The client for asyncio programs."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest

import warabi.asyncio as aio
from tests.support.helpers import MEMORY, PATIENCE, Served, file_config, pattern, provider_process
from warabi import errors
from warabi.region import RegionID

SIZE = 5 << 20  # more than one payload
WAYS = ["local_process", "tcp_process"]


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run *main* in a new loop; no thread may be left."""

    async def limited() -> None:
        async with asyncio.timeout(PATIENCE):
            await main()

    asyncio.run(limited())
    assert not [thread for thread in threading.enumerate() if thread.name == "warabi-asyncio"]


@pytest.fixture(params=WAYS, scope="module")
def address(request: pytest.FixtureRequest) -> str:
    served: Served = request.getfixturevalue(request.param)
    return served.address


@pytest.mark.parametrize("provider_id", [1, 2], ids=["memory", "file"])
def test_bytes_of_regions(address: str, provider_id: int) -> None:
    async def main() -> None:
        async with aio.connect(address, provider_id) as target:
            assert repr(target) == f"warabi.asyncio.Target({address!r}, {provider_id})"
            data = pattern(SIZE)
            region = await target.create_and_write(data, persist=True)
            assert await target.read(region, 0, SIZE) == data
            await target.write(region, 10, b"changed")
            buffer = bytearray(8)
            await target.read_into(region, 9, buffer)
            assert buffer == data[9:10] + b"changed"
            assert await target.append(region, b"end", persist=True) == SIZE
            assert await target.read_some(region, SIZE + 1, buffer) == 2
            assert buffer[:2] == b"nd"
            await target.write_vector(region, [(0, 2), (100, 1)], b"abc")
            await target.read_vector(region, [(100, 1), (0, 2)], memoryview(buffer)[:3])
            assert buffer[:3] == b"cab"
            await target.resize(region, 50)
            assert (await target.stat(region)).size == await target.size(region) == 50
            copy = await target.copy(region)
            listed = [each async for each in target.list()]
            assert {region, copy} <= set(listed)
            array = np.arange(1 << 20)
            stored = await target.put_array(array)
            assert np.array_equal(await target.get_array(stored), array)
            for each in (region, copy, stored):
                await target.erase(each)
            with pytest.raises(errors.InvalidRegion):
                await target.size(region)

    run(main)


def test_names_and_locks(address: str) -> None:
    async def main() -> None:
        async with aio.connect(address, 1) as target, aio.connect(address, 1) as other:
            await target.makedirs("/asyncio/below")
            region = await target.create_name("/asyncio/file")
            assert await other.open_name("/asyncio/file") == region
            assert sorted(await target.listdir("/asyncio")) == ["below", "file"]
            assert [entry.name async for entry in target.scandir("/asyncio/below")] == []
            with pytest.raises(FileNotFoundError):
                await target.stat_name("/asyncio/missing")
            await target.lock(region)
            with pytest.raises(errors.PathError):
                await other.lock(region, wait=False)
            waiting = asyncio.create_task(other.lock(region))
            await target.unlock(region)
            await waiting
            await target.unlink_name("/asyncio/file")

    run(main)


def test_many_calls_are_under_way_at_once(address: str) -> None:
    async def main() -> None:
        async with aio.connect(address, 1) as target:
            data = [pattern(i + 1) for i in range(300)]
            regions = await asyncio.gather(*map(target.create_and_write, data))
            reads = [target.read(region, 0, i + 1) for i, region in enumerate(regions)]
            assert await asyncio.gather(*reads) == data
            await asyncio.gather(*map(target.erase, regions))

    run(main)


async def has_regions(target: aio.Target, expected: list[RegionID]) -> None:
    """Return when these are the regions of the target: late ones are erased soon."""
    async with asyncio.timeout(PATIENCE):
        for _ in iter(int, 1):
            if [each async for each in target.list()] == expected:
                return
            await asyncio.sleep(0.005)


@asynccontextmanager
async def stopped(served: Served) -> AsyncIterator[None]:
    """A provider that does not run inside the block."""
    served.stop()
    try:
        yield
    finally:
        served.signal(signal.SIGCONT)


def test_the_loop_runs_while_a_call_waits() -> None:
    async def main() -> None:
        async with aio.connect(served.address, 1) as target:
            region = await target.create(SIZE)
            async with stopped(served):
                calls: list[Awaitable[Any]] = [
                    target.stat(region), target.write(region, 0, bytes(SIZE)), target.create(1),
                ]  # fmt: skip
                tasks = [asyncio.ensure_future(call) for call in calls]
                for _ in range(100):
                    await asyncio.sleep(0.001)
                assert not any(task.done() for task in tasks)
            await asyncio.gather(*tasks)

    with provider_process("tcp", MEMORY) as served:
        run(main)


def test_cancelled_calls_end_and_leave_nothing() -> None:
    async def main() -> None:
        async with aio.connect(served.address, 1) as target:
            region = await target.create_and_write(bytes(SIZE))
            async with stopped(served):
                buffer = bytearray(SIZE)
                makes = [target.create(10), target.create_and_write(b"data"), target.copy(region)]
                tasks = [asyncio.create_task(make) for make in makes]
                tasks.append(asyncio.create_task(target.read_into(region, 0, buffer)))  # type: ignore[arg-type]
                await asyncio.sleep(0.01)
                for task in tasks:
                    task.cancel()
                for task in tasks:
                    with pytest.raises(asyncio.CancelledError):
                        await task
                buffer[:] = b"x" * SIZE
            await has_regions(target, [region])
            assert buffer == b"x" * SIZE
            assert await target.size(region) == SIZE

    with provider_process("tcp", MEMORY) as served:
        run(main)


def test_a_region_that_was_made_when_its_caller_was_cancelled_is_erased(address: str) -> None:
    async def main() -> None:
        async with aio.connect(address, 1) as target:
            before = [each async for each in target.list()]
            for steps in range(40):
                task = asyncio.create_task(target.create(10))
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await target.erase(await task)
            await has_regions(target, before)

    run(main)


def test_a_connection_that_ends_during_a_call() -> None:
    async def lost() -> None:
        async with aio.connect(served.address, 1) as target:
            async with stopped(served):
                task = asyncio.create_task(target.create(1))
                await asyncio.sleep(0.01)
                served.signal(signal.SIGKILL)
            with pytest.raises(errors.ConnectionLost):
                await task
            with pytest.raises(errors.ConnectionLost):
                await target.create(1)

    async def closed() -> None:
        async with AsyncExitStack() as stack:
            target = await stack.enter_async_context(aio.connect(served.address, 1))
            async with stopped(served):
                task = asyncio.create_task(target.create(1))
                await asyncio.sleep(0.01)
                await stack.aclose()
        with pytest.raises(errors.ConnectionLost, match="closed"):
            await task
        with pytest.raises(errors.ConnectionLost, match="closed"):
            await target.create(1)

    for main in (lost, closed):
        with provider_process("tcp", MEMORY) as served:
            run(main)


def test_connecting_fails_or_is_cancelled(tmp_path: Any) -> None:
    async def main() -> None:
        for address, provider_id, error in (
            ("tcp://127.0.0.1:1", 1, errors.ConnectionFailed),
            ("nonsense", 1, errors.ConfigError),
            (served.address, 7, errors.ProviderNotFound),
        ):
            with pytest.raises(error):
                async with aio.connect(address, provider_id):
                    raise AssertionError
        async with stopped(served):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), aio.connect(served.address, 1):
                    raise AssertionError
        with pytest.raises(ZeroDivisionError):
            async with aio.connect(served.address, 1, read_only=True) as target:
                with pytest.raises(errors.PermissionDenied):
                    await target.create(1)
                _ = 1 / 0

    with provider_process("tcp", file_config(tmp_path / "target")) as served:
        run(main)


def test_two_loops_share_a_connection(address: str) -> None:
    async def elsewhere(target: aio.Target, region: RegionID) -> bytes:
        return await target.read(region, 0, 4)

    async def main() -> None:
        async with aio.connect(address, 1) as target:
            region = await target.create_and_write(b"data")
            read = asyncio.to_thread(lambda: asyncio.run(elsewhere(target, region)))
            both = await asyncio.gather(read, elsewhere(target, region))
            assert tuple(both) == (b"data", b"data")
            await target.erase(region)

    run(main)


async def test_not_in_an_asyncio_task() -> None:
    with pytest.raises(RuntimeError):
        async with aio.connect("na+sm://1-1", 1):
            raise AssertionError
