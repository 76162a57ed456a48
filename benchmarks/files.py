"""Measures whole files by path: fsspec's file system of a target, and an array of zarr."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import zarr

from benchmarks import places
from benchmarks.api import Progress
from benchmarks.places import mounted
from benchmarks.processes import provider, run, scratch
from benchmarks.stats import Round, Series, Work, measure
from benchmarks.subjects import file_config
from warabi.fsspec import WarabiFileSystem

LOCAL = "LocalFileSystem on tmpfs"
OURS, EMBEDDED = "fsspec over na+sm", "fsspec in the same process"
MOUNT, EMBEDDED_MOUNT = "mount of na+sm", "embedded mount"
KIB, MIB = 1 << 10, 1 << 20
ENTRIES, CHUNKS, MANY = 10_000, 1024, 64
ARRAY = f"zarr, {CHUNKS:,} chunks, "
LISTED = f"ls of {ENTRIES:,} entries"
COPIED = 5000
COPY = f"cp -r or warabi cp -r of {COPIED:,} files"


@dataclass(frozen=True)
class Place:
    """A directory, and the file system of fsspec that it is in."""

    name: str
    fs: Any
    top: str
    shared: Path  # a directory on tmpfs that is the same for all places


@contextlib.contextmanager
def _places() -> Iterator[list[Place]]:
    """A directory of each kind; all bytes are on tmpfs."""
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(scratch(places.SHM))
        config = file_config(inside / "served")
        address, _ = stack.enter_context(provider("na+sm", [config]))
        ours = WarabiFileSystem(address, 1, skip_instance_cache=True)
        same = WarabiFileSystem(path=str(inside / "same"), create=True, skip_instance_cache=True)
        stack.callback(same.close)
        local = fsspec.filesystem("file")
        found = [
            Place(LOCAL, local, f"{inside}/local", inside),
            Place(OURS, ours, "/files", inside),
            Place(EMBEDDED, same, "/files", inside),
        ]
        for name, source, words in (
            (MOUNT, address, ["-o", "provider_id=1"]),
            (EMBEDDED_MOUNT, f"file:{inside}/embedded", []),
        ):
            path = inside / name.replace(" ", "-")
            command: list[str | Path] = [
                sys.executable,
                "-m",
                "warabifs.mount.main",
                source,
                path,
                *words,
            ]
            stack.enter_context(mounted(name, path, *command))
            found.append(Place(name, local, f"{path}/mounted", inside))
        for place in found:
            place.fs.makedirs(place.top)
        yield found


def _pipe(place: Place, size: int) -> Work:
    data, numbers = b"p" * size, itertools.count()

    def call() -> None:
        place.fs.pipe_file(f"{place.top}/piped{next(numbers)}", data)

    def remove() -> None:
        for path in place.fs.ls(place.top, detail=False):
            if "/piped" in path:
                place.fs.rm_file(path)

    return Work(call, after=remove, most=2000 if size < MIB else 100)


def _cat(place: Place, size: int) -> Work:
    paths = [f"{place.top}/cat{size}-{i}" for i in range(200 if size < MIB else 20)]
    for path in paths:
        place.fs.pipe_file(path, b"c" * size)
    turn = itertools.cycle(paths)
    return Work(lambda: place.fs.cat_file(next(turn)))


def _pipe_many(place: Place, size: int) -> Work:
    files = {f"{place.top}/many{i}": b"p" * size for i in range(MANY)}
    return Work(lambda: place.fs.pipe(files), per=MANY)


def _cat_many(place: Place, size: int) -> Work:
    paths = [f"{place.top}/many{i}" for i in range(MANY)]
    place.fs.pipe(dict.fromkeys(paths, b"c" * size))
    return Work(lambda: place.fs.cat(paths), per=MANY)


def _list(place: Place) -> Work:
    place.fs.makedirs(f"{place.top}/listed")
    for number in range(ENTRIES):
        place.fs.touch(f"{place.top}/listed/{number}")
    return Work(lambda: place.fs.ls(f"{place.top}/listed", detail=True))


def _copy(place: Place) -> Work:
    """Into a target by ``warabi cp``, on a mount of it by cp(1)."""
    source, turn = place.shared / "copied", itertools.count()
    for number in range(0 if source.exists() else COPIED):
        path = source / f"{number % 50}" / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"c" * (4 * KIB))
    command, top = ["cp"], place.top
    if isinstance(place.fs, WarabiFileSystem):
        command = [sys.executable, "-c", "from warabi.tools.cli.main import main; main()", "cp"]
        top = f"{place.fs.storage_args[0]}/1{top}"
    return Work(lambda: run(*command, "-r", source, f"{top}/copy{next(turn)}"), per=COPIED, most=1)


def _store(place: Place, name: str) -> Any:
    if not isinstance(place.fs, WarabiFileSystem):
        return zarr.storage.LocalStore(f"{place.top}/{name}")
    fs = WarabiFileSystem(
        *place.fs.storage_args, **{**place.fs.storage_options, "asynchronous": True}
    )
    return zarr.storage.FsspecStore(fs, path=f"{place.top}/{name}")


def _written(place: Place, name: str) -> None:
    numbers = np.arange(CHUNKS * 1024, dtype="u1").reshape(-1, 1024)
    array = zarr.create_array(
        _store(place, name), shape=numbers.shape, chunks=(1, 1024), dtype="u1", compressors=None
    )
    array[:] = numbers


def _zarr_write(place: Place) -> Work:
    turn = itertools.count()
    return Work(lambda: _written(place, f"written{next(turn)}"), per=CHUNKS, most=1)


def _zarr_read(place: Place) -> Work:
    _written(place, "read")
    return Work(lambda: zarr.open_array(_store(place, "read"), mode="r")[:], per=CHUNKS, most=1)


ROWS: dict[str, tuple[Callable[[Place], Work], tuple[str, ...]]] = {
    "pipe 4 KiB": (lambda place: _pipe(place, 4 * KIB), (LOCAL, OURS, EMBEDDED)),
    "pipe 1 MiB": (lambda place: _pipe(place, MIB), (LOCAL, OURS, EMBEDDED)),
    "cat 4 KiB": (lambda place: _cat(place, 4 * KIB), (LOCAL, OURS, EMBEDDED)),
    "cat 1 MiB": (lambda place: _cat(place, MIB), (LOCAL, OURS, EMBEDDED)),
    f"pipe 4 KiB, {MANY} files": (
        lambda place: _pipe_many(place, 4 * KIB), (LOCAL, OURS, EMBEDDED)),
    f"cat 4 KiB, {MANY} files": (
        lambda place: _cat_many(place, 4 * KIB), (LOCAL, OURS, EMBEDDED)),
    COPY: (_copy, (OURS, MOUNT)),
    LISTED: (_list, (LOCAL, OURS, EMBEDDED)),
    f"{ARRAY}write": (_zarr_write, (LOCAL, OURS, EMBEDDED, MOUNT, EMBEDDED_MOUNT)),
    f"{ARRAY}read": (_zarr_read, (LOCAL, OURS, EMBEDDED, MOUNT, EMBEDDED_MOUNT)),
}  # fmt: skip
"""By name: the work, and the places that it is done in."""


def files(rounds: int, budget: float, say: Progress, text: str) -> list[Series]:
    """Every row whose name contains *text*; the places take turns.

    Args:
        budget: seconds for a round of one place.
    """
    done: list[Series] = []
    with _places() as found:
        for row, (make, names) in ROWS.items():
            if text not in row:
                continue
            say(f"files: {row}")
            works = {place.name: make(place) for place in found if place.name in names}
            series = {name: Series(row, name) for name in works}
            for number in range(rounds + 1):
                for name, work in works.items():
                    took: Round = measure(work, budget)
                    if number:  # the first one is for warming up
                        series[name].rounds.append(took)
            done += series.values()
    return done
