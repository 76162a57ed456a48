"""TLS between engines and clients: transfers, failures, and addresses that need it."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

import warabi.aio
from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    Served,
    eventually,
    file_config,
    pattern,
    provider_process,
    run_python,
    tls_config,
)
from warabi import errors
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.server import Provider

Connect = Callable[[str, dict[str, Any]], None]


def blocking(address: str, config: dict[str, Any]) -> None:
    with Engine("tcp", client, config=config) as engine:
        Client(engine).make_target_handle(address, 1).create(1)


def with_trio(address: str, config: dict[str, Any]) -> None:
    async def connect() -> None:
        async with warabi.aio.connect(
            address, 1, tls=config.get("tls"), timeout=config.get("timeout", 60)
        ) as target:
            await target.create(1)

    trio.run(connect)


@contextlib.contextmanager
def serving(config: dict[str, Any]) -> Iterator[str]:
    with Engine("tcp", config=config) as engine, Provider(engine, 1, MEMORY):
        yield str(engine.addr())


@pytest.fixture
def handle(tls_process: Served, tls: dict[str, Any]) -> Iterator[TargetHandle]:
    with Engine("tcp", client, config=tls) as engine:
        yield Client(engine).make_target_handle(tls_process.address, 1)


# What gets through


@pytest.mark.parametrize("provider_id", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 2049, 16384, 65536, 1_000_003, (4 << 20) + 1, 21 << 20])
def test_data_of_every_size(
    tls_process: Served, tls: dict[str, Any], provider_id: int, size: int
) -> None:
    data = pattern(min(size, 5 << 20)) * (1 if size <= 5 << 20 else 5)
    data = data[:size]
    with Engine("tcp", client, config=tls) as engine:
        handle = Client(engine).make_target_handle(tls_process.address, provider_id)
        region = handle.create_and_write(data, persist=True)
        assert handle.read(region, 0, size) == data
        reading = [handle.read_async(region, 0, buffer := bytearray(size)) for _ in range(3)]
        for request in reading:
            request.wait()
        assert buffer == data
        handle.erase(region)


async def test_trio_client(tls_process: Served, tls: dict[str, Any]) -> None:
    async with warabi.aio.connect(tls_process.address, 1, tls=tls["tls"]) as target:

        async def work(seed: int) -> None:
            for size in (0, 100, 100_000, 6 << 20):
                region = await target.create_and_write(pattern(size, seed))
                assert await target.read(region, 0, size) == pattern(size, seed)
                buffer = bytearray(size + 10)
                if size <= 4 << 20:
                    assert await target.read_some(region, 0, buffer) == size
                await target.erase(region)

        async with trio.open_nursery() as nursery:
            for seed in range(4):
                nursery.start_soon(work, seed)


async def test_cancelled_requests_harm_no_others(tls_process: Served, tls: dict[str, Any]) -> None:
    async with warabi.aio.connect(tls_process.address, 2, tls=tls["tls"]) as target:
        region = await target.create_and_write(pattern(4 << 20))
        for delay in (0, 0.0005, 0.002, 0.01):
            buffer = bytearray(4 << 20)
            with trio.move_on_after(delay):
                await target.read_into(region, 0, buffer)
            with trio.move_on_after(delay):
                await target.write(region, 0, pattern(4 << 20))
            assert await target.read(region, 0, 4 << 20) == pattern(4 << 20)


def test_threads_share_a_connection(handle: TargetHandle) -> None:
    """They send and receive at once, which one TLS connection does not bear by itself."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(15):
                size = (seed * 7919 + i * 404_729) % 900_000
                region = handle.create_and_write(pattern(size, seed))
                assert handle.read(region, 0, size) == pattern(size, seed)
                handle.erase(region)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert failures == []


def test_writes_while_replies_are_not_taken(handle: TargetHandle) -> None:
    """More is sent and asked for than the sockets hold: sender and reader wait for each other."""
    region = handle.create_and_write(pattern(4 << 20))
    buffers = [bytearray(4 << 20) for _ in range(8)]
    reads = [handle.read_async(region, 0, buffer) for buffer in buffers]
    writes = [handle.create_and_write_async(pattern(4 << 20, i)) for i in range(4)]
    for request in reads:
        request.wait()
    assert all(buffer == pattern(4 << 20) for buffer in buffers)
    for i, write in enumerate(writes):
        assert handle.read(write.wait(), 0, 4 << 20) == pattern(4 << 20, i)


def test_polling_completes(handle: TargetHandle) -> None:
    region = handle.create_and_write(pattern(300_000))
    buffer = bytearray(300_000)
    request = handle.read_async(region, 0, buffer)
    eventually(request.completed)
    assert buffer == pattern(300_000)


def test_forked_child_has_a_connection_of_its_own(tls_process: Served, tls: dict[str, Any]) -> None:
    script = """
import json, os, sys
from warabi.client import Client
from warabi.engine import Engine, client
engine = Engine("tcp", client, config=json.loads(sys.argv[2]))
handle = Client(engine).make_target_handle(sys.argv[1], 1)
region = handle.create(2)
child = os.fork()
for _ in range(50):
    me = int(child == 0)
    handle.write(region, me, bytes([65 + me]))
    assert handle.read(region, me, 1) == bytes([65 + me])
if child == 0:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert handle.read(region, 0, 2) == b"AB"
"""
    done = run_python(script, tls_process.address, json.dumps(tls))
    assert (done.returncode, done.stderr) == (0, "")


def test_stopped_provider_times_out_and_is_usable_again(tls: dict[str, Any]) -> None:
    with (
        provider_process("tcp", MEMORY, engine=tls) as served,
        Engine("tcp", client, config={**tls, "timeout": 1.0}) as engine,
    ):
        handle = Client(engine).make_target_handle(served.address, 1)
        region = handle.create_and_write(b"1234")
        served.stop()
        with pytest.raises(errors.TimedOut):
            handle.read(region, 0, 4)
        served.signal(signal.SIGCONT)
        assert handle.read(region, 0, 4) == b"1234"


def test_killed_provider_fails_every_call(tls: dict[str, Any]) -> None:
    with (
        provider_process("tcp", MEMORY, engine=tls) as served,
        Engine("tcp", client, config=tls) as engine,
    ):
        handle = Client(engine).make_target_handle(served.address, 1)
        region = handle.create(1000)
        served.kill()
        with pytest.raises(errors.ConnectionLost):
            handle.read(region, 0, 1000)
        with pytest.raises((errors.ConnectionLost, errors.ConnectionFailed)):
            handle.read(region, 0, 1000)


def test_finalize_answers_what_has_come_in(tls: dict[str, Any], tmp_path: Path) -> None:
    with Engine("tcp", client, config=tls) as own:
        engine = Engine("tcp", config=tls)
        Provider(engine, 1, file_config(tmp_path / "target"))
        handle = Client(own).make_target_handle(str(engine.addr()), 1)
        region = handle.create(100)
        requests = [handle.write_async(region, i, b"x") for i in range(100)]
        requests[0].wait()
        engine.finalize()
        outcomes = []
        for request in requests:
            try:
                request.wait()
                outcomes.append("done")
            except errors.ConnectionLost:
                outcomes.append("lost")
        assert outcomes == sorted(outcomes), "one was lost, and a later one was not"


def test_what_crosses_the_wire_cannot_be_read(tls: dict[str, Any]) -> None:
    secret = b"attack at dawn" * 100
    seen = bytearray()
    with serving(tls) as address, socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(address.rsplit(":", 1)[1])

        def pass_on(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    seen.extend(data)
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)

        def listen_in() -> None:
            near, _ = listener.accept()
            with near, socket.create_connection(("127.0.0.1", port)) as far:
                back = threading.Thread(target=pass_on, args=(far, near))
                back.start()
                pass_on(near, far)
                back.join(PATIENCE)

        thread = threading.Thread(target=listen_in)
        thread.start()
        with Engine("tcp", client, config=tls) as engine:
            text = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
            handle = Client(engine).make_target_handle(text, 1)
            region = handle.create_and_write(secret)
            assert handle.read(region, 0, len(secret)) == secret
        thread.join(PATIENCE)
    assert len(seen) > 2 * len(secret)
    assert b"attack" not in seen
    assert b"create_and_write" not in seen


def test_names_and_addresses_of_this_host(tls: dict[str, Any]) -> None:
    with serving(tls) as address:
        port = address.rsplit(":", 1)[1]
        for host in ("localhost", "127.0.0.1"):
            blocking(f"tcp://{host}:{port}", tls)


def test_server_name_instead_of_the_address(tmp_path: Path) -> None:
    authority = trustme.CA()
    config = tls_config(tmp_path, authority, ["store.example"])
    with serving(config) as address:
        with pytest.raises(errors.PermissionDenied, match=r"127\.0\.0\.1"):
            blocking(address, config)
        named = {"tls": {**config["tls"], "server_name": "store.example"}}
        blocking(address, named)
        with_trio(address, named)


def test_no_tls_where_nothing_leaves_the_host(tls: dict[str, Any]) -> None:
    """A local engine may have certificates; its clients need none."""
    with (
        Engine("na+sm", config=tls) as engine,
        Provider(engine, 1, MEMORY),
        Engine("na+sm", client) as plain,
        Engine("na+sm", client, config=tls) as own,
    ):
        for one in (plain, own):
            assert Client(one).make_target_handle(str(engine.addr()), 1).create(1)


def test_beyond_loopback(tls: dict[str, Any]) -> None:
    with Engine("tcp://0.0.0.0:0", config=tls) as engine, Provider(engine, 1, MEMORY):
        port = str(engine.addr()).rsplit(":", 1)[1]
        blocking(f"tcp://localhost:{port}", tls)
