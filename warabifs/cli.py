"""``warabifs``: the mount under the project's name.

warabifs mount SOURCE MOUNTPOINT [-o ...]
warabifs umount MOUNTPOINT
"""

from __future__ import annotations

import subprocess
import sys

import click

import warabi
from warabifs import entry


@click.group()
@click.version_option(warabi.__version__, prog_name="warabifs")
def main() -> None:
    """Mount Warabi targets as file systems."""


@main.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def mount(arguments: tuple[str, ...]) -> None:
    """Mount a target; takes the arguments of mount.warabifs."""
    sys.argv[1:] = arguments
    entry.mount()


@main.command()
@click.argument("mountpoint", type=click.Path())
def umount(mountpoint: str) -> None:
    """Unmount; everything is handed over and persisted."""
    sys.exit(subprocess.run(["fusermount3", "-u", mountpoint]).returncode)
