"""Providers of an older version, which lack some operations: clients do without those."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.support import fails_with
from tests.support.helpers import ROOT, Served, file_config, python_process
from warabi import aio
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client

_OLDER = """
import runpy, sys
from warabi.protocol.operations import OPERATIONS
for name in ("store", "fetch", "publish"):
    del OPERATIONS[name]
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.fixture
def older(tmp_path: Path) -> Iterator[Served]:
    script = str(ROOT / "tests" / "support" / "serve.py")
    providers = json.dumps({"1": file_config(tmp_path / "target")})
    with python_process("-c", _OLDER, script, "na+sm", providers, "{}") as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address
        yield Served(process, address)


@pytest.fixture
def target(older: Served) -> Iterator[TargetHandle]:
    with Engine("na+sm", client) as engine:
        yield Client(engine).make_target_handle(older.address, 1)


@pytest.mark.parametrize("size", [10, 100_000, 5 << 20])
def test_files_are_stored_and_fetched_by_their_names(target: TargetHandle, size: int) -> None:
    target.mkdir("/directory")
    target.symlink("directory", "/link")
    path, data = "/link/name", os.urandom(size)
    for persist in (False, True):
        stored = target.store_name(path, data, 0o600, persist=persist)
        assert (stored.size, stored.mode & 0o7777) == (size, 0o600)
        assert target.fetch_name(path) == (stored, None)
        assert target.read(stored.region, 0, size) == data
    with pytest.raises(FileExistsError):
        target.store_name(path, data, exclusive=True)
    with pytest.raises(FileNotFoundError):
        target.fetch_name("/nothing")
    with pytest.raises(FileNotFoundError):
        target.store_name("/nothing/name", data)
    with fails_with(errno.EISDIR):
        target.store_name("/directory", data)
    assert list(target.list()) == [stored.region]
    results = list(target.store_names([("/1", data), ("/2", data)]))
    assert list(target.fetch_names(["/1", "/2"])) == [(one, None) for one in results]


async def test_a_trio_client_does_so_too(older: Served) -> None:
    async with aio.connect(older.address, 1) as target:
        for size in (10, 5 << 20):
            stored = await target.store_name("/name", bytes(size))
            assert await target.fetch_name("/name") == (stored, None)
            with pytest.raises(FileExistsError):
                await target.store_name("/name", bytes(size), exclusive=True)
        assert [region async for region in target.list()] == [stored.region]
