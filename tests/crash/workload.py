"""Random operations on a target, and the ways to carry them out and to look at the result."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import trio

from tests.crash.oracle import Found, Op, Oracle
from warabi import aio
from warabi._core.attributes import ROOT
from warabi._core.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
)
from warabi.backends.xattr_times import Times
from warabi.client import TargetHandle
from warabi.region import RegionID
from warabi.target.handlers import CALLS
from warabi.target.target import Target

MOST_REGIONS = 24
"""Of one oracle; more are erased rather than made."""
_SIZES = (0, 1, 511, 512, 513, 4095, 4096, 4097, 9000, 20_000)

REGION_KINDS = {
    "create": 4, "create_and_write": 5, "create_and_persist": 4, "write": 10, "write_persist": 5,
    "write_vector": 4, "write_vector_persist": 2, "persist": 6, "fsync": 3, "resize": 6,
    "punch": 3, "zero": 2, "allocate": 2, "erase": 4, "link": 5, "unlink": 3, "rename": 4,
    "commit": 2, "sync": 1, "utime": 2,
}  # fmt: skip
"""Operations of a target and how often they come, beside each other."""
FILE_KINDS = {
    "create": 6, "write": 14, "fsync": 5, "fdatasync": 4, "resize": 5, "punch": 3, "zero": 2,
    "link": 4, "unlink": 4, "rename": 6, "commit": 3, "utime": 3,
}  # fmt: skip
"""Those of a mount, where every region has a name and a write may make it grow."""


def next_op(rng: random.Random, oracle: Oracle, kinds: dict[str, int], prefix: str = "") -> Op:
    """An operation that can be carried out now.  New names begin with *prefix*."""
    files = kinds is FILE_KINDS
    while True:
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        op = _fill(kind, rng, oracle, files, prefix)
        if op is not None:
            return op


def _fill(kind: str, rng: random.Random, oracle: Oracle, files: bool, prefix: str) -> Op | None:
    alive = sorted(oracle.now.alive)
    seed = rng.getrandbits(32)
    fresh = f"{prefix}n{rng.randrange(40)}"
    size = rng.choice(_SIZES)
    if kind in ("commit", "sync"):
        return Op(kind)
    if kind.startswith("create"):
        if len(alive) >= MOST_REGIONS or (files and fresh in oracle.now.names):
            return None
        if files:
            return Op(kind, oracle.next_key, name=fresh)
        return Op(kind, oracle.next_key, 0, size, seed)
    if kind in ("unlink", "rename"):
        if not oracle.now.names:
            return None
        name = rng.choice(sorted(oracle.now.names))
        if kind == "unlink":
            return Op(kind, oracle.now.names[name], name=name)
        return Op(kind, oracle.now.names[name], name=name, new_name=fresh)
    if not alive:
        return None
    key = rng.choice(alive)
    if kind in ("erase", "fsync", "fdatasync"):
        return Op(kind, key)
    if kind == "utime":
        return Op(kind, key, seed=rng.choice((1, seed)))
    if kind == "link":
        return None if fresh in oracle.now.names else Op(kind, key, name=fresh)
    if kind == "resize":
        return Op(kind, key, 0, rng.choice((size, rng.randrange(30_000))))
    return _extent(kind, key, rng, len(oracle.content(key)), seed, files)


def _extent(
    kind: str, key: int, rng: random.Random, length: int, seed: int, files: bool
) -> Op | None:
    if files:
        offset = rng.choice((0, length, rng.randrange(length + 5000)))
        return Op(kind, key, offset, rng.choice((1, 100, 4096, 10_000)), seed)
    least = 3 if "vector" in kind else kind in ("punch", "zero", "allocate")
    if length <= least:
        return None
    offset = rng.choice((0, rng.randrange(length - least)))
    size = rng.randrange(least, length - offset + 1)
    if "vector" in kind:
        size -= 1  # for the gap
    return Op(kind, key, offset, size, seed)


class Surface(Protocol):
    """A way to reach a target."""

    def run(self, op: Op, rid: bytes | None) -> bytes | None:
        """Carry out *op* on the region *rid*; the ID of the region that it made."""

    def times(self, rid: bytes) -> Times:
        """A region's times."""

    def look(self) -> Found:
        """Everything that is there."""


Call = Callable[..., Any]


class RegionSurface:
    """A target, or a handle of one: what both offer is the same.

    Args:
        target: either.
        call: carries out an operation of the table on it.
    """

    def __init__(self, target: Target | TargetHandle, call: Call) -> None:
        self._target = target
        self._call = call

    def run(self, op: Op, rid: bytes | None) -> bytes | None:
        target = self._target
        region = RegionID(rid or bytes(16))
        match op.kind:
            case "create":
                return target.create(op.size)
            case "create_and_write" | "create_and_persist":
                return target.create_and_write(op.data, persist=op.kind == "create_and_persist")
            case "write" | "write_persist":
                target.write(region, op.offset, op.data, persist=op.kind == "write_persist")
            case "write_vector" | "write_vector_persist":
                target.write_vector(region, op.extents, op.data, op.kind == "write_vector_persist")
            case "persist":
                target.persist(region, op.offset, op.size)
            case "fsync":
                self._call("fsync", region, True)
            case "resize":
                target.resize(region, op.size)
            case "punch":
                self._call("punch_hole", region, op.offset, op.size)
            case "zero":
                self._call("zero_range", region, op.offset, op.size, True)
            case "allocate":
                self._call("allocate", region, op.offset, op.size, False)
            case "erase":
                target.erase(region)
            case "utime":
                self._call("setattr", region.slot, None, None, None, None, op.mtime_ns)
            case "link":
                self._call("link_name", region, f"/{op.name}")
            case "unlink":
                self._call("unlink_name", f"/{op.name}")
            case "rename":
                names = (ROOT, op.name.encode(), ROOT, op.new_name.encode())
                self._call("rename", *names, 0, False)
            case "commit" | "sync":
                self._call(op.kind)
            case _:
                raise AssertionError(op)
        return None

    def times(self, rid: bytes) -> Times:
        found = self._target.stat(RegionID(rid))
        return Times(found.mtime_ns, found.ctime_ns)

    def look(self) -> Found:
        target = self._target
        if isinstance(target, Target):
            listed = target.list(limit=10_000)
        else:
            listed = list(target.list())
        hexes = {rid.hex() for rid in listed}
        regions = {bytes(rid): target.read(rid, 0, target.size(rid)) for rid in listed}
        entries = [name.decode() for name, _ in self._call("readdir", ROOT, b"", 1000)]
        names = {
            name: bytes(self._call("open_name", f"/{name}")) for name in entries
            if name not in hexes
        }  # fmt: skip
        return Found(regions, names, {rid: self.times(rid) for rid in regions})


def on_target(target: Target) -> RegionSurface:
    """A target of this process."""
    return RegionSurface(target, lambda name, *args: CALLS[name](target, *args))


class TrioSurface(RegionSurface):
    """A target of this process, reached from a Trio program where that waits for the medium."""

    def __init__(self, target: Target) -> None:
        super().__init__(target, lambda name, *args: CALLS[name](target, *args))
        self._trio = aio.attach(target)

    def run(self, op: Op, rid: bytes | None) -> bytes | None:
        region = RegionID(rid or bytes(16))
        match op.kind:
            case "persist":
                trio.run(self._trio.persist, region, op.offset, op.size)
            case "write_persist":
                trio.run(self._trio.write, region, op.offset, op.data, True)
            case "fsync":
                trio.run(self._trio.fsync, region)
            case _:
                return super().run(op, rid)
        return None


def on_handle(handle: TargetHandle) -> RegionSurface:
    """A target that another process serves."""
    return RegionSurface(handle, handle._link.call)


class FileSurface:
    """A mount.  Descriptors are closed at once, but for every other file that is written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _name_of(self, rid: bytes) -> Path:
        return self._path / rid.hex()  # such a name means the region in any case

    def run(self, op: Op, rid: bytes | None) -> bytes | None:
        match op.kind:
            case "create":
                fd = os.open(self._path / op.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                try:
                    return bytes.fromhex(os.getxattr(fd, b"user.warabi.region").decode())
                finally:
                    os.close(fd)
            case "utime":
                assert rid is not None
                os.utime(self._name_of(rid), ns=(0, op.mtime_ns))
            case "write" | "fsync" | "fdatasync" | "resize" | "punch" | "zero":
                assert rid is not None
                fd = os.open(self._name_of(rid), os.O_RDWR)
                try:
                    if op.kind == "write":
                        if os.pwrite(fd, op.data, op.offset) < op.size:
                            raise OSError(errno.EIO, "a write was cut short")
                    elif op.kind == "fsync":
                        os.fsync(fd)
                    elif op.kind == "fdatasync":
                        os.fdatasync(fd)
                    elif op.kind in ("punch", "zero"):
                        mode = FALLOC_FL_PUNCH_HOLE if op.kind == "punch" else FALLOC_FL_ZERO_RANGE
                        fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, op.offset, op.size)
                    else:
                        os.ftruncate(fd, op.size)
                finally:
                    os.close(fd)
            case "link":
                assert rid is not None
                os.link(self._name_of(rid), self._path / op.name)
            case "unlink":
                os.unlink(self._path / op.name)
            case "rename":
                os.rename(self._path / op.name, self._path / op.new_name)
            case "commit":
                fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            case _:
                raise AssertionError(op)
        return None

    def times(self, rid: bytes) -> Times:
        info = self._name_of(rid).stat()
        return Times(info.st_mtime_ns, info.st_ctime_ns)

    def look(self) -> Found:
        regions, names, times = {}, {}, {}
        for entry in os.scandir(self._path):
            rid = bytes.fromhex(os.getxattr(entry.path, b"user.warabi.region").decode())
            regions[rid] = Path(entry.path).read_bytes()
            times[rid] = self.times(rid)
            if entry.name != rid.hex():
                names[entry.name] = rid
        return Found(regions, names, times)


def step(rng: random.Random, oracle: Oracle, kinds: dict[str, int], surface: Surface,
         prefix: str = "") -> Op:  # fmt: skip
    """Carry out one random operation, and tell the oracle."""
    op = next_op(rng, oracle, kinds, prefix)
    region = oracle.regions.get(op.key)
    rid = region.rid if region else None
    oracle.begin(op)
    made = surface.run(op, rid)
    oracle.end(op, made, promised_times(op, surface, rid))
    return op


def promised_times(op: Op, surface: Surface, rid: bytes | None) -> Times | None:
    """The times that *op*, which has returned, promised to keep."""
    return surface.times(rid) if op.kind == "fsync" and rid is not None else None
