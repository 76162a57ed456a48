"""``warabi export`` and ``warabi import``: a target as one archive, and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import click

from warabi._core.output import PRIVATE, output
from warabi.tools.access import is_address, made_or_reached, reached
from warabi.tools.cli.common import InputFile, reaching
from warabi.tools.progress import progress


@click.command("export")
@click.argument("target", metavar="PATH|ADDRESS")
@reaching
@click.argument("out", metavar="OUT.tar", type=click.Path(path_type=Path, allow_dash=True))
def export_command(target: str, provider_id: int, out: Path, **security: str) -> None:
    """Write everything in a target to a tar archive, or to standard output (-).

    OUT.tar appears, or is replaced, when it is complete; a new one is its owner's alone (0600).

    Clients may write meanwhile: the names and the set of regions are those of one instant, the
    bytes of each region those of one instant.
    """
    from warabi.tools.archive.export import export

    with (
        reached(target, provider_id, security) as link,
        progress("export", link.call("used")) as advance,
        output(out, PRIVATE) as file,
    ):
        export(link, file, copying=is_address(target), advance=advance)


@click.command("import")
@click.argument("source", metavar="IN.tar", type=InputFile())
@click.argument("target", metavar="PATH|ADDRESS")
@reaching
@click.option("--new-ids", is_flag=True, help="Give the regions new IDs.")
@click.option("--pmem-size", type=int, metavar="BYTES",
              help="Create a pmem target of that quota if PATH does not exist.")  # fmt: skip
def import_command(
    source: IO[bytes],
    target: str,
    provider_id: int,
    new_ids: bool,
    pmem_size: int | None,
    **security: str,
) -> None:
    """Put everything in an archive of warabi export, or standard input (-), into a target.

    At a PATH where there is none a target is made.  One that has some of the IDs or names is left
    as it is, as it is when the archive is damaged.
    """
    from warabi.tools.archive.restore import restore

    size = os.fstat(source.fileno()).st_size or None
    with (
        made_or_reached(target, provider_id, security, pmem_size) as link,
        progress("import", size) as advance,
    ):
        restore(link, source, new_ids=new_ids, advance=advance)
