"""NumPy arrays as regions: type, shape and order come back, and nothing is copied on the way."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from numpy.lib.recfunctions import repack_fields

import warabi.aio
from tests.support.helpers import MEMORY, Served, file_config, run_python
from warabi import arrays, errors
from warabi.arrays import NotAnArray
from warabi.client import Client, RegionID, TargetHandle
from warabi.engine import Engine
from warabi.server import Provider

RANDOM = np.random.default_rng(1)
LARGE = RANDOM.random((700, 900))  # more than a message holds
ARRAYS: dict[str, Any] = {
    "integers": np.arange(10),
    "zero dimensions": np.array(2.5),
    "scalar": np.float32(1.5),
    "empty": np.zeros((0, 3)),
    "no bytes in an item": np.zeros(3, "S0"),
    "text": np.array(["a", "ünï", ""]),
    "big-endian": np.arange(5, dtype=">u2"),
    "truth": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "half": np.arange(3, dtype="f2"),
    "dates": np.array(["2024-02-29", "NaT"], dtype="M8[D]"),
    "durations": np.array([1, 2], dtype="m8[ms]"),
    "fields": np.array([(1, 0.5, [1, 2])], dtype=[("id", "i4"), ("w", "f8"), ("v", "i2", 2)]),
    "aligned fields": np.zeros(2, np.dtype([("a", "i1"), ("b", "i8")], align=True)),
    "fields named beyond Latin-1": np.zeros(2, [("重さ", "f4")]),
    "many fields": np.zeros(2, [(f"field number {i}", "f8") for i in range(4000)]),
    "Fortran order": np.asfortranarray(RANDOM.random((7, 5, 3))),
    "transposed": np.arange(6).reshape(2, 3).T,
    "every other": np.arange(20)[::2],
    "backwards": np.arange(20)[::-1],
    "block": np.arange(100).reshape(10, 10)[2:5, 3:9],
    "broadcast": np.broadcast_to(np.arange(3), (4, 3)),
    "axes swapped": np.arange(24).reshape(2, 3, 4).swapaxes(0, 1),
    "read-only": np.frombuffer(b"12345678", "i4"),
    "large": LARGE,
    "large in Fortran order": np.asfortranarray(LARGE),
    "large and strided": np.repeat(LARGE, 3, axis=1)[::-1, ::3],
    "large fields, strided": np.zeros(20_000, [("a", "i4"), ("b", "f8")])["b"],
}
WHERE = ["memory, direct", "file, direct", "memory, na+sm", "file, tcp"]


@pytest.fixture(params=WHERE)
def target(
    request: pytest.FixtureRequest,
    engine: Engine,
    client_engine: Engine,
    local_process: Served,
    tcp_process: Served,
    tmp_path: Path,
) -> Iterator[TargetHandle]:
    backend, way = request.param.split(", ")
    if way != "direct":
        served = {"na+sm": local_process, "tcp": tcp_process}[way]
        provider_id = {"memory": 1, "file": 2}[backend]
        yield Client(client_engine).make_target_handle(served.address, provider_id)
        return
    config = MEMORY if backend == "memory" else file_config(tmp_path / "target")
    with Provider(engine, 1, config):
        yield Client(engine).make_target_handle(str(engine.addr()), 1)


def same(found: np.ndarray[Any, Any], array: Any) -> None:
    array = np.asarray(array)
    assert type(found) is np.ndarray
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()
    assert found.flags.writeable
    # As numpy.save does it: an order is kept, what has none comes back in C's.
    wanted = np.load(io.BytesIO(saved(array)), max_header_size=1 << 20)
    assert found.flags.c_contiguous == wanted.flags.c_contiguous
    assert found.flags.f_contiguous == wanted.flags.f_contiguous


@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
@pytest.mark.parametrize("name", ARRAYS)
def test_round_trip(target: TargetHandle, name: str) -> None:
    array = ARRAYS[name]
    region = target.put_array(array, persist=True)
    same(target.get_array(region), array)
    target.erase(region)


@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
@pytest.mark.parametrize("name", ARRAYS)
def test_regions_are_npy_files(target: TargetHandle, name: str) -> None:
    array = ARRAYS[name]
    region = target.put_array(array)
    content = target.read(region, 0, target.size(region))
    # NumPy leaves what is between aligned fields as the memory was.
    loaded = np.load(io.BytesIO(content), max_header_size=1 << 20)
    assert loaded.dtype == np.asarray(array).dtype
    same(repack_fields(loaded, recurse=True), repack_fields(np.asarray(array), recurse=True))
    other = target.create_and_write(saved(array))
    same(target.get_array(other), array)
    target.erase(region)
    target.erase(other)


@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
async def test_trio_client(local_process: Served) -> None:
    async with warabi.aio.connect(local_process.address, 1) as target:
        for array in ARRAYS.values():
            region = await target.put_array(array, persist=True)
            same(await target.get_array(region), array)
            await target.erase(region)


REFUSED: dict[str, Any] = {
    "objects": np.array([object()]),
    "fields of objects": np.zeros(1, [("a", "i4"), ("b", "O")]),
    "masked": np.ma.array([1, 2], mask=[True, False]),
    "overlapping fields": np.zeros(
        1, np.dtype({"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 0]})
    ),
    "variable text": np.array(["a"], dtype=np.dtypes.StringDType()),
    "a list": [1, 2],
    "bytes": b"bytes",
    "nothing": None,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_array_of_plain_values_is_refused(engine: Engine, name: str) -> None:
    with Provider(engine, 1, MEMORY):
        target = Client(engine).make_target_handle(str(engine.addr()), 1)
        with pytest.raises(errors.InvalidBuffer):
            target.put_array(REFUSED[name])
        assert not list(target.list())


def npy(fields: str, data: bytes = bytes(800), version: bytes = b"\1\0") -> bytes:
    text = fields.encode() + b"\n"
    length = len(text).to_bytes(2 if version == b"\1\0" else 4, "little")
    return b"\x93NUMPY" + version + length + text + data


GOOD = "{'descr': '<f8', 'fortran_order': False, 'shape': (100,)}"
WRONG: dict[str, bytes] = {
    "empty": b"",
    "something else": b"#!/bin/sh\n" * 10,
    "magic only": b"\x93NUMPY\1\0",
    "future version": npy(GOOD, version=b"\4\0"),
    "cut in the data": npy(GOOD)[:-1],
    "cut in the header": npy(GOOD)[:40],
    "header beyond the region": b"\x93NUMPY\2\0\xff\xff\xff\xff{}",
    "no dict": npy("[]"),
    "no Python": npy("{"),
    "a call": npy("__import__('os').abort()"),
    "nested too deeply": npy("(" * 60_000, version=b"\2\0"),
    "keys missing": npy("{'descr': '<f8'}"),
    "unknown type": npy(GOOD.replace("<f8", "<q9")),
    "objects": npy(GOOD.replace("<f8", "|O")),
    "negative shape": npy(GOOD.replace("100", "-1")),
    "shape of floats": npy(GOOD.replace("100", "1.0")),
    "enormous": npy(GOOD.replace("100", "1" + "0" * 30)),
    "enormous and empty": npy(GOOD.replace("100", "0, 1" + "0" * 30)),
    "too many dimensions": npy(GOOD.replace("100,", "1," * 70)),
    "not UTF-8": npy(GOOD, version=b"\3\0").replace(b"<f8", b"\xff\xff\xff"),
}


@pytest.mark.parametrize("name", WRONG)
def test_regions_that_hold_no_array(engine: Engine, name: str) -> None:
    with Provider(engine, 1, MEMORY):
        target = Client(engine).make_target_handle(str(engine.addr()), 1)
        region = target.create_and_write(WRONG[name])
        with pytest.raises(NotAnArray, match="get_array RegionID"):
            target.get_array(region)
        same(target.get_array(target.create_and_write(npy(GOOD))), np.zeros(100))


def test_an_array_that_python_2_wrote(engine: Engine) -> None:
    with Provider(engine, 1, MEMORY):
        target = Client(engine).make_target_handle(str(engine.addr()), 1)
        region = target.create_and_write(npy(GOOD.replace("100", "100L")))
        with pytest.warns(UserWarning, match="Python 2"):  # as NumPy warns
            same(target.get_array(region), np.zeros(100))


def test_unknown_regions(engine: Engine) -> None:
    with Provider(engine, 1, MEMORY):
        target = Client(engine).make_target_handle(str(engine.addr()), 1)
        with pytest.raises(errors.InvalidRegion):
            target.get_array(RegionID())


def test_no_region_remains_of_a_failure(engine: Engine) -> None:
    config = {"target": {"type": "memory", "config": {"capacity": LARGE.nbytes}}}
    with Provider(engine, 1, config):
        target = Client(engine).make_target_handle(str(engine.addr()), 1)
        with pytest.raises(errors.StorageFull):
            target.put_array(LARGE)
        assert not list(target.list())


async def test_no_region_remains_of_a_cancelled_call(
    local_process: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(array: Any) -> tuple[int, Iterator[tuple[int, memoryview]]]:
        def pieces_until_cancelled() -> Iterator[tuple[int, memoryview]]:
            for piece in pieces:
                yield piece
                scope.cancel()

        size, pieces = original(array)
        return size, pieces_until_cancelled()

    original = arrays.encode
    monkeypatch.setattr(arrays, "encode", encode)
    async with warabi.aio.connect(local_process.address, 1) as target:
        before = [region async for region in target.list()]
        with trio.CancelScope() as scope:
            await target.put_array(LARGE)
        assert scope.cancelled_caught
        assert [region async for region in target.list()] == before


@pytest.mark.parametrize("order", ["C", "F"])
def test_no_second_copy(local_process: Served, client_engine: Engine, order: Any) -> None:
    array = np.ones((1024, 4096), order=order)
    target = Client(client_engine).make_target_handle(local_process.address, 1)
    target.erase(target.put_array(array))
    tracemalloc.start()
    try:
        region = target.put_array(array)
        assert tracemalloc.get_traced_memory()[1] < array.nbytes / 8
        tracemalloc.reset_peak()
        found = target.get_array(region)
        assert tracemalloc.get_traced_memory()[1] < array.nbytes * 9 / 8
    finally:
        tracemalloc.stop()
    assert np.array_equal(found, array)
    target.erase(region)


def test_numpy_is_imported_late() -> None:
    done = run_python(
        "import sys, warabi.client, warabi.aio, mochi.warabi.client\n"
        "assert 'numpy' not in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_header_that_no_region_could_tell_again_is_refused() -> None:
    dtype = [(f"a field with a rather long name, number {i}", "f8") for i in range(30_000)]
    with pytest.raises(errors.InvalidBuffer, match="description"):
        arrays.encode(np.zeros(1, dtype))
