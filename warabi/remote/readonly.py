"""A read-only blocking link: operations that change anything are refused before they are sent.

The provider refuses them, too; this reports the error earlier, and also protects a target in the
caller's own process, which has no connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from warabi._core.extents import Extent
from warabi.local.link import Link
from warabi.protocol.auth import Peer, permit
from warabi.protocol.operations import access
from warabi.protocol.pending import PendingRequest
from warabi.region import RegionID
from warabi.shm.client import NO_ACCESS

_READER = Peer(read_only=True)


def refuse_change(name: str) -> None:
    """Raise ``PermissionDenied`` unless the operation *name* only reads."""
    permit(_READER, name, access(name))


class ReadOnlyLink:
    """Restricts *link* to operations that only read."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.writing = NO_ACCESS
        self.reading = link.reading

    @property
    def eager_write(self) -> int:
        return self._link.eager_write

    @eager_write.setter
    def eager_write(self, size: int) -> None:
        self._link.eager_write = size

    @property
    def eager_read(self) -> int:
        return self._link.eager_read

    @eager_read.setter
    def eager_read(self, size: int) -> None:
        self._link.eager_read = size

    def call(self, name: str, *arguments: Any) -> Any:
        refuse_change(name)
        return self._link.call(name, *arguments)

    def size(self, region: RegionID) -> int:
        return self._link.size(region)

    def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        refuse_change("write")

    def read_into(self, region: RegionID, offset: int, place: memoryview) -> None:
        self._link.read_into(region, offset, place)

    def persist(self, region: RegionID, offset: int, size: int) -> None:
        self._link.persist(region, offset, size)

    def create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        refuse_change("create_and_write")
        raise AssertionError

    def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None:
        refuse_change("write_vector")

    def append(self, region: RegionID, data: memoryview, persist: bool) -> int:
        refuse_change("append")
        raise AssertionError

    def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None:
        self._link.read_vector(region, extents, place)

    def start(self, name: str, *arguments: Any) -> list[PendingRequest]:
        refuse_change(name)
        return self._link.start(name, *arguments)

    def start_write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool
    ) -> list[PendingRequest]:
        refuse_change("write")
        raise AssertionError

    def start_read(self, region: RegionID, offset: int, place: memoryview) -> list[PendingRequest]:
        return self._link.start_read(region, offset, place)

    def start_create_and_write(self, data: memoryview, persist: bool) -> list[PendingRequest]:
        refuse_change("create_and_write")
        raise AssertionError

    def finish(self, requests: Sequence[PendingRequest]) -> Any:
        return self._link.finish(requests)

    def undo(self, requests: Sequence[PendingRequest]) -> None:
        self._link.undo(requests)

    def poll(self, request: PendingRequest) -> None:
        self._link.poll(request)
