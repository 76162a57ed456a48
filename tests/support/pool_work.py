"""What the processes of pools do in ``provider/test_processes.py``: ``pool_work.py METHOD
ADDRESS``.

A module of its own, because with ``spawn`` and ``forkserver`` workers import it.
"""

from __future__ import annotations

import errno
import multiprocessing
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor

from warabi import processes
from warabi.client import Client, RegionID, TargetHandle
from warabi.engine import Engine, client
from warabi.errors import InvalidRegion, PathError, PermissionDenied
from warabi.server import Provider


def work(handle: TargetHandle, number: int) -> RegionID:
    region = handle.create_and_write(bytes([number]) * 1000)
    handle.write(region, 0, b"mine")
    assert handle.read(region, 0, 5) == b"mine" + bytes([number])
    handle.erase(handle.create(100_000))
    assert len(processes._engines._made) <= 1  # one for the process, and not for each handle
    return region


def read_only(handle: TargetHandle, region: RegionID) -> bytes:
    try:
        handle.erase(region)
    except PermissionDenied:
        return handle.read(region, 4, 1)
    raise AssertionError


def checked(handle: TargetHandle, reader: TargetHandle, method: str) -> None:
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        regions = list(executor.map(work, [handle] * 8, range(8)))
        assert len(set(regions)) == 8
        for number, region in enumerate(regions):
            assert handle.read(region, 0, 5) == b"mine" + bytes([number])
        assert executor.submit(read_only, reader, regions[3]).result() == b"\3"
        missing = executor.submit(handle.open_name, "/missing").exception()
        assert isinstance(missing, PathError)
        assert missing.errno == errno.ENOENT
        handle.erase(regions[0])
        erased = executor.submit(handle.read, regions[0], 0, 1).exception()
        assert isinstance(erased, InvalidRegion)


def main(method: str, address: str) -> None:
    if address:
        with Engine(address.partition(":")[0], client, config={"timeout": 30}) as engine:
            own = Client(engine)
            reader = own.make_target_handle(address, 1, read_only=True)
            checked(own.make_target_handle(address, 1), reader, method)
        return
    with Engine("na+sm") as engine, Provider(engine, 1, {"target": {"type": "memory"}}):
        own = Client(engine)
        here = own.make_target_handle(str(engine.addr()), 1)
        reader = own.make_target_handle(str(engine.addr()), 1, read_only=True)
        again: TargetHandle = pickle.loads(pickle.dumps(here))
        assert type(again._link) is type(here._link)
        checked(here, reader, method)
        with multiprocessing.get_context(method).Pool(2) as pool:
            regions = pool.starmap(work, [(again, 1), (here, 2)])
        assert [here.read(region, 4, 1) for region in regions] == [b"\1", b"\2"]


if __name__ == "__main__":
    main(*sys.argv[1:])
