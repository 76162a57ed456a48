"""The flags of chattr(1) for clients: they hold at once, also for direct access."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.helpers import MEMORY, file_config, pmem_config, provider_process
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.errors import PathError
from warabi.region import RegionID

IMMUTABLE, APPEND_ONLY, NO_DUMP = 0x10, 0x20, 0x40


@pytest.fixture(params=["memory", "file", "pmem"])
def handles(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[TargetHandle]]:
    """Two clients of a target."""
    path = tmp_path / "target"
    config = {"memory": MEMORY, "file": file_config(path), "pmem": pmem_config(path)}
    with (
        provider_process("na+sm", config[request.param]) as served,
        Engine("na+sm", client) as one,
        Engine("na+sm", client) as two,
    ):
        yield [Client(engine).make_target_handle(served.address, 1) for engine in (one, two)]


CHANGES: dict[str, Callable[[TargetHandle, RegionID], object]] = {
    "write": lambda handle, region: handle.write(region, 0, b"x"),
    "write at the end": lambda handle, region: handle.write(region, 4999, b"x"),
    "write_async": lambda handle, region: handle.write_async(region, 0, b"x").wait(),
    "write_vector": lambda handle, region: handle.write_vector(region, [(0, 1)], b"x"),
    "resize": lambda handle, region: handle.resize(region, 6000),
    "zero_range": lambda handle, region: handle.zero_range(region, 0, 10),
    "punch_hole": lambda handle, region: handle.punch_hole(region, 0, 10),
    "copy_range": lambda handle, region: handle.copy_range(region, 0, region, 100, 10),
    "erase": lambda handle, region: handle.erase(region),
    "store_name": lambda handle, region: handle.store_name("/file", b"new"),
    "unlink_name": lambda handle, region: handle.unlink_name("/file"),
    "rename": lambda handle, region: handle.rename("/file", "/other"),
}


@pytest.mark.parametrize("flag", [IMMUTABLE, APPEND_ONLY])
@pytest.mark.parametrize("size", [5000, 200_000])
def test_they_hold_for_every_client(handles: list[TargetHandle], flag: int, size: int) -> None:
    one, two = handles
    region = one.store_name("/file", bytes(size)).region
    for _ in range(5):
        one.write(region, 0, b"before")  # directly
    two.set_flags("/file", flag)
    assert one.stat_name("/file").flags == flag

    for name, change in CHANGES.items():
        for handle in handles:
            with pytest.raises(PermissionError):
                change(handle, region)
                pytest.fail(name)

    assert one.read(region, 0, 6) == b"before"
    assert one.size(region) == size
    if flag == IMMUTABLE:
        with pytest.raises(PathError, match="immutable"):
            one.append(region, b"more")
    else:
        assert one.append(region, b"more") == size
    two.set_flags("/file", 0)
    for _ in range(5):
        one.write(region, 0, b"after")
    assert two.read(region, 0, 5) == b"after"
    with pytest.raises(PathError) as caught:
        two.set_flags("/file", 1)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_they_stay(tmp_path: Path) -> None:
    for turn in range(2):
        with (
            provider_process("na+sm", file_config(tmp_path / "target")) as served,
            Engine("na+sm", client) as engine,
        ):
            handle = Client(engine).make_target_handle(served.address, 1)
            if turn == 0:
                handle.store_name("/file", b"data")
                handle.set_flags("/file", IMMUTABLE | NO_DUMP)
                handle.commit()
                born = handle.stat_name("/file").btime_ns
                served.kill()
            else:
                found = handle.stat_name("/file")
                assert (found.flags, found.btime_ns) == (IMMUTABLE | NO_DUMP, born)
                with pytest.raises(PermissionError):
                    handle.write(found.region, 0, b"x")
