"""TLS with a wrong certificate, version or peer: the error, and how soon it is raised."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.protocol.test_tls import Connect, blocking, serving, with_trio
from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    RawPeer,
    raw_connection,
    tls_config,
)
from warabi import errors
from warabi.client import Client
from warabi.engine import Engine, client, server
from warabi.protocol import wire
from warabi.provider import channel
from warabi.region import RegionID
from warabi.server import Provider

AT_ONCE = 5.0
"""Seconds within which a wrong side is told; nothing here waits for a time-out of the library."""

both_clients = pytest.mark.parametrize("connect", [blocking, with_trio])


# Wrong sides


@both_clients
@pytest.mark.timeout(20)
def test_wrong_authority(tls: dict[str, Any], tmp_path: Path, connect: Connect) -> None:
    other = tls_config(tmp_path)
    with serving(tls) as address:
        with pytest.raises(errors.PermissionDenied, match=r"certificate was rejected.*"):
            connect(address, other)
        connect(address, tls)


@both_clients
@pytest.mark.timeout(20)
def test_client_of_a_wrong_authority(tls: dict[str, Any], tmp_path: Path, connect: Connect) -> None:
    """It accepts the server, which does not accept it."""
    other = tls_config(tmp_path)
    other["tls"]["ca"] = tls["tls"]["ca"]
    with serving(tls) as address:
        with pytest.raises(errors.PermissionDenied, match="rejected our certificate"):
            connect(address, other)
        connect(address, tls)


def _yesterday() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


@both_clients
@pytest.mark.parametrize("whose", ["server", "client"])
@pytest.mark.timeout(20)
def test_expired_certificate(tmp_path: Path, connect: Connect, whose: str) -> None:
    authority = trustme.CA()
    (tmp_path / "old").mkdir()
    old = tls_config(tmp_path / "old", authority, expires=_yesterday())
    good = tls_config(tmp_path, authority)
    server, own = (old, good) if whose == "server" else (good, old)
    with serving(server) as address, pytest.raises(errors.PermissionDenied, match="expired"):
        connect(address, own)


@both_clients
@pytest.mark.parametrize("names", [["elsewhere.example"], ["127.0.0.2"]])
@pytest.mark.timeout(20)
def test_wrong_host(tmp_path: Path, connect: Connect, names: list[str]) -> None:
    config = tls_config(tmp_path, names=names)
    with serving(config) as address, pytest.raises(errors.PermissionDenied, match=r"127\.0\.0\.1"):
        connect(address, config)


def _unverified(tls: dict[str, Any], version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls["tls"]["ca"])
    context.maximum_version = version
    return context


def test_client_without_a_certificate(tls: dict[str, Any]) -> None:
    with serving(tls) as address, raw_connection(address) as plain:
        context = _unverified(tls, ssl.TLSVersion.TLSv1_3)
        plain.settimeout(AT_ONCE)
        with (
            pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
            context.wrap_socket(plain, server_hostname="localhost") as encrypted,
        ):
            encrypted.sendall(wire.opening(wire.Limits()))
            while encrypted.recv(1000):
                pass
        blocking(address, tls)


def test_older_version_of_tls(tls: dict[str, Any]) -> None:
    with serving(tls) as address, raw_connection(address) as plain:
        context = _unverified(tls, ssl.TLSVersion.TLSv1_2)
        plain.settimeout(AT_ONCE)
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            context.wrap_socket(plain, server_hostname="localhost")


@both_clients
@pytest.mark.timeout(20)
def test_plain_client_at_a_tls_port(tls: dict[str, Any], connect: Connect) -> None:
    with serving(tls) as address:
        with pytest.raises(errors.ProtocolError, match="as TLS does"):
            connect(address, {})
        connect(address, tls)


@both_clients
@pytest.mark.timeout(20)
def test_tls_client_at_a_plain_port(tls: dict[str, Any], connect: Connect) -> None:
    with serving({}) as address:
        with pytest.raises(errors.ProtocolError, match="does not speak TLS"):
            connect(address, tls)
        connect(address, {})


@both_clients
def test_server_that_says_nothing(tls: dict[str, Any], connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        text = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(errors.TimedOut, match="the peer does not respond"):
            connect(text, {**tls, "timeout": 0.2})


@both_clients
def test_server_that_closes_at_once(tls: dict[str, Any], connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        text = f"tcp://127.0.0.1:{listener.getsockname()[1]}"

        def close() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=close)
        thread.start()
        with pytest.raises((errors.ConnectionLost, errors.ProtocolError)):
            connect(text, tls)
        thread.join(PATIENCE)


def test_handshake_that_does_not_come(tls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tls) as address, monkeypatch.context() as patch:
        patch.setattr(channel, "OPENING_PATIENCE", 0.2)
        for first in (b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"):
            with raw_connection(address) as silent:
                silent.settimeout(AT_ONCE)
                silent.sendall(first)
                assert silent.recv(1000) == b""
        patch.undo()
        blocking(address, tls)


def test_tampered_record(tls: dict[str, Any]) -> None:
    with serving(tls) as address, raw_connection(address, tls) as connection:
        assert isinstance(connection, ssl.SSLSocket)
        peer = RawPeer(connection)
        assert peer.call([1, 1, "ping", [], None]) == [1, None]
        # Below TLS, into the same socket: a record that the keys do not open.
        with socket.socket(fileno=os.dup(connection.fileno())) as below:
            below.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises((ssl.SSLError, EOFError, ConnectionResetError)):
            peer.reply()
        blocking(address, tls)


def test_end_without_goodbye_within_a_message(tls: dict[str, Any]) -> None:
    """A cut connection is no end of a message."""
    with (
        Engine("tcp", config=tls) as engine,
        Provider(engine, 1, MEMORY),
        raw_connection(str(engine.addr()), tls) as connection,
    ):
        peer = RawPeer(connection)
        region = peer.call([1, 1, "create", [1000], None])[1]
        frame = wire.frame([2, 1, "write", [region, 0, False, False], None], 1000)
        connection.sendall(frame + b"x" * 500)
        with socket.socket(fileno=os.dup(connection.fileno())) as below:
            below.shutdown(socket.SHUT_WR)
        handle = Client(engine).make_target_handle(str(engine.addr()), 1)
        assert peer.closed()
        assert handle.read(RegionID(region), 0, 1000) == bytes(1000)


# Configurations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"certificate": None}, r"\$\.tls\.certificate"),
        ({"key": ""}, r"\$\.tls\.key"),
        ({"ca": 5}, r"\$\.tls\.ca"),
        ({"ca": "/nowhere/ca.pem"}, "/nowhere/ca.pem"),
        ({"key": "/nowhere/key.pem"}, "/nowhere/key.pem"),
        ({"certificate": "/etc/passwd"}, "/etc/passwd"),
        ({"ca": "/etc/passwd"}, "/etc/passwd"),
        ({"cert": "x"}, r"\$\.tls\.cert: unknown key"),
    ],
)
def test_wrong_configurations(tls: dict[str, Any], change: dict[str, Any], message: str) -> None:
    config = {"tls": {**tls["tls"], **change}}
    for mode in (client, server):
        with pytest.raises(errors.ConfigError, match=message):
            Engine("tcp", mode, config=config)


def test_section_of_another_type() -> None:
    with pytest.raises(errors.ConfigError, match=r"\$\.tls: expected an object"):
        Engine("tcp", client, config={"tls": "on"})


def test_a_key_file_readable_by_others_is_refused(tmp_path: Path) -> None:
    config = tls_config(tmp_path)
    os.chmod(config["tls"]["key"], 0o644)
    with pytest.raises(errors.PermissionDenied, match=r"mode 0644.*chmod 600"):
        Engine("tcp", client, config=config)


def test_key_of_another_certificate(tmp_path: Path) -> None:
    config = tls_config(tmp_path)
    (tmp_path / "other").mkdir()
    config["tls"]["key"] = tls_config(tmp_path / "other")["tls"]["key"]
    with pytest.raises(errors.ConfigError, match="MISMATCH"):
        Engine("tcp", config=config)
