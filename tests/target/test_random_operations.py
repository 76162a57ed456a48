"""Random operations on targets of every format leave what a dictionary of byte arrays would hold.

Beside ``test_model.py``, which goes over the wire: the formats of files, persistent memory, direct
I/O, and targets that are nearly full.  WARABI_SEEDS sets how many targets of each format are used,
WARABI_FIRST_SEED the first of their seeds.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import open_memory
from warabi import errors
from warabi.region import RegionID
from warabi.target import opening
from warabi.target.config import FileConfig, MemoryConfig, PmemConfig
from warabi.target.handlers import CALLS
from warabi.target.target import Target

CAPACITY = 6_000_000
POOL = 64 << 20
STEPS = 120
SEEDS = int(os.environ.get("WARABI_SEEDS", "4"))
FIRST_SEED = int(os.environ.get("WARABI_FIRST_SEED", "0"))
SIZES = (0, 1, 7, 4095, 4096, 4097, 8192, 65_535, 65_536, 65_537, 200_000, 1 << 20)


def _file(**settings: Any) -> Callable[[Path], Target]:
    def open_(path: Path) -> Target:
        config = FileConfig(path=str(path), create_if_missing=True, capacity=CAPACITY, **settings)
        return opening.open_file(config)

    return open_


def _memory(path: Path) -> Target:
    return open_memory(MemoryConfig(capacity=CAPACITY))


def _pmem(path: Path) -> Target:
    return opening.open_pmem(PmemConfig(path=str(path), create_if_missing_with_size=POOL))


FORMATS: dict[str, Callable[[Path], Target]] = {
    "memory": _memory,
    "pmem": _pmem,
    "plain": _file(packed=False),
    "packed": _file(packed=True),
    "checksums": _file(packed=False, checksums=True),
    "packed-checksums": _file(packed=True, checksums=True),
    "directio": _file(directio=True),
}


class Exerciser:
    """A target, what it should hold, and operations on both."""

    def __init__(self, open_: Callable[[], Target], seed: int, *, lasting: bool) -> None:
        self.open = open_
        self.target = open_()
        self.lasting = lasting
        self.chance = random.Random(seed)
        self.content: dict[RegionID, bytearray] = {}
        self.history: list[str] = []
        self.calls: list[Callable[[], object]] = [
            *[self.create] * 2, *[self.write] * 2, self.append, self.resize,
            *[self.allocate] * 2, self.zero, *[self.punch] * 2, *[self.copy] * 2, self.clone,
            self.persist, self.erase, *[self.seek] * 2, self.reopen, self.sync,
        ]  # fmt: skip

    def call(self, name: str, *arguments: Any) -> Any:
        self.history.append(f"{name}{arguments}")
        return CALLS[name](self.target, *arguments)

    def run(self) -> None:
        for step in range(STEPS):
            call = self.chance.choice(self.calls) if self.content else self.create
            try:
                call()
            except errors.StorageFull as error:
                self.history.append(f"full: {error}")
                self.is_full()
            if step % 8 == 0:
                self.compare()
        self.compare()

    def is_full(self) -> None:
        """An operation was refused for lack of space: it has changed nothing.

        None needs three quarters of the capacity, whatever the format adds.
        """
        assert sum(map(len, self.content.values())) > CAPACITY // 4
        self.compare()
        self.erase()

    def compare(self) -> None:
        sizes = self.target.sizes
        assert sizes.capacity is not None
        assert sizes.used <= sizes.capacity + 8192 * len(self.content)  # a block or two of each
        assert set(self.target.list(limit=10_000)) == set(self.content)
        for region, content in self.content.items():
            assert self.target.size(region) == len(content)
            assert self.target.read(region, 0, len(content)) == content

    def region(self) -> RegionID:
        return self.chance.choice(list(self.content))

    def size(self) -> int:
        return self.chance.choice(SIZES)

    def offset(self) -> int:
        return self.size() + self.chance.randrange(3)

    def create(self) -> None:
        data = self.chance.randbytes(self.size())
        if self.chance.random() < 0.5:
            data = bytes(len(data))
            region = self.call("create", len(data))
        else:
            self.history.append(f"create_and_write {len(data)}")
            region = self.target.create_and_write(data)
        self.content[region] = bytearray(data)

    def write(self) -> None:
        region, offset = self.region(), self.offset()
        content = self.content[region]
        data = self.chance.randbytes(min(self.size(), max(0, len(content) - offset)))
        self.history.append(f"write {len(data)} at {offset} of {region}")
        if offset <= len(content):
            self.target.write(region, offset, data)
            content[offset : offset + len(data)] = data

    def append(self) -> None:
        region, data = self.region(), self.chance.randbytes(self.size())
        self.history.append(f"append {len(data)} to {region}")
        self.target.append(region, data)
        self.content[region] += data

    def resize(self) -> None:
        region, size = self.region(), self.size()
        self.call("resize", region, size)
        self.content[region] = self.content[region][:size].ljust(size, b"\0")

    def _grown(self, region: RegionID, offset: int, size: int, *, grows: bool = True) -> None:
        if grows and size:
            content = self.content[region]
            content.extend(bytes(max(0, offset + size - len(content))))

    def _zeroed(self, region: RegionID, offset: int, size: int) -> None:
        content = self.content[region]
        end = min(offset + size, len(content))
        content[offset:end] = bytes(max(0, end - offset))

    def allocate(self) -> None:
        region, offset, size = self.region(), self.offset(), self.size()
        keep = self.chance.random() < 0.5
        try:
            self.call("allocate", region, offset, size, keep)
        except errors.PathError as error:  # a quota counts sizes
            beyond = offset + size > len(self.content[region])
            if not (keep and beyond and error.errno == errno.EOPNOTSUPP):
                raise
            self.history.append(f"refused: {error}")
        self._grown(region, offset, size, grows=not keep)

    def zero(self) -> None:
        region, offset, size = self.region(), self.offset(), self.size()
        keep = self.chance.random() < 0.5
        self.call("zero_range", region, offset, size, keep)
        self._grown(region, offset, size, grows=not keep)
        self._zeroed(region, offset, size)

    def punch(self) -> None:
        region, offset, size = self.region(), self.offset(), self.size()
        self.call("punch_hole", region, offset, size)
        self._zeroed(region, offset, size)

    def copy(self) -> None:
        source, region = self.region(), self.region()
        start, offset, size = self.size(), self.offset(), self.size()
        data = bytes(self.content[source][start : start + size])
        try:
            copied = self.call("copy_range", region, offset, source, start, size)
        except errors.OutOfBounds:
            assert source == region
            assert abs(start - offset) < size
            return
        assert copied == len(data)
        self._grown(region, offset, len(data))
        self.content[region][offset : offset + len(data)] = data

    def clone(self) -> None:
        region = self.region()
        clone = self.call("clone", region, self.chance.random() < 0.5)
        self.content[clone] = self.content[region][:]

    def persist(self) -> None:
        region = self.region()
        self.target.persist(region, 0, len(self.content[region]))

    def erase(self) -> None:
        region = self.region()
        self.call("erase", region)
        del self.content[region]

    def seek(self) -> None:
        region, offset, hole = self.region(), self.offset(), self.chance.random() < 0.5
        content = self.content[region]
        found = self.call("seek", region, offset, hole)
        if offset >= len(content):
            assert found is None
        elif hole:
            assert offset <= found <= len(content)
            assert found == len(content) or not content[found]
        else:
            end = len(content) if found is None else found
            assert end >= offset
            assert not any(content[offset:end]), f"data between {offset} and {end}"

    def sync(self) -> None:
        self.target.sync()
        self.target.commit()

    def reopen(self) -> None:
        if self.lasting and self.chance.random() < 0.3:
            self.history.append("reopen")
            self.target.close()
            self.target = self.open()


@pytest.mark.parametrize("name", FORMATS)
def test_random_operations_leave_what_byte_arrays_would_hold(name: str, tmp_path: Path) -> None:
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        path = tmp_path / f"target{seed}"
        open_ = FORMATS[name]
        exerciser = Exerciser(lambda: open_(path), seed, lasting=name != "memory")  # noqa: B023
        try:
            exerciser.run()
        except BaseException:
            print(f"WARABI_FIRST_SEED={seed}", *exerciser.history[-20:], sep="\n")
            raise
        finally:
            exerciser.target.close()
