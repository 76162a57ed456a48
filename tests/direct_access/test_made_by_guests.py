"""Large new regions whose data a client of the same host writes directly."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import (
    MEMORY,
    RawPeer,
    Served,
    environment,
    eventually,
    file_config,
    pattern,
    pmem_config,
    provider_process,
    raw_connection,
)
from warabi import errors
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.region import RegionID
from warabi.remote.link import WireLink

CONFIGS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "memory": lambda path: MEMORY,
    "file": file_config,
    "pmem": pmem_config,
    "sums": lambda path: summed(path),
}
SIZES = [256 << 10, (256 << 10) - 1, (1 << 20) + 5, 9 << 20]


def summed(path: Path) -> dict[str, Any]:
    """Nobody but the provider writes to its regions."""
    config = file_config(path)
    config["target"]["config"]["checksums"] = True
    return config


@pytest.fixture(params=CONFIGS)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    with provider_process("na+sm", CONFIGS[request.param](tmp_path / "target")) as served:
        yield served


@pytest.fixture
def handle(served: Served, client_engine: Engine) -> TargetHandle:
    return Client(client_engine).make_target_handle(served.address, 1)


@pytest.fixture
def other(served: Served) -> Iterator[TargetHandle]:
    """A client that shares nothing."""
    with Engine("na+sm", client, config={"share": False}) as engine:
        yield Client(engine).make_target_handle(served.address, 1)


@pytest.mark.parametrize("size", SIZES)
def test_other_clients_see_the_complete_region(
    handle: TargetHandle, other: TargetHandle, size: int
) -> None:
    for persist in (False, True):
        region = handle.create_and_write(pattern(size), persist=persist)
        assert other.size(region) == size
        assert other.read(region, 0, size) == pattern(size)
        found = other.stat(region)
        assert found.mtime_ns >= found.atime_ns
        handle.write(region, size // 2, b"more")
        assert other.read(region, size // 2, 4) == b"more"
        assert handle.read(region, 0, size // 2) == pattern(size)[: size // 2]
        other.erase(region)
        with pytest.raises(errors.InvalidRegion):
            handle.read(region, 0, 1)


def test_nothing_is_left_open(served: Served, handle: TargetHandle) -> None:
    # What is erased may be kept for the next ones, but not more of it each time.
    for region in [handle.create_and_write(pattern(SIZES[0])) for _ in range(50)]:
        handle.erase(region)
    own, provider = len(os.listdir("/proc/self/fd")), served.descriptors()
    regions = [handle.create_and_write(pattern(SIZES[0], i)) for i in range(50)]
    assert len(os.listdir("/proc/self/fd")) <= own + 1
    for i, region in enumerate(regions):
        assert handle.read(region, 0, 1000) == pattern(SIZES[0], i)[:1000]
        handle.erase(region)
    eventually(lambda: served.descriptors() <= provider + 5)


@pytest.mark.parametrize("kind", ["file", "pmem"])
def test_what_was_persisted_is_found_after_a_crash(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind](tmp_path / "target")
    with provider_process("na+sm", config) as served, Engine("na+sm", client) as engine:
        handle = Client(engine).make_target_handle(served.address, 1)
        region = handle.create_and_write(pattern(SIZES[2]), persist=True)
        served.kill()
    with provider_process("na+sm", config) as served, Engine("na+sm", client) as engine:
        handle = Client(engine).make_target_handle(served.address, 1)
        assert list(handle.list()) == [region]
        assert handle.read(region, 0, SIZES[2]) == pattern(SIZES[2])


def test_a_full_target_refuses_and_goes_on(client_engine: Engine, tmp_path: Path) -> None:
    config = file_config(tmp_path / "target")
    config["target"]["config"]["capacity"] = 3 << 20
    with provider_process("na+sm", config) as served:
        handle = Client(client_engine).make_target_handle(served.address, 1)
        region = handle.create_and_write(pattern(2 << 20))
        for _ in range(3):
            with pytest.raises(errors.StorageFull):
                handle.create_and_write(pattern(2 << 20))
        assert list(handle.list()) == [region]
        handle.create_and_write(pattern(1 << 20))


LIMITED = """
import resource, sys
from warabi import errors
from warabi.client import Client
from warabi.engine import Engine, client

with Engine("na+sm", client) as engine:
    handle = Client(engine).make_target_handle(sys.argv[1], 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    for _ in range(3):
        try:
            handle.create_and_write(bytes(1 << 20))
        except errors.Exception as error:
            print(type(error).__name__, error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    handle.create_and_write(bytes(1 << 20))
"""


def test_a_write_that_fails_leaves_no_region(tmp_path: Path, client_engine: Engine) -> None:
    """The client may write less than the provider could."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    with provider_process("na+sm", file_config(tmp_path / "target")) as served:
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, served.address], env=environment(), check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.count("File too large") == 3
        assert done.stderr == ""
        handle = Client(client_engine).make_target_handle(served.address, 1)
        assert len(list(handle.list())) == 1


def test_a_region_erased_before_it_is_filled(tmp_path: Path, client_engine: Engine) -> None:
    with provider_process("na+sm", file_config(tmp_path / "target")) as served:
        handle = Client(client_engine).make_target_handle(served.address, 1)
        assert isinstance(handle._link, WireLink)
        assert handle._link._side is not None
        made = handle._link._side.make(SIZES[0])
        assert made is not None
        region, fill = made
        handle.erase(region)
        assert not fill(memoryview(pattern(SIZES[0])))
        assert list(handle.list()) == []


def test_an_unnamed_region_goes_with_its_connection_unless_it_was_named(
    served: Served, other: TargetHandle
) -> None:
    size = 1 << 20
    with raw_connection(served.address) as connection:
        peer = RawPeer(connection)
        peer.call([1, 1, "join", [True], None])
        made = [
            RegionID(found[1][0])
            for number in range(3)
            if (found := peer.call([2 + number, 1, "make_unnamed", [size], None]))[1]
        ]
        assert len(made) in (0, 3)  # none where no client may write by itself
        assert other.listdir() == []
        if made:
            other.link.call("publish", made[1], "/named", True, 0o600, 1, 2)
    eventually(lambda: other.link.call("used") == (size if made else 0))
    assert other.listdir() == (["named"] if made else [])
    if made:
        found = other.stat_name("/named")
        assert (found.region, found.mode & 0o7777, found.uid, found.gid) == (made[1], 0o600, 1, 2)
        other.unlink_name("/named")
        assert other.link.call("used") == 0
