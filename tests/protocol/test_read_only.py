"""Read-only access: the client and the provider refuse changes."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import warabi.aio
from tests.protocol.test_security import BOTH, READING, TOKEN, TRANSPORTS, settings
from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    RawPeer,
    Served,
    file_config,
    provider_process,
    raw_connection,
)
from warabi import errors
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.in_process.link import Link
from warabi.protocol.operations import OPERATIONS
from warabi.protocol.operations import Served as ServedBy
from warabi.region import RegionID
from warabi.remote.link import WireLink
from warabi.server import Provider

REGION = RegionID(bytes(15) + b"\1")


def _first(results: Iterable[object]) -> None:
    (result,) = results
    if isinstance(result, errors.Exception):
        raise result


CHANGES: dict[str, Callable[[TargetHandle, RegionID], object]] = {
    "create": lambda h, r: h.create(1),
    "create_async": lambda h, r: h.create_async(1).wait(),
    "write": lambda h, r: h.write(r, 0, b"x"),
    "write large": lambda h, r: h._link.write(r, 0, memoryview(bytes(9 << 20)), False, True),
    "write_async": lambda h, r: h.write_async(r, 0, b"x").wait(),
    "create_and_write": lambda h, r: h.create_and_write(b"x"),
    "store_name": lambda h, r: h.store_name("/name", b"x"),
    "store_names": lambda h, r: _first(h.store_names([("/name", b"x")])),
    "store_name large": lambda h, r: h.store_name("/name", bytes(9 << 20)),
    "create_and_write large": lambda h, r: h.create_and_write(bytes(9 << 20)),
    "create_and_write_async": lambda h, r: h.create_and_write_async(b"x").wait(),
    "write_vector": lambda h, r: h.write_vector(r, [(0, 1)], b"x"),
    "append": lambda h, r: h.append(r, b"x"),
    "erase": lambda h, r: h.erase(r),
    "erase_async": lambda h, r: h.erase_async(r).wait(),
    "resize": lambda h, r: h.resize(r, 5),
    "allocate": lambda h, r: h.allocate(r, 0, 9),
    "zero_range": lambda h, r: h.zero_range(r, 0, 2),
    "punch_hole": lambda h, r: h.punch_hole(r, 0, 2),
    "copy": lambda h, r: h.copy(r),
    "copy_range": lambda h, r: h.copy_range(r, 0, r, 4, 2),
    "link_name": lambda h, r: h.link_name(r, "/other"),
    "set_flags": lambda h, r: h.set_flags("/name", 0x10),
    "setxattr": lambda h, r: h.setxattr("/name", "user.x", b"x"),
    "removexattr": lambda h, r: h.removexattr("/name", "user.x"),
    "unlink_name": lambda h, r: h.unlink_name("/name"),
    "link_name replace": lambda h, r: h.link_name(r, "/other", replace=True),
    "create_name": lambda h, r: h.create_name("/other"),
    "mkdir": lambda h, r: h.mkdir("/other"),
    "makedirs": lambda h, r: h.makedirs("/other/deeper"),
    "rmdir": lambda h, r: h.rmdir("/name"),
    "rename": lambda h, r: h.rename("/name", "/other"),
    "symlink": lambda h, r: h.symlink("name", "/other"),
}
OPERATION = {
    "copy": "clone",
    "link_name replace": "rename",
    "create_name": "mknod",
    "makedirs": "mkdir",
    "store_name": "store",
    "store_names": "store",
    "store_name large": "store",
}
"""The operation that is refused, if it is called otherwise."""


def _readlink(handle: TargetHandle) -> None:
    with pytest.raises(errors.PathError, match="Invalid argument"):  # no link, but it was looked at
        handle.readlink("/name")


NO_CHANGES: dict[str, Callable[[TargetHandle, RegionID], object]] = {
    "commit": lambda h, r: h.commit(),
    "fetch_names": lambda h, r: _first(h.fetch_names(["/name"])),
    "fetch_name": lambda h, r: h.fetch_name("/name"),
    "read": lambda h, r: h.read(r, 0, 4),
    "read_into": lambda h, r: h.read_into(r, 0, bytearray(4)),
    "read_async": lambda h, r: h.read_async(r, 0, bytearray(4)).wait(),
    "read_vector": lambda h, r: h.read_vector(r, [(0, 2)], bytearray(2)),
    "size": lambda h, r: h.size(r),
    "stat": lambda h, r: h.stat(r),
    "seek_data": lambda h, r: h.seek_data(r, 0),
    "seek_hole": lambda h, r: h.seek_hole(r, 0),
    "data_extents": lambda h, r: list(h.data_extents(r)),
    "list": lambda h, r: list(h.list()),
    "list_stats": lambda h, r: list(h.list_stats()),
    "open_name": lambda h, r: h.open_name("/name"),
    "list_names": lambda h, r: list(h.list_names()),
    "stat_name": lambda h, r: h.stat_name("/name"),
    "scandir": lambda h, r: list(h.scandir()),
    "listdir": lambda h, r: h.listdir(),
    "walk": lambda h, r: list(h.walk()),
    "readlink": lambda h, r: _readlink(h),
    "getxattr": lambda h, r: h.getxattr("/name", "user.warabi.region"),
    "listxattr": lambda h, r: h.listxattr("/name"),
    "persist": lambda h, r: h.persist(r, 0, 4),
    "persist_async": lambda h, r: h.persist_async(r, 0, 4).wait(),
    "persist_vector": lambda h, r: h.persist_vector(r, [(0, 4)]),
    "lock": lambda h, r: h.lock(r),
    "test_lock": lambda h, r: h.test_lock(r),
    "unlock": lambda h, r: h.unlock(r),
    "set_eager_write_threshold": lambda h, r: h.set_eager_write_threshold(1),
    "set_eager_read_threshold": lambda h, r: h.set_eager_read_threshold(1),
}


def test_every_method_is_on_one_side() -> None:
    numpy = {"put_array", "get_array"}  # made of the others
    methods = {
        name
        for name, _ in inspect.getmembers(TargetHandle, inspect.isfunction)
        if not name.startswith("_")
    }
    listed = {name.split()[0] for name in (*CHANGES, *NO_CHANGES)}
    assert methods - numpy == listed


def _fill(handle: TargetHandle) -> RegionID:
    region = handle.create_and_write(b"data", persist=True)
    handle.link_name(region, "/name")
    return region


def _unchanged(handle: TargetHandle, region: RegionID) -> None:
    assert list(handle.list()) == [region]
    assert handle.read(region, 0, 4) == b"data"
    assert handle.size(region) == 4
    assert list(handle.list_names()) == ["name"]


def _only_reads(handle: TargetHandle, region: RegionID) -> None:
    for name, change in CHANGES.items():
        method = name.split()[0].removesuffix("_async")
        operation = OPERATION.get(name, method)
        with pytest.raises(errors.PermissionDenied, match=rf"^{operation}: access is read-only"):
            change(handle, region)
    for look in NO_CHANGES.values():
        look(handle, region)


@pytest.mark.parametrize("way", ["direct", "na+sm", "tcp", "tls"])
def test_read_only_handles(way: str, tls: dict[str, Any], tmp_path: Path) -> None:
    name, config = settings("na+sm" if way == "direct" else way, tls)
    with (
        Engine(name, config=config) as engine,
        Provider(engine, 1, file_config(tmp_path / "target")),
        Engine(name, client, config=config) as other,
    ):
        own = Client(engine if way == "direct" else other)
        address = str(engine.addr())
        handle = own.make_target_handle(address, 1)
        region = _fill(handle)
        _only_reads(own.make_target_handle(address, provider_id=1, read_only=True), region)
        _unchanged(handle, region)
        handle.write(region, 0, b"more")  # the other handle is as it was


def _unchecked(handle: TargetHandle) -> TargetHandle:
    """The same connection as a read-only handle's, whose client checks nothing any more."""
    link: Link = handle._link.link  # type: ignore[attr-defined]
    assert isinstance(link, WireLink)
    return TargetHandle(link, handle._engine)


@TRANSPORTS
@pytest.mark.parametrize("why", ["handle", "token"])
def test_provider_refuses_too(
    transport: str, why: str, tls: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever the client does not check."""
    name, config = settings(transport, tls, **BOTH)
    _, full = settings(transport, tls, token=TOKEN)
    _, reading = settings(transport, tls, token=READING)
    with (
        Engine(name, config=config) as engine,
        Provider(engine, 1, file_config(tmp_path / "target")),
        Engine(name, client, config=full) as own,
        Engine(name, client, config=full if why == "handle" else reading) as other,
    ):
        address = str(engine.addr())
        region = _fill(owner := Client(own).make_target_handle(address, 1))
        if why == "handle":
            handle = Client(other).make_target_handle(address, 1, read_only=True)
            handle = _unchecked(handle)
        else:
            handle = Client(other).make_target_handle(address, 1)
        for change in CHANGES.values():
            with pytest.raises(errors.PermissionDenied, match="access is read-only"):
                change(handle, region)
        for look in NO_CHANGES.values():
            look(handle, region)
        _unchanged(owner, region)


def test_remote_shutdown_is_a_change() -> None:
    with provider_process("tcp", MEMORY, engine=BOTH) as served:
        with (
            Engine("tcp", client, config={"token": READING}) as reader,
            pytest.raises(errors.PermissionDenied, match="shutdown: access is read-only"),
        ):
            reader.lookup(served.address).shutdown()
        with Engine("tcp", client, config={"token": TOKEN}) as own:
            own.lookup(served.address).shutdown()
        assert served.process.wait(PATIENCE) == 0


AIO_CHANGES: list[Callable[[warabi.aio.Target], Awaitable[object]]] = [
    lambda t: t.create(1),
    lambda t: t.write(REGION, 0, b"x"),
    lambda t: t.write(REGION, 0, bytes(9 << 20), extend=True),
    lambda t: t.create_and_write(b"x"),
    lambda t: t.create_and_write(bytes(9 << 20)),
    lambda t: t.store_name("/stored", b"x"),
    lambda t: t.store_name("/stored", bytes(9 << 20)),
    lambda t: t.write_vector(REGION, [(0, 1)], b"x"),
    lambda t: t.append(REGION, b"x"),
    lambda t: t.erase(REGION),
    lambda t: t.resize(REGION, 5),
    lambda t: t.link_name(REGION, "/other"),
    lambda t: t.unlink_name("/name"),
    lambda t: t.call("mkdir", 1, b"d", 0o755, 0, 0),
]


@pytest.mark.parametrize("transport", ["local", "tls"])
async def test_read_only_trio_targets(
    transport: str, local_process: Served, tls_process: Served, tls: dict[str, Any]
) -> None:
    served = local_process if transport == "local" else tls_process
    shown = tls["tls"] if transport == "tls" else None
    async with (
        warabi.aio.connect(served.address, 2, tls=shown) as target,
        warabi.aio.connect(served.address, 2, tls=shown, read_only=True) as reader,
    ):
        region = await target.create_and_write(b"data")
        unchecked = warabi.aio.Target(reader._link.link)  # type: ignore[attr-defined]
        for one in (reader, unchecked):
            for change in AIO_CHANGES:
                with pytest.raises(errors.PermissionDenied, match="access is read-only"):
                    await change(one)
            buffer = bytearray(10)
            assert await one.read(region, 0, 4) == b"data"
            assert await one.read_some(region, 0, buffer) == 4
            await one.read_vector(region, [(0, 2)], bytearray(2))
            await one.persist(region, 0, 4)
            assert region in [found async for found in one.list()]
        await target.erase(region)


def test_direct_access_is_granted_to_read() -> None:
    with provider_process("na+sm", MEMORY) as served:
        for read_only in (True, False):
            with raw_connection(served.address) as connection:
                peer = RawPeer(connection, more={"read_only": read_only})
                joined = peer.call([1, 1, "join", [True], None])[1]
                assert joined[2] is not read_only


def test_read_only_clients_cannot_migrate() -> None:
    with provider_process("na+sm", MEMORY) as served, raw_connection(served.address) as connection:
        peer = RawPeer(connection, more={"read_only": True})
        names = [name for name, one in OPERATIONS.items() if one.served is ServedBy.MIGRATION]
        for name in (*set(names) - {"migration_progress"}, "write"):
            for payload in (b"", bytes(100_000)):
                reply = peer.call([1, 1, name, [], None], payload)
                assert reply[3][:2] == ["denied", f"{name}: access is read-only"]
        assert peer.call([2, 1, "ping", [], None]) == [2, None]
