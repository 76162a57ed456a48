"""Small regions that share files, called *packs*, whose format is in ``pack_format.py``.

The overhead of a file exceeds the data of a small region: the file system must create it, name it
and keep an inode.  So regions of up to ``SLOT`` bytes without a name are created in packs.

For the underlying file storage a pack is a region with an ID that no region can have
(:func:`pack_of`), so its handling of syncs and failed syncs applies to packs, too.

Invariants:

* A region's row tells its location (``Inode.packed``).  A region that outgrows its slot gets its
  own file, which is used as soon as it has its name, whatever the row says.
* A region's record has its size and identifies it: like a file's size, it outlives the process, is
  persisted with the data, and identifies the region if the catalogue is lost.  Bytes of the slot
  beyond the size are zero on stable storage before the region grows: they are cleared when it
  shrinks, and checked when it grows, since clearing may have been interrupted.
* A slot is never reused while this process runs: the catalogue reuses slots only after a crash, in
  other packs, and the data of erased regions are cleared before the target is closed, or when it
  is opened after a crash.
* A region that moved keeps its slot, and the old data in it, until it is erased: so the data
survive
  whatever the order in which changes reach stable storage.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from warabi import errors
from warabi.backends.base import STRANGERS, Location, Storage
from warabi.backends.file import FileStorage
from warabi.backends.pack_format import (
    PACK,
    RECORD,
    RECORDS,
    SLOT,
    SLOTS,
    forget,
    is_pack,
    pack_of,
    recorded,
    slots_of,
)
from warabi.backends.wrapper import WrapperStorage
from warabi.backends.xattr_times import Times
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.guard import Guard
from warabi.metadata.inode import MOVED, OWN, PACKED, Inode
from warabi.metadata.journal import close_quietly
from warabi.region import RegionID

_ZEROS = memoryview(bytes(SLOT))


def _of(rid: bytes, file: bytes, error: errors.Exception) -> errors.Exception:
    """Return *error* with the region's ID instead of its pack's."""
    if file is rid or isinstance(error, errors.PathError):  # which names no region
        return error
    return type(error)(str(error).replace(file.hex(), rid.hex()))


@contextmanager
def _named(rid: bytes, file: bytes) -> Iterator[None]:
    """Errors of the block name the region instead of its pack.  Reads and writes, which are
    frequent and short, say the same without a context."""
    try:
        yield
    except errors.Exception as error:
        raise _of(rid, file, error) from error.__cause__


class PackedStorage(WrapperStorage):
    """Adds packs to a storage of files.

    Args:
        files: the storage of files.
        catalogue: tells where a region is.
        packing: whether new regions may be created in packs.
    """

    def __init__(self, files: FileStorage, catalogue: Catalogue, *, packing: bool) -> None:
        super().__init__(files)
        self._files = files  # typed, for what only files have
        self._catalogue = catalogue
        self._inodes = catalogue.by_rid
        self._packing = packing
        # The pack of new regions: its number, its ID and a descriptor without O_DSYNC, since it is
        # used and changed with the target's lock held.
        self._newest: tuple[int, RegionID, int] | None = None
        self._packs: dict[int, RegionID] = {}  # IDs of recently used packs
        self._shares = itertools.count(1)
        self._left: set[RegionID] = set()  # packs that a scan found
        self._retired: dict[bytes, Inode] = {}  # regions that the catalogue has dropped
        self._retired_of: Counter[int] = Counter()  # their number per pack
        self._unneeded: set[int] = set()  # packs that only new or dying regions may need
        self.write_waits = files.write_waits
        self.shares_writes = files.shares_writes

    blocking = True

    def bind(self, guard: Guard) -> None:
        """Set the guard of the target that owns the storage, which also passes while it closes."""
        self._guard = guard

    # Locations

    def _at(self, rid: bytes) -> tuple[RegionID, int]:
        """Return the file with the region's data, and their offset in it."""
        inode = self._inodes.get(rid) or self._retired.get(rid)
        if inode is None or inode.packed != PACKED:
            return rid, 0  # type: ignore[return-value]  # some callers pass plain bytes
        return self._slot(inode.ino)

    def _slot(self, slot: int) -> tuple[RegionID, int]:
        number, index = divmod(slot, SLOTS)
        pack = self._packs.get(number)
        if pack is None:
            if len(self._packs) >= 1024:
                self._packs.clear()
            pack = self._packs[number] = pack_of(slot)
        return pack, index * SLOT

    def packs(self, size: int) -> bool:
        return self._packing and size <= SLOT

    written = Storage.written
    cleared = Storage.cleared

    def create(self, rid: RegionID, size: int) -> None:
        inode = self._inodes.get(rid)
        if inode is None or inode.packed != PACKED:
            self._files.create(rid, size)
        else:
            number, index = divmod(inode.ino, SLOTS)
            newest = self._newest
            if newest is None or newest[0] != number or self._files.failed:
                newest = self._prepare(inode)
            if newest is None or os.lseek(newest[2], 0, os.SEEK_END) < PACK:
                inode.packed = OWN
                self._files.create(rid, size)
                return
            _, pack, fd = newest
            with self._files.translated(rid, "create"):
                record = RECORD.pack(inode.generation, size)
                os.pwrite(fd, record, RECORDS + index * RECORD.size)
            self._files.wrote(pack)

    def _prepare(self, inode: Inode) -> tuple[int, RegionID, int] | None:
        """Return the pack for a new region, creating it if necessary; None if it cannot be used."""
        self._close_newest()
        pack = pack_of(inode.ino)
        known = is_pack(pack)  # else an imported slot is too large for a pack
        if known and pack not in self._files.failed and self._is_whole(pack, inode):
            with self._files.translated(pack, "create in"):
                fd = self._files.open(self._files.path(pack), os.O_RDWR | os.O_CLOEXEC)
            self._newest = (inode.ino // SLOTS, pack, fd)
        return self._newest

    def _close_newest(self) -> None:
        if self._newest is not None:
            close_quietly(self._newest[2])
            self._newest = None

    def _is_whole(self, pack: RegionID, inode: Inode) -> bool:
        """Whether the pack of a new region exists, and has existed since its first region."""
        try:
            return os.stat(self._files.path(pack)).st_size == PACK
        except FileNotFoundError:
            slots = slots_of(pack)
            if self._catalogue.packed(slots[0], slots[-1]) != [inode.ino]:
                return False  # it was lost; do not hide that
            try:
                self._files.create(pack, PACK)
            except errors.OutOfBounds:
                return False  # exceeds a limit on file sizes
        return True

    # Data

    def read_into(self, rid: RegionID, offset: int, out: memoryview) -> None:
        file, start = self._at(rid)
        try:
            self._files.read_into(file, start + offset, out)
        except errors.Exception as error:
            raise _of(rid, file, error) from error.__cause__

    def read_into_nowait(self, rid: RegionID, offset: int, out: memoryview) -> None:
        file, start = self._at(rid)
        try:
            self._files.read_into_nowait(file, start + offset, out)
        except errors.Exception as error:
            raise _of(rid, file, error) from error.__cause__

    def view(
        self, rid: RegionID, offset: int, size: int, *, writable: bool = False
    ) -> memoryview | None:
        file, start = self._at(rid)
        return self._files.view(file, start + offset, size, writable=writable)

    def write(self, rid: RegionID, offset: int, data: memoryview) -> None:
        file, start = self._at(rid)
        try:
            self._files.write(file, start + offset, data)
        except errors.Exception as error:
            raise _of(rid, file, error) from error.__cause__

    # Sizes

    def check(self, rid: RegionID, size: int) -> None:
        if self._at(rid)[0] is rid:
            self._files.check(rid, size)
        elif size < SLOT:
            rest = memoryview(bytearray(SLOT - size))
            self.read_into(rid, size, rest)
            if rest != _ZEROS[size:]:
                self.write(rid, size, _ZEROS[size:])
                self.persist(rid, 0, SLOT)  # before a record may include them in the region

    def resize(self, rid: RegionID, size: int) -> None:
        if self.moves(rid, size):
            self._move_out(rid, size)
        elif self._at(rid)[0] is rid:
            self._files.resize(rid, size)
        else:
            old = self._inodes[rid].size
            self._record(rid, size)
            if size < old:  # persisted along with the size
                with suppress(errors.Exception):  # `check` clears the rest
                    self.write(rid, size, _ZEROS[size:old])

    def _record(self, rid: RegionID, size: int) -> None:
        pack, start = self._at(rid)
        record = RECORD.pack(rid.generation, size)
        place = RECORDS + start // SLOT * RECORD.size
        with _named(rid, pack):
            self._files.write(pack, place, memoryview(record))

    def write_beyond(self, rid: RegionID, offset: int, data: memoryview) -> None:
        end = offset + len(data)
        if self.moves(rid, end):
            self._move_out(rid, SLOT)
        if self._at(rid)[0] is rid:
            self._files.write_beyond(rid, offset, data)
        else:
            self.write(rid, offset, data)
            self._record(rid, end)

    def allocate(self, rid: RegionID, offset: int, size: int) -> None:
        file, start = self._at(rid)
        with _named(rid, file):
            self._files.allocate(file, start + offset, size)

    def zero(self, rid: RegionID, offset: int, size: int, *, free: bool) -> None:
        file, start = self._at(rid)
        with _named(rid, file):
            self._files.zero(file, start + offset, size, free=free)

    def space(self, rid: RegionID, size: int) -> int:
        return self._files.space(rid, size) if self._at(rid)[0] is rid else size

    def leaves_holes(self, size: int) -> bool:
        return size > SLOT

    def seek(self, rid: RegionID, offset: int, end: int, *, hole: bool) -> int:
        file, start = self._at(rid)
        with _named(rid, file):
            return self._files.seek(file, start + offset, start + end, hole=hole) - start

    def copy_range(
        self, source: RegionID, start: int, rid: RegionID, offset: int, size: int
    ) -> None:
        from_file, from_start = self._at(source)
        file, at = self._at(rid)
        with _named(source, from_file):
            self._files.copy_range(from_file, from_start + start, file, at + offset, size)

    def moves(self, rid: RegionID, size: int) -> bool:
        return size > SLOT and self._at(rid)[0] is not rid

    def replace(self, rid: RegionID, size: int) -> Callable[[], None]:
        if self._at(rid)[0] is rid:
            return self._files.replace(rid, size)
        self._move_out(rid, size)
        return lambda: None  # the slot stays reserved for the region

    def _move_out(self, rid: RegionID, size: int) -> None:
        """Move a region, whose slot is clear beyond its size, to a file of its own.

        The file is flushed before it gets its name, and the name before this returns: the data in
        the slot may have been persisted, or are about to be.
        """
        files = self._files
        data = memoryview(bytearray(SLOT))
        self.read_into(rid, 0, data)

        with files.translated(rid, "resize"):
            files.create_durable(rid, data[:size], size)
        self._inodes[rid].packed = MOVED  # committed by the caller that changes its size
        with suppress(errors.Exception):  # later persists of the region report it
            files.persist_name(rid)

    clone = Storage.clone

    # Erasing

    def retire(self, inode: Inode) -> None:
        if inode.packed != OWN:
            self._retired[inode.rid] = inode
            self._retired_of[inode.ino // SLOTS] += 1

    def vacate(self, rid: RegionID) -> None:
        if self._at(rid)[0] is rid:
            self._files.vacate(rid)

    def erase(self, rid: RegionID) -> None:
        for _, error in self.erase_all([rid]):
            raise error

    def erase_all(self, rids: list[RegionID]) -> Iterator[tuple[RegionID, errors.Exception]]:
        """Erase pack by pack: removing a whole pack costs no more than removing one file."""
        packed: dict[int, list[Inode]] = {}
        for rid in rids:
            inode = self._retired.get(rid)
            if inode is not None:
                packed.setdefault(inode.ino // SLOTS, []).append(inode)
            if inode is None or inode.packed == MOVED:
                yield from self._files.erase_all([rid])
        for number, inodes in packed.items():
            try:
                self._erase_in(number, inodes)
            except errors.Exception as error:
                yield from ((inode.rid, error) for inode in inodes)

    def _erase_in(self, number: int, inodes: list[Inode]) -> None:
        """Clear these regions in a pack, or remove the pack if no other region needs it."""
        files, pack = self._files, pack_of(number * SLOTS)
        slots = slots_of(pack)
        with self._guard.lock, self._guard.checked:  # so that no region is created there
            others = self._retired_of[number] > len(inodes)
            needed = others or bool(self._catalogue.packed(slots[0], slots[-1]))
            if others or (
                self._catalogue.is_next(slots) and pack not in files.failed and not needed
            ):
                self._unneeded.add(number)  # the others may be erased concurrently
                needed = True
            if not needed:
                if self._newest is not None and self._newest[0] == number:
                    self._close_newest()
                files.erase(pack)
        if needed and os.path.exists(files.path(pack)):  # otherwise already erased
            with files.translated(pack, "erase in"), files.borrow(pack) as fd:
                forget(fd, [inode.ino - slots[0] for inode in inodes])
                files.wrote(pack)
        with self._guard.lock, self._guard.checked:
            for inode in inodes:
                if self._retired.pop(inode.rid, None) is not None:
                    self._retired_of[number] -= 1
            if not self._retired_of[number]:
                del self._retired_of[number]

    def run_deferred(self) -> None:
        """Remove packs that other regions seemed to need when their last region was erased."""
        self._files.run_deferred()
        with self._guard.lock, self._guard.checked:
            unneeded = list(self._unneeded)
        for number in unneeded:
            with self._guard.lock, self._guard.checked:
                self._unneeded.discard(number)
            try:
                self._erase_in(number, [])
            except BaseException:
                with self._guard.lock, self._guard.checked:
                    self._unneeded.add(number)
                raise

    # Persisting

    def keep_times(self, rid: RegionID, times: Times) -> bool:
        return self._at(rid)[0] is rid and self._files.keep_times(rid, times)

    def persist(self, rid: RegionID, offset: int, size: int, *, times: bool = False) -> None:
        file, start = self._at(rid)
        with _named(rid, file):
            self._files.persist(file, start + offset, size, times=times and file is rid)

    def persist_all(self) -> None:
        try:
            self._files.persist_all()
        except errors.Exception as error:
            text = re.sub(f"region ({'0' * 16}[0-9a-f]{{16}})", r"small regions in \1", str(error))
            raise type(error)(text) from error.__cause__

    def oldest_fresh(self) -> RegionID | None:
        return min(
            (
                rid if rid.slot else RegionID.from_parts(slots_of(rid)[0], 0)
                for rid in self._files.fresh()
            ),
            default=None,
        )

    # After a crash

    def scan(self) -> Iterator[tuple[RegionID, int]]:
        for rid, size in self._files.scan():
            if is_pack(rid):
                self._left.add(rid)
            else:
                yield rid, size

    def found(self, inode: Inode) -> bool:
        return inode.packed == PACKED and pack_of(inode.ino) in self._left

    def tidy(self, attests: Callable[[Inode, int], bool]) -> bool:
        found = bool(self._left)
        for pack in self._left:
            slots = slots_of(pack)
            used = self._catalogue.packed(slots[0], slots[-1])
            if not used:
                self._files.erase(pack)
                continue
            # A client of the killed process may be stopped in the middle of a write.
            self._catalogue.leave(slots)
            self._believe(pack, used, attests)
            unused = set(slots).difference(used)
            with self._files.translated(pack, "recovery of"), self._files.borrow(pack) as fd:
                forget(fd, [slot - slots[0] for slot in unused])
        self._left.clear()
        return found

    def _believe(
        self, pack: RegionID, used: list[int], attests: Callable[[Inode, int], bool]
    ) -> None:
        """Take sizes from a pack, as from files; an unsynced pack may be truncated."""
        files, whole = self._files, True
        with files.translated(pack, "recovery of"), files.borrow(pack) as fd:
            end = os.fstat(fd).st_size
            sizes = recorded(fd, pack)
            for slot in used:
                inode = self._catalogue.get(slot)
                if inode is not None and inode.packed == PACKED:
                    size = min(sizes.get(inode.rid, inode.size), max(0, end - self._slot(slot)[1]))
                    if size < inode.size and attests(inode, size):
                        whole = False
                    elif size != inode.size:
                        self._catalogue.resize(inode, size)
            if end < PACK and whole:
                files.set_size(fd, PACK)
        self._catalogue.trim()

    # Direct access

    def wrote(self, rid: bytes) -> None:
        self._files.wrote(self._at(rid)[0])

    def grew(self, rid: bytes, size: int) -> None:
        self._files.grew(rid, size)

    def share(self, rid: RegionID, *, writable: bool, holder: int = STRANGERS) -> Location | None:
        file, start = self._at(rid)
        with _named(rid, file):
            place = self._files.share(file, writable=writable, holder=holder)
        if place is None or file is rid:
            return place
        return place._replace(offset=start, room=SLOT, segment=-next(self._shares), mapped=False)

    def metadata_durable(self, rid: RegionID) -> bool:
        return self._files.metadata_durable(self._at(rid)[0])

    # Closing

    def close(self) -> None:
        self._close_newest()
        self._files.close()
