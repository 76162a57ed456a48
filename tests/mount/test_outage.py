"""A provider that goes and comes back under a live mount."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.support import (
    PROVIDER_ID,
    Mount,
    Provider,
    another_python,
    fails_with,
    is_mounted,
    line_of,
    mounting,
    wait_until,
    watchdog,
)


class Service:
    """A provider of files in *place* that can be started again at the same address."""

    def __init__(self, place: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        config = {"path": f"{place}/target", "create_if_missing": True}
        self._config = {"target": {"type": "file", "config": config}}
        self._provider: Provider | None = None

    def start(self) -> None:
        self._provider = Provider(self.address, self._config)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self._provider is not None:
            self._provider.process.send_signal(number)
            self._provider.process.wait(60)
            self._provider.close()
            self._provider = None


@pytest.fixture
def service(place: Path) -> Iterator[Service]:
    found = Service(place)
    found.start()
    try:
        yield found
    finally:
        found.stop()


@contextlib.contextmanager
def mounted(service: Service, place: Path, *options: str) -> Iterator[Mount]:
    with (
        mounting(service.address, place, f"provider_id={PROVIDER_ID}", *options) as mount,
        watchdog(mount, 60),
    ):
        yield mount


WRITER = """
import os, sys
path, count = sys.argv[1], int(sys.argv[2])
with open(path, "wb", buffering=0) as file:
    for number in range(count):
        if number % 100 == 0:
            print(number, flush=True)
        file.write(number.to_bytes(4, "big") * 1024)
    os.fsync(file.fileno())
print("done", flush=True)
"""


def test_programs_do_not_notice_a_restart_of_the_provider(service: Service, place: Path) -> None:
    with mounted(service, place) as mount:
        (mount.path / "old").write_bytes(b"old")
        with (
            open(mount.path / "old", "rb", buffering=0) as held,
            another_python(WRITER, mount.path / "file", "2000") as writer,
        ):
            for wanted in range(0, 400, 100):
                assert line_of(writer) == str(wanted)
            service.stop()
            service.start()
            lines = ""
            while lines != "done":
                lines = line_of(writer)
            assert held.read(10) == b"old"
        data = (mount.path / "file").read_bytes()
        assert data == b"".join(number.to_bytes(4, "big") * 1024 for number in range(2000))
        assert sorted(os.listdir(mount.path)) == ["file", "old"]


def test_an_outage_that_is_too_long_is_an_error_until_it_ends(
    service: Service, place: Path
) -> None:
    with mounted(service, place, "reconnect=1") as mount:
        (mount.path / "file").write_bytes(b"data")
        service.stop()
        for _ in range(3):
            with fails_with(errno.ENOTCONN):
                os.listdir(mount.path)
        service.start()

        def works() -> bool:
            with contextlib.suppress(OSError):
                return (mount.path / "file").read_bytes() == b"data"
            return False

        wait_until(works, "the provider")
        (mount.path / "other").write_bytes(b"more")


def test_fsync_fails_after_a_crash_that_may_have_lost_what_was_written(
    service: Service, place: Path
) -> None:
    with mounted(service, place) as mount:
        with open(mount.path / "file", "wb", buffering=0) as file:
            file.write(b"synced")
            os.fsync(file.fileno())
            file.write(b", written")
            service.stop(signal.SIGKILL)
            service.start()
            with fails_with(errno.EIO):
                os.fsync(file.fileno())
            os.fsync(file.fileno())  # is told once
        assert (mount.path / "file").read_bytes().startswith(b"synced")
        mount.expected = ("may be lost",)


def test_a_mount_ends_during_an_outage_and_says_that_it_lost_something(
    service: Service, place: Path
) -> None:
    with mounted(service, place, "reconnect=1") as mount:
        (mount.path / "file").write_bytes(b"data")
        service.stop()
        mount.signal(signal.SIGTERM)
        mount.wait()
        assert not is_mounted(mount.path)
        assert "ERROR" in mount.new_log()
