"""Zero-copy transfers between sockets and regions: correct, and never blocked by a stopped peer.

Over real sockets, with peers that stop half way.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import warabi.aio
from tests.support.helpers import (
    MEMORY,
    PIPELINE,
    RawPeer,
    eventually,
    file_config,
    pattern,
    raw_connection,
)
from warabi.backends import memory
from warabi.client import Client, RegionID, TargetHandle
from warabi.engine import Engine, client
from warabi.errors import InvalidRegion, OutOfBounds
from warabi.protocol import wire
from warabi.provider import zero_copy
from warabi.server import Provider

MIB = 1 << 20
LARGE = 4 * MIB
"""More than a socket takes from a peer that does not read."""
SIZES = [1, 2049, 65_535, 65_536, 65_537, 70_000, 300_000, MIB + 1, LARGE, LARGE + 5]


class Served:
    """A provider in this process, a client on TCP, and the target itself."""

    def __init__(self, engine: Engine, handle: TargetHandle, provider: Provider) -> None:
        self.address = str(engine.addr())
        self.handle = handle
        self.target = provider._core.target
        self.changes = provider._core.changes


@contextlib.contextmanager
def _serving(config: dict[str, Any]) -> Iterator[Served]:
    with (
        Engine("tcp") as engine,
        Provider(engine, 1, config) as provider,
        Engine("tcp", client) as calling,
    ):
        handle = Client(calling).make_target_handle(str(engine.addr()), 1)
        yield Served(engine, handle, provider)


@pytest.fixture(params=["memory", "memory, pipeline", "file", "file, pipeline"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    backend, _, piped = request.param.partition(", ")
    config = MEMORY if backend == "memory" else file_config(tmp_path / "target")
    if piped:
        config = {**config, "transfer_manager": PIPELINE}
    with _serving(config) as found:
        yield found


@pytest.fixture
def plain() -> Iterator[Served]:
    with _serving(MEMORY) as found:
        yield found


@pytest.mark.parametrize("size", SIZES)
def test_every_size_comes_back(served: Served, size: int) -> None:
    first, second = pattern(size), random.Random(size).randbytes(size)
    region = served.handle.create(size)
    for data in (first, second, first):  # into holes first, then where memory is
        served.handle.write(region, 0, data)
        assert served.handle.read(region, 0, size) == data
        assert served.target.read(region, 0, size) == data
    half = second[: size // 2]
    served.handle.write(region, size // 3, half)
    expected = bytearray(first)
    expected[size // 3 : size // 3 + len(half)] = half
    assert served.handle.read(region, 0, size) == expected
    start = size // 5
    assert served.handle.read(region, start, size - start) == expected[start:]


def _mapped() -> int:
    """How many MiB of regions this process can touch without a fault."""
    text = Path("/proc/self/smaps").read_text()
    found = re.findall(r"warabi-region.*\n(?:\w+:.*\n)*?Rss: +(\d+) kB", text)
    return sum(map(int, found)) * 1024 // MIB  # faults map a little more


def test_the_next_extent_of_a_sequential_read_is_mapped_ahead(plain: Served) -> None:
    region = plain.handle.create_and_write(bytes(5 * MIB))
    for done, mapped in enumerate((1, 3, 4, 5, 5)):  # the second one follows the first
        plain.handle.write(region, done * MIB, pattern(MIB))
        assert plain.handle.size(region) == 5 * MIB  # the loop is done with the write
        assert _mapped() == mapped
    assert plain.handle.read(region, 0, 5 * MIB) == 5 * pattern(MIB)


def test_only_sequential_reads_are_mapped_ahead(plain: Served) -> None:
    region = plain.handle.create_and_write(bytes(6 * MIB))
    for done in (0, 3, 1):
        plain.handle.write(region, done * MIB, pattern(MIB))
    assert plain.handle.size(region) == 6 * MIB
    assert _mapped() == 3


def test_regions_that_grow_shrink_and_have_holes(served: Served) -> None:
    """As a byte array that is changed in the same way."""
    numbers = random.Random(5)

    async def main() -> None:
        async with warabi.aio.connect(served.address, 1) as target:
            region, model = await target.create(0), bytearray()
            for _ in range(150):
                offset = numbers.randrange(900_000)
                data = numbers.randbytes(numbers.choice([10, 5000, 65_536, 200_000]))
                kind = numbers.choice(["write", "write", "extend", "resize", "read"])
                if kind == "write" and offset + len(data) <= len(model):
                    await target.write(region, offset, data)
                    model[offset : offset + len(data)] = data
                elif kind == "extend":
                    await target.write(region, offset, data, extend=True)
                    model.extend(bytes(max(0, offset + len(data) - len(model))))
                    model[offset : offset + len(data)] = data
                elif kind == "resize":
                    await target.resize(region, offset)
                    model = model[:offset] + bytes(max(0, offset - len(model)))
                place = bytearray(len(data))
                count = await target.read_some(region, offset, place)
                assert place[:count] == model[offset : offset + len(data)]
            assert await target.read(region, 0, len(model)) == model

    trio.run(main)


def test_a_write_is_bounded_as_ever(served: Served) -> None:
    region = served.handle.create_and_write(pattern(200_000))
    with pytest.raises(OutOfBounds):
        served.handle.write(region, 100_001, bytes(100_000))
    gone = served.handle.create_and_write(pattern(200_000))
    served.handle.erase(gone)
    with pytest.raises(InvalidRegion):
        served.handle.write(gone, 0, bytes(100_000))
    with pytest.raises(InvalidRegion):
        served.handle.read(gone, 0, 100_000)
    assert served.handle.read(region, 0, 200_000) == pattern(200_000)


def test_a_write_notifies_watchers_and_sets_times(plain: Served) -> None:
    region = plain.handle.create_and_write(pattern(200_000))
    before = plain.handle.stat(region).mtime_ns
    plain.handle.write(region, 0, pattern(200_000))
    assert plain.handle.stat(region).mtime_ns > before


# Peers that stop half way


def _half_a_write(served: Served, peer: RawPeer, region: RegionID, data: bytes) -> int:
    """Send the first half of a write, and wait until some of it is in the region."""
    half = len(data) // 2
    header = [7, 1, "write", [bytes(region), 0, False, False], None]
    peer.socket.sendall(wire.frame(header, len(data)) + data[:half])
    eventually(lambda: served.target.read(region, half - 1, 1) == data[half - 1 : half])
    return half


def test_half_a_write_does_not_block_other_clients(plain: Served) -> None:
    old, new = pattern(LARGE), random.Random(1).randbytes(LARGE)
    region = plain.handle.create_and_write(old)
    with raw_connection(plain.address) as connection:
        peer = RawPeer(connection)
        half = _half_a_write(plain, peer, region, new)
        assert plain.handle.read(region, 0, LARGE) == new[:half] + old[half:]
        plain.handle.write(region, LARGE - 100_000, bytes(100_000))
        plain.target.resize(region, LARGE + 1)
        peer.socket.sendall(new[half:])
        assert peer.reply() == [7, None]
        assert plain.handle.read(region, 0, LARGE + 1) == new + b"\0"


@pytest.mark.parametrize(
    ("change", "code"), [("resize", "OutOfBounds"), ("erase", "InvalidRegion")]
)
def test_a_region_that_goes_under_half_a_write(plain: Served, change: str, code: str) -> None:
    new = random.Random(1).randbytes(LARGE)
    region = plain.handle.create_and_write(pattern(LARGE))
    with raw_connection(plain.address) as connection:
        peer = RawPeer(connection)
        half = _half_a_write(plain, peer, region, new)
        if change == "resize":
            plain.target.resize(region, half - 10)
        else:
            plain.target.erase(region)
        peer.socket.sendall(new[half:])
        number, _, _, failure = peer.reply()
        assert number == 7
        with pytest.raises({"OutOfBounds": OutOfBounds, "InvalidRegion": InvalidRegion}[code]):
            _raise(failure)
        if change == "resize":
            assert plain.handle.read(region, 0, half - 10) == new[: half - 10]
        assert peer.call([8, 1, "ping", [], None]) == [8, None]


def _raise(failure: Any) -> None:
    from warabi import errors

    raise errors.from_wire(*failure)


def test_a_writer_that_goes_half_way_has_written_half(plain: Served) -> None:
    old, new = pattern(LARGE), random.Random(1).randbytes(LARGE)
    region = plain.handle.create_and_write(old)
    with raw_connection(plain.address) as connection:
        half = _half_a_write(plain, RawPeer(connection), region, new)
    plain.target.resize(region, LARGE)  # nobody is inside
    assert plain.handle.read(region, 0, LARGE) == new[:half] + old[half:]


@pytest.mark.parametrize("size", [3000, zero_copy.WHOLE])
def test_a_writer_of_little_that_goes_half_way_has_written_nothing(
    plain: Served, size: int
) -> None:
    region = plain.handle.create_and_write(pattern(size))
    with raw_connection(plain.address) as connection:
        peer = RawPeer(connection)
        header = [7, 1, "write", [bytes(region), 0, False, False], None]
        peer.socket.sendall(wire.frame(header, size) + bytes(size - 1))
    with raw_connection(plain.address) as connection:
        assert RawPeer(connection).call([1, 1, "ping", [], None]) == [1, None]
    assert plain.handle.read(region, 0, size) == pattern(size)


@pytest.mark.parametrize("change", ["write", "resize", "erase"])
def test_a_reader_that_stops_half_way_gets_what_there_was(plain: Served, change: str) -> None:
    data = random.Random(2).randbytes(LARGE)
    region = plain.handle.create_and_write(data)
    with raw_connection(plain.address) as connection:
        peer = RawPeer(connection)
        for number in range(4):  # more than the sockets hold
            peer.send([number + 1, 1, "read", [bytes(region), 0, LARGE, False, False], None])
        eventually(lambda: _unread(peer) > 0)
        # The first reply is under way, and may be the only one that is.
        if change == "write":
            plain.handle.write(region, LARGE // 2, bytes(10))
        elif change == "resize":
            plain.target.resize(region, LARGE // 2)
        else:
            plain.target.erase(region)
        event = peer._event()
        assert isinstance(event, wire.Message)
        assert event.header == [1, None]
        place = bytearray(LARGE)
        peer._wire.accept_payload(memoryview(place))
        assert peer._event() is wire.PAYLOAD_DONE
        if change == "write":  # beside it: before or after
            place[LARGE // 2 : LARGE // 2 + 10] = data[LARGE // 2 : LARGE // 2 + 10]
        assert place == data
        for number in range(1, 4):
            assert peer.reply()[0] == number + 1
        assert peer.call([8, 1, "ping", [], None]) == [8, None]


def _unread(peer: RawPeer) -> int:
    import array
    import fcntl
    import termios

    count = array.array("i", [0])
    fcntl.ioctl(peer.socket, termios.FIONREAD, count)
    return count[0]


def test_granted_memory_cannot_be_cut_off(plain: Served) -> None:
    """A client that was granted a region has its descriptor, which is sealed against shrinking:
    a load or store of the provider beyond the end would kill it."""
    region = plain.handle.create_and_write(pattern(LARGE))
    plain.handle.write(region, 0, pattern(LARGE))
    plain.handle.read(region, 0, LARGE)
    place = plain.target._storage.share(region, writable=True)
    assert place is not None
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(place.fd, 0)
        os.truncate(f"/proc/self/fd/{place.fd}", LARGE)  # the same size cuts nothing off
        with pytest.raises(PermissionError):
            os.truncate(f"/proc/self/fd/{place.fd}", LARGE - 1)
    finally:
        os.close(place.fd)
    assert plain.handle.read(region, 0, LARGE) == pattern(LARGE)


def test_mappings_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a descriptor and a place in the process's table; there may be many regions."""
    monkeypatch.setattr(memory, "_MAPPINGS", 3)
    with (
        Engine("tcp") as engine,
        Provider(engine, 1, MEMORY),
        Engine("tcp", client) as calling,
    ):
        handle = Client(calling).make_target_handle(str(engine.addr()), 1)
        regions = [handle.create_and_write(pattern(70_000 + i)) for i in range(10)]
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            for number, region in enumerate(regions):
                handle.write(region, 0, pattern(70_000 + number))
                assert handle.read(region, 0, 70_000 + number) == pattern(70_000 + number)
        assert len(os.listdir("/proc/self/fd")) <= before + 3
        for region in regions:
            handle.erase(region)
        # The memory may be kept for the next regions, its mappings are not.
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


# Files: what can be answered at once is, and what cannot holds up nobody


@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize("size", [64, 4096, 60_000, 100_000])
def test_a_request_that_waits_for_a_region_lets_later_ones_pass(
    size: int, piped: bool, tmp_path: Path
) -> None:
    """On one connection; a pipeline has two buffers of each size, and gets them back."""
    config = file_config(tmp_path / "target")
    if piped:
        config |= {"transfer_manager": PIPELINE}
    with _serving(config) as served, raw_connection(served.address) as connection:
        old, new = pattern(size), random.Random(size).randbytes(size)
        busy, free = (bytes(served.handle.create_and_write(old)) for _ in range(2))
        peer = RawPeer(connection)
        for writing in (False, True, False, True, True):
            inode = served.target.locks.enter_exclusive(RegionID(busy), "resize", True)
            try:
                for number, region in enumerate((busy, free)):
                    if writing:
                        peer.send([number, 1, "write", [region, 0, False, False], None], new)
                    else:
                        peer.send([number, 1, "read", [region, 0, size, False, False], None])
                assert peer.reply() == [1, None]
            finally:
                served.target.locks.leave_exclusive(inode)
            assert peer.reply() == [0, None]
        for region in (busy, free):
            assert served.target.read(RegionID(region), 0, size) == new
        served.changes.freeze(1.0, lambda: False)  # nobody has stayed inside
        served.changes.thaw()


@pytest.mark.parametrize("size", [64, 60_000, MIB])
def test_data_outside_the_page_cache_are_read_from_disk(size: int, tmp_path: Path) -> None:
    """On a file system that says so, as that of the checkout does."""
    with _serving(file_config(tmp_path / "target", packed=False)) as served:
        data = random.Random(size).randbytes(size)
        region = served.handle.create_and_write(data, persist=True)
        file = next(tmp_path.glob(f"target.regions/*/{region.hex()}"))
        for _ in range(3):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert served.handle.read(region, 0, size) == data
