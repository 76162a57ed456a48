"""Region IDs."""

from __future__ import annotations

import array
import copy
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warabi import errors
from warabi.region import RegionID

HALVES = st.integers(0, (1 << 64) - 1)


def test_default_is_all_zero() -> None:
    assert RegionID().to_bytes() == bytes(16)
    assert RegionID() == RegionID(bytes(16))


@given(data=st.binary(min_size=16, max_size=16))
def test_bytes_round_trip(data: bytes) -> None:
    for source in (data, bytearray(data), memoryview(data)):
        region = RegionID(source)
        assert region.to_bytes() == data
        assert type(region.to_bytes()) is bytes
        assert RegionID(region.to_bytes()) == region
        assert repr(region) == str(region) == f"RegionID({data.hex()})"


@given(slot=HALVES, generation=HALVES)
def test_parts_round_trip(slot: int, generation: int) -> None:
    region = RegionID.from_parts(slot, generation)
    assert (region.slot, region.generation) == (slot, generation)
    assert RegionID(region) == region


@given(first=st.binary(min_size=16, max_size=16), second=st.binary(min_size=16, max_size=16))
def test_compares_as_its_bytes(first: bytes, second: bytes) -> None:
    one, other = RegionID(first), RegionID(second)
    assert (one == other) == (first == second)
    assert (one < other) == (first < second)
    assert hash(one) == hash(RegionID(first))
    assert {one: 1}[RegionID(first)] == 1


@given(data=st.binary(min_size=16, max_size=16))
def test_pickles_and_copies(data: bytes) -> None:
    region = RegionID(data)
    copies = [pickle.loads(pickle.dumps(region, version)) for version in range(2, 6)]
    for made in (*copies, copy.copy(region), copy.deepcopy(region)):
        assert type(made) is RegionID
        assert made == region


@pytest.mark.parametrize(
    "wrong",
    [b"", b"x" * 15, b"x" * 17, bytearray(5), memoryview(b"x" * 8), "x" * 16, 5, None,
     [0] * 16, memoryview(array.array("i", range(16)))],
)  # fmt: skip
def test_anything_but_16_bytes_is_refused(wrong: Any) -> None:
    with pytest.raises(errors.InvalidRegion, match="16 bytes"):
        RegionID(wrong)


def test_any_16_bytes_of_memory_do() -> None:
    assert RegionID(memoryview(array.array("H", range(8)))).to_bytes() == bytes(
        memoryview(array.array("H", range(8)))
    )
    assert RegionID(memoryview(b"ab" * 16)[::2]).to_bytes() == b"a" * 16


def test_is_immutable() -> None:
    with pytest.raises(AttributeError):
        RegionID().slot = 5  # type: ignore[misc]
    with pytest.raises(AttributeError):
        RegionID().anything = 5  # type: ignore[attr-defined]
