"""The ``warabi`` command."""

from warabi._core import extras


def command() -> None:
    """Run the command, which needs the packages of an extra."""
    extras.run("warabi", "warabi.tools.cli.main", "cli")
