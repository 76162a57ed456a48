"""Files without names (``O_TMPFILE``) after kills, and their owners."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from tests.mount.support import PROVIDER_ID, Mount, mounting, serving, wait_until, watchdog
from tests.posix.support import opened, user
from tests.posix.test_tmpfile import MAKE, link, used
from tests.support.helpers import file_config
from warabi.target.config import parse
from warabi.target.opening import open_target

PROVIDER = f"provider_id={PROVIDER_ID}"


def made(mount: Mount) -> tuple[int, int]:
    """Two synced files without names at first, of which the second gets one."""
    fds = os.open(mount.path, MAKE), os.open(mount.path, MAKE)
    for fd in fds:
        os.write(fd, b"data" * 50_000)
        os.fsync(fd)
    link(fds[1], mount.path / "linked")
    os.fsync(fds[1])
    return fds


def closed(fds: tuple[int, int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):  # it is closed nevertheless
            os.close(fd)


@pytest.mark.parametrize("of_an_engine", [False, True])
def test_what_a_killed_mount_had_is_gone(of_an_engine: bool, place: Path) -> None:
    config = file_config(place / "target")["target"]
    with (
        serving("na+sm", config if of_an_engine else None) as provider,
        mounting(
            provider.address if of_an_engine else f"file:{place}/own",
            place,
            *[PROVIDER] * of_an_engine,
        ) as mount,
        watchdog(mount, 60),
    ):
        before = used(mount.path)
        fds = made(mount)
        mount.kill()
        closed(fds)
        mount.remount()
        assert (mount.path / "linked").read_bytes() == b"data" * 50_000
        wait_until(lambda: used(mount.path) <= before + 1, "the end of the other")
        assert os.listdir(mount.path) == ["linked"]


def test_what_a_killed_provider_had_is_gone(place: Path) -> None:
    config = file_config(place / "target")
    with (
        serving("na+sm", config["target"]) as provider,
        mounting(provider.address, place, PROVIDER, "timeout=1", "reconnect=0") as mount,
        watchdog(mount, 60),
    ):
        fds = made(mount)
        provider.kill()
        closed(fds)
    parsed = parse(config).target
    assert parsed is not None
    with open_target(parsed) as target:
        assert target.list() == [target.namespace.open_name("/linked")]


def test_its_owner_is_that_of_the_mount_where_it_has_one(place: Path) -> None:
    with mounting("memory:", place, "uid=1000", "gid=2000") as mount, watchdog(mount, 60):
        os.chmod(mount.path, 0o777)
        with user(1000, 2000), opened(mount.path, MAKE, 0o6755) as fd:
            found = os.fstat(fd)
            assert (found.st_uid, found.st_gid) == (1000, 2000)
            link(fd, mount.path / "file")
        assert (mount.path / "file").stat().st_uid == 1000
