"""Appending to regions: atomic, over every way to a target and on every backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio

import warabi.aio
from tests.support.helpers import MEMORY, file_config, pattern, pmem_config, summed_config
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.errors import InvalidBuffer, InvalidRegion, StorageFull
from warabi.server import Provider

BACKENDS = {
    "memory": lambda path: MEMORY,
    "file": lambda path: file_config(path / "target"),
    "unpacked": lambda path: file_config(path / "target", packed=False),
    "checksums": lambda path: summed_config(path / "target"),
    "directio": lambda path: file_config(path / "target", directio=True),
    "pmem": lambda path: pmem_config(path / "target"),
}
SIZES = (1, 100, 3000, 4097, 70_000, 3 << 20)


@contextlib.contextmanager
def handles(way: str, config: dict[str, Any], count: int = 1) -> Iterator[list[TargetHandle]]:
    """So many handles to one target, each with a connection of its own if there are any."""
    scheme = "na+sm" if way == "direct" else way
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(Engine(scheme))
        stack.enter_context(Provider(serving, 3, config))
        made = []
        for _ in range(count):
            calling = serving
            if way != "direct":
                calling = stack.enter_context(Engine(scheme, client))
            made.append(Client(calling).make_target_handle(str(serving.addr()), 3))
        yield made


@pytest.mark.parametrize("way", ["direct", "na+sm", "tcp"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("persist", [False, True], ids=["volatile", "persisted"])
def test_appended_data_are_at_the_returned_offset(
    tmp_path: Path, way: str, backend: str, persist: bool
) -> None:
    with handles(way, BACKENDS[backend](tmp_path)) as (target,):
        for region in (target.create_and_write(b"begin"), target.create(0)):
            model = bytearray(target.read(region, 0, target.size(region)))
            for number, size in enumerate(SIZES):
                data = pattern(size, number)
                assert target.append(region, data, persist) == len(model)
                model += data
                target.write(region, 0, data[:2])  # directly, where that can be
                model[: len(data[:2])] = data[:2]
                assert target.size(region) == len(model)
            assert target.read(region, 0, len(model)) == model


@pytest.mark.parametrize("way", ["direct", "na+sm", "tcp"])
@pytest.mark.parametrize("backend", ["memory", "file", "checksums"])
def test_appends_at_the_same_time_do_not_meet(tmp_path: Path, way: str, backend: str) -> None:
    """Nor writes at offsets, while the region grows and moves."""
    with handles(way, BACKENDS[backend](tmp_path), 4) as targets:
        region = targets[0].create_and_write(b"head")

        def append(number: int) -> list[tuple[int, bytes]]:
            done = []
            for turn in range(60):
                data = pattern(1 + (turn * 977 + number * 131) % 5000, number * 100 + turn)
                done.append((targets[number].append(region, data), data))
                targets[number].write(region, number, b"%d" % number)
            return done

        with ThreadPoolExecutor(4) as pool:
            done = [entry for found in pool.map(append, range(4), timeout=60) for entry in found]
        whole = targets[0].read(region, 0, targets[0].size(region))
        end = 4
        for offset, data in sorted(done):
            assert offset == end
            end += len(data)
            assert whole[offset:end] == data
        assert whole[:4] == b"0123"
        assert len(whole) == end


@pytest.mark.parametrize("way", ["direct", "na+sm", "tcp"])
def test_bad_arguments_and_a_full_target_change_nothing(way: str) -> None:
    config = {"target": {"type": "memory", "config": {"capacity": 10_000}}}
    with handles(way, config) as (target,):
        region = target.create_and_write(b"x" * 1000)
        assert target.append(region, b"") == 1000
        with pytest.raises(InvalidBuffer):
            target.append(region, 3)  # type: ignore[arg-type]
        for size in (9001, 500_000):
            with pytest.raises(StorageFull):
                target.append(region, bytes(size))
            assert target.size(region) == 1000
        assert target.append(region, b"y" * 9000) == 1000
        target.erase(region)
        with pytest.raises(InvalidRegion):
            target.append(region, b"z")


def test_what_does_not_fit_into_a_request_is_refused(tmp_path: Path) -> None:
    """Nobody else's data may come between its parts."""
    data = bytes((4 << 20) + 1)
    with handles("tcp", MEMORY) as (target,):
        region = target.create(1)
        with pytest.raises(InvalidBuffer, match="4194304 bytes at once"):
            target.append(region, data)
        assert target.append(region, data[:-1]) == 1
    with handles("direct", MEMORY) as (target,):
        assert target.append(target.create(1), data) == 1


def test_an_append_is_atomic_also_where_transfers_go_in_chunks() -> None:
    pipeline = {"transfer_manager": {"type": "pipeline", "config": {
        "num_pools": 1, "num_buffers_per_pool": 2, "first_buffer_size": 32768,
        "buffer_size_multiplier": 2}}}  # fmt: skip
    with handles("tcp", MEMORY | pipeline, 3) as targets:
        region = targets[0].create(0)
        parts = [bytes([65 + number]) * 1_000_000 for number in range(3)]
        with ThreadPoolExecutor(3) as pool:
            found = [*pool.map(lambda n: targets[n].append(region, parts[n]), range(3), timeout=60)]
        assert sorted(found) == [0, 1_000_000, 2_000_000]
        for offset, data in zip(found, parts, strict=True):
            assert targets[0].read(region, offset, len(data)) == data


async def test_trio_clients() -> None:
    with Engine("na+sm") as engine, Provider(engine, 0, MEMORY) as provider:
        async with warabi.aio.connect(str(engine.addr()), 0) as target:
            for reached in (target, warabi.aio.attach(provider._core.target)):
                region = await reached.create_and_write(b"begin")
                found: list[int] = []

                async def append(
                    number: int, reached: Any = reached, region: Any = region,
                    found: list[int] = found,
                ) -> None:  # fmt: skip
                    found.append(await reached.append(region, b"%d" % number * 1000, persist=True))

                with trio.fail_after(60):
                    async with trio.open_nursery() as nursery:
                        for number in range(10):
                            nursery.start_soon(append, number)
                assert sorted(found) == [5 + 1000 * number for number in range(10)]
                whole = await reached.read(region, 5, 10_000)
                parts = sorted(whole[start : start + 1000] for start in range(0, 10_000, 1000))
                assert parts == [b"%d" % number * 1000 for number in range(10)]
