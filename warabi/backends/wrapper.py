"""Base class of storages that wrap another storage."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

from warabi import errors
from warabi.backends.base import STRANGERS, Fresh, Location, Storage
from warabi.backends.xattr_times import Times
from warabi.metadata.inode import Inode
from warabi.region import RegionID


class WrapperStorage(Storage):
    """Forwards calls to *inner*, some of which a subclass changes.

    Methods that concern a storage as a whole, or query a region without changing it, are forwarded
    unless they are overridden.  Methods that read, change, share or persist data are abstract, even
    if :class:`Storage` has a default: a subclass must define each of them, with
    ``name = Storage.name`` where the default is right.
    """

    def __init__(self, inner: Storage) -> None:
        self._inner = inner
        self.instead = inner.instead

    # To be defined by the subclass

    @abstractmethod
    def create(self, rid: RegionID, size: int) -> None: ...

    @abstractmethod
    def written(self, data: memoryview) -> Fresh | None: ...

    @abstractmethod
    def cleared(self, size: int, holder: int) -> Fresh | None: ...

    @abstractmethod
    def erase(self, rid: RegionID) -> None: ...

    @abstractmethod
    def erase_all(self, rids: list[RegionID]) -> Iterator[tuple[RegionID, errors.Exception]]: ...

    @abstractmethod
    def resize(self, rid: RegionID, size: int) -> None: ...

    @abstractmethod
    def read_into(self, rid: RegionID, offset: int, out: memoryview) -> None: ...

    @abstractmethod
    def read_into_nowait(self, rid: RegionID, offset: int, out: memoryview) -> None: ...

    @abstractmethod
    def view(
        self, rid: RegionID, offset: int, size: int, *, writable: bool = False
    ) -> memoryview | None: ...

    @abstractmethod
    def write(self, rid: RegionID, offset: int, data: memoryview) -> None: ...

    @abstractmethod
    def write_beyond(self, rid: RegionID, offset: int, data: memoryview) -> None: ...

    @abstractmethod
    def allocate(self, rid: RegionID, offset: int, size: int) -> None: ...

    @abstractmethod
    def zero(self, rid: RegionID, offset: int, size: int, *, free: bool) -> None: ...

    @abstractmethod
    def seek(self, rid: RegionID, offset: int, end: int, *, hole: bool) -> int: ...

    @abstractmethod
    def copy_range(
        self, source: RegionID, start: int, rid: RegionID, offset: int, size: int
    ) -> None: ...

    @abstractmethod
    def replace(self, rid: RegionID, size: int) -> Callable[[], None]: ...

    @abstractmethod
    def clone(self, rid: RegionID, copy: RegionID, size: int) -> None: ...

    @abstractmethod
    def vacate(self, rid: RegionID) -> None: ...

    @abstractmethod
    def keep_times(self, rid: RegionID, times: Times) -> bool: ...

    @abstractmethod
    def persist(self, rid: RegionID, offset: int, size: int, *, times: bool = False) -> None: ...

    @abstractmethod
    def persist_all(self) -> None: ...

    @abstractmethod
    def wrote(self, rid: bytes) -> None: ...

    @abstractmethod
    def grew(self, rid: bytes, size: int) -> None: ...

    @abstractmethod
    def share(
        self, rid: RegionID, *, writable: bool, holder: int = STRANGERS
    ) -> Location | None: ...

    @abstractmethod
    def metadata_durable(self, rid: RegionID) -> bool: ...

    # Forwarded

    def packs(self, size: int) -> bool:
        return self._inner.packs(size)

    def retire(self, inode: Inode) -> None:
        self._inner.retire(inode)

    def moves(self, rid: RegionID, size: int) -> bool:
        return self._inner.moves(rid, size)

    def space(self, rid: RegionID, size: int) -> int:
        return self._inner.space(rid, size)

    def leaves_holes(self, size: int) -> bool:
        return self._inner.leaves_holes(size)

    def check(self, rid: RegionID, size: int) -> None:
        self._inner.check(rid, size)

    def attests(self, inode: Inode, size: int) -> bool:
        return self._inner.attests(inode, size)

    def run_deferred(self) -> None:
        self._inner.run_deferred()

    def kept_times(self, rid: RegionID) -> Times | None:
        return self._inner.kept_times(rid)

    def persist_names(self) -> None:
        self._inner.persist_names()

    def oldest_fresh(self) -> RegionID | None:
        return self._inner.oldest_fresh()

    def sync_found(self) -> None:
        self._inner.sync_found()

    def found(self, inode: Inode) -> bool:
        return self._inner.found(inode)

    def tidy(self, attests: Callable[[Inode, int], bool]) -> bool:
        return self._inner.tidy(attests)

    def left(self, holder: int) -> None:
        self._inner.left(holder)

    def charge(self, count: int) -> None:
        self._inner.charge(count)

    def statistics(self) -> dict[str, int]:
        return self._inner.statistics()

    def room(self) -> tuple[int, int]:
        return self._inner.room()

    def scan(self) -> Iterator[tuple[RegionID, int]]:
        return self._inner.scan()

    def close(self) -> None:
        self._inner.close()

    def destroy(self) -> None:
        self._inner.destroy()
