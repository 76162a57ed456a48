"""What every target does, whichever way it is reached and wherever its bytes are."""

from __future__ import annotations

import array
import contextlib
import errno
import gc
import mmap
import os
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.mount.support import fails_with
from tests.support.helpers import (
    MEMORY,
    PIPELINED,
    Served,
    eventually,
    file_config,
    pattern,
    pmem_config,
    rados_config,
)
from warabi import errors
from warabi.client import Attributes, Client, RegionID, TargetHandle
from warabi.engine import Engine, client, server
from warabi.errors import WouldBlock
from warabi.in_process.link import DirectLink
from warabi.metadata import acl
from warabi.provider.core import ProviderCore
from warabi.server import Provider
from warabi.target.config import parse
from warabi.target.opening import open_target
from warabi.target.target import Target

SIZES = [0, 1, 2047, 2048, 2049, 4097, 65535, 65536, 65537, 262_145]
LARGE = [(4 << 20) - 1, 4 << 20, (4 << 20) + 1, 9 << 20]
NOT_A_SIZE: list[Any] = [-1, 1 << 63, 1 << 70, 1.0, "1", None, True, np.arange(2), np.bool_(True)]
NO_BUFFER: list[Any] = ["text", 5, None, object(), [1, 2]]

Backend = tuple[int, Callable[[Path], dict[str, Any]]]
BACKENDS: dict[str, Backend] = {
    "memory": (1, lambda path: MEMORY),
    "file": (2, file_config),
    "pmem": (3, pmem_config),
    "rados": (4, rados_config),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every backend in every way; but in a pool, where each change takes milliseconds, directly and
    by messages only."""
    if "target" in metafunc.fixturenames:
        both = [
            (name, way)
            for way in WAYS
            for name in BACKENDS
            if name != "rados" or way in ("bare", "socket")
        ]
        ids = [f"{way}-{name}" for name, way in both]
        metafunc.parametrize(("backend", "target"), both, indirect=True, ids=ids)
    elif "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, pool: Path) -> Backend:
    return BACKENDS[request.param]


def _opened(backend: Backend, path: Path) -> Target:
    config = parse(backend[1](path)).target
    assert config is not None
    return open_target(config)


@contextlib.contextmanager
def _bare(request: pytest.FixtureRequest, backend: Backend, path: Path) -> Iterator[TargetHandle]:
    """The target itself, without an engine."""
    opened = _opened(backend, path)
    core = ProviderCore(backend[0], opened)
    try:
        yield TargetHandle(DirectLink(core))
    finally:
        core.close()


@contextlib.contextmanager
def _own_provider(backend: Backend, path: Path) -> Iterator[Engine]:
    """An engine in this process that serves a new target."""
    with Engine("na+sm", server) as engine, Provider(engine, backend[0], backend[1](path)):
        yield engine


@contextlib.contextmanager
def _direct(request: pytest.FixtureRequest, backend: Backend, path: Path) -> Iterator[TargetHandle]:
    """The provider's own engine."""
    with _own_provider(backend, path) as engine:
        yield Client(engine).make_target_handle(str(engine.addr()), backend[0])


@contextlib.contextmanager
def _socket(request: pytest.FixtureRequest, backend: Backend, path: Path) -> Iterator[TargetHandle]:
    """Another engine of the provider's process."""
    with _own_provider(backend, path) as serving, Engine("na+sm", client) as engine:
        yield Client(engine).make_target_handle(str(serving.addr()), backend[0])


@contextlib.contextmanager
def _shared(request: pytest.FixtureRequest, backend: Backend, path: Path) -> Iterator[TargetHandle]:
    """Another process, whose regions are reached directly from the first touch on."""
    served: Served = request.getfixturevalue("local_process")
    with pytest.MonkeyPatch.context() as patch, Engine("na+sm", client) as engine:
        patch.setattr("warabi.shm.client._LARGE", 0)
        patch.setattr("warabi.remote.direct._FIRST_SIZE", 0)
        yield Client(engine).make_target_handle(served.address, backend[0])


def _wire(process: str, scheme: str, first: int, **settings: Any) -> Any:
    """Another process, reached by messages; *first* is the ID of its first provider, less 1."""

    @contextlib.contextmanager
    def way(request: pytest.FixtureRequest, backend: Backend, path: Path) -> Iterator[TargetHandle]:
        served: Served = request.getfixturevalue(process)
        secured = request.getfixturevalue("tls") if process == "tls_process" else {}
        with Engine(scheme, client, config={**settings, **secured}) as engine:
            yield Client(engine).make_target_handle(served.address, first + backend[0])

    return way


WAYS = {
    "bare": _bare,
    "direct": _direct,
    "socket": _socket,
    "shared": _shared,
    "na+sm": _wire("local_process", "na+sm", 0, share=False),
    "na+sm-pipeline": _wire("local_process", "na+sm", PIPELINED, share=False),
    "tcp": _wire("tcp_process", "tcp", 0),
    "tcp-pipeline": _wire("tcp_process", "tcp", PIPELINED),
    "tls": _wire("tls_process", "tcp", 0),
    "tls-pipeline": _wire("tls_process", "tcp", PIPELINED),
}


@pytest.fixture
def target(
    request: pytest.FixtureRequest,
    backend: Backend,
    tmp_path: Path,
    local_process: Served,
    tcp_process: Served,
    tls_process: Served,
) -> Iterator[TargetHandle]:
    with WAYS[request.param](request, backend, tmp_path / "target") as handle:
        yield handle


# Bytes in, bytes out


@pytest.mark.parametrize("size", SIZES)
def test_round_trip(target: TargetHandle, size: int) -> None:
    data = pattern(size)
    region = target.create(size)
    assert type(region) is RegionID
    assert target.read(region, 0, size) == bytes(size)
    target.write(region, 0, data)
    got = target.read(region, 0, size)
    assert type(got) is bytes
    assert got == data
    assert target.size(region) == size


def test_large_round_trips(target: TargetHandle) -> None:
    for size in LARGE:
        data = pattern(size)
        region = target.create(size)
        target.write(region, 0, data, persist=True)
        assert target.read(region, 0, size) == data
        buffer = bytearray(size)
        target.read_into(region, 0, buffer)
        assert buffer == data
        target.erase(region)
        region = target.create_and_write(data)
        assert target.read(region, 0, size) == data
        target.erase(region)


@pytest.mark.parametrize("threshold", [0, 1, 2048, 4 << 20, 1 << 40])
def test_eager_thresholds_change_no_result(target: TargetHandle, threshold: int) -> None:
    target.set_eager_write_threshold(threshold)
    target.set_eager_read_threshold(threshold)
    for size in (*SIZES, 600_000, (4 << 20) + 1):
        data = pattern(size)
        region = target.create_and_write(data)
        assert target.read(region, 0, size) == data
        target.write(region, 0, data[::-1])
        buffer = bytearray(size)
        target.read_async(region, 0, buffer).wait()
        assert buffer == data[::-1]
        target.erase(region)


def test_documented_keyword_names(target: TargetHandle) -> None:
    region = target.create(size=8)
    target.write(region=region, offset=1, data=b"abc", persist=True)
    buffer = bytearray(3)
    target.read_into(region=region, offset=1, buffer=buffer)
    assert buffer == b"abc" == target.read(region=region, offset=1, size=3)
    target.write_async(region=region, offset=0, data=b"x", persist=False).wait()
    target.read_async(region=region, offset=0, buffer=buffer).wait()
    assert buffer == b"xab"
    target.persist(region=region, offset=0, size=8)
    target.persist_async(region=region, offset=0, size=8).wait()
    other = target.create_async(size=4).wait()
    third = target.create_and_write(data=b"data", persist=False)
    target.set_eager_write_threshold(size=10)
    target.set_eager_read_threshold(size=10)
    target.erase(region=other)
    target.erase_async(region=third).wait()


def test_write_changes_its_extent_only(target: TargetHandle) -> None:
    before, data = pattern(100_000, 1), pattern(1000, 2)
    region = target.create_and_write(before)
    for offset in (0, 1, 4095, 65_000, 99_000):
        target.write(region, offset, data)
        before = before[:offset] + data + before[offset + 1000 :]
        assert target.read(region, 0, 100_000) == before
        assert target.read(region, offset, 1000) == data


def test_empty_extents_are_legal_up_to_the_end(target: TargetHandle) -> None:
    region = target.create(10)
    for offset in (0, 10):
        target.write(region, offset, b"")
        assert target.read(region, offset, 0) == b""
        target.persist(region, offset, 0)
        target.read_into(region, offset, bytearray())
    with pytest.raises(errors.OutOfBounds):
        target.read(region, 11, 0)
    with pytest.raises(errors.OutOfBounds):
        target.write(region, 11, b"")


def test_empty_region(target: TargetHandle) -> None:
    region = target.create(0)
    assert target.size(region) == 0
    assert target.read(region, 0, 0) == b""
    with pytest.raises(errors.OutOfBounds):
        target.write(region, 0, b"x")
    assert target.size(target.create_and_write(b"")) == 0
    target.erase(region)


def test_numpy_integers_are_sizes(target: TargetHandle) -> None:
    sizes: list[Any] = [np.int64(16), np.uint8(4), np.array(4)]
    region = target.create(sizes[0])
    target.write(region, sizes[1], b"abcd")
    assert target.read(region, sizes[1], sizes[2]) == b"abcd"


def test_fresh_bytes_are_zero_also_where_an_erased_region_was(target: TargetHandle) -> None:
    for size in (1, 64, 100, 4096, 65_536, 200_000):
        for _ in range(3):
            region = target.create_and_write(b"\xff" * size)
            target.erase(region)
            region = target.create(size)
            assert target.read(region, 0, size) == bytes(size)
            target.erase(region)


def test_neighbours_keep_their_bytes(target: TargetHandle) -> None:
    """An extent beyond the end writes nothing, not into this region nor into another."""
    contents = {target.create_and_write(pattern(64, i)): pattern(64, i) for i in range(8)}
    for region in contents:
        for offset, size in ((64, 1), (63, 2), (0, 65), (1 << 40, 8), (0, 5 << 20)):
            with pytest.raises(errors.OutOfBounds):
                target.write(region, offset, b"\xff" * size)
            with pytest.raises(errors.OutOfBounds):
                target.write_async(region, offset, b"\xff" * size).wait()
    for region, data in contents.items():
        assert target.read(region, 0, 64) == data


# Buffers


@pytest.mark.parametrize("threshold", [0, 2048])
def test_every_kind_of_buffer(target: TargetHandle, threshold: int) -> None:
    target.set_eager_write_threshold(threshold)
    target.set_eager_read_threshold(threshold)
    data = pattern(480)
    mapped = mmap.mmap(-1, 480)
    mapped[:] = data
    sources: list[Any] = [
        data,
        bytearray(data),
        memoryview(data),
        memoryview(b"x" + data)[1:],
        mapped,
        array.array("i", data),
        array.array("d", data),
        np.frombuffer(data, "u1"),
        np.frombuffer(data, ">i4"),
        np.frombuffer(data, "f2"),
        np.frombuffer(data, "c16").reshape(2, 3, 5),
        np.frombuffer(data, "?").reshape(4, 120),
        np.frombuffer(data, "S5"),
        np.frombuffer(data, "M8[s]"),
        np.frombuffer(data, [("a", "i4"), ("O", "f8")]),
        np.frombuffer(data, "i4").reshape(10, 12).data,
    ]
    for source in sources:
        region = target.create_and_write(source)
        assert target.read(region, 0, 480) == data
        target.write(region, 0, bytes(480))
        target.write(region, 0, source)
        assert target.read(region, 0, 480) == data
        target.erase(region)
    destinations: list[Any] = [
        bytearray(480),
        memoryview(bytearray(480)),
        mmap.mmap(-1, 480),
        array.array("i", bytes(480)),
        np.zeros(60),
        np.zeros((5, 6, 2), "i8"),
        np.zeros((5, 6, 2), "m8[s]"),
        np.zeros((5, 6), "c16").data,
    ]
    region = target.create_and_write(data)
    for place in destinations:
        target.read_into(region, 0, place)
        assert bytes(place.tobytes() if hasattr(place, "tobytes") else place) == data
    scalar = np.zeros((), "i8")
    target.read_into(region, 8, scalar)
    assert scalar.tobytes() == data[8:16]
    for place in (*destinations, mapped):
        if isinstance(place, mmap.mmap):
            place.close()


def test_unusable_buffers_are_refused_before_anything_is_written(target: TargetHandle) -> None:
    region = target.create_and_write(b"12345678")
    strided = np.zeros((8, 8), "u1")[:, ::2]
    fortran = np.zeros((2, 4), "u1", order="F")
    objects = np.array([object()])
    released = memoryview(b"1234")
    released.release()
    for wrong in (*NO_BUFFER, strided, fortran, memoryview(b"12345678")[::2], objects, released):
        with pytest.raises(errors.InvalidBuffer):
            target.write(region, 0, wrong)
        with pytest.raises(errors.InvalidBuffer):
            target.write_async(region, 0, wrong)
        with pytest.raises(errors.InvalidBuffer):
            target.create_and_write(wrong)
    frozen = np.zeros(8, "u1")
    frozen.flags.writeable = False
    for wrong in (*NO_BUFFER, strided, fortran, b"12345678", frozen, objects, released):
        with pytest.raises(errors.InvalidBuffer):
            target.read_into(region, 0, wrong)
        with pytest.raises(errors.InvalidBuffer):
            target.read_async(region, 0, wrong)
    assert not strided.any()
    assert not frozen.any()
    assert target.read(region, 0, 8) == b"12345678"


def test_failed_read_leaves_the_buffer_alone(target: TargetHandle) -> None:
    region = target.create_and_write(b"\xff" * 3000)
    for size in (3001, 5 << 20):
        buffer = bytearray(size)
        with pytest.raises(errors.OutOfBounds):
            target.read_into(region, 0, buffer)
        with pytest.raises(errors.OutOfBounds):
            target.read_async(region, 0, buffer).wait()
        assert buffer == bytes(size)


# Wrong regions and numbers


def test_invalid_region_ids_are_refused(target: TargetHandle) -> None:
    erased = target.create(4)
    target.erase(erased)
    live = target.create(4)
    other_generation = RegionID.from_parts(live.slot, live.generation ^ 1)
    wrong: list[Any] = [
        erased, other_generation, RegionID(), RegionID(b"\xff" * 16), RegionID(b"\x7f" + bytes(15)),
        RegionID(bytes(7) + b"\1" + bytes(7) + b"\1"),  # the root directory
        b"short", "text", None, 5,
    ]  # fmt: skip
    calls: list[Callable[[Any], object]] = [
        lambda r: target.write(r, 0, b"x"),
        lambda r: target.write(r, 0, bytes(5 << 20)),
        lambda r: target.write_async(r, 0, b"x").wait(),
        lambda r: target.read(r, 0, 1),
        lambda r: target.read(r, 0, 0),
        lambda r: target.read(r, 0, 2 << 20),
        lambda r: target.read_into(r, 0, bytearray(1)),
        lambda r: target.read_into(r, 0, bytearray(5 << 20)),
        lambda r: target.read_async(r, 0, bytearray(1)).wait(),
        lambda r: target.persist(r, 0, 1),
        lambda r: target.persist_async(r, 0, 1).wait(),
        lambda r: target.erase(r),
        lambda r: target.erase_async(r).wait(),
        lambda r: target.size(r),
        lambda r: target.stat(r),
        lambda r: target.resize(r, 1),
        lambda r: target.link_name(r, "/never"),
    ]
    for region in wrong:
        for call in calls:
            with pytest.raises(errors.InvalidRegion):
                call(region)
    assert target.read(live, 0, 4) == bytes(4)


def test_region_of_another_target(target: TargetHandle, engine: Engine) -> None:
    with Provider(engine, 7, MEMORY):
        other = Client(engine).make_target_handle(str(engine.addr()), 7)
        for _ in range(3):
            foreign = other.create(10)
            target.create(10)
            with pytest.raises(errors.InvalidRegion, match=foreign.hex()):
                target.read(foreign, 0, 1)


@pytest.mark.parametrize("wrong", NOT_A_SIZE, ids=repr)
def test_invalid_sizes_are_refused(target: TargetHandle, wrong: Any) -> None:
    region = target.create_and_write(b"1234")
    calls: list[Callable[[], object]] = [
        lambda: target.create(wrong),
        lambda: target.create_async(wrong),
        lambda: target.write(region, wrong, b"x"),
        lambda: target.write_async(region, wrong, b"x"),
        lambda: target.read(region, wrong, 1),
        lambda: target.read(region, 0, wrong),
        lambda: target.read_into(region, wrong, bytearray(1)),
        lambda: target.read_async(region, wrong, bytearray(1)),
        lambda: target.persist(region, wrong, 1),
        lambda: target.persist(region, 0, wrong),
        lambda: target.persist_async(region, 0, wrong),
        lambda: target.resize(region, wrong),
        lambda: target.set_eager_read_threshold(wrong),
        lambda: target.set_eager_write_threshold(wrong),
    ]
    for call in calls:
        with pytest.raises(errors.OutOfBounds):
            call()
    assert target.read(region, 0, 4) == b"1234"


def test_extents_beyond_the_end(target: TargetHandle) -> None:
    region = target.create_and_write(b"1234")
    largest = (1 << 63) - 1
    for offset, size in ((0, 5), (4, 1), (5, 0), (largest, 1), (0, 1 << 50), (largest, largest)):
        with pytest.raises(errors.OutOfBounds, match="4 bytes"):
            target.read(region, offset, size)
        with pytest.raises(errors.OutOfBounds):
            target.persist(region, offset, size)
        with pytest.raises(errors.OutOfBounds):
            target.persist_async(region, offset, size).wait()
    assert target.read(region, 0, 4) == b"1234"


def test_message_names_operation_region_and_numbers(target: TargetHandle) -> None:
    region = target.create(4)
    with pytest.raises(errors.OutOfBounds) as caught:
        target.write(region, 3, b"xy")
    for part in ("write", region.hex(), "2 bytes", "offset 3", "4 bytes"):
        assert part in str(caught.value)


@pytest.mark.parametrize("size", [(1 << 63) - 1, 1 << 60, 1 << 50])
def test_an_impossible_size_is_refused(target: TargetHandle, size: int) -> None:
    region = target.create_and_write(b"1234")
    with pytest.raises(errors.StorageFull):
        target.create(size)
    request = target.create_async(size)
    with pytest.raises(errors.StorageFull):
        request.wait()
    assert target.read(region, 0, 4) == b"1234"


# Asynchronous requests


def test_requests_in_any_order(target: TargetHandle) -> None:
    created = [target.create_async(10_000) for _ in range(20)]
    regions = [request.wait() for request in reversed(created)]
    assert len(set(regions)) == 20
    writes = [target.write_async(r, 0, pattern(10_000, i)) for i, r in enumerate(regions)]
    for write in reversed(writes):
        write.wait()
    buffers = [bytearray(10_000) for _ in regions]
    reads = [target.read_async(r, 0, b) for r, b in zip(regions, buffers, strict=True)]
    for read in reversed(reads):
        read.wait()
    assert buffers == [pattern(10_000, i) for i in range(20)]
    for erase in [target.erase_async(region) for region in regions]:
        erase.wait()


def test_large_requests_side_by_side(target: TargetHandle) -> None:
    size = 9 << 20
    regions = [target.create(size) for _ in range(2)]
    writes = [target.write_async(r, 0, pattern(size, i)) for i, r in enumerate(regions)]
    for write in writes:
        write.wait()
    buffers = [bytearray(size) for _ in regions]
    reads = [target.read_async(r, 0, b) for r, b in zip(regions, buffers, strict=True)]
    reads[1].wait()
    reads[0].wait()
    for i, buffer in enumerate(buffers):
        assert buffer == pattern(size, i)
    created = target.create_and_write_async(pattern(size)).wait()
    assert target.read(created, size - 9, 9) == pattern(size)[-9:]


def test_wait_again_gives_the_same(target: TargetHandle) -> None:
    request = target.create_async(4)
    assert request.wait() == request.wait()
    failed = target.write_async(request.wait(), 1, b"1234")
    for _ in range(3):
        with pytest.raises(errors.OutOfBounds):
            failed.wait()
    assert failed.completed()


def test_completed_without_wait(target: TargetHandle) -> None:
    region = target.create(100_000)
    eventually(target.write_async(region, 0, pattern(100_000)).completed)
    buffer = bytearray(100_000)
    eventually(target.read_async(region, 0, buffer).completed)
    assert buffer == pattern(100_000)
    eventually(target.write_async(region, 1, pattern(100_000)).completed)  # of a failed one too
    eventually(target.persist_async(region, 0, 100_000).completed)
    eventually(target.create_and_write_async(b"x").completed)
    eventually(target.erase_async(region).completed)


def test_dropped_requests_take_effect(target: TargetHandle) -> None:
    region = target.create(5000)
    for start in range(0, 5000, 1000):
        target.write_async(region, start, pattern(5000)[start : start + 1000])
        target.write_async(region, 4500, bytes(1000))  # fails
        target.read_async(region, 0, bytearray(5000))
        target.read_async(region, 1, bytearray(5000))  # fails
    gc.collect()
    kept = target.create_async(3)
    eventually(lambda: target.read(region, 0, 5000) == pattern(5000))
    assert target.size(kept.wait()) == 3


def test_write_of_a_temporary(target: TargetHandle) -> None:
    region = target.create(20 * 50_000)
    requests = []
    for i in range(20):
        requests.append(target.write_async(region, i * 50_000, np.full(50_000, i, "u1")))
        requests.append(target.write_async(region, i * 50_000, b"%c" % i * 100))
    gc.collect()
    filler = [bytearray(b"\xee" * 50_000) for _ in range(40)]
    for request in requests:
        request.wait()
    del filler
    assert target.read(region, 0, 20 * 50_000) == b"".join(b"%c" % i * 50_000 for i in range(20))


def test_read_into_a_buffer_that_only_the_request_keeps(target: TargetHandle) -> None:
    region = target.create_and_write(pattern(70_000))
    requests = [target.read_async(region, 0, np.empty(70_000, "u1")) for _ in range(20)]
    gc.collect()
    for request in requests:
        request.wait()


# More than the documented API


def test_resize_keeps_the_id_and_zeroes_what_is_new(target: TargetHandle) -> None:
    data = pattern(3_000_000)
    region = target.create(0)
    content = b""
    for size in (10, 5, 64, 65, 100_000, 30, 70_000, 3_000_000, 0, 2048, 65_536, 65_535, 4096):
        target.resize(region, size)
        content = content[:size] + bytes(size - len(content[:size]))
        assert target.size(region) == size
        assert target.read(region, 0, size) == content
        with pytest.raises(errors.OutOfBounds):
            target.read(region, 0, size + 1)
        content = data[:size]
        target.write(region, 0, content)


@pytest.mark.parametrize("size", [3000, 200_000])
def test_room_zeros_and_holes(target: TargetHandle, backend: Backend, size: int) -> None:
    data = bytearray(pattern(size).replace(b"\0", b"\1"))
    region = target.create_and_write(data)
    changed = target.stat(region).mtime_ns
    target.punch_hole(region, 100, size // 2)
    data[100 : 100 + size // 2] = bytes(size // 2)
    assert target.read(region, 0, size) == data
    assert target.stat(region).mtime_ns > changed
    if backend is BACKENDS["rados"]:
        for call in (target.zero_range, target.allocate):
            for keep_size in (False, True):
                with pytest.raises(errors.PathError, match="a pool cannot allocate in advance"):
                    call(region, size - 50, 100, keep_size=keep_size)
        target.zero_range(region, size - 60, 60)
        target.resize(region, size + 5000)
    else:
        target.zero_range(region, size - 50, 100, keep_size=True)
        data[-50:] = bytes(50)
        assert target.read(region, 0, size) == data
        target.zero_range(region, size - 60, 100)
        target.allocate(region, size, 5000)
        quota = pytest.raises(errors.PathError, match="quota")
        with quota if backend is BACKENDS["pmem"] else contextlib.nullcontext():
            target.allocate(region, 0, size * 3, keep_size=True)
    data[-60:] = bytes(5060)
    target.punch_hole(region, len(data) - 10, 1 << 40)
    assert target.size(region) == len(data)
    assert target.read(region, 0, len(data)) == data
    target.write(region, 0, data[::-1], persist=True)
    assert target.read(region, 0, len(data)) == data[::-1]
    for nothing in (target.allocate, target.zero_range, target.punch_hole):
        nothing(region, 5, 0)
        with pytest.raises(errors.OutOfBounds):
            nothing(region, 1, (1 << 63) - 1)
        with pytest.raises(errors.InvalidRegion):
            nothing(RegionID(b"\xff" * 16), 0, 1)
    assert target.read(region, 0, len(data)) == data[::-1]


def test_extents_of_data(target: TargetHandle) -> None:
    region = target.create(0)
    assert target.seek_data(region, 0) is target.seek_hole(region, 0) is None
    target.resize(region, 1 << 20)
    for offset in (0, 400_000):
        target.write(region, offset, pattern(10_000))
    extents = list(target.data_extents(region))
    assert sum(size for _, size in extents) <= target.size(region)
    found = bytearray(1 << 20)
    for offset, size in extents:
        found[offset : offset + size] = target.read(region, offset, size)
    assert found == target.read(region, 0, 1 << 20)
    assert target.seek_data(region, 405_000) == 405_000
    assert target.seek_hole(region, (1 << 20) - 1) in ((1 << 20) - 1, 1 << 20)
    assert target.seek_data(region, 1 << 20) is target.seek_hole(region, 1 << 20) is None
    with pytest.raises(errors.OutOfBounds):
        target.seek_data(region, -1)


def test_copies(target: TargetHandle) -> None:
    for size in (0, 1, 3000, 65_536, 300_000):
        data = pattern(size)
        region = target.create_and_write(data)
        copies = [target.copy(region), target.copy(region, persist=True)]
        target.write(region, 0, bytes(size))
        target.erase(region)
        for copy in copies:
            assert target.read(copy, 0, size) == data
            assert target.stat(copy).names == []
        assert set(copies) <= set(target.list())
    with pytest.raises(errors.InvalidRegion):
        target.copy(region)


@pytest.mark.parametrize("size", [3000, 300_000])
def test_copies_of_extents(target: TargetHandle, size: int) -> None:
    data, other = pattern(size), bytearray(pattern(size, 1))
    source, region = target.create_and_write(data), target.create_and_write(other)
    assert target.copy_range(source, 10, region, 20, size // 2) == size // 2
    other[20 : 20 + size // 2] = data[10 : 10 + size // 2]
    assert target.read(region, 0, size) == other
    assert target.copy_range(source, size - 100, region, size - 50, 1 << 40) == 100
    other[size - 50 :] = data[size - 100 :]
    assert target.read(region, 0, size + 50) == other
    assert target.copy_range(source, 5, region, size + 1000, 100) == 100
    other += bytes(950) + data[5:105]
    assert target.read(region, 0, size + 1100) == other
    for offset, length in ((size, 100), (1 << 62, 5), (0, 0)):
        assert target.copy_range(source, offset, region, 0, length) == 0
    assert target.copy_range(region, 0, region, 500, 500) == 500
    other[500:1000] = other[:500]
    assert target.read(region, 0, size + 1100) == other
    assert target.read(source, 0, size) == data
    with pytest.raises(errors.OutOfBounds):
        target.copy_range(region, 0, region, 499, 500)
    with pytest.raises(errors.InvalidRegion):
        target.copy_range(RegionID(b"\xff" * 16), 0, region, 0, 10)
    with pytest.raises(errors.InvalidRegion):
        target.copy_range(source, 0, RegionID(b"\xff" * 16), 0, 10)
    with pytest.raises(errors.OutOfBounds):
        target.copy_range(source, 0, region, (1 << 63) - 5, 10)
    assert target.read(region, 0, size + 1100) == other


def test_stat(target: TargetHandle) -> None:
    start = time.time_ns() - 1_000_000_000
    region = target.create(10)
    found = target.stat(region)
    assert found.size == 10
    assert found.names == []
    assert start < found.mtime_ns <= time.time_ns()
    target.link_name(region, "/stat-of-this")
    target.write(region, 0, b"x")
    after = target.stat(region)
    assert after.names == ["/stat-of-this"]
    assert after.mtime_ns >= found.mtime_ns
    assert after.ctime_ns >= found.ctime_ns
    assert after.atime_ns == found.atime_ns
    target.unlink_name("/stat-of-this")


def test_list(target: TargetHandle) -> None:
    before = set(target.list())
    made = [target.create(1) for _ in range(25)]
    for page_size in (1, 7, 25, 1000, 5000):
        listed = list(target.list(page_size=page_size))
        assert len(listed) == len(set(listed))
        assert set(listed) - before == set(made)
    for region in made[::2]:
        target.erase(region)
    assert set(target.list()) - before == set(made[1::2])


def test_extended_attributes(target: TargetHandle) -> None:
    path = f"/{target.create(0).hex()}"
    names = target.listxattr(path)
    with fails_with(errno.ENODATA):
        target.setxattr(path, "user.x", b"1", os.XATTR_REPLACE)
    target.setxattr(path, "user.x", b"1", os.XATTR_CREATE)
    with fails_with(errno.EEXIST):
        target.setxattr(path, b"user.x", b"2", os.XATTR_CREATE)
    assert target.getxattr(path, "user.x") == b"1"
    target.setxattr(path, "user.x", bytearray(b"3"), os.XATTR_REPLACE)
    target.setxattr(path, "user.y", b"")
    target.setxattr(path, "user.y", memoryview(b"4"))
    assert (target.getxattr(path, "user.x"), target.getxattr(path, b"user.y")) == (b"3", b"4")
    assert sorted(target.listxattr(path)) == sorted([*names, "user.x", "user.y"])
    target.removexattr(path, "user.x")
    with fails_with(errno.ENODATA):
        target.getxattr(path, "user.x")
    for flags, number in (
        (4, errno.EINVAL),
        (-1, errno.EINVAL),
        (os.XATTR_CREATE | os.XATTR_REPLACE, errno.EEXIST),
    ):
        with fails_with(number):
            target.setxattr(path, "user.y", b"", flags)
    with fails_with(errno.EPERM):
        target.setxattr(path, "user.warabi.region", b"", os.XATTR_CREATE)
    with fails_with(errno.ENOENT):
        target.listxattr("/nothing")
    with pytest.raises(errors.Exception):
        target.setxattr(path, "user.y", "text")  # type: ignore[arg-type]


def test_of_several_clients_that_create_an_attribute_one_succeeds(target: TargetHandle) -> None:
    path = f"/{target.create(0).hex()}"

    def created(number: int) -> int:
        with contextlib.suppress(errors.PathError):
            target.setxattr(path, f"user.{number // 4}", b"", os.XATTR_CREATE)
            return 1
        return 0

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(created, range(80), timeout=60)) == 20


@pytest.fixture
def top(target: TargetHandle) -> str:
    """A new directory: several ways lead to one target."""
    path = f"/top {os.urandom(8).hex()}"
    target.mkdir(path, 0o700)
    return path


def test_directories(target: TargetHandle, top: str) -> None:
    with pytest.raises(FileExistsError, match=f"^mkdir {top}: File exists$"):
        target.mkdir(top)
    with pytest.raises(FileNotFoundError, match=f"^mkdir {top}/x/y: No such file or directory$"):
        target.mkdir(f"{top}/x/y")
    target.makedirs(f"{top}/a/b")
    target.makedirs(f"{top}/a/b", exist_ok=True)
    with pytest.raises(FileExistsError):
        target.makedirs(f"{top}/a/b")
    region = target.create_name(f"{top}/a/file", 0o600)
    target.resize(region, 7)
    with pytest.raises(FileExistsError):
        target.create_name(f"{top}/a/file")
    with pytest.raises(NotADirectoryError):
        target.makedirs(f"{top}/a/file/deeper")
    found = target.stat_name(f"{top}/a/file")
    assert (found.region, found.size, stat.S_IMODE(found.mode)) == (region, 7, 0o600)
    assert (found.uid, target.stat_name(top).uid) == (os.geteuid(), os.geteuid())
    entries = list(target.scandir(f"{top}/a"))
    assert [(e.name, e.is_dir(), e.is_file(), e.is_symlink()) for e in entries] == [
        ("b", True, False, False),
        ("file", False, True, False),
    ]
    assert entries[1].attributes.size == 7
    assert target.listdir(f"{top}/a") == list(target.list_names(f"{top}/a")) == ["b", "file"]
    assert list(target.walk(top)) == [
        (top, ["a"], []),
        (f"{top}/a", ["b"], ["file"]),
        (f"{top}/a/b", [], []),
    ]
    with pytest.raises(FileNotFoundError):
        list(target.walk(f"{top}/nothing"))
    with fails_with(errno.ENOTEMPTY):
        target.rmdir(f"{top}/a")
    with pytest.raises(NotADirectoryError):
        target.rmdir(f"{top}/a/file")
    with fails_with(errno.EBUSY):
        target.rmdir("/")
    target.rmdir(f"{top}/a/b")
    assert target.listdir(f"{top}/a") == ["file"]


def test_renames(target: TargetHandle, top: str) -> None:
    target.makedirs(f"{top}/from/inner")
    target.mkdir(f"{top}/into")
    region = target.create_name(f"{top}/from/one")
    other = target.create_name(f"{top}/into/two")
    with pytest.raises(FileExistsError):
        target.rename(f"{top}/from/one", f"{top}/into/two", replace=False)
    target.rename(f"{top}/from/one", f"{top}/into/two")
    assert target.open_name(f"{top}/into/two") == region
    with pytest.raises(errors.InvalidRegion):
        target.size(other)
    with fails_with(errno.EINVAL):
        target.rename(f"{top}/from", f"{top}/from/inner/deeper")
    target.rename(f"{top}/from", f"{top}/into/moved")
    assert target.listdir(f"{top}/into") == ["moved", "two"]
    with pytest.raises(IsADirectoryError):
        target.rename(f"{top}/into/two", f"{top}/into/moved")
    with pytest.raises(FileNotFoundError, match=f"^rename {top}/nothing to /x: "):
        target.rename(f"{top}/nothing", "/x")


def test_a_region_takes_a_name_over(target: TargetHandle, top: str) -> None:
    old = target.create_name(f"{top}/name")
    new = target.create_and_write(b"new")
    with pytest.raises(FileExistsError):
        target.link_name(new, f"{top}/name")
    target.link_name(new, f"{top}/name", replace=True)
    assert target.open_name(f"{top}/name") == new
    with pytest.raises(errors.InvalidRegion):
        target.size(old)
    with fails_with(errno.EPERM):  # it has a name
        target.link_name(new, f"{top}/other", replace=True)
    target.link_name(target.create(1), f"{top}/other", replace=True)
    assert target.stat_name(f"{top}/other").size == 1
    target.mkdir(f"{top}/directory")
    region = target.create(0)
    with pytest.raises(IsADirectoryError):
        target.link_name(region, f"{top}/directory", replace=True)
    target.erase(region)


@pytest.mark.parametrize("size", [0, 4096, 300_000, (4 << 20) + 1])
def test_a_file_is_stored_and_fetched_by_its_name(
    target: TargetHandle, top: str, size: int
) -> None:
    path, data = f"{top}/name", pattern(size)
    old = target.create_name(path)
    target.write_vector(old, [(0, 0)], b"")
    for persist in (False, True):
        before = target.link.call("used")
        stored = target.store_name(path, data, 0o640, persist=persist)
        assert (stored.size, stat.S_IMODE(stored.mode), stored.nlink) == (size, 0o640, 1)
        assert (stored.uid, stored.gid) == (os.geteuid(), os.getegid())
        assert target.read(stored.region, 0, size) == data
        found, content = target.fetch_name(path)
        assert found == stored
        assert content == (data if size <= 64 << 10 else None)
        assert target.fetch_name(path, size - 1 if size else 0)[1] == (None if size else b"")
        assert persist or target.link.call("used") == before + size
        with pytest.raises(errors.InvalidRegion):
            target.size(old)
        old = stored.region
    assert target.link.call("used") == before
    with pytest.raises(FileExistsError, match=rf"store(_name)? {path}: File exists$"):
        target.store_name(path, data, exclusive=True)
    assert target.listdir(top) == ["name"]
    assert target.link.call("used") == before
    other = target.store_name(f"{top}/other", data, exclusive=True)
    assert target.stat(other.region).names == [f"{top}/other"]
    assert target.link.call("used") == before + size


def test_many_files_are_stored_and_fetched_at_once(target: TargetHandle, top: str) -> None:
    files = {f"{top}/{i}": pattern(i * 300, i) for i in range(200)}
    stored = list(target.store_names(files.items(), 0o600))
    sizes = [one.size for one in stored if isinstance(one, Attributes)]
    assert sizes == [i * 300 for i in range(200)]
    fetched = list(target.fetch_names([*files, f"{top}/nothing", top, "nul\0"]))
    assert fetched[:200] == list(zip(stored, files.values(), strict=True))
    missing, directory, wrong = fetched[200:]
    assert isinstance(missing, FileNotFoundError)
    assert isinstance(directory, tuple)
    assert directory[1] is None
    assert isinstance(wrong, errors.PathError)
    again = target.store_names([(f"{top}/0", b"x"), (f"{top}/new", b"y")], exclusive=True)
    assert isinstance(next(again), FileExistsError)
    again.close()  # and what was begun is done
    assert target.fetch_name(f"{top}/new")[1] == b"y"


@pytest.mark.parametrize("size", [100, 300_000, (4 << 20) + 1])
def test_files_that_cannot_be_stored(target: TargetHandle, top: str, size: int) -> None:
    target.store_name(f"{top}/name", b"")  # after which a client knows that the provider can
    target.unlink_name(f"{top}/name")
    before, data = list(target.list()), bytes(size)
    target.mkdir(f"{top}/directory")
    target.symlink("nothing", f"{top}/link")
    for path, number in {
        f"{top}/nothing/file": errno.ENOENT,
        f"{top}/link/file": errno.ENOENT,
        f"{top}/directory": errno.EISDIR,
        "/": errno.EISDIR,
        f"{top}/" + "n" * 256: errno.ENAMETOOLONG,
        f"{top}/nul\0": errno.EINVAL,
    }.items():
        with fails_with(number):
            target.store_name(path, data)
    with pytest.raises(errors.InvalidBuffer):
        target.store_name(f"{top}/file", "text")  # type: ignore[arg-type]
    assert list(target.list()) == before
    assert target.listdir(top) == ["directory", "link"]
    region = target.store_name(f"{top}/link", data).region  # which is replaced, not followed
    assert target.open_name(f"{top}/link") == region
    for path, number in {f"{top}/link/x": errno.ENOTDIR, f"{top}/nothing": errno.ENOENT}.items():
        with fails_with(number):
            target.fetch_name(path)
    assert target.fetch_name(top)[1] is None


def test_a_stored_file_inherits_from_its_directory(target: TargetHandle, top: str) -> None:
    target.link.call("setattr", target.stat_name(top).ino, 0o2755, None, 4711, None, None)
    nobody = (1 << 32) - 1
    entries = (1, 7, nobody), (2, 5, 1000), (4, 5, nobody), (16, 5, nobody), (32, 0, nobody)
    listing = acl.pack([acl.AclEntry(*entry) for entry in entries])
    target.setxattr(top, acl.DEFAULT, listing)
    for size in (10, 300_000, (4 << 20) + 1):
        stored = target.store_name(f"{top}/file", bytes(size), 0o666)
        assert (stored.gid, stat.S_IMODE(stored.mode)) == (4711, 0o640)
        assert acl.ACCESS.decode() in target.listxattr(f"{top}/file")


def test_readers_find_the_old_file_or_the_new_one(target: TargetHandle, top: str) -> None:
    path, done = f"{top}/file", False
    target.store_name(path, bytes([0]) * 3000)

    def read() -> set[bytes]:
        seen = set()
        while not done:
            found, data = target.fetch_name(path)
            assert data is not None
            assert len(data) == found.size == 3000
            seen.add(data)
        return seen

    with ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(read) for _ in range(2)]
        for number in range(1, 60):
            target.store_name(path, bytes([number]) * 3000)
        done = True
        assert all(
            data == data[:1] * 3000 for reader in readers for data in reader.result(timeout=60)
        )


def test_symbolic_links(target: TargetHandle, top: str) -> None:
    target.makedirs(f"{top}/real/deep")
    region = target.create_name(f"{top}/real/deep/file")
    target.symlink("real/deep", f"{top}/short")
    target.symlink("../../real/./deep/file", f"{top}/real/deep/again")
    target.symlink(f"{top}/short/again", f"{top}/twice")
    target.symlink("nothing", f"{top}/dangling")
    target.symlink("loop", f"{top}/loop")
    assert target.readlink(f"{top}/short") == "real/deep"
    for path in ("short/file", "twice", "short/again", "real/deep/file"):
        assert target.stat_name(f"{top}/{path}").region == region
        assert target.fetch_name(f"{top}/{path}")[0].region == region
    assert target.open_name(f"{top}/short/file") == region
    target.setxattr(f"{top}/short/file", "user.a", b"value")
    assert target.getxattr(f"{top}/real/deep/file", "user.a") == b"value"
    assert target.listxattr(f"{top}/short/../deep/file") == ["user.a"]
    target.removexattr(f"{top}/short/file", "user.a")
    target.link_name(target.create(0), f"{top}/short/named")
    target.unlink_name(f"{top}/short/named")
    assert target.listdir(f"{top}/short") == ["again", "file"]
    for path in ("twice", "short/again"):
        assert stat.S_ISLNK(target.stat_name(f"{top}/{path}", follow_symlinks=False).mode)
    target.mkdir(f"{top}/short/new")
    target.rename(f"{top}/short/file", f"{top}/short/new/file")
    assert target.stat_name(f"{top}/real/deep/new/file").region == region
    with pytest.raises(FileNotFoundError):
        target.stat_name(f"{top}/dangling")
    with fails_with(errno.ELOOP):
        target.stat_name(f"{top}/loop")
    with fails_with(errno.EINVAL):
        target.readlink(f"{top}/real")
    with pytest.raises(FileExistsError):
        target.symlink("x", f"{top}/short")
    with pytest.raises(NotADirectoryError):
        target.stat_name(f"{top}/real/deep/new/file/x")


def test_names(target: TargetHandle) -> None:
    region = target.create_and_write(b"named")
    assert region.hex() in list(target.list_names())
    target.link_name(region, "/first")
    target.link_name(region, "second")  # from the root too
    names = list(target.list_names("/"))
    assert {"first", "second"} <= set(names)
    assert region.hex() not in names
    assert target.open_name("/first") == target.open_name("/second") == region
    assert target.open_name(f"/{region.hex()}") == region
    assert sorted(target.stat(region).names) == ["/first", "/second"]
    target.unlink_name("/first")
    assert target.read(region, 0, 5) == b"named"
    target.unlink_name("/second")
    with pytest.raises(errors.InvalidRegion):
        target.read(region, 0, 5)
    nameless = target.create(1)
    target.unlink_name(nameless.hex())
    with pytest.raises(errors.InvalidRegion):
        target.size(nameless)


def test_erase_removes_the_names(target: TargetHandle) -> None:
    region = target.create(1)
    target.link_name(region, "/goes-too")
    target.erase(region)
    with pytest.raises(errors.PathError) as caught:
        target.open_name("/goes-too")
    assert caught.value.errno == errno.ENOENT


def test_undecodable_and_odd_names(target: TargetHandle) -> None:
    for name in ("\udcff\udc80", "with space", "ünï-cödé", "-", "a" * 255, "\n"):
        region = target.create(1)
        target.link_name(region, f"/{name}")
        assert target.open_name(name) == region
        assert name in list(target.list_names())
        assert target.stat(region).names == [f"/{name}"]
        target.unlink_name(name)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("/", errno.EISDIR),
        ("", errno.EISDIR),
        ("/missing/name", errno.ENOENT),
        ("/file/below", errno.ENOTDIR),
        ("/file", errno.EEXIST),
        ("/" + "n" * 256, errno.ENAMETOOLONG),
        ("/..", errno.EINVAL),
        ("/nul\0byte", errno.EINVAL),
    ],
)
def test_names_that_cannot_be_given(target: TargetHandle, name: str, number: int) -> None:
    taken = target.create(1)
    target.link_name(taken, "/file")
    region = target.create(1)
    with pytest.raises(errors.PathError) as caught:
        target.link_name(region, name)
    assert caught.value.errno == number
    assert isinstance(caught.value, OSError)
    assert target.stat(region).names == []
    target.erase(taken)


@pytest.mark.parametrize(
    "name", ["/missing", "/a/b", "/nul\0", "n" * 300, "\ud800", "x" * 2_000_000]
)
def test_names_that_are_none(target: TargetHandle, name: str) -> None:
    other = target.create_async(1)
    with pytest.raises(errors.Exception):
        target.open_name(name)
    with pytest.raises(errors.Exception):
        target.unlink_name(name)
    with pytest.raises(errors.Exception):
        list(target.list_names(name))
    assert target.size(other.wait()) == 1


# Handles


def test_handle_without_target() -> None:
    handle = TargetHandle()
    assert not handle
    calls: list[Callable[[], object]] = [
        lambda: handle.create(1),
        lambda: handle.write(RegionID(), 0, b""),
        lambda: handle.read(RegionID(), 0, 1),
        lambda: handle.erase(RegionID()),
        lambda: handle.create_async(1),
        lambda: handle.set_eager_read_threshold(5),
        lambda: list(handle.list()),
    ]
    for call in calls:
        with pytest.raises(errors.TargetNotFound):
            call()


def test_provider_without_target(engine: Engine, client_engine: Engine) -> None:
    with Provider(engine, 3, {}) as provider:
        assert provider.get_config() == {"transfer_manager": {"type": "__default__", "config": {}}}
        for any_engine in (engine, client_engine):
            handle = Client(any_engine).make_target_handle(str(engine.addr()), 3)
            assert handle
            with pytest.raises(errors.TargetNotFound, match="provider 3"):
                handle.create(1)
            with pytest.raises(errors.TargetNotFound):
                handle.create_async(1).wait()


def test_closed_provider_is_no_target_any_more(engine: Engine, client_engine: Engine) -> None:
    provider = Provider(engine, 3, MEMORY)
    direct = Client(engine).make_target_handle(str(engine.addr()), 3)
    remote = Client(client_engine).make_target_handle(str(engine.addr()), 3)
    provider.close()
    with pytest.raises(errors.TargetNotFound):
        direct.create(1)
    with pytest.raises(errors.ProviderNotFound, match="provider 3"):
        remote.create(1)


# Writes that are answered before they are done


def test_a_write_that_is_begun_is_certain(tmp_path: Path) -> None:
    with contextlib.closing(_opened(BACKENDS["memory"], tmp_path)) as target:
        region = target.create_and_write(pattern(1 << 20))
        before = target.stat(region)
        write = target.begin_write(region, 4096, memoryview(b"x" * 100_000))
        assert write is not None
        with pytest.raises(WouldBlock):
            target.resize(region, 0, wait=False)  # its memory stays where it is
        write()
        expected = bytearray(pattern(1 << 20))
        expected[4096 : 4096 + 100_000] = b"x" * 100_000
        assert target.read(region, 0, 1 << 20) == expected
        assert target.stat(region).mtime_ns > before.mtime_ns
        target.resize(region, 0, wait=False)


def test_a_write_is_not_begun_where_it_could_fail_or_be_missed(
    backend: Backend, tmp_path: Path
) -> None:
    with contextlib.closing(_opened(backend, tmp_path / "target")) as target:
        full = target.create_and_write(pattern(1 << 20))
        data = memoryview(bytes(4096))

        def refused(region: RegionID, offset: int) -> bool:
            return target.begin_write(region, offset, data) is None

        memory = backend is BACKENDS["memory"]
        if memory:
            write = target.begin_write(full, 0, data)
            assert write is not None
            write()
        else:  # what a call left behind outlives this process
            assert refused(full, 0)
        assert refused(full, (1 << 20) - 4095)  # it grows
        assert refused(target.create(1 << 20), 1 << 19)  # a hole
        erased = target.create_and_write(pattern(1 << 20))
        target.erase(erased)
        assert refused(erased, 0)
        joined = target.sharing.join()  # others can cut it off
        if joined is not None:
            assert refused(full, 0)
            target.sharing.leave(joined[0])
        target.resize(full, 0, wait=False)  # nobody was left inside
