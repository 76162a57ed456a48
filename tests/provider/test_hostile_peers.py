"""Limits on peers: a slow or hostile one does not slow down others.

Over real sockets.  In each test another client goes on working, and new ones get in.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import warabi.aio
from tests.protocol.test_provider_protocol import Bystander, resident
from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    ROOT,
    RawPeer,
    eventually,
    file_config,
    pattern,
    provider_process,
    python_process,
    raw_connection,
)
from tests.support.loops import check_never_held, watched_loops
from warabi import errors
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.protocol import wire
from warabi.protocol.limits import EngineLimits, from_config
from warabi.provider import buffer_pool, channel
from warabi.provider.admission import Admission, Budget, PeerConnection
from warabi.server import Provider

MIB = 1 << 20
PIPELINE: dict[str, Any] = {
    "type": "pipeline",
    "config": {
        "num_pools": 1,
        "num_buffers_per_pool": 1,
        "first_buffer_size": 65536,
        "buffer_size_multiplier": 2,
    },
}


@pytest.fixture(autouse=True)
def loops() -> Iterator[None]:
    """Those of this process's engines, which nothing may hold."""
    with watched_loops() as held:
        yield
    check_never_held(held)


@pytest.fixture(params=["tcp", "tls"])
def secured(request: pytest.FixtureRequest, tls: dict[str, Any]) -> dict[str, Any]:
    """What engines' configurations have, plain and with TLS."""
    return tls if request.param == "tls" else {}


@contextlib.contextmanager
def _bystander(address: str, config: dict[str, Any]) -> Iterator[Bystander]:
    bystander = Bystander(address, 1, config)
    try:
        bystander.goes_on()
        yield bystander
        bystander.goes_on()
    finally:
        bystander.close()


def _newcomer(address: str, config: dict[str, Any]) -> None:
    """Somebody else comes, and is served."""
    with Engine("tcp", client, config=config) as engine:
        handle = Client(engine).make_target_handle(address, 1)
        assert handle.read(handle.create_and_write(b"new"), 0, 3) == b"new"


# Silent ones


CROWD = """
import resource, socket, sys, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
crowd = []
for _ in range(4):
    crowd += [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(500)]
    print("here", flush=True)
    sys.stdin.readline()
def ended(one):
    one.setblocking(False)
    try:
        while one.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True
deadline = time.monotonic() + 60
while True:
    gone = [ended(one) for one in crowd]
    if gone.count(False) <= int(sys.argv[2]) or time.monotonic() > deadline:
        break
    time.sleep(0.01)
gone = [ended(one) for one in crowd]  # all of one time: those that went while the others were asked
print(*map(int, gone), flush=True)
sys.stdin.readline()
"""


def test_two_thousand_silent_peers(secured: dict[str, Any]) -> None:
    limit = EngineLimits().unopened
    with (
        provider_process("tcp", MEMORY, engine=secured) as served,
        _bystander(served.address, secured) as bystander,
    ):
        port = served.address.rsplit(":", 1)[1]
        with python_process("-c", CROWD, port, str(limit)) as crowd:
            assert crowd.stdin is not None
            assert crowd.stdout is not None
            for _ in range(4):
                assert crowd.stdout.readline() == "here\n"
                _newcomer(served.address, secured)
                bystander.goes_on()
                crowd.stdin.write("\n")
                crowd.stdin.flush()
            ended = crowd.stdout.readline().split()
            # The oldest went first, and the last ones for the newcomers.
            assert ended == sorted(ended, reverse=True)
            assert limit - 8 <= ended.count("0") <= limit
            bystander.goes_on()


def _ended(connection: socket.socket) -> bool:
    """Whether the peer closed it; what it says before is dropped."""
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


def test_established_connections_are_not_dropped_for_new_ones() -> None:
    config = {"limits": {"unopened": 2, "connections": 3}}
    with Engine("tcp", config=config) as engine, Provider(engine, 1, MEMORY):
        address = str(engine.addr())
        with contextlib.ExitStack() as stack:
            opened = [RawPeer(stack.enter_context(raw_connection(address))) for _ in range(2)]
            for peer in opened:
                assert peer.call([1, 1, "ping", [], None]) == [1, None]
            silent = [stack.enter_context(raw_connection(address)) for _ in range(10)]
            eventually(lambda: sum(map(_ended, silent)) == 8)
            assert [_ended(one) for one in silent] == [True] * 8 + [False] * 2
            for peer in opened:
                assert peer.call([1, 1, "ping", [], None]) == [1, None]
            _newcomer(address, {})


def test_handshake_a_byte_at_a_time(
    secured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then does not renew its time."""
    first = b"\x16\x03\x01\x02\x00" + bytes(200) if secured else wire.opening(wire.Limits())
    with (
        Engine("tcp", config=secured) as engine,
        Provider(engine, 1, MEMORY),
        _bystander(str(engine.addr()), secured),
    ):
        monkeypatch.setattr(channel, "OPENING_PATIENCE", 0.3)
        with raw_connection(str(engine.addr())) as slow:
            deadline = time.monotonic() + PATIENCE
            for byte in first[:-1]:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    slow.sendall(bytes([byte]))
                if _ended(slow):
                    break
                slow.settimeout(PATIENCE)
                time.sleep(0.02)
            assert time.monotonic() < deadline
            eventually(lambda: _ended(slow))


# Too many


def test_too_many_connections(secured: dict[str, Any]) -> None:
    config = {**secured, "limits": {"connections": 2}}
    message = "2 connections are open, which is the limit"
    with Engine("tcp", config=config) as engine, Provider(engine, 1, MEMORY):
        address = str(engine.addr())
        with (
            Engine("tcp", client, config=secured) as first,
            Engine("tcp", client, config=secured) as second,
            Engine("tcp", client, config=secured) as third,
        ):
            handle = Client(first).make_target_handle(address, 1)
            Client(second).make_target_handle(address, 1)
            for _ in range(3):
                with pytest.raises(errors.ConnectionFailed, match=message):
                    Client(third).make_target_handle(address, 1)

            async def connect() -> None:
                with pytest.raises(errors.ConnectionFailed, match=message):
                    async with warabi.aio.connect(address, 1, tls=secured.get("tls")):
                        pass

            trio.run(connect)
            assert handle.create(1)
            second.finalize()

            def gets_in() -> bool:
                try:
                    return bool(Client(third).make_target_handle(address, 1))
                except errors.ConnectionFailed:
                    return False

            eventually(gets_in)


def test_too_many_connections_from_one_host() -> None:
    config = {"limits": {"connections_per_host": 1}}
    with (
        Engine("tcp", config=config) as engine,
        Provider(engine, 1, MEMORY),
        Engine("tcp", client) as first,
        Engine("tcp", client) as second,
    ):
        address = str(engine.addr())
        Client(first).make_target_handle(address, 1)
        with pytest.raises(errors.ConnectionFailed, match=r"1 connections from 127\.0\.0\.1"):
            Client(second).make_target_handle(address, 1)
    # Processes of this user on this host are not counted so.
    with Engine("na+sm", config=config) as engine, Provider(engine, 1, MEMORY):
        for _ in range(2):
            with Engine("na+sm", client) as own, Engine("na+sm", client) as other:
                for one in (own, other):
                    assert Client(one).make_target_handle(str(engine.addr()), 1)


def test_admission_counts_connections_by_host() -> None:
    dropped: list[int] = []
    admission = Admission(EngineLimits(connections=2, connections_per_host=1, unopened=1))
    peers = [
        PeerConnection(host, lambda i=i: dropped.append(i))  # type: ignore[misc]
        for i, host in enumerate(["a", "a", "b", "", ""])
    ]
    for peer in peers[:2]:
        admission.arrive(peer)
    assert dropped == [0]
    admission.admit(peers[1])
    admission.arrive(peers[2])
    with pytest.raises(errors.ConnectionFailed, match="from a"):
        admission.admit(peers[0])
    admission.admit(peers[2])
    with pytest.raises(errors.ConnectionFailed, match="2 connections"):
        admission.admit(peers[3])
    for peer in peers:
        admission.leave(peer)
        admission.leave(peer)
    admission.admit(peers[0])
    admission.admit(peers[3])
    assert dropped == [0]


# Those who do not read, or read slowly


@pytest.mark.parametrize("backend", ["memory", "file"])
def test_reader_that_never_reads(secured: dict[str, Any], backend: str, tmp_path: Path) -> None:
    """Asking for 4 MiB again and again, it is given no more than ``outstanding`` of memory."""
    config = MEMORY if backend == "memory" else file_config(tmp_path / "target")
    engine = {**secured, "limits": {"outstanding": 8 * MIB}}
    with (
        provider_process("tcp", config, engine=engine) as served,
        _bystander(served.address, secured) as bystander,
        raw_connection(served.address, secured) as connection,
    ):
        peer = RawPeer(connection)
        region = peer.call([1, 1, "create", [4 * MIB], None])[1]
        peer.call([1, 1, "write", [region, 0, False, False], None], bytes(4 * MIB))
        before = resident(served)
        connection.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            for i in range(20_000):  # until the provider takes no more
                peer.send([i, 1, "read", [region, 0, 4 * MIB, False, False], None])
        bystander.goes_on()
        # One being sent and one being read come on top, as do the allocator's habits.
        assert resident(served) - before < (8 + 2 * 4 + 24) * MIB
        _newcomer(served.address, secured)


@pytest.mark.parametrize("large", [False, True])
def test_uploads_that_do_not_come(secured: dict[str, Any], large: bool) -> None:
    """Announced by many connections, they cost what was announced, each at most once."""
    size = 4 * MIB if large else 1000
    with (
        provider_process("tcp", MEMORY, engine=secured) as served,
        _bystander(served.address, secured) as bystander,
        contextlib.ExitStack() as stack,
    ):
        before = resident(served)
        for _ in range(10):
            connection = stack.enter_context(raw_connection(served.address, secured))
            RawPeer(connection)
            connection.sendall(wire.frame([1, 1, "create_and_write", [False], None], size) + b"x")
        bystander.goes_on()
        _newcomer(served.address, secured)
        assert resident(served) - before < (10 * 4 + 24) * MIB


@pytest.fixture(params=["memory", "file"])
def shared_buffer(
    request: pytest.FixtureRequest,
    secured: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """Of a provider with one buffer for all its clients, from which it takes who dawdles."""
    monkeypatch.setattr(buffer_pool, "STALL_PATIENCE", 1.0)
    target = MEMORY if request.param == "memory" else file_config(tmp_path / "target")
    config = {**target, "transfer_manager": PIPELINE}
    with Engine("tcp", config=secured) as engine, Provider(engine, 1, config):
        yield str(engine.addr())


def test_sender_of_a_byte_now_and_then(shared_buffer: str, secured: dict[str, Any]) -> None:
    """Which is not silent, and has the buffer that everybody waits for."""
    stop = threading.Event()
    with raw_connection(shared_buffer, secured) as slow:
        peer = RawPeer(slow)
        slow.sendall(wire.frame([1, 1, "create_and_write", [False], None], 60_000))

        def dawdle() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.02):
                    slow.sendall(b"x")

        thread = threading.Thread(target=dawdle)
        thread.start()
        try:
            with Engine("tcp", client, config=secured) as engine:
                handle = Client(engine).make_target_handle(shared_buffer, 1)
                region = handle.create_and_write(pattern(60_000))
                assert handle.read(region, 0, 60_000) == pattern(60_000)
        finally:
            stop.set()
            thread.join(PATIENCE)
        assert peer.closed()


@pytest.mark.parametrize("size", [60_000, 4 * MIB])
def test_reader_of_a_byte_now_and_then(
    shared_buffer: str, secured: dict[str, Any], size: int
) -> None:
    """Of replies that fill the buffer, or go through it in pieces."""
    with Engine("tcp", client, config=secured) as engine:
        handle = Client(engine).make_target_handle(shared_buffer, 1)
        region = handle.create_and_write(bytes(4 * MIB))
        with raw_connection(shared_buffer, secured) as slow:
            RawPeer(slow)
            header = [1, 1, "read", [region.to_bytes(), 0, size, False, False], None]
            slow.sendall(wire.frame(header) * (40 * MIB // size))
            stop = threading.Event()

            def dawdle() -> None:
                with contextlib.suppress(OSError):
                    while not stop.wait(0.02):
                        slow.recv(1)

            thread = threading.Thread(target=dawdle)
            thread.start()
            try:
                for _ in range(3):
                    assert handle.read(region, 0, 100_000) == bytes(100_000)
                    handle.write(region, 0, bytes(100_000))
            finally:
                stop.set()
                thread.join(PATIENCE)


def test_byte_by_byte_is_slow_and_right(secured: dict[str, Any]) -> None:
    with (
        Engine("tcp", config=secured) as engine,
        Provider(engine, 1, MEMORY),
        _bystander(str(engine.addr()), secured) as bystander,
        raw_connection(str(engine.addr()), secured) as connection,
    ):
        peer = RawPeer(connection)
        for byte in wire.frame([1, 1, "create_and_write", [False], None], 30) + b"z" * 30:
            connection.sendall(bytes([byte]))
        region = peer.reply()[1]
        bystander.goes_on()
        reply = peer.call([2, 1, "read", [region, 0, 30, True, False], None])
        assert reply[2] == b"z" * 30


# Limits of a configuration


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (5, r"\$\.limits: expected an object"),
        ({"connection": 5}, r"\$\.limits\.connection: unknown key"),
        ({"connections": 0}, r"\$\.limits\.connections: expected 1 to"),
        ({"connections": True}, r"\$\.limits\.connections: expected"),
        ({"unopened": "5"}, r"\$\.limits\.unopened: expected"),
        ({"requests": 1 << 20}, r"\$\.limits\.requests: expected"),
        ({"payload": 1000}, r"\$\.limits\.payload: expected 1048576 to 4194304, got 1000"),
        ({"payload": 5 << 20}, r"\$\.limits\.payload: expected"),
        ({"outstanding": 1 << 20}, r"\$\.limits\.outstanding: 1048576 is less than one payload"),
    ],
)
def test_wrong_limits(limits: Any, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        Engine("tcp", client, config={"limits": limits})


def test_default_limits() -> None:
    assert from_config(None) == from_config({}) == EngineLimits()
    assert EngineLimits().wire == wire.Limits()


def test_limits_are_documented() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", text, re.MULTILINE)
    assert {key: int(value) for key, value in rows} == asdict(EngineLimits())


@pytest.mark.parametrize("payload", [MIB, 3_000_001])
@pytest.mark.parametrize("backend", ["memory", "file", "pipeline"])
def test_payloads_of_another_size(payload: int, backend: str, tmp_path: Path) -> None:
    config = MEMORY if backend == "memory" else file_config(tmp_path / "target")
    if backend == "pipeline":
        config = {**config, "transfer_manager": PIPELINE}
    size = 21 * MIB + 5
    with (
        Engine("tcp", config={"limits": {"payload": payload}}) as engine,
        Provider(engine, 1, config),
        Engine("tcp", client) as own,
    ):
        handle = Client(own).make_target_handle(str(engine.addr()), 1)
        data = pattern(3 * MIB) * 7 + b"12345"
        region = handle.create_and_write(data)
        assert handle.read(region, 0, size) == data
        vector = [(0, 5 * MIB), (6 * MIB, 5 * MIB)]
        handle.write_vector(region, vector, bytes(10 * MIB))
        handle.read_vector(region, vector, buffer := bytearray(b"x" * 10 * MIB))
        assert buffer == bytes(10 * MIB)
        with raw_connection(str(engine.addr())) as connection:
            peer = RawPeer(connection)
            assert peer.opened.limits.payload == payload
            connection.sendall((5).to_bytes(4, "little") + (payload + 1).to_bytes(8, "little"))
            refusal = peer.reply()
            assert f"a payload of {payload + 1} bytes, the limit is {payload}" in refusal[3][1]


def test_one_request_at_a_time(tmp_path: Path) -> None:
    with (
        Engine("tcp", config={"limits": {"requests": 1}}) as engine,
        Provider(engine, 1, file_config(tmp_path / "target")),
        Engine("tcp", client) as own,
    ):
        handle = Client(own).make_target_handle(str(engine.addr()), 1)
        region = handle.create(50_000)
        requests = [
            handle.write_async(region, i * 1000, bytes([i]) * 1000, persist=i % 10 == 0)
            for i in range(50)
        ]
        for request in requests:
            request.wait()
        assert handle.read(region, 49_000, 1000) == bytes([49]) * 1000


async def test_budget_waits_for_what_comes_back() -> None:
    budget = Budget(requests=2, outstanding=100)
    await budget.acquire(60)
    for size in (41, 100):
        with trio.move_on_after(0) as scope:
            await budget.acquire(size)
        assert scope.cancelled_caught
    await budget.acquire(40)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(budget.acquire, 0)  # a third request
        await trio.testing.wait_all_tasks_blocked()
        budget.release(40)
    budget.release(60)
    await budget.acquire(100)
