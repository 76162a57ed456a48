"""Settings of the ``abtio`` backend: direct I/O, synchronous writes, worker threads."""

import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import warabi.aio
from tests.support.helpers import PATIENCE
from warabi.backends.direct_io import DirectFileStorage, supports_direct_io
from warabi.backends.file import AbtIoConfig
from warabi.client import Client, TargetHandle
from warabi.engine import Engine
from warabi.region import RegionID
from warabi.server import Provider
from warabi.target.config import FileConfig
from warabi.target.opening import open_file

BOUNCE = 1024 * 1024


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[DirectFileStorage]:
    made = DirectFileStorage(tmp_path, alignment=512)
    try:
        yield made
    finally:
        made.close()


def test_a_random_walk_agrees_with_a_model(storage: DirectFileStorage) -> None:
    """Aligned and not, within and beyond the end, larger than a bounce buffer."""
    numbers = random.Random(7)
    rid = RegionID.from_parts(1, 1)
    storage.create(rid, 0)
    model = bytearray()
    sizes = (1, 100, 4095, 4096, 4097, 8192, 70_000, BOUNCE, BOUNCE + 1, 2 * BOUNCE + 4096)
    for _ in range(300):
        size = numbers.choice(sizes)
        offset = numbers.choice((0, 1, 4095, 4096, 8192, 10_000, numbers.randrange(3 * BOUNCE)))
        kind = numbers.randrange(4)
        if kind == 0 and offset + size <= len(model):
            out = bytearray(size)
            storage.read_into(rid, offset, memoryview(out))
            assert out == model[offset : offset + size]
        elif kind == 1:
            storage.resize(rid, offset)
            model = model[:offset].ljust(offset, b"\0")
        else:
            data = numbers.randbytes(size)
            model = model.ljust(offset, b"\0")
            model[offset : offset + size] = data
            if offset + size > storage_size(storage, rid):
                storage.write_beyond(rid, offset, memoryview(data))
            else:
                storage.write(rid, offset, memoryview(data))
    out = bytearray(len(model))
    storage.read_into(rid, 0, memoryview(out))
    assert out == model
    assert storage_size(storage, rid) == len(model)


def storage_size(storage: DirectFileStorage, rid: RegionID) -> int:
    return dict(storage.scan())[rid]


def file_config(path: Path, **settings: Any) -> dict[str, Any]:
    return {
        "target": {
            "type": "abtio",
            "config": {"path": str(path), "create_if_missing": True, **settings},
        }
    }


def system_calls(tmp_path: Path, settings: dict[str, Any]) -> str:
    """What a process that stores 64 KiB at an odd offset does, as strace sees it."""
    program = f"""
from pathlib import Path
from warabi.target.config import FileConfig
from warabi.target.opening import open_file
path = {str(tmp_path / "t")!r}
with open_file(FileConfig(path=path, create_if_missing=True, **{settings!r})) as t:
    region = t.create(200_000)
    t.write(region, 100, b"x" * 65536)
    assert t.read(region, 100, 65536) == b"x" * 65536
"""
    trace = tmp_path / "trace"
    command = [
        "strace",
        "-f",
        "-o",
        str(trace),
        "-e",
        "trace=openat,pwrite64,fdatasync",
        sys.executable,
    ]
    subprocess.run([*command, "-c", program], check=True, timeout=60)
    return trace.read_text()


def test_direct_io_bypasses_the_page_cache_where_it_can(tmp_path: Path) -> None:
    trace = system_calls(tmp_path, {"directio": True})
    opened = re.search(r"openat\(.*regions/../[0-9a-f]{32}.*O_DIRECT.*= (\d+)", trace)
    assert opened is not None
    direct = re.findall(rf"pwrite64\({opened[1]},.* (\d+), (\d+)\) = ", trace)
    assert direct == [("61440", "4096")]  # what is aligned of 100..65636


def test_sync_waits_at_each_write(tmp_path: Path) -> None:
    written = r"pwrite64\((\d+), .*, 65536, 100\) = 65536\n.*fdatasync\(\1\) += 0\n"
    assert re.search(written, system_calls(tmp_path, {"sync": True}))
    shutil.rmtree(tmp_path / "t.regions")
    (tmp_path / "t").unlink()
    assert not re.search(written, system_calls(tmp_path, {}))


@pytest.fixture
def refusing(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system without direct I/O, if this kernel still has one."""
    subprocess.run(["mount", "-t", "ramfs", "none", tmp_path], check=True, timeout=30)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True, timeout=30)


def test_a_file_system_that_refuses_is_used_with_the_page_cache_and_says_so(
    refusing: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not supports_direct_io(refusing)
    config = file_config(refusing / "t", directio=True)
    with Engine("na+sm") as engine, Provider(engine, 0, config) as provider:
        assert provider.get_config()["target"]["config"]["directio"] is False
        target = Client(engine).make_target_handle(str(engine.addr()), 0)
        assert target.read(target.create_and_write(b"x" * 10_000), 0, 10_000) == b"x" * 10_000
    assert "does not support direct I/O" in caplog.text


@pytest.mark.parametrize(
    "settings", [{"directio": True}, {"sync": True}, {"directio": True, "sync": True}]
)
def test_everything_works_with_the_setting(tmp_path: Path, settings: dict[str, bool]) -> None:
    with Engine("na+sm") as engine:
        config = file_config(tmp_path / "t", **settings)
        with Provider(engine, 0, config) as provider, Engine("na+sm") as other:
            assert provider.get_config()["target"]["config"].items() >= settings.items()
            target = Client(other).make_target_handle(str(engine.addr()), 0)
            check(target)
        with Provider(engine, 0, config):
            target = Client(engine).make_target_handle(str(engine.addr()), 0)
            assert target.read(target.open_name("/kept"), 5000, 5000) == b"k" * 5000


def check(target: TargetHandle) -> None:
    for size in (0, 1, 4096, 5000, 3 * BOUNCE + 5):
        data = os.urandom(size)
        region = target.create_and_write(data, persist=True)
        assert target.read(region, 0, size) == data
        target.resize(region, size + 10_000)
        assert target.read(region, size, 10_000) == bytes(10_000)
    target.write_vector(region, [(4096, 4096), (1, 10)], b"v" * 4106)
    assert target.read(region, 0, 12) == data[:1] + b"v" * 10 + data[11:12]
    region = target.create_and_write(b"k" * 10_000)
    target.link_name(region, "/kept")
    target.persist(region, 0, 10_000)


async def test_the_thread_pool_is_as_large_as_configured(tmp_path: Path) -> None:
    config = FileConfig(
        path=str(tmp_path / "t"),
        create_if_missing=True,
        abt_io=AbtIoConfig(backing_thread_count=2),
    )
    inside: list[int] = []
    most: list[int] = []
    two = threading.Barrier(2, timeout=PATIENCE)

    def slow() -> None:
        inside.append(1)
        two.wait()
        time.sleep(0.02)  # in which a third one could come
        most.append(len(inside))
        two.wait()
        inside.pop()

    with open_file(config) as local:
        persist_all = local._storage.persist_all
        local._storage.persist_all = slow  # type: ignore[method-assign]  # to see who is inside
        target = warabi.aio.attach(local)
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(target.call, "sync")
        local._storage.persist_all = persist_all  # type: ignore[method-assign]
    assert len(most) == 8
    assert max(most) == 2


def test_a_failed_direct_write_is_an_error_and_no_other_region_suffers(tmp_path: Path) -> None:
    """A file-size limit makes the kernel refuse, which needs a process of its own."""
    program = f"""
import resource, signal
from warabi.target.config import FileConfig
from warabi.errors import Exception
from warabi.target.opening import open_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = {str(tmp_path / "t")!r}
with open_file(FileConfig(path=path, create_if_missing=True, directio=True)) as t:
    kept = t.create_and_write(b"k" * 100_000, persist=True)
    region = t.create(0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (196_608, resource.RLIM_INFINITY))
    try:
        t.write(region, 0, bytes(1_000_000), extend=True)
    except Exception as error:
        print(type(error).__name__, t.size(region))
    assert t.read(kept, 0, 100_000) == b"k" * 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "OutOfBounds 0\n"
