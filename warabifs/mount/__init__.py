"""The command ``mount.warabifs``: options, mounting, unmounting, and related commands."""

from warabi._core import extras


def warabifs_command() -> None:
    """Run ``warabifs``, which needs the packages of an extra."""
    extras.run("warabifs", "warabifs.mount.cli", "cli")


def mount_command() -> None:
    """Run ``mount.warabifs``, which needs the packages of an extra."""
    extras.run("mount.warabifs", "warabifs.mount.main", "server")
