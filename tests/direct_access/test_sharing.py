"""Direct access of clients on the same host."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import warabi.aio
from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    RawPeer,
    Served,
    eventually,
    file_config,
    pattern,
    pmem_config,
    provider_process,
    python_process,
    raw_connection,
)
from warabi import errors
from warabi.bedrock import Server
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.region import RegionID

CONFIGS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "memory": lambda path: MEMORY,
    "file": file_config,
    "pmem": pmem_config,
}
SIZES = [1, 64, 4096, 65535, 65536, 3 << 20]


@pytest.fixture
def served(local_process: Served) -> Served:
    """A process that no test ends."""
    return local_process


@pytest.fixture(params=[1, 2, 3], ids=["memory", "file", "pmem"])
def provider_id(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture
def other(served: Served, provider_id: int) -> Iterator[TargetHandle]:
    """A client that shares nothing, and so always asks the provider."""
    with Engine("na+sm", client, config={"share": False}) as engine:
        yield Client(engine).make_target_handle(served.address, provider_id)


@pytest.fixture
def handle(served: Served, provider_id: int, client_engine: Engine) -> TargetHandle:
    return Client(client_engine).make_target_handle(served.address, provider_id)


def touch(handle: TargetHandle, region: RegionID) -> None:
    """Use a region as often as it takes to be granted it."""
    for _ in range(3):
        handle.read(region, 0, 1)


def touched(handle: TargetHandle, data: bytes) -> RegionID:
    region = handle.create_and_write(data)
    touch(handle, region)
    return region


@contextlib.contextmanager
def stopped(served: Served) -> Iterator[None]:
    served.stop()
    try:
        yield
    finally:
        served.signal(signal.SIGCONT)


@pytest.mark.parametrize("size", SIZES)
def test_data_do_not_pass_through_the_provider(
    served: Served, handle: TargetHandle, other: TargetHandle, size: int
) -> None:
    region = touched(handle, pattern(size))
    with stopped(served):
        assert handle.read(region, 0, size) == pattern(size)
        handle.write(region, 0, pattern(size, 1))
        place = bytearray(size)
        request = handle.read_async(region, 0, place)
        assert request.completed()
        assert place == pattern(size, 1)
        written = handle.write_async(region, size // 2, pattern(size - size // 2, 2))
        assert written.completed()
        written.wait()
    expected = pattern(size, 1)[: size // 2] + pattern(size - size // 2, 2)
    assert other.read(region, 0, size) == expected


def test_trio_clients_have_direct_access(served: Served, provider_id: int) -> None:
    async def main() -> None:
        async with warabi.aio.connect(served.address, provider_id) as target:
            region = await target.create_and_write(pattern(6 << 20))
            small = await target.create_and_write(pattern(100))
            for _ in range(3):
                for each in (region, small):
                    await target.read(each, 0, 1)
            place = bytearray(6 << 20)
            with stopped(served):
                await target.read_into(region, 0, place)
                assert place == pattern(6 << 20)
                await target.write(region, 1, pattern(5 << 20))
                await target.write(small, 50, b"here")
                assert await target.read_some(small, 50, place) == 50
                assert place[:4] == b"here"
            assert await target.read(region, 1, 5 << 20) == pattern(5 << 20)

    trio.run(main)


@pytest.mark.parametrize("size", [3000, 200_000])
def test_what_becomes_zero_elsewhere_is_seen_and_can_be_written(
    handle: TargetHandle, other: TargetHandle, size: int
) -> None:
    data = pattern(size)
    region = touched(handle, data)
    for change in (other.punch_hole, other.zero_range):
        change(region, 10, size - 20)
        assert handle.read(region, 0, size) == data[:10] + bytes(size - 20) + data[-10:]
        touch(handle, region)
        handle.write(region, 0, data)
        assert other.read(region, 0, size) == data
    other.allocate(region, 0, 2 * size)
    handle.write(region, size, data)
    assert other.read(region, 0, 2 * size) == data * 2


@pytest.mark.parametrize("size", [100, 65536])
def test_an_erased_region_is_noticed(handle: TargetHandle, other: TargetHandle, size: int) -> None:
    region = touched(handle, pattern(size))
    other.erase(region)
    with pytest.raises(errors.InvalidRegion):
        handle.read(region, 0, size)
    with pytest.raises(errors.InvalidRegion):
        handle.write(region, 0, b"x")
    fresh = other.create(size)
    assert other.read(fresh, 0, size) == bytes(size)


@pytest.mark.parametrize("sizes", [(100, 50, 120), (60_000, 70_000, 10), (200_000, 100, 300_000)])
def test_a_resized_region_is_noticed(
    handle: TargetHandle, other: TargetHandle, sizes: tuple[int, int, int]
) -> None:
    model = bytearray(pattern(sizes[0]))
    region = touched(handle, bytes(model))
    for turn, size in enumerate(sizes[1:]):
        other.resize(region, size)
        model = model[:size].ljust(size, b"\0")
        with pytest.raises(errors.OutOfBounds):
            handle.read(region, 0, size + 1)
        with pytest.raises(errors.OutOfBounds):
            handle.write(region, size, b"x")
        assert handle.read(region, 0, size) == model
        handle.write(region, 0, pattern(size, turn))
        model[:] = pattern(size, turn)
        assert other.read(region, 0, size) == model
        touch(handle, region)


def test_a_region_that_grows_can_be_reached_to_its_end(
    served: Served, handle: TargetHandle, other: TargetHandle
) -> None:
    region = touched(handle, pattern(100_000))
    for size in (150_000, 5 << 20):
        other.resize(region, size)
        other.write(region, size - 5, b"grown")
        for _ in range(3):
            assert handle.read(region, size - 5, 5) == b"grown"
        with stopped(served):
            assert handle.read(region, size - 5, 5) == b"grown"


def test_the_last_write_shows_in_the_times(handle: TargetHandle, other: TargetHandle) -> None:
    region = touched(handle, bytes(1000))
    before = other.stat(region)
    now = time.time_ns()
    handle.write(region, 0, b"x")
    after = other.stat(region)
    assert before.mtime_ns < now <= after.mtime_ns <= time.time_ns()
    assert after.ctime_ns == after.mtime_ns
    assert other.stat(region) == after


def test_what_is_persisted_survives_the_provider(
    tmp_path: Path, client_engine: Engine, subtests: pytest.Subtests
) -> None:
    for kind in ("file", "pmem"):
        with subtests.test(kind):
            config = CONFIGS[kind](tmp_path / kind)
            with provider_process("na+sm", config) as served:
                handle = Client(client_engine).make_target_handle(served.address, 1)
                regions = [touched(handle, bytes(size)) for size in SIZES]
                for region, size in zip(regions, SIZES, strict=True):
                    handle.write(region, 0, pattern(size), persist=True)
                served.kill()
            with provider_process("na+sm", config) as served:
                handle = Client(client_engine).make_target_handle(served.address, 1)
                for region, size in zip(regions, SIZES, strict=True):
                    assert handle.read(region, 0, size) == pattern(size)


def test_a_provider_that_ends_in_order_keeps_what_was_written(
    tmp_path: Path, client_engine: Engine
) -> None:
    config = file_config(tmp_path / "target")
    with provider_process("na+sm", config) as served:
        handle = Client(client_engine).make_target_handle(served.address, 1)
        region = touched(handle, bytes(1000))
        handle.write(region, 0, pattern(1000))
        served.signal(signal.SIGTERM)
        served.process.wait(PATIENCE)
        with pytest.raises(errors.ConnectionLost):
            handle.read(region, 0, 1000)
    with provider_process("na+sm", config) as served:
        again = Client(client_engine).make_target_handle(served.address, 1)
        assert again.read(region, 0, 1000) == pattern(1000)
        assert again.stat(region).mtime_ns > again.stat(region).atime_ns


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_death_of_a_provider_is_noticed_at_once(
    tmp_path: Path, client_engine: Engine, kind: str
) -> None:
    with provider_process("na+sm", CONFIGS[kind](tmp_path / "target")) as served:
        handle = Client(client_engine).make_target_handle(served.address, 1)
        regions = [touched(handle, pattern(size)) for size in (100, 100_000)]
        served.kill()
        gone = (errors.ConnectionLost, errors.ConnectionFailed)
        for region in regions:
            with pytest.raises(gone):
                handle.read(region, 0, 100)
            with pytest.raises(gone):
                handle.write(region, 0, b"x")
            with pytest.raises(gone):
                handle.read_async(region, 0, bytearray(1)).wait()


@pytest.mark.parametrize("asking", ["client", "provider"])
def test_sharing_can_be_turned_off(tmp_path: Path, asking: str) -> None:
    off = {"share": False}
    mine = {"timeout": 1.0, **(off if asking == "client" else {})}
    theirs = off if asking == "provider" else {}
    with (
        provider_process("na+sm", MEMORY, engine=theirs) as served,
        Engine("na+sm", client, config=mine) as engine,
    ):
        handle = Client(engine).make_target_handle(served.address, 1)
        region = touched(handle, pattern(100_000))
        with stopped(served), pytest.raises(errors.TimedOut):
            handle.read(region, 0, 100_000)


def test_an_invalid_value_of_share_is_refused() -> None:
    with pytest.raises(errors.ConfigError, match=r"\$\.share"):
        Engine("na+sm", client, config={"share": 1})


# A client in the middle of an access

IN_THE_MIDDLE = """
import ctypes, sys
from warabi.client import Client, RegionID
from warabi.engine import Engine, client

address, number, region = sys.argv[1], int(sys.argv[2]), RegionID(bytes.fromhex(sys.argv[3]))
with Engine("na+sm", client) as engine:
    handle = Client(engine).make_target_handle(address, number)
    for _ in range(3):
        handle.read(region, 0, 1)
    ctypes.CDLL(None).halt_at(80, b"late", 0)
    try:
        handle.write(region, 10, b"late" * 20)
        print("written", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
    sys.stdin.readline()
"""
"""A client that stops between looking at a region and writing to it, until it is told to go on."""


class Late:
    """A process with :data:`IN_THE_MIDDLE`, halted there."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert self._line() == "inside"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> str:
        """Let it write; what came of it."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._line()


Halted = Callable[[Served, int, RegionID], contextlib.AbstractContextManager[Late]]


@pytest.fixture
def late(halt: Path) -> Halted:
    @contextlib.contextmanager
    def halted(served: Served, provider_id: int, region: RegionID) -> Iterator[Late]:
        arguments = (served.address, str(provider_id), region.hex())
        with python_process("-c", IN_THE_MIDDLE, *arguments, preloaded=halt) as process:
            yield Late(process)

    return halted


@pytest.mark.parametrize("size", [200, 30_000, 100_000])
def test_a_late_write_reaches_no_other_region(
    served: Served, late: Halted, provider_id: int, other: TargetHandle, size: int
) -> None:
    region = other.create(size)
    with late(served, provider_id, region) as writer:
        other.erase(region)
        fresh = [other.create(size) for _ in range(100)]
        assert writer.go_on() == "InvalidRegion"
        for each in fresh:
            assert other.read(each, 0, size) == bytes(size)


@pytest.mark.parametrize("sizes", [(200, 20), (200, 300), (30_000, 90_000), (100_000, 50)])
def test_a_late_write_to_a_region_that_was_resized(
    served: Served,
    late: Halted,
    provider_id: int,
    other: TargetHandle,
    sizes: tuple[int, int],
) -> None:
    region = other.create_and_write(pattern(sizes[0]))
    with late(served, provider_id, region) as writer:
        other.resize(region, sizes[1])
        model = bytearray(pattern(sizes[0])[: sizes[1]].ljust(sizes[1], b"\0"))
        fresh = [other.create(sizes[0]) for _ in range(50)]
        if sizes[1] >= 90:
            assert writer.go_on() == "written"
            model[10:90] = b"late" * 20
        else:
            assert writer.go_on() == "OutOfBounds"
        assert other.read(region, 0, sizes[1]) == model
        other.resize(region, sizes[1] + 500)
        assert other.read(region, sizes[1], 500) == bytes(500)
        for each in fresh:
            assert other.read(each, 0, sizes[0]) == bytes(sizes[0])


def test_no_call_waits_for_a_client_stopped_during_an_access(
    served: Served, late: Halted, provider_id: int, handle: TargetHandle, other: TargetHandle
) -> None:
    region = other.create_and_write(pattern(200_000))
    with late(served, provider_id, region) as writer:
        writer.process.send_signal(signal.SIGSTOP)
        for size in (1000, 300_000, 0, 5000):
            other.resize(region, size)
            handle.write(region, 0, pattern(size))
            assert handle.read(region, 0, size) == pattern(size)
        writer.process.send_signal(signal.SIGCONT)
        assert writer.go_on() == "written"
    assert other.read(region, 10, 80) == b"late" * 20


def test_accesses_of_a_killed_client_are_released(late: Halted) -> None:
    with (
        provider_process("na+sm", MEMORY) as served,
        Engine("na+sm", client) as engine,
    ):
        handle = Client(engine).make_target_handle(served.address, 1)
        before = served.descriptors()
        region = handle.create(1 << 20)
        with late(served, 1, region) as writer:
            handle.erase(region)
            assert served.descriptors() > before
            writer.process.kill()
        eventually(lambda: served.descriptors() <= before)


# The client's own processes and threads


def test_threads_share_one_channel(handle: TargetHandle, other: TargetHandle) -> None:
    regions = [touched(handle, bytes(size)) for size in (100, 5000, 70_000, 1 << 20)]
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(30):
                for region in regions:
                    piece = bytes([seed]) * 50
                    handle.write(region, 50 * (seed % 2), piece)
                    assert len(set(handle.read(region, 50 * (seed % 2), 50))) == 1
                if turn % 10 == seed % 10:
                    other.resize(regions[2], 70_000 + 100 * seed)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failures


def test_a_forked_child_gets_grants_of_its_own(served: Served, handle: TargetHandle) -> None:
    region = touched(handle, pattern(100_000))
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            for _ in range(3):
                assert handle.read(region, 0, 100_000) == pattern(100_000)
            handle.write(region, 0, b"child")
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with stopped(served):
        assert handle.read(region, 0, 6) == b"child" + pattern(100_000)[5:6]


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
from warabi.client import Client
from warabi.engine import Engine, client
with Engine("na+sm", client) as engine:
    handle = Client(engine).make_target_handle(sys.argv[1], int(sys.argv[2]))
    regions = [handle.create_and_write(b"%6d" % i * 20000) for i in range(300)]
    for _ in range(2):
        for i, region in enumerate(regions):
            assert handle.read(region, 60, 6) == b"%6d" % i
"""


def test_more_regions_than_descriptors(served: Served, provider_id: int) -> None:
    with python_process("-c", MANY, served.address, str(provider_id)) as process:
        assert process.wait(PATIENCE) == 0


def test_an_erased_region_takes_no_memory_although_a_client_maps_it() -> None:
    with (
        provider_process("na+sm", MEMORY) as served,
        Engine("na+sm", client) as engine,
        Engine("na+sm", client, config={"share": False}) as third,
    ):
        handle = Client(engine).make_target_handle(served.address, 1)
        other = Client(third).make_target_handle(served.address, 1)
        region = touched(handle, bytes(64 << 20))
        handle.read(region, 0, 64 << 20)
        assert mapped("warabi-region") >= 64 << 20
        other.erase(region)
        eventually(lambda: mapped("warabi-region") == 0)


@pytest.mark.parametrize("made", ["created", "resized", "grown", "written"])
@pytest.mark.parametrize("read_only", [False, True])
def test_reading_holes_takes_no_memory(made: str, read_only: bool) -> None:
    """However they were made, but for a region that was created for being filled."""
    size = 64 << 20
    with (
        provider_process("na+sm", MEMORY) as served,
        Engine("na+sm", client) as engine,
        Engine("na+sm", client, config={"share": False}) as third,
    ):
        maker = Client(third).make_target_handle(served.address, 1)
        reader = Client(engine).make_target_handle(served.address, 1, read_only=read_only)
        region = maker.create(size if made == "created" else 0)
        if made == "resized":
            maker.resize(region, size)
        elif made == "grown":
            maker._link.write(region, size - 1, memoryview(b"x"), False, True)
        elif made == "written":
            maker.append(region, b"x")
            maker.resize(region, size)
        for _ in range(3):
            reader.read(region, 0, size)
        space = maker._link.call("getattr", region.slot).space
        assert space <= (8192 if read_only or made != "created" else size)


def mapped(name: str) -> int:
    """Bytes of memory behind this process's mappings of that name."""
    total, counting = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counting = name in line
        elif counting and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_a_client_that_has_left_leaves_nothing(served: Served) -> None:
    before = served.descriptors()
    for number in (1, 2, 3) * 2:
        with Engine("na+sm", client) as engine:
            handle = Client(engine).make_target_handle(served.address, number)
            handle.erase(touched(handle, pattern(100)))
    # The targets keep a segment for regions of that size, and a pack, which is open twice.
    eventually(lambda: served.descriptors() <= before + 3)


def test_a_trio_client_that_is_cancelled_leaves_nothing(
    served: Served, handle: TargetHandle, provider_id: int
) -> None:
    """In whatever it is doing, from joining to reaching its region."""
    region = handle.create(100_000)

    async def cancelled_after(turns: int) -> None:
        with trio.CancelScope() as scope:
            async with (
                warabi.aio.connect(served.address, provider_id) as target,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(target.read, region, 0, 100_000)
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

    async def main() -> None:
        for turns in range(60):
            await cancelled_after(turns)

    before = served.descriptors()
    trio.run(main)
    eventually(lambda: served.descriptors() <= before + 1)


def test_guests_that_break_the_rules(served: Served) -> None:
    with raw_connection(served.address) as connection:
        peer = RawPeer(connection)
        region = peer.call([1, 1, "create", [5], None])[1]
        assert peer.call([2, 1, "grant", [region], None])[3][0] == "protocol"
        assert peer.call([3, 1, "leave", [], None])[3][0] == "protocol"
        assert peer.call([4, 1, "join", ["x"], None])[3][0] == "protocol"
        assert peer.call([5, 1, "join", [True], None])[1] is not None
        assert peer.call([6, 1, "join", [True], None])[3][0] == "protocol"
        assert peer.call([7, 1, "grant", [bytes(16)], None])[3][0] == "region"
        assert peer.call([8, 1, "grant", [region], None])[1] is not None
        assert peer.call([9, 1, "leave", [], None]) == [9, None]
        assert peer.call([10, 1, "read", [region, 0, 5, True, False], None])[2] == bytes(5)


def test_nothing_is_shared_over_tcp(tcp_process: Served) -> None:
    with raw_connection(tcp_process.address) as connection:
        assert RawPeer(connection).call([1, 1, "join", [True], None]) == [1, None]


def test_engine_configuration_reaches_a_service(tmp_path: Path) -> None:
    with Server("na+sm", json.dumps({"margo": {"share": False}})) as service:
        assert service.get_config()["margo"] == {"share": False}
