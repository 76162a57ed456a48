"""A medium with a volatile cache: what may be on it when the power fails.

What is legal here is what POSIX allows, which is more than any one file system does: until a
file is synced each of its writes may be there or not, sector by sector of 512 bytes; a change
of its size may be there or not; a change of an extended attribute may be, also when only the data
was synced; until a directory is synced each change of its entries may be.
Syncing a file does not sync its name, and nothing has an order.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.trace import Event

SECTOR = 512


@dataclass(eq=False)
class Change:
    """One change of a file or of a directory's entries that is not on the medium yet."""

    file: File | None = None
    offset: int = 0
    data: bytes | None = None
    size: int | None = None
    """Of a truncation or extension; with *only_grow* it never shrinks the file."""
    only_grow: bool = False
    attribute: str = ""
    """Which extended attribute *data* are the value of."""
    entries: list[tuple[Directory, str, Node | None]] = field(default_factory=list)
    """Names and what they mean from then on; a rename has two, which go together."""


@dataclass(eq=False)
class File:
    durable: bytearray = field(default_factory=bytearray)
    attributes: dict[str, bytes] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)


@dataclass(eq=False)
class Directory:
    durable: dict[str, Node] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def now(self) -> dict[str, Node]:
        entries = dict(self.durable)
        for change in self.pending:
            _apply_entries(self, entries, change)
        return entries


Node = File | Directory


def _apply_entries(directory: Directory, entries: dict[str, Node], change: Change) -> None:
    for where, name, node in change.entries:
        if where is directory:
            if node is None:
                entries.pop(name, None)
            else:
                entries[name] = node


def _apply(image: bytearray, attributes: dict[str, bytes], change: Change) -> None:
    if change.attribute:
        attributes[change.attribute] = change.data or b""
        return
    if change.size is not None:
        if change.size < len(image):
            if not change.only_grow:
                del image[change.size :]
        else:
            image.extend(bytes(change.size - len(image)))
        return
    assert change.data is not None
    end = change.offset + len(change.data)
    if end > len(image):
        image.extend(bytes(end - len(image)))
    image[change.offset : end] = change.data


Choice = Callable[[Change], float]
"""The share of a change's sectors that reach the medium: 0 none, 1 all."""


class Disk:
    """What the events of a trace did below *root*."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.top = Directory()
        self._begun: dict[int, list[tuple[Node, list[Change], tuple[int, int] | None]]] = {}

    def _find(self, path: str) -> Node:
        node: Node = self.top
        for name in self._parts(path):
            assert isinstance(node, Directory), path
            node = node.now()[name]
        return node

    def _parts(self, path: str) -> list[str]:
        return [part for part in path.removeprefix(self._root).split("/") if part]

    def _place(self, path: str) -> tuple[Directory, str]:
        above = self._find(os.path.dirname(path)) if self._parts(path)[:-1] else self.top
        assert isinstance(above, Directory)
        return above, os.path.basename(path)

    def pending(self) -> list[Change]:
        """Every change that may be lost."""
        return [change for node in self._nodes() for change in node.pending]

    def _nodes(self) -> Iterator[Node]:
        """Every file and directory that any name may mean."""
        seen: dict[int, Node] = {}
        waiting: list[Node] = [self.top]
        while waiting:
            node = waiting.pop()
            if id(node) in seen:
                continue
            seen[id(node)] = node
            yield node
            if isinstance(node, Directory):
                waiting.extend(node.durable.values())
                waiting.extend(
                    child for change in node.pending for _, _, child in change.entries if child
                )

    # What happens

    def happen(self, event: Event) -> bool:
        """Take in *event*; whether it changed what may be on the medium."""
        if event.kind in ("mark", ""):
            return False
        method: Callable[[Event], bool] = getattr(self, f"_{event.kind}")
        return method(event)

    def _entries(self, *entries: tuple[Directory, str, Node | None]) -> bool:
        change = Change(entries=list(entries))
        for directory in {id(d): d for d, _, _ in entries}.values():
            directory.pending.append(change)
        return True

    def _create(self, event: Event) -> bool:
        directory, name = self._place(event.path)
        if name in directory.now():
            return False
        return self._entries((directory, name, File()))

    def _mkdir(self, event: Event) -> bool:
        directory, name = self._place(event.path)
        return self._entries((directory, name, Directory()))

    def _unlink(self, event: Event) -> bool:
        directory, name = self._place(event.path)
        return self._entries((directory, name, None))

    def _rename(self, event: Event) -> bool:
        old, new = self._place(event.path), self._place(event.other)
        return self._entries((*old, None), (*new, old[0].now()[old[1]]))

    def _file(self, path: str) -> File:
        file = self._find(path)
        assert isinstance(file, File)
        return file

    def _write(self, event: Event) -> bool:
        file = self._file(event.path)
        if not event.data:
            return False
        file.pending.append(Change(file, event.offset, event.data))
        if event.sync:
            for change in [change for change in file.pending if not change.attribute]:
                if change in file.pending:  # else a truncation took all of it
                    self._sync_range(file, change, event.offset, len(event.data))
        return True

    def _truncate(self, event: Event) -> bool:
        file = self._file(event.path)
        file.pending.append(Change(file, size=event.size))
        return True

    def _extend(self, event: Event) -> bool:
        file = self._file(event.path)
        file.pending.append(Change(file, size=event.size, only_grow=True))
        return True

    def _attribute(self, event: Event) -> bool:
        file = self._file(event.path)
        file.pending.append(Change(file, data=event.data, attribute=event.other))
        return True

    def _sync(self, event: Event) -> bool:
        try:
            nodes = list(self._nodes()) if event.other == "all" else [self._find(event.path)]
        except KeyError:
            nodes = []  # unlinked meanwhile
        part = (event.offset, event.size) if event.other == "range" else None
        only_data = event.other in ("data", "range")
        self._begun[event.thread] = [
            (node, [c for c in node.pending if not (only_data and c.attribute)], part)
            for node in nodes
        ]
        return False

    def _synced(self, event: Event) -> bool:
        changed = False
        for node, changes, part in self._begun.pop(event.thread):
            changed |= bool(changes)
            for change in changes:
                if change not in node.pending:
                    continue  # another sync was faster
                if isinstance(node, Directory):
                    _apply_entries(node, node.durable, change)
                    for other in {id(d): d for d, _, _ in change.entries}.values():
                        if other is not node:  # the halves of a rename go together
                            _apply_entries(other, other.durable, change)
                            other.pending.remove(change)
                    node.pending.remove(change)
                elif part is None:
                    _apply(node.durable, node.attributes, change)
                    node.pending.remove(change)
                else:
                    self._sync_range(node, change, *part)
        return changed

    def _sync_range(self, file: File, change: Change, start: int, size: int) -> None:
        """The part of a write that lies in a flushed range is on the medium, the rest pends.

        Changes of the size are too; what was written before beyond a new end is gone for good.
        """
        if change.size is not None:
            _apply(file.durable, file.attributes, change)
            if not change.only_grow:
                for earlier in file.pending[: file.pending.index(change)]:
                    if earlier.data is not None and not earlier.attribute:
                        earlier.data = earlier.data[: max(0, change.size - earlier.offset)]
                        if not earlier.data:
                            self._reduce(file, earlier)
            self._reduce(file, change)
            return
        assert change.data is not None
        first = max(change.offset, start)
        last = min(change.offset + len(change.data), start + size)
        if first >= last:
            return
        low, high = first - change.offset, last - change.offset
        _apply(file.durable, file.attributes, Change(file, first, change.data[low:high]))
        rest = [
            Change(file, offset, data)
            for offset, data in ((change.offset, change.data[:low]), (last, change.data[high:]))
            if data
        ]
        self._reduce(file, change, *rest)

    def _reduce(self, file: File, change: Change, *rest: Change) -> None:
        """Of *change* only *rest* pends, which every sync under way that covers *change* covers."""
        begun = [part for parts in self._begun.values() for part in parts]
        for changes in (file.pending, *(covered for node, covered, _ in begun if node is file)):
            if change in changes:
                where = changes.index(change)
                changes[where : where + 1] = rest

    # What may be left

    def rebuild(self, place: Path, choice: Choice, rng: random.Random) -> str:
        """Make the state in which *choice* says what of the pending changes is on the medium.

        Returns a digest of it.
        """
        kept = {id(change): choice(change) for change in self.pending()}
        digest = hashlib.sha256()
        self._rebuild(self.top, place, kept, rng, digest.update)
        return digest.hexdigest()

    def _rebuild(
        self, directory: Directory, place: Path, kept: dict[int, float], rng: random.Random,
        told: Callable[[bytes], object],
    ) -> None:  # fmt: skip
        place.mkdir(exist_ok=True)
        entries = dict(directory.durable)
        for change in directory.pending:
            if kept[id(change)] > 0:
                _apply_entries(directory, entries, change)
        for name, node in sorted(entries.items()):
            told(f"{place}/{name}\0".encode())
            if isinstance(node, Directory):
                self._rebuild(node, place / name, kept, rng, told)
            else:
                image, attributes = self._image(node, kept, rng)
                told(hashlib.sha256(image).digest())
                (place / name).write_bytes(image)
                for attribute, value in attributes.items():
                    told(f"{attribute}={value.hex()}".encode())
                    os.setxattr(place / name, attribute, value)

    @staticmethod
    def _image(
        file: File, kept: dict[int, float], rng: random.Random
    ) -> tuple[bytes, dict[str, bytes]]:
        image, attributes = bytearray(file.durable), dict(file.attributes)
        for change in file.pending:
            share = kept[id(change)]
            if share >= 1 or (share > 0 and (change.data is None or change.attribute)):
                _apply(image, attributes, change)
            elif share > 0:
                for piece in _sectors(change):
                    if rng.random() < share:
                        _apply(image, attributes, piece)
        return bytes(image), attributes


def _sectors(change: Change) -> Iterator[Change]:
    assert change.data is not None
    start, end = change.offset, change.offset + len(change.data)
    while start < end:
        stop = min(end, start - start % SECTOR + SECTOR)
        yield Change(None, start, change.data[start - change.offset : stop - change.offset])
        start = stop
