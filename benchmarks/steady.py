"""What happens at a time of its own, kept from happening while system calls are counted.

A target commits by itself seconds after a change, and an event loop that met a write which the disk
held up has threads make its writes for a while.  Both belong to the moment, and not to the calls
that are counted when they happen.
"""

from __future__ import annotations

from warabi.target import commit, write_throttle
from warabi.tools.cli import main as cli

_LATER = 3600
"""Seconds; no count takes so long."""


def steady() -> None:
    """Have this process do only what it is asked for, and whatever takes long, too."""
    commit.COMMIT_INTERVAL = _LATER
    write_throttle._SLOW = _LATER * 10**9


def main() -> None:
    """The command ``warabi``, steady."""
    steady()
    cli.main()
