"""Large regions of memory, a memfd each, and the memory of those that are gone.

That memory is *spare*: the next region of about the size has its pages, which it would take the
kernel longer to find and to clear than it takes to fill them.

Who was given a descriptor may write by it, and read, as long as it likes, whatever it was told.
So memory is spare for everybody only if it never left this process, and if one guest alone had it,
for the regions that this guest makes; what more than one had, or somebody else, goes back.  It is
never used before all who kept to the protocol of ``target/leases.py`` are done with it, nor while
there is a view of it in this process.

What a region was made of is never seen: it is written or cleared before the region is there.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
import time
import weakref

from warabi._core.fileio import pread_full, punch, pwrite_full
from warabi.backends.base import KERNEL, STRANGERS, THIS_PROCESS
from warabi.backends.memfd import Populated
from warabi.backends.memory_budget import PAGE, machine_memory
from warabi.shm.memory import SharedMapping, copy

_MOST = 64 * 1024 * 1024  # bytes of spare memory, at most
_PART = 8  # no region's is more than this part of it: to clear that keeps others waiting
_SHARE = 64  # no more of it than the machine's memory divided by this
_SHORT = 16  # less available than the machine's memory divided by this is little
_MOST_COUNT = 128  # each takes a descriptor
_LONG = 32 * 1024 * 1024
"""Bytes that take the kernel long to give back: some milliseconds."""
_PATIENCE = 1.0  # seconds between two looks at how much is available
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_END = (1 << 63) - mmap.PAGESIZE  # where no file has more: a guest may have made it longer


class Own:
    """A large region: a memfd, mapped once it is to be seen.

    Before another process gets a descriptor the file is *sealed*: it never becomes shorter again,
    or a load or store of whoever has mapped it could raise SIGBUS.  Its memory is then given back
    by punching holes, and the file may be longer than the region.

    Invariants: the first *filled* bytes are no hole, which would be filled by touching it.  Bytes
    of the file behind the region's end are zero, but for what a guest that breaks the rules stores
    there, in a region that it may write to anyway.

    Attributes:
        extent: bytes of the file, *size* at least.
        sealed: whether another process may have a descriptor or a mapping.
        holder: who was given a descriptor: the only guest, or ``STRANGERS``; ``THIS_PROCESS`` if
            it is known to nobody else.
        warm: a mapping by which memory that is used again is filled, and nothing else is done.
        taken: bytes of memory that it was last seen to take.
    """

    __slots__ = (
        "_mappings", "extent", "fd", "filled", "holder", "mapping", "sealed", "size", "taken",
        "warm",
    )  # fmt: skip

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("warabi-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.size = self.extent = size
        self.sealed = False
        self.filled = 0
        self.taken = 0
        self.holder = THIS_PROCESS
        self.mapping: Populated | None = None
        self.warm: SharedMapping | None = None
        self._mappings: list[weakref.ref[mmap.mmap]] = []
        try:
            os.ftruncate(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise

    def seal(self) -> None:
        """Keep the file from becoming shorter; raises ``OSError``."""
        if not self.sealed:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self.sealed = True

    def resize(self, size: int) -> None:
        """Have *size* bytes, new ones zero; raises ``OSError``.

        Views and mappings of bytes that are cut off have to be gone, or never to be touched.
        """
        if size > self.extent and self.sealed and (length := os.fstat(self.fd).st_size) > size:
            # A guest has made the file longer, and it cannot be made shorter.
            punch(self.fd, self.size, _END - self.size)
            self.extent = length
        elif size > self.extent or not self.sealed:
            os.ftruncate(self.fd, size)
            self.extent = size
        elif size < self.size:
            punch(self.fd, size, _END - size)
        self.size = size
        self.filled = min(self.filled, size)

    def map(self) -> Populated:
        """A new mapping of all of it; raises as :class:`Populated`."""
        self.mapping = Populated(self.fd, self.size, writable=True)
        self._mappings = [*filter(_alive, self._mappings), weakref.ref(self.mapping.memory)]
        return self.mapping

    def look(self) -> int:
        """By how many bytes it takes more memory, or less, than when it was last looked at."""
        before, self.taken = self.taken, os.fstat(self.fd).st_blocks * 512
        return self.taken - before

    def missing(self, offset: int, size: int) -> int:
        """How many bytes of memory a write takes, at most."""
        if (new := offset + size - max(offset, self.filled)) <= 0:
            return 0
        return (new + PAGE - 1) & -PAGE

    def holes(self, offset: int, size: int) -> int:
        """As :meth:`missing`, exactly; raises ``OSError``."""
        offset, end = offset & -PAGE, (offset + size + PAGE - 1) & -PAGE
        missing = 0
        while offset < end:
            data = min(end, self._seek(offset, os.SEEK_DATA))
            missing += data - offset
            offset = end if data == end else self._seek(data, os.SEEK_HOLE)
        return missing

    def _seek(self, offset: int, what: int) -> int:
        try:
            return os.lseek(self.fd, offset, what)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing comes after it
                raise
            return _END

    @property
    def seen(self) -> bool:
        """Whether there is a view of it, or a mapping, in this process."""
        return any(map(_alive, self._mappings))

    def write(self, offset: int, data: memoryview) -> None:
        """Store *data*; raises ``OSError``."""
        pwrite_full(self.fd, data, offset)
        if offset <= self.filled < offset + len(data):
            self.filled = offset + len(data)

    def replace(self, data: memoryview) -> None:
        """Make *data*, as many bytes as it has, all there is.

        Raises:
            OSError: it cannot be mapped.
        """
        copy(self._warm().view, data)
        self.filled = self.size

    def clear(self) -> None:
        """Make all bytes zero, by a system call, which lets other threads run.

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
        """Give its memory back, although another process may still have it mapped.

        Much of it by a thread: it takes the kernel long, and an event loop may not wait.
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
    """Memory of regions that are gone.  Not thread-safe."""

    def __init__(self) -> None:
        self._held: dict[Own, int] = {}  # how many bytes; what came first is first
        self._fitting: dict[tuple[int, int], dict[Own, None]] = {}  # by holder and size
        self._present = {THIS_PROCESS}  # who is there, of those who were given descriptors
        self._most = min(_MOST, machine_memory()[0] // _SHARE)
        self._look = 0.0  # when to look next whether memory is short
        self._short = False
        self.size = 0
        """Bytes that are kept, in all."""

    def __len__(self) -> int:
        return len(self._held)

    def given(self, own: Own, holder: int) -> None:
        """*holder* is about to be given a descriptor; raises ``OSError``."""
        if holder != THIS_PROCESS:
            if holder == KERNEL:
                holder = STRANGERS
            else:
                own.seal()
            own.holder = holder if own.holder in (THIS_PROCESS, holder) else STRANGERS
            if holder != STRANGERS:
                self._present.add(holder)

    def left(self, holder: int) -> None:
        """A guest makes no regions any more: give back what is spare for it."""
        self._present.discard(holder)
        for own in [own for own in self._held if own.holder == holder]:
            self._drop(own)
        for key in [key for key in self._fitting if key[0] == holder]:
            del self._fitting[key]

    def keep(self, own: Own) -> bool:
        """Take the memory of a region that is gone; False when it has to be discarded."""
        if own.seen or own.holder not in self._present:
            return False
        info = os.fstat(own.fd)
        held = info.st_blocks * 512
        if info.st_size != own.extent or not own.size // 2 <= held <= self._most // _PART:
            return False  # a guest's own doing, or mostly a hole, or too much
        self.relieve()
        if self._short:
            return False
        fitting = self._fitting.setdefault(_key(own.holder, own.size), {})
        while self.size + held > self._most or len(self) == _MOST_COUNT:
            if fitting:
                return False  # those are as good, and may be mapped already
            self.shrink()
        self._held[own] = held
        self.size += held
        fitting[own] = None
        return True

    def take(self, size: int, holder: int) -> Own | None:
        """Memory for a region of *size* bytes that *holder* makes, None if there is none; all
        that is in it is to be replaced before anybody sees the region.

        Raises:
            OSError: what there was has been given back.
        """
        found = self._fitting.get(_key(holder, size)) or self._fitting.get(_key(THIS_PROCESS, size))
        if not found:
            return None
        own = next(reversed(found))  # the one that caches may still have
        self._remove(own)
        try:
            own.resize(size)
        except BaseException:
            own.discard()
            raise
        own.filled = 0
        return own

    def _remove(self, own: Own) -> None:
        self.size -= self._held.pop(own)
        del self._fitting[_key(own.holder, own.size)][own]

    def _drop(self, own: Own) -> None:
        self._remove(own)
        own.discard()

    def shrink(self) -> None:
        """Give back what was kept first."""
        self._drop(next(iter(self._held)))

    def relieve(self) -> None:
        """Give everything back if the machine has little memory left; seldom looks."""
        if (now := time.monotonic()) >= self._look:
            self._look = now + _PATIENCE
            total, available = machine_memory()
            self._short = available < total // _SHORT
            if self._short:
                self.clear()

    def clear(self) -> None:
        """Give everything back."""
        while self._held:
            self.shrink()


def _key(holder: int, size: int) -> tuple[int, int]:
    return holder, (size - 1).bit_length()
