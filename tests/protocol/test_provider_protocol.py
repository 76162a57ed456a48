"""A real provider, over real sockets, against peers that break the rules.

Whatever one peer does, another client of the same provider goes on getting right answers, and
what the bad one held is given back when it goes.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    RawPeer,
    Served,
    eventually,
    file_config,
    memories,
    pattern,
    provider_process,
    raw_connection,
)
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.protocol import wire
from warabi.provider import channel as channel_module
from warabi.server import Provider

OPENING = wire.opening(wire.Limits())
PREFIX = struct.Struct("<IQ")


class Bystander:
    """Another client, which goes on working until told to stop, and checks what it gets."""

    def __init__(
        self, address: str, provider_id: int, config: dict[str, Any] | None = None
    ) -> None:
        self.rounds = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._engine = Engine(address.split("://")[0], client, config=config or {})
        self._handle = Client(self._engine).make_target_handle(address, provider_id)
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                size = (self.rounds * 104_729) % 150_000
                region = self._handle.create_and_write(pattern(size))
                assert self._handle.read(region, 0, size) == pattern(size)
                assert self._handle.size(region) == size
                self._handle.erase(region)
                self.rounds += 1
        except BaseException as error:
            self.failure = error

    def goes_on(self) -> None:
        """Wait until it has done something more."""
        rounds = self.rounds
        eventually(lambda: self.rounds > rounds + 1 or self.failure)
        assert self.failure is None

    def close(self) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)
        self._engine.finalize()
        assert self.failure is None


class Place(NamedTuple):
    """Where a provider is, and what its engine's configuration has for its peers."""

    address: str
    config: dict[str, Any]


@pytest.fixture(params=["na+sm memory", "na+sm file", "tcp memory", "tcp file", "tls file"])
def served(request: pytest.FixtureRequest, tmp_path: Path, tls: dict[str, Any]) -> Iterator[Place]:
    """A provider, 1, that a bystander uses; checked for leaks at the end."""
    transport, backend = request.param.split()
    config = tls if transport == "tls" else {}
    with Engine(transport.replace("tls", "tcp"), config=config) as engine:
        configs: dict[str, dict[str, Any]] = {"memory": MEMORY, "file": file_config(tmp_path / "t")}
        with Provider(engine, 1, configs[backend]):
            bystander = Bystander(str(engine.addr()), 1, config)
            try:
                bystander.goes_on()
                before = _sockets()
                yield Place(str(engine.addr()), config)
                bystander.goes_on()
                eventually(lambda: _sockets() <= before)
            finally:
                bystander.close()


def _sockets() -> int:
    """How many sockets this process has open."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return count


def _ends(connection: socket.socket) -> bool:
    """Whether the provider closes the connection, whatever it says before."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(65536):
            pass
    return True


def test_random_bytes(served: Place) -> None:
    generator = random.Random(1)
    for _ in range(50):
        with raw_connection(served.address, served.config) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(generator.randbytes(generator.randint(1, 5000)))
            assert _ends(connection)


def test_random_bytes_after_the_opening(served: Place) -> None:
    generator = random.Random(2)
    for _ in range(50):
        with raw_connection(served.address, served.config) as connection:
            body = generator.randbytes(generator.randint(0, 500))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(OPENING + PREFIX.pack(len(body), 0) + body)
                connection.shutdown(socket.SHUT_WR)
            assert _ends(connection)


@pytest.mark.parametrize(
    ("opening", "message"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"the peer uses another protocol"),
        (b"\x16\x03\x01", b"as TLS does"),
        (wire.MAGIC + b"\xff\xff\xff\xff", b"the limit is 4096"),
        (wire.MAGIC + struct.pack("<I", 1) + b"\xc1", b"malformed"),
        (OPENING.replace(b"\xa7version\x01", b"\xa7version\x00"), b"uses protocol version 0"),
        (OPENING.replace(b"\xa7version\x01", b"\xa7version\x02"), b"uses protocol version 2"),
        (OPENING.replace(b"\xa7payload", b"\xa7pAyload"), b"limit 'payload' is None"),
        (OPENING + PREFIX.pack(1, 0) + b"\xc1", b"malformed"),
        (OPENING + PREFIX.pack(5, 1 << 40), b"the limit is"),
    ],
)
def test_wrong_openings(served: Place, opening: bytes, message: bytes) -> None:
    """Each is told what is wrong, though it may not understand."""
    with raw_connection(served.address, served.config) as connection:
        connection.sendall(opening)
        said = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(65536):
                said += data
        assert message in said


def test_a_peer_that_closes_within_a_message(served: Place) -> None:
    header = [1, 1, "create_and_write", [False], None]
    message = OPENING + wire.frame(header, 1000) + bytes(1000)
    for end in (*range(0, 60, 7), len(OPENING), len(message) - 1000, len(message) - 1):
        for polite in (True, False):
            with raw_connection(served.address, served.config) as connection:
                connection.sendall(message[:end])
                if polite:
                    connection.shutdown(socket.SHUT_WR)
                    assert _ends(connection)


@pytest.mark.parametrize(
    ("header", "payload"), [((1 << 20) + 1, 0), (0xFFFFFFFF, 0), (5, (4 << 20) + 1), (5, 1 << 63)]
)
def test_oversized_frames(served: Place, header: int, payload: int) -> None:
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        connection.sendall(PREFIX.pack(header, payload))
        refusal = peer.reply()
        assert refusal[0] == 0
        assert "the limit is" in refusal[3][1]
        assert peer.closed()


@pytest.mark.parametrize(
    "request_",
    [
        None, 5, "x", {}, [], [1], [1, 1, "size", []], [1, 1, "size", [], None, 1],
        ["1", 1, "size", [], None], [1, "1", "size", [], None], [True, 1, "size", [], None],
        [1, 1, 5, [], None], [1, 1, "size", [], "text"], [1, 1, "size", [], [1]],
        msgpack.ExtType(5, b""), [[[[[[]]]]]],
    ],
    ids=repr,
)  # fmt: skip
def test_messages_that_are_no_requests(served: Place, request_: Any) -> None:
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        body = msgpack.packb(request_)
        connection.sendall(PREFIX.pack(len(body), 0) + body)
        assert peer.reply()[0] == 0
        assert peer.closed()


REGION = b"r" * 16


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("nothing", []), ("__class__", []), ("close", []), ("size", None), ("size", []),
        ("size", [REGION, 1]), ("size", [5]), ("size", ["r" * 16]), ("size", [b"r" * 15]),
        ("create", [1.5]), ("create", [True]), ("create", [None]), ("create", ["1"]),
        ("create", [(1 << 64) - 1]), ("create", [-1]), ("create", [(1 << 63) - 1]),
        ("list", [b"\xff" * 16, -1]), ("list", [REGION, 1 << 63]),
        ("read", [REGION, 0]), ("read", [REGION, 0, (4 << 20) + 1, False, False]),
        ("read", [REGION, 0, -1, False, False]), ("read", [REGION, 0, 4 << 20, True, False]),
        ("read", [REGION, -5, 5, False, True]), ("write", [REGION, 0, 0, False]),
        ("write", [REGION, -1, False, True]), ("write", [REGION, (1 << 63) - 1, False, True]),
        ("persist", [REGION, -1, 1]), ("resize", [REGION, -1]), ("create_and_write", []),
        ("create_and_write", [1]), ("resolve", [b"/"]), ("resolve", ["/" + "x" * 500_000]),
        ("lookup", [-1, b"x"]), ("lookup", [1, "x"]), ("lookup", [(1 << 63) - 1, b"x"]),
        ("mkdir", [1, b"", 0, 0, 0, 0]), ("mkdir", [1, b"a/b", 0, 0, 0, 0]),
        ("mknod", [1, b"x", 0o170000, 0, 0, 0, False, 0]), ("symlink", [1, b"l", b"", 0, 0]),
        ("rename", [1, b"x", 1, b"y", 99, False]), ("link", [1, 1, b"root"]),
        ("getxattr", [1, b"user.none"]), ("removexattr", [1, b"user.none"]),
        ("readlink", [1]), ("rmdir", [1, b"nothing", False]), ("unlink", [1, b"nothing", True]),
        ("setattr", [-5, None, None, None, None, None]), ("pin", [77]),
        ("open_name", ["\ud800".encode("utf-8", "surrogatepass")]), ("shutdown", []),
    ],
)  # fmt: skip
def test_wrong_requests_fail_and_the_connection_lives(
    served: Place, name: str, arguments: Any
) -> None:
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        reply = peer.call([7, 1, name, arguments, None])
        assert reply[:3] == [7, None, None]
        assert reply[3][0] != "failed", "a defect in the provider"
        assert peer.call([8, 1, "ping", [], None]) == [8, None]


@pytest.mark.parametrize("provider_id", [0, 2, 65535, -1, 1 << 40])
def test_unknown_providers(served: Place, provider_id: int) -> None:
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        for name in ("ping", "create"):
            reply = peer.call([7, provider_id, name, [5] if name == "create" else [], None])
            assert reply[3][0] == "provider"


def test_payload_that_an_operation_does_not_want(served: Place) -> None:
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        refused = peer.call([1, 1, "create", [5], None], bytes(100_000))
        assert refused[3][0] == "protocol"
        assert "expected no payload" in refused[3][1]
        created = peer.call([1, 1, "create", [5], None])
        assert peer.call([2, 1, "size", [created[1]], None], b"x")[3][0] == "protocol"
        peer.send([3, 1, "write", [created[1], 0, False, False], b"eager"], b"lie")
        assert peer.reply() == [3, None]
        assert peer.call([4, 1, "read", [created[1], 0, 5, True, False], None])[2] == b"lie\0\0"


@pytest.mark.parametrize("size", [1, 100_000])
def test_payload_of_what_is_no_operation_on_a_target(served: Place, size: int) -> None:
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        for name in ("ping", "shutdown", "join", "grant", "make", "make_unnamed", "leave", "watch"):
            refused = peer.call([1, 1, name, [], None], bytes(size))
            assert refused[3][0] == "protocol"
            assert "expected no payload" in refused[3][1]
        assert peer.call([2, 1, "ping", [], None]) == [2, None]


@pytest.mark.parametrize("said", [0, 5, 99])
def test_payload_that_is_longer_than_it_says(served: Place, said: int) -> None:
    """What is too much is taken for the next message, which it is not."""
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        region = peer.call([1, 1, "create", [100], None])[1]
        header = [2, 1, "write", [region, 0, False, False], None]
        connection.sendall(wire.frame(header, said) + b"\xff" * (said + 12))
        replies = {reply[0]: reply for reply in (peer.reply(), peer.reply())}
        assert replies[2] == [2, None]
        assert "the limit is" in replies[0][3][1]
        assert peer.closed()


def test_payload_that_is_shorter_than_it_says(served: Place) -> None:
    """The next message is taken for the rest, and the end for a lie; nothing is written."""
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        region = peer.call([1, 1, "create", [100], None])[1]
        header = [2, 1, "write", [region, 0, False, False], None]
        connection.sendall(wire.frame(header, 100) + b"x" * 50)
        connection.sendall(wire.frame([3, 1, "ping", [], None]))
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        reply = peer.call([4, 1, "read", [region, 0, 100, True, False], None])
        assert reply[2] == bytes(100)


def test_same_id_twice_and_ids_of_any_size(served: Place) -> None:
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        peer.send([5, 1, "ping", [], None])
        peer.send([5, 1, "ping", [], None])
        assert [peer.reply(), peer.reply()] == [[5, None]] * 2
        for request_id in (-1, (1 << 64) - 1, -(1 << 63)):
            assert peer.call([request_id, 1, "ping", [], None]) == [request_id, None]


def test_peer_without_limits_gets_no_more_than_the_provider_has(served: Place) -> None:
    """A peer that claims to take anything must not make the provider allocate it."""
    endless = wire.Limits(header=1 << 62, payload=1 << 62, requests=1 << 62)
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection, endless)
        region = peer.call([1, 1, "create", [8 << 30], None])[1]
        for eager in (False, True):
            reply = peer.call([2, 1, "read", [region, 0, 8 << 30, eager, False], None])
            assert reply[3][0] == "protocol"
        assert peer.call([3, 1, "erase", [region], None]) == [3, None]


def test_peer_with_tiny_limits(served: Place) -> None:
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection, wire.Limits(header=64, payload=1, requests=1))
        region = peer.call([1, 1, "create", [10], None])[1]
        assert peer.call([2, 1, "read", [region, 0, 1, False, False], None]) == [2, None]
        assert peer.call([3, 1, "read", [region, 0, 2, False, False], None])[3][0] == "protocol"


def test_peer_that_never_reads() -> None:
    """It asks for far more than the sockets hold; its provider neither grows nor slows others."""
    with provider_process("na+sm", MEMORY) as process:
        bystander = Bystander(process.address, 1)
        try:
            with raw_connection(process.address) as connection:
                _ask_and_never_read(connection, process)
                bystander.goes_on()
            pid = process.process.pid
            eventually(lambda: process.descriptors() - len(memories(pid)) < 40)
            bystander.goes_on()
        finally:
            bystander.close()


def test_a_peer_that_never_reads_a_reply_from_disk(tmp_path: Path) -> None:
    with provider_process("tcp", file_config(tmp_path / "target")) as process:
        bystander = Bystander(process.address, 1)
        try:
            with raw_connection(process.address) as connection:
                _ask_and_never_read(connection, process)
                bystander.goes_on()
            bystander.goes_on()
        finally:
            bystander.close()


def _ask_and_never_read(connection: socket.socket, process: Served) -> None:
    peer = RawPeer(connection)
    region = peer.call([1, 1, "create", [4 << 20], None])[1]
    peer.call([1, 1, "write", [region, 0, False, False], None], bytes(4 << 20))
    before = resident(process)
    connection.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        for i in range(20_000):  # until the provider takes no more
            peer.send([i, 1, "read", [region, 0, 4 << 20, False, False], None])
    time.sleep(0.2)
    assert resident(process) - before < 200 << 20


def resident(process: Served) -> int:
    """Bytes of memory that a process occupies."""
    pages = Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


def test_many_silent_peers(served: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who connects and says nothing is shown the door."""
    monkeypatch.setattr(channel_module, "OPENING_PATIENCE", 1.0)
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(raw_connection(served.address, served.config)) for _ in range(30)
        ]
        slow = stack.enter_context(raw_connection(served.address, served.config))
        slow.sendall(OPENING[:5])
        for connection in (*silent, slow):
            assert _ends(connection)


def test_peer_that_opened_may_be_idle(served: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "OPENING_PATIENCE", 1.0)
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        time.sleep(1.2)
        assert peer.call([1, 1, "ping", [], None]) == [1, None]


def test_requests_of_a_peer_that_leaves_still_count(served: Place) -> None:
    """It sends a hundred writes and says goodbye before it has read one reply."""
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        region = peer.call([1, 1, "create", [100_000], None])[1]
        for i in range(100):
            header = [i, 1, "write", [region, i * 1000, False, False], None]
            peer.send(header, bytes([i]) * 1000)
        connection.shutdown(socket.SHUT_WR)
        assert _ends(connection)
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        data = b"".join(bytes([i]) * 1000 for i in range(100))

        def arrived() -> bool:
            return all(
                peer.call([2, 1, "read", [region, i * 1000, 2, True, False], None])[2]
                == data[i * 1000 :][:2]
                for i in range(100)
            )

        eventually(arrived)


def test_pins_of_a_peer_that_leaves_are_given_back(served: Place) -> None:
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        made = peer.call([1, 1, "mknod", [1, b"open", 0o600, 0, 0, 0, True, 0], None])[1]
        peer.call([2, 1, "unlink", [1, b"open", False], None])
        region = made[0].to_bytes(8, "big") + made[1].to_bytes(8, "big")
        assert peer.call([3, 1, "size", [region], None]) == [3, 0]  # still open
    with raw_connection(served.address, served.config) as connection:
        peer = RawPeer(connection)
        eventually(lambda: len(peer.call([4, 1, "size", [region], None])) == 4)


def test_provider_closes_with_peers_of_every_kind_connected(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with Engine("tcp") as engine, Provider(engine, 1, file_config(tmp_path / "target")):
            text = str(engine.addr())
            silent = stack.enter_context(raw_connection(text))
            half = stack.enter_context(raw_connection(text))
            half.sendall(OPENING + b"\1")
            opened = RawPeer(stack.enter_context(raw_connection(text)))
            deaf = RawPeer(stack.enter_context(raw_connection(text)))
            region = deaf.call([1, 1, "create", [4 << 20], None])[1]
            for i in range(50):
                deaf.send([i, 1, "read", [region, 0, 4 << 20, False, False], None])
            assert opened.call([1, 1, "ping", [], None]) == [1, None]
        assert _ends(silent)
        assert _ends(half)
        assert opened.closed()
        assert _ends(deaf.socket)
