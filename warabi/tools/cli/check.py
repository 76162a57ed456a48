"""``warabi scrub`` and ``warabi fsck``: verification and repair of targets."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from warabi.errors import ConfigError
from warabi.tools.access import is_served, reached
from warabi.tools.cli.common import (
    LOCATION,
    as_json,
    echo,
    one_line,
    print_json,
    print_lines,
    reaching,
)
from warabi.tools.location import parse
from warabi.tools.progress import progress
from warabi.tools.quoting import printable


@click.command()
@click.argument("target", metavar="LOCATION", type=LOCATION)
@reaching
@click.option(
    "--update",
    is_flag=True,
    help="Enable checksums of a target in files, and compute missing ones.",
)
@as_json
def scrub(target: str, provider_id: int, update: bool, json: bool, **security: str) -> None:
    """Compare the data of a target with their checksums.

    Prints each damaged extent with its region and paths, and exits with 1 if there is one.
    """
    from warabi.tools.scrub import Totals
    from warabi.tools.scrub import scrub as rotten

    if update and is_served(target):
        raise click.UsageError(
            "--update requires the path of a target; for a provider, set `checksums` in its"
            " configuration"
        )
    totals = Totals()
    with (
        reached(target, provider_id, security, **({"checksums": True} if update else {})) as link,
        progress("scrub", link.call("used")) as advance,
    ):
        damage = []
        for rot in rotten(link, totals, advance=advance, updating=update):
            if json:
                damage.append(str(rot))
            else:
                print_lines([printable(str(rot)).encode(errors="surrogateescape")])
    if json:
        print_json({**vars(totals), "damage": damage})
    else:
        echo(
            f"{totals.regions} regions: {totals.verified} blocks verified,"
            f" {totals.unverified} unverified, {totals.rotten} rotten"
        )
    sys.exit(1 if totals.rotten else 0)


class _WrongUsage(click.UsageError):
    exit_code = 16


class _Fsck(click.Command):
    """A command with the exit statuses of fsck(8), which defines one for usage errors."""

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        try:
            return super().make_context(*args, **settings)
        except click.UsageError as error:
            raise _WrongUsage(error.message, error.ctx) from None


def _backend(context: click.Context, option: click.Parameter, name: str | None) -> str | None:
    from warabi.backends import registry

    if name is not None and name not in (known := registry.checked_by_fsck()):
        raise click.BadParameter(f"{name!r} is not one of {', '.join(map(repr, known))}.")
    return name


@click.command(cls=_Fsck)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--repair", is_flag=True, help="Repair the problems found.")
@click.option("--type", "backend", metavar="TYPE", callback=_backend,
              help="The backend type, if it cannot be read from the catalogue.")  # fmt: skip
@as_json
def fsck(path: Path, repair: bool, backend: str | None, json: bool) -> None:
    """Check the target at PATH, which must not be open, for damage.

    Reports problems, and with --repair what was done about them.  Files that belong to no region
    are moved to PATH.lost+found, regions without a place in the tree to its /lost+found.

    The exit status is 0 if there is no problem, 1 if all were repaired, 4 if some are left, 8 if
    the check could not be done, 16 for a usage error.
    """
    from warabi.tools.fsck import check

    said: list[str] = []

    def say(text: str) -> None:
        if json:
            said.append(text)
        else:
            print_lines([os.fsencode(printable(text))])

    with one_line(status=8):
        if parse(str(path)).pooled:
            raise ConfigError(f"{path}: fsck does not know targets in pools")
        report = check(path, repair=repair, say=say, backend=backend or "")
    found = report.corrected + report.left
    if json:
        print_json({"problems": found, "corrected": report.corrected, "messages": said})
    else:
        say(f"{path}: {found} problems, {report.corrected} corrected")
    sys.exit(report.status)
