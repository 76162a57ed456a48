"""Data libraries on the fsspec driver: their files are those of a target, without a mount."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import fsspec
import fsspec.asyn
import numpy as np
import pytest
import zarr

from tests.support.helpers import Served, run_python
from warabi.fsspec import WarabiFileSystem

pandas: Any = importlib.import_module("pandas")
xarray: Any = importlib.import_module("xarray")


@pytest.fixture(scope="module", autouse=True)
def lasting(local_process: Served) -> None:
    """What lasts longer than a test, the event loops of fsspec and zarr too."""
    fsspec.asyn.get_loop()
    zarr.create_array({}, shape=(1,), dtype="u1")[:] = 1


@pytest.fixture
def fs(local_process: Served) -> Iterator[WarabiFileSystem]:
    fs = fsspec.filesystem("warabi", address=local_process.address, provider_id=2)
    try:
        yield fs
    finally:
        fs._engine.finalize()
        WarabiFileSystem.clear_instance_cache()


@pytest.fixture
def top(fs: WarabiFileSystem) -> Iterator[str]:
    """The URL of a new directory."""
    path = f"/programs-{os.urandom(8).hex()}"
    fs.mkdir(path)
    yield str(fs.unstrip_protocol(path))
    fs.rm(path, recursive=True)


def test_pandas(top: str) -> None:
    frame = pandas.DataFrame({"number": range(1000), "text": [f"row {i}" for i in range(1000)]})
    frame.to_csv(f"{top}/table.csv.gz", index=False)
    assert pandas.read_csv(f"{top}/table.csv.gz").equals(frame)
    frame.to_pickle(f"{top}/made/table.pickle")
    assert pandas.read_pickle(f"{top}/made/table.pickle").equals(frame)
    with pytest.raises(FileNotFoundError):
        pandas.read_csv(f"{top}/nothing.csv")


_MEAN = """
import sys
import dask
import xarray
opened = xarray.open_zarr(sys.argv[1], consolidated=False)
assert opened.chunks["time"] == (30,) * 4
with dask.config.set(scheduler="processes", num_workers=2):
    print(float(opened["temperature"].mean().compute()))
"""


def test_xarray_stores_and_processes_of_dask_read(top: str) -> None:
    """Each of them connects by itself."""
    temperature = np.arange(120.0 * 10).reshape(120, 10)
    made = xarray.Dataset({"temperature": (("time", "place"), temperature)})
    made.chunk({"time": 30}).to_zarr(f"{top}/weather.zarr", consolidated=False)
    done = run_python(_MEAN, f"{top}/weather.zarr")
    assert (done.stdout, done.stderr) == (f"{temperature.mean()}\n", "")


def test_safetensors(fs: WarabiFileSystem, top: str) -> None:
    safetensors: Any = importlib.import_module("safetensors.numpy")
    tensors = {"weights": np.arange(300_000, dtype="f4"), "bias": np.ones(7)}
    with fsspec.open(f"{top}/model.safetensors", "wb") as file:
        file.write(safetensors.save(tensors))
    loaded = safetensors.load(fs.cat(f"{top}/model.safetensors"))
    assert loaded.keys() == tensors.keys()
    assert all(np.array_equal(loaded[name], tensor) for name, tensor in tensors.items())
