"""A file that is used in every way at random holds what a byte array would hold (after ``fsx``).

Set FSX_SEED to repeat a run, FSX_OPERATIONS for another number of operations.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.support import Mount
from warabi._core.syscalls import FALLOC_FL_KEEP_SIZE as KEEP
from warabi._core.syscalls import FALLOC_FL_PUNCH_HOLE, fallocate
from warabi._core.syscalls import FALLOC_FL_ZERO_RANGE as ZERO

LARGEST = 256 * 1024
PAGE = mmap.PAGESIZE
OPERATIONS = int(os.environ.get("FSX_OPERATIONS", "20000"))


class Exerciser:
    """One file, what it should hold, and things to do to both.

    Args:
        directory: where the file is.
        seed: of every choice.
        allocates: whether fallocate(2) is supported there.
    """

    def __init__(self, directory: Path, seed: int, *, allocates: bool = True) -> None:
        self.directory = directory
        self.path = directory / "file"
        self.chance = random.Random(seed)
        self.model = bytearray()
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT)
        self.direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        self.page_buffer = mmap.mmap(-1, LARGEST)
        self.history: list[str] = []
        self.calls: list[Callable[[], str]] = [
            *[self.write] * 20, *[self.append] * 4, *[self.read] * 20, *[self.read_direct] * 6,
            *[self.truncate] * 8, *[self.map_write] * 12, *[self.map_read] * 12, self.sync,
            *[self.fallocate] * (8 * allocates), *[self.copy] * 4, *[self.seek] * 4,
            *[self.reopen] * 3, self.rename, self.drop_cache, self.check_size, self.replace,
            self.replace_by_copy,
        ]  # fmt: skip

    def run(self, operations: int) -> None:
        for number in range(operations):
            self.history.append("?")
            call = self.chance.choice(self.calls)
            try:
                self.history[-1] = f"{number} {call.__name__} {call()}"
            except BaseException:
                self.history[-1] = f"{number} {call.__name__} failed, file of {len(self.model)}"
                raise

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.direct)
        self.page_buffer.close()

    def _extent(self, limit: int) -> tuple[int, int]:
        """An offset below *limit* and a size that does not leave it, rather small than large."""
        offset = self.chance.randrange(limit)
        size = min(limit - offset, 1 << self.chance.randrange(18)) + 1
        return offset, self.chance.randrange(size)

    def _write(self, offset: int, data: bytes) -> None:
        if len(self.model) < offset:
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + len(data)] = data

    def _compare(self, found: bytes, offset: int, what: str) -> None:
        wanted = self.model[offset : offset + len(found)]
        if found != wanted:
            first = next(n for n in range(len(found)) if found[n : n + 1] != wanted[n : n + 1])
            raise AssertionError(f"{what} at {offset}: differs from {offset + first} on")

    def write(self) -> str:
        offset, size = self._extent(LARGEST)
        data = self.chance.randbytes(size)
        assert os.pwrite(self.fd, data, offset) == size
        if size:
            self._write(offset, data)
        return f"{size} at {offset}"

    def append(self) -> str:
        data = self.chance.randbytes(
            self.chance.randrange(min(5000, LARGEST - len(self.model) + 1))
        )
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            assert os.write(fd, data) == len(data)
        finally:
            os.close(fd)
        self.model.extend(data)
        return f"{len(data)}"

    def read(self) -> str:
        offset, size = self._extent(LARGEST)
        found = os.pread(self.fd, size, offset)
        assert len(found) == max(0, min(size, len(self.model) - offset))
        self._compare(found, offset, "read")
        return f"{size} at {offset}"

    def read_direct(self) -> str:
        """Past the page cache: what the server has."""
        offset, size = self._extent(LARGEST)
        offset, size = offset // PAGE * PAGE, -(-size // PAGE) * PAGE
        with memoryview(self.page_buffer)[:size] as view:
            count = os.preadv(self.direct, [view], offset)
            assert count == max(0, min(size, len(self.model) - offset))
            self._compare(bytes(view[:count]), offset, "direct read")
        return f"{size} at {offset}"

    def truncate(self) -> str:
        size = self.chance.randrange(LARGEST + 1)
        if self.chance.random() < 0.2:
            size = self.chance.choice((0, PAGE, size // PAGE * PAGE, len(self.model)))
        os.ftruncate(self.fd, size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))
        return f"to {size}"

    def map_write(self) -> str:
        if not self.model:
            return "nothing"
        offset, size = self._extent(len(self.model))
        data = self.chance.randbytes(size)
        with mmap.mmap(self.fd, len(self.model)) as mapping:
            mapping[offset : offset + size] = data
            if self.chance.random() < 0.3:
                mapping.flush()
        self._write(offset, data)
        return f"{size} at {offset}"

    def map_read(self) -> str:
        if not self.model:
            return "nothing"
        offset, size = self._extent(len(self.model))
        start = offset // PAGE * PAGE
        with (
            mmap.mmap(self.fd, offset + size - start, prot=mmap.PROT_READ, offset=start)
            if offset + size > start
            else memoryview(b"") as mapping
        ):
            self._compare(bytes(mapping[offset - start :]), offset, "mapped read")
        return f"{size} at {offset}"

    def fallocate(self) -> str:
        offset, size = self._extent(LARGEST)
        size = min(size, LARGEST - offset) or 1
        mode = self.chance.choice((0, KEEP, KEEP | FALLOC_FL_PUNCH_HOLE, ZERO, KEEP | ZERO))
        fallocate(self.fd, mode, offset, size)
        if not mode & KEEP:
            self.model.extend(bytes(max(0, offset + size - len(self.model))))
        if mode & ~KEEP:
            end = min(offset + size, len(self.model))
            self.model[offset:end] = bytes(max(0, end - offset))
        return f"mode {mode}, {size} at {offset}"

    def copy(self) -> str:
        """From one place of the file to another."""
        start, size = self._extent(LARGEST)
        offset = self.chance.randrange(LARGEST)
        size = min(size, abs(start - offset), LARGEST - offset)
        data = bytes(self.model[start : start + size])
        assert os.copy_file_range(self.fd, self.fd, size, start, offset) == len(data)
        if data:
            self._write(offset, data)
        return f"{size} at {start} to {offset}"

    def seek(self) -> str:
        offset = self.chance.randrange(LARGEST)
        try:
            data = os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError:
            data = len(self.model)
        assert offset <= data or offset > len(self.model)
        assert not any(self.model[offset:data]), f"data between {offset} and {data}"
        return f"{offset}: {data}"

    def sync(self) -> str:
        self.chance.choice((os.fsync, os.fdatasync))(self.fd)
        return ""

    def reopen(self) -> str:
        self.close()
        self.fd = os.open(self.path, os.O_RDWR)
        self.direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        self.page_buffer = mmap.mmap(-1, LARGEST)
        return ""

    def rename(self) -> str:
        new = self.directory / f"file{self.chance.randrange(100)}"
        os.rename(self.path, new)
        self.path = new
        return f"to {new.name}"

    def replace(self) -> str:
        """As programs save a file: a new one takes the name."""
        new = self.directory / "new"
        new.write_bytes(self.model)
        os.rename(new, self.path)
        return self.reopen()

    def replace_by_copy(self) -> str:
        """As ``cp --reflink=auto`` and ``mv`` do: the storage copies, or shares what it can."""
        new = self.directory / "copy"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            done = 0
            while count := os.copy_file_range(self.fd, fd, LARGEST, done):
                done += count
        finally:
            os.close(fd)
        os.rename(new, self.path)
        return self.reopen()

    def drop_cache(self) -> str:
        os.fsync(self.fd)  # only clean pages can be dropped
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return ""

    def check_size(self) -> str:
        assert os.fstat(self.fd).st_size == self.path.stat().st_size == len(self.model)
        return ""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "mounted", ["memory", "file", "engine", "memory-passed", "file-passed"], indirect=True
)
def test_a_file_used_at_random_holds_what_a_byte_array_holds(mounted: Mount) -> None:
    seed = int(os.environ.get("FSX_SEED", "20"))
    operations = OPERATIONS // 4 if "://" in mounted.source else OPERATIONS
    print(f"FSX_SEED={seed} FSX_OPERATIONS={operations}")
    exerciser = Exerciser(mounted.path, seed)
    try:
        exerciser.run(operations)
    except BaseException:
        print("\n".join(exerciser.history[-30:]))
        raise
    finally:
        exerciser.close()
    if mounted.source != "memory:":
        mounted.remount()
    assert os.listdir(mounted.path) == [exerciser.path.name]
    assert exerciser.path.read_bytes() == exerciser.model
