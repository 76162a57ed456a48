"""Commands on the tree of names of a target: ``ls``, ``stat``, ``cat``, ``mkdir``, ``mv``, ``rm``,
``du``, ``df``, ``info``."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import grp
import json as json_text
import os
import pwd
import stat as modes
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from warabi._core.attributes import APPEND_ONLY, IMMUTABLE, NO_DUMP, Attributes, DirectoryEntry
from warabi._core.output import output
from warabi.errors import ConfigError, path_error
from warabi.tools.cli.common import (
    LOCATION,
    as_json,
    echo,
    locating,
    print_json,
    print_json_list,
    print_lines,
)
from warabi.tools.cli.regions import copy_out, region_of
from warabi.tools.location import Location
from warabi.tools.quoting import escaped, shell_quoted
from warabi.tools.trees import TargetTree, Trees, entries, remove_all

_TYPES = {
    modes.S_IFREG: "file", modes.S_IFDIR: "directory", modes.S_IFLNK: "symlink",
    modes.S_IFIFO: "fifo", modes.S_IFSOCK: "socket", modes.S_IFCHR: "character device",
    modes.S_IFBLK: "block device",
}  # fmt: skip

_location = click.argument("location", default=":", type=LOCATION)
_locations = click.argument(
    "locations", metavar="LOCATION...", nargs=-1, required=True, type=LOCATION
)


def _shown(name: str) -> bytes:
    """Quote a name for the terminal, or for programs."""
    if sys.stdout is not None and sys.stdout.isatty():
        return shell_quoted(name).encode(errors="surrogateescape")
    return escaped(name)


_FLAGS = {IMMUTABLE: "i", APPEND_ONLY: "a", NO_DUMP: "d"}
"""The letters of chattr(1)."""


def _record(name: str, found: Attributes) -> dict[str, Any]:
    kind = _TYPES.get(modes.S_IFMT(found.mode), "other")
    record = {
        "name": name,
        "type": kind,
        "size": found.size,
        "space": found.blocks * 512,
        "mode": f"{modes.S_IMODE(found.mode):04o}",
        "uid": found.uid,
        "gid": found.gid,
        "nlink": found.nlink,
        "inode": found.ino,
        "mtime": found.mtime_ns / 1e9,
        "ctime": found.ctime_ns / 1e9,
        "atime": found.atime_ns / 1e9,
        "flags": "".join(letter for flag, letter in _FLAGS.items() if found.flags & flag),
        "btime": found.btime_ns / 1e9 if found.btime_ns else None,
    }
    return {**record, "region": found.region.hex()} if kind == "file" else record


@click.command()
@locating(read_only=True)
@_location
@click.option("-l", "--long", is_flag=True, help="Show mode, links, owner, size and time, too.")
@as_json
def ls(trees: Trees, location: str, long: bool, json: bool) -> None:
    """List a directory; or, of a LOCATION without a path, every region: its ID, size and names.

    `warabi ls ADDRESS` lists regions, with and without names; `warabi ls ADDRESS/0/` the root
    directory of provider 0, and so does -l.  On a terminal names are quoted as by ls(1).  Elsewhere
    blanks, control characters and backslashes in them are escaped as a backslash and three octal
    digits, as in /proc/mounts, so that each name is one word.
    """
    tree, found = trees.target(location)
    if found.path or long:
        attributes = tree.stat(found.path or "/", follow=True)
        if modes.S_ISDIR(attributes.mode):
            listed = tree.scandir(found.path or "/")
        else:
            listed = iter([DirectoryEntry(os.path.basename(found.path), attributes)])
        if json:
            print_json_list(_record(*entry) for entry in listed)
        else:
            for entry in listed:
                print_lines([_long(tree, found, *entry) if long else _shown(entry.name)])
        return
    regions = tree.target.list_stats()
    if json:
        print_json_list(
            {"region": region.hex(), "size": each.size, "names": list(each.names)}
            for region, each in regions
        )
        return
    for region, each in regions:
        words = [b"%s %14d" % (region.hex().encode(), each.size), *map(_shown, each.names)]
        print_lines([b" ".join(words)])


def _long(tree: TargetTree, location: Location, name: str, found: Attributes) -> bytes:
    """One line as of ls -l."""
    time = datetime.datetime.fromtimestamp(found.mtime_ns // 10**9)
    line = (
        f"{modes.filemode(found.mode)} {found.nlink:>3} {_user(found.uid):<8} "
        f"{_group(found.gid):<8} {found.size:>12} {time:%Y-%m-%d %H:%M} "
    ).encode() + _shown(name)
    if modes.S_ISLNK(found.mode):
        with contextlib.suppress(OSError):  # removed meanwhile
            line += b" -> " + _shown(tree.readlink(f"{location.path}/{name}"))
    return line


@functools.cache
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)


@functools.cache
def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except (KeyError, OverflowError):
        return str(gid)


@click.command()
@locating(read_only=True)
@_locations
@as_json
def stat(trees: Trees, locations: tuple[str, ...], json: bool) -> None:
    """Print the attributes of files and directories; symbolic links are not followed."""
    for text in locations:
        tree, location = trees.target(text)
        record = _record(location.text, tree.stat(location.path or "/"))
        if json:
            print_json(record)
            continue
        for key in ("mtime", "ctime", "atime", "btime"):
            if record[key] is None:  # not known
                record[key] = "-"
            else:
                record[key] = datetime.datetime.fromtimestamp(record[key]).isoformat(" ")
        _print_pairs(record)


def _print_pairs(record: dict[str, Any]) -> None:
    width = max(map(len, record))
    print_lines([
        f"{key:>{width}}  ".encode() + (_shown(value) if key == "name" else str(value).encode())
        for key, value in record.items()
    ])  # fmt: skip


@click.command()
@locating(read_only=True)
@_locations
def cat(trees: Trees, locations: tuple[str, ...]) -> None:
    """Write files to standard output, one after the other."""
    with output("-") as out:
        for text in locations:
            tree, location = trees.target(text)
            region = tree.target.open_name(_path(location))
            copy_out(tree.target, region, tree.target.size(region), out, lambda count: None)


def _path(location: Location) -> str:
    if not location.path:
        raise ConfigError(
            f"{location.text}: names a target, expected a path in it, as in ADDRESS/0/path"
        )
    return location.path


@click.command()
@locating()
@_locations
@click.option("--parents", is_flag=True, help="Make those above, too; no error if it exists.")
@click.option("-m", "--mode", default="755", show_default=True, metavar="OCTAL")
def mkdir(trees: Trees, locations: tuple[str, ...], parents: bool, mode: str) -> None:
    """Make directories."""
    try:
        bits = int(mode, 8)
    except ValueError:
        raise click.BadParameter(f"{mode!r} is not an octal number", param_hint="--mode") from None
    for text in locations:
        tree, location = trees.target(text)
        if parents:
            tree.target.makedirs(_path(location), bits, exist_ok=True)
        else:
            tree.mkdir(_path(location), bits)


@click.command()
@locating()
@click.argument("source", type=LOCATION)
@click.argument("destination", type=LOCATION)
@click.option("-n", "--no-clobber", is_flag=True, help="Fail if the new name exists.")
def mv(trees: Trees, source: str, destination: str, no_clobber: bool) -> None:
    """Rename SOURCE to DESTINATION, or move it into that directory, in one step.

    Both are in the same target.
    """
    tree, old = trees.target(source)
    other, new = trees.target(destination)
    if other is not tree:
        raise ConfigError(
            f"{source} and {destination} are in different targets; use `warabi cp -r`, and then"
            " `warabi rm -r`"
        )
    with contextlib.suppress(FileNotFoundError):
        if modes.S_ISDIR(tree.stat(new.path or "/", follow=True).mode):
            new = new.below(os.path.basename(_path(old).rstrip("/")))
    tree.target.rename(_path(old), _path(new), replace=not no_clobber)


@click.command()
@locating()
@click.argument("words", metavar="LOCATION [REGION]", nargs=-1, required=True, type=LOCATION)
@click.option("-r", "--recursive", is_flag=True, help="Remove directories with all in them.")
@click.option("-f", "--force", is_flag=True, help="What does not exist is no error.")
def rm(trees: Trees, words: tuple[str, ...], recursive: bool, force: bool) -> None:
    """Remove what is at each LOCATION; or erase a REGION of a target, by its ID or path."""
    tree, location = trees.target(words[0])
    if not location.path and len(words) == 2:
        if words[1].startswith("/"):
            tree.unlink(words[1])
        else:
            tree.target.erase(region_of(words[1]))
        return
    for text in words:
        tree, location = trees.target(text)
        path = _path(location)
        with contextlib.suppress(*([FileNotFoundError] if force else [])):
            if recursive:
                remove_all(tree, path)
            elif modes.S_ISDIR(tree.stat(path).mode):
                raise path_error(errno.EISDIR, f"rm {text}: is a directory; -r removes it")
            else:
                tree.unlink(path)


@click.command()
@locating(read_only=True)
@_location
@click.option("-s", "--summarize", is_flag=True, help="Print the sum only.")
@as_json
def du(trees: Trees, location: str, summarize: bool, json: bool) -> None:
    """Print the bytes of storage that each directory uses, with all below it."""
    tree, found = trees.target(location)
    records = _used(tree, found.path or "/", found.text)
    if summarize:
        *_, last = records
        records = iter([last])
    if json:
        print_json_list(records)
        return
    for record in records:
        print_lines([b"%14d %s" % (record["space"], _shown(record["name"]))])


def _used(tree: TargetTree, path: str, shown: str) -> Iterator[dict[str, Any]]:
    """Yield the sums of each directory below *path*, and last its own."""
    own = tree.stat(path)
    sums = {"space": own.blocks * 512, "size": 0, "files": 0}
    if modes.S_ISDIR(own.mode):
        for entry in entries(tree, path):
            if not entry.is_dir():
                sums["space"] += entry.attributes.blocks * 512
                sums["size"] += entry.attributes.size
                sums["files"] += 1
                continue
            below: dict[str, Any] = {}
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                name = os.path.join(shown, entry.name)
                for below in _used(tree, os.path.join(path, entry.name), name):
                    yield below
            for key in sums if below else ():
                sums[key] += below[key]
    else:
        sums.update(size=own.size, files=1)
    yield {"name": shown, **sums}


@click.command()
@locating(read_only=True)
@_location
@as_json
def df(trees: Trees, location: str, json: bool) -> None:
    """Print how much space a target has."""
    tree, found = trees.target(location)
    space = tree.space(found.path)
    used = tree.target.link.call("used")
    record = {
        "target": found.address or found.file,
        "provider": found.provider_id,
        "total": space.total,
        "used": used,
        "available": space.available,
    }
    if json:
        print_json(record)
        return
    echo(f"{'total':>16} {'used':>16} {'available':>16}  target")
    echo(f"{space.total:>16} {used:>16} {space.available:>16}  {_named(found)}")


def _named(location: Location) -> str:
    return location.file or f"{location.address}/{location.provider_id}"


@click.command()
@locating(read_only=True)
@_location
@as_json
def info(trees: Trees, location: str, json: bool) -> None:
    """Print what a target is: where, its UUID, its contents, its engine."""
    tree, found = trees.target(location)
    call: Callable[..., Any] = tree.target.link.call
    total, available, regions = call("room")
    record = {
        "target": _named(found),
        "uuid": call("uuid"),
        "regions": regions,
        "used": call("used"),
        "total": total,
        "available": available,
        "checksums": bool(call("summed")),
    }
    if found.address:
        report = json_text.loads(call("stats"))
        record |= {"version": report["version"], "pid": report["pid"]}
    if json:
        print_json(record)
    else:
        _print_pairs(record)
