"""The fsspec driver: fsspec's own tests, over every way to a target, and what programs rely on."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.asyn
import numpy as np
import pytest
import zarr
from fsspec.tests import abstract

from tests.support.helpers import Served
from warabi import errors
from warabi.engine import Engine, server
from warabi.fsspec import WarabiFileSystem
from warabi.server import Provider


@contextlib.contextmanager
def closing(fs: WarabiFileSystem) -> Iterator[WarabiFileSystem]:
    """The connections of file systems are those of their process, and last as long."""
    try:
        yield fs
    finally:
        fs._engine.finalize()
        WarabiFileSystem.clear_instance_cache()


@pytest.fixture(scope="module", autouse=True)
def lasting(local_process: Served, tcp_process: Served) -> None:
    """What lasts longer than a test, the event loops of fsspec and zarr too."""
    fsspec.asyn.get_loop()
    zarr.create_array({}, shape=(1,), dtype="u1")[:] = 1


@pytest.fixture(params=["na+sm", "tcp", "embedded"])
def way(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WarabiFileSystem]:
    """The file system of a target in files, by every transport."""
    if request.param == "embedded":
        fs = fsspec.filesystem(
            "warabi+file", path=str(tmp_path_factory.mktemp("embedded") / "target"), create=True
        )
    else:
        name = "local_process" if request.param == "na+sm" else "tcp_process"
        served: Served = request.getfixturevalue(name)
        fs = fsspec.filesystem("warabi", address=served.address, provider_id=2)
    with closing(fs):
        yield fs


@pytest.fixture
def top(way: WarabiFileSystem) -> Iterator[str]:
    path = f"/fsspec {os.urandom(8).hex()}"
    way.mkdir(path)
    yield path
    way.rm(path, recursive=True)


class Fixtures(abstract.AbstractFixtures):  # type: ignore[misc]
    @pytest.fixture
    def fs(self, way: WarabiFileSystem) -> WarabiFileSystem:
        return way

    @pytest.fixture
    def fs_path(self, top: str) -> str:
        return top


in_one_way = pytest.mark.parametrize("way", ["na+sm"], indirect=True)
"""The algorithms on top are fsspec's, and the same in every way; their tests are many."""


@in_one_way
class TestCopy(abstract.AbstractCopyTests, Fixtures):  # type: ignore[misc]
    pass


@in_one_way
class TestGet(abstract.AbstractGetTests, Fixtures):  # type: ignore[misc]
    pass


@in_one_way
class TestPut(abstract.AbstractPutTests, Fixtures):  # type: ignore[misc]
    pass


class TestOpen(abstract.AbstractOpenTests, Fixtures):  # type: ignore[misc]
    pass


class TestPipe(abstract.AbstractPipeTests, Fixtures):  # type: ignore[misc]
    pass


def test_reading_of_ranges(way: WarabiFileSystem, top: str) -> None:
    data = os.urandom(3_000_000)
    path = f"{top}/deep/er/file"
    way.pipe(path, data)  # makes the directories
    assert way.cat(path) == data
    for start, end in ((0, 10), (5, None), (-7, None), (10, -10), (None, 5), (2_999_999, 9**9)):
        assert way.cat_file(path, start, end) == data[start:end]
    assert way.cat_ranges([path] * 3, [0, 10, 2_000_000], [5, 10, 2_500_000]) == [
        data[:5], b"", data[2_000_000:2_500_000],
    ]  # fmt: skip
    mixed = way.cat_ranges([path, f"{top}/nothing"], [1, 0], [3, 1])
    assert mixed[0] == data[1:3]
    assert isinstance(mixed[1], FileNotFoundError)
    for cache in ("none", "readahead", "bytes", "all", "blockcache"):
        with way.open(path, "rb", cache_type=cache, block_size=1 << 20) as file:
            file.seek(1_500_000)
            assert file.read(700_000) == data[1_500_000:2_200_000]


def test_many_files_at_once(way: WarabiFileSystem, top: str) -> None:
    sizes = [0, 10, 5000, 70_000, 1 << 20, (4 << 20) + 1] + [100] * 100
    files = {f"{top}/{i % 7}/{i}": os.urandom(size) for i, size in enumerate(sizes)}
    way.pipe(files)  # makes the directories
    assert way.cat(list(files)) == files
    way.pipe(dict.fromkeys(files, b"new"))
    assert way.cat(top, recursive=True, on_error="omit") == dict.fromkeys(files, b"new")
    with pytest.raises(FileExistsError):
        way.pipe({f"{top}/new": b"", **files}, mode="create")
    asked = [f"{top}/0/0", f"{top}/nothing", top, f"{top}/1/1"]
    with pytest.raises(FileNotFoundError):
        way.cat(asked)
    assert way.cat(asked, on_error="omit") == {asked[0]: b"new", asked[3]: b"new"}
    found = way.cat(asked, on_error="return")
    assert isinstance(found[asked[1]], FileNotFoundError)
    assert isinstance(found[asked[2]], IsADirectoryError)
    with pytest.raises(NotADirectoryError):
        way.pipe({f"{top}/0/0/below": b"", f"{top}/other": b""})
    with way.transaction:
        way.pipe({f"{top}/a": b"a", f"{top}/b": b"b"})
        assert not way.exists(f"{top}/a")
    assert way.cat([f"{top}/a", f"{top}/b"]) == {f"{top}/a": b"a", f"{top}/b": b"b"}


def test_writing_in_blocks_and_appends(way: WarabiFileSystem, top: str) -> None:
    path = f"{top}/file"
    data = os.urandom(500_000)
    with way.open(path, "wb", block_size=65536) as file:
        for start in range(0, len(data), 50_000):
            file.write(data[start : start + 50_000])
        assert not way.exists(path)  # until it is closed
    with way.open(path, "ab", block_size=65536) as file:
        assert file.tell() == len(data)
        file.write(data)
    assert way.cat(path) == data + data
    with way.open(f"{top}/new", "ab") as file:
        file.write(b"from nothing")
    assert way.cat(f"{top}/new") == b"from nothing"
    assert way.info(path)["size"] == way.size(path) == 2 * len(data)
    assert way.modified(path).timestamp() == pytest.approx(way.info(path)["mtime"])
    way.touch(path)
    assert way.size(path) == 0


def test_files_are_changed_in_place(way: WarabiFileSystem, top: str) -> None:
    path = f"{top}/file"
    with pytest.raises(FileNotFoundError):
        way.open(path, "r+b")
    way.pipe(path, b"0123456789" * 1000)
    region = way.region(path)[0]
    with way.open(path, "r+b") as file:
        assert file.read(5) == b"01234"
        file.write(b"-----")
        assert file.read(3) == b"012"
        file.seek(0, os.SEEK_END)
        assert file.tell() == 10_000
        file.write(b"end")
        file.seek(-5, os.SEEK_END)
        assert file.read() == b"89end"
    assert way.cat_file(path, 0, 12) == b"01234-----01"
    with way.open(path, "r+b") as file:
        file.truncate(4)
        file.seek(6)
        file.write(b"x")
    assert way.cat(path) == b"0123\0\0x"
    assert way.region(path)[0] == region
    with way.open(path, "r+") as text:
        assert text.read(4) == "0123"


def test_files_of_several_blocks_take_their_names_when_they_are_whole(
    way: WarabiFileSystem, top: str
) -> None:
    before = len(list(way.target.list()))
    for size in (0, 10, 200_000):
        path, data = f"{top}/{size}/file", os.urandom(size)
        with way.open(path, "xb", block_size=65536) as file:
            file.write(data)
            assert not way.exists(path)
        assert way.cat(path) == data
        with pytest.raises(FileExistsError):
            way.open(path, "xb")
        with way.transaction, way.open(path, "wb", block_size=65536) as file:
            file.write(data[::-1])
        assert way.cat(path) == data[::-1]
    assert len(list(way.target.list())) == before + 3


def test_transactions(way: WarabiFileSystem, top: str) -> None:
    way.pipe(f"{top}/a", b"old")
    before = len(list(way.target.list()))
    with pytest.raises(RuntimeError), way.transaction:
        way.pipe(f"{top}/a", b"new")
        way.pipe(f"{top}/b", b"new")
        raise RuntimeError
    assert way.cat(f"{top}/a") == b"old"
    assert way.ls(top, detail=False) == [f"{top}/a"]
    assert len(list(way.target.list())) == before
    with way.transaction:
        way.pipe(f"{top}/a", b"new")
        assert way.cat(f"{top}/a") == b"old"
    assert way.cat(f"{top}/a") == b"new"


def test_trees(way: WarabiFileSystem, top: str) -> None:
    for name in ("one.txt", "sub/two.txt", "sub/deep/three.bin"):
        way.pipe(f"{top}/{name}", name.encode())
    assert way.find(top) == [
        f"{top}/one.txt", f"{top}/sub/deep/three.bin", f"{top}/sub/two.txt",
    ]  # fmt: skip
    assert way.glob(f"{top}/**/*.txt") == [f"{top}/one.txt", f"{top}/sub/two.txt"]
    assert way.du(top) == len("one.txtsub/two.txtsub/deep/three.bin")
    way.mv(f"{top}/sub", f"{top}/moved")
    assert way.cat(f"{top}/moved/deep/three.bin") == b"sub/deep/three.bin"
    way.mv(f"{top}/one.txt", f"{top}/moved")
    assert way.ls(f"{top}/moved", detail=False) == [
        f"{top}/moved/deep", f"{top}/moved/one.txt", f"{top}/moved/two.txt",
    ]  # fmt: skip
    way.target.symlink("moved/one.txt", f"{top}/link")
    assert way.cat(f"{top}/link") == b"one.txt"
    assert way.info(f"{top}/link")["islink"]
    way.target.symlink("moved", f"{top}/moved/deep/directory")
    way.mkdir(f"{top}/other")
    way.target.symlink("../moved", f"{top}/other/link")
    way.rm(f"{top}/other", recursive=True)  # and not what the link leads to
    assert way.cat(f"{top}/moved/one.txt") == b"one.txt"
    with pytest.raises(FileNotFoundError):
        way.mv(f"{top}/nothing", f"{top}/made/nothing")
    assert not way.exists(f"{top}/made")
    region = way.target.create(10)
    assert f"/{region.hex()}" not in way.ls("/", detail=False)
    way.target.erase(region)


def test_errors_are_those_of_files(way: WarabiFileSystem, top: str) -> None:
    way.pipe(f"{top}/file", b"")
    with pytest.raises(FileNotFoundError, match="nothing: No such file or directory"):
        way.cat(f"{top}/nothing")
    with pytest.raises(FileNotFoundError):
        way.open(f"{top}/nothing")
    with pytest.raises(IsADirectoryError):
        way.cat(top)
    with pytest.raises(NotADirectoryError):
        way.pipe(f"{top}/file/below", b"")
    with pytest.raises(FileExistsError):
        way.mkdir(top)
    with pytest.raises(OSError, match="Directory not empty"):
        way.rmdir(top)
    assert not way.exists(f"{top}/file/below")


def test_coroutines_and_pickles(way: WarabiFileSystem, top: str) -> None:
    async def main() -> None:
        fs = pickle.loads(pickle.dumps(way))
        await fs._pipe_file(f"{top}/async", b"data")
        assert await fs._cat_file(f"{top}/async") == b"data"
        assert [one["size"] for one in await fs._ls(top)] == [4]
        async with await fs.open_async(f"{top}/streamed", "wb", block_size=65536) as stream:
            for _ in range(10):
                await stream.write(bytes(20_000))
            assert not await fs._exists(f"{top}/streamed")
        async with await fs.open_async(f"{top}/streamed") as stream:
            assert (stream.size, len(await stream.read(150_000))) == (200_000, 150_000)
            assert (await stream.read(), stream.loc) == (bytes(50_000), 200_000)
        with pytest.raises(RuntimeError):
            async with await fs.open_async(f"{top}/streamed", "wb", block_size=65536) as stream:
                await stream.write(b"x" * 100_000)
                raise RuntimeError
        assert await fs._cat_file(f"{top}/streamed", 0, 3) == bytes(3)
        with pytest.raises(FileNotFoundError):
            await fs.open_async(f"{top}/nothing")
        with pytest.raises(ValueError, match="'r'"):
            await fs.open_async(f"{top}/streamed", "r")
        await fs._rm_file(f"{top}/streamed")
        assert await fs._find(top) == [f"{top}/async"]
        options = {**fs.storage_options, "asynchronous": True}
        alone = WarabiFileSystem(*fs.storage_args, **options)  # without fsspec's own loop
        await alone._pipe_file(f"{top}/tree/file", b"data")
        await alone._rm(f"{top}/tree", recursive=True)
        assert not await alone._exists(f"{top}/tree")

    asyncio.run(main())
    url = way.unstrip_protocol(f"{top}/async")
    with fsspec.open(url) as file:
        assert file.read() == b"data"
        assert pickle.loads(pickle.dumps(file)).read() == b""  # at the same place
    other = (
        "import pickle, sys; fs, path = pickle.load(sys.stdin.buffer); "
        "assert fs.cat(path) == b'data'; fs.pipe(path + '2', b'more')"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", other],
        input=pickle.dumps((way, f"{top}/async")),
        check=True,
        timeout=60,
    )
    assert way.cat(f"{top}/async2") == b"more"


def test_urls(tmp_path: Path) -> None:
    for url, address in {
        "warabi://host:1234/7/a/b": "ofi+tcp://host:1234",
        "warabi://na+sm:12-3/7/a/b/": "na+sm://12-3",
    }.items():
        assert WarabiFileSystem._get_kwargs_from_urls(url) == {
            "address": address,
            "provider_id": 7,
        }
        assert WarabiFileSystem._strip_protocol(url) == "/a/b"
    for wrong in ("warabi://host:1234", "warabi://host:1234/name/x"):
        with pytest.raises(ValueError, match="expected warabi://host:port/provider/path"):
            fsspec.open(wrong)
    for scheme in ("warabi+file", "warabi"):
        with pytest.raises(FileNotFoundError, match="no part of this path is a target"):
            fsspec.open(f"{scheme}://{tmp_path}/nothing")
        (tmp_path / "target").touch()
        url = f"{scheme}://{tmp_path}/target/a/b"
        assert WarabiFileSystem._get_kwargs_from_urls(url) == {"path": f"{tmp_path}/target"}
        assert WarabiFileSystem._strip_protocol(url) == "/a/b"


def test_unreachable_and_read_only_targets(local_process: Served) -> None:
    address = local_process.address
    with pytest.raises(ConnectionError, match=re.escape("na+sm://1-99")):
        fsspec.filesystem("warabi", address="na+sm://1-99", provider_id=1)
    with pytest.raises(errors.ConfigError):
        fsspec.filesystem("warabi", address="nonsense", provider_id=1)
    with closing(fsspec.filesystem("warabi", address=address, provider_id=2, read_only=True)) as fs:
        with pytest.raises(FileNotFoundError, match="provider"):
            fsspec.filesystem("warabi", address=address, provider_id=999)
        with pytest.raises(PermissionError, match="read-only"):
            fs.pipe("/file", b"")
        with pytest.raises(PermissionError, match="read-only"):
            fs.mkdir("/directory")


def test_a_full_target_is_a_full_disk() -> None:
    config: dict[str, Any] = {"target": {"type": "memory", "config": {"capacity": 1 << 20}}}
    with (
        Engine("na+sm", server) as engine,
        Provider(engine, 1, config),
        closing(fsspec.filesystem("warabi", address=str(engine.addr()), provider_id=1)) as fs,
    ):
        with pytest.raises(OSError, match=r"\[Errno 28\]"):
            fs.pipe("/file", bytes(2 << 20))
        assert fs.ls("/") == []
        assert list(fs.target.list()) == []


def test_secrets_are_not_pickled(local_process: Served) -> None:
    with (
        closing(
            fsspec.filesystem(
                "warabi", address=local_process.address, provider_id=2, config={"token": "x" * 20}
            )
        ) as fs,
        pytest.raises(TypeError, match="token as text"),
    ):
        pickle.dumps(fs)


def test_zarr_and_h5py_without_a_mount(way: WarabiFileSystem, top: str) -> None:
    h5py: Any = importlib.import_module("h5py")
    numbers = np.arange(10_000, dtype="f8").reshape(100, 100)
    array = zarr.create_array(
        zarr.storage.FsspecStore.from_url(way.unstrip_protocol(f"{top}/numbers.zarr")),
        shape=numbers.shape, chunks=(10, 100), dtype=numbers.dtype,
    )  # fmt: skip
    array[:] = numbers
    assert np.array_equal(array[37:53, ::3], numbers[37:53, ::3])
    local = h5py.File.in_memory()
    local["numbers"] = numbers
    local.flush()
    way.pipe(f"{top}/numbers.h5", local.id.get_file_image())
    with way.open(f"{top}/numbers.h5", "rb") as file, h5py.File(file) as opened:
        assert np.array_equal(opened["numbers"][5:20], numbers[5:20])
