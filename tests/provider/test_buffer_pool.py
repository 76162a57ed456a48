"""Transfer managers: what goes through them is right, and a pipeline's memory is bounded."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warabi._core.extents import Extent, total
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.errors import ConfigError, InvalidRegion, OutOfBounds
from warabi.provider.buffer_pool import DefaultTransfers, PipelineTransfers, part
from warabi.server import Provider

PIPELINES: list[dict[str, int]] = [
    # One buffer for everybody; a thousand bytes at a time.
    {
        "num_pools": 1,
        "num_buffers_per_pool": 1,
        "first_buffer_size": 1000,
        "buffer_size_multiplier": 2,
    },
    {
        "num_pools": 3,
        "num_buffers_per_pool": 2,
        "first_buffer_size": 4096,
        "buffer_size_multiplier": 8,
    },
]


@pytest.fixture(params=["memory", "file"])
def target_config(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    if request.param == "memory":
        return {"type": "memory"}
    return {"type": "file", "config": {"path": str(tmp_path / "t"), "create_if_missing": True}}


@pytest.fixture(params=PIPELINES, ids=["one-buffer", "pools"])
def target(request: pytest.FixtureRequest, target_config: dict[str, Any]) -> Iterator[TargetHandle]:
    config = {
        "target": target_config,
        "transfer_manager": {"type": "pipeline", "config": request.param},
    }
    with (
        Engine("na+sm") as serving,
        Provider(serving, 0, config) as provider,
        Engine("na+sm", client) as calling,
    ):
        assert provider.get_config()["transfer_manager"] == config["transfer_manager"]
        yield Client(calling).make_target_handle(str(serving.addr()), 0)


@pytest.mark.parametrize(
    "size", [0, 1, 999, 1000, 1001, 2048, 2049, 262_143, 262_145, 4 << 20, (4 << 20) + 1]
)
def test_every_size_comes_back(target: TargetHandle, size: int) -> None:
    data = random.Random(size).randbytes(size)
    region = target.create_and_write(data, persist=True)
    assert target.read(region, 0, size) == data
    half = data[: size // 2]
    target.write(region, size // 3, half, persist=True)
    assert target.read(region, size // 3, len(half)) == half
    place = bytearray(size)
    target.read_into(region, 0, place)
    assert place[: size // 3] == data[: size // 3]


def test_extents_across_chunks(target: TargetHandle) -> None:
    region = target.create(300_000)
    numbers = random.Random(1)
    parts = [(i * 7500, numbers.randrange(7500)) for i in range(40)]
    numbers.shuffle(parts)
    data = numbers.randbytes(total(parts))
    target.write_vector(region, parts, data, persist=True)
    place = bytearray(len(data))
    target.read_vector(region, parts, place)
    assert place == data


def test_what_is_refused_changes_nothing_and_the_next_request_works(target: TargetHandle) -> None:
    region = target.create_and_write(bytes(50_000))
    with pytest.raises(OutOfBounds):
        target.write(region, 40_000, b"x" * 20_000)
    with pytest.raises(OutOfBounds):
        target.read(region, 40_000, 20_000)
    gone = target.create(50_000)
    target.erase(gone)
    with pytest.raises(InvalidRegion):
        target.write(gone, 0, bytes(50_000))
    with pytest.raises(InvalidRegion):
        target.read_into(gone, 0, bytearray(50_000))
    assert target.read(region, 0, 50_000) == bytes(50_000)
    assert list(target.list()) == [region]


def test_threads_share_the_buffers(target: TargetHandle) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            numbers = random.Random(seed)
            for _ in range(5):
                data = numbers.randbytes(numbers.randrange(200_000))
                region = target.create_and_write(data)
                assert target.read(region, 0, len(data)) == data
                target.erase(region)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_a_pipeline_gives_out_the_buffers_it_was_made_with_and_no_more() -> None:
    transfers = PipelineTransfers(2, 2, 10, 3)
    assert transfers.chunk == 30
    first = [transfers.acquire_nowait(size) for size in (10, 1, 5, 30)]
    assert all(view is not None for view in first)
    assert transfers.acquire_nowait(1) is None
    assert first[3] is not None
    assert len(first[3]) == 30
    transfers.release(first[3])
    again = transfers.acquire_nowait(11)
    assert again is not None
    assert again.obj is first[3].obj


def test_buffers_that_no_memory_holds_are_a_configuration_error() -> None:
    config = {
        "num_pools": 60,
        "num_buffers_per_pool": 2,
        "first_buffer_size": 1,
        "buffer_size_multiplier": 2,
    }
    with Engine("na+sm") as engine, pytest.raises(ConfigError, match="bytes of memory"):
        Provider(engine, 0, {"transfer_manager": {"type": "pipeline", "config": config}})


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 20)), max_size=8),
    st.integers(0, 100),
    st.integers(0, 100),
)
def test_part_is_a_slice(extents: list[Extent], start: int, length: int) -> None:
    covered = [byte for offset, size in extents for byte in range(offset, offset + size)]
    found = part(extents, start, start + length)
    assert [byte for offset, size in found for byte in range(offset, offset + size)] == (
        covered[start : start + length]
    )


def test_the_default_keeps_a_few_buffers_for_the_next_transfers() -> None:
    transfers = DefaultTransfers()
    first = transfers.acquire_nowait(1_000_000)
    assert first is not None
    assert len(first) == 1_000_000
    transfers.release(first)
    again = transfers.acquire_nowait(700_000)
    assert again is not None
    assert again.obj is first.obj
    assert len(again) == 700_000
    held = [transfers.acquire_nowait(4 << 20) for _ in range(5)]
    for view in [again, *held]:
        assert view is not None
        transfers.release(view)
    assert sum(map(len, transfers._spare)) <= 8 << 20
