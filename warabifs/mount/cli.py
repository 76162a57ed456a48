"""The command ``warabifs``, with a subcommand for each task.

warabifs mount SOURCE MOUNTPOINT [-o ...]
warabifs umount MOUNTPOINT
warabifs doctor
warabifs install-helper

``warabifs SOURCE MOUNTPOINT [-o ...]`` mounts, too: this is how mount.fuse3(8) calls it for the
type ``fuse.warabifs``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

import warabi
from warabi._core.tuning import UNMOUNT_PATIENCE
from warabi.tools.cli.common import Commands, echo
from warabi.tools.cli.completion import completion
from warabifs.mount import doctor as examination
from warabifs.mount import install, unmount


class _Commands(Commands):
    program = "warabifs"
    unwinds = False

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and ":" in args[0]:  # not a command, but a source
            return "mount", mount, args
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands)
@click.version_option(warabi.__version__, prog_name="warabifs")
def main() -> None:
    """Mount Warabi targets as file systems."""


main.add_command(completion)


@main.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def mount(arguments: tuple[str, ...]) -> None:
    """Mount a target; takes the arguments of mount.warabifs."""
    from warabifs.mount.main import main  # imported late: the other commands do not need it

    main(arguments)


@main.command()
@click.argument("mountpoint")  # not click.Path, which would stat the mount, which may hang
@click.option("-l", "--lazy", is_flag=True, help="Unmount now; open files stay usable.")
@click.option("--timeout", default=UNMOUNT_PATIENCE, show_default=True, type=float, metavar="S",
              help="Seconds to wait until everything is persisted.")  # fmt: skip
def umount(mountpoint: str, lazy: bool, timeout: float) -> None:
    """Unmount; return when everything is persisted, or report what is not."""
    found = unmount.find(mountpoint)
    sys.exit(unmount.unmount(found, lazy=lazy, patience=timeout))


@main.command()
def doctor() -> None:
    """Diagnose why mounting does not work, and suggest remedies."""
    sys.exit(examination.main())


@main.command("install-helper")
@click.option("--prefix", default="/", show_default=True, metavar="DIR",
              type=click.Path(path_type=Path),
              help="Where to install; mount(8) looks in /sbin.")  # fmt: skip
@click.option("--uninstall", is_flag=True, help="Remove what was installed.")
def install_helper(prefix: Path, uninstall: bool) -> None:
    """Install the helpers for mount(8), umount(8) and fstab, and the manual page."""
    for line in install.uninstall(prefix) if uninstall else install.install(prefix):
        echo(line)
