"""A backend outside of the package: regions in a dictionary.  See docs/backends.md."""

from collections.abc import Callable, Iterator
from typing import Any

from warabi.backends import Backend, Storage, register
from warabi.backends.settings import Model
from warabi.region import RegionID


class DictStorage(Storage):
    blocking = False

    def __init__(self, *_: Any) -> None:
        self._regions: dict[bytes, bytearray] = {}

    def create(self, rid: RegionID, size: int) -> None:
        self._regions[rid] = bytearray(size)

    def erase(self, rid: RegionID) -> None:
        self._regions.pop(rid, None)

    def resize(self, rid: RegionID, size: int) -> None:
        self._regions[rid] = self._regions[rid][:size].ljust(size, b"\0")

    def replace(self, rid: RegionID, size: int) -> Callable[[], None]:
        self.resize(rid, size)
        return lambda: None

    def read_into(self, rid: RegionID, offset: int, out: memoryview) -> None:
        out[:] = memoryview(self._regions[rid])[offset : offset + len(out)]

    def write(self, rid: RegionID, offset: int, data: memoryview) -> None:
        memoryview(self._regions[rid])[offset : offset + len(data)] = data

    def room(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    def scan(self) -> Iterator[tuple[RegionID, int]]:
        return ((RegionID(rid), len(data)) for rid, data in self._regions.items())

    def _nothing(self, *args: Any, **options: Any) -> None:
        """No other process reaches the regions, and nothing is to be persisted or left behind."""

    read_into_nowait = read_into
    share = wrote = persist = persist_all = persist_names = _nothing
    oldest_fresh = sync_found = close = destroy = _nothing


BACKEND = Backend(name="dict", config=Model, storage=DictStorage, open=DictStorage)

if __name__ == "__main__":
    from warabi import client, engine, server

    register(BACKEND)
    with engine.Engine("na+sm", engine.server) as here:
        provider = server.Provider(here, 1, {"target": {"type": "dict"}})
        target = client.Client(here).make_target_handle(str(here.addr()), 1)
        print(target.read(target.create_and_write(b"kept in a dictionary"), 0, 20))
