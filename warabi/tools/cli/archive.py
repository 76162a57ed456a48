"""``warabi export`` and ``warabi import``: archives of whole targets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import click

from warabi._core.output import PRIVATE, output
from warabi.tools.access import is_served, made_or_reached, reached
from warabi.tools.cli.common import LOCATION, InputFile, reaching
from warabi.tools.progress import progress


@click.command("export")
@click.argument("target", metavar="LOCATION", type=LOCATION)
@reaching
@click.argument("out", metavar="OUT.tar", type=click.Path(path_type=Path, allow_dash=True))
def export_command(target: str, provider_id: int, out: Path, **security: str) -> None:
    """Write the contents of a target to a tar archive, or to standard output (-).

    OUT.tar is created, or replaced, when it is complete; a new file has mode 0600.

    Clients may write concurrently: the names and the set of regions are a snapshot, and so are the
    data of each region.
    """
    from warabi.tools.archive.export import export

    with (
        reached(target, provider_id, security) as link,
        progress("export", link.call("used")) as advance,
        output(out, PRIVATE) as file,
    ):
        export(link, file, copying=is_served(target), advance=advance)


@click.command("import")
@click.argument("source", metavar="IN.tar", type=InputFile())
@click.argument("target", metavar="LOCATION", type=LOCATION)
@reaching
@click.option("--new-ids", is_flag=True, help="Give the regions new IDs.")
@click.option("--pmem-size", type=int, metavar="BYTES",
              help="Create a pmem target of that quota if LOCATION does not exist.")  # fmt: skip
def import_command(
    source: IO[bytes],
    target: str,
    provider_id: int,
    new_ids: bool,
    pmem_size: int | None,
    **security: str,
) -> None:
    """Import an archive of warabi export, or standard input (-), into a target.

    Creates a target at LOCATION, a path, if there is none.  If the target has some of the IDs or
    names, or the archive is damaged, the target is not changed.
    """
    from warabi.tools.archive.restore import restore

    size = os.fstat(source.fileno()).st_size or None
    with (
        made_or_reached(target, provider_id, security, pmem_size) as link,
        progress("import", size) as advance,
    ):
        restore(link, source, new_ids=new_ids, advance=advance)
