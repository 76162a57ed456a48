"""Cost of operations by number of existing objects: ``python -m benchmarks.many KIND COUNT...``.

Runs as a separate process.  Prints JSON: a list of ``[operation, count, microseconds]``.  The time
is the median, but that of listings is the whole divided by the entries.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import places
from benchmarks.processes import provider
from benchmarks.stats import Work, measure
from benchmarks.subjects import MEMORY
from warabi._core.attributes import ROOT
from warabi.backends import memory
from warabi.backends.memory import MemoryConfig
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.target import opening

Costs = dict[str, float]
"""Microseconds by operation."""
Grow = Callable[[range], Costs]
"""Makes objects with these numbers, in addition to the existing ones, and measures."""
_BUDGET = 0.2  # seconds for each operation
_FILE = stat.S_IFREG | 0o644
_KEPT = 1000  # descriptors that are needed for other things


def _cost(call: Callable[[], object]) -> float:
    return measure(Work(call), _BUDGET).value


@contextlib.contextmanager
def names() -> Iterator[Grow]:
    """Names in one directory of a target in this process."""
    with opening.open_backend(memory.BACKEND, MemoryConfig()) as target:
        space = target.namespace

        def replace() -> None:
            space.mknod(ROOT, b"extra", _FILE, 0, 0)
            space.unlink(ROOT, b"extra")

        def grow(numbers: range) -> Costs:
            for number in numbers:
                space.mknod(ROOT, b"%08d" % number, _FILE, 0, 0)
            middle = b"%08d" % (numbers.stop // 2)
            return {
                "look up a name": _cost(lambda: space.lookup(ROOT, middle)),
                "make and remove a name": _cost(replace),
                "list 100 names": _cost(lambda: space.readdir(ROOT, middle, 100)),
            }

        yield grow


@contextlib.contextmanager
def links() -> Iterator[Grow]:
    """Names of one inode."""
    with opening.open_backend(memory.BACKEND, MemoryConfig()) as target:
        space = target.namespace
        ino = space.mknod(ROOT, b"file", _FILE, 0, 0).ino

        def replace() -> None:
            space.link(ino, ROOT, b"extra")
            space.unlink(ROOT, b"extra")

        def grow(numbers: range) -> Costs:
            for number in numbers:
                space.link(ino, ROOT, b"%08d" % number)
            return {"make and remove a link": _cost(replace)}

        yield grow


@contextlib.contextmanager
def attributes() -> Iterator[Grow]:
    """Extended attributes of one inode, whose names may have 64 KiB."""
    with opening.open_backend(memory.BACKEND, MemoryConfig()) as target:
        space = target.namespace
        ino = space.mknod(ROOT, b"file", _FILE, 0, 0).ino

        def grow(numbers: range) -> Costs:
            for number in numbers:
                space.setxattr(ino, b"user.%08d" % number, b"value")
            middle = b"user.%08d" % (numbers.stop // 2)
            return {
                "get an attribute": _cost(lambda: space.getxattr(ino, middle)),
                "set an attribute": _cost(lambda: space.setxattr(ino, middle, b"value")),
            }

        yield grow


@contextlib.contextmanager
def regions() -> Iterator[Grow]:
    """Regions of a provider in another process that this one has read, and so has grants of."""
    with provider("na+sm", [MEMORY]) as (address, _), Engine("na+sm", client) as engine:
        target = Client(engine).make_target_handle(address, 1)
        place = bytearray(64)

        def replace() -> None:
            target.erase(target.create_and_write(place))

        def grow(numbers: range) -> Costs:
            for _ in numbers:
                region = target.create_and_write(place)
                target.read_into(region, 0, place)
            return {
                "read a region": _cost(lambda: target.read_into(region, 0, place)),
                "write a region": _cost(lambda: target.write(region, 0, place)),
                "create and erase a region": _cost(replace),
            }

        yield grow


@contextlib.contextmanager
def clients() -> Iterator[Grow]:
    """Connections to a provider, idle but for one."""
    with provider("tcp", [MEMORY]) as (address, _), contextlib.ExitStack() as stack:

        def connected() -> Callable[[], object]:
            engine = stack.enter_context(Engine("tcp", client))
            target = Client(engine).make_target_handle(address, 1)
            region = target.create_and_write(bytes(64))
            return lambda: target.read(region, 0, 64)

        read = connected()

        def grow(numbers: range) -> Costs:
            for _ in numbers:
                connected()
            return {"read by one of the clients": _cost(read)}

        yield grow


@contextlib.contextmanager
def mounted() -> Iterator[Path]:
    with (
        tempfile.TemporaryDirectory() as name,
        places.place(places.OURS, Path(name), Path(name)) as place,
    ):
        yield place.path


@contextlib.contextmanager
def entries() -> Iterator[Grow]:
    """Entries of a directory of a mount."""
    with mounted() as path:

        def grow(numbers: range) -> Costs:
            for number in numbers:
                (path / f"{number:08}").touch()
            start = time.perf_counter()
            count = len(os.listdir(path))
            return {"list a directory, for each entry": (time.perf_counter() - start) / count * 1e6}

        yield grow


@contextlib.contextmanager
def files() -> Iterator[Grow]:
    """Open files of a mount of memory."""
    with mounted() as path, contextlib.ExitStack() as stack:

        def grow(numbers: range) -> Costs:
            for number in numbers:
                fd = os.open(path / f"{number:08}", os.O_CREAT | os.O_RDWR)
                stack.callback(os.close, fd)

            def reopen() -> None:
                os.close(os.open(path / "00000000", os.O_RDONLY))

            return {
                "write to an open file": _cost(lambda: os.pwrite(fd, b"data", 0)),
                "open and close a file": _cost(reopen),
            }

        yield grow


KINDS = {
    "names": names, "links": links, "attributes": attributes, "regions": regions,
    "clients": clients, "entries": entries, "files": files,
}  # fmt: skip


def most(kind: str, count: int) -> int:
    """How many there can be, of *count*: descriptors, threads and attributes have limits."""
    if kind == "clients":
        return min(count, 1000)
    if kind == "attributes":
        return min(count, 4000)
    if kind == "files":
        return min(count, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - _KEPT)
    return count


def main() -> None:
    kind, counts = sys.argv[1], sorted({most(sys.argv[1], int(word)) for word in sys.argv[2:]})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found, there = [], 0
    with KINDS[kind]() as grow:
        for count in counts:
            for operation, cost in grow(range(there, count)).items():
                found.append([operation, count, cost])
            there = count
    print(json.dumps(found))


if __name__ == "__main__":
    main()
