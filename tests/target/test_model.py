"""Random operations against a model, over the wire."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.support.helpers import MEMORY, file_config, summed_config
from warabi import errors
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.region import RegionID
from warabi.server import Provider

SIZES = st.one_of(
    st.integers(0, 300),
    st.sampled_from([2047, 2048, 2049, 65_535, 65_536, 65_537, 200_000]),
)
OFFSETS = st.one_of(st.integers(0, 300), st.integers(0, 200_000))
CHANGES = st.sampled_from(["allocate", "zero_range", "punch_hole"])
NAMES = st.sampled_from(["/a", "/b", "/c"])


class Model(RuleBasedStateMachine):
    """A target as a dict of bytearrays; every operation is done to both and compared."""

    config: ClassVar[Any]
    regions = Bundle("regions")
    gone = Bundle("gone")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.engine = Engine("na+sm")
        self.client = Engine("na+sm", client)
        self.provider: Provider | None = None
        self.content: dict[RegionID, bytearray] = {}
        self.names: dict[str, RegionID] = {}
        self.serial = 0

    @initialize()
    def open(self) -> None:
        self.provider = Provider(self.engine, 1, type(self).config(self.directory / "target"))
        self.handle: TargetHandle = Client(self.client).make_target_handle(
            str(self.engine.addr()), 1
        )

    def data(self, size: int) -> bytes:
        self.serial += 1
        return (b"%08d" % self.serial * (size // 8 + 1))[:size]

    @rule(target=regions, size=SIZES)
    def create(self, size: int) -> RegionID:
        region = self.handle.create(size)
        assert region not in self.content
        self.content[region] = bytearray(size)
        return region

    @rule(target=regions, size=SIZES, persist=st.booleans(), later=st.booleans())
    def create_and_write(self, size: int, persist: bool, later: bool) -> RegionID:
        data = self.data(size)
        if later:
            region = self.handle.create_and_write_async(data, persist).wait()
        else:
            region = self.handle.create_and_write(data, persist)
        self.content[region] = bytearray(data)
        return region

    @rule(region=regions, offset=OFFSETS, size=SIZES, persist=st.booleans(), later=st.booleans())
    def write(self, region: RegionID, offset: int, size: int, persist: bool, later: bool) -> None:
        if region not in self.content:
            return
        data = self.data(size)
        try:
            if later:
                self.handle.write_async(region, offset, data, persist).wait()
            else:
                self.handle.write(region, offset, data, persist)
        except errors.OutOfBounds:
            assert offset + size > len(self.content[region])
        else:
            assert offset + size <= len(self.content[region])
            self.content[region][offset : offset + size] = data

    @rule(region=regions, offset=OFFSETS, size=SIZES, later=st.booleans())
    def read(self, region: RegionID, offset: int, size: int, later: bool) -> None:
        if region not in self.content:
            return
        buffer = bytearray(b"\xee" * size)
        try:
            if later:
                self.handle.read_async(region, offset, buffer).wait()
            else:
                self.handle.read_into(region, offset, buffer)
        except errors.OutOfBounds:
            assert offset + size > len(self.content[region])
            assert buffer == b"\xee" * size
        else:
            assert offset + size <= len(self.content[region])
            assert buffer == self.content[region][offset : offset + size]

    @rule(region=regions, size=SIZES)
    def resize(self, region: RegionID, size: int) -> None:
        if region in self.content:
            self.handle.resize(region, size)
            self.content[region] = self.content[region][:size].ljust(size, b"\0")

    @rule(region=regions, offset=OFFSETS, size=SIZES, name=CHANGES, keep=st.booleans())
    def change(self, region: RegionID, offset: int, size: int, name: str, keep: bool) -> None:
        if region not in self.content:
            return
        content, end = self.content[region], offset + size
        keep = keep or name == "punch_hole"
        getattr(self.handle, name)(region, offset, size, *([keep] * (name != "punch_hole")))
        if not keep and size:
            content.extend(bytes(max(0, end - len(content))))
        end = min(end, len(content))
        if name != "allocate" and offset < end:
            content[offset:end] = bytes(end - offset)
        assert self.handle.size(region) == len(content)

    @rule(source=regions, region=regions, start=OFFSETS, offset=OFFSETS, size=SIZES)
    def copy_range(
        self, source: RegionID, region: RegionID, start: int, offset: int, size: int
    ) -> None:
        if source not in self.content or region not in self.content:
            return
        data, content = self.content[source][start : start + size], self.content[region]
        try:
            assert self.handle.copy_range(source, start, region, offset, size) == len(data)
        except errors.OutOfBounds:
            assert source == region
            assert abs(start - offset) < len(data)
            return
        if data:
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data

    @rule(target=regions, region=regions, persist=st.booleans())
    def copy(self, region: RegionID, persist: bool) -> RegionID:
        if region not in self.content:
            return region
        copy = self.handle.copy(region, persist)
        self.content[copy] = self.content[region][:]
        return copy

    @rule(region=regions)
    def look_at_holes(self, region: RegionID) -> None:
        if region not in self.content:
            return
        left = self.content[region][:]
        for offset, size in self.handle.data_extents(region):
            left[offset : offset + size] = bytes(size)
        assert left == bytes(len(self.content[region]))

    @rule(region=regions)
    def persist(self, region: RegionID) -> None:
        if region in self.content:
            self.handle.persist(region, 0, len(self.content[region]))

    @rule(target=gone, region=consumes(regions))
    def erase(self, region: RegionID) -> Any:
        if region not in self.content:  # went with its last name
            return region
        self.handle.erase(region)
        self._forget(region)
        return region

    def _forget(self, region: RegionID) -> None:
        del self.content[region]
        self.names = {name: r for name, r in self.names.items() if r != region}

    @rule(region=gone)
    def use_after_erase(self, region: RegionID) -> None:
        for call in (
            lambda: self.handle.read(region, 0, 0),
            lambda: self.handle.write(region, 0, b""),
            lambda: self.handle.erase(region),
            lambda: self.handle.resize(region, 1),
        ):
            with pytest.raises(errors.InvalidRegion):
                call()

    @rule(region=regions, name=NAMES)
    def link_name(self, region: RegionID, name: str) -> None:
        if region not in self.content:
            return
        try:
            self.handle.link_name(region, name)
        except errors.PathError:
            assert name in self.names
        else:
            assert name not in self.names
            self.names[name] = region

    @rule(name=NAMES)
    def unlink_name(self, name: str) -> None:
        try:
            self.handle.unlink_name(name)
        except errors.PathError:
            assert name not in self.names
            return
        region = self.names.pop(name)
        if region not in self.names.values():
            self._forget(region)

    @rule(name=NAMES)
    def open_name(self, name: str) -> None:
        try:
            assert self.handle.open_name(name) == self.names[name]
        except errors.PathError:
            assert name not in self.names

    @precondition(lambda self: type(self).config is not _memory)
    @rule()
    def reopen(self) -> None:
        assert self.provider is not None
        self.provider.close()
        self.open()

    @invariant()
    def same_regions_and_names(self) -> None:
        if self.provider is None:
            return
        assert set(self.handle.list(page_size=3)) == set(self.content)
        named = set(self.names.values())
        nameless = {region.hex() for region in self.content if region not in named}
        # A region that lost all its names is gone; one that never had any shows its ID.
        shown = set(self.handle.list_names())
        assert shown == {name[1:] for name in self.names} | nameless

    def teardown(self) -> None:
        for region, content in self.content.items():
            assert self.handle.size(region) == len(content)
            assert self.handle.read(region, 0, len(content)) == content
        self.client.finalize()
        self.engine.finalize()
        shutil.rmtree(self.directory)


def _memory(path: Path) -> dict[str, Any]:
    return MEMORY


class MemoryModel(Model):
    config = staticmethod(_memory)


class FileModel(Model):
    config = staticmethod(file_config)


class SummedModel(Model):
    config = staticmethod(summed_config)


class _Shared(Model):
    """Regions are reached directly from the first touch on."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("warabi.shm.client._LARGE", 0)
        self.patch.setattr("warabi.remote.direct._FIRST_SIZE", 0)

    def teardown(self) -> None:
        super().teardown()
        self.patch.undo()


class SharedMemoryModel(_Shared):
    config = staticmethod(_memory)


class SharedFileModel(_Shared):
    config = staticmethod(file_config)


TestMemory = MemoryModel.TestCase
TestMemory.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestFile = FileModel.TestCase
TestFile.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestSummed = SummedModel.TestCase
TestSummed.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
TestSharedMemory = SharedMemoryModel.TestCase
TestSharedMemory.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestSharedFile = SharedFileModel.TestCase
TestSharedFile.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
