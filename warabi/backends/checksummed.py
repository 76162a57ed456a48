"""A storage with checksums, which are computed when blocks are persisted, and can be verified.

For every region that was accessed recently, ``_State`` knows which blocks were written since their
checksums were computed.  Invariants:

* A block that is being written, or was written but not persisted, is ``dirty``; it becomes so
  before its data change.
* Before the data of a region with checksums change, its *unsettled* mark is on stable storage
  (:mod:`warabi.metadata.checksums`), so that a checksum is not trusted after a crash.
* A persist *claims* the blocks that were dirty.  It first flushes the data, then computes the
  checksums of these blocks, then stores those of the blocks that it still claims: a write to a
  block removes it from all claims, so that of several persists only the last one's checksum counts.
   The target's next commit makes them durable.
* The mark is removed later, when nothing is dirty: regions that are written and persisted
  continuously are marked every few seconds, not by every persist.

Locks: the target's lock, acquired through the guard, is outside ``_lock``, which is never held
during a system call.  ``create`` is called with the target's lock held and does not acquire it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from warabi import errors
from warabi._core import forks
from warabi._core.results import Verified
from warabi.backends.base import STRANGERS, Location, Storage
from warabi.backends.wrapper import WrapperStorage
from warabi.errors import CorruptTarget
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.checksums import BLOCK, SumRows, digest
from warabi.metadata.guard import Guard
from warabi.metadata.inode import Inode
from warabi.region import RegionID

_NO_BLOCK = 1 << 62
"""Above the number of every block."""


class _State:
    """What this process did to a region's blocks; protected by ``_lock``."""

    __slots__ = ("claims", "dirty", "marked_at", "sumless", "writing")

    def __init__(self, *, sumless: bool = False) -> None:
        self.sumless = sumless  # created by this process and without checksums: needs no mark
        self.marked_at: int | None = None  # number of the change that set the mark
        self.dirty: set[int] = set()
        self.writing: list[range] = []  # blocks, one entry per pending write
        self.claims: list[set[int]] = []  # of persists that have not stored their checksums yet

    @property
    def idle(self) -> bool:
        return not (self.dirty or self.writing or self.claims)

    def soil(self, blocks: Iterable[int]) -> None:
        """Mark *blocks* as dirty, before their data change."""
        self.dirty.update(blocks)
        for claim in self.claims:
            claim.difference_update(blocks)


class SummedStorage(WrapperStorage):
    """Adds checksums to the blocks of *inner*.  Before :meth:`bind` only methods that need no
    catalogue may be called: create, erase, scan."""

    write_waits = True  # for the mark
    shares_writes = False
    blocking = True

    def __init__(self, inner: Storage, catalogue: Catalogue) -> None:
        super().__init__(inner)
        self._catalogue = catalogue
        self._rows = SumRows(catalogue)
        self._digest = digest()
        self._lock = forks.lock()
        self._states: dict[bytes, _State] = {}
        self._doubtful = self._rows.unsettled()  # inodes with a mark from before a crash
        self._seen: dict[int, int] = {}  # of those: blocks verified so far from the start

    def bind(self, guard: Guard, commit: Callable[[], None]) -> None:
        """Set the guard of the target that owns the storage, which also passes while it closes,
        and *commit*, which makes the catalogue durable."""
        self._guard = guard
        self._commit = commit

    # Writing

    def _state(self, rid: bytes) -> _State:
        state = self._states.get(rid)
        if state is None:
            state = self._states[rid] = _State()
        return state

    @contextmanager
    def _changing(self, rid: RegionID, blocks: range) -> Iterator[None]:
        """Allow the block to change the data of *blocks*."""
        with self._lock:
            state = self._state(rid)
            state.writing.append(blocks)
            state.soil(blocks)
            marked = state.sumless or (
                state.marked_at is not None and self._catalogue.is_synced(state.marked_at)
            )
        try:
            if not marked:
                self._mark(rid, state)
            yield
        finally:
            with self._lock:
                state.writing.remove(blocks)

    def _mark(self, rid: RegionID, state: _State) -> None:
        with self._guard.lock, self._guard.checked:
            inode = self._catalogue.region(rid)
            if state.marked_at is None and inode is not None and not inode.dead:
                self._rows.unsettle(inode)
                with self._lock:
                    state.marked_at = self._catalogue.change
        self._commit()

    def write(self, rid: RegionID, offset: int, data: memoryview) -> None:
        with self._changing(rid, _blocks(offset, offset + len(data))):
            self._inner.write(rid, offset, data)

    def write_beyond(self, rid: RegionID, offset: int, data: memoryview) -> None:
        # From the old end on: the zeros of the gap share a block with the last bytes, or with the
        # data.
        start = min(offset, self._size(rid))
        tail = _blocks(start, start + 1)
        with (
            self._changing(rid, tail),
            self._changing(rid, _blocks(offset, offset + len(data))),
        ):
            self._inner.write_beyond(rid, offset, data)

    def resize(self, rid: RegionID, size: int) -> None:
        old = self._size(rid)
        end = min(old, size)
        with self._changing(rid, _blocks(end, end + 1)):
            self._inner.resize(rid, size)
            if size < old:
                self._forget_sums(rid, -(-size // BLOCK), _NO_BLOCK)

    def zero(self, rid: RegionID, offset: int, size: int, *, free: bool) -> None:
        # Whole blocks have no checksums afterwards, as if never written: there may be millions.
        end = offset + size
        first, last = -(-offset // BLOCK), end // BLOCK
        with (
            self._changing(rid, _blocks(offset, offset + 1)),
            self._changing(rid, _blocks(end - 1, end)),
        ):
            self._inner.zero(rid, offset, size, free=free)
            if first < last:
                self._forget_sums(rid, first, last)

    def _forget_sums(self, rid: RegionID, first: int, last: int) -> None:
        """Delete the checksums of the blocks from *first* up to *last*, exclusive, and take the
        blocks out of persists that are under way."""
        with self._lock:
            state = self._state(rid)
            for blocks in (state.dirty, *state.claims):
                blocks.difference_update([b for b in blocks if first <= b < last])
        with self._guard.lock, self._guard.checked:
            if (inode := self._catalogue.region(rid)) is not None:
                self._rows.drop_range(inode, first, last)

    def copy_range(
        self, source: RegionID, start: int, rid: RegionID, offset: int, size: int
    ) -> None:
        with self._changing(rid, _blocks(offset, offset + size)):
            self._inner.copy_range(source, start, rid, offset, size)

    def _size(self, rid: RegionID) -> int:
        """Return the region's size before an exclusive call changes it."""
        with self._guard.lock, self._guard.checked:
            inode = self._catalogue.region(rid)
            return 0 if inode is None else inode.size

    # Persisting

    def persist(self, rid: RegionID, offset: int, size: int, *, times: bool = False) -> None:
        # Whole blocks: a checksum must not cover data that are not on stable storage.
        start = offset // BLOCK * BLOCK
        end = min(-(-(offset + size) // BLOCK) * BLOCK, self._size(rid))
        claim = self._claim(rid, _blocks(start, end) if size else range(0))
        try:
            self._inner.persist(rid, start, max(0, end - start) if size else 0)
            self._sum(rid, claim)
        finally:
            self._give_back(rid, claim)

    def persist_all(self) -> None:
        with self._lock:
            regions = [rid for rid, state in self._states.items() if state.dirty]
        claims = {rid: self._claim(rid, None) for rid in regions}
        try:
            self._inner.persist_all()
            for rid, claim in claims.items():
                with suppress(CorruptTarget):  # erased meanwhile
                    self._sum(RegionID(rid), claim)
        finally:
            for rid, claim in claims.items():
                self._give_back(rid, claim)
        self.run_deferred()

    def _claim(self, rid: bytes, blocks: range | None) -> set[int]:
        """Claim dirty blocks, of those given, that are not being written; they are no longer dirty.

        The caller must call :meth:`_give_back`.
        """
        with self._lock:
            state = self._state(rid)
            if blocks is None:
                claim = set(state.dirty)
            elif len(blocks) < len(state.dirty):
                claim = state.dirty.intersection(blocks)
            else:
                claim = {block for block in state.dirty if block in blocks}
            for writing in state.writing:
                claim.difference_update(writing)
            state.dirty -= claim
            state.claims.append(claim)
            return claim

    def _give_back(self, rid: bytes, claim: set[int]) -> None:
        """End a claim; its remaining blocks got no checksums and are dirty again."""
        with self._lock:
            if (state := self._states.get(rid)) is not None:  # else erased meanwhile
                state.dirty |= claim
                state.claims = [other for other in state.claims if other is not claim]

    def _sum(self, rid: RegionID, claim: set[int]) -> None:
        """Store the checksums of the claimed blocks, which were flushed, and end the claim."""
        with self._lock:
            blocks = sorted(claim)
        sums = dict(self._sums(rid, blocks, self._size(rid))) if blocks else {}
        with self._guard.lock, self._guard.checked:
            inode = self._catalogue.region(rid)
            gone = inode is None or inode.dead
            with self._lock:
                good = {} if gone else {b: value for b, value in sums.items() if b in claim}
                if good:
                    self._state(rid).sumless = False
                claim.clear()
            if inode is not None and good:
                self._rows.put(inode, good)

    def _sums(self, rid: RegionID, blocks: Iterable[int], size: int) -> Iterator[tuple[int, int]]:
        buffer = memoryview(bytearray(BLOCK))
        for block in blocks:
            place = buffer[: max(0, min(BLOCK, size - block * BLOCK))]
            if place:
                self._inner.read_into(rid, block * BLOCK, place)
                yield block, self._digest(place)

    def run_deferred(self) -> None:
        self._inner.run_deferred()
        with self._lock:
            idle = any(state.idle for state in self._states.values())
        if not idle:
            return
        with self._guard.lock, self._guard.checked, self._lock:
            settled = []
            for rid, state in list(self._states.items()):
                if state.idle:
                    del self._states[rid]
                    slot = RegionID(rid).slot
                    if state.marked_at is not None and slot not in self._doubtful:
                        settled.append(slot)
            if settled:
                self._rows.clear_unsettled(settled)

    # Verifying

    def verify(self, rid: RegionID, first: int, count: int) -> Verified:
        with self._guard.lock, self._guard.checked:
            inode = self._catalogue.region(rid)
            if inode is None:
                return Verified(0, 0, [])
            size = inode.size
            last = min(first + count, -(-size // BLOCK))
            known = self._rows.get(inode, first, last - first)
        rotten = []
        unverified = max(0, last - first) - len(known)
        for block, value in sorted(known.items()):
            try:
                differs = next(iter(self._sums(rid, (block,), size)))[1] != value
            except CorruptTarget:  # its file is missing, or too short
                differs = True
            if not differs:
                continue
            if self._superseded(rid, block, value, size):
                unverified += 1
            else:
                rotten.append(block)
        if inode.ino in self._doubtful:
            self._resolve_doubt(inode, rotten, first, last, -(-size // BLOCK))
            unverified += len(rotten)
            rotten = []
        return Verified(max(0, last - first) - unverified - len(rotten), unverified, rotten)

    def _superseded(self, rid: RegionID, block: int, value: int, size: int) -> bool:
        """Whether a block was, or is being, written since *value* was its checksum."""
        with self._guard.lock, self._guard.checked:
            inode = self._catalogue.region(rid)
            if inode is None or inode.dead or inode.size != size:
                return True
            with self._lock:
                state = self._states.get(rid)
                if state is not None and (state.claims or block in state.dirty):
                    return True
            return self._rows.get(inode, block, 1) != {block: value}

    def _resolve_doubt(
        self, inode: Inode, differing: list[int], first: int, last: int, blocks: int
    ) -> None:
        """After a crash: delete checksums that may be outdated; the others are trusted again."""
        with self._guard.lock, self._guard.checked:
            if inode.dead:
                return
            self._rows.drop(inode, differing)
            if first <= self._seen.get(inode.ino, 0):
                self._seen[inode.ino] = max(last, self._seen.get(inode.ino, 0))
            if self._seen.get(inode.ino, 0) >= blocks:
                self._doubtful.discard(inode.ino)
                with self._lock:
                    state = self._states.get(inode.rid)
                if state is None or state.marked_at is None:
                    self._rows.clear_unsettled([inode.ino])

    def update(self, rid: RegionID, first: int, count: int) -> None:
        with self._guard.lock, self._guard.checked:
            inode = self._catalogue.region(rid)
            if inode is None:
                return
            last = min(first + count, -(-inode.size // BLOCK))
            known = self._rows.get(inode, first, last - first)
        with self._changing(rid, range(0)), self._lock:
            self._state(rid).dirty.update(b for b in range(first, last) if b not in known)

    # Overridden to use the calls above, or not supported: nothing may change or become durable
    # without its checksum

    view = Storage.view
    written = Storage.written
    cleared = Storage.cleared
    keep_times = Storage.keep_times
    metadata_durable = Storage.metadata_durable

    # Not affected by checksums

    def create(self, rid: RegionID, size: int) -> None:
        self._inner.create(rid, size)
        with self._lock:
            self._states[rid] = _State(sumless=True)

    def erase(self, rid: RegionID) -> None:
        with self._lock:
            self._states.pop(rid, None)
        self._inner.erase(rid)

    def erase_all(self, rids: list[RegionID]) -> Iterator[tuple[RegionID, errors.Exception]]:
        with self._lock:
            for rid in rids:
                self._states.pop(rid, None)
        return self._inner.erase_all(rids)

    def allocate(self, rid: RegionID, offset: int, size: int) -> None:
        self._inner.allocate(rid, offset, size)

    def seek(self, rid: RegionID, offset: int, end: int, *, hole: bool) -> int:
        return self._inner.seek(rid, offset, end, hole=hole)

    def read_into(self, rid: RegionID, offset: int, out: memoryview) -> None:
        self._inner.read_into(rid, offset, out)

    def read_into_nowait(self, rid: RegionID, offset: int, out: memoryview) -> None:
        self._inner.read_into_nowait(rid, offset, out)

    def clone(self, rid: RegionID, copy: RegionID, size: int) -> None:
        self._inner.clone(rid, copy, size)

    def attests(self, inode: Inode, size: int) -> bool:
        return self._rows.attests(inode, size)

    def replace(self, rid: RegionID, size: int) -> Callable[[], None]:
        self.resize(rid, size)  # other processes only read at the location
        return lambda: None

    def vacate(self, rid: RegionID) -> None:
        self._inner.vacate(rid)

    def wrote(self, rid: bytes) -> None:
        """Never called: other processes do not write, see ``shares_writes``."""

    grew = Storage.grew  # never called, either

    def share(self, rid: RegionID, *, writable: bool, holder: int = STRANGERS) -> Location | None:
        return self._inner.share(rid, writable=False)


def _blocks(start: int, end: int) -> range:
    """Return the blocks that contain the bytes from *start* to *end*."""
    return range(start // BLOCK, -(-end // BLOCK))


def storage_with_sums(
    storage: Storage, catalogue: Catalogue, wanted: bool | None
) -> SummedStorage | None:
    """Add checksums to *storage* if they are wanted or, for None, enabled in the catalogue.

    Otherwise returns None, and deletes existing checksums, which would become outdated.
    """
    wanted = catalogue.summed is not None if wanted is None else wanted
    if wanted:
        digest()  # before anything changes
    SumRows(catalogue).enable(wanted)
    return SummedStorage(storage, catalogue) if wanted else None
