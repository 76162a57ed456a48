"""Large regions in memory, a memfd each, and reuse of the memory of erased ones.

Such memory is *spare*: the next region of similar size uses its pages, which the kernel would
otherwise take longer to allocate and clear than it takes to fill them.

A process that was given a descriptor may read and write as long as it likes.  So memory that never
left this process is spare for all regions; memory that was shared with only one guest is spare for
regions that this guest creates; any other memory is freed.  It is never reused before all processes
that follow the protocol of ``target/leases.py`` have finished with it, nor while there is a view of
it in this process.

Old contents are never visible: they are overwritten or cleared before the region is created.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import time
import weakref

from warabi._core import syscalls
from warabi._core.fileio import (
    allocate,
    data_from,
    hole_from,
    pread_full,
    punch,
    pwrite_full,
)
from warabi._core.tuning import MEMORY_CHECK
from warabi.backends.base import KERNEL, STRANGERS, THIS_PROCESS
from warabi.backends.memfd import Populated
from warabi.backends.memory_budget import PAGE, machine_memory
from warabi.shm.memory import SharedMapping, address

_MOST = 64 * 1024 * 1024  # most bytes of spare memory
_PART = 8  # most memory of one region is this fraction of it: clearing blocks others
_SHARE = 64  # at most this fraction of the machine's memory
_SHORT = 16  # below this fraction of the machine's memory, available memory is short
_MOST_COUNT = 128  # each uses a descriptor
_LONG = 32 * 1024 * 1024
"""Bytes that take the kernel long to free: some milliseconds."""
_POPULATED = 4 * 1024 * 1024  # bytes whose pages the kernel makes at once, with the GIL held
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_END = (1 << 63) - mmap.PAGESIZE  # beyond the end of every file: a guest may have extended it


class Own:
    """A large region: a memfd, mapped when a view is requested.

    Before another process gets a descriptor the file is *sealed* against shrinking, since a load or
    store in a truncated mapping raises SIGBUS.  Its memory is then freed by punching holes, and the
    file may be longer than the region.

    Invariants: the first *filled* bytes contain no hole, which an access would fill.  Bytes of the
    file beyond the region's end are zero, except for what a guest that violates the protocol stores
    there, in a region that it may write to anyway.

    Attributes:
        extent: bytes of the file, at least *size*.
        sealed: whether another process may have a descriptor or a mapping.
        holder: the only guest that was given a descriptor, or ``STRANGERS``; ``THIS_PROCESS`` if
            it was not shared.
        warm: a mapping for filling reused memory, and nothing else.
        taken: bytes of memory in use when last measured.
        sparse: it has holes on purpose, which reading a mapping would fill.
        reserved: start and end of what was allocated beyond the end that it had then.
    """

    __slots__ = (
        "_mappings", "extent", "fd", "filled", "holder", "mapping", "reserved", "sealed", "size",
        "sparse", "taken", "warm",
    )  # fmt: skip

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("warabi-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.size = self.extent = size
        self.sealed = False
        self.filled = 0
        self.taken = 0
        self.holder = THIS_PROCESS
        self.sparse = False
        self.reserved = (0, 0)
        self.mapping: Populated | None = None
        self.warm: SharedMapping | None = None
        self._mappings: list[weakref.ref[mmap.mmap]] = []
        try:
            os.ftruncate(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise

    def seal(self) -> None:
        """Seal the file against shrinking; raises ``OSError``."""
        if not self.sealed:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self.sealed = True

    def resize(self, size: int) -> None:
        """Set the size; new bytes are zero; raises ``OSError``.

        There must be no views or mappings of removed bytes, or they must never be accessed.
        """
        if size > self.extent and self.sealed and (length := os.fstat(self.fd).st_size) > size:
            # A guest has extended the file, and it cannot be truncated.
            punch(self.fd, self.size, _END - self.size)
            self.extent = length
            self.reserved = (0, 0)
        elif size > self.extent or not self.sealed:
            os.ftruncate(self.fd, size)
            self.extent = size
        elif size < self.size:
            punch(self.fd, size, _END - size)
        if size <= self.size:
            self.reserved = (0, 0)
        self.size = size
        self.filled = min(self.filled, size)

    def map(self) -> Populated:
        """Map all of it; raises as :class:`Populated`."""
        self.mapping = Populated(self.fd, self.size, writable=True)
        self._mappings = [*filter(_alive, self._mappings), weakref.ref(self.mapping.memory)]
        return self.mapping

    def look(self) -> int:
        """Return the change of its memory use in bytes since the last measurement."""
        before, self.taken = self.taken, os.fstat(self.fd).st_blocks * 512
        return self.taken - before

    def missing(self, offset: int, size: int) -> int:
        """Return the most bytes of memory that a write needs."""
        if (new := offset + size - max(offset, self.filled)) <= 0:
            return 0
        return (new + PAGE - 1) & -PAGE

    def holes(self, offset: int, size: int) -> int:
        """The same as :meth:`missing`, exactly; raises ``OSError``."""
        offset, end = offset & -PAGE, (offset + size + PAGE - 1) & -PAGE
        first, last = self.reserved
        missing = 0
        while offset < end:
            data = data_from(self.fd, offset, end)
            missing += data - offset - max(0, min(data, last) - max(offset, first))
            offset = hole_from(self.fd, data, end)
        return missing

    def allocate(self, offset: int, end: int) -> None:
        """Allocate the memory of the bytes from *offset* to *end*, which may be beyond the region's
        end; raises ``OSError``.

        Reading the pages through a mapping makes data of holes, which :meth:`holes` needs, without
        overwriting what other processes write meanwhile.
        """
        if end > self.size:
            first, last = max(offset, self.size) & -PAGE, (end + PAGE - 1) & -PAGE
            allocate(self.fd, first, last - first)
            low, high = self.reserved
            apart = high < first or last < low  # then only the new one is remembered
            self.reserved = (first, last) if apart else (min(low, first), max(high, last))
            end = self.size
        if offset < end:
            allocate(self.fd, offset, end - offset)
            mapping = Populated(self.fd, self.size, writable=True)
            for start in range(offset, end, _POPULATED):
                mapping.view(start, min(end, start + _POPULATED)).release()
            if offset <= self.filled:
                self.filled = max(self.filled, end)

    @property
    def seen(self) -> bool:
        """Whether there is a view of it, or a mapping, in this process."""
        return any(map(_alive, self._mappings))

    def write(self, offset: int, data: memoryview) -> None:
        """Write *data*; raises ``OSError``."""
        pwrite_full(self.fd, data, offset)
        if offset <= self.filled < offset + len(data):
            self.filled = offset + len(data)

    def replace(self, data: memoryview) -> None:
        """Replace the contents by *data*, which has the region's size.

        Raises:
            OSError: it cannot be mapped.
        """
        syscalls.memcpy(self._warm().address, address(data), len(data))  # without the GIL
        self.filled = self.size

    def clear(self) -> None:
        """Zero all bytes, by a system call, which releases the interpreter lock.

        Raises:
            OSError: it cannot be mapped.
        """
        zero = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
        try:
            pread_full(zero, self._warm().view, 0)
        finally:
            os.close(zero)
        self.filled = self.size

    def _warm(self) -> SharedMapping:
        if self.warm is None or self.warm.size != self.size:
            self.warm = SharedMapping(self.fd, self.size, writable=True)
            self.warm.populate()
        return self.warm

    def discard(self) -> None:
        """Free its memory, even if another process still has it mapped.

        Large regions are freed by a thread, since it takes the kernel long, and an event loop may
        not wait.
        """
        if self.size > _LONG:
            threading.Thread(target=self._give_back, name="warabi-free").start()
        else:
            self._give_back()

    def _give_back(self) -> None:
        try:
            if self.sealed:
                punch(self.fd, 0, _END)
            else:
                os.ftruncate(self.fd, 0)
        finally:
            os.close(self.fd)


def _alive(mapping: weakref.ref[mmap.mmap]) -> bool:
    return mapping() is not None


class Spare:
    """Memory of erased regions, for reuse.  Not thread-safe."""

    def __init__(self) -> None:
        self._held: dict[Own, int] = {}  # bytes of each, in order of arrival
        self._fitting: dict[tuple[int, int], dict[Own, None]] = {}  # by holder and size
        self._present = {THIS_PROCESS}  # holders that still create regions
        self._most = min(_MOST, machine_memory()[0] // _SHARE)
        self._look = 0.0  # when to check the available memory next
        self._short = False
        self.size = 0
        """Total bytes of spare memory."""

    def __len__(self) -> int:
        return len(self._held)

    def given(self, own: Own, holder: int) -> None:
        """Record that *holder* is about to be given a descriptor; raises ``OSError``."""
        if holder != THIS_PROCESS:
            if holder == KERNEL:
                holder = STRANGERS
            else:
                own.seal()
            own.holder = holder if own.holder in (THIS_PROCESS, holder) else STRANGERS
            if holder != STRANGERS:
                self._present.add(holder)

    def left(self, holder: int) -> None:
        """Free memory that is spare for a guest that creates no more regions."""
        self._present.discard(holder)
        for own in [own for own in self._held if own.holder == holder]:
            self._drop(own)
        for key in [key for key in self._fitting if key[0] == holder]:
            del self._fitting[key]

    def keep(self, own: Own) -> bool:
        """Keep the memory of an erased region; False if the caller must free it."""
        if own.seen or own.holder not in self._present:
            return False
        info = os.fstat(own.fd)
        held = info.st_blocks * 512
        if info.st_size != own.extent or not own.size // 2 <= held <= self._most // _PART:
            return False  # modified by a guest, or mostly a hole, or too large
        self.relieve()
        if self._short:
            return False
        fitting = self._fitting.setdefault(_key(own.holder, own.size), {})
        while self.size + held > self._most or len(self) == _MOST_COUNT:
            if fitting:
                return False  # equally suitable, and maybe mapped already
            self.shrink()
        self._held[own] = held
        self.size += held
        fitting[own] = None
        return True

    def take(self, size: int, holder: int) -> Own | None:
        """Return memory for a new region of *size* bytes of *holder*, None if there is none.

        The caller must replace its contents before the region becomes visible.

        Raises:
            OSError: resizing failed; the memory was freed.
        """
        found = self._fitting.get(_key(holder, size)) or self._fitting.get(_key(THIS_PROCESS, size))
        if not found:
            return None
        own = next(reversed(found))  # most likely to be in the processor's caches
        self._remove(own)
        try:
            own.resize(size)
        except BaseException:
            own.discard()
            raise
        own.filled = 0
        own.sparse = False
        return own

    def _remove(self, own: Own) -> None:
        self.size -= self._held.pop(own)
        del self._fitting[_key(own.holder, own.size)][own]

    def _drop(self, own: Own) -> None:
        self._remove(own)
        own.discard()

    def shrink(self) -> None:
        """Free the oldest spare memory."""
        self._drop(next(iter(self._held)))

    def relieve(self) -> None:
        """Free all if the machine is short of memory; checks at most once per ``MEMORY_CHECK``."""
        if (now := time.monotonic()) >= self._look:
            self._look = now + MEMORY_CHECK
            total, available = machine_memory()
            self._short = available < total // _SHORT
            if self._short:
                self.clear()

    def clear(self) -> None:
        """Free all spare memory."""
        while self._held:
            self.shrink()


def _key(holder: int, size: int) -> tuple[int, int]:
    return holder, (size - 1).bit_length()
