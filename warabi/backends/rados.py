"""Regions in a pool of a Ceph cluster.

A region is the objects ``NAME.ID.0``, ``NAME.ID.1``, ..., of ``stripe_unit`` bytes each:

* Object 0 exists as long as the region does.
* The last one ends where the region ends, which is how a size is found after a crash.
* Others may be missing or short: what they lack is a hole, and reads as zero.
* The attribute ``objects`` of object 0 is more than the number of any object that may exist, so
  that all are found when the region shrinks or is erased; without it there is one object.

Every change is on stable storage, in all copies, when the call returns.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, StrictBool, StrictInt, StrictStr, StringConstraints

from warabi import errors
from warabi._core import forks
from warabi._core.tuning import POOL_CONNECT, POOL_PATIENCE
from warabi.backends.base import STRANGERS, Location, Storage
from warabi.backends.librados import Change, Cluster, Pool
from warabi.backends.rados_owner import Ownership
from warabi.backends.record import Backend
from warabi.backends.remote import RemoteTarget
from warabi.backends.settings import Bytes, Model
from warabi.errors import (
    ConfigError,
    CorruptTarget,
    PermissionDenied,
    StorageError,
    StorageFull,
    WouldBlock,
    path_error,
)
from warabi.metadata.replica import Store
from warabi.region import RegionID

_COUNT = "objects"
_REMEMBERED = 65536  # regions whose size is known without asking
_BATCH = 256  # objects to look for at a time
_UNKNOWN: Final = 1 << 60
"""Bytes of a cluster that does not say how many it has: without a manager daemon."""
_REGION = re.compile("([0-9a-f]{32})[.]([0-9a-f]{8})")
_MOST = 1 << 18
"""Objects of a region, each of which is asked for when it shrinks or is erased: 1 TiB."""
_STRIPE = 4 * 1024 * 1024
_VERSION = 1  # of the objects' names and attributes
_LAYOUT = "layout"
_ROOM_AGE = 5.0
"""Seconds for which the monitors' answer on space is used: statfs(2) may be frequent."""


class RadosConfig(Model):
    """Settings of the ``rados`` backend."""

    pool: Annotated[StrictStr, Field(min_length=1)]
    name: Annotated[StrictStr, StringConstraints(pattern="^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
    namespace: StrictStr | None = None
    conf: StrictStr | None = None
    user: Annotated[StrictStr, Field(min_length=1)] = "admin"
    keyring: StrictStr | None = None
    stripe_unit: Annotated[StrictInt, Field(ge=4096, le=64 * 1024 * 1024)] = _STRIPE
    create_if_missing: StrictBool = False
    capacity: Bytes | None = None


def translated(error: OSError, what: str) -> errors.Exception:
    """Return the library's exception for an error of the cluster; *what* was done."""
    if isinstance(error, errors.Exception):
        return error
    number = error.errno
    if number in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{what}: the pool is full, or its quota is exhausted")
    if number == errno.ETIMEDOUT:
        return StorageError(f"{what}: the cluster did not respond in time")
    if number == errno.ESHUTDOWN:
        return StorageError(
            f"{what}: another process has taken over the target, and this one is blocklisted"
        )
    if number == errno.ENOENT:
        return CorruptTarget(f"{what}: its objects, or the pool, do not exist any more")
    if number in (errno.EACCES, errno.EPERM):
        return PermissionDenied(f"{what}: the cluster does not allow this user to do that")
    return StorageError(f"{what}: {error.strerror}")


@contextlib.contextmanager
def _translating(what: str) -> Iterator[None]:
    """Raise errors of the cluster in the block as :func:`translated` does."""
    try:
        yield
    except OSError as error:
        raise translated(error, what) from error


def _pieces(offset: int, size: int, unit: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the number of each object of *unit* bytes that has a part of an extent, where in it,
    and from where to where in the extent."""
    at = 0
    while at < size:
        index, start = divmod(offset + at, unit)
        end = min(size, at + unit - start)
        yield index, start, at, end
        at = end


class RadosStorage(Storage):
    """Regions in objects of *pool* whose names begin with *name*, of *unit* bytes each.

    Args:
        label: the target, for messages.
        room: returns total and available bytes of the pool, zeros if they are not known.
    """

    blocking = True
    write_waits = True
    shares_writes = False

    def __init__(
        self, pool: Pool, name: str, unit: int, label: str, room: Callable[[], tuple[int, int]]
    ) -> None:
        self._pool = pool
        self._name = name
        self._unit = unit
        self._label = label
        self._room = room
        # Of regions that this process resized or checked.  One at a time changes a region's size.
        self._sizes: dict[bytes, int] = {}
        self._sizes_lock = forks.lock()

    def _translated(self, what: str, rid: bytes | None = None) -> AbstractContextManager[None]:
        if rid is not None:
            what = f"{what} region {rid.hex()}"
        return _translating(f"{what} of {self._label}")

    # Sizes and objects

    def _object(self, rid: bytes, index: int) -> str:
        return f"{self._name}.{rid.hex()}.{index:08x}"

    def _count(self, size: int) -> int:
        """Objects of a region of *size* bytes."""
        return max(1, -(-size // self._unit))

    def _check_size(self, size: int) -> None:
        if self._count(size) > _MOST:
            raise StorageFull(
                f"{size} bytes for a region of {self._label}: it has at most {_MOST} objects of"
                f" {self._unit} bytes"
            )

    def _remember(self, rid: bytes, size: int) -> None:
        with self._sizes_lock:
            while len(self._sizes) >= _REMEMBERED:
                del self._sizes[next(iter(self._sizes))]
            self._sizes[rid] = size

    def _forget(self, rid: bytes) -> int | None:
        with self._sizes_lock:
            return self._sizes.pop(rid, None)

    def _bound(self, rid: bytes) -> int:
        """More than the number of any object that the region may have."""
        value = self._pool.attribute(self._object(rid, 0), _COUNT)
        return 1 if value is None else int(value)

    def _end(self, size: int) -> Change:
        """What makes the last object end where a region of *size* bytes ends."""
        return Change().create().truncate(size - (self._count(size) - 1) * self._unit)

    def _extend(self, rid: bytes, old: int, size: int) -> None:
        """Have it known that objects follow, before they do."""
        count = self._count(size)
        if count > self._count(old) and count > (bound := self._bound(rid)):
            value = b"%d" % max(count, 2 * bound)
            self._pool.apply(self._object(rid, 0), Change().create().attribute(_COUNT, value))

    def create(self, rid: RegionID, size: int) -> None:
        self._check_size(size)
        with self._translated("create", rid):
            count = self._count(size)
            first = Change().create().truncate(min(size, self._unit))
            if count > 1:
                first.attribute(_COUNT, b"%d" % count)
            self._pool.apply(self._object(rid, 0), first)
            if count > 1:
                self._pool.apply(self._object(rid, count - 1), self._end(size))
        self._remember(rid, size)

    def erase(self, rid: RegionID) -> None:
        with self._translated("erase", rid):
            self._shorten([rid], keep=0)

    def erase_all(self, rids: list[RegionID]) -> Iterator[tuple[RegionID, errors.Exception]]:
        for start in range(0, len(rids), _BATCH):
            some = rids[start : start + _BATCH]
            try:
                with self._translated("erase regions"):
                    self._shorten(some, keep=0)
            except errors.Exception:
                yield from super().erase_all(some)

    def _shorten(self, rids: Sequence[bytes], *, keep: int) -> None:
        """Remove all but the first *keep* objects of each region; object 0, which tells how many
        there are, last."""
        for rid in rids:
            size = self._forget(rid)
            try:
                count = self._bound(rid) if size is None else self._count(size)
            except FileNotFoundError:
                continue  # it was removed before
            while count > max(keep, 1):  # backwards, so that a crash leaves a shorter region
                least = max(count - _BATCH, keep, 1)
                names = [self._object(rid, index) for index in range(least, count)]
                sizes = self._pool.sizes(names)  # to remove what does not exist takes far longer
                self._pool.apply_all(
                    [
                        (n, Change().remove())
                        for n, z in zip(names, sizes, strict=True)
                        if z is not None
                    ],
                    missing=True,
                )
                count = least
        if keep == 0:
            first = [(self._object(rid, 0), Change().remove()) for rid in rids]
            self._pool.apply_all(first, missing=True)

    def resize(self, rid: RegionID, size: int) -> None:
        self._check_size(size)
        with self._translated("resize", rid):
            old, count = self._sizes.get(rid), self._count(size)
            if old is None or count < self._count(old):
                self._shorten([rid], keep=count)
            self._forget(rid)
            self._extend(rid, 0 if old is None else old, size)
            self._pool.apply(self._object(rid, count - 1), self._end(size))
        self._remember(rid, size)

    def replace(self, rid: RegionID, size: int) -> Callable[[], None]:
        self.resize(rid, size)
        return lambda: None  # no other process has been given the location

    def check(self, rid: RegionID, size: int) -> None:
        if self._sizes.get(rid) == size:
            return
        with self._translated("check", rid):
            index = self._count(size) - 1
            try:
                found = self._pool.size(self._object(rid, index))
            except FileNotFoundError:
                found = -1
        if found < size - index * self._unit:
            raise CorruptTarget(
                f"region {rid.hex()} of {self._label} lacks bytes: its size is {size}, and object"
                f" {self._object(rid, index)} {'is missing' if found < 0 else f'has {found}'}"
            )
        self._remember(rid, size)

    # Bytes

    def read_into(self, rid: RegionID, offset: int, out: memoryview) -> None:
        with self._translated("read", rid):
            pieces = [
                (self._object(rid, index), start, out[begin:end])
                for index, start, begin, end in _pieces(offset, len(out), self._unit)
            ]
            found: list[int | None]
            if len(pieces) == 1:
                try:
                    found = [self._pool.read(*pieces[0])]
                except FileNotFoundError:
                    found = [None]
            else:
                found = self._pool.read_all(pieces)
            if None in found:  # a hole, or no such region, or no pool any more
                self._pool.size(self._object(rid, 0))
        for size, (_, _, place) in zip(found, pieces, strict=True):
            if (size or 0) < len(place):
                place[size or 0 :] = bytes(len(place) - (size or 0))

    def read_into_nowait(self, rid: RegionID, offset: int, out: memoryview) -> None:
        raise WouldBlock

    def write(self, rid: RegionID, offset: int, data: memoryview) -> None:
        with self._translated("write", rid):
            self._pool.apply_all([
                (self._object(rid, index), Change().write(start, data[begin:end]))
                for index, start, begin, end in _pieces(offset, len(data), self._unit)
            ])  # fmt: skip

    def write_beyond(self, rid: RegionID, offset: int, data: memoryview) -> None:
        self._check_size(offset + len(data))
        with self._translated("write", rid):
            old = self._forget(rid)
            self._extend(rid, 0 if old is None else old, offset + len(data))
        self.write(rid, offset, data)
        self._remember(rid, offset + len(data))

    def allocate(self, rid: RegionID, offset: int, size: int) -> None:
        raise path_error(
            errno.EOPNOTSUPP, f"allocate in {self._label}: a pool cannot allocate in advance"
        )

    def zero(self, rid: RegionID, offset: int, size: int, *, free: bool) -> None:
        if not free:
            super().zero(rid, offset, size, free=free)
            return
        with self._translated("zero", rid):
            changes = []
            for index, start, begin, end in _pieces(offset, size, self._unit):
                change, last, stop = Change(), end == size, start + end - begin
                # A pool shortens an object that it zeroes to its end; a region must keep its own.
                if last and self._pool.sizes([self._object(rid, index)])[0] == stop:
                    change.truncate(start).truncate(stop)
                elif index > 0 and not last and start == 0:
                    change.remove()
                else:
                    change.zero(start, end - begin)
                changes.append((self._object(rid, index), change))
            self._pool.apply_all(changes, missing=True)

    def seek(self, rid: RegionID, offset: int, end: int, *, hole: bool) -> int:
        at = offset
        with self._translated("seek in", rid):
            while at < end:
                first = at // self._unit
                last = min(first + _BATCH, self._count(end))
                sizes = self._pool.sizes([self._object(rid, i) for i in range(first, last)])
                for index, size in enumerate(sizes, first):
                    start = index * self._unit
                    data_end = start + (size or 0)
                    if hole and at >= data_end:
                        return min(at, end)
                    if not hole and at < data_end:
                        return min(at, end)
                    at = min(start + self._unit, max(at, data_end)) if hole else start + self._unit
                    if hole and at < start + self._unit:
                        return min(at, end)
        return end

    # Durability: every call has returned when its change was on stable storage

    def persist(self, rid: RegionID, offset: int, size: int, *, times: bool = False) -> None:
        pass

    def persist_all(self) -> None:
        pass

    def persist_names(self) -> None:
        pass

    def oldest_fresh(self) -> RegionID | None:
        return None

    def sync_found(self) -> None:
        pass

    # Other processes have no direct access

    def wrote(self, rid: bytes) -> None:
        pass

    def share(self, rid: RegionID, *, writable: bool, holder: int = STRANGERS) -> Location | None:
        return None

    # All of it

    def room(self) -> tuple[int, int]:
        with self._translated("statistics"):
            total, available = self._room()
        return (total, available) if total else (_UNKNOWN, _UNKNOWN)

    def _listed(self) -> Iterator[tuple[str, str, int]]:
        """Yield the name of each object of a region, the region's ID, and the object's number."""
        for name in self._pool.names():
            if name.startswith(f"{self._name}.") and (
                found := _REGION.fullmatch(name, len(self._name) + 1)
            ):
                yield name, found[1], int(found[2], 16)

    def scan(self) -> Iterator[tuple[RegionID, int]]:
        with self._translated("list regions"):
            last: dict[str, int] = {}
            for _, rid, index in self._listed():
                last[rid] = max(last.get(rid, 0), index)
            regions = [(RegionID(bytes.fromhex(rid)), index) for rid, index in last.items()]
            for start in range(0, len(regions), _BATCH):
                some = regions[start : start + _BATCH]
                sizes = self._pool.sizes([self._object(*each) for each in some])
                for (region, index), size in zip(some, sizes, strict=True):
                    yield region, index * self._unit + (size or 0)

    def close(self) -> None:
        self._sizes.clear()

    def destroy(self) -> None:
        with self._translated("destroy"):
            names = [name for name, _, _ in self._listed()]
            self._pool.apply_all([(name, Change().remove()) for name in names], missing=True)
        self.close()


class PoolStore(Store):
    """Files of a catalogue in objects ``NAME.FILE.0``, ``NAME.FILE.1``, ..., of *unit* bytes."""

    def __init__(self, pool: Pool, name: str, unit: int, label: str) -> None:
        self._pool = pool
        self._name = name
        self._unit = unit
        self._label = label

    def _object(self, name: str, index: int) -> str:
        return f"{self._name}.{name}.{index:08x}"

    def _translated(self, what: str) -> AbstractContextManager[None]:
        return _translating(f"{what} the catalogue of {self._label}")

    def write(self, name: str, extents: Sequence[tuple[int, bytes]]) -> None:
        changes: dict[int, Change] = {}
        for offset, data in extents:
            view = memoryview(data)
            for index, start, begin, end in _pieces(offset, len(data), self._unit):
                changes.setdefault(index, Change()).write(start, view[begin:end])
        with self._translated("write"):
            self._pool.apply_all([(self._object(name, i), each) for i, each in changes.items()])

    def read(self, name: str, offset: int, size: int) -> bytes | None:
        out = memoryview(bytearray(size))
        pieces = [
            (self._object(name, index), start, out[begin:end])
            for index, start, begin, end in _pieces(offset, size, self._unit)
        ]
        with self._translated("read"):
            found = self._pool.read_all(pieces)
        return None if not any(found) else bytes(out)

    def size(self, name: str) -> int:
        total, index = 0, 0
        with self._translated("read"):
            while (found := self._pool.sizes([self._object(name, index)])[0]) is not None:
                total = index * self._unit + found
                index += 1
        return total

    def remove(self, name: str) -> None:
        index = -(-self.size(name) // self._unit)
        with self._translated("write"):
            while index > 0:  # the last first: what is left is still the beginning of it
                index -= 1
                change = [(self._object(name, index), Change().remove())]
                self._pool.apply_all(change, missing=True)


class RadosTarget(RemoteTarget):
    """A target in a pool, on a connection of its own, by which it can be fenced off.

    Raises:
        ConfigError: there is no such configuration, pool or target.
        PermissionDenied: the cluster refuses the user.
        TargetBusy: a living process has it open.
        StorageError: the cluster does not respond.
    """

    def __init__(self, settings: RadosConfig, patience: float) -> None:
        self.label = f"rados:{settings.pool}/{settings.name}"
        self._cluster: Cluster | None = None
        self._pool: Pool | None = None
        self._room = (-_ROOM_AGE, (0, 0))
        try:
            self._open(settings, patience)
        except BaseException as error:
            self._disconnect()
            if isinstance(error, OSError):
                raise translated(error, f"target {self.label}") from error
            raise
        forks.register(self)

    def _open(self, settings: RadosConfig, patience: float) -> None:
        self._cluster = cluster = self._connected(settings)
        namespace = settings.name if settings.namespace is None else settings.namespace
        try:
            pool = self._pool = Pool(cluster, settings.pool, namespace)
        except FileNotFoundError:
            raise ConfigError(
                f"target {self.label}: the cluster has no pool {settings.pool!r}"
            ) from None
        owner = f"{settings.name}.owner"
        unit = self._unit(pool, owner, settings)
        self._ownership = Ownership(cluster, pool, owner, self.label, patience)
        self.instead = {} if unit == settings.stripe_unit else {"stripe_unit": unit}
        self.store = PoolStore(pool, settings.name, _STRIPE, self.label)
        self._name = settings.pool
        self.storage = RadosStorage(pool, settings.name, unit, self.label, self.room)

    def _connected(self, settings: RadosConfig) -> Cluster:
        where = f"target {self.label}: "
        user = f"client.{settings.user}"
        try:
            return Cluster(
                settings.conf, settings.user, settings.keyring, POOL_CONNECT, POOL_PATIENCE
            )
        except FileNotFoundError as error:
            raise ConfigError(
                f"{where}{error.filename or 'a configuration'} of a cluster, or the keyring of"
                f" {user}, is missing"
            ) from None
        except OSError as error:
            if error.errno == errno.ETIMEDOUT:
                raise StorageError(
                    f"{where}no monitor of the cluster responded within {POOL_CONNECT:g} s"
                ) from None
            if error.errno in (errno.EACCES, errno.EPERM):
                raise PermissionDenied(f"{where}the cluster refuses {user} with this key") from None
            raise

    def _unit(self, pool: Pool, owner: str, settings: RadosConfig) -> int:
        """Bytes of an object of the target, which is created if that is wanted."""
        try:
            found = pool.attribute(owner, _LAYOUT)
        except FileNotFoundError:
            if not settings.create_if_missing:
                raise ConfigError(
                    f"target {self.label}: no such target, and create_if_missing is not set"
                ) from None
            layout = {"version": _VERSION, "stripe_unit": settings.stripe_unit}
            change = Change().create(exclusive=True).attribute("owner", b"")
            with contextlib.suppress(FileExistsError):  # another process was faster
                pool.apply(owner, change.attribute(_LAYOUT, json.dumps(layout).encode()))
            found = pool.attribute(owner, _LAYOUT)
        try:
            layout = json.loads(found or b"")
            version, unit = layout["version"], int(layout["stripe_unit"])
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"target {self.label}: object {owner} is not a target's") from None
        if version != _VERSION:
            raise ConfigError(
                f"target {self.label}: written by another version (layout {version}, this one reads"
                f" {_VERSION})"
            )
        return unit

    def room(self) -> tuple[int, int]:
        """Total and available bytes of the pool; zeros if the cluster does not say."""
        when, known = self._room
        now = time.monotonic()
        if now - when >= _ROOM_AGE:
            assert self._cluster is not None  # it is open
            for pool in self._cluster.command("df")["pools"]:
                if pool["name"] == self._name:
                    available = int(pool["stats"]["max_avail"])
                    known = int(pool["stats"].get("stored", 0)) + available, available
            self._room = now, known
        return known

    def release(self) -> None:
        self._ownership.release()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._cluster is not None:
            self._cluster.close()
        self._pool = self._cluster = None

    def _forked(self) -> None:
        self._pool = self._cluster = None  # the parent's
        self._ownership.forked()


def _spelled(place: str) -> dict[str, Any]:
    """The settings of ``[USER@]POOL/NAME``."""
    before, _, rest = place.rpartition("@")
    pool, slash, name = rest.partition("/")
    if not (pool and slash and name):
        raise ConfigError(
            f"target rados:{place}: expected rados:POOL/NAME, or rados:USER@POOL/NAME"
        )
    return {"pool": pool, "name": name, **({"user": before} if before else {})}


def _unopened(settings: Any, root: Path) -> Storage:
    raise ConfigError("a target in a pool is opened with its catalogue")


BACKEND = Backend(
    name="rados",
    config=RadosConfig,
    storage=RadosStorage,
    open=_unopened,
    remote=RadosTarget,
    spelling=_spelled,
)
