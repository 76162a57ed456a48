"""Conformance tests of storages, for backends inside and outside of this package.

A backend inherits :class:`StorageTests`, or :class:`LastingStorageTests` if its regions outlive
their process, in a class whose name begins with ``Test``, and defines how to create a storage and
to access its data without the storage; ``tests/storage/test_conformance.py`` and
``tests/mount/test_dict_backend.py`` show it.  Needs pytest, which nothing else here imports.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Iterator
from typing import Final

import pytest

from warabi.backends import Storage
from warabi.backends.base import THIS_PROCESS
from warabi.errors import PathError, WouldBlock
from warabi.region import RegionID

SIZES: Final = (1, 1000, 4096, 70_001, 1 << 20)
"""Sizes of regions: with shared and separate locations, aligned or not."""

_slots = itertools.count(1)


def pattern(size: int, seed: int = 0) -> bytes:
    """Return *size* bytes of a unique pattern without zeros."""
    return random.Random(seed).randbytes(size).replace(b"\0", b"\1")


class StorageTests:
    """Tests for every storage.  A class must not override tests."""

    # To be defined by a subclass

    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        """Return an empty storage, which is closed after the test."""
        raise NotImplementedError

    def raw_get(self, storage: Storage, rid: RegionID, size: int) -> bytes:
        """Read the region's first *size* bytes without the storage."""
        raise NotImplementedError

    def raw_set(self, storage: Storage, rid: RegionID, data: bytes) -> None:
        """Replace the region's first bytes without the storage."""
        raise NotImplementedError

    # To be defined by a subclass whose storage reads a catalogue

    def new_id(self, storage: Storage, size: int) -> RegionID:
        """Return the ID for a region of *size* bytes that is about to be created."""
        return RegionID.from_parts(next(_slots), random.getrandbits(63))

    def resized(self, storage: Storage, rid: RegionID, size: int) -> None:
        """Called when the region's size has changed."""

    def retire(self, storage: Storage, rid: RegionID) -> None:
        """Called when the region is about to be erased."""

    def is_stored(self, storage: Storage, rid: RegionID, size: int) -> bool:
        """Whether a scan yields the region with that size."""
        return (rid, size) in list(storage.scan())

    # Of the tests

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in vars(cls):
            if name.startswith("test_") and any(hasattr(base, name) for base in cls.__bases__):
                raise TypeError(f"{cls.__qualname__}: overrides {name}")

    def make(self, storage: Storage, data: bytes) -> RegionID:
        """Create a region with these data."""
        rid = self.new_id(storage, len(data))
        storage.create(rid, len(data))
        if data:
            storage.write(rid, 0, memoryview(data))
        return rid

    def read(self, storage: Storage, rid: RegionID, offset: int, size: int) -> bytes:
        """Read bytes of a region into a buffer with other contents."""
        out = bytearray(b"\xa5" * (size + 2))
        storage.read_into(rid, offset, memoryview(out)[1:-1])
        assert (out[0], out[-1]) == (0xA5, 0xA5)
        return bytes(out[1:-1])

    def resize(self, storage: Storage, rid: RegionID, old: int, new: int) -> None:
        """Resize a region as a target does."""
        storage.check(rid, old)
        storage.resize(rid, new)
        self.resized(storage, rid, new)

    def allocate(self, storage: Storage, rid: RegionID, offset: int, size: int) -> None:
        """Allocate the space of an extent, unless the storage says that it cannot."""
        try:
            storage.allocate(rid, offset, size)
        except PathError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise

    def erase(self, storage: Storage, rid: RegionID) -> None:
        self.retire(storage, rid)
        storage.erase(rid)

    @pytest.mark.parametrize("size", SIZES)
    def test_a_new_region_reads_as_zero(self, storage: Storage, size: int) -> None:
        rid = self.new_id(storage, size)
        storage.create(rid, size)
        assert self.read(storage, rid, 0, size) == bytes(size)
        assert self.raw_get(storage, rid, size) == bytes(size)

    def test_an_empty_region_can_be_made_and_grow(self, storage: Storage) -> None:
        rid = self.make(storage, b"")
        assert self.read(storage, rid, 0, 0) == b""
        storage.persist(rid, 0, 0)
        self.resize(storage, rid, 0, 10)
        assert self.read(storage, rid, 0, 10) == bytes(10)

    @pytest.mark.parametrize("size", SIZES)
    def test_what_is_written_is_read_and_is_there(self, storage: Storage, size: int) -> None:
        data = pattern(size)
        rid = self.make(storage, data)
        assert self.read(storage, rid, 0, size) == data
        start, end = size // 3, size - size // 4
        assert self.read(storage, rid, start, end - start) == data[start:end]
        part = pattern(end - start, 1)
        storage.write(rid, start, memoryview(part))
        data = data[:start] + part + data[end:]
        assert self.read(storage, rid, 0, size) == data
        storage.persist(rid, 0, size)
        assert self.raw_get(storage, rid, size) == data

    @pytest.mark.parametrize("size", SIZES)
    def test_what_is_changed_behind_its_back_is_read(self, storage: Storage, size: int) -> None:
        rid = self.make(storage, pattern(size))
        storage.persist(rid, 0, size)
        self.raw_set(storage, rid, pattern(size, 1))
        assert self.read(storage, rid, 0, size) == pattern(size, 1)

    @pytest.mark.parametrize("size", SIZES)
    def test_other_ways_to_read_agree_or_decline(self, storage: Storage, size: int) -> None:
        data = pattern(size)
        rid = self.make(storage, data)
        out = bytearray(size)
        try:
            storage.read_into_nowait(rid, 0, memoryview(out))
        except WouldBlock:
            assert storage.blocking
        else:
            assert out == data
        shown = storage.view(rid, 0, size)
        assert shown is None or bytes(shown) == data
        del shown
        place = storage.share(rid, writable=False, holder=THIS_PROCESS)
        if place is not None:
            try:
                assert place.room is None or place.room >= size
                assert os.pread(place.fd, size, place.offset) == data
            finally:
                os.close(place.fd)

    @pytest.mark.parametrize("size", SIZES)
    def test_what_shrank_and_grows_again_reads_as_zero(self, storage: Storage, size: int) -> None:
        data, less = pattern(size), size // 2
        rid = self.make(storage, data)
        self.resize(storage, rid, size, less)
        assert self.read(storage, rid, 0, less) == data[:less]
        self.resize(storage, rid, less, size + 5000)
        assert self.read(storage, rid, 0, size + 5000) == data[:less] + bytes(size + 5000 - less)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("gap", [0, 5000])
    def test_a_write_beyond_the_end_leaves_zeros_before_it(
        self, storage: Storage, size: int, gap: int
    ) -> None:
        data, more = pattern(size), pattern(100, 1)
        rid = self.make(storage, data)
        storage.check(rid, size)
        storage.write_beyond(rid, size + gap, memoryview(more))
        self.resized(storage, rid, size + gap + 100)
        assert self.read(storage, rid, 0, size + gap + 100) == data + bytes(gap) + more

    @pytest.mark.parametrize("size", SIZES)
    def test_a_region_in_another_place_is_the_same(self, storage: Storage, size: int) -> None:
        data = pattern(size)
        rid = self.make(storage, data)
        freed = storage.replace(rid, size + 100)
        self.resized(storage, rid, size + 100)
        assert self.read(storage, rid, 0, size + 100) == data + bytes(100)
        freed()
        assert self.read(storage, rid, 0, size + 100) == data + bytes(100)

    @pytest.mark.parametrize("size", SIZES)
    def test_a_copy_is_a_region_of_its_own(self, storage: Storage, size: int) -> None:
        data = pattern(size)
        rid = self.make(storage, data)
        copy = self.new_id(storage, size)
        storage.clone(rid, copy, size)
        storage.write(rid, 0, memoryview(b"\0"))
        assert self.read(storage, copy, 0, size) == data
        self.erase(storage, rid)
        assert self.read(storage, copy, 0, size) == data

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("free", [False, True])
    def test_an_extent_becomes_zero_and_nothing_else(
        self, storage: Storage, size: int, free: bool
    ) -> None:
        data = pattern(size)
        rid = self.make(storage, data)
        for start, end in ((size // 4, size // 3), (size // 2, size), (0, 1)):
            if start < end:
                storage.zero(rid, start, end - start, free=free)
                data = data[:start] + bytes(end - start) + data[end:]
            assert self.read(storage, rid, 0, size) == data
        storage.persist(rid, 0, size)
        assert self.raw_get(storage, rid, size) == data
        storage.write(rid, 0, memoryview(pattern(size, 1)))
        assert self.read(storage, rid, 0, size) == pattern(size, 1)

    @pytest.mark.parametrize("size", SIZES)
    def test_room_that_is_reserved_changes_no_bytes(self, storage: Storage, size: int) -> None:
        data = pattern(size)
        rid = self.make(storage, data)
        storage.zero(rid, size // 2, size - size // 2, free=True)
        data = data[: size // 2] + bytes(size - size // 2)
        self.allocate(storage, rid, 0, size)
        beyond = size + 5000
        if not storage.moves(rid, beyond):
            self.allocate(storage, rid, size // 3, beyond - size // 3)
        assert self.read(storage, rid, 0, size) == data
        assert self.is_stored(storage, rid, size)
        assert storage.space(rid, size) >= size
        self.resize(storage, rid, size, beyond)
        assert self.read(storage, rid, 0, beyond) == data + bytes(5000)

    def test_growing_uses_space_or_leaves_a_hole(self, storage: Storage) -> None:
        rid, size = self.make(storage, b""), 1 << 20
        self.resize(storage, rid, 0, size)
        assert (storage.space(rid, size) < size // 2) == storage.leaves_holes(size)

    @pytest.mark.parametrize("size", SIZES)
    def test_holes_read_as_zero_and_what_was_written_is_data(
        self, storage: Storage, size: int
    ) -> None:
        rid = self.make(storage, bytes(size))
        storage.zero(rid, 0, size, free=True)
        middle, data = size // 2, pattern(max(1, size // 8))
        storage.write(rid, middle, memoryview(data))
        found = self.read(storage, rid, 0, size)
        extents = self.extents(storage, rid, size)
        assert sum(end - start for start, end in extents) <= size
        assert any(start <= middle and middle + len(data) <= end for start, end in extents)
        for start, end in extents:
            found = found[:start] + bytes(end - start) + found[end:]
        assert found == bytes(size)
        assert storage.seek(rid, size, size, hole=True) == size
        assert storage.seek(rid, middle, middle + 1, hole=False) == middle

    def extents(self, storage: Storage, rid: RegionID, size: int) -> list[tuple[int, int]]:
        """From where to where a region has data."""
        found, end = [], 0
        while end < size and (start := storage.seek(rid, end, size, hole=False)) < size:
            assert end <= start
            end = storage.seek(rid, start, size, hole=True)
            assert start < end <= size
            found.append((start, end))
        return found

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("other", SIZES)
    def test_a_range_is_copied_with_its_holes(
        self, storage: Storage, size: int, other: int
    ) -> None:
        data, before = pattern(size), pattern(other, 1)
        source, rid = self.make(storage, data), self.make(storage, before)
        if size > 3:
            storage.zero(source, size // 4, size // 2, free=True)
            data = data[: size // 4] + bytes(size // 2) + data[size // 4 + size // 2 :]
        count = min(size, other) * 2 // 3
        start, offset = size - count, (other - count) // 2
        storage.copy_range(source, start, rid, offset, count)
        wanted = before[:offset] + data[start:] + before[offset + count :]
        assert self.read(storage, rid, 0, other) == wanted
        assert self.read(storage, source, 0, size) == data
        storage.persist(rid, 0, other)
        assert self.raw_get(storage, rid, other) == wanted
        half = size // 2
        storage.copy_range(source, 0, source, size - half, half)
        assert self.read(storage, source, 0, size) == data[: size - half] + data[:half]

    @pytest.mark.parametrize("size", SIZES)
    def test_bytes_that_are_prepared_become_a_region_or_none(
        self, storage: Storage, size: int
    ) -> None:
        data = pattern(size)
        self.erase(storage, self.make(storage, data))  # storages may keep its memory for the next
        for wanted in (data, bytes(size)):
            for used in (False, True):
                if wanted is data:
                    fresh = storage.written(memoryview(data))
                else:
                    fresh = storage.cleared(size, THIS_PROCESS)
                if fresh is None:
                    continue
                if used:
                    rid = self.new_id(storage, size)
                    fresh.become(rid)
                    assert self.read(storage, rid, 0, size) == wanted
                fresh.discard()
                if used:
                    assert self.read(storage, rid, 0, size) == wanted

    def test_what_is_erased_is_gone_and_nothing_else(self, storage: Storage) -> None:
        regions = [self.make(storage, pattern(size, size)) for size in SIZES]
        gone = regions[::2]
        for rid in gone:
            self.retire(storage, rid)
        storage.vacate(gone[0])
        assert list(storage.erase_all(gone)) == []
        for size, rid in zip(SIZES, regions, strict=True):
            assert self.is_stored(storage, rid, size) == (rid not in gone)
            if rid not in gone:
                assert self.read(storage, rid, 0, size) == pattern(size, size)
        again = self.make(storage, bytes(SIZES[0]))
        assert self.read(storage, again, 0, SIZES[0]) == bytes(SIZES[0])

    def test_nothing_waits_for_stable_storage_after_a_persist(self, storage: Storage) -> None:
        regions = [self.make(storage, pattern(size)) for size in SIZES]
        storage.persist(regions[0], 0, SIZES[0])
        storage.persist(regions[-1], 10, 100)
        storage.persist_names()
        assert storage.oldest_fresh() is None
        storage.persist_all()
        storage.run_deferred()
        for size, rid in zip(SIZES, regions, strict=True):
            assert self.raw_get(storage, rid, size) == pattern(size)

    def test_room_is_in_bytes(self, storage: Storage) -> None:
        total, available = storage.room()
        assert 0 <= available <= total
        assert total >= max(SIZES)

    def test_threads_read_and_write_concurrently(self, storage: Storage) -> None:
        chunk, threads, rounds = 5000, 4, 20
        rid = self.make(storage, bytes(chunk * threads))
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for i in range(rounds):
                    data = pattern(chunk, number * rounds + i)
                    storage.write(rid, number * chunk, memoryview(data))
                    assert self.read(storage, rid, number * chunk, chunk) == data
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert not any(worker.is_alive() for worker in workers)
        assert not failures

    @pytest.mark.parametrize("seed", range(2))
    def test_a_random_walk_agrees_with_a_model(self, storage: Storage, seed: int) -> None:
        chance = random.Random(seed)
        model: dict[RegionID, bytearray] = {}
        for step in range(200):
            name = chance.choice(
                "make write write grow resize erase persist zero copy allocate".split()
            )
            if name == "make" or not model:
                data = pattern(chance.choice([0, 1, 3000, 4096, 4097, 100_000]), step)
                model[self.make(storage, data)] = bytearray(data)
                continue
            rid = chance.choice([*model])
            found = model[rid]
            data = pattern(chance.randint(1, 9000), step)
            if name == "write" and found:
                offset = chance.randrange(len(found))
                data = data[: len(found) - offset]
                storage.write(rid, offset, memoryview(data))
                found[offset : offset + len(data)] = data
            elif name == "grow":
                offset = len(found) + chance.choice([0, 1, 5000])
                storage.check(rid, len(found))
                storage.write_beyond(rid, offset, memoryview(data))
                found.extend(bytes(offset - len(found)) + data)
                self.resized(storage, rid, len(found))
            elif name == "resize":
                size = chance.randint(0, 2 * len(found) + 1)
                self.resize(storage, rid, len(found), size)
                found[size:] = bytes(max(0, size - len(found)))
            elif name == "erase":
                self.erase(storage, rid)
                del model[rid]
            elif name == "persist":
                storage.persist(rid, 0, len(found))
            elif found:
                start = chance.randrange(len(found))
                count = chance.randint(1, len(found) - start)
                if name == "zero":
                    storage.zero(rid, start, count, free=bool(chance.getrandbits(1)))
                    found[start : start + count] = bytes(count)
                elif name == "allocate":
                    self.allocate(storage, rid, start, count)
                elif name == "copy" and len(model) > 1:
                    source = chance.choice([one for one in model if one != rid])
                    count = min(count, len(model[source]))
                    storage.copy_range(source, 0, rid, start, count)
                    found[start : start + count] = model[source][:count]
        for rid, found in model.items():
            assert self.read(storage, rid, 0, len(found)) == found
            assert self.is_stored(storage, rid, len(found))


class LastingStorageTests(StorageTests):
    """Tests for storages whose regions outlive their process."""

    def reopen(self, storage: Storage) -> Storage:
        """Close the storage cleanly, and reopen it; the new one is closed after the test."""
        raise NotImplementedError

    def test_what_is_stored_is_there_after_it_was_opened_anew(self, storage: Storage) -> None:
        regions = [self.make(storage, pattern(size)) for size in SIZES]
        gone = self.make(storage, pattern(100_000))
        self.erase(storage, gone)
        storage.persist_all()
        again = self.reopen(storage)
        for size, rid in zip(SIZES, regions, strict=True):
            assert self.is_stored(again, rid, size)
            assert self.read(again, rid, 0, size) == pattern(size)
        assert not self.is_stored(again, gone, 100_000)
        again.sync_found()
        assert again.oldest_fresh() is None

    def test_what_is_destroyed_is_gone(self, storage: Storage) -> None:
        regions = [self.make(storage, pattern(size)) for size in SIZES]
        storage.persist_all()
        storage.destroy()
        again = self.reopen(storage)
        assert not any(self.is_stored(again, r, s) for r, s in zip(regions, SIZES, strict=True))


__all__ = ["SIZES", "LastingStorageTests", "StorageTests", "pattern"]
