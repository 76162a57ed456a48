"""What a target may hold after a crash, told by what was done to it and what was promised.

One :class:`Oracle` follows one sequence of operations; what several clients do side by side, to
regions and names of their own, takes one for each.

* The names and the living regions are the catalogue's, which is transactional: what is found
  must be one of the states that they went through, and none before the last promised one.
* The bytes of a region are its storage's.  Each must be one that the region had at that place
  since the bytes were promised, so that bytes of another region are always found out; and its
  size one of those that it had, or one on the way there.
* A region that was never persisted may be missing, or shorter.
* Its times are those at the last ``fsync``, or later ones if it was changed since.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from warabi.backends.xattr_times import Times


class Op(NamedTuple):
    """One operation.  ``key`` is the oracle's number for the region, not its ID."""

    kind: str
    key: int = -1
    offset: int = 0
    size: int = 0
    seed: int = 0
    name: str = ""
    new_name: str = ""

    @property
    def data(self) -> bytes:
        return random.Random(self.seed).randbytes(self.size)

    @property
    def mtime_ns(self) -> int:
        return self.seed * 10**9 + self.seed

    @property
    def extents(self) -> list[tuple[int, int]]:
        """The two extents of a vector operation, with a gap between them."""
        half = self.size // 2
        return [(self.offset, half), (self.offset + half + 1, self.size - half)]


_CHANGE_NO_TIMES = {"persist", "fsync", "fdatasync"}


@dataclass
class Region:
    """What is known of a region."""

    key: int
    images: list[bytes]
    """Its content when its bytes were promised last, and after each operation since."""
    rid: bytes | None = None
    """Its ID; None as long as nobody told."""
    persisted: bool = False
    times: Times | None = None
    """Those that were promised."""
    changed: bool = False
    """Whether it may have got others since."""

    @property
    def content(self) -> bytes:
        return self.images[-1]

    def promise(self, offset: int, size: int) -> None:
        """Its size, and those bytes, are what they are now."""
        now = self.content
        self.images = [_sized(image, len(now)) for image in self.images]
        self.images = [
            image[:offset] + now[offset : offset + size] + image[offset + size :]
            for image in self.images
        ]
        if len(set(self.images)) == 1:
            del self.images[1:]
        self.persisted = True

    def check_times(self, found: Times) -> str:
        """What is wrong with *found* as its times; empty when nothing is."""
        due = self.times
        if due is None or found == due or (self.changed and found.ctime > due.ctime):
            return ""
        return f"{found}, not {due}{' or later' if self.changed else ''}"

    def check(self, found: bytes) -> str:
        """What is wrong with *found* as its content; empty when nothing is."""
        if found in self.images:
            return ""
        sizes = [len(image) for image in self.images]
        if not min(sizes) <= len(found) <= max(sizes):
            return f"{len(found)} bytes, not {min(sizes)} to {max(sizes)}"
        got = np.frombuffer(found, np.uint8)
        right = np.zeros(len(got), np.bool_)
        for image in set(self.images):
            right |= got == np.frombuffer(_sized(image, len(got)), np.uint8)
        if right.all():
            return ""
        wrong = int(np.argmin(right))
        return f"byte {wrong} of {len(found)} ({len(right) - int(right.sum())} in all) never was so"


def _sized(image: bytes, size: int) -> bytes:
    return image[:size] + bytes(max(0, size - len(image)))


class State(NamedTuple):
    """The catalogue after an operation: names, the living regions, and those without a name."""

    names: dict[str, int]
    alive: frozenset[int]
    nameless: frozenset[int]


class Found(NamedTuple):
    """What a target holds: content by ID, ID by name, and times by ID."""

    regions: dict[bytes, bytes]
    names: dict[str, bytes]
    times: Mapping[bytes, Times] = MappingProxyType({})


@dataclass
class Oracle:
    """Follows a sequence of operations: :meth:`begin`, then :meth:`end` when it returned.

    Args:
        resident: whether what was once written stays written, as after a process was killed: the
            page cache forgets nothing, so no region's bytes are lost, only what its catalogue
            did not commit.
    """

    resident: bool = False
    promising: bool = True
    """False as long as what returns may, but need not, be found."""
    regions: dict[int, Region] = field(default_factory=dict)
    states: list[State] = field(default_factory=lambda: [State({}, frozenset(), frozenset())])
    floor: int = 0
    """The oldest of ``states`` that the catalogue may be in."""
    last_change: dict[int, int] = field(default_factory=dict)
    """The newest state that a persist of a region has to keep."""
    next_key: int = 0

    @property
    def now(self) -> State:
        return self.states[-1]

    def content(self, key: int) -> bytes:
        return self.regions[key].content

    def names_of(self, key: int) -> list[str]:
        return [name for name, named in self.now.names.items() if named == key]

    # What happens

    def begin(self, op: Op) -> None:
        """*op* is about to be done: from now on it may have been, in part or in whole."""
        if op.key in self.regions and op.kind not in _CHANGE_NO_TIMES:
            self.regions[op.key].changed = True
        getattr(self, f"_begin_{op.kind}")(op)

    def end(self, op: Op, rid: bytes | None = None, times: Times | None = None) -> None:
        """*op* has returned; *rid* is the ID of the region that it made, *times* are those that
        it made durable."""
        if rid is not None:
            self.regions[op.key].rid = rid
        if self.resident and op.key in self.regions:
            region = self.regions[op.key]
            region.images = [region.content]
        if self.promising and (promise := getattr(self, f"_end_{op.kind}", None)) is not None:
            promise(op)
        if self.promising and times is not None:
            self.regions[op.key].times, self.regions[op.key].changed = times, False

    def _change(self, names: dict[str, int], alive: frozenset[int], nameless: frozenset[int],
                *touched: int) -> None:  # fmt: skip
        self.states.append(State(names, alive, nameless & alive))
        for key in touched:
            self.last_change[key] = len(self.states) - 1

    def _image(self, key: int, image: bytes) -> None:
        region = self.regions[key]
        if image != region.content:
            region.images.append(image)

    def _make(self, op: Op, *images: bytes) -> None:
        names, alive, nameless = self.now
        self.regions[op.key] = Region(op.key, list(images))
        self.next_key = max(self.next_key, op.key + 1)
        alive |= {op.key}
        if op.name:
            self._change({**names, op.name: op.key}, alive, nameless, op.key)
        else:
            self._change(names, alive, nameless | {op.key}, op.key)

    def _begin_create(self, op: Op) -> None:
        self._make(op, b"", bytes(op.size))

    def _begin_create_and_write(self, op: Op) -> None:
        self._make(op, b"", bytes(op.size), op.data)

    _begin_create_and_persist = _begin_create_and_write

    def _end_create_and_persist(self, op: Op) -> None:
        self._promise(op.key, 0, op.size)

    def _begin_write(self, op: Op) -> None:
        old = self.content(op.key)
        end = op.offset + op.size
        grown = _sized(old, max(len(old), end))
        self._image(op.key, grown[: op.offset] + op.data + grown[end:])

    _begin_write_persist = _begin_write

    def _end_write_persist(self, op: Op) -> None:
        self._promise(op.key, op.offset, op.size)

    def _begin_write_vector(self, op: Op) -> None:
        image = bytearray(self.content(op.key))
        data, done = op.data, 0
        for offset, size in op.extents:
            image[offset : offset + size] = data[done : done + size]
            done += size
            self._image(op.key, bytes(image))

    _begin_write_vector_persist = _begin_write_vector

    def _end_write_vector_persist(self, op: Op) -> None:
        for offset, size in op.extents:
            self._promise(op.key, offset, size)

    def _begin_persist(self, op: Op) -> None:
        pass

    def _end_persist(self, op: Op) -> None:
        self._promise(op.key, op.offset, op.size)

    def _begin_fsync(self, op: Op) -> None:
        pass

    def _end_fsync(self, op: Op) -> None:
        self._promise(op.key, 0, len(self.content(op.key)))

    _begin_fdatasync, _end_fdatasync = _begin_fsync, _end_fsync

    def _begin_zero(self, op: Op) -> None:
        old = self.content(op.key)
        end = min(len(old), op.offset + op.size)
        if op.offset < end:
            self._image(op.key, old[: op.offset] + bytes(end - op.offset) + old[end:])

    _begin_punch = _begin_zero

    def _begin_allocate(self, op: Op) -> None:
        old = self.content(op.key)
        self._image(op.key, _sized(old, max(len(old), op.offset + op.size)))

    def _begin_resize(self, op: Op) -> None:
        self._image(op.key, _sized(self.content(op.key), op.size))

    def _begin_utime(self, op: Op) -> None:
        pass

    def _begin_erase(self, op: Op) -> None:
        names, alive, nameless = self.now
        names = {name: key for name, key in names.items() if key != op.key}
        self._change(names, alive - {op.key}, nameless)

    def _begin_link(self, op: Op) -> None:
        names, alive, nameless = self.now
        self._change({**names, op.name: op.key}, alive, nameless - {op.key}, op.key)

    def _begin_unlink(self, op: Op) -> None:
        names = dict(self.now.names)
        self._drop(names, names.pop(op.name))

    def _begin_rename(self, op: Op) -> None:
        names = dict(self.now.names)
        key = names[op.name]
        victim = names.get(op.new_name, key)
        if victim == key and op.new_name in names:
            return  # two names of one region: both stay
        del names[op.name]
        names[op.new_name] = key
        self._drop(names, victim, key)

    def _drop(self, names: dict[str, int], key: int, *touched: int) -> None:
        """*key* lost a name, and goes with its last one."""
        self.regions[key].changed = True
        alive = self.now.alive if key in names.values() else self.now.alive - {key}
        self._change(names, alive, self.now.nameless, key, *touched)

    def _begin_commit(self, op: Op) -> None:
        pass

    def _end_commit(self, op: Op) -> None:
        self.floor = len(self.states) - 1

    def _begin_sync(self, op: Op) -> None:
        pass

    def _end_sync(self, op: Op) -> None:
        for key in self.now.alive:
            self._promise(key, 0, len(self.content(key)))
        self._end_commit(op)

    def _promise(self, key: int, offset: int, size: int) -> None:
        self.regions[key].promise(offset, size)
        self.floor = max(self.floor, self.last_change[key])

    # What is found

    def check(self, found: Found) -> State:
        """The state that *found* is in; raises ``AssertionError`` when it may be in none."""
        reasons = []
        for index in range(len(self.states) - 1, self.floor - 1, -1):
            reason = self._differs(self.states[index], found)
            if not reason:
                return self.states[index]
            reasons.append(f"state {index}: {reason}")
        raise AssertionError("; ".join(reasons[:8]))

    def _differs(self, state: State, found: Found) -> str:
        by_rid = {region.rid: region for region in self.regions.values() if region.rid}
        unknown = [rid for rid in found.regions if rid not in by_rid]
        untold = [key for key in sorted(state.alive) if self.regions[key].rid is None]
        names = {}
        for name, rid in found.names.items():
            known = by_rid.get(rid)
            if known is None:
                if state.names.get(name) not in untold:
                    return f"{name!r} means the unknown region {rid.hex()}"
                known = self.regions[state.names[name]]
            names[name] = known.key
        if names != state.names:
            odd = {n for n in names | state.names if names.get(n) != state.names.get(n)}
            return f"names {sorted(odd)} mean {[names.get(n) for n in sorted(odd)]}"
        if len(unknown) > len(untold):
            return f"unknown regions {[rid.hex() for rid in unknown]}"
        pairs = {by_rid[rid].key: rid for rid in found.regions if rid in by_rid}
        pairs.update(zip(untold, unknown, strict=False))
        if extra := pairs.keys() - state.alive:
            return f"regions {sorted(extra)} are there"
        for key in state.alive - pairs.keys():
            if self.regions[key].persisted:
                return f"the persisted region {key} is missing"
            if key not in state.nameless or self.resident:
                return f"region {key} is missing"
        for key, rid in pairs.items():
            region = self.regions[key]
            wrong = region.check(found.regions[rid])
            if rid in found.times:
                wrong = wrong or region.check_times(found.times[rid])
            if wrong:
                return f"region {key}: {wrong}"
        return ""

    def adopt(self, found: Found) -> None:
        """Go on from *found*, which was checked: it is what survived, whatever it lost."""
        state = self.check(found)
        told = {region.rid for region in self.regions.values()}
        new = [rid for rid in found.regions if rid not in told]
        for key in sorted(state.alive):
            region = self.regions[key]
            if region.rid is None and new:
                region.rid = new.pop(0)
        self.regions = {
            key: Region(key, [found.regions[rid]], rid, region.persisted, found.times.get(rid))
            for key, region in self.regions.items()
            if (rid := region.rid) is not None and rid in found.regions
        }
        alive = frozenset(self.regions)
        self.states = [State(state.names, alive, state.nameless & alive)]
        self.floor = 0
        self.last_change = dict.fromkeys(alive, 0)
