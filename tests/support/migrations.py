"""What the tests of migrations share: a target with something of everything, and its contents."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    file_config,
    pattern,
    pmem_config,
    python_process,
)
from warabi._core.attributes import ROOT, Attributes
from warabi.client import Client, TargetHandle
from warabi.engine import Engine
from warabi.errors import PathError
from warabi.region import RegionID
from warabi.server import Provider

BACKENDS = ("memory", "file", "pmem")
SIZES = (0, 1, 63, 64, 65, 4096, 4099, 65535, 65536, 300_000)


def config(kind: str, path: Path) -> dict[str, Any]:
    """A provider's configuration for a target of backend *kind*."""
    return {"memory": MEMORY, "file": file_config(path), "pmem": pmem_config(path)}[kind]


def merge(kind: str) -> dict[str, Any]:
    """What makes a target one of backend *kind*."""
    return {"target": {"type": kind}}


def fill(target: TargetHandle) -> list[RegionID]:
    """Regions of many sizes and everything that a tree of names can have."""
    call = target._link.call
    regions = [target.create_and_write(pattern(size, i)) for i, size in enumerate(SIZES)]
    holes = target.create(1_500_000)
    target.write(holes, 700_000, b"an island")
    erased = target.create_and_write(b"not there any more")
    target.erase(erased)
    directory = call("mkdir", ROOT, b"directory", 0o3750, 12, 34, 0).ino
    below = call("mkdir", directory, b"below \xff\n", 0o755, 0, 0, 0).ino
    target.link_name(regions[-1], "/directory/first")
    target.link_name(regions[-1], "/second")
    target.link_name(holes, "/directory/holes")
    call("setattr", regions[-1].slot, 0o4711, 1000, 2000, 123_456_789, -987_654_321)
    call("symlink", directory, b"symbolic", b"../nowhere/\xfe", 5, 6)
    call("mknod", below, b"fifo", stat.S_IFIFO | 0o600, 7, 8, 0, False, 0)
    call("mknod", below, b"device", stat.S_IFCHR | 0o640, 0, 5, os.makedev(4, 64), False, 0)
    call("mknod", below, b"file", stat.S_IFREG | 0o444, 9, 10, 0, False, 0)
    call("setxattr", directory, b"user.of-a-directory", b"", True)
    call("setxattr", regions[-1].slot, b"user.large", pattern(30_000), True)
    call("setxattr", regions[2].slot, b"user.of-a-nameless-region", b"\0\xff", True)
    return regions


def _xattrs(target: TargetHandle, ino: int) -> dict[bytes, bytes]:
    call = target._link.call
    return {name: call("getxattr", ino, name) for name in call("listxattr", ino)}


def _tree(target: TargetHandle, ino: int, path: bytes) -> Iterator[tuple[bytes, Any]]:
    call = target._link.call
    last = b""
    while page := call("readdir", ino, last, 5):
        for name, found in page:
            content = None
            if stat.S_ISLNK(found.mode):
                content = call("readlink", found.ino)
            yield path + name, (_portable(found), content, _xattrs(target, found.ino))
            if stat.S_ISDIR(found.mode):
                yield from _tree(target, found.ino, path + name + b"/")
        last = page[-1][0]


def _portable(found: Attributes) -> Attributes:
    """Without the bytes of storage that are used, which depend on the backend."""
    return found._replace(space=-1)


def contents(target: TargetHandle) -> dict[Any, Any]:
    """All that a client can see of a target."""
    found: dict[Any, Any] = {
        region: (target.read(region, 0, target.size(region)), target.stat(region))
        for region in target.list(page_size=7)
    }
    found |= _tree(target, ROOT, b"/")
    root: Attributes = target._link.call("getattr", ROOT)
    found |= {"root": (_portable(root), _xattrs(target, ROOT)), "uuid": target._link.call("uuid")}
    return found


def exists(target: TargetHandle, name: str) -> bool:
    with contextlib.suppress(PathError):
        return bool(target.open_name(name))
    return False


def leftovers(directory: Path) -> list[str]:
    """What is in a directory, if there is one."""
    return sorted(os.listdir(directory)) if directory.exists() else []


def handle(engine: Engine, address: str, provider_id: int) -> TargetHandle:
    return Client(engine).make_target_handle(address, provider_id)


def contents_at(kind: str, path: Path) -> dict[Any, Any]:
    """What a target on disk holds, when this process opens it."""
    settings = {"type": kind, "config": {"path": str(path)}}
    with Engine("na+sm") as engine, Provider(engine, 0, {"target": settings}):
        return contents(handle(engine, str(engine.addr()), 0))


SOURCE = """
import json, sys
from warabi.engine import Engine
from warabi.errors import Exception
from warabi.server import Provider

config, address, options, paused = map(json.loads, sys.argv[1:])
with Engine("na+sm") as engine:
    provider = Provider(engine, 1, config)
    print(engine.addr(), flush=True)

    def progress(done, total):
        if paused:
            print(done, total, flush=True)
            sys.stdin.readline()

    sys.stdin.readline()
    try:
        provider.migrate_target(address, 1, options, progress=progress)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    else:
        print("migrated", flush=True)
    sys.stdin.readline()
"""


class Source:
    """A process that migrates its target step by step, as it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.address = self.line()

    def line(self) -> str:
        """What it says next."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def proceed(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def step(self) -> str:
        """Let it go on, and hear what it says then."""
        self.proceed()
        return self.line()

    def outcome(self) -> str:
        """Let it go on to its end: ``migrated``, or an error."""
        while (said := self.step())[:1].isdigit():
            pass
        return said

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)


@contextmanager
def source_process(
    source: dict[str, Any], address: str, options: dict[str, Any], *, paused: bool = True
) -> Iterator[Source]:
    """A :class:`Source` with a target of its own, to be migrated to provider 1 at *address*."""
    arguments = map(json.dumps, (source, address, options, paused))
    with python_process("-c", SOURCE, *arguments) as process:
        yield Source(process)
