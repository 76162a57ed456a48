"""The version of a file's data that ``open`` returns: it changes only with changes by others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

import warabi.aio
from tests.support.helpers import MEMORY, file_config
from warabi.client import Client, TargetHandle
from warabi.engine import Engine
from warabi.region import RegionID
from warabi.server import Provider


class Served(NamedTuple):
    address: str
    local: TargetHandle
    provider: Provider


@pytest.fixture(params=["memory", "file"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    config = MEMORY if request.param == "memory" else file_config(tmp_path / "target")
    with Engine("tcp") as engine, Provider(engine, 1, config) as provider:
        address = str(engine.addr())
        yield Served(address, Client(engine).make_target_handle(address, 1), provider)


async def version(target: warabi.aio.Target, region: RegionID) -> int:
    """As somebody is told who opens the region's file."""
    attributes, number = await target.call("open", region.slot)
    await target.call("unpin", region.slot, 1)
    assert attributes.region == region
    return int(number)


async def test_only_changes_by_others_change_the_version(served: Served) -> None:
    async with (
        warabi.aio.connect(served.address, 1) as mine,
        warabi.aio.connect(served.address, 1) as other,
    ):
        region = await mine.create_and_write(b"12345678")
        changes: list[Callable[[warabi.aio.Target], Awaitable[object]]] = [
            lambda target: target.write(region, 0, b"x"),
            lambda target: target.write(region, 8, b"longer", extend=True),
            lambda target: target.resize(region, 20),
            lambda target: target.write(region, 0, bytes(1 << 20), extend=True),
            lambda target: target.write_vector(region, [(0, 1), (2, 1)], b"xy"),
        ]
        known = {await version(mine, region)}
        assert known == {0}
        for change in changes:
            before = await version(mine, region)
            await change(mine)
            await change(mine)
            assert await version(mine, region) == before
            await change(other)
            await change(mine)
            after = await version(mine, region)
            assert after not in known
            known.add(after)
        # Names, modes and reading leave the bytes alone.
        before = await version(mine, region)
        await other.link_name(region, "/name")
        await other.call("setattr", region.slot, 0o600, None, None, None, 1)
        assert await other.read(region, 0, 1) == b"x"
        assert await version(mine, region) == before


async def test_changes_in_the_providers_process_change_the_version(served: Served) -> None:
    async with warabi.aio.connect(served.address, 1) as mine:
        region = await mine.create_and_write(b"12345678")
        seen = [await version(mine, region)]
        for _ in range(100):  # faster than the clock ticks
            served.local.write(region, 0, b"x")
            await mine.write(region, 1, b"y")
            seen.append(await version(mine, region))
        assert len(set(seen)) == len(seen)
        assert 0 not in seen[1:]


async def test_versions_do_not_outlive_a_connection(served: Served) -> None:
    """What a client wrote may have been lost with the provider, which cannot tell then."""
    seen: list[int] = []
    region = served.local.create_and_write(b"12345678")
    for _ in range(5):
        async with warabi.aio.connect(served.address, 1) as mine:
            seen += [await version(mine, region) for _ in range(2)]
    assert seen[::2] == seen[1::2]
    assert len(set(seen)) == 5


async def test_versions_distinguish_many_connections(served: Served) -> None:
    async with AsyncExitStack() as stack:
        targets = [
            await stack.enter_async_context(warabi.aio.connect(served.address, 1)) for _ in range(8)
        ]
        region = await targets[0].create_and_write(b"12345678")
        for target in targets:
            before = [await version(one, region) for one in targets]
            await target.write(region, 0, b"x")
            after = [await version(one, region) for one in targets]
            for one, was, now in zip(targets, before, after, strict=True):
                assert (was == now) == (one is target)
