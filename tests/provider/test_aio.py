"""The Trio client, over the wire and on a target of its own process."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import signal
import socket
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    Served,
    eventually,
    file_config,
    half_reply,
    open_memory,
    pattern,
    provider_process,
)
from warabi import aio, errors
from warabi._core.attributes import ROOT
from warabi.client import AsyncRequest, Client, TargetHandle
from warabi.engine import Engine
from warabi.protocol import transport
from warabi.protocol.operations import undo
from warabi.region import RegionID
from warabi.server import Provider
from warabi.target import opening
from warabi.target.config import FileConfig, MemoryConfig
from warabi.target.target import Target as LocalTarget

BACKENDS = {"memory": 1, "file": 2}
LOCAL: dict[str, Callable[[Path], LocalTarget]] = {
    "memory": lambda path: open_memory(MemoryConfig()),
    "file": lambda path: opening.open_file(FileConfig(path=str(path), create_if_missing=True)),
}


@contextlib.asynccontextmanager
async def _attached(
    request: pytest.FixtureRequest, backend: str, path: Path
) -> AsyncIterator[aio.Target]:
    with LOCAL[backend](path) as local:
        yield aio.attach(local)


@contextlib.asynccontextmanager
async def _over_socket(
    request: pytest.FixtureRequest, backend: str, path: Path
) -> AsyncIterator[aio.Target]:
    served: Served = request.getfixturevalue("local_process")
    async with aio.connect(served.address, BACKENDS[backend]) as target:
        yield target


@contextlib.asynccontextmanager
async def _over_tcp(
    request: pytest.FixtureRequest, backend: str, path: Path
) -> AsyncIterator[aio.Target]:
    served: Served = request.getfixturevalue("tcp_process")
    async with aio.connect(served.address, BACKENDS[backend]) as target:
        yield target


WAYS = {"attached": _attached, "socket": _over_socket, "tcp": _over_tcp}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Any:
    return WAYS[request.param]


@pytest.fixture(params=BACKENDS)
async def target(
    request: pytest.FixtureRequest,
    way: Any,
    tmp_path: Path,
    local_process: Served,
    tcp_process: Served,
) -> AsyncIterator[aio.Target]:
    async with way(request, request.param, tmp_path / "target") as made:
        yield made


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 2049, 65537, (4 << 20) + 1, 9 << 20])
async def test_round_trip(target: aio.Target, size: int) -> None:
    data = pattern(size)
    region = await target.create(size)
    assert type(region) is RegionID
    assert await target.read(region, 0, size) == bytes(size)
    await target.write(region, 0, data, persist=True)
    got = await target.read(region, 0, size)
    assert type(got) is bytes
    assert got == data
    buffer = bytearray(size)
    await target.read_into(region, 0, buffer)
    assert buffer == data
    await target.erase(region)
    made = await target.create_and_write(data)
    assert await target.size(made) == size
    assert await target.read(made, 0, size) == data
    await target.erase(made)


async def test_more_calls(target: aio.Target) -> None:
    region = await target.create_and_write(np.arange(12).reshape(3, 4), persist=True)
    assert await target.read(region, 8, 8) == np.int64(1).tobytes()
    await target.persist(region, 0, 96)
    await target.fsync(region)
    await target.fsync(region, times=False)
    await target.resize(region, 100)
    assert await target.read(region, 96, 4) == bytes(4)
    await target.write(region, 100, b"beyond", extend=True)
    assert await target.size(region) == 106
    buffer = bytearray(50)
    assert await target.read_some(region, 100, buffer) == 6
    assert buffer[:6] == b"beyond"
    assert await target.read_some(region, 200, buffer) == 0
    await target.link_name(region, "/aio")
    assert await target.open_name("/aio") == region
    found = await target.stat(region)
    assert (found.size, found.names) == (106, ["/aio"])
    assert region in [listed async for listed in target.list(page_size=3)]
    await target.unlink_name("/aio")
    assert region not in [listed async for listed in target.list()]


async def test_room_and_holes(target: aio.Target) -> None:
    region = await target.create(1 << 20)
    await target.resize(region, 2 << 20)
    await target.write(region, 1 << 20, b"x" * 10_000)
    await target.allocate(region, 0, 3 << 20, keep_size=True)
    await target.allocate(region, 2 << 20, 10)
    await target.punch_hole(region, 1 << 20, 5000)
    await target.zero_range(region, (1 << 20) + 9000, 2000)
    wanted = bytes(5000) + b"x" * 4000 + bytes(2000)
    assert await target.read(region, 1 << 20, 11_000) == wanted
    assert await target.size(region) == (2 << 20) + 10
    found = bytearray((2 << 20) + 10)
    async for offset, size in target.data_extents(region):
        found[offset : offset + size] = await target.read(region, offset, size)
    assert found[1 << 20 :][:11_000] == wanted
    assert found.count(b"x") == 4000
    assert await target.seek_hole(region, 1 << 30) is None


async def test_copies(target: aio.Target) -> None:
    source = await target.create_and_write(pattern(100_000))
    copy = await target.copy(source, persist=True)
    assert await target.copy_range(source, 10, copy, 99_990, 1 << 40) == 99_990
    data = pattern(100_000)
    assert await target.read(copy, 0, 199_980) == data[:99_990] + data[10:]


async def test_growing_writes_of_any_size(target: aio.Target) -> None:
    region = await target.create(0)
    content = b""
    for offset, size in ((0, 10), (5, 10), (15, 3000), (10_000, 9 << 20), (9 << 20, 1 << 20)):
        data = pattern(size, 7)
        await target.write(region, offset, data, extend=True)
        content = content.ljust(offset, b"\0")
        content = content[:offset] + data + content[offset + size :]
    assert await target.read(region, 0, len(content)) == content
    await target.erase(region)


async def test_wrong_arguments(target: aio.Target) -> None:
    region = await target.create_and_write(b"1234")
    erased = await target.create(1)
    await target.erase(erased)
    wrong_regions: list[Any] = [
        erased, RegionID(), RegionID(b"\xff" * 16), b"short", "text", None, 5
    ]  # fmt: skip
    calls: list[Callable[[Any], Awaitable[object]]] = [
        lambda r: target.write(r, 0, b"x"),
        lambda r: target.write(r, 0, bytes(5 << 20)),
        lambda r: target.read(r, 0, 1),
        lambda r: target.read_into(r, 0, bytearray(1)),
        lambda r: target.read_some(r, 0, bytearray(1)),
        lambda r: target.persist(r, 0, 1),
        lambda r: target.fsync(r),
        lambda r: target.erase(r),
        lambda r: target.size(r),
        lambda r: target.stat(r),
        lambda r: target.resize(r, 1),
        lambda r: target.link_name(r, "/x"),
    ]
    for wrong in wrong_regions:
        for call in calls:
            with pytest.raises(errors.InvalidRegion):
                await call(wrong)
    beyond: list[Callable[[], Awaitable[object]]] = [
        lambda: target.write(region, 3, b"xy"),
        lambda: target.write(region, 0, bytes(5 << 20)),
        lambda: target.read(region, 0, 5),
        lambda: target.read(region, 0, 1 << 60),
        lambda: target.read_into(region, 0, bytearray(5 << 20)),
        lambda: target.read(region, -1, 1),
        lambda: target.create(-1),
        lambda: target.resize(region, 1 << 63),
        lambda: target.persist(region, 4, 1),
    ]
    for attempt in beyond:
        with pytest.raises(errors.OutOfBounds):
            await attempt()
    buffers: list[Callable[[], Awaitable[object]]] = [
        lambda: target.write(region, 0, "text"),  # type: ignore[arg-type]
        lambda: target.create_and_write(None),  # type: ignore[arg-type]
        lambda: target.read_into(region, 0, b"1234"),
        lambda: target.read_into(region, 0, np.zeros((4, 4), "u1")[:, 0]),
    ]
    for attempt in buffers:
        with pytest.raises(errors.InvalidBuffer):
            await attempt()
    with pytest.raises(errors.StorageFull):
        await target.create(1 << 60)
    with pytest.raises(errors.PathError):
        await target.open_name("/no such name")
    assert await target.read(region, 0, 4) == b"1234"


async def test_extended_attributes(target: aio.Target) -> None:
    path = f"/{(await target.create(0)).hex()}"
    await target.setxattr(path, "user.x", b"1", os.XATTR_CREATE)
    with pytest.raises(errors.PathError, match=r"user\.x: the attribute exists"):
        await target.setxattr(path, "user.x", b"2", os.XATTR_CREATE)
    with pytest.raises(errors.PathError, match=r"user\.y: no such attribute"):
        await target.setxattr(path, "user.y", b"2", os.XATTR_REPLACE)
    await target.setxattr(path, b"user.y", b"2")
    assert await target.getxattr(path, "user.x") == b"1"
    await target.removexattr(path, "user.x")
    assert await target.listxattr(path) == ["user.y"]


async def test_names_and_directories(target: aio.Target) -> None:
    top = f"/top {os.urandom(8).hex()}"
    await target.mkdir(top)
    with pytest.raises(FileExistsError):
        await target.mkdir(top)
    await target.makedirs(f"{top}/a/b")
    region = await target.create_name(f"{top}/a/file")
    await target.symlink("a/file", f"{top}/link")
    assert await target.readlink(f"{top}/link") == "a/file"
    assert (await target.stat_name(f"{top}/link")).region == region
    await target.rename(f"{top}/a/file", f"{top}/a/other")
    with pytest.raises(FileNotFoundError):
        await target.stat_name(f"{top}/link")
    new = await target.create_and_write(b"new")
    await target.link_name(new, f"{top}/a/other", replace=True)
    assert await target.open_name(f"{top}/a/other") == new
    await target.rmdir(f"{top}/a/b")
    assert await target.listdir(f"{top}/a") == ["other"]
    assert [name async for name in target.list_names(top)] == ["a", "link"]
    assert [entry.is_dir() async for entry in target.scandir(top)] == [True, False]
    assert [found async for found in target.walk(top)] == [
        (top, ["a"], ["link"]),
        (f"{top}/a", [], ["other"]),
    ]


@pytest.mark.parametrize("size", [0, 5000, 100_000, (4 << 20) + 1])
async def test_files_are_stored_and_fetched(target: aio.Target, size: int) -> None:
    path, data = f"/{os.urandom(8).hex()}", pattern(size)
    for persist in (False, True):
        stored = await target.store_name(path, data, 0o600, persist=persist)
        assert await target.read(stored.region, 0, size) == data
        expected = data if size <= 64 << 10 else None
        assert await target.fetch_name(path) == (stored, expected)
    with pytest.raises(FileExistsError):
        await target.store_name(path, data, exclusive=True)
    await target.unlink_name(path)
    with pytest.raises(FileNotFoundError):
        await target.fetch_name(path)


@pytest.mark.parametrize("size", [5000, 9 << 20])
async def test_a_file_whose_storing_is_cancelled_is_whole_or_not_there(
    target: aio.Target, size: int
) -> None:
    top = f"/{os.urandom(8).hex()}"
    await target.mkdir(top)
    before = await target.call("used")
    for steps in (*range(12), 20, 40, 80):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(target.store_name, f"{top}/{steps}", bytes(size))
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

    async def sizes() -> list[int]:
        return [entry.attributes.size async for entry in target.scandir(top)]

    with trio.fail_after(PATIENCE):  # what was cancelled may be done, or undone, late
        while await target.call("used") - before != sum(await sizes()):  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert set(await sizes()) <= {size}
    for name in await target.listdir(top):
        await target.unlink_name(f"{top}/{name}")
    await target.rmdir(top)


@pytest.mark.parametrize("name", ["pin", "open", "mknod", "copy", "survey"])
async def test_a_cancelled_request_holds_nothing(target: aio.Target, name: str) -> None:
    before = await target.call("used")
    top = os.urandom(8).hex()
    stored = await target.store_name(f"/{top}", bytes(5000))
    for steps in (*range(8), 10, 20, 40):
        new = f"{top}-{steps}"
        arguments: dict[str, tuple[Any, ...]] = {
            "pin": (stored.ino,),
            "open": (stored.ino,),
            "mknod": (ROOT, new.encode(), stat.S_IFREG | 0o600, 0, 0, 0, True, 0),
            "copy": (stored.region,),
            "survey": (),
        }
        results: list[Any] = []

        async def request(asked: Sequence[Any], results: list[Any] = results) -> None:
            results.append(await target.call(name, *asked))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(request, arguments[name])
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        if results:
            undoing = undo(name, arguments[name], results[0])
            assert undoing is not None
            await target.call(undoing[0], *undoing[1])
    with trio.fail_after(PATIENCE):  # what was cancelled may be done, and given back, late
        for path in [f"/{each}" for each in await target.listdir() if each.startswith(top)]:
            await target.resize((await target.stat_name(path)).region, 5000)
            await target.unlink_name(path)
        while await target.call("used") != before:  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_many_tasks(target: aio.Target) -> None:
    async def work(seed: int) -> None:
        for i in range(5):
            size = (seed * 7919 + i * 104_729) % 100_000
            region = await target.create_and_write(pattern(size, seed))
            assert await target.read(region, 0, size) == pattern(size, seed)
            await target.erase(region)

    async with trio.open_nursery() as nursery:
        for seed in range(100):
            nursery.start_soon(work, seed)


async def test_every_call_over_a_connection_is_a_checkpoint(local_process: Served) -> None:
    async with aio.connect(local_process.address, 1) as target:
        await _check_checkpoints(target)


async def _check_checkpoints(target: aio.Target) -> None:
    region = await target.create(10)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: target.create(1),
        lambda: target.write(region, 0, b"x"),
        lambda: target.read(region, 0, 1),
        lambda: target.read_into(region, 0, bytearray(1)),
        lambda: target.size(region),
        lambda: target.stat(region),
        lambda: target.persist(region, 0, 1),
        lambda: target.create_and_write(b"x"),
        lambda: target.resize(region, 10),
    ]
    for call in calls:
        with trio.CancelScope() as scope:
            scope.cancel()
            await call()
            pytest.fail("went on in a cancelled scope")
    assert await target.size(region) == 10


async def test_cancelled_while_it_connects(local_process: Served) -> None:
    """No socket is left open, by whom it may be made."""
    for steps in range(30):
        with trio.move_on_after(steps / 10_000):
            async with aio.connect(local_process.address, 1) as target:
                region = await target.create_and_write(bytes(100_000))
                await target.read(region, 0, 100_000)
    await trio.sleep(0.1)
    gc.collect()  # what nobody closed warns now


async def test_a_task_that_calls_without_pause_lets_others_run(local_process: Served) -> None:
    """And is answered although another request waits on the same connection."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with aio.connect(local_process.address, 1) as target, trio.open_nursery() as nursery:
        number = (await target._link.changes(0, True)).number
        nursery.start_soon(target._link.changes, number, True)
        nursery.start_soon(count)
        with trio.fail_after(PATIENCE):
            while turns < 100:
                before = turns
                for _ in range(1000):
                    await target.call("used")
                assert turns > before
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("size", [100, 300_000, 9 << 20])
async def test_cancelled_anywhere(target: aio.Target, size: int) -> None:
    """The connection stays usable, late replies touch no buffer, and no region is torn."""
    old, new = pattern(size, 1), pattern(size, 2)
    before = {listed async for listed in target.list()}
    region = await target.create_and_write(old)
    other = await target.create_and_write(b"other")
    known = {region, other}

    async def create() -> None:
        known.add(await target.create_and_write(old))

    for steps in (*range(12), 20, 40, 80, 160):
        buffer = bytearray(size)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(target.read_into, region, 0, buffer)
                nursery.start_soon(target.read, region, 0, size)
                nursery.start_soon(create)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        seen = bytes(buffer)
        buffer[:] = b"\xaa" * size  # ours again
        assert await target.read(other, 0, 5) == b"other"
        assert await target.read(region, 0, size) == old
        assert buffer == b"\xaa" * size
        assert all(got in (0, want) for got, want in zip(seen[:100], old[:100], strict=True))
    for steps in range(0, 40, 8):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(target.write, region, 0, new)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        assert await target.read(other, 0, 5) == b"other"
        got = await target.read(region, 0, size)
        assert len(got) == size
        await target.write(region, 0, new)
        assert await target.read(region, 0, size) == new
    with trio.fail_after(PATIENCE):  # those whose creation was cancelled are erased, if late
        while {listed async for listed in target.list()} - before != known:  # noqa: ASYNC110
            await trio.sleep(0.01)
    for region in known:
        await target.erase(region)


async def test_cancelled_half_way_through_its_payload() -> None:
    """The rest arrives later: not in the buffer, and what follows it is understood."""
    with half_reply() as (text, provider):
        async with aio.connect(text, 1) as target:
            buffer = bytearray(100_000)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(target.read_into, RegionID(), 0, buffer)
                    while not buffer.startswith(b"r"):  # noqa: ASYNC110  a buffer has no event
                        await trio.sleep(0.01)
                    await trio.sleep(0.05)  # all of the half
                    scope.cancel()
            assert buffer.endswith(b"\0")
            buffer[:] = bytes(100_000)
            provider.send_rest()
            for _ in range(3):
                await target.erase(RegionID())
            assert buffer == bytes(100_000)


async def test_a_read_buffer_is_requested_when_data_arrive() -> None:
    """And not while other replies come; what is cancelled then touches it no more."""
    size = 100_000
    buffers = [bytearray(size), bytearray(size)]
    asked: list[int] = []
    scopes = [trio.CancelScope(), trio.CancelScope()]

    async def read(target: aio.Target, number: int) -> None:
        def place() -> memoryview:
            asked.append(number)
            return memoryview(buffers[number])

        with scopes[number]:
            assert await target.read_later(RegionID(), 0, size, place) == size

    with half_reply() as (text, provider):
        async with aio.connect(text, 1) as target, trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(read, target, number)
                await trio.testing.wait_all_tasks_blocked()
            while not buffers[0].startswith(b"r"):  # noqa: ASYNC110  a buffer has no event
                await trio.sleep(0.01)
            assert asked == [0]
            scopes[0].cancel()
            await trio.testing.wait_all_tasks_blocked(0.05)
            buffers[0][:] = bytes(size)
            provider.send_rest()
    assert asked == [0, 1]
    assert buffers == [bytes(size), b"r" * size]


# Connections


async def test_connecting_where_no_engine_listens_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        for text, kind in (
            ("nowhere", errors.ConfigError),
            ("na+sm", errors.ConfigError),
            ("na+sm://4999999-0", errors.ConnectionFailed),
            ("tcp://127.0.0.1:1", errors.ConnectionFailed),
            (silent_address, errors.TimedOut),
        ):
            with pytest.raises(kind):
                async with aio.connect(text, 1, timeout=0.2):
                    pytest.fail("connected")


async def test_unknown_provider(local_process: Served) -> None:
    with pytest.raises(errors.ProviderNotFound):
        async with aio.connect(local_process.address, 77):
            pytest.fail("connected")


async def test_exceptions_of_the_block_are_not_wrapped(local_process: Served) -> None:
    for error in (ValueError("mine"), errors.OutOfBounds("mine"), ExceptionGroup("x", [OSError()])):
        with pytest.raises(type(error)) as caught:
            async with aio.connect(local_process.address, 1):
                raise error
        assert caught.value is error


async def test_a_connection_that_is_there_only_after_the_cancellation_is_closed(
    local_process: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = transport.connect
    made: list[socket.socket] = []
    go_on = threading.Event()

    def slow(*arguments: Any) -> Any:
        found = connect(*arguments)
        made.append(found[0])
        assert go_on.wait(PATIENCE)
        return found

    async def connects() -> None:
        async with aio.connect(local_process.address, 1):
            pytest.fail("connected")

    monkeypatch.setattr(transport, "connect", slow)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connects)
            await trio.to_thread.run_sync(eventually, lambda: made)
            scope.cancel()
    go_on.set()
    eventually(lambda: made[0].fileno() == -1)


async def test_cancelled_block(local_process: Served) -> None:
    with trio.move_on_after(0.05) as scope:
        async with aio.connect(local_process.address, 1) as target:
            await target.create(1)
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_use_after_the_block(local_process: Served) -> None:
    async with aio.connect(local_process.address, 1) as target:
        region = await target.create(1)
    with pytest.raises(errors.ConnectionLost):
        await target.size(region)


@pytest.mark.parametrize("transport", ["na+sm", "tcp"])
async def test_a_killed_provider_wakes_all_waiting_calls(transport: str) -> None:
    with provider_process(transport, MEMORY) as served:
        async with aio.connect(served.address, 1) as target:
            region = await target.create(1000)
            served.stop()
            outcomes = []

            async def call(what: Callable[..., Awaitable[object]], *arguments: Any) -> None:
                try:
                    await what(*arguments)
                except errors.Exception as error:
                    outcomes.append(type(error))

            with trio.fail_after(PATIENCE):
                async with trio.open_nursery() as nursery:
                    for _ in range(100):  # more than go out at once
                        nursery.start_soon(call, target.read, region, 0, 1000)
                    nursery.start_soon(call, target.create_and_write, bytes(50 << 20))
                    await trio.testing.wait_all_tasks_blocked()
                    served.kill()
            assert set(outcomes) == {errors.ConnectionLost}
            assert len(outcomes) == 101
            with pytest.raises(errors.ConnectionLost):
                await target.size(region)


async def test_stopped_provider_times_out_and_is_usable_again(tmp_path: Path) -> None:
    with provider_process("na+sm", file_config(tmp_path / "target")) as served:
        async with aio.connect(served.address, 1, timeout=1.0) as target:
            region = await target.create_and_write(b"1234")
            served.stop()
            buffer = bytearray(4)
            with pytest.raises(errors.TimedOut):
                await target.read_into(region, 0, buffer)
            served.signal(signal.SIGCONT)
            assert await target.read(region, 0, 4) == b"1234"
            assert buffer == bytes(4), "the late reply touched the buffer"


async def test_attached_target_that_is_closed() -> None:
    local = open_memory(MemoryConfig())
    target = aio.attach(local)
    region = await target.create(1)
    local.close()
    with pytest.raises(errors.TargetNotFound):
        await target.read(region, 0, 1)


async def test_a_connection_that_comes_too_late_is_closed(local_process: Served) -> None:
    async def connect() -> None:
        async with aio.connect(local_process.address, 1):
            await trio.sleep_forever()

    for steps in (*range(20), 40, 80):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", [Client, TargetHandle, AsyncRequest, aio.Target, Provider, Engine])
def test_public_methods_are_documented(kind: type) -> None:
    for name, member in inspect.getmembers(kind):
        if not name.startswith("_") and (callable(member) or isinstance(member, property)):
            assert member.__doc__, f"{kind.__name__}.{name}"
