"""How fast files are written and read, in a target or on the local disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from warabi.errors import StorageError
from warabi.tools.trees import Tree, remove_all

_PIECE = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What is measured: a large and *files* small ones for each of *threads*; sizes in bytes."""

    large: int
    small: int
    files: int
    threads: int
    persist: bool


class Result(NamedTuple):
    """A measurement: the number of files, their bytes, and the seconds it took."""

    name: str
    files: int
    bytes: int
    seconds: float


@contextmanager
def directory(tree: Tree, path: str) -> Iterator[str]:
    """A new directory in *path*, which is removed after the block."""
    place = os.path.join(path, f".warabi-bench-{os.urandom(6).hex()}")
    tree.makedirs(path)
    tree.mkdir(place)
    try:
        yield place
    finally:
        remove_all(tree, place)


def measure(tree: Tree, path: str, settings: Settings) -> Iterator[Result]:
    """Yield the result of each measurement in the directory *path*.

    Raises:
        StorageError: what was read is not what was written.
    """
    large = os.urandom(min(_PIECE, settings.large))
    small = os.urandom(settings.small)

    def write_large(thread: int) -> None:
        with tree.writing(f"{path}/large-{thread}", 0o644, None) as sink:
            for start in range(0, settings.large, _PIECE):
                sink.write(memoryview(large)[: settings.large - start])

    def read_large(thread: int) -> None:
        name = f"{path}/large-{thread}"
        buffer = bytearray(len(large))
        with tree.reading(name, tree.stat(name)) as source:
            for start in range(0, settings.large, _PIECE):
                size = min(_PIECE, settings.large - start)
                source.read_into(start, memoryview(buffer)[:size])
                _check(name, buffer[:size] == large[:size])

    def each(call: Callable[[str], None]) -> Callable[[int], None]:
        def work(thread: int) -> None:
            for number in range(settings.files):
                call(f"{path}/small-{thread}-{number}")

        return work

    def write_small(name: str) -> None:
        tree.store(name, small, 0o644, time.time_ns())

    def read_small(name: str) -> None:
        _check(name, tree.small(name, tree.stat(name)) == small)

    def stat_small(name: str) -> None:
        _check(name, tree.stat(name).size == len(small))

    one, many = (1, settings.large), (settings.files, settings.files * settings.small)
    steps: list[tuple[str, tuple[int, int], Callable[[int], None]]] = [
        ("write large", one, write_large),
        ("read large", one, read_large),
        ("write small", many, each(write_small)),
        ("read small", many, each(read_small)),
        ("stat", (settings.files, 0), each(stat_small)),
        ("remove", (settings.files, 0), each(tree.unlink)),
    ]
    with ThreadPoolExecutor(settings.threads) as pool:
        for name, (files, size), work in steps:
            start = time.perf_counter()
            for _ in pool.map(work, range(settings.threads)):
                pass
            tree.flush()
            if settings.persist and name.startswith("write"):
                tree.persist()
            seconds = time.perf_counter() - start
            yield Result(name, files * settings.threads, size * settings.threads, seconds)


def _check(name: str, right: bool) -> None:
    if not right:
        raise StorageError(f"{name}: what was read is not what was written")
