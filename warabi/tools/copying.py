"""Copies of files and directories between trees: several at once, each file atomically."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from warabi._core import forks
from warabi._core.attributes import Attributes
from warabi.errors import ConfigError, Exception, InvalidRegion, OutOfBounds, PathError
from warabi.tools.trees import (
    STORED,
    TargetTree,
    Tree,
    entries,
    make_directory,
    remove_all,
)

_PIECE = 4 << 20
_BATCH = 32  # small files that a worker takes at once
_OF_ONE_FILE = (PathError, InvalidRegion, OutOfBounds)
"""Errors that do not keep other files from being copied."""
_OF_ALL = frozenset(
    getattr(errno, name) for name in "ENOSPC EDQUOT EROFS EIO EMFILE ENFILE EPIPE".split()
)


@dataclass
class Outcome:
    """What was done.

    Attributes:
        files: number of files and symbolic links that were copied.
        bytes: their size.
        total: bytes of all files that are to be copied, as far as they have been found.
        unchanged: number of files that were there already.
        removed: number of names that were removed at the destination.
        failed: number of files and directories that were not copied.
    """

    files: int = 0
    bytes: int = 0
    total: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: int = 0


def same_time(wanted: Attributes, found: Attributes) -> bool:
    """Whether two files have the same size and the same time of their last change."""
    return wanted.size == found.size and wanted.mtime_ns == found.mtime_ns


Task = tuple[str, Attributes, str]


class Copier:
    """Copies from one tree to another.

    Args:
        source: the tree to read.
        into: the tree to write.
        jobs: number of threads.
        update: whether a file is left out whose size and time are those at the destination.
        checksum: whether their bytes are compared instead of their times.
        delete: whether what the source does not have is removed at the destination.
        dry_run: whether nothing is changed.
        complain: called with the path and the error of a file that cannot be copied.
        show: called with the bytes that are done, and all that are known of.
        told: called with each path that is copied or removed, and which it is.
    """

    def __init__(
        self, source: Tree, into: Tree, *, jobs: int, update: bool = False, checksum: bool = False,
        delete: bool = False, dry_run: bool = False,
        complain: Callable[[str, BaseException], None],
        show: Callable[[int, int], None] = lambda done, total: None,
        told: Callable[[str, str], None] = lambda what, path: None,
    ) -> None:  # fmt: skip
        self._source, self._into = source, into
        self._jobs = jobs
        self._update, self._checksum, self._delete = update, checksum, delete
        self._dry_run = dry_run
        self._complain, self._show, self._told = complain, show, told
        self._queue: queue.SimpleQueue[list[Task]] = queue.SimpleQueue()
        self._batch: list[Task] = []
        self._stopped = forks.event()
        self._lock = forks.lock()
        self._failure: BaseException | None = None
        self.outcome = Outcome()

    def run(self, source: str, into: str) -> Outcome:
        """Copy the file or directory *source* to *into*; a directory's entries go into it.

        An error that concerns one file is reported and counted; any other ends the copy.

        Raises:
            ConfigError: a directory would be copied into itself.
            warabi.errors.Exception, OSError: the first error that concerns more than one file.
        """
        found = self._source.stat(source, follow=True)
        if self._source is self._into and stat.S_ISDIR(found.mode):
            _refuse_itself(source, into)
        with self._working():
            if stat.S_ISDIR(found.mode):
                self._directories(source, into)
            else:
                there: Mapping[str, Attributes] = {}
                if self._update:
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                        there = {into: self._into.stat(into, follow=True)}
                self._entry(source, found, into, there.get(into))
            self._hand_out()
        return self.outcome

    # Finding files

    def _directories(self, source: str, into: str) -> None:
        left = [(source, into)]
        while left and not self._stopped.is_set():
            source, into = left.pop()
            with self._reported(source):
                left += reversed(self._directory(source, into))

    def _directory(self, source: str, into: str) -> list[tuple[str, str]]:
        """Copy what is in a directory but directories, which are returned."""
        mode = self._source.stat(source, follow=True).mode
        if not self._dry_run:
            make_directory(self._into, into, mode & 0o7777 | stat.S_IRWXU)
        there: dict[str, Attributes] = {}
        if self._update or self._delete:
            with contextlib.suppress(FileNotFoundError):  # of a dry run
                there = {entry.name: entry.attributes for entry in entries(self._into, into)}
        directories = []
        for entry in entries(self._source, source):
            if self._stopped.is_set():
                break
            found = there.pop(entry.name, None)
            paths = os.path.join(source, entry.name), os.path.join(into, entry.name)
            if self._delete and found and _kind(found) != _kind(entry.attributes):
                self._remove(paths[1])  # a directory in the place of a file, for example
                found = None
            if entry.is_dir():
                directories.append(paths)
            else:
                self._entry(paths[0], entry.attributes, paths[1], found)
        if self._delete and not self._stopped.is_set():
            for name in there:
                self._remove(os.path.join(into, name))
        return directories

    def _entry(self, source: str, wanted: Attributes, into: str, found: Attributes | None) -> None:
        with self._reported(source):
            if stat.S_ISLNK(wanted.mode):
                self._link(source, into, found)
            elif not stat.S_ISREG(wanted.mode):
                raise ConfigError("is neither a file, a directory nor a symbolic link")
            elif (
                self._update
                and found is not None
                and stat.S_ISREG(found.mode)
                and self._is_same(source, wanted, into, found)
            ):
                self.outcome.unchanged += 1
            else:
                self._add(source, wanted, into)

    def _is_same(self, source: str, wanted: Attributes, into: str, found: Attributes) -> bool:
        if not self._checksum:
            return same_time(wanted, found)
        if wanted.size != found.size:
            return False
        with self._source.reading(source, wanted) as ours, self._into.reading(into, found) as other:
            first, second = bytearray(_PIECE), bytearray(_PIECE)
            for offset in range(0, wanted.size, _PIECE):
                size = min(_PIECE, wanted.size - offset)
                ours.read_into(offset, memoryview(first)[:size])
                other.read_into(offset, memoryview(second)[:size])
                if first[:size] != second[:size]:
                    return False
        return True

    def _link(self, source: str, into: str, found: Attributes | None) -> None:
        target = self._source.readlink(source)
        if found is not None and stat.S_ISLNK(found.mode) and self._into.readlink(into) == target:
            self.outcome.unchanged += 1
            return
        if not self._dry_run:
            try:
                self._into.symlink(target, into)
            except FileExistsError:
                self._into.unlink(into)
                self._into.symlink(target, into)
        self._done(into, 0)

    def _remove(self, path: str) -> None:
        with self._reported(path):
            if not self._dry_run:
                remove_all(self._into, path)
            self.outcome.removed += 1
            self._told("removed", path)

    # Workers

    def _add(self, source: str, wanted: Attributes, into: str) -> None:
        if self._dry_run:
            self._done(into, wanted.size)
            return
        self.outcome.total += wanted.size
        self._batch.append((source, wanted, into))
        if len(self._batch) >= _BATCH or wanted.size > STORED:
            self._hand_out()

    def _hand_out(self) -> None:
        if self._batch:
            self._queue.put(self._batch)
            self._batch = []

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Let threads copy what the block finds; return when they have."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._jobs)]
        for thread in threads:
            thread.start()
        try:
            yield
            for _ in threads:
                self._queue.put([])
            for thread in threads:
                thread.join()
        except BaseException:
            self._stopped.set()
            for _ in threads:
                self._queue.put([])
            for thread in threads:
                thread.join()
            raise
        if self._failure is not None:
            raise self._failure
        self._into.flush()

    def _work(self) -> None:
        buffer = memoryview(bytearray(0))
        try:
            while batch := self._queue.get():
                for source, wanted, into in batch:
                    if self._stopped.is_set():
                        return
                    with self._reported(source):
                        if isinstance(self._into, TargetTree) and self._source is self._into:
                            self._into.copy(wanted, into, wanted.mode & 0o7777, wanted.mtime_ns)
                            self._done(into, wanted.size, wanted.size)
                        elif wanted.size <= STORED:
                            data = self._source.small(source, wanted)
                            self._into.store(into, data, wanted.mode & 0o7777, wanted.mtime_ns)
                            self._done(into, len(data), len(data))
                        else:
                            buffer = buffer or memoryview(bytearray(_PIECE))
                            self._large(source, wanted, into, buffer)
        except BaseException as error:
            self._failure = self._failure or error
            self._stopped.set()

    def _large(self, source: str, wanted: Attributes, into: str, buffer: memoryview) -> None:
        mode, time = wanted.mode & 0o7777, wanted.mtime_ns
        with (
            self._source.reading(source, wanted) as reading,
            self._into.writing(into, mode, time) as sink,
        ):
            done = 0
            for start, length in reading.extents():
                sink.skip(start - done)
                self._advance(start - done)
                done = start + length
                for offset in range(start, done, _PIECE):
                    if self._stopped.is_set():
                        raise _Stopped
                    piece = buffer[: min(_PIECE, done - offset)]
                    reading.read_into(offset, piece)
                    sink.write(piece)
                    self._advance(len(piece))
            sink.skip(reading.size - done)
            self._advance(reading.size - done)
        self._done(into, reading.size)

    def _advance(self, size: int) -> None:
        with self._lock:
            self.outcome.bytes += size
            self._show(self.outcome.bytes, self.outcome.total)

    def _done(self, path: str, size: int, advance: int = 0) -> None:
        with self._lock:
            self.outcome.files += 1
            self.outcome.bytes += advance
            self._show(self.outcome.bytes, self.outcome.total)
            self._told("copied", path)

    @contextlib.contextmanager
    def _reported(self, path: str) -> Iterator[None]:
        """Report an error of the block if it concerns only the file or directory *path*."""
        try:
            yield
        except (Exception, OSError) as error:
            alone = isinstance(error, (*_OF_ONE_FILE, ConfigError)) or (
                not isinstance(error, Exception) and error.errno not in _OF_ALL
            )
            if not alone:
                raise
            with self._lock:
                self.outcome.failed += 1
                self._complain(path, error)
        except _Stopped:
            pass


class _Stopped(BaseException):
    """Leaves the copy of a file whose bytes are not wanted any more."""


def _kind(found: Attributes) -> int:
    return stat.S_IFMT(found.mode)


def _refuse_itself(source: str, into: str) -> None:
    source, into = (os.path.normpath(path) + "/" for path in (source, into))
    if into.startswith(source.replace("//", "/")):
        raise ConfigError(f"{source}: a directory cannot be copied into itself, {into}")
