"""A guest that breaks every rule: ``hostile.py ADDRESS READ-ONLY SEED SECONDS REGION,...``.

It is granted the regions by the library, keeps a copy of every descriptor that comes, and then does
at random whatever system calls and stores can do to shared memory and files.  It prints "ready"
before that.  It may well kill itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import random
import resource
import struct
import sys
import time
from typing import Any

import warabi.shm.client
from warabi import errors
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.region import RegionID

_PAGE = mmap.PAGESIZE
_SPECIAL = (0, 1, 2, 3, 77, 1 << 19, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Hostile:
    """What it has, and what it does with it.

    Args:
        reopens: whether it also opens regions again that it was granted for reading, which the
            kernel allows every process of the same user.
    """

    def __init__(self, chance: random.Random, reopens: bool) -> None:
        self.chance = chance
        self.reopens = reopens
        self.joined: list[int] = []
        self.granted: list[int] = []
        self.maps: list[mmap.mmap] = []
        # Some of all that can be done: what one does hides what another one would have shown.
        actions = (
            self.write, self.map, self.cut, self.punch, self.seal, self.flag, self.protect,
            self.unmap, self.reopen,
        )  # fmt: skip
        self.actions = chance.sample(actions, 3)
        self.at_joined = chance.random() < 0.6
        self.at_granted = chance.random() < 0.6 or not self.at_joined

    def keep(self, found: list[int], descriptors: Any) -> None:
        found += [os.dup(fd) for fd in descriptors]

    def rubbish(self, size: int) -> bytes:
        kind = self.chance.randrange(3)
        if kind == 0:
            return self.chance.randbytes(size)
        words = [
            self.chance.choice(_SPECIAL) if kind == 1 else self.chance.randrange(600)
            for _ in range(-(-size // 8))
        ]
        return struct.pack(f"<{len(words)}Q", *words)[:size]

    def place(self, fd: int) -> tuple[int, int]:
        """Offset and size of some bytes, mostly within the file."""
        size = os.fstat(fd).st_size
        most = self.chance.choice((8, 64, _PAGE, 1 << 20))
        start = self.chance.randrange(self.chance.choice((1, 64, _PAGE, size + _PAGE)))
        return start - start % 8, most

    def act(self) -> None:
        fds = self.joined * self.at_joined + self.granted * self.at_granted
        fd = self.chance.choice(fds)
        with contextlib.suppress(OSError, ValueError, BufferError):
            self.chance.choice(self.actions)(fd)

    def write(self, fd: int) -> None:
        start, size = self.place(fd)
        os.pwrite(fd, self.rubbish(size), start)

    def map(self, fd: int) -> None:
        if len(self.maps) < 8 or self.chance.randrange(20) == 0:
            self.maps.append(mmap.mmap(fd, os.fstat(fd).st_size))
            del self.maps[:-8]
        memory = self.chance.choice(self.maps)
        start = self.chance.randrange(self.chance.choice((1, 64, _PAGE, len(memory))))
        start -= start % 8
        data = self.rubbish(min(self.chance.choice((8, 512, _PAGE)), len(memory) - start))
        memory[start : start + len(data)] = data

    def cut(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        os.ftruncate(fd, self.chance.choice((0, 1, _PAGE, size // 2, size + 1, size + (1 << 20))))

    def punch(self, fd: int) -> None:
        mode = self.chance.choice((0, 1, 3, 0x10, 0x11, 0x8, 0x20))
        start, size = self.place(fd)
        _libc.fallocate(fd, mode, start, size)

    def seal(self, fd: int) -> None:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, self.chance.randrange(64))

    def flag(self, fd: int) -> None:
        flags = (os.O_APPEND, os.O_NONBLOCK, os.O_DIRECT, os.O_NOATIME, 0)
        fcntl.fcntl(fd, fcntl.F_SETFL, self.chance.choice(flags))
        os.lseek(fd, self.chance.randrange(1 << 20), os.SEEK_SET)
        os.fchmod(fd, self.chance.choice((0, 0o400, 0o777)))

    def protect(self, fd: int) -> None:
        """Make some mapping of this process writable, and write there."""
        start, end = self.chance.choice(_mappings())
        if _libc.mprotect(start, end - start, mmap.PROT_READ | mmap.PROT_WRITE) == 0:
            data = self.rubbish(min(64, end - start))
            ctypes.memmove(start, data, len(data))

    def unmap(self, fd: int) -> None:
        if self.chance.randrange(50) == 0:
            start, end = self.chance.choice(_mappings())
            _libc.munmap(start, end - start)

    def reopen(self, fd: int) -> None:
        if fd in self.granted and not self.reopens:
            return
        found = self.joined if fd in self.joined else self.granted
        found.append(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
        if len(found) > 60:
            os.close(found.pop(self.chance.randrange(60)))


def _mappings() -> list[tuple[int, int]]:
    with open("/proc/self/maps") as maps:
        places = [line.split()[0].split("-") for line in maps if "memfd:warabi" in line]
    return [(int(start, 16), int(end, 16)) for start, end in places]


def main() -> None:
    address, reading, seed, seconds, words = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hostile = Hostile(random.Random(int(seed)), reopens=reading == "0")
    init, add = warabi.shm.client.Guest.__init__, warabi.shm.client.Guest.add

    def joining(guest: Any, joined: Any, descriptors: Any) -> None:
        hostile.keep(hostile.joined, descriptors)
        init(guest, joined, descriptors)

    def adding(guest: Any, region: Any, granted: Any, descriptors: Any) -> None:
        hostile.keep(hostile.granted, descriptors)
        add(guest, region, granted, descriptors)

    patched: Any = warabi.shm.client.Guest
    patched.__init__, patched.add = joining, adding
    engine = Engine("na+sm", client, config={"timeout": 10.0})
    handle = Client(engine).make_target_handle(address, 1, read_only=reading == "1")
    regions = [RegionID(bytes.fromhex(word)) for word in words.split(",")]
    for region in regions * 3:
        with contextlib.suppress(errors.Exception):
            handle.read(region, 0, 1)
    assert len(hostile.joined) == 4
    assert hostile.granted
    print("ready", flush=True)
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        for _ in range(50):
            hostile.act()
        with contextlib.suppress(errors.Exception):
            region = hostile.chance.choice(regions)
            handle.read(region, 0, 8)
            if reading == "0":
                handle.write(region, 0, hostile.rubbish(64))
    os._exit(0)


if __name__ == "__main__":
    main()
