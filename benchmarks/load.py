"""Runs a workload on files: ``python -m benchmarks.load WORKLOAD DIRECTORY NUMBER [PID...]``.

Runs as a separate process, the same for every file system.  Prints JSON: workload to ``[rate or
microseconds, p99 in microseconds, processor seconds for a GiB]``.  The processor time is this
process's, in the kernel too, and that of the processes PID, which serve the directory.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.stats import percentile
from benchmarks.usage import cpu_seconds

BLOCK = 1 << 20
PAGE = 4096
RELISTED = 5
"""How many times :func:`relisted` lists."""
Figures = dict[str, list[float]]
_pids: list[int] = []


class _Phase:
    """One timed stretch: its seconds and processor seconds, once it is over."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0

    def rate(self, count: float) -> list[float]:
        return [count / self.seconds, 0.0, 0.0]

    def stream(self, size: int) -> list[float]:
        """MB/s, and what a GiB cost."""
        return [size / self.seconds / 1e6, 0.0, self.cpu / size * (1 << 30)]


@contextmanager
def _phase() -> Iterator[_Phase]:
    phase = _Phase()
    cpu, start = time.process_time() + cpu_seconds(_pids), time.perf_counter()
    yield phase
    phase.seconds = time.perf_counter() - start
    phase.cpu = time.process_time() + cpu_seconds(_pids) - cpu


def _write_all(path: Path, size: int, flags: int) -> None:
    block = b"\x5a" * BLOCK
    fd = os.open(path, os.O_WRONLY | flags, 0o644)
    try:
        for offset in range(0, size, BLOCK):
            os.pwrite(fd, block, offset)
    finally:
        os.close(fd)  # part of it: what a file system puts off is done here


def _read_all(fd: int, size: int) -> None:
    place = [bytearray(b"r" * BLOCK)]
    for offset in range(0, size, BLOCK):
        if os.preadv(fd, place, offset) != BLOCK:
            raise OSError(f"short read at {offset}")


def streams(directory: Path, size: int) -> Figures:
    """A file of *size* bytes, in blocks of 1 MiB: first write, rewrite, cold and warm read."""
    path, found = directory / "stream", {}
    with _phase() as phase:
        _write_all(path, size, os.O_CREAT | os.O_EXCL)
    found["first write"] = phase.stream(size)
    with _phase() as phase:
        _write_all(path, size, 0)
    found["rewrite"] = phase.stream(size)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        # Of a mount, this forgets the kernel's pages of its files, not those of what serves it.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with _phase() as phase:
            _read_all(fd, size)
        found["cold read"] = phase.stream(size)
        _read_all(fd, size)
        with _phase() as phase:
            _read_all(fd, size)
        found["warm read"] = phase.stream(size)
    finally:
        os.close(fd)
        path.unlink()
    return found


def buffered(directory: Path, count: int) -> Figures:
    """*count* writes of 4 KiB at random places of a file of 64 MiB, through the page cache."""
    path, size = directory / "buffered", 64 * BLOCK
    _write_all(path, size, os.O_CREAT)
    chosen = random.Random(7)
    places = [chosen.randrange(size // PAGE) * PAGE for _ in range(count)]
    data = b"b" * PAGE
    with _phase() as phase:
        fd = os.open(path, os.O_WRONLY)
        for place in places:
            os.pwrite(fd, data, place)
        os.close(fd)
    path.unlink()
    return {"4 KiB random write, buffered": phase.rate(count)}


def small(directory: Path, count: int) -> Figures:
    """*count* files of 100 bytes made, looked at, and removed."""
    place = directory / "small"
    place.mkdir()
    names = [str(place / f"file{i:06}") for i in range(count)]
    data, found = b"s" * 100, {}
    with _phase() as phase:
        for name in names:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(fd, data)
            os.close(fd)
    found["create + write 100 B + close"] = phase.rate(count)
    chosen = random.Random(7).sample(names, len(names))
    with _phase() as phase:
        for name in chosen:
            os.stat(name)
    found["stat"] = phase.rate(count)
    with _phase() as phase:
        for name in names:
            os.unlink(name)
    found["unlink"] = phase.rate(count)
    place.rmdir()
    return found


def listing(directory: Path, count: int) -> Figures:
    """``readdir`` with attributes; makes what is missing of *count* files, which stay."""
    place = directory / "many"
    place.mkdir(exist_ok=True)
    for number in range(len(os.listdir(place)), count):
        os.close(os.open(place / f"entry{number:06}", os.O_WRONLY | os.O_CREAT, 0o644))
    with _phase() as phase, os.scandir(place) as entries:
        seen = sum(entry.stat(follow_symlinks=False).st_nlink for entry in entries)
    if seen != count:
        raise OSError(f"listed {seen} of {count} entries")
    return {"readdir with attributes": phase.rate(count)}


def synced(directory: Path, count: int) -> Figures:
    """*count* times: 4 KiB written into a file, and ``fsync``; microseconds of both."""
    path, data = directory / "synced", b"y" * PAGE
    _write_all(path, 4 * BLOCK, os.O_CREAT)
    fd = os.open(path, os.O_WRONLY)
    os.fsync(fd)
    samples = []
    for number in range(count):
        start = time.perf_counter()
        os.pwrite(fd, data, number % 1024 * PAGE)
        os.fsync(fd)
        samples.append((time.perf_counter() - start) * 1e6)
    os.close(fd)
    path.unlink()
    samples.sort()
    return {"fsync of 4 KiB": [percentile(samples, 0.5), percentile(samples, 0.99), 0.0]}


def direct(directory: Path, count: int) -> Figures:
    """*count* reads and writes of 4 KiB with ``O_DIRECT``, for counting what they cause."""
    path, size = directory / "direct", 16 * BLOCK
    _write_all(path, size, os.O_CREAT)
    place = mmap.mmap(-1, PAGE)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    with _phase() as phase:
        for number in range(count):
            os.preadv(fd, [place], number * 7 % (size // PAGE) * PAGE)
            os.pwritev(fd, [place], number * 5 % (size // PAGE) * PAGE)
    os.close(fd)
    path.unlink()
    return {"4 KiB read and write, O_DIRECT": phase.rate(2 * count)}


def _timed(call: Callable[[], object], count: int) -> list[float]:
    """The median and the 99th percentile of *count* calls, microseconds."""
    samples = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    samples.sort()
    return [percentile(samples, 0.5), percentile(samples, 0.99), 0.0]


def _program(*words: str | Path) -> None:
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def sparse(directory: Path, size: int) -> Figures:
    """``cp --sparse=auto`` of a file of *size* bytes, 1 MiB of which are data; microseconds."""
    path, copy = directory / "sparse", directory / "copy"
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size // 2)
        file.write(os.urandom(BLOCK))
        file.flush()
        os.fsync(file.fileno())
    found = _timed(lambda: _program("cp", "--sparse=auto", path, copy), 3)
    if copy.stat().st_size != size:
        raise OSError(f"cp copied {copy.stat().st_size} of {size} bytes")
    path.unlink()
    copy.unlink()
    return {"cp of a sparse file": found}


def copied(directory: Path, size: int) -> Figures:
    """``cp`` of a file of *size* bytes without holes; microseconds."""
    path, copy = directory / "original", directory / "copy"
    _write_all(path, size, os.O_CREAT)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    found = _timed(lambda: _program("cp", path, copy), 1)
    path.unlink()
    copy.unlink()
    return {"cp of a file": found}


def relisted(directory: Path, count: int) -> Figures:
    """``ls -l`` of a directory of *count* files, after it was listed once; microseconds."""
    place = directory / "relisted"
    if not place.exists():
        place.mkdir()
        for number in range(count):
            (place / f"entry{number:06}").touch()
        _program("ls", "-l", place)
    return {"ls -l, again": _timed(lambda: _program("ls", "-l", place), RELISTED)}


def links(directory: Path, count: int) -> Figures:
    """*count* times ``readlink`` of one symbolic link; microseconds."""
    path = directory / "link"
    path.unlink(missing_ok=True)
    path.symlink_to("target")
    name = str(path)
    return {"readlink": _timed(lambda: os.readlink(name), count)}


def locks(directory: Path, count: int) -> Figures:
    """*count* times a lock taken by ``flock`` and released; microseconds."""
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)

    def lock() -> None:
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.flock(fd, fcntl.LOCK_UN)

    found = _timed(lock, count)
    os.close(fd)
    return {"lock and unlock": found}


WORKLOADS: dict[str, Callable[[Path, int], Figures]] = {
    "streams": streams, "buffered": buffered, "small": small, "listing": listing,
    "synced": synced, "direct": direct, "sparse": sparse, "copied": copied, "relisted": relisted,
    "links": links, "locks": locks,
}  # fmt: skip


def main() -> None:
    _pids.extend(map(int, sys.argv[4:]))
    print(json.dumps(WORKLOADS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))


if __name__ == "__main__":
    main()
