"""The ``warabi`` command with certificates and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import MEMORY
from tests.tools.test_cli import fails, ok, serving


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text("a token of this test's\n")
    return path


def tls_options(tls: dict[str, Any]) -> list[str | Path]:
    names = {"certificate": "--tls-cert", "key": "--tls-key", "ca": "--tls-ca"}
    return [word for key, value in tls["tls"].items() for word in (names[key], value)]


def test_tls_and_tokens_by_options(tls: dict[str, Any], secret: Path, tmp_path: Path) -> None:
    reading = tmp_path / "reading"
    reading.touch(0o600)
    reading.write_text("a token for those who only read")
    serving_options: list[str | Path] = [
        *tls_options(tls), "--token-file", secret, "--read-only-token-file", reading,
        "-a", "tcp://0.0.0.0:0", "-t", "memory:",
    ]  # fmt: skip
    with serving(*serving_options) as service:
        address = service.address.replace("0.0.0.0", "127.0.0.1")
        options: list[str | Path] = [*tls_options(tls), "--token-file", secret]
        region = ok("put", address, *options, "-n", "/a", stdin=b"data").decode().strip()
        assert region in ok("ls", address, *options).decode()
        assert ok("get", address, "/a", *options) == b"data"
        readers: list[str | Path] = [*tls_options(tls), "--token-file", reading]
        assert ok("get", address, "/a", *readers) == b"data"
        assert "unlink_name: access is read-only" in fails("rm", address, "/a", *readers)
        assert "access is read-only" in fails("put", address, *readers, stdin=b"x")
        assert "requires a token" in fails("ls", address, *tls_options(tls))
        assert "as TLS does" in fails("ls", address, "--token-file", secret)
        assert "tls.certificate" in fails("ls", address, "--tls-ca", tls["tls"]["ca"])
        ok("rm", address, "/a", *options)
        service.end()


def test_tls_and_tokens_by_the_environment(
    tls: dict[str, Any], secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: list[str | Path] = [
        *tls_options(tls),
        "--token-file",
        secret,
        "-a",
        "tcp",
        "-t",
        "memory:",
    ]
    with serving(*options, "-a", "tcp", "-t", "memory:") as service:
        names = {"certificate": "CERT", "key": "KEY", "ca": "CA"}
        for key, value in tls["tls"].items():
            monkeypatch.setenv(f"WARABI_TLS_{names[key]}", value)
        monkeypatch.setenv("WARABI_TOKEN_FILE", str(secret))
        address = service.address
        region = ok("put", address, stdin=b"data").decode().strip()
        assert ok("get", address, region) == b"data"
        monkeypatch.setenv("WARABI_TLS_NAME", "elsewhere.example")
        assert "elsewhere.example" in fails("ls", address)
        assert ok("ls", address, "--tls-name", "localhost")
        service.end()


def test_tokens_in_a_configuration(secret: Path, tmp_path: Path) -> None:
    config = tmp_path / "service.json"
    provider = {"type": "warabi", "provider_id": 0, "config": MEMORY}
    margo = {"token_file": str(secret), "limits": {"connections": 7}}
    config.write_text(json.dumps({"margo": margo, "providers": [provider]}))
    with serving(config, "-a", "tcp") as service:
        address = service.address
        assert "requires a token" in fails("ls", address)
        assert ok("ls", address, "--token-file", secret) == b""
        assert service.end().count("has no effect") == 0


def test_beyond_loopback_needs_tls_a_token_or_insecure() -> None:
    message = fails("serve", "-t", "memory:", "-a", "tcp://0.0.0.0:0")
    assert "token_file" in message
    with serving("-t", "memory:", "-a", "tcp://0.0.0.0:0", "--insecure") as service:
        assert service.address.startswith("tcp://0.0.0.0:")
        service.end()


def test_files_that_are_wrong(secret: Path) -> None:
    secret.chmod(0o644)
    for command in (["serve", "-t", "memory:"], ["ls", "tcp://127.0.0.1:1"]):
        assert "chmod 600" in fails(*command, "--token-file", secret)
    assert "/nowhere" in fails("ls", "tcp://127.0.0.1:1", "--token-file", "/nowhere")


def test_maintenance_and_migration_of_secured_targets(secret: Path, tmp_path: Path) -> None:
    providers = [
        {
            "name": "from", "type": "warabi", "provider_id": 1,
            "config": {**MEMORY, "migration": {"send": True}},
        },
        {
            "name": "to", "type": "warabi", "provider_id": 2,
            "config": {"migration": {"receive": True}},
        },
    ]  # fmt: skip
    config = tmp_path / "service.json"
    config.write_text(json.dumps({"providers": providers}))
    token: list[str | Path] = ["--token-file", secret]
    with serving(config, *token, "-a", "tcp") as service:
        address = service.address
        ok("put", address, "-p", "1", *token, "-n", "/a", stdin=b"data")
        archive = tmp_path / "out.tar"
        assert "requires a token" in fails("export", address, "-p", "1", archive)
        ok("export", address, "-p", "1", archive, *token)
        assert archive.stat().st_size
        assert "checksums" in fails("scrub", address, "-p", "1", *token)
        assert "requires a token" in fails("migrate", address, "1", address, "2")
        ok("migrate", address, "1", address, "2", *token)
        assert ok("get", address, "-p", "2", "/a", *token) == b"data"
        service.end()


def test_what_was_given_and_is_empty_is_refused() -> None:
    """As ``--token-file "$TOKEN"`` where the variable is not set: no service without a token."""
    for option in ("--token-file", "--read-only-token-file"):
        assert "'' is not a path" in fails("serve", "-t", "memory:", "-a", "tcp", option, "")
    assert "'' is not a path" in fails("ls", "tcp://127.0.0.1:1", "--token-file", "")
    text = fails("ls", "tcp://127.0.0.1:1", "--tls-cert", "")
    assert "$.tls.certificate: '' is not a path" in text
