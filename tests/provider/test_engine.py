"""Engines: addresses, the ends they come to, and what their peers notice of it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import resource
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    Served,
    eventually,
    file_config,
    half_reply,
    pattern,
    provider_process,
    python_process,
    run_python,
)
from warabi import errors
from warabi.client import Client
from warabi.engine import Address, Engine, client, server
from warabi.protocol import address
from warabi.region import RegionID
from warabi.server import Provider
from warabi.target import opening
from warabi.target.config import FileConfig

# Addresses


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ("na+sm", r"na\+sm://\d+-\d+"),
        ("na+sm://", r"na\+sm://\d+-\d+"),
        ("tcp", r"tcp://127\.0\.0\.1:\d+"),
        ("tcp://", r"tcp://127\.0\.0\.1:\d+"),
        ("ofi+tcp", r"ofi\+tcp://127\.0\.0\.1:\d+"),
        ("ofi+tcp://", r"ofi\+tcp://127\.0\.0\.1:\d+"),
        ("ofi+tcp://127.0.0.1", r"ofi\+tcp://127\.0\.0\.1:\d+"),
        ("ofi+tcp://127.0.0.1:0", r"ofi\+tcp://127\.0\.0\.1:\d+"),
        ("ofi+tcp://localhost:0", r"ofi\+tcp://localhost:\d+"),
        ("ofi+tcp;ofi_rxm://127.0.0.1:0", r"ofi\+tcp;ofi_rxm://127\.0\.0\.1:\d+"),
        ("tcp://[::1]:0", r"tcp://\[::1\]:\d+"),
    ],
)
def test_addresses_that_others_can_connect_to(asked: str, got: str) -> None:
    with Engine(asked, server) as engine, Provider(engine, 1, MEMORY), Engine(asked, client) as own:
        text = str(engine.addr())
        assert re.fullmatch(got, text)
        assert engine.listening
        assert not own.listening
        handle = Client(own).make_target_handle(text, 1)
        assert handle.read(handle.create_and_write(b"x"), 0, 1) == b"x"


def _congestion_control(connection: socket.socket) -> bytes:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


def _ends(stack: contextlib.ExitStack, port: int) -> list[socket.socket]:
    """This process's ends of connections to that port, until *stack* is closed."""
    found = []
    links = {name: f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")}
    for name, link in links.items():
        with contextlib.suppress(OSError):  # gone, or not connected
            if not os.readlink(link).startswith("socket:"):
                continue
            end = stack.enter_context(socket.socket(fileno=os.dup(int(name))))
            ports = {end.getsockname()[1:2], end.getpeername()[1:2]}
            if end.family == socket.AF_INET and (port,) in ports:
                found.append(end)
    return found


def test_a_connection_within_a_host_is_not_paced() -> None:
    with Engine("tcp", server) as engine, Provider(engine, 1, MEMORY), Engine("tcp", client) as own:
        text = str(engine.addr())
        Client(own).make_target_handle(text, 1).create(1)
        with contextlib.ExitStack() as stack:
            ends = _ends(stack, int(text.rsplit(":", 1)[1]))
            assert [_congestion_control(end) for end in ends] == [b"reno", b"reno"]


def test_other_connections_have_what_the_system_has() -> None:
    with (
        socket.create_server(("127.0.0.2", 0)) as listener,
        socket.create_connection(listener.getsockname(), source_address=("127.0.0.1", 0)) as end,
    ):
        before = _congestion_control(end)
        address.prepare(end)
        assert _congestion_control(end) == before
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    "wrong",
    ["", "://", "nothing", "verbs://", "mlx5", "na+sm://x", "na+sm://1", "na+sm://../../x-1",
     "tcp://host:port", "tcp://h:1:2", "tcp://127.0.0.1:65536", "tcp://127.0.0.1:-1",
     "tcp://no.such.host.invalid:0", "tcp://a..b:0", "tcp://" + "x" * 100 + ":0",
     "tcp://192.0.2.1:0", None, 5, b"tcp"],
)  # fmt: skip
def test_wrong_addresses_to_listen_at(wrong: Any) -> None:
    with pytest.raises((errors.ConfigError, errors.PermissionDenied)):
        Engine(wrong, server)


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ("", errors.ConfigError),
        ("na+sm", errors.ConfigError),
        ("tcp", errors.ConfigError),
        ("tcp://127.0.0.1", errors.ConfigError),
        ("tcp://127.0.0.1:0", errors.ConfigError),
        ("verbs://1:2", errors.ConfigError),
        ("na+sm://1-77777", errors.ConnectionFailed),
        ("na+sm://4999999-0", errors.ConnectionFailed),
        ("na+sm://" + "9" * 200 + "-0", errors.ConnectionFailed),
        ("tcp://127.0.0.1:1", errors.ConnectionFailed),
        ("tcp://a..b:1", errors.ConnectionFailed),
        ("tcp://no.such.host.invalid:1", errors.ConnectionFailed),
    ],
)
def test_wrong_addresses_to_connect_to(
    client_engine: Engine, wrong: str, kind: type[errors.Exception]
) -> None:
    with pytest.raises(kind):
        Client(client_engine).make_target_handle(wrong, 1)


@pytest.mark.parametrize("provider_id", [-1, 65536, 1.0, "1", None, True])
def test_wrong_provider_ids(engine: Engine, provider_id: Any) -> None:
    with pytest.raises(errors.ConfigError, match="provider_id"):
        Provider(engine, provider_id, MEMORY)
    with pytest.raises(errors.ConfigError, match="provider_id"):
        Client(engine).make_target_handle(str(engine.addr()), provider_id)


def test_unknown_provider(engine: Engine, client_engine: Engine) -> None:
    with Provider(engine, 65535, MEMORY):
        for any_engine in (engine, client_engine):
            with pytest.raises(errors.ProviderNotFound, match="provider 4 at na"):
                Client(any_engine).make_target_handle(str(engine.addr()), 4)
            assert Client(any_engine).make_target_handle(str(engine.addr()), 65535)


def test_port_in_use(engine: Engine) -> None:
    with Engine("tcp") as first, pytest.raises(errors.ConfigError, match="in use"):
        Engine(str(first.addr()))


def test_listening_beyond_loopback_must_be_allowed() -> None:
    with pytest.raises(errors.PermissionDenied, match="insecure"):
        Engine("tcp://0.0.0.0:0")
    with pytest.raises(errors.PermissionDenied):
        Engine("tcp://[::]:0")
    with (
        Engine("tcp://0.0.0.0:0", config={"insecure": True}) as engine,
        Provider(engine, 1, MEMORY),
        Engine("tcp", client) as own,
    ):
        port = str(engine.addr()).rsplit(":", 1)[1]
        assert Client(own).make_target_handle(f"tcp://127.0.0.1:{port}", 1).create(1)


@pytest.mark.parametrize(
    "config",
    ["{", "[]", 5, None, "[" * 100_000, {"timeout": 0}, {"timeout": -1}, {"timeout": "1"},
     {"timeout": True}, {"timeout": float("nan")}, {"timeout": float("inf")},
     {"timeout": 10**400}, {"insecure": 1}],
)  # fmt: skip
def test_wrong_engine_configurations(config: Any) -> None:
    with pytest.raises(errors.ConfigError):
        Engine("na+sm", client, config=config)


def test_arguments_for_compatibility() -> None:
    with Engine(
        addr="na+sm",
        mode=server,
        use_progress_thread=True,
        num_rpc_threads=4,
        config=json.dumps({"argobots": {"pools": []}}),
    ) as engine:
        assert engine.listening
    with pytest.raises(errors.ConfigError):
        Engine("na+sm", "server")  # type: ignore[arg-type]


def test_address_objects(engine: Engine) -> None:
    mine = engine.addr()
    assert isinstance(mine, Address)
    assert mine == engine.address == engine.lookup(str(mine))
    assert mine != engine.lookup("tcp://127.0.0.1:5")
    assert len({mine, engine.address}) == 1
    assert str(mine) in repr(mine)
    with pytest.raises(errors.ConfigError):
        engine.lookup("nowhere")


def test_provider_needs_a_serving_engine(client_engine: Engine) -> None:
    wrong: list[Any] = [client_engine, None, "na+sm"]
    for engine in wrong:
        with pytest.raises(errors.ConfigError, match="server mode"):
            Provider(engine, 1, MEMORY)
    with pytest.raises(errors.ConfigError, match="expected an Engine"):
        Client(None)  # type: ignore[arg-type]


# The end


def test_finalize_is_idempotent_and_ends_everything(tmp_path: Path) -> None:
    calls = []
    engine = Engine("na+sm")
    provider = Provider(engine, 1, file_config(tmp_path / "target"))
    engine.on_prefinalize(lambda: calls.append("before"))
    engine.on_finalize(lambda: calls.append("after"))
    handle = Client(engine).make_target_handle(str(engine.addr()), 1)
    region = handle.create_and_write(b"kept")
    with Engine("na+sm", client) as own:
        remote = Client(own).make_target_handle(str(engine.addr()), 1)
        for _ in range(3):
            engine.finalize()
        assert calls == ["before", "after"]
        assert not engine.listening
        assert not provider
        for lost in (handle, remote):
            with pytest.raises(errors.Exception):
                lost.read(region, 0, 4)
        with pytest.raises(errors.ConnectionFailed):
            Client(own).make_target_handle(str(engine.addr()), 1)
    with pytest.raises(errors.ConfigError, match="finalized"):
        Provider(engine, 2, MEMORY)
    with pytest.raises(errors.ConnectionFailed, match="finalized"):
        remote.create(1)
    with opening.open_file(FileConfig(path=str(tmp_path / "target"))) as target:
        assert target.read(region, 0, 4) == b"kept"


def test_finalize_from_many_threads_at_once() -> None:
    engine = Engine("na+sm")
    Provider(engine, 1, MEMORY)
    threads = [threading.Thread(target=engine.finalize) for _ in range(8)]
    for thread in threads:
        thread.start()
    engine.wait_for_finalize()
    for thread in threads:
        thread.join(PATIENCE)


def test_context_managers_close_in_order(tmp_path: Path) -> None:
    config = file_config(tmp_path / "target")
    with Engine("na+sm") as engine, Provider(engine, 1, config) as provider, Client(engine) as made:
        assert provider
        assert json.loads(made.get_config())["timeout"] == 60
        region = made.make_target_handle(str(engine.addr()), 1).create(5)
    assert not provider
    with Engine("na+sm") as engine, Provider(engine, 2, config), Client(engine) as made:
        assert made.make_target_handle(str(engine.addr()), 2).size(region) == 5


def test_nothing_begins_once_an_engine_is_being_finalized() -> None:
    """Else threads that go on calling would keep it from ending; what is under way still ends."""
    with provider_process("tcp", MEMORY) as served, Engine("tcp", client) as engine:
        handle = Client(engine).make_target_handle(served.address, 1)
        region = handle.create(5)
        served.stop()
        first = handle.write_async(region, 0, b"first")
        thread = threading.Thread(target=engine.finalize)
        thread.start()

        def refused() -> bool:
            try:
                handle.read_async(region, 0, bytearray(5))
            except errors.ConnectionFailed:
                return True
            return False

        eventually(refused)
        assert not first.completed()
        served.signal(signal.SIGCONT)
        first.wait()
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_wait_for_finalize(tmp_path: Path, number: signal.Signals) -> None:
    config = file_config(tmp_path / "target")
    with provider_process("na+sm", config) as served, Engine("na+sm", client) as engine:
        handle = Client(engine).make_target_handle(served.address, 1)
        region = handle.create_and_write(b"kept")
        served.signal(number)
        assert served.process.wait(PATIENCE) == 0
        with pytest.raises((errors.ConnectionLost, errors.ConnectionFailed)):
            handle.size(region)
    with opening.open_file(FileConfig(path=str(tmp_path / "target"))) as target:
        assert target.read(region, 0, 4) == b"kept"


def test_a_signal_that_comes_again_does_not_cut_the_end_short() -> None:
    script = """
import os, signal, threading, time
from warabi.engine import Engine
before = signal.getsignal(signal.SIGINT)
def send(number):
    while signal.getsignal(signal.SIGINT) is before:  # it does not wait yet
        time.sleep(0.001)
    os.kill(os.getpid(), number)
for number in (signal.SIGTERM, signal.SIGINT):
    engine = Engine("na+sm")
    engine.on_prefinalize(lambda: os.kill(os.getpid(), number))
    threading.Thread(target=send, args=[number]).start()
    engine.wait_for_finalize()
    print(engine.listening)
"""
    done = run_python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\nFalse\n", "")


def test_remote_shutdown() -> None:
    with provider_process("ofi+tcp", MEMORY) as served, Engine("tcp", client) as engine:
        engine.lookup(served.address).shutdown()
        assert served.process.wait(PATIENCE) == 0
        with pytest.raises((errors.ConnectionFailed, errors.ConnectionLost)):
            engine.lookup(served.address).shutdown()


def test_remote_shutdown_whether_or_not_a_provider_is_held(client_engine: Engine) -> None:
    for hold in (True, False):
        engine = Engine("na+sm")
        provider = Provider(engine, 1, MEMORY) if hold else None
        with pytest.raises(errors.PermissionDenied, match="not enabled"):
            client_engine.lookup(str(engine.addr())).shutdown()
        engine.enable_remote_shutdown()
        client_engine.lookup(str(engine.addr())).shutdown()
        engine.wait_for_finalize()
        assert not provider
        assert not engine.listening


def test_collected_engine_is_finalized(runtime_directory: Path) -> None:
    before = set(os.listdir(runtime_directory))
    for _ in range(3):
        engine = Engine("na+sm")
        Provider(engine, 1, MEMORY)
        del engine
    cycle: list[Any] = [Engine("na+sm")]
    cycle.append(cycle)
    del cycle
    gc.collect()
    eventually(lambda: set(os.listdir(runtime_directory)) == before)
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "warabi-engine"])


def test_engine_lives_as_long_as_what_was_made_with_it() -> None:
    provider = Provider(Engine("na+sm"), 1, MEMORY)
    handle = Client(Engine("na+sm", client)).make_target_handle(str(provider._engine.addr()), 1)
    gc.collect()
    assert provider
    assert handle.read(handle.create_and_write(b"x"), 0, 1) == b"x"


def test_collected_wherever_the_collector_runs() -> None:
    """In the engine's own loop, or in a call that holds the lock of the target to be closed."""
    script = """
import gc, sys, threading
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.server import Provider
gc.set_threshold(5)
for i in range(20):
    engine = Engine("na+sm")
    provider = Provider(engine, 1, {"target": {"type": "memory"}})
    handle = Client(engine).make_target_handle(str(engine.addr()), 1)
    remote = Client(Engine("na+sm", client)).make_target_handle(str(engine.addr()), 1)
    cycle = [engine, provider, handle, remote]
    cycle.append(cycle)
    keep = handle._link
    del engine, provider, handle, remote, cycle
    try:
        for _ in range(500):
            keep.call("list", keep.call("create", 1), 5)
    except Exception as error:
        assert type(error).__name__ == "TargetNotFound", error
"""
    done = run_python(script)
    assert (done.returncode, done.stderr) == (0, "")


NEVER_FINALIZED = """
import sys
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.server import Provider
engine = Engine(sys.argv[1])
config = {"path": sys.argv[2], "create_if_missing": True}
provider = Provider(engine, 1, {"target": {"type": "file", "config": config}})
own = engine if sys.argv[3] == "same" else Engine(sys.argv[1], client)
handle = Client(own).make_target_handle(str(engine.addr()), 1)
print(handle.create_and_write(b"persisted" * 10_000, persist=True).hex())
print(handle.create_and_write(b"unpersisted" * 10_000).hex())
dropped = handle.write_async(handle.create(5_000_000), 0, bytes(5_000_000))
if sys.argv[4] == "exit":
    sys.exit(0)
"""


@pytest.mark.parametrize("transport", ["na+sm", "tcp"])
@pytest.mark.parametrize("own", ["same", "other"])
@pytest.mark.parametrize("end", ["exit", "fall off the end"])
def test_exit_without_finalize(
    tmp_path: Path, runtime_directory: Path, transport: str, own: str, end: str
) -> None:
    done = run_python(NEVER_FINALIZED, transport, str(tmp_path / "target"), own, end)
    assert (done.returncode, done.stderr) == (0, "")
    regions = [RegionID(bytes.fromhex(line)) for line in done.stdout.split()]
    with opening.open_file(FileConfig(path=str(tmp_path / "target"))) as target:
        assert target.read(regions[0], 0, 90_000) == b"persisted" * 10_000
        assert target.read(regions[1], 0, 110_000) == b"unpersisted" * 10_000


# Peers that go away


def test_killed_provider_fails_every_call(local_process: Served) -> None:
    with provider_process("na+sm", MEMORY) as served, Engine("na+sm", client) as engine:
        handle = Client(engine).make_target_handle(served.address, 1)
        region = handle.create(1000)
        served.kill()
        pending = None
        with pytest.raises(errors.ConnectionLost):
            pending = handle.read_async(region, 0, bytearray(1000))
            pending.wait()
        for _ in range(2):
            with pytest.raises((errors.ConnectionFailed, errors.ConnectionLost)):
                handle.read(region, 0, 1000)
        if pending is not None:
            assert pending.completed()
        # Others are not affected.
        assert Client(engine).make_target_handle(local_process.address, 1).create(1)


@pytest.mark.parametrize("transport", ["na+sm", "tcp"])
def test_a_killed_provider_wakes_all_waiting_calls(transport: str) -> None:
    with provider_process(transport, MEMORY) as served, Engine(transport, client) as engine:
        handle = Client(engine).make_target_handle(served.address, 1)
        region = handle.create(1000)
        served.stop()
        requests = [handle.read_async(region, 0, bytearray(1000)) for _ in range(8)]
        outcomes: list[object] = []

        def wait(call: Callable[[], object]) -> None:
            try:
                outcomes.append(call())
            except errors.Exception as error:
                outcomes.append(type(error))

        threads = [threading.Thread(target=wait, args=(r.wait,)) for r in requests]
        big = bytes(50 << 20)  # more than the sockets hold: this one cannot even be sent
        threads.append(threading.Thread(target=wait, args=(lambda: handle.create_and_write(big),)))
        for thread in threads:
            thread.start()
        eventually(lambda: all(thread.is_alive() for thread in threads))
        served.kill()
        for thread in threads:
            thread.join(PATIENCE)
        assert set(outcomes) <= {errors.ConnectionLost, errors.ConnectionFailed}
        assert len(outcomes) == 9


def test_provider_that_comes_back_is_found_again(tmp_path: Path) -> None:
    config = file_config(tmp_path / "target")
    with Engine("tcp", client) as engine:
        with provider_process("tcp", config) as served:
            text = served.address
            handle = Client(engine).make_target_handle(text, 1)
            region = handle.create_and_write(b"x", persist=True)
            served.kill()
        with pytest.raises(errors.Exception):
            handle.read(region, 0, 1)
        with provider_process(text, config):
            assert handle.read(region, 0, 1) == b"x"


def test_stopped_peer_times_out_and_is_usable_again() -> None:
    with provider_process("na+sm", MEMORY) as served:
        settings = {"timeout": 1.0}
        with Engine("na+sm", client, config=settings) as engine:
            handle = Client(engine).make_target_handle(served.address, 1)
            region = handle.create_and_write(b"1234")
            served.stop()
            buffer = bytearray(4)
            request = handle.read_async(region, 0, buffer)
            with pytest.raises(errors.TimedOut, match=r"read.*1 s"):
                request.wait()
            with pytest.raises(errors.TimedOut):
                handle.size(region)
            with pytest.raises(errors.Exception), Engine("na+sm", client, config=settings) as late:
                Client(late).make_target_handle(served.address, 1)
            served.signal(signal.SIGCONT)
            assert handle.read(region, 0, 4) == b"1234"
            assert buffer == bytes(4), "the late reply touched the buffer"


def test_a_partial_reply_times_out() -> None:
    with half_reply() as (text, provider):
        with Engine("tcp", client, config={"timeout": 1.0}) as engine:
            handle = Client(engine).make_target_handle(text, 1)
            buffer = bytearray(100_000)
            with pytest.raises((errors.TimedOut, errors.ConnectionLost)):
                handle.read_into(RegionID(), 0, buffer)
            assert not buffer.endswith(b"r")
            buffer[:] = bytes(100_000)
            provider.send_rest()
        assert buffer == bytes(100_000)


def test_peer_that_accepts_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        text = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with (
            Engine("tcp", client, config={"timeout": 0.2}) as engine,
            pytest.raises(errors.TimedOut, match="the peer does not respond"),
        ):
            Client(engine).make_target_handle(text, 1)


@pytest.mark.parametrize(
    "greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x93WARABI\n\xff", b""]
)
def test_peer_that_speaks_another_protocol(greeting: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(greeting)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1000):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        text = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with (
            Engine("tcp", client) as engine,
            pytest.raises((errors.ProtocolError, errors.ConnectionLost)),
        ):
            Client(engine).make_target_handle(text, 1)
        thread.join(PATIENCE)


def test_descriptors_beyond_select(local_process: Served) -> None:
    """A process with many descriptors: nothing here may depend on select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.enter_context(open(os.devnull, "rb"))
        with Engine("na+sm", client) as engine:
            handle = Client(engine).make_target_handle(local_process.address, 1)
            region = handle.create(6 << 20)
            handle.write(region, 0, pattern(6 << 20))
            handle.write_async(region, 0, pattern(6 << 20))  # under way when it closes
    assert (soft, hard) == resource.getrlimit(resource.RLIMIT_NOFILE)


def test_many_threads_share_a_connection(local_process: Served) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(30):
                size = (seed * 7919 + i * 104_729) % 200_000
                region = handle.create_and_write(pattern(size, seed))
                assert handle.read(region, 0, size) == pattern(size, seed)
                handle.erase(region)
        except BaseException as error:
            failures.append(error)

    with Engine("na+sm", client) as engine:
        handle = Client(engine).make_target_handle(local_process.address, 1)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert failures == []


# Forks


@pytest.mark.parametrize(
    "end", ["os._exit(0)", "sys.exit(0)", "del engine, provider, handle; gc.collect(); sys.exit(0)",
            "provider.close(); engine.finalize(); sys.exit(0)",
            "engine.__exit__(); provider.__exit__(); sys.exit(0)"],
)  # fmt: skip
def test_forked_child_leaves_the_parents_target_alone(tmp_path: Path, end: str) -> None:
    script = f"""
import gc, os, signal, sys, warnings
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.server import Provider
engine = Engine("na+sm")
config = {{"path": sys.argv[1], "create_if_missing": True}}
provider = Provider(engine, 1, {{"target": {{"type": "file", "config": config}}}})
handle = Client(engine).make_target_handle(str(engine.addr()), 1)
before = handle.create_and_write(b"before", persist=True)
child = os.fork()
if child == 0:
    {end}
assert os.waitpid(child, 0)[1] == 0
after = handle.create_and_write(b"after!", persist=True)
handle.link_name(before, "/named")
handle.persist(before, 0, 6)
remote = Client(Engine("na+sm", client))
remote = remote.make_target_handle(str(engine.addr()), 1)
assert remote.read(before, 0, 6) == b"before"
print(before.hex(), after.hex(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_python(script, str(tmp_path / "target"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    before, after = (RegionID(bytes.fromhex(word)) for word in done.stdout.split())
    with opening.open_file(FileConfig(path=str(tmp_path / "target"))) as target:
        assert target.read(before, 0, 6) == b"before"
        assert target.read(after, 0, 6) == b"after!"
        assert target.namespace.open_name("/named") == before


def test_forked_child_has_connections_of_its_own(local_process: Served) -> None:
    script = """
import os, sys
from warabi.client import Client
from warabi.engine import Engine, client
engine = Engine("na+sm", client)
handle = Client(engine).make_target_handle(sys.argv[1], 1)
region = handle.create(8)
children = []
for i in range(4):
    child = os.fork()
    if child == 0:
        for _ in range(50):
            handle.write(region, i, bytes([i]))
            assert handle.read(region, i, 1) == bytes([i])
        sys.exit(0)
    children.append(child)
for _ in range(50):
    handle.write(region, 4, bytes([4]))
    assert handle.read(region, 4, 1) == bytes([4])
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
assert handle.read(region, 0, 5) == bytes(range(5))
"""
    done = run_python(script, local_process.address)
    assert (done.returncode, done.stderr) == (0, "")


def test_socket_of_a_killed_process_is_cleared_away(runtime_directory: Path) -> None:
    with provider_process("na+sm", MEMORY) as served:
        name = address.parse(served.address).name
        served.kill()
        assert f"{name}.sock" in os.listdir(runtime_directory)
    with Engine("na+sm"):
        assert f"{name}.sock" not in os.listdir(runtime_directory)


def test_provider_process_that_loses_its_parent_ends() -> None:
    """Of the tests' own helper: nothing outlives a test run that was killed."""
    with python_process("tests/support/serve.py", "na+sm", json.dumps({"1": MEMORY})) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.stdin.close()
        process.stdin = None
        assert process.wait(PATIENCE) == 0


def test_the_calls_of_margo_that_its_users_know(caplog: pytest.LogCaptureFixture) -> None:
    with Engine("na+sm", client, config={"timeout": 5, "share": False}) as engine:
        assert engine.config == {"timeout": 5.0, "deadline": None, "share": False}
        address = engine.addr()
        assert address.copy() == address
        assert address.copy() is not address
        level = engine.logger.logger.level
        try:
            engine.logger.set_log_level("info")
            engine.logger.trace("hidden")
            engine.logger.set_log_level("TRACE")
            engine.logger.trace("step %d", 1)
            with pytest.raises(errors.ConfigError, match="'loud' is not a level"):
                engine.logger.set_log_level("loud")
        finally:
            engine.logger.set_log_level(level)
        assert [(one.levelname, one.getMessage()) for one in caplog.records] == [
            ("TRACE", "step 1")
        ]
