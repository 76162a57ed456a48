"""Access to several extents in one request."""

import random
from collections.abc import Iterator

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import warabi.aio
from warabi._core.extents import Extent, groups, pack, total, unpack, views
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.errors import InvalidBuffer, InvalidRegion, OutOfBounds, ProtocolError
from warabi.server import Provider

extents = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 50)), max_size=20)


def covered(parts: list[Extent]) -> list[int]:
    return [byte for offset, size in parts for byte in range(offset, offset + size)]


@given(extents, st.integers(1, 60), st.integers(1, 5))
def test_groups_hold_the_same_bytes_within_the_limits(
    given_extents: list[Extent], size: int, count: int
) -> None:
    found = list(groups(given_extents, size, count))
    assert covered([extent for group in found for extent in group]) == covered(given_extents)
    assert all(len(group) <= count and total(group) <= size for group in found)


@given(extents)
def test_extents_cross_the_wire(given_extents: list[Extent]) -> None:
    assert unpack(pack(given_extents), "test") == given_extents


def test_packed_extents_that_are_none_are_refused() -> None:
    with pytest.raises(ProtocolError):
        unpack(b"1234567", "test")
    with pytest.raises(OutOfBounds):
        unpack(b"\xff" * 16, "test")


def test_views_cut_the_buffer_in_order() -> None:
    buffer = memoryview(b"abcdef")
    found = [(offset, bytes(view)) for offset, view in views([(7, 2), (3, 0), (1, 4)], buffer)]
    assert found == [(7, b"ab"), (1, b"cdef")]


@pytest.fixture(params=["direct", "na+sm", "tcp"])
def target(request: pytest.FixtureRequest) -> Iterator[TargetHandle]:
    scheme = "na+sm" if request.param == "direct" else request.param
    serving = Engine(scheme)
    calling = serving if request.param == "direct" else Engine(scheme, client)
    with serving, calling, Provider(serving, 3, {"target": {"type": "memory"}}):
        made = Client(calling).make_target_handle(str(serving.addr()), 3)
        yield made


def scattered(seed: int, size: int, count: int, largest: int) -> list[Extent]:
    """Extents that do not overlap, in random order."""
    numbers = random.Random(seed)
    step = size // count
    found = [(i * step, numbers.randrange(min(step, largest))) for i in range(count)]
    numbers.shuffle(found)
    return found


@pytest.mark.parametrize(("size", "count"), [(1000, 10), (100_000, 3000), (12_000_000, 6)])
def test_what_was_written_is_read(target: TargetHandle, size: int, count: int) -> None:
    model = bytearray(size)
    region = target.create(size)
    parts = scattered(size, size, count, size)
    data = random.Random(1).randbytes(total(parts))
    target.write_vector(region, parts, data, persist=True)
    for offset, view in views(parts, memoryview(data)):
        model[offset : offset + len(view)] = view
    assert target.read(region, 0, size) == model

    reordered = parts[::-1]
    place = bytearray(len(data))
    target.read_vector(region, reordered, place)
    assert place == b"".join(model[offset : offset + n] for offset, n in reordered)
    target.persist_vector(region, reordered)


def test_no_extents_are_no_work(target: TargetHandle) -> None:
    region = target.create(4)
    target.write_vector(region, [], b"")
    target.read_vector(region, [], bytearray())
    target.persist_vector(region, [])


def test_bad_arguments_change_nothing(target: TargetHandle) -> None:
    region = target.create_and_write(b"x" * 10)
    neighbour = target.create_and_write(b"n" * 10)
    for bad in ([(0, 2), (9, 2)], [(0, 2), (-1, 2)], [3], 7, [(1, 2, 3)], [(0, 2), ("a", 2)]):
        with pytest.raises(OutOfBounds):
            target.write_vector(region, bad, b"abcd")  # type: ignore[arg-type]  # is what is tested
    with pytest.raises(InvalidBuffer):
        target.write_vector(region, [(0, 2)], b"abc")
    with pytest.raises(InvalidBuffer):
        target.read_vector(region, [(0, 2)], b"ab")
    assert target.read(region, 0, 10) == b"x" * 10
    target.erase(region)
    with pytest.raises(InvalidRegion):
        target.write_vector(region, [(0, 1)], b"a")
    with pytest.raises(InvalidRegion):
        target.read_vector(region, [(0, 1)], bytearray(1))
    with pytest.raises(InvalidRegion):
        target.persist_vector(region, [(0, 1)])
    assert target.read(neighbour, 0, 10) == b"n" * 10


async def test_trio_client() -> None:
    with Engine("na+sm") as engine, Provider(engine, 0, {"target": {"type": "memory"}}) as provider:
        async with warabi.aio.connect(str(engine.addr()), 0) as target:
            for reached in (target, warabi.aio.attach(provider._core.target)):
                region = await reached.create(9_000_000)
                parts = [(8_000_000, 900_000), (0, 5_000_000)]
                data = random.Random(2).randbytes(total(parts))
                await reached.write_vector(region, parts, data)
                place = bytearray(len(data))
                await reached.read_vector(region, parts, place)
                assert place == data
                await reached.persist_vector(region, parts)
                with pytest.raises(OutOfBounds):
                    await reached.write_vector(region, [(8_999_999, 2)], b"ab")
        await trio.lowlevel.checkpoint()
