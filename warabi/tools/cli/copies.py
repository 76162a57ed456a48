"""``warabi cp`` and ``warabi sync``: copies of files between targets and the local disk."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import asdict
from typing import Any

import click

from warabi.errors import ConfigError
from warabi.tools.cli.common import LOCATION, as_json, explained, locating, print_json, print_lines
from warabi.tools.copying import Copier, Outcome
from warabi.tools.location import Location
from warabi.tools.progress import overall_progress
from warabi.tools.quoting import printable
from warabi.tools.trees import Tree, Trees

_jobs = click.option("-j", "--jobs", type=click.IntRange(1, 64), default=4, show_default=True,
                     help="How many files are copied at once.")  # fmt: skip
_persist = click.option("--persist", is_flag=True,
                        help="Return when everything is on stable storage.")  # fmt: skip
_verbose = click.option("--list", "listed", is_flag=True, help="Print the path of each file.")


@click.command()
@locating()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=LOCATION)
@click.argument("destination", type=LOCATION)
@click.option("-r", "--recursive", is_flag=True, help="Copy directories with all in them.")
@click.option("--resume", is_flag=True,
              help="Leave out files whose size and time are those at the destination.")  # fmt: skip
@_jobs
@_persist
@_verbose
@as_json
def cp(
    trees: Trees,
    sources: tuple[str, ...],
    destination: str,
    recursive: bool,
    resume: bool,
    jobs: int,
    persist: bool,
    listed: bool,
    json: bool,
) -> None:
    """Copy files and directories between targets and the local disk, in any direction.

    Each file appears, or is replaced, when it is complete, with the mode and the time of the last
    change of its source; holes stay holes.  Symbolic links in directories are copied as such.  A
    copy that was interrupted goes on where it was with --resume.  Within one target the provider
    copies.
    """
    into, place = trees.find(destination)
    directory = _is_directory(into, place)
    if len(sources) > 1 and not directory:
        raise ConfigError(f"{destination}: is not a directory, and there are several sources")
    total = Outcome()
    for text in sources:
        tree, source = trees.find(text)
        if not recursive and _is_directory(tree, source):
            raise ConfigError(f"{text}: is a directory; -r copies it")
        if destination.endswith("/") and not directory and not _is_directory(tree, source):
            raise ConfigError(f"{destination}: is not a directory")
        name = os.path.basename((source.path or "/").rstrip("/"))
        to = place.below(name) if directory and name else place
        _run(total, tree, source, into, to, listed, jobs=jobs, update=resume)
    _finish(total, into, persist, json)


@click.command()
@locating()
@click.argument("source", type=LOCATION)
@click.argument("destination", type=LOCATION)
@click.option("-c", "--checksum", is_flag=True, help="Compare bytes instead of times.")
@click.option("--delete", is_flag=True, help="Remove what SOURCE does not have.")
@click.option("--dry-run", is_flag=True, help="Only print what would be done.")
@_jobs
@_persist
@_verbose
@as_json
def sync(
    trees: Trees,
    source: str,
    destination: str,
    checksum: bool,
    delete: bool,
    dry_run: bool,
    jobs: int,
    persist: bool,
    listed: bool,
    json: bool,
) -> None:
    """Make the directory DESTINATION have what the directory SOURCE has.

    Copies, as `warabi cp` does, the files whose size or time of the last change differ; with
    --checksum, those whose bytes differ.
    """
    tree, found = trees.find(source)
    into, to = trees.find(destination)
    if not _is_directory(tree, found):
        tree.stat(found.path or "/")  # raises if it does not exist
        raise ConfigError(f"{source}: is not a directory; `warabi cp` copies files")
    total = Outcome()
    _run(
        total, tree, found, into, to, listed or dry_run,
        jobs=jobs, update=True, checksum=checksum, delete=delete, dry_run=dry_run,
    )  # fmt: skip
    _finish(total, into, persist and not dry_run, json)


def _is_directory(tree: Tree, location: Location) -> bool:
    try:
        return stat.S_ISDIR(tree.stat(location.path or "/", follow=True).mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _silent(what: str, path: str) -> None:
    pass


def _run(
    total: Outcome, tree: Tree, source: Location, into: Tree, to: Location, listed: bool,
    **settings: Any,
) -> None:  # fmt: skip
    """Copy, and add to *total* what was done."""
    if not source.path.strip("/") and source.local:
        raise ConfigError("/: is not copied as a whole")

    def complain(path: str, error: BaseException) -> None:
        click.echo(f"warabi: {printable(path)}: {explained(error)}", err=True)

    def told(what: str, path: str) -> None:
        print_lines([os.fsencode(printable(f"{what} {path}"))])

    with overall_progress("copy") as show:
        copier = Copier(
            tree, into, complain=complain, show=show, told=told if listed else _silent, **settings
        )
        outcome = copier.run(source.path or "/", to.path or "/")
    for key, value in asdict(outcome).items():
        setattr(total, key, getattr(total, key) + value)


def _finish(total: Outcome, into: Tree, persist: bool, json: bool) -> None:
    if persist:
        into.persist()
    if json:
        record = asdict(total)
        del record["total"]
        print_json(record)
    if total.failed:
        sys.exit(1)
