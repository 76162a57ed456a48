"""Every storage of this package keeps what ``warabi.testing`` says of storages."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from warabi.backends import Storage
from warabi.backends.base import THIS_PROCESS
from warabi.backends.checksummed import SummedStorage
from warabi.backends.direct_io import DirectFileStorage
from warabi.backends.file import FileConfig, FileStorage
from warabi.backends.librados import Change
from warabi.backends.memory import MemoryStorage
from warabi.backends.packed import PackedStorage
from warabi.backends.pmem import PmemStorage
from warabi.backends.rados import RadosConfig, RadosTarget
from warabi.metadata.inode import OWN, PACKED
from warabi.region import RegionID
from warabi.target import opening
from warabi.target.target import Target
from warabi.testing import LastingStorageTests, StorageTests

pytestmark = pytest.mark.timeout(60)


class TestMemory(StorageTests):
    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        made = MemoryStorage()
        yield made
        made.close()

    def raw_get(self, storage: Storage, rid: RegionID, size: int) -> bytes:
        place = storage.share(rid, writable=False, holder=THIS_PROCESS)
        assert place is not None
        try:
            return os.pread(place.fd, size, place.offset)
        finally:
            os.close(place.fd)

    def raw_set(self, storage: Storage, rid: RegionID, data: bytes) -> None:
        place = storage.share(rid, writable=True, holder=THIS_PROCESS)
        assert place is not None
        try:
            assert os.pwrite(place.fd, data, place.offset) == len(data)
        finally:
            os.close(place.fd)


class _Files(LastingStorageTests):
    """Storages that have a file, or a part of one, for each region."""

    root: Path
    opened: list[Storage]

    def open(self) -> Storage:
        raise NotImplementedError

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[Storage]:
        self.root = tmp_path
        self.opened = []
        yield self._remembered()
        self.opened[-1].close()

    def _remembered(self) -> Storage:
        self.opened.append(self.open())
        return self.opened[-1]

    def reopen(self, storage: Storage) -> Storage:
        storage.close()
        return self._remembered()

    def place(self, storage: Storage, rid: RegionID) -> tuple[str, int]:
        """The path of the file that has the region, and where it begins."""
        name = rid.hex()
        return f"{self.root}/{name[-2:]}/{name}", 0

    def raw_get(self, storage: Storage, rid: RegionID, size: int) -> bytes:
        path, start = self.place(storage, rid)
        with open(path, "rb") as file:
            return os.pread(file.fileno(), size, start)

    def raw_set(self, storage: Storage, rid: RegionID, data: bytes) -> None:
        path, start = self.place(storage, rid)
        with open(path, "r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), data, start) == len(data)


class TestFiles(_Files):
    def open(self) -> Storage:
        return FileStorage(self.root)


class TestSyncedFiles(_Files):
    def open(self) -> Storage:
        return FileStorage(self.root, sync=True)


class TestDirectFiles(_Files):
    def open(self) -> Storage:
        return DirectFileStorage(self.root)


class TestPmem(_Files):
    def open(self) -> Storage:
        return PmemStorage(self.root)


class TestRados(LastingStorageTests):
    """With objects so small that most regions have several."""

    @pytest.fixture
    def storage(self, pool: Path) -> Iterator[Storage]:
        self.conf = pool
        self.name = uuid.uuid4().hex
        self.opened: list[RadosTarget] = []
        yield self._remembered()
        self.opened[-1].storage.destroy()
        self.opened[-1].release()

    def _remembered(self) -> Storage:
        settings = RadosConfig(
            pool="warabi", name=self.name, conf=str(self.conf), stripe_unit=16384,
            create_if_missing=True,
        )  # fmt: skip
        self.opened.append(RadosTarget(settings, 0.0))
        return self.opened[-1].storage

    def reopen(self, storage: Storage) -> Storage:
        storage.close()
        self.opened[-1].release()
        return self._remembered()

    def raw_get(self, storage: Storage, rid: RegionID, size: int) -> bytes:
        found = b""
        objects = self.opened[-1]._pool
        assert objects is not None
        for index in range(-(-size // 16384)):
            out = bytearray(16384)
            with contextlib.suppress(FileNotFoundError):
                objects.read(f"{self.name}.{rid.hex()}.{index:08x}", 0, memoryview(out))
            found += out
        return found[:size]

    def raw_set(self, storage: Storage, rid: RegionID, data: bytes) -> None:
        objects = self.opened[-1]._pool
        assert objects is not None
        for index in range(-(-len(data) // 16384)):
            piece = memoryview(data)[index * 16384 : (index + 1) * 16384]
            name = f"{self.name}.{rid.hex()}.{index:08x}"
            objects.apply(name, Change().create().write(0, piece))


class _OnCatalogue(_Files):
    """Storages that read the catalogue of a target."""

    settings: dict[str, Any]
    kind: type[Storage]
    target: Target

    def open(self) -> Storage:
        place = str(self.root / "target")
        self.target = opening.open_file(
            FileConfig(path=place, create_if_missing=True, **self.settings)
        )
        assert isinstance(self.target._storage, self.kind)
        return self.target._storage

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[Storage]:
        self.root = tmp_path
        self.opened = []
        yield self._remembered()
        self.target.close()

    def reopen(self, storage: Storage) -> Storage:
        self.target.close()
        return self._remembered()

    def new_id(self, storage: Storage, size: int) -> RegionID:
        packed = PACKED if storage.packs(size) else OWN
        return self.target._catalogue.add(
            0o100644, 0, 0, size=size, anonymous=True, packed=packed
        ).rid

    def resized(self, storage: Storage, rid: RegionID, size: int) -> None:
        inode = self.target._catalogue.region(rid)
        assert inode is not None
        self.target._catalogue.resize(inode, size)

    def retire(self, storage: Storage, rid: RegionID) -> None:
        inode = self.target._catalogue.region(rid)
        assert inode is not None
        storage.retire(inode)
        self.target._catalogue.remove(inode)

    def is_stored(self, storage: Storage, rid: RegionID, size: int) -> bool:
        found = dict(storage.scan())
        inode = self.target._catalogue.region(rid)
        if rid in found:
            return found[rid] == size
        return inode is not None and inode.size == size and storage.found(inode)

    def place(self, storage: Storage, rid: RegionID) -> tuple[str, int]:
        file, start = rid, 0
        inner = storage._inner if isinstance(storage, SummedStorage) else storage
        if isinstance(inner, PackedStorage):
            file, start = inner._at(rid)
        return f"{self.root}/target.regions/{file.hex()[-2:]}/{file.hex()}", start


class TestPacked(_OnCatalogue):
    settings = {"packed": True}  # noqa: RUF012
    kind = PackedStorage


class TestSummed(_OnCatalogue):
    settings = {"packed": False, "checksums": True}  # noqa: RUF012
    kind = SummedStorage


class TestSummedAndPacked(_OnCatalogue):
    settings = {"packed": True, "checksums": True}  # noqa: RUF012
    kind = SummedStorage


def test_a_class_that_overrides_a_test_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Lenient: overrides test_room_is_in_bytes"):

        class Lenient(StorageTests):
            def test_room_is_in_bytes(self, storage: Storage) -> None:
                pass
