"""The client's side of direct access to regions of a provider on the same host.

``target/leases.py`` explains the shared memory and the protocol that keeps a guest from accessing
memory that no longer belongs to its region.  The accesses themselves are in ``_fast_path.c``; this
module has the less frequent operations: requesting and keeping grants, and closing.

If an access is not possible it returns False, and the caller sends a request to the provider,
which also reports errors.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import time
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

from warabi import errors
from warabi._core import forks, syscalls
from warabi._core.buffers import MAX_SIZE
from warabi._core.descriptors import limit
from warabi._core.tuning import CLOSE_PATIENCE, HANDOVER_POLL
from warabi.region import RegionID
from warabi.shm.layout import ENTRIES, HAZARD_SLOTS, METADATA_DURABLE, TABLE
from warabi.shm.memory import SharedMapping, register

try:
    from warabi.shm._fast_path import FastPath, Grant
except ImportError:  # not built, since there was no compiler
    FastPath = Grant = object  # type: ignore[misc, assignment]
    _COMPILED = False
else:
    _COMPILED = True

_LARGE = 64 * 1024
"""From this size in bytes on a grant is requested on the first access, not the second."""
_MOST_GRANTS = 65536
_MOST_FILES = 16384  # region files that are kept open
_WHOLE = 4 * 1024 * 1024
"""Smaller ranges of larger regions are persisted alone: mapping them takes less than what else
might have to be written."""
_SPARE_ROOM = 1024 * 1024


def available() -> bool:
    """Whether this process can have direct access."""
    return _COMPILED and register()


class _SharedFile:
    """A descriptor of a file with several regions, open while a grant refers to it."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def _mapping(fd: int, size: int, *, writable: bool) -> SharedMapping:
    """Map the first *size* bytes of a file that cannot be truncated.

    Raises:
        OSError: the file is too small, may be truncated, or cannot be mapped.
    """
    found = os.fstat(fd).st_size
    if found < size or not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise OSError(
            errno.EINVAL, f"shared memory of {found} bytes, or not sealed, instead of {size} bytes"
        )
    return SharedMapping(fd, size, writable=writable)


def _sync_range(fd: int, offset: int, size: int) -> None:
    """The same as fdatasync(2), of some bytes of a file; no byte is accessed by the mapping."""
    end, start = offset + size, offset - offset % mmap.PAGESIZE
    address = syscalls.map_shared(fd, end, mmap.PROT_READ)
    try:
        syscalls.msync(address + start, end - start)
    finally:
        syscalls.munmap(address, end)


class Guest(FastPath):
    """Direct access to the regions of one target.

    Args:
        joined: the result of ``join``.
        descriptors: the descriptors sent with it; closed here.

    Raises:
        OSError: this process cannot use direct access.
        ProtocolError: the reply is malformed.
    """

    def __init__(self, joined: Sequence[int], descriptors: Sequence[int]) -> None:
        try:
            offset, alive, writable = joined
            if not available():
                raise OSError(errno.ENOSYS, "not compiled, or membarrier is not available")
            life, table, write_times, hazards = descriptors
            super().__init__(
                _mapping(life, resource.getpagesize(), writable=False),
                _mapping(table, TABLE, writable=False),
                _mapping(write_times, 8 * ENTRIES, writable=bool(writable)),
                _mapping(hazards, 8 * HAZARD_SLOTS, writable=True),
                offset // 4,
                alive,
                bool(writable),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise errors.ProtocolError(f"the provider's reply to join: {error}") from error
        finally:
            for fd in descriptors:
                os.close(fd)
        self._touched: dict[bytes, int] = {}
        self._segments: dict[int, SharedMapping] = {}
        self._shared: WeakValueDictionary[tuple[int, int], _SharedFile] = WeakValueDictionary()
        self._files = 0
        self._syncs: dict[int, object] = {}  # by descriptor: a sync is under way, or failed
        self._most_files = min(_MOST_FILES, max(16, limit() // 4))
        forks.register(self)

    @property
    def writes(self) -> bool:
        """Whether it may write to regions."""
        return self.usable and self.writable

    # Asking for grants

    def wants(self, region: RegionID, size: int) -> bool:
        """Whether to request a grant, before an access to *size* bytes of the region."""
        if not self.usable or not self.living:
            return False
        if size < _LARGE and region not in self.grants:
            count = self._touched.get(region, 0)
            if len(self._touched) >= _MOST_GRANTS:
                self._touched.clear()
            self._touched[region] = count + 1
            if not count:
                return False
        grant = self.grants.get(region)
        # A refused grant stays refused; an existing one must be requested again when the region
        # has outgrown it.
        return grant is None or 0 <= grant.room < self.table[2 * grant.index + 1]

    def add(self, region: RegionID, granted: Sequence[Any] | None, descriptors: list[int]) -> None:
        """Store the result of ``grant``; the descriptors are closed here.

        Raises:
            ProtocolError: the reply is malformed.
            OSError: the region cannot be mapped.
        """
        try:
            self._make_room()
            self._touched.pop(region, None)
            if granted is None:
                self.grants[region] = Grant(0, -1, -1)
            else:
                self.grants[region] = self._granted(granted, descriptors)
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            raise errors.ProtocolError(f"the provider's reply to grant: {error}") from error
        finally:
            for fd in descriptors:
                os.close(fd)

    def _granted(self, granted: Sequence[Any], descriptors: list[int]) -> Grant:
        index, version, offset, room, segment, mapped, _ = granted
        if not 0 < index < ENTRIES:
            raise ValueError(f"index {index}")
        if not mapped and not (self._files or self._shared):
            self.in_memory = syscalls.is_in_memory(descriptors[-1])  # as all files of a target
        if segment < 0:
            file = self._shared_file(descriptors)
            return Grant(index, version, room, file.fd, keeper=file, start=offset)
        if not mapped:
            grant = Grant(index, version, MAX_SIZE, descriptors[-1])
            descriptors.pop()
            self._files += 1
            return grant
        size = self.table[2 * index + 1]
        if segment:
            if descriptors:
                extent = os.fstat(descriptors[0]).st_size
                self._segments[segment] = _mapping(descriptors[0], extent, writable=self.writable)
            mapping = self._segments[segment]
            view = mapping.view[offset : offset + room]
            return Grant(index, version, room, keeper=mapping, view=view)
        # Larger than the region, so that it can grow without a new request.
        room = -(-2 * size // _SPARE_ROOM) * _SPARE_ROOM or _SPARE_ROOM
        mapping = SharedMapping(descriptors[0], room, writable=self.writable)
        return Grant(index, version, room, keeper=mapping, view=mapping.view)

    def _shared_file(self, descriptors: list[int]) -> _SharedFile:
        """Return the file that holds several regions, reusing an open descriptor."""
        info = os.fstat(descriptors[-1])
        file = self._shared.get((info.st_dev, info.st_ino))
        if file is None:
            file = _SharedFile(descriptors.pop())
            self._shared[info.st_dev, info.st_ino] = file
        return file

    def _make_room(self) -> None:
        files = self._files + len(self._shared)
        if len(self.grants) >= _MOST_GRANTS or files >= self._most_files:
            for region in list(self.grants)[: len(self.grants) // 4 + 1]:
                grant = self.grants.pop(region, None)
                if grant is not None and grant.owns:
                    self._files -= 1

    # Access

    def fill(self, region: RegionID, granted: Sequence[Any], fd: int, data: memoryview) -> bool:
        """Write *data* to a region that ``make`` created; as :meth:`write`.  Closes the descriptor.

        Uses a system call: mapping untouched pages would take longer than copying.
        """
        self.grants[region] = Grant(granted[0], granted[1], MAX_SIZE, fd)
        self._files += 1
        try:
            return self.write(region, 0, data)
        finally:
            self.drop_grant(region)

    def read_into(
        self, region: RegionID, offset: int, place: memoryview, *, wait: bool = True
    ) -> bool:
        """Fill *place* from within the region; False if the provider must do it.

        *place* may have been modified then.  Without *wait* it also fails if the bytes are not in
        memory.
        """
        return self.read_some(region, offset, place, wait, False) >= 0

    def persist(self, region: RegionID, offset: int, size: int) -> bool:
        """Flush bytes of the region to stable storage; False if the provider must do it, also after
        an error: the provider must see it, since the kernel reports it only once."""
        grant = self.grants.get(region)
        if grant is None or grant.room < 0 or not self.living:
            return False
        table, entry, version = self.table, 2 * grant.index, grant.version
        if (
            not self.usable
            or table[METADATA_DURABLE + grant.index] != version
            or offset + size > table[entry + 1]
        ):
            return False
        if grant.fd >= 0:
            # One at a time: the kernel reports an error to one of the syncs by a descriptor only.
            # After an error none: what is not synced any more must be known to the provider first.
            sync = object()
            if self._syncs.setdefault(grant.fd, sync) is not sync:
                return False
            try:
                if grant.owns and table[entry + 1] > _WHOLE and size < _WHOLE:
                    _sync_range(grant.fd, offset, size)
                else:
                    os.fdatasync(grant.fd)
            except OSError:
                return False
            del self._syncs[grant.fd]
        return table[entry] == version

    def drop_grant(self, region: RegionID) -> None:
        """Drop the grant and descriptor of a region that was erased."""
        grant = self.grants.get(region)
        if grant is not None:
            self._drop(region, grant)

    def _drop(self, region: bytes, grant: Grant) -> None:
        if self.grants.get(region) is grant:
            del self.grants[region]
            if grant.owns:
                self._files -= 1

    def _failure(self, region: bytes, error: OSError) -> Exception:
        return errors.from_os(error, f"write {RegionID(region)!r}")

    # The end

    def _forked(self) -> None:
        self.forget()  # the slots belong to the parent

    def forget(self) -> None:
        """Use no slot any more, and close descriptors: when the provider ends in this process."""
        self.usable = False
        self.grants.clear()

    def close(self) -> None:
        """Refuse new accesses, and wait for pending ones."""
        self.usable = False
        deadline = time.monotonic() + CLOSE_PATIENCE
        while self.busy and time.monotonic() < deadline:
            time.sleep(HANDOVER_POLL)
        self.grants.clear()


class DirectAccess:
    """A client's direct access, however it is obtained.

    Like :class:`Guest` it returns False if a request to the provider is needed.

    Attributes:
        guest: tried first for each access; None while there is none.
    """

    def __init__(self) -> None:
        self.guest: Guest | None = None

    def _asked(self, what: str, region: RegionID, size: int, wait: bool) -> Guest | None:
        """Request a grant; returns the guest if the region was granted now."""
        return None

    def size(self, region: RegionID) -> int:
        """See :meth:`Guest.size`."""
        return -1 if self.guest is None else self.guest.size(region)

    def persist(self, region: RegionID, offset: int, size: int) -> bool:
        """See :meth:`Guest.persist`."""
        return self.guest is not None and self.guest.persist(region, offset, size)

    def write(self, region: RegionID, offset: int, data: memoryview, *, wait: bool = True) -> bool:
        """See :meth:`Guest.write`."""
        guest = self.guest
        if guest is not None and guest.write(region, offset, data):
            return True
        found = self._asked("write", region, len(data), wait)
        return found is not None and found.write(region, offset, data)

    def read_into(
        self, region: RegionID, offset: int, place: memoryview, *, wait: bool = True
    ) -> bool:
        """See :meth:`Guest.read_into`."""
        guest = self.guest
        if guest is not None and guest.read_some(region, offset, place, wait, False) >= 0:
            return True
        found = self._asked("read", region, len(place), wait)
        return found is not None and found.read_into(region, offset, place, wait=wait)


NO_ACCESS = DirectAccess()
"""For clients without direct access."""
