"""Tokens, read-only access and permissions of peers."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import warabi.aio
from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    ROOT,
    RawPeer,
    Served,
    raw_connection,
)
from warabi import errors
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.protocol import handshake, wire
from warabi.protocol.auth import Peer, RequiredAccess, from_config, permit
from warabi.server import Provider

TOKEN = "correct horse battery staple"
READING = "a token for those who only read"
BOTH = {"token": TOKEN, "read_only_token": READING}
TRANSPORTS = pytest.mark.parametrize("transport", ["na+sm", "tcp", "tls"])


def settings(transport: str, tls: dict[str, Any], **config: Any) -> tuple[str, dict[str, Any]]:
    """What an engine is made with for a transport of :data:`TRANSPORTS`."""
    return ("tcp", {**tls, **config}) if transport == "tls" else (transport, config)


# Tokens


@TRANSPORTS
def test_the_right_token_is_accepted(transport: str, tls: dict[str, Any]) -> None:
    name, config = settings(transport, tls, token=TOKEN)
    with (
        Engine(name, config=config) as engine,
        Provider(engine, 1, MEMORY),
        Engine(name, client, config=config) as own,
    ):
        handle = Client(own).make_target_handle(str(engine.addr()), 1)
        region = handle.create_and_write(b"x" * 100_000)
        assert handle.read(region, 0, 100_000) == b"x" * 100_000


@TRANSPORTS
@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ({}, "requires a token, and none is configured"),
        ({"token": "another token than that"}, "token is wrong"),
        ({"token": TOKEN.upper()}, "token is wrong"),
    ],
)
def test_wrong_tokens(
    transport: str, tls: dict[str, Any], shown: dict[str, Any], message: str
) -> None:
    name, config = settings(transport, tls, token=TOKEN)
    with Engine(name, config=config) as engine, Provider(engine, 1, MEMORY):
        address = str(engine.addr())
        name, config = settings(transport, tls, **shown)
        with (
            Engine(name, client, config=config) as own,
            pytest.raises(errors.PermissionDenied, match=message),
        ):
            Client(own).make_target_handle(address, 1)

        async def connect() -> None:
            with pytest.raises(errors.PermissionDenied, match=message):
                async with warabi.aio.connect(
                    address, 1, tls=config.get("tls"), token=shown.get("token")
                ):
                    pass

        trio.run(connect)


def test_token_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    with (
        Engine("tcp", config={"token_file": str(path)}) as engine,
        Provider(engine, 1, MEMORY),
        Engine("tcp", client, config={"token": TOKEN}) as own,
    ):
        assert Client(own).make_target_handle(str(engine.addr()), 1).create(1)

        async def connect() -> None:
            async with warabi.aio.connect(str(engine.addr()), 1, token_file=path) as target:
                await target.create(1)

        trio.run(connect)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644, 0o777])
def test_a_token_file_readable_by_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(mode)
    with pytest.raises(errors.PermissionDenied, match=rf"token.*mode {mode:04o}.*chmod 600"):
        Engine("tcp", config={"token_file": str(path)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"token": 5}, r"\$\.token: expected text"),
        ({"token": "short"}, r"\$\.token: a token of 5 bytes, expected 16"),
        ({"token": "x" * 5000}, r"\$\.token: a token of 5000 bytes"),
        ({"token": " " * 20}, r"\$\.token: a token of 0 bytes"),
        ({"token": "", "insecure": True}, r"\$\.token: a token of 0 bytes"),
        ({"token": TOKEN, "token_file": "/x"}, r"\$\.token: cannot be combined with token_file"),
        ({"token_file": "/nowhere/token"}, r"\$\.token_file: /nowhere/token"),
        ({"token_file": 5}, r"\$\.token_file: 5 is not a path"),
        ({"token_file": "a\0b"}, r"\$\.token_file"),
        ({"read_only_token": "short"}, r"\$\.read_only_token: a token"),
        ({"token": TOKEN, "read_only_token": TOKEN}, r"\$\.read_only_token: is the same"),
        ({"token": None}, r"\$\.token: expected text"),
        ({"token_file": None}, r"\$\.token_file: None is not a path"),
        ({"read_only_token_file": ""}, r"\$\.read_only_token_file"),
        ({"tls": None}, r"\$\.tls: expected an object"),
        ({"tls": {"cert": "a"}}, r"\$\.tls\.cert: unknown key, did you mean certificate\?"),
        ({"tokenfile": "/x"}, r"\$\.tokenfile: unknown key, did you mean token_file\?"),
        ({"Token": TOKEN}, r"\$\.Token: unknown key, did you mean token\?"),
        ({"tls_cert": "/x"}, r"\$\.tls_cert: unknown key"),
        ({"limits": {"connection": 1}}, r"\$\.limits\.connection: unknown key, did you mean con"),
        ({"privileged": "all"}, r"\$\.privileged: unknown key"),
        ({"security": {"token": TOKEN}}, r"\$\.security: unknown key, expected"),
        (
            {"mercury": {"token": TOKEN}},
            r"\$\.mercury\.token: has no effect in mercury; move it one",
        ),
        ({"argobots": {"tls": {}}}, r"\$\.argobots\.tls: has no effect in argobots"),
        ({5: 5}, r"\$\.5: unknown key"),
        ({"insecure": "yes"}, r"\$\.insecure"),
    ],
)
def test_wrong_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        Engine("tcp", client, config=config)


def test_secrets_do_not_show() -> None:
    assert TOKEN not in repr(from_config(BOTH))
    assert READING not in repr(from_config(BOTH))


def test_beyond_loopback_with_a_token() -> None:
    for config in ({"token": TOKEN}, {"read_only_token": READING}):
        with (
            Engine("tcp://0.0.0.0:0", config=config) as engine,
            Provider(engine, 1, MEMORY),
            Engine("tcp", client, config=config) as own,
        ):
            port = str(engine.addr()).rsplit(":", 1)[1]
            assert Client(own).make_target_handle(f"tcp://127.0.0.1:{port}", 1)
    with pytest.raises(errors.PermissionDenied, match=r"tls.*token_file.*insecure"):
        Engine("tcp://0.0.0.0:0")


def test_client_with_a_token_wants_one_from_the_engine() -> None:
    """Otherwise whoever listens at the address could answer without knowing it."""
    with (
        Engine("tcp") as engine,
        Provider(engine, 1, MEMORY),
        Engine("tcp", client, config={"token": TOKEN}) as own,
        pytest.raises(errors.PermissionDenied, match="does not use one"),
    ):
        Client(own).make_target_handle(str(engine.addr()), 1)


def test_a_local_engine_may_have_no_token(engine: Engine) -> None:
    """Both sides know each other's user already."""
    with Provider(engine, 1, MEMORY), Engine("na+sm", client, config={"token": TOKEN}) as own:
        assert Client(own).make_target_handle(str(engine.addr()), 1).create(1)


Answer = Callable[[bytes, bytes], bytes]


@contextlib.contextmanager
def _impostor(answer: Answer) -> Iterator[str]:
    """The address of who says, after an opening that asks for a token, what *answer* gives."""

    def serve() -> None:
        with listener.accept()[0] as connection, contextlib.suppress(ConnectionError):
            own = wire.opening(wire.Limits(), {"nonce": bytes(32)})
            connection.sendall(own)
            seen = connection.recv(65536)
            connection.sendall(answer(seen, own))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(PATIENCE)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda seen, own: wire.frame(["proved", bytes(32)]), errors.PermissionDenied),
        (lambda seen, own: wire.frame(["proved", b""]), errors.PermissionDenied),
        (lambda seen, own: wire.frame(["proved", None]), errors.PermissionDenied),
        (
            lambda seen, own: wire.frame(
                ["proved", handshake.proof(b"some other token", "provider", seen, own)]
            ),
            errors.PermissionDenied,
        ),
        (  # the client's own proof, sent back to it
            lambda seen, own: wire.frame(
                ["proved", handshake.proof(TOKEN.encode(), "client", seen, own)]
            ),
            errors.PermissionDenied,
        ),
        (lambda seen, own: wire.frame([1, None]), errors.ProtocolError),
        (lambda seen, own: wire.frame("proved"), errors.ProtocolError),
        (lambda seen, own: wire.frame(["proved", b"x"], 5) + b"12345", errors.ProtocolError),
        (lambda seen, own: b"\xff" * 100, errors.ProtocolError),
        (lambda seen, own: b"", errors.Exception),
    ],
)
def test_an_engine_without_the_token_is_detected(
    answer: Answer, kind: type[errors.Exception]
) -> None:
    with (
        _impostor(answer) as address,
        Engine("tcp", client, config={"token": TOKEN, "timeout": 5}) as own,
        pytest.raises(kind),
    ):
        Client(own).make_target_handle(address, 1)


@pytest.fixture
def guarded() -> Iterator[str]:
    """The address of an engine with both tokens, which is checked to serve at the end, too."""
    with Engine("tcp", config=BOTH) as engine, Provider(engine, 1, MEMORY):
        yield str(engine.addr())
        with Engine("tcp", client, config={"token": TOKEN}) as own:
            assert Client(own).make_target_handle(str(engine.addr()), 1).create(1)


def _nonce() -> dict[str, Any]:
    return {"nonce": os.urandom(32)}


def _refusal(peer: RawPeer) -> str:
    """What the engine says before it ends the connection."""
    reply = peer.reply()
    assert reply[:3] == [0, None, None]
    assert peer.closed()
    code, text, _ = reply[3]
    return f"{code}: {text}"


@pytest.mark.parametrize(
    "more", [{}, {"nonce": b""}, {"nonce": bytes(31)}, {"nonce": "x" * 32}, {"nonce": None}]
)
def test_no_request_without_a_token(guarded: str, more: dict[str, Any]) -> None:
    with raw_connection(guarded) as connection:
        peer = RawPeer(connection, more=more)
        connection.sendall(wire.frame([1, 1, "create", [5], None]))
        assert "denied: this engine requires a token" in _refusal(peer)


@pytest.mark.parametrize(
    "header",
    [
        [1, 1, "ping", [], None], [1, 1, "shutdown", [], None], ["prove"], ["prove", b""],
        ["prove", None], ["prove", "x" * 32], ["prove", bytes(32)], ["prove", bytes(32), None],
        ["proved", bytes(32)], "prove", None, {}, 5, [[]],
    ],
    ids=repr,
)  # fmt: skip
def test_nothing_but_a_proof_after_the_opening(guarded: str, header: Any) -> None:
    with raw_connection(guarded) as connection:
        peer = RawPeer(connection, more=_nonce())
        peer.send(header)
        assert _refusal(peer).startswith("denied: ")


@pytest.mark.parametrize(("header", "payload"), [(4097, 0), (1 << 20, 0), (5, 1), (5, 4 << 20)])
def test_nothing_large_before_the_proof(guarded: str, header: int, payload: int) -> None:
    with raw_connection(guarded) as connection:
        peer = RawPeer(connection, more=_nonce())
        connection.sendall(header.to_bytes(4, "little") + payload.to_bytes(8, "little"))
        assert "the limit is" in _refusal(peer)


def test_proof_is_good_for_one_connection(guarded: str) -> None:
    more = _nonce()
    with raw_connection(guarded) as first, raw_connection(guarded) as second:
        peer = RawPeer(first, more=more)
        proof = handshake.proof(TOKEN.encode(), "client", peer.opening, peer.opened.raw)
        assert peer.call(["prove", proof])[0] == "proved"
        assert peer.call([1, 1, "ping", [], None]) == [1, None]
        again = RawPeer(second, more=more)
        assert again.opening == peer.opening
        again.send(["prove", proof])
        assert "token is wrong" in _refusal(again)


def test_engine_says_nothing_of_the_token_to_strangers(guarded: str) -> None:
    """Who listens, or connects, gets nothing that a guess could be tried on at leisure."""
    with raw_connection(guarded) as connection:
        peer = RawPeer(connection, more=_nonce())
        assert len(peer.opened.content["nonce"]) == 32
        peer.send(["prove", bytes(32)])
        assert "denied" in _refusal(peer)


def test_proof_covers_what_was_asked_for(guarded: str) -> None:
    """The openings are part of it: nobody between the two can take `read_only` out of one."""
    with raw_connection(guarded) as connection:
        peer = RawPeer(connection, more=_nonce())
        other = wire.opening(wire.Limits(), {**_nonce(), "read_only": True})
        proof = handshake.proof(TOKEN.encode(), "client", other, peer.opened.raw)
        peer.send(["prove", proof])
        assert "token is wrong" in _refusal(peer)


def test_read_only_token_under_its_own_key(guarded: str) -> None:
    with Engine("tcp", client, config={"read_only_token": READING}) as own:
        handle = Client(own).make_target_handle(guarded, 1)
        assert list(handle.list()) == []
        with pytest.raises(errors.PermissionDenied, match="read-only"):
            handle.create(1)


# The table, and the one question


def test_each_operation_requires_its_permission() -> None:
    nobody, local = Peer(), Peer(local=True)
    reader = Peer(local=True, read_only=True)
    for peer in (nobody, local, reader):
        permit(peer, "size", RequiredAccess.READ)
    for peer in (nobody, local):
        permit(peer, "create", RequiredAccess.CHANGE)
    with pytest.raises(errors.PermissionDenied, match="create: access is read-only"):
        permit(reader, "create", RequiredAccess.CHANGE)


def _opened(raw: bytes) -> wire.Event:
    connection = wire.ProtocolConnection(wire.Limits())
    connection.buffer()[: len(raw)] = raw
    connection.received(len(raw))
    return connection.next_event()


@pytest.mark.parametrize("token", [TOKEN, READING])
def test_both_sides_of_the_dialogue_without_sockets(token: str) -> None:
    provider = handshake.provider(wire.Limits(), from_config(BOTH), local=False)
    own = handshake.client(
        wire.Limits(requests=3), from_config({"token": token}), local=False, read_only=False
    )
    called, answered = next(own), next(provider)
    proof = own.send(_opened(answered))
    assert provider.send(_opened(called)) == b""
    with pytest.raises(StopIteration) as end:
        provider.send(wire.Message(wire.unpack(proof[12:]), 0))
    limits, peer, last = end.value.value
    assert limits == wire.Limits(requests=3)
    assert peer == Peer(read_only=token == READING)
    with pytest.raises(StopIteration) as end:
        own.send(wire.Message(wire.unpack(last[12:]), 0))
    assert end.value.value == wire.Limits()
    for said in (called, answered, proof, last):
        assert token.encode() not in said


# Pins


def test_a_client_cannot_release_pins_of_others(local_process: Served) -> None:
    """A pin keeps a file without a name for those who have it open."""
    with (
        raw_connection(local_process.address) as first,
        raw_connection(local_process.address) as second,
    ):
        holder = RawPeer(first)
        made = holder.call([1, 1, "mknod", [1, b"held", 0o600, 0, 0, 0, True, 0], None])[1]
        region = made[0].to_bytes(8, "big") + made[1].to_bytes(8, "big")
        holder.call([2, 1, "unlink", [1, b"held", False], None])
        other = RawPeer(second, more={"read_only": True})
        for count in (1, 0, -1, 1 << 40):
            reply = other.call([1, 1, "unpin", [made[0], count], None])
            assert reply[3][0] == "bounds"
        assert holder.call([3, 1, "size", [region], None]) == [3, 0]
        assert holder.call([4, 1, "unpin", [made[0], 1], None]) == [4, None]
        assert holder.call([5, 1, "size", [region], None])[3][0] == "region"


def test_the_tests_that_the_documentation_names_are_there() -> None:
    """Of the tables of all that others can influence."""
    text = (ROOT / "docs" / "security.md").read_text()
    found = re.findall(r"`([\w/]*\.py)?::(test_\w+)`", text)
    assert len(found) > 30
    module = ""
    for named, test in found:
        module = named or module
        source = (ROOT / module).read_text()
        assert re.search(rf"^(async )?def {test}\(", source, re.MULTILINE), f"{module}::{test}"
