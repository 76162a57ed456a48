"""Data are not copied between client and storage, except through small buffers."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import warabi.aio
from tests.support.helpers import MEMORY, Served, file_config, provider_process
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.server import Provider

SIZE = 256 << 20
SMALL = 1 << 20
"""Bytes that a client may allocate for such a transfer."""
BUFFERS = 96 << 20
"""Bytes of buffers that a provider may hold for the transfers of one client."""


def allocated(call: Callable[[], object]) -> int:
    """The most bytes that Python objects had at once because of *call*."""
    gc.collect()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def private_memory(served: Served) -> int:
    """The most bytes of memory, shared memory and files aside, that a process had since the last
    time, about."""
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def check(handle: TargetHandle) -> None:
    """Write and read a region in one call each, which allocate next to nothing."""
    region = handle.create(SIZE)
    data, place = bytearray(b"warabi!\n") * (SIZE // 8), bytearray(SIZE)
    assert allocated(lambda: handle.write(region, 0, data)) < SMALL
    assert allocated(lambda: handle.read_into(region, 0, place)) < SMALL
    assert place == data
    handle.erase(region)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_in_the_same_process(tmp_path: Path, kind: str) -> None:
    config = MEMORY if kind == "memory" else file_config(tmp_path / "target")
    with Engine("na+sm") as engine, Provider(engine, 1, config):
        check(Client(engine).make_target_handle(str(engine.addr()), 1))


@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("way", ["shared", "na+sm", "tcp"])
def test_in_another_process(tmp_path: Path, way: str, kind: str) -> None:
    config = MEMORY if kind == "memory" else file_config(tmp_path / "target")
    transport = "tcp" if way == "tcp" else "na+sm"
    with (
        provider_process(transport, config) as served,
        Engine(transport, client, config={"share": way == "shared"}) as engine,
    ):
        handle = Client(engine).make_target_handle(served.address, 1)
        before = private_memory(served)
        check(handle)
        assert private_memory(served) - before < (BUFFERS if way != "shared" else SMALL)


def test_trio_clients_allocate_nothing_either() -> None:
    async def main(address: str) -> None:
        async with warabi.aio.connect(address, 1, share=False) as target:
            region = await target.create(SIZE)
            data, place = bytearray(b"warabi!\n") * (SIZE // 8), bytearray(SIZE)
            tracemalloc.start()
            await target.write(region, 0, data)
            await target.read_into(region, 0, place)
            assert tracemalloc.get_traced_memory()[1] < 2 * SMALL
            tracemalloc.stop()
            assert place == data

    with provider_process("na+sm", MEMORY) as served:
        trio.run(main, served.address)
