"""Persists by clients with direct access, without requests to the provider."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    ROOT,
    Served,
    file_config,
    pattern,
    pmem_config,
    provider_process,
    python_process,
)
from warabi import errors
from warabi._core import syscalls
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.region import RegionID

CONFIGS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "memory": lambda path: MEMORY,
    "file": file_config,
    "pmem": pmem_config,
}
SIZE = 100_000


@pytest.fixture(params=CONFIGS)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    with provider_process("na+sm", CONFIGS[request.param](tmp_path / "target")) as served:
        yield served


@pytest.fixture(params=["file", "pmem"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    with provider_process("na+sm", CONFIGS[request.param](tmp_path / "target")) as served:
        yield served


@pytest.fixture
def handle(request: pytest.FixtureRequest) -> Iterator[TargetHandle]:
    """A client that does not wait long for a provider that is stopped."""
    name = "served" if "served" in request.fixturenames else "files"
    address = request.getfixturevalue(name).address
    with Engine("na+sm", client, config={"timeout": 0.5}) as engine:
        yield Client(engine).make_target_handle(address, 1)


@contextlib.contextmanager
def stopped(served: Served) -> Iterator[None]:
    served.stop()
    try:
        yield
    finally:
        served.signal(signal.SIGCONT)


def durable_region(handle: TargetHandle, size: int = SIZE) -> RegionID:
    """A region that the client was granted, and that is persisted."""
    region = handle.create_and_write(bytes(size), persist=True)
    for _ in range(3):
        handle.read(region, 0, 1)
    handle.persist(region, 0, size)
    return region


def test_the_provider_is_not_asked(served: Served, handle: TargetHandle) -> None:
    region = durable_region(handle)
    with stopped(served):
        handle.write(region, 0, pattern(SIZE), persist=True)
        handle.write(region, 0, b"more")
        handle.persist(region, 0, 4)
        handle.persist(region, SIZE, 0)
    assert handle.read(region, 4, SIZE - 4) == pattern(SIZE)[4:]


def test_a_read_only_client_persists_too(served: Served, handle: TargetHandle) -> None:
    region = durable_region(handle)
    with Engine("na+sm", client) as engine:
        reader = Client(engine).make_target_handle(served.address, 1, read_only=True)
        for _ in range(3):
            reader.read(region, 0, 1)
        with stopped(served):
            reader.persist(region, 0, SIZE)


def test_only_what_is_in_the_region(served: Served, handle: TargetHandle) -> None:
    region = durable_region(handle)
    with pytest.raises(errors.OutOfBounds):
        handle.persist(region, 1, SIZE)
    handle.erase(region)
    with pytest.raises(errors.InvalidRegion):
        handle.persist(region, 0, 1)


def test_a_region_that_was_never_persisted_is_the_providers_to_persist(
    files: Served, handle: TargetHandle
) -> None:
    region = handle.create_and_write(bytes(SIZE))
    for _ in range(3):
        handle.read(region, 0, 1)
    with stopped(files), pytest.raises(errors.TimedOut):
        handle.persist(region, 0, 1)


@pytest.mark.parametrize("what", ["resize", "link_name", "unlink_name"])
def test_a_changed_region_is_persisted_by_the_provider(
    files: Served, handle: TargetHandle, what: str
) -> None:
    """Whoever changes it; and the next time it is not asked again."""
    region = durable_region(handle)
    handle.link_name(region, "/first")
    handle.link_name(region, "/second")
    handle.persist(region, 0, 1)
    with Engine("na+sm", client) as engine:
        other = Client(engine).make_target_handle(files.address, 1)
        if what == "resize":
            other.resize(region, SIZE + 1)
        elif what == "link_name":
            other.link_name(region, "/third")
        else:
            other.unlink_name("/first")
    handle.write(region, 0, b"x")
    with stopped(files), pytest.raises(errors.TimedOut):
        handle.persist(region, 0, 1)
    handle.persist(region, 0, 1)
    with stopped(files):
        handle.persist(region, 0, 1)


@pytest.mark.parametrize("kind", ["file", "pmem"])
def test_it_is_found_after_a_crash(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind](tmp_path / "target")
    with provider_process("na+sm", config) as served, Engine("na+sm", client) as engine:
        handle = Client(engine).make_target_handle(served.address, 1)
        region = durable_region(handle)
        handle.link_name(region, "/name")
        handle.resize(region, SIZE + 5)
        handle.write(region, 5, pattern(SIZE), persist=True)
        served.kill()
    with provider_process("na+sm", config) as served, Engine("na+sm", client) as engine:
        handle = Client(engine).make_target_handle(served.address, 1)
        assert handle.open_name("/name") == region
        assert handle.read(region, 0, SIZE + 5) == bytes(5) + pattern(SIZE)


def test_a_small_part_of_a_large_region_is_persisted_alone(
    files: Served, handle: TargetHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = durable_region(handle, 8 << 20)
    sync, sizes = syscalls.msync, []

    def record(address: int, size: int) -> None:
        sizes.append(size)
        sync(address, size)

    monkeypatch.setattr(syscalls, "msync", record)
    with stopped(files):
        handle.write(region, 5000, b"changed", persist=True)
        handle.persist(region, 0, 8 << 20)
    assert sizes == [5007 - 4096]


def test_a_dead_provider_persists_nothing(served: Served, handle: TargetHandle) -> None:
    region = durable_region(handle)
    served.signal(signal.SIGKILL)
    served.process.wait(PATIENCE)
    with pytest.raises((errors.ConnectionLost, errors.ConnectionFailed)):
        handle.persist(region, 0, 1)


def test_a_failed_persist_is_reported_by_the_provider(
    files: Served, handle: TargetHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which syncs as well, and remembers what goes wrong."""
    region = durable_region(handle)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    handle.persist(region, 0, 1)
    with stopped(files), pytest.raises(errors.TimedOut):
        handle.persist(region, 0, 1)


FEW = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_more_regions_than_descriptors(tmp_path: Path) -> None:
    """The provider keeps those of some open, and has enough for the others."""
    providers = json.dumps({"1": file_config(tmp_path / "target")})
    script = str(ROOT / "tests" / "support" / "serve.py")
    with (
        python_process("-c", FEW, script, "na+sm", providers, "{}") as process,
        Engine("na+sm", client) as engine,
    ):
        assert process.stdout is not None
        handle = Client(engine).make_target_handle(process.stdout.readline().strip(), 1)
        regions = [durable_region(handle, 10) for _ in range(200)]
        for turn in range(2):
            for region in regions:
                handle.write(region, 0, pattern(10, turn), persist=True)
        for region in regions:
            assert handle.read(region, 0, 10) == pattern(10, 1)
            handle.erase(region)
