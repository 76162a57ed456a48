"""Mounts of engines that require certificates or tokens, and read-only mounts."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.mount.support import MIB, PROVIDER_ID, fails_with, mounting, python, run, serving
from tests.support.helpers import tls_config

TOKEN = "a token of a mount's engine"
READING = "a token for those who only read"
ID = f"provider_id={PROVIDER_ID}"

FILL = """
import json, sys
from warabi.client import Client
from warabi.engine import Engine, client
address, config, provider_id, change = sys.argv[1:]
with Engine("tcp", client, config=config) as engine:
    handle = Client(engine).make_target_handle(address, int(provider_id))
    if change == "fill":
        handle.link_name(handle.create_and_write(b"data" * 1000, persist=True), "/file")
    else:
        print(*handle.list_names(), handle.size(handle.open_name("/file")))
"""


@pytest.fixture
def secured(place: Path) -> tuple[dict[str, Any], list[str]]:
    """An engine's configuration with TLS and a token, and a mount's options for it."""
    config: dict[str, Any] = tls_config(place)
    (place / "token").touch(0o600)
    (place / "token").write_text(TOKEN)
    (place / "reading").touch(0o600)
    (place / "reading").write_text(READING)
    tls = config["tls"]
    options = [
        f"tls_cert={tls['certificate']}", f"tls_key={tls['key']}", f"tls_ca={tls['ca']}",
        f"token_file={place}/token", ID,
    ]  # fmt: skip
    return {**config, "token": TOKEN, "read_only_token": READING}, options


def test_mount_over_tls_with_a_token(
    secured: tuple[dict[str, Any], list[str]], place: Path
) -> None:
    config, options = secured
    with (
        serving("tcp", engine=config) as provider,
        mounting(provider.address, place, *options) as mount,
    ):
        data = os.urandom(5 * MIB + 7)
        (mount.path / "file").write_bytes(data)
        run("sync", "-f", mount.path)
        mount.remount()
        assert (mount.path / "file").read_bytes() == data


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("token_file", "requires a token, and none is configured"),
        ("tls_key", "tls.key: required key is missing"),
        ("tls_", "as TLS does"),
    ],
)
def test_missing_certificates_and_tokens_are_reported(
    secured: tuple[dict[str, Any], list[str]], place: Path, drop: str, message: str
) -> None:
    config, options = secured
    kept = [option for option in options if not option.startswith(drop)]
    with (
        serving("tcp", engine=config) as provider,
        mounting(provider.address, place, *kept, start=False) as mount,
    ):
        done = run(*mount.command(), check=False)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_relative_paths_and_the_name_of_the_engine(place: Path) -> None:
    """The mount in the background works in another directory than where it was called."""
    config = tls_config(place, names=["store.example"])
    with (
        serving("tcp", engine=config) as provider,
        mounting(
            provider.address, place, "tls_cert=certificate.pem", "tls_key=key.pem",
            "tls_ca=ca.pem", "tls_name=store.example", ID, start=False,
        ) as mount,
    ):  # fmt: skip
        run(*mount.command(), cwd=place)
        mount.adopt()
        (mount.path / "file").write_bytes(b"x")
        assert (mount.path / "file").read_bytes() == b"x"


@pytest.mark.parametrize("how", ["ro", "token"])
def test_reading_only(secured: tuple[dict[str, Any], list[str]], place: Path, how: str) -> None:
    """With `-o ro` the kernel refuses changes; with a token for reading the provider does."""
    config, options = secured
    if how == "token":
        options = [option.replace("/token", "/reading") for option in options]
    else:
        options = [*options, "ro"]
    shown = json.dumps({key: config[key] for key in config if key != "read_only_token"})
    with serving("tcp", engine=config) as provider:
        python(FILL, provider.address, shown, str(PROVIDER_ID), "fill")
        with mounting(provider.address, place, *options) as mount:
            file = mount.path / "file"
            assert file.read_bytes() == b"data" * 1000
            assert file.stat().st_size == 4000
            assert os.listdir(mount.path) == ["file"]
            assert len(os.getxattr(file, "user.warabi.region")) == 32
            denied = errno.EROFS if how == "ro" else errno.EACCES
            for change in (
                lambda: os.open(mount.path / "new", os.O_WRONLY | os.O_CREAT),
                lambda: os.mkdir(mount.path / "dir"),
                lambda: os.unlink(file),
                lambda: os.rename(file, mount.path / "other"),
                lambda: os.truncate(file, 1),
                lambda: os.chmod(file, 0o600),
                lambda: os.setxattr(file, "user.a", b"b"),
                lambda: os.symlink("x", mount.path / "link"),
                lambda: file.write_bytes(b"other"),
            ):
                with fails_with(denied):
                    change()
            done = subprocess.run(["ls", "-l", mount.path], capture_output=True, timeout=30)
            assert done.returncode == 0
            mount.unmount()
        assert python(FILL, provider.address, shown, str(PROVIDER_ID), "look") == "file 4000\n"
