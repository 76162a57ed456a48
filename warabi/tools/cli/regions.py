"""``warabi put``, ``get``, ``clone``: data of regions, from and to files and pipes."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from typing import IO

import click

from warabi._core.fileio import data_from, hole_from
from warabi._core.output import Output, output
from warabi.client import TargetHandle
from warabi.errors import Exception
from warabi.region import RegionID
from warabi.tools.cli.common import LOCATION, InputFile, as_json, echo, locating, print_json
from warabi.tools.location import Location
from warabi.tools.progress import progress
from warabi.tools.trees import Trees

_STEP = 8 * 1024 * 1024
"""Bytes of a region that are in memory at once."""


def region_of(text: str) -> RegionID:
    """Return the region of an ID in hex."""
    try:
        return RegionID(bytes.fromhex(text))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a region ID of 32 hex digits") from None


def _found(target: TargetHandle, location: Location, words: list[str]) -> RegionID:
    """Return the region that *location*, or else the first of *words*, names; takes that one."""
    if location.path:
        return target.open_name(location.path)
    if not words:
        raise click.UsageError(f"{location.text} names a target; expected a region, too")
    word = words.pop(0)
    return target.open_name(word) if word.startswith("/") else region_of(word)


@click.command()
@locating()
@click.argument("location", type=LOCATION)
@click.argument("file", type=InputFile(), default="-")
@click.option("-n", "--name", help="Give the region this path in the tree of names.")
@as_json
def put(trees: Trees, location: str, file: IO[bytes], name: str | None, json: bool) -> None:
    """Store FILE, or standard input, as a new region, durably; prints its ID.

    With a path in LOCATION, or with --name, the region gets that name, which must be free, when all
    of it is stored.  On failure or interruption no region is left; if this command is killed, a
    region without a name may be left.
    """
    tree, found = trees.target(location)
    if name is not None and found.path:
        raise click.UsageError(f"{location} has a path already, so --name cannot be given")
    target, name = tree.target, found.path or name
    size = _size(file)
    with progress("put", size or None) as advance:
        piece = file.read(_STEP)
        advance(len(piece))
        if len(piece) < _STEP:
            region = target.create_and_write(piece, persist=True)
        else:
            region = target.create(len(piece))
        with _finishing(target, region, name, json):
            if len(piece) == _STEP:
                _fill(target, region, piece, file, advance)


@contextlib.contextmanager
def _finishing(
    target: TargetHandle, region: RegionID, name: str | None, json: bool
) -> Iterator[None]:
    """After the block, link *name* durably, if given, to a new region, and print its ID; if that or
    the block fails, erase the region."""
    try:
        yield
        if name is not None:
            target.link_name(region, name)
            target.persist(region, 0, 0)
    except BaseException:
        with contextlib.suppress(Exception):
            target.erase(region)
        raise
    if json:
        print_json({"region": region.hex(), "name": name, "size": target.size(region)})
    else:
        echo(region.hex())


def _size(file: IO[bytes]) -> int:
    """Return the file's size in bytes; 0 for a pipe, whose size is unknown."""
    found = os.fstat(file.fileno())
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _fill(
    target: TargetHandle, region: RegionID, piece: bytes, file: IO[bytes],
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Write *piece* and the rest of *file* to a new region, durably, whatever its size."""
    size, end = max(_size(file), len(piece)), 0
    target.resize(region, size)  # the size of a file with holes may exceed that of the storage
    advance(-len(piece))
    for offset, data in _pieces(file, piece):
        advance(offset + len(data) - end)
        end = offset + len(data)
        if end > size:
            size = end
            target.resize(region, size)
        target.write(region, offset, data)
    if end < size:  # the file was truncated, or not read from its start
        target.resize(region, end)
    target.persist(region, 0, end)


def _pieces(file: IO[bytes], piece: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the data of *file* with their offsets, beginning with *piece*, which was read.

    Holes of a regular file are left out.  The last item has no data, and its offset is the end.
    """
    size, offset, start = _size(file), 0, 0
    if size:
        start = file.seek(-len(piece), os.SEEK_CUR)
        piece = b""
    while True:
        step = _STEP
        if start + offset < size:
            data, end = _next_data(file, start + offset, size)
            offset = file.seek(data) - start
            step = min(step, end - data or step)
        piece = piece or file.read(step)
        yield offset, piece
        if not piece:
            return
        offset += len(piece)
        piece = b""


def _next_data(file: IO[bytes], offset: int, size: int) -> tuple[int, int]:
    """Return start and end of the next data of a file of *size* bytes; its position is kept."""
    fd = file.fileno()
    position = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        data = data_from(fd, offset, size)
        return data, hole_from(fd, data, size)
    finally:
        os.lseek(fd, position, os.SEEK_SET)


@click.command()
@locating(read_only=True)
@click.argument("location", type=LOCATION)
@click.argument("words", nargs=-1, metavar="[REGION] [FILE]")
def get(trees: Trees, location: str, words: tuple[str, ...]) -> None:
    """Write a region to FILE or standard output.

    The path in LOCATION names it, or else REGION: its ID or its path.  FILE is created, or
    replaced, when it is complete.
    """
    tree, found = trees.target(location)
    target, left = tree.target, list(words)
    region = _found(target, found, left)
    file = left.pop(0) if left else "-"
    if left:
        raise click.UsageError(f"unexpected argument {left[0]!r}")
    size = target.size(region)
    seen = file == "-" and sys.stdout is not None and sys.stdout.isatty()
    with progress("get", size, hidden=seen) as advance, output(file) as out:
        copy_out(target, region, size, out, advance)


def copy_out(
    target: TargetHandle, region: RegionID, size: int, out: Output, advance: Callable[[int], None]
) -> None:
    """Write *size* bytes of a region, with its holes."""
    done = 0
    buffer = memoryview(bytearray(min(size, _STEP)))
    for start, length in target.data_extents(region):
        out.skip(min(start, size) - done)
        advance(min(start, size) - done)
        done = min(start + length, size)
        for offset in range(start, done, _STEP):
            piece = buffer[: done - offset]
            target.read_into(region, offset, piece)
            out.write(piece)
            advance(len(piece))
    out.skip(size - done)


@click.command()
@locating()
@click.argument("location", type=LOCATION)
@click.argument("words", nargs=-1, metavar="[REGION]")
@click.option("-n", "--name", help="Give the copy this path in the tree of names.")
@as_json
def clone(
    trees: Trees, location: str, words: tuple[str, ...], name: str | None, json: bool
) -> None:
    """Copy a region to a new one of the same target, durably; prints its ID.

    The path in LOCATION names it, or else REGION: its ID or its path.  The provider copies.  The
    copy shares blocks with the region if the file system of the target can, and keeps its holes.
    """
    tree, found = trees.target(location)
    target, left = tree.target, list(words)
    region = _found(target, found, left)
    if left:
        raise click.UsageError(f"unexpected argument {left[0]!r}")
    with _finishing(target, target.copy(region, persist=True), name, json):
        pass
